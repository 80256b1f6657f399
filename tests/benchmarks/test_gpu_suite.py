"""The GPU suite with tiny shapes on the CPU: every section works, and what fails in one does not stop the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_sections, gpu_suite, harness, tables
from benchmarks.gpu_sections import SECTIONS, Item, Setup
from benchmarks.ops import Case as LayerCase
from benchmarks.rivals import Conv2d
from us3l_kernels.backends import BACKENDS

FAST = ("machine", "linear layers", "convolutions", "norms", "blocks", "packing", "updates", "sanitizer", "one graph")
ALL = [(part, name) for part, sections in SECTIONS.items() for name in sections]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(torch.device("cpu"), True, tmp_path)


def run(setup: Setup, part: int, section: str, **options: Any) -> dict[str, Any]:
    """The section's items."""
    gpu_suite.run_section(part, section, setup, **options)
    result = json.loads(gpu_suite.finish(part, section, setup).read_text(encoding="utf-8"))
    assert result["benchmark"] == "gpu" and result["date"] and result["versions"]["torch"] == torch.__version__
    return result["items"]


@pytest.mark.parametrize(
    ("part", "section"),
    [each if each[1] in FAST else pytest.param(*each, marks=pytest.mark.slow) for each in ALL],
    ids=lambda value: str(value),
)
def test_section(setup: Setup, part: int, section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("US3L_TUNE_CACHE", str(setup.out / "tune.json"))
    items = run(setup, part, section)
    assert items
    assert not [item for item in items.values() if "error" in item or ("us" in item and "errors" in item)]


def test_correctness_of_some(setup: Setup) -> None:
    items = run(setup, 1, "correctness", items="conv2d 3x3/1 33 of 64")
    assert len(items) == 3 * len(gpu_sections.backends("conv2d"))
    for name, item in items.items():
        assert ("skipped" in item) == ("native, float16" in name)
        if "skipped" not in item:
            assert set(item["errors"]) == {"y", "dx", "dweight", "dbias"} and max(item["errors"].values()) < 0.03


def test_what_is_compiled_at_its_first_call_comes_last(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "backends", lambda op: ["cuda", "triton", "aten"])
    names = [name for name, _ in gpu_sections.correctness(setup)]
    backends = [name.split(", ")[-2] if ", " in name else "" for name in names]
    first, last = backends.index("triton"), len(names) - backends[::-1].index("aten")
    assert "SGD" in names[0] and last == first and set(backends[first:]) == {"triton"}
    precisions = [name.split(", ")[-1] for name in names[first:]]
    assert set(precisions[: precisions.count("bfloat16")]) == {"bfloat16"} and len(set(precisions)) == 3


def test_models_take_turns_and_tiles_come_after_all_backends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(settings: Any, size: int) -> Iterator[LayerCase]:
        for width in settings.widths:
            for channels in (8, 16):
                layer = Conv2d(channels, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, False)
                yield LayerCase(layer, width, (channels, size, size), (int(width * 8), size, size))

    monkeypatch.setattr(gpu_sections, "layer_cases", layers)
    names = [name for name, _ in gpu_sections.convolutions(replace(setup, smoke=False))]
    # The cifar and two others at 224 pixels, which have the same layers here.
    forward = [name.removesuffix(", forward") for name in names if name.endswith("forward")]
    assert forward[:3] == [f"conv 3x3/1 {c}->8 @{size}, width 0.625" for c, size in ((8, 32), (8, 224), (16, 32))]
    assert len(forward) == len(set(forward)) == 2 * 2 * 3
    assert names[len(names) // 2 :] == [f"{name}, tiles" for name in names[: len(names) // 2]]


def test_compiling_makes_the_calls_of_triton_once(setup: Setup) -> None:
    calls: list[str] = []
    sides = {name: lambda i, name=name: calls.append(f"{name} {i}") for name in ("cudnn", "triton")}
    sides["triton_tma"] = lambda _: {}["missing"]
    compiling = replace(setup, compiling=True)
    assert gpu_sections.microseconds(compiling, sides) == {"us": {}} and calls == ["triton 0"]
    sections = {name: section for of_part in SECTIONS.values() for name, (section, _) in of_part.items()}
    for name in set(gpu_sections.COMPILED) & set(FAST):
        for _, work in sections[name](compiling):
            assert not any(work().get("us", {}))


def test_a_wrong_kernel_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = BACKENDS["reference"]
    right = reference.linear_backward

    def outside(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, into: torch.Tensor, *rest: Any) -> Any:
        if into.dtype == torch.float32:
            into[-1, -1] += 1
        return right(grad, x, weight, into, *rest)

    monkeypatch.setattr(reference, "linear_backward", outside)
    items = run(setup, 1, "correctness", items="linear 37 rows, 33 of 64 -> 10 of 100, reference, float32")
    assert [item["error"] for item in items.values()] == ["Mismatch: dweight: written outside of the slice"]

    monkeypatch.setattr(reference, "linear_backward", right)
    exact = reference.linear

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return exact(x, *rest) * (1.01 if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(reference, "linear", wrong)
    items = run(setup, 1, "correctness", items="linear 37 rows, 33 of 64 -> 10 of 100, reference, float32")
    assert "Mismatch: y differs by 1.0e-02 of its largest value, ATen's by" in next(iter(items.values()))["error"]


def test_every_tile_of_a_kernel_is_tried_alone(setup: Setup) -> None:
    conv2d = pytest.importorskip("us3l_kernels.triton.conv2d", exc_type=ImportError)
    for direction, listed in {"dW": conv2d.GRADIENT_TILES, "forward": conv2d.PRODUCT_TILES}.items():
        shipped, seen = dict(listed), set()

        def side(_: int, listed: Any = listed, seen: Any = seen) -> None:
            (tile,) = listed["half"]
            assert tile == conv2d.FEW_ROWS["half"] and tile.channels == 1 << 31
            seen.add(tile)

        times = gpu_sections.triton_tiles(setup, direction, "triton", side)
        assert len(times) == len(seen) >= 2 and all(isinstance(us, float) for us in times.values())
        assert listed == shipped


def test_float32_is_checked_in_both_precisions_of_a_gpu(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may compute in TF32, with channels that suit it; so what is exact and what is not are held apart."""
    gpu = Setup(torch.device("cuda"), True, setup.out)
    assert "tf32" in gpu_sections.precisions(gpu, "conv2d") and "tf32" not in gpu_sections.precisions(gpu, "linear")
    setting = torch.backends.cudnn.conv
    before, seen = setting.fp32_precision, set()
    reference = BACKENDS["reference"]
    exact = reference.conv2d

    def conv2d(*arguments: Any) -> torch.Tensor:
        seen.add(setting.fp32_precision)
        return exact(*arguments)

    monkeypatch.setattr(reference, "conv2d", conv2d)
    case = next(case for case in gpu_sections.OP_CASES if case.op == "conv2d")
    for precision, expected in {"float32": "ieee", "tf32": "tf32"}.items():
        seen.clear()
        gpu_sections.check_operation(setup, case, "reference", precision)
        assert seen == {expected} and setting.fp32_precision == before


def test_the_sanitizer_sees_every_tensor(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = setup.out / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    program = """#!/bin/sh
    echo ERROR SUMMARY: $2 $PYTORCH_NO_CUDA_MEMORY_CACHING
    mkdir "${14}" && echo '{"result": {"errors": {}}}' > "${14}/correctness.jsonl"
    test $2 = memcheck || sleep 60
    """
    tool.write_text(program, encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setattr(gpu_sections, "SANITIZER_GRACE", 0.2)
    gpu = Setup(torch.device("cuda"), True, setup.out, until=time.time() + 4)
    (_, memcheck), (_, racecheck) = gpu_sections.sanitizer(gpu)
    assert memcheck() == {"summary": ["ERROR SUMMARY: memcheck 1"], "calls": 1}
    with pytest.raises(subprocess.TimeoutExpired):
        racecheck()
    assert time.time() < gpu.until + 1


def test_under_the_sanitizer_our_kernels_run_and_nothing_else(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("native", "aten", "reference"):
        conv2d = BACKENDS[name].conv2d

        def noted(*arguments: Any, name: str = name, conv2d: Any = conv2d) -> Any:
            seen.append(name)
            return conv2d(*arguments)

        monkeypatch.setattr(BACKENDS[name], "conv2d", noted)
    case = next(case for case in gpu_sections.OP_CASES if case.op == "conv2d")
    results = {
        name: gpu_sections.check_operation(replace(setup, sanitized=True), case, name, "float32")
        for name in gpu_sections.backends("conv2d")
    }
    assert results.pop("native", {"errors": {}}) == {"errors": {}} and not any(results.values())
    assert "aten" not in seen and seen.count("native") == ("native" in gpu_sections.backends("conv2d"))


def failing(setup: Setup) -> Iterator[Item]:
    yield "fine", lambda: {"value": 1}
    yield "raises", lambda: {}["missing"]
    yield "dies", lambda: os._exit(7)
    yield "hangs", lambda: {"slept": __import__("time").sleep(60)}
    yield "fine as well", lambda: {"value": 2}


def test_what_raises_is_reported_and_the_rest_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS[1], "failing", (failing, 0.1))
    assert run(setup, 1, "failing", items="fine").keys() == {"fine", "fine as well"}
    items = run(setup, 1, "failing", items="raises")
    assert items["raises"]["error"] == "KeyError: 'missing'" and "Traceback" in items["raises"]["traceback"]
    assert items["fine"]["value"] == 1  # of the first call
    assert run(replace(setup, until=0), 1, "failing")["hangs"] == {"skipped": "out of time"}


def test_what_dies_is_reported_and_the_rest_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a section, here one that has no need to import torch."""
    monkeypatch.setitem(SECTIONS[1], "failing", (failing, 1.0))
    monkeypatch.setattr(gpu_suite, "LONGEST_ITEM", 1.5)
    child = (
        "import json, os, subprocess, sys, time\n"
        "log, items = sys.argv[1], ['fine', 'dies', 'hangs', 'fine as well']\n"
        "done = [json.loads(line).get('begin') for line in open(log)] if os.path.exists(log) else []\n"
        "for item in items:\n"
        "    if item in done: continue\n"
        "    open(log, 'a').write(json.dumps({'begin': item}) + '\\n')\n"
        "    if item == 'dies': os._exit(7)\n"
        "    if item == 'hangs':\n"
        "        open('started', 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "        time.sleep(60)\n"
        "    open(log, 'a').write(json.dumps({'result': {'value': 1}}) + '\\n')\n"
    )
    popen = subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        if "--section" not in command:  # git
            return popen(command, **options)
        log = str(gpu_suite.log_of(setup.out, "failing"))
        return popen([sys.executable, "-c", child, log], **options | {"cwd": setup.out})

    monkeypatch.setattr(gpu_suite.subprocess, "Popen", started)
    gpu_suite.main(["--part", "1", "--out", str(setup.out), "--device", "cpu", "--smoke", "--only", "failing"])
    items = json.loads((setup.out / "part1_failing.json").read_text(encoding="utf-8"))["items"]
    assert items["fine"] == items["fine as well"] == {"value": 1}
    assert items["dies"] == {"error": "the process ended with code 7"}
    with tarfile.open(setup.out / "part1.tar.gz") as archive:
        assert archive.getnames() == ["part1_failing.json"]
    assert items["hangs"] == {"error": "stopped after 2 s"}
    process = Path("/proc", (setup.out / "started").read_text(encoding="utf-8"), "stat")
    assert not process.exists() or " Z " in process.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_command_runs_with_little_installed(tmp_path: Path) -> None:
    """As on a machine that has torch and what timm needs."""
    absent = ("omegaconf", "typer", "rich", "tensorboard", "sklearn", "matplotlib", "threadpoolctl", "hypothesis")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {absent}: sys.modules[name] = None\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    suite = Path(gpu_suite.__file__)
    options = ["--part", "1", "--out", "results", "--device", "cpu", "--smoke", "--only", "graphs"]
    command = [sys.executable, str(suite), *options]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    items = json.loads((tmp_path / "results" / "part1_graphs.json").read_text(encoding="utf-8"))["items"]
    assert all(item["equal"] for item in items.values()) and len(items) == 2


def test_imports_need_little_installed() -> None:
    """Nothing that the machine with the GPU lacks is imported, even if it is here."""
    program = (
        "import sys; [sys.modules.__setitem__(n, None) for n in"
        " ('omegaconf', 'typer', 'rich', 'tensorboard', 'sklearn', 'matplotlib', 'threadpoolctl', 'hypothesis')]\n"
        "import benchmarks.gpu_suite"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tables.README.parent, check=True, timeout=300)


class BrokenGpu:
    """A device that is broken by what calls `break_`, for the rest of its process."""

    def __init__(self) -> None:
        self.broken = False

    def break_(self) -> None:
        self.broken = True
        self.use()

    def use(self) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        return {"value": 1}

    def why_broken(self, *_: object) -> str | None:
        return "illegal access" if self.broken else None

    def section(self, setup: Setup) -> Iterator[Item]:
        def break_behind_the_host() -> dict[str, Any]:
            self.broken = True
            return {"value": 2}

        sides = {"one": lambda _: self.break_(), "two": lambda _: self.use()}
        yield "raises", lambda: {}["missing"]
        yield "fine", self.use
        yield "breaks", self.break_
        yield "fine after it", self.use
        yield "breaks behind the host", break_behind_the_host
        for turn in range(gpu_suite.BARRED):
            yield f"side {turn}", lambda: gpu_sections.microseconds(setup, sides)
        yield "no more", lambda: gpu_sections.microseconds(setup, sides)


def test_what_breaks_the_device_is_charged_for_it_and_the_rest_goes_on(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An illegal address is an exception, after which every call of the process fails: it is to end there."""
    gpu = BrokenGpu()
    monkeypatch.setitem(SECTIONS[1], "failing", (gpu.section, 1.0))
    monkeypatch.setattr(harness, "why_broken", gpu.why_broken)
    monkeypatch.setattr(os, "_exit", sys.exit)
    codes = []
    for _ in range(10):
        gpu.broken = False
        try:
            gpu_suite.run_section(1, "failing", setup)
        except SystemExit as ended:
            codes.append(ended.code)
    assert codes == [gpu_suite.BROKEN] * (2 + gpu_suite.BARRED)
    items = json.loads(gpu_suite.finish(1, "failing", setup).read_text(encoding="utf-8"))["items"]
    assert items["fine"]["value"] == items["fine after it"]["value"] == 1 and "broken" not in items["raises"]
    assert items["breaks"]["error"] == "RuntimeError: an illegal memory access was encountered"
    assert items["breaks behind the host"]["error"] == "illegal access"
    for turn in range(gpu_suite.BARRED):
        assert items[f"side {turn}"]["broken"] == "one" and "illegal memory" in items[f"side {turn}"]["error"]
    assert items["no more"]["errors"] == {"one": gpu_sections.LEFT_OUT} and items["no more"]["us"].keys() == {"two"}


@pytest.mark.slow
def test_another_process_goes_on_where_one_was_broken(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS[1], "failing", (failing, 1.0))
    program = (
        "import sys\n"
        "from benchmarks import gpu_suite, harness\n"
        "from tests.benchmarks.test_gpu_suite import BrokenGpu\n"
        "gpu = BrokenGpu()\n"
        "harness.why_broken = gpu.why_broken\n"
        "gpu_suite.SECTIONS[1]['failing'] = (gpu.section, 1.0)\n"
        "gpu_suite.main(sys.argv[1:])\n"
    )
    popen = subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        return popen([command[0], "-c", program, *command[2:]] if "--section" in command else command, **options)

    monkeypatch.setattr(gpu_suite.subprocess, "Popen", started)
    options = ["--part", "1", "--out", str(setup.out), "--device", "cpu", "--smoke", "--only", "failing"]
    gpu_suite.main(options)
    items = json.loads((setup.out / "part1_failing.json").read_text(encoding="utf-8"))["items"]
    assert items["breaks"]["error"] == "RuntimeError: an illegal memory access was encountered"
    assert items["fine after it"]["value"] == 1 and items["no more"]["us"].keys() == {"two"}


def test_what_is_read_with_compiled_rivals_takes_the_place_of_what_was_read_without(setup: Setup) -> None:
    log = gpu_suite.log_of(setup.out, "steps")
    for name, report in (("step a", {"ratios": [1]}), ("step a, compiled", {"ratios": [1, 2]})):
        gpu_suite.append(log, {"begin": name})
        gpu_suite.append(log, {"result": {"report": report, "file": "step a", "ratios": report["ratios"]}})
    items = json.loads(gpu_suite.finish(3, "steps", setup).read_text(encoding="utf-8"))["items"]
    assert [item["file"] for item in items.values()] == ["step_a.json"] * 2
    assert json.loads((setup.out / "step_a.json").read_text(encoding="utf-8"))["ratios"] == [1, 2]


def test_no_gpu_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu_suite.main(["--part", "1", "--out", str(tmp_path)])
    assert "torch sees no GPU here" in capsys.readouterr().err
