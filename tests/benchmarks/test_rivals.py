"""The rivals compute the published algorithm, and equal each other where they should."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import ops, rivals, step
from benchmarks.cli import app, main
from benchmarks.harness import Mismatch, relative_error
from benchmarks.rivals import Eager, Published, Settings, Standalone, Student, initial_weights
from us3l.errors import ConfigError

TINY = Settings(model="resnet_tiny", hidden_dim=32, dim=16, dtype=torch.float64, weight_decay=0.1)


def images(settings: Settings = TINY, batch: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    return step.random_images(settings, size=size, batch=batch, seed=seed)[0]


def flat(parameters: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize(
    ("channels", "width", "ratio", "expected"),
    [(64, 1.0, 1, 64), (64, 0.25, 1, 16), (64, 0.6, 1, 40), (64, 0.17, 1, 16), (16, 0.25, 1, 8), (96, 0.5, 6, 48)],
)
def test_active_channels(channels, width, ratio, expected):
    assert rivals.active_channels(channels, width, ratio) == expected


def test_both_views_in_one_batch_is_exact():
    weights = initial_weights(TINY)
    stacked, single = (Eager(TINY, weights, stacked=value) for value in (True, False))
    for turn in range(2):
        batch = images(seed=turn)
        torch.testing.assert_close(stacked.step(batch), single.step(batch), rtol=1e-9, atol=1e-9)
    assert relative_error(flat(stacked.parameters()), flat(single.parameters())) < 1e-12
    assert relative_error(flat(stacked.teacher_parameters()), flat(single.teacher_parameters())) < 1e-12


def test_published_and_eager_agree_on_one_width():
    """With the full width alone the two policies are the same."""
    settings = replace(TINY, widths=(1.0,))
    weights = initial_weights(settings)
    published, eager = Published(settings, weights), Eager(settings, weights, stacked=True)
    for turn in range(2):
        batch = images(seed=turn)
        torch.testing.assert_close(published.step(batch), eager.step(batch), rtol=1e-9, atol=1e-9)
    assert relative_error(flat(published.parameters()), flat(eager.parameters())) < 1e-11


def test_regulariser_decays_later_channels_less():
    weights = initial_weights(TINY)
    published = Published(TINY, weights)
    published.regulariser(0.5).backward()
    for parameter in published.student.parameters():
        expected = rivals.row_decay(parameter, TINY) * parameter
        torch.testing.assert_close(parameter.grad, expected.detach(), rtol=1e-12, atol=1e-12)
    conv = rivals.row_decay(torch.empty(32, 3, 3, 3), TINY).flatten()
    torch.testing.assert_close(conv[[0, 3, 4, 31]], 0.1 * torch.tensor([1, 1, 0.95, 0.65]))


@pytest.mark.parametrize("model", ["resnet_tiny", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_standalone_networks_are_the_sub_networks_without_slicing(model):
    """Same losses, and their gradients at full size add up to the joint gradient."""
    settings = replace(TINY, model=model, lr=1e-3, weight_decay=0.0)
    weights = initial_weights(settings)
    eager, standalone = (kind(settings, weights, stacked=True) for kind in (Eager, Standalone))
    start = {width: flat(list(network.parameters())) for width, network in standalone.networks.items()}
    batch = images(settings)
    torch.testing.assert_close(eager.step(batch), standalone.step(batch), rtol=1e-9, atol=1e-9)

    total = [torch.zeros_like(weight) for weight in weights]
    for width, network in standalone.networks.items():
        sizes = [parameter.numel() for parameter in network.parameters()]
        updates = (flat(list(network.parameters())) - start[width]).split(sizes)
        for into, parameter, update in zip(total, network.parameters(), updates, strict=True):
            into[tuple(slice(size) for size in parameter.shape)] += update.view(parameter.shape)
    joint = flat(eager.parameters()) - flat(weights)
    assert relative_error(flat(total), joint) < 1e-8


@pytest.mark.parametrize(("stem", "size"), [("cifar", 16), ("imagenet", 48)])
def test_us3l_equals_its_rivals(stem, size):
    errors = step.check_exactly(replace(TINY, stem=stem), size=size, rivals=["standalone"], stacked=True)
    assert errors.keys() == {"float64 joint", "float64 per_width", "float64 standalone"}


@pytest.mark.parametrize("what", ["alpha", "teacher_momentum", "momentum", "temperature"])
def test_the_check_sees_a_wrong_setting(what, monkeypatch):
    wrong = getattr(TINY, what) * 0.9
    original = step.US3L.__init__
    monkeypatch.setattr(
        step.US3L,
        "__init__",
        lambda self, settings, weights, *, policy: original(
            self, replace(settings, **{what: wrong}), weights, policy=policy
        ),
    )
    with pytest.raises(Mismatch):
        step.check_exactly(TINY, size=16, rivals=[], stacked=True)


@pytest.mark.slow
def test_published_repeats_the_numbers_of_the_published_code():
    file = Path(__file__).parents[1] / "us3l" / "fixtures" / "simclr_momentum_resnet18_cifar.json"
    recorded = json.loads(file.read_text())
    config, regulariser = recorded["config"], recorded["config"]["regulariser"]
    settings = Settings(
        hidden_dim=config["hidden_dim"],
        dim=config["dim"],
        temperature=config["temperature"],
        teacher_momentum=config["momentum"],
        lr=config["optimizer"]["lr"],
        momentum=config["optimizer"]["momentum"],
        weight_decay=2 * regulariser["lambda"],
        alpha=regulariser["alpha"],
        groups=regulariser["groups"],
        widths=tuple(width["width"] for width in recorded["steps"][0]),
        dtype=torch.float64,
    )
    published = Published(settings, _recorded_start(settings))
    generator = torch.Generator().manual_seed(1000)
    shape = (config["batch"], 3, config["size"], config["size"])
    views = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    losses = published.step(torch.cat(views))
    expected = torch.tensor([width["loss"] for width in recorded["steps"][0]], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-11)


def _recorded_start(settings: Settings) -> list[torch.Tensor]:
    weights = []
    for name, parameter in Student(settings).named_parameters():
        seed = zlib.crc32(name.replace("encoder.", "encoder_q.").encode())
        random = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        if parameter.ndim > 1:
            weights.append(random * (2 / parameter[0].numel()) ** 0.5)
        else:
            weights.append(0.1 * random + (1.0 if name.endswith("weight") else 0.0))
    return weights


def test_measured_step_has_the_documented_form(monkeypatch):
    monkeypatch.setattr(step, "peaks", lambda *_: {"matrix product": 5e10, "convolution": 1e11})
    monkeypatch.setattr(step, "copy_bandwidth", lambda *_: 1e10)
    settings = replace(TINY, dtype=torch.float32)
    result = step.measure(
        settings, size=16, batch=4, rivals=["published", "eager", "standalone", "eager_bf16"], rounds=2, warmup=0
    )
    assert list(result["median_ms"]) == ["us3l", "published", "eager", "standalone", "eager_bf16"]
    assert list(result["ratios"]) == ["published", "eager", "standalone", "eager_bf16"]
    for rival, ratio in result["ratios"].items():
        assert ratio == pytest.approx(result["median_ms"][rival] / result["median_ms"]["us3l"])
    assert result["config"]["step"] == "joint" and result["config"]["batch"] == 4
    assert result["versions"]["torch"] == torch.__version__
    limit = result["limit"]
    assert limit["peak_of"] == "convolution"
    assert limit["compute_ms"] == pytest.approx(10 * limit["gflop"])
    assert limit["memory_ms"] == pytest.approx(100 * limit["gbyte"])
    for parts in result["breakdown_ms"].values():
        assert parts["convolution"] > 0 and parts["norm"] > 0 and parts["update"] > 0
    assert set(result["checks"]) > {"float64 joint", "float64 per_width", "float64 standalone"}
    assert result["checks"]["eager_bf16 from float64, update"] > 10 * result["checks"]["us3l from float64, update"]


@pytest.mark.parametrize(("policy", "plain"), [("joint", "eager"), ("per_width", "published")])
def test_a_step_as_timed_is_compared_with_a_wider_dtype(policy, plain, monkeypatch):
    settings = replace(TINY, dtype=torch.bfloat16)
    weights, batch = initial_weights(settings), images(settings)
    sides = {"us3l": step.make_side("us3l", settings, weights, stacked=True, policy=policy)}
    _, errors = step.first_steps(settings, sides, weights, batch, policy)
    assert errors["us3l from float32, update"] <= step.MULTIPLE * errors[f"{plain} from float32, update"]

    monkeypatch.setattr(step, "MULTIPLE", 1e-3)
    with pytest.raises(Mismatch, match="us3l: (losses|update) differ by .* from the step in torch.float32"):
        step.first_steps(settings, sides, weights, batch, policy)


def test_operations_are_compared_with_float64():
    settings = replace(TINY, dtype=torch.float32, widths=(1.0, 0.5))
    result = ops.measure(settings, size=8, batch=4, rounds=1, seconds=1)
    rows = result["rows"]
    kinds = {row["kind"] for row in rows}
    assert kinds == {"stem conv 3x3/1", "conv 3x3/1", "conv 3x3/2", "conv 1x1/2", "linear", "norm+relu"}
    assert all(row["errors"]["us3l"] < 1e-5 for row in rows)
    assert {row["backend"] for row in rows} <= {"native", "aten"}
    ratios = [row["ratios"]["eager"] for row in rows if (row["kind"], row["direction"]) == ("conv 3x3/1", "dW")]
    assert result["geometric_mean_ratios"]["conv 3x3/1, dW"] == pytest.approx(geometric_mean(ratios))
    assert result["minimum_ratios"]["conv 3x3/1, dW"] == min(ratios)


def test_operations_of_some_layers_alone():
    settings = replace(TINY, dtype=torch.float32, widths=(1.0,))
    result = ops.measure(settings, size=8, batch=4, rounds=1, seconds=1, only="conv 3x3/2 16->32")
    row = {row["direction"]: row for row in result["rows"]}
    assert list(row) == ["forward", "dX", "dW"]
    # 16 x 32 filters of 3x3 for 4 images of 4x4 pixels, a multiplication and an addition each
    operations = 2 * 16 * 32 * 9 * 4 * 4 * 4
    assert row["dX"]["gflops"]["us3l"] == pytest.approx(operations / row["dX"]["median_ms"]["us3l"] / 1e6)
    with pytest.raises(ConfigError, match="only: no layer has 'conv 9x9' in its name; there are stem conv 3x3/1 3->16"):
        ops.measure(settings, size=8, batch=4, rounds=1, seconds=1, only="conv 9x9")


def test_an_operation_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(ops, "TOLERANCES", {torch.float32: 1e-12})
    with pytest.raises(Mismatch, match="us3l, stem conv 3x3/1 3->16 @8, width 1, forward: largest error"):
        ops.measure(replace(TINY, dtype=torch.float32), size=8, batch=4, rounds=1, seconds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--widths", "0.5,1.0"], "1.0, then different widths below it"),
        (["step", "--widths", "1.0,x"], "numbers between commas"),
        (["step", "--widths", "1.0,0.5,0.5"], "expected different numbers from 0.01 to 1"),
        (["step", "--rivals", "fastest"], "compile_graphs, standalone, eager_bf16, got 'fastest'"),
        (["step", "--dtype", "fp8"], "expected one of fp32, bf16"),
        (["step", "--step", "twice"], "expected one of joint, per_width"),
        (["step", "--rivals", "eager_bf16", "--dtype", "bf16"], "under --dtype bf16 it is eager"),
        (["scaling", "--widths", "2"], "expected different numbers from 0.01 to 1, got '2'"),
        (["scaling", "--widths", "nan"], "expected different numbers from 0.01 to 1, got 'nan'"),
        (["scaling", "--batches", "1"], "expected different numbers of 2 and more, got '1'"),
        (["scaling", "--sizes", "32,0"], "expected different numbers of 8 and more, got '32,0'"),
        (["scaling", "--plot", "plot.txt"], "expected one of .svg, .png, got '.txt'"),
        (["inference", "--batches", "4,0"], "expected different numbers of 1 and more, got '4,0'"),
        (["data", "--workers", "-1"], "expected different numbers of 0 and more, got '-1'"),
        (["data", "--images", "63"], "expected two batches of --batch 32 at least, got 63"),
    ],
)
def test_command_line_names_the_wrong_option(arguments, message, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.fix_allocator", lambda: None)
    run = CliRunner().invoke(app, arguments, terminal_width=400)
    assert run.exit_code == 2
    assert arguments[1] in run.output
    assert message in " ".join(run.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_command_line_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.fix_allocator", lambda: None)
    run = CliRunner().invoke(app, ["step", "--device", "cuda"], terminal_width=400)
    assert run.exit_code == 2 and "--device" in run.output and "torch finds no GPU here" in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["roofline", "--model", "vit_tiny", "--input", "30"], "Error: patch_size must divide image_size=30, got 16"),
        (["ops", "--model", "resnet_tiny", "--only", "conv 9x9"], "Error: only: no layer has 'conv 9x9' in its name"),
    ],
)
def test_errors_found_while_measuring_are_messages(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.harness.fix_allocator", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command_line_writes_json(tmp_path):
    file = tmp_path / "step.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "step", "--model", "resnet_tiny", "--batch", "4", "--rounds", "1",
         "--rivals", "eager", "--step", "per_width", "--threads", "1", "--json", str(file)],
        check=True,
    )  # fmt: skip
    assert json.loads(file.read_text())["ratios"].keys() == {"eager"}


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_operations_of_a_backward_are_twice_those_of_the_forward(groups):
    x, weight = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(16, 8 // groups, 3, 3, requires_grad=True)
    counts = {}
    custom = {torch.ops.aten.convolution_backward: step.convolution_backward_operations}
    for name, inputs in {"both": (x, weight), "weight": (x.detach(), weight)}.items():
        with FlopCounterMode(display=False, custom_mapping=custom) as forward:
            y = torch.nn.functional.conv2d(*inputs, stride=2, padding=1, groups=groups)
        with FlopCounterMode(display=False, custom_mapping=custom) as backward:
            y.backward(torch.randn_like(y))
        assert forward.get_total_flops() == 2 * 2 * 16 * 5 * 5 * 8 // groups * 9
        counts[name] = backward.get_total_flops() / forward.get_total_flops()
    assert counts == {"both": 2, "weight": 1}
