"""The `us3l` command: every command end to end on tiny inputs, and errors without tracebacks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from us3l import checkpoint as checkpoints
from us3l import cli, parity
from us3l.parity import run_parity
from us3l_kernels import _native
from us3l_kernels.backends import BACKENDS, measured

TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
    "data.train_samples=64", "data.test_samples=32", "data.batch_size=32", "method.hidden_dim=16", "method.dim=8",
    "train.epochs=1", "train.device=cpu", "train.threads=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the user reads on standard error, on one line, of a command that ends with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["us3l", *map(str, arguments)])
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ") and "Traceback" not in text
    return " ".join(text.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    output = run("pretrain", *TINY, f"checkpoint.dir={folder}")
    assert "epochs: 1" in output and "epoch 1/1" in output
    return folder / "step-000000002.pt"


def test_help_needs_no_torch() -> None:
    program = "import sys; from us3l.cli import app; sys.exit('torch' in sys.modules or 'omegaconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    output = run("--help")
    commands = "pretrain evaluate finetune detect calibrate export import search profile tune doctor parity reproduce"
    assert all(command in output for command in [*commands.split(), "demo", "bench"])


def test_pretrain_writes_what_it_says(trained: Path) -> None:
    names = {path.name.partition(".")[0] for path in trained.parent.iterdir()}
    assert names == {"config", "events", "step-000000002"}
    assert "epochs: 1" in (trained.parent / "config.yaml").read_text(encoding="utf-8")


def test_pretrain_needs_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    less = ["data.train_samples=16", "data.test_samples=16", "data.batch_size=16", "train.epochs=1", "train.threads=1"]
    assert "in_channels: 1" in run("pretrain", *less)
    assert checkpoints.load("runs/us3l/step-000000001.pt")["config"]["model"]["in_channels"] == 1


def test_missing_data_are_said_before_the_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "needs data.root" in fails(capsys, monkeypatch, "pretrain", "data.name=cifar10")
    monkeypatch.setattr(sys, "argv", ["us3l", "pretrain", "data.name=cifar10"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "epochs:" not in capsys.readouterr().out


def test_resume_auto_goes_on_and_a_path_brings_its_configuration(trained: Path, tmp_path: Path) -> None:
    assert "1 epochs and 0 batches are done" in run(
        "pretrain", "--resume", "auto", *TINY, f"checkpoint.dir={trained.parent}"
    )
    for place in (trained, trained.parent):
        output = run("pretrain", "--resume", place, f"checkpoint.dir={tmp_path}")
        assert "name: resnet_tiny" in output and "Resuming from" in output


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_evaluate(trained: Path, tmp_path: Path, probe: str) -> None:
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    output = run("evaluate", probe, trained, "--widths", "1.0,0.25", "--json", file, "--plot", plot)
    assert probe in output and "0.25" in output
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["width"] for row in rows] == [1.0, 0.25]
    assert all(0 <= row["accuracy"] <= 100 for row in rows) and rows[0]["macs"] > 4 * rows[1]["macs"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_calibrate_stores_statistics_that_evaluation_uses(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.pt"
    path.write_bytes(trained.read_bytes())
    run("calibrate", path, "--widths", "0.5")
    output = run("calibrate", path, "--widths", "0.25")
    assert "0.5" in output and "0.25" in output
    saved, before = checkpoints.load(path), checkpoints.load(trained)
    assert set(saved["statistics"]) == {"0.5", "0.25"} and before["statistics"] is None
    assert all(torch.equal(value, before["method"][key]) for key, value in saved["method"].items())

    for mean, _ in saved["statistics"]["0.5"].values():
        mean += 100.0  # so wrong that an evaluation which reads them must differ
    checkpoints.save(path, saved)
    files = []
    for checkpoint in (trained, path):
        files.append(tmp_path / f"{checkpoint.stem}.json")
        run("evaluate", "linear", checkpoint, "--widths", "0.5", "--json", files[-1])
    rows = [json.loads(file.read_text(encoding="utf-8"))["rows"][0]["accuracy"] for file in files]
    assert rows[0] != rows[1]


def test_a_checkpoint_from_before_a_key_existed_is_read(trained: Path, tmp_path: Path) -> None:
    saved = torch.load(trained, weights_only=True)
    del saved["config"]["model"]["norm"], saved["config"]["train"]["amp"]
    torch.save(saved, tmp_path / "step-000000002.pt")
    run("evaluate", "knn", tmp_path, "--widths", "0.5")
    assert "is finished" in run("pretrain", "--resume", "auto", *TINY, f"checkpoint.dir={tmp_path}")


def test_statistics_of_other_images_are_not_used(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = tmp_path / "copy.pt", []
    path.write_bytes(trained.read_bytes())
    run("calibrate", path, "--widths", "0.5")
    for checkpoint in (trained, path):
        output = run("evaluate", "linear", checkpoint, "data.size=28", "--widths", "0.5", "--json", tmp_path / "rows")
        rows.append(json.loads((tmp_path / "rows").read_text(encoding="utf-8"))["rows"])
        assert ("taken with another data.size:" in " ".join(output.split())) == (checkpoint == path)
    assert rows[0] == rows[1]
    assert "taking them anew" not in run("evaluate", "knn", path, "data.batch_size=16", "--widths", "0.5")
    assert "data.size: " in fails(capsys, monkeypatch, "calibrate", path, "data.size=28")


def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no checkpoint in the folder" in fails(capsys, monkeypatch, "evaluate", "knn", tmp_path)
    (tmp_path / "step-000000002.pt").write_bytes(trained.read_bytes())
    (tmp_path / "step-000000003.pt").write_bytes(trained.read_bytes()[:1000])  # torn
    output = run("calibrate", tmp_path, "--widths", "0.5")
    assert "step-000000003.pt is not a readable checkpoint" in " ".join(output.split())
    assert set(checkpoints.load(tmp_path / "step-000000002.pt")["statistics"]) == {"0.5"}
    run("evaluate", "knn", tmp_path, "--widths", "0.5", "--json", tmp_path / "rows.json")
    assert "step-000000002.pt" in json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["checkpoint"]


def test_what_a_checkpoint_cannot_do_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    switchable = ["model.norm=switchable", "sampler.kind=fixed", "sampler.widths=[1.0,0.5]"]
    run("pretrain", *TINY, *switchable, f"checkpoint.dir={tmp_path}")
    for command in (["evaluate", "knn"], ["calibrate"]):
        text = fails(capsys, monkeypatch, *command, tmp_path, "--widths", "1.0,0.75")
        assert "--widths" in text and "[1.0, 0.5]" in text and "0.75" in text
    text = fails(capsys, monkeypatch, "evaluate", "knn", tmp_path, "data.name=random", "--widths", "1.0")
    assert "data.name=random" in text and "3 channels" in text and "takes 1" in text


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ("0.5,layer9=0.25", "--width: the plan names 'layer9', which has no sliced layer; the nearest name is"),
        ("1.0,0.5", "--width: expected one width, or a plan such as 0.5,layer3=0.25, got '1.0,0.5'"),
        ("0.5,=0.25", "--width: expected one width"),
        ("half", "--width: expected one width"),
        ("2", "--width: width: expected a number in (0, 1]"),
    ],
)
def test_a_wrong_width_is_said_before_anything_else(
    trained: Path, width: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["export"], ["detect", "--coco-root", "nowhere"]):
        assert message in fails(capsys, monkeypatch, *command, trained, "--width", width)


def test_a_plan_may_leave_the_rest_at_full_width(trained: Path, tmp_path: Path) -> None:
    assert "32 features" in run("export", trained, "--width", "layer1=0.5,conv1=0.5", "--out", tmp_path / "a.pt2")


def test_profile_is_the_table_of_the_paper(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    output = run("profile", "resnet18", "--widths", "1.0,0.5", "--json", file)
    assert re.search(r"11\.69 .*1814", output) and re.search(r"3\.06 .*483", output)
    assert json.loads(file.read_text(encoding="utf-8"))["rows"][0]["params"] == 11689512
    output = run("profile", "resnet18", "--input", 32, "--stem", "cifar", "--classes", 100)
    assert re.search(r"0\.71 .*35", output)


def test_tune_measures_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.json"
    monkeypatch.setenv("US3L_TUNE_CACHE", str(file))
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setattr("us3l_kernels.tune.LEAST_SECONDS", 1e-6)
    small = ["--model", "resnet_tiny", "--input", 8, "--batch", 2, "--widths", "1.0,0.5", "--threads", 1]
    output = run("tune", *small)
    assert str(file) in output.replace("\n", "")
    if _native.load() is not None:
        assert "batch_norm" in output and len(measured.load("cpu").measurements) > 3
    assert "tuned choices" in run("doctor")
    assert "--dtype: expected fp32 or bf16" in fails(capsys, monkeypatch, "tune", "--dtype", "fp64")
    monkeypatch.setenv("US3L_TUNE_CACHE", "")
    assert "US3L_TUNE_CACHE: expected a file" in fails(capsys, monkeypatch, "tune", *small)


def test_doctor_lists_backends() -> None:
    output = run("doctor")
    assert all(name in output for name in ("torch", "native", "aten", "reference"))


FIXTURES = Path(__file__).parent / "fixtures"


def test_parity_exits_with_1_above_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["parity", next(FIXTURES.glob("*simclr*.json")), "--backend", "aten", "--dtype", "float32"]
    reports = []
    monkeypatch.setattr(parity, "run_parity", lambda *given: reports.append(run_parity(*given)) or reports[-1])
    assert "all within tolerance" in run(*arguments)
    (report,) = reports
    strict = [replace(comparison, tolerance=1e-9) for comparison in report.comparisons]
    monkeypatch.setattr(parity, "run_parity", lambda *given: replace(report, comparisons=strict))
    assert "FAILED" in run(*arguments, code=1)


def test_reproduce_exits_with_1_if_a_claim_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def table(what: str, scale: str, **options: Any) -> dict[str, Any]:
        given.update(options, what=what, scale=scale)
        return {"passed": given["seeds"] == 2}

    monkeypatch.setattr("us3l.reproduce.reproduce", table)
    file = tmp_path / "numbers.json"
    arguments = ["reproduce", "vit", "data.root=here", "--scale", "full", "--out", tmp_path, "--json", file]
    run(*arguments, "--seeds", 2)
    assert json.loads(file.read_text()) == {"passed": True}
    assert (given["what"], given["scale"], given["folder"]) == ("vit", "full", tmp_path)
    assert given["overrides"] == ["data.root=here"]
    run(*arguments, "--seeds", 3, code=1)
    assert json.loads(file.read_text()) == {"passed": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "train.epoch=3"], "did you mean 'train.epochs'"),
        (["pretrain", "--config", "mini_usl"], "did you mean 'mini_us3l'"),
        (["pretrain", "data.name=cifar10", "data.root=/nowhere"], "/nowhere"),
        (["pretrain", "--resume", "missing.pt"], "no checkpoint at missing.pt"),
        (["evaluate", "knn", "missing.pt"], "no checkpoint at missing.pt"),
        (["evaluate", "knn", "missing.pt", "--widths", "1.0,x"], "--widths: expected numbers"),
        (["calibrate", "missing.pt", "--widths", "1.5"], "widths in (0, 1]"),
        (["profile", "resnet1"], "resnet18, resnet34"),
        (["parity", "missing.json"], "missing.json"),
        (["reproduce", "table2"], "expected table1, ablation-guidelines"),
        (["reproduce", "table1", "--scale", "maxi"], "maxi"),
    ],
)
def test_user_errors_are_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("US3L_BACKEND", "cudnn", f"one of {['auto', *BACKENDS]}"),
        ("US3L_WEIGHT_CACHE_MB", "lots", "a number of megabytes (2**20 bytes)"),
    ],
)
def test_a_wrong_environment_variable_is_one_message(
    variable: str, value: str, expected: str, tmp_path: Path
) -> None:
    program = "from us3l.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "pretrain", *TINY, f"checkpoint.dir={tmp_path}"],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"Error: {variable}: expected {expected}, got {value!r}\n"


def test_the_network_of_a_checkpoint_cannot_be_overridden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    text = fails(capsys, monkeypatch, "evaluate", "knn", trained, "model.divisor=8")
    assert "model.divisor is part of the trained network" in text


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("us3l.engine.Trainer.fit", interrupted)
    run("pretrain", *TINY, f"checkpoint.dir={tmp_path}", code=128 + signal.SIGINT)


def test_warnings_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    cli._show_warning(UserWarning("mind the gap"), UserWarning, "engine.py", 3)
    cli._show_warning(DeprecationWarning("old"), DeprecationWarning, "other.py", 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Warning: mind the gap", "Warning: old (DeprecationWarning at other.py:4)"]


def test_bench_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("benchmarks.cli.main", given.append)
    run("bench", "step", "--model", "resnet18", "--help")
    assert given == [["step", "--model", "resnet18", "--help"]]
