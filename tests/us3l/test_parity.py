"""`run_parity` on the published numbers, and on files that an independent plain-PyTorch trainer records here."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from us3l.methods import build_method
from us3l.parity import ParityFileError, _config, _published_names, run_parity

FIXTURES = Path(__file__).parent / "fixtures"
BYOL, SIMCLR = "byol_resnet18_imagenet", "simclr_momentum_resnet18_cifar"

# --------------------------------------------------------------------------- an independent trainer, on torch alone

Parameters = dict[str, Tensor]


def _channels(full: int, width: float, ratio: int = 1) -> int:
    exact = full * width / ratio
    rounded = max(8, int(exact + 4) // 8 * 8)
    return (rounded + 8 if rounded < 0.9 * exact else rounded) * ratio


def _conv(p: Parameters, name: str, x: Tensor, out: int, stride: int = 1, depthwise: bool = False) -> Tensor:
    weight = p[f"{name}.weight"][:out] if depthwise else p[f"{name}.weight"][:out, : x.shape[1]]
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=out if depthwise else 1)


def _norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    c = x.shape[1]
    return F.batch_norm(x, None, None, p[f"{name}.weight"][:c], p[f"{name}.bias"][:c], True)


def _linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"][:, : x.shape[1]], p.get(f"{name}.bias"))


def _resnet(p: Parameters, x: Tensor, width: float, *, stem: str, bottleneck: bool) -> Tensor:
    """Of 34 or 50 layers."""
    x = _norm(p, "bn1", _conv(p, "conv1", x, _channels(64, width), 2 if stem == "imagenet" else 1)).relu()
    x = F.max_pool2d(x, 3, 2, 1) if stem == "imagenet" else x
    for i, depth in enumerate((3, 4, 6, 3)):
        inner, outer = _channels(64 * 2**i, width), _channels((256 if bottleneck else 64) * 2**i, width)
        for j in range(depth):
            name, stride, y = f"layer{i + 1}.{j}", 2 if i > 0 and j == 0 else 1, x
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            for k, s in enumerate(strides, 1):
                last = k == len(strides)
                y = _norm(p, f"{name}.bn{k}", _conv(p, f"{name}.conv{k}", y, outer if last else inner, s))
                y = y if last else y.relu()
            if f"{name}.downsample.0.weight" in p:
                x = _norm(p, f"{name}.downsample.1", _conv(p, f"{name}.downsample.0", x, outer, stride))
            x = (y + x).relu()
    return x.mean((2, 3))


def _mobilenet_v2(p: Parameters, x: Tensor, width: float, *, stem: str) -> Tensor:
    first_strides = 2 if stem == "imagenet" else 1  # of the stem and of the 24-channel stage
    x = F.relu6(_norm(p, "features.0.1", _conv(p, "features.0.0", x, _channels(32, width), first_strides)))
    index, before = 1, 32
    for t, c, n, s in ((1, 16, 1, 1), (6, 24, 2, first_strides), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):  # fmt: skip  # noqa: E501
        for j in range(n):
            body, first, y = f"features.{index}.body", 0, x
            hidden = _channels(before * t, width, t)
            if t > 1:
                y, first = F.relu6(_norm(p, f"{body}.1", _conv(p, f"{body}.0", y, hidden))), 3
            y = _conv(p, f"{body}.{first}", y, hidden, s if j == 0 else 1, depthwise=True)
            y = F.relu6(_norm(p, f"{body}.{first + 1}", y))
            y = _norm(p, f"{body}.{first + 4}", _conv(p, f"{body}.{first + 3}", y, _channels(c, width)))
            x = x + y if j > 0 else y
            index, before = index + 1, c
    return F.relu6(_norm(p, "features.18.1", _conv(p, "features.18.0", x, 1280))).mean((2, 3))


def _part(p: Parameters, prefix: str) -> Parameters:
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def _encode(backbone: Callable[..., Tensor], p: Parameters, x: Tensor, width: float) -> Tensor:
    x = backbone(p, x, width)
    x = _norm(p, "fc.1", _linear(p, "fc.0", x)).relu()
    x = _norm(p, "fc.4", _linear(p, "fc.3", x)).relu()
    return _linear(p, "fc.6", x)


def _predict(p: Parameters, x: Tensor) -> Tensor:
    return _linear(p, "3", _norm(p, "1", _linear(p, "0", x)).relu())


def _loss(name: str, p: Tensor, t: Tensor, temperature: float) -> Tensor:
    p, t = p / p.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    if name == "cosine":
        return -(p * t).sum(1).mean()
    both = torch.cat([p, t])
    similar = (both @ both.T / temperature).exp()
    positive = ((p * t).sum(1) / temperature).exp().repeat(2)
    return -(positive / (similar.sum(1) - similar.diagonal())).log().mean()


def _regulariser(p: Parameters, r: dict[str, Any], width: float) -> Tensor:
    alpha, half = r["alpha"], r["epochs"] // 2
    if r["epoch"] < r["warmup_epochs"]:
        alpha = 0.0
    elif r["epoch"] < half:
        alpha *= (r["epoch"] - r["warmup_epochs"]) / (half - r["warmup_epochs"])
    total = torch.zeros((), dtype=torch.float64)
    for name, value in p.items():
        if width == 1.0 and "predictor" in name:
            continue
        coefficients = torch.full_like(value, r["lambda"])
        if value.dim() != 2:
            size = len(value) // r["groups"]
            for g in range(r["groups"]):
                end = len(value) if g == r["groups"] - 1 else (g + 1) * size
                coefficients[g * size : end] = r["lambda"] * (1 - alpha * g)
        total = total + (coefficients * value**2).sum()
    return total


def _record(config: dict[str, Any], widths: list[list[float]], aux_head: bool = True) -> dict[str, Any]:
    """A parity file's content, from autograd and torch.optim alone."""
    heads = ("predictor.",) if config["method"] == "simclr_momentum" else ("predictor.", "predictor_new.")
    names = {f"{head}0.weight": [0, 0] for head in heads[: None if aux_head else -1]}
    method = build_method(_config({"config": config, "parameters": names}))
    p: Parameters = {}
    for name, parameter in _published_names(method).items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        r = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        if r.dim() > 1:
            p[name] = r * (2 / r[0].numel()) ** 0.5
        else:
            p[name] = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
    teacher = {name: copy.deepcopy(value) for name, value in _part(p, "encoder_q.").items()}
    p = {name: value.requires_grad_() for name, value in p.items() if not name.startswith("encoder_k.")}
    o = config["optimizer"]
    optimizer = torch.optim.SGD(p.values(), o["lr"], o["momentum"], weight_decay=o["weight_decay"])
    backbone = {
        "resnet34": partial(_resnet, bottleneck=False),
        "resnet50": partial(_resnet, bottleneck=True),
        "mobilenet_v2": _mobilenet_v2,
    }[config["model"]]
    backbone = partial(backbone, stem=config["stem"])
    shape = (config["batch"], 3, config["size"], config["size"])

    steps = []
    for i, drawn in enumerate(widths):
        g = torch.Generator().manual_seed(1000 + i)
        x1, x2 = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        student = _part(p, "encoder_q.")
        with torch.no_grad():
            m = config["momentum"]
            teacher = {name: m * value + (1 - m) * student[name] for name, value in teacher.items()}
            t1, t2 = (_encode(backbone, teacher, x, 1.0) for x in (x1, x2))
        steps.append([])
        for j, width in enumerate(drawn):
            p1, p2 = (_encode(backbone, student, x, width) for x in (x1, x2))
            head = _part(p, "predictor.")
            if j > 0:
                head = _part(p, "predictor_new.") or head
            elif config["method"] == "simclr_momentum":
                head = {}
            if head:
                p1, p2 = _predict(head, p1), _predict(head, p2)
            kind = config["base_loss" if j == 0 else "distillation_loss"]
            loss = (_loss(kind, p1, t2, config["temperature"]) + _loss(kind, p2, t1, config["temperature"])) / 2
            entry, objective = {"width": width, "loss": loss.item()}, loss
            if config["regulariser"] is not None:
                penalty = _regulariser(p, config["regulariser"], width)
                entry["regulariser"], objective = penalty.item(), loss + penalty
            steps[-1].append(entry)
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
    final = {**p, **{f"encoder_k.{name}": value for name, value in teacher.items()}}
    parameters = {name: [v.norm().item(), v.sum().item()] for name, v in final.items()}
    return {"name": "recorded here", "config": config, "steps": steps, "parameters": parameters}


def _settings(**changes: Any) -> dict[str, Any]:
    return {
        "model": "mobilenet_v2", "stem": "cifar", "batch": 16, "size": 8, "method": "byol", "hidden_dim": 24,
        "dim": 16, "momentum": 0.9, "temperature": 0.3, "base_loss": "cosine", "distillation_loss": "cosine",
        "optimizer": {"kind": "sgd", "lr": 0.005, "momentum": 0.8, "weight_decay": 0.01}, "regulariser": None,
    } | changes  # fmt: skip


GROUP = {
    "kind": "group", "lambda": 5e-3, "alpha": 0.08, "decay": "linear", "groups": 4, "warmup_epochs": 10,
    "epochs": 60, "epoch": 20,
}  # fmt: skip
NO_DECAY = {"kind": "sgd", "lr": 0.005, "momentum": 0.9, "weight_decay": 0.0}

# --------------------------------------------------------------------------------------------------------- the tests


def test_byol_fixture_on_aten() -> None:
    report = run_parity(FIXTURES / f"{BYOL}.json", "aten", tol_first=1e-9, tol_later=1e-5)
    assert report.passed, report.largest()
    assert len(report.comparisons) == 9 + 2 * 148  # losses of 3 iterations; norm and sum of every parameter


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [(BYOL, "reference"), (SIMCLR, "aten"), (SIMCLR, "reference")])
def test_fixtures(name: str, backend: str) -> None:
    report = run_parity(FIXTURES / f"{name}.json", backend, tol_first=1e-9, tol_later=1e-5)
    assert report.passed, report.largest()


@pytest.mark.slow
@pytest.mark.parametrize("name", [BYOL, SIMCLR])
def test_fixtures_in_float32_repeat_the_first_iteration(name: str) -> None:
    report = run_parity(FIXTURES / f"{name}.json", dtype="float32")
    assert report.passed, report.largest()
    assert {c.quantity.rpartition(", ")[2] for c in report.comparisons} == {"before any update", "first iteration"}


INFONCE = {"base_loss": "infonce", "distillation_loss": "infonce"}
SIMCLR_RUN = {"method": "simclr_momentum", "base_loss": "infonce"}
GROUPED = {"regulariser": GROUP, "optimizer": NO_DECAY}
IMAGENET = {"stem": "imagenet", "size": 32}
OTHERS = {
    "mobilenet_v2-byol": {},
    "mobilenet_v2-byol-infonce": INFONCE,
    "mobilenet_v2-byol-group": GROUPED,
    "mobilenet_v2-byol-group-warmup": GROUPED | {"regulariser": GROUP | {"epoch": 5}},
    "mobilenet_v2-imagenet-simclr": SIMCLR_RUN | IMAGENET,
    "mobilenet_v2-imagenet-byol": IMAGENET | {"momentum": 0.996},
    "resnet34-byol-group": GROUPED | {"model": "resnet34", "temperature": 0.07},
    "resnet34-imagenet-simclr": SIMCLR_RUN | IMAGENET | {"model": "resnet34"},
    "resnet50-simclr-infonce": INFONCE | {"model": "resnet50", "method": "simclr_momentum"},
    "resnet50-byol-one-head": INFONCE | {"model": "resnet50"},
    "resnet50-byol-decay": {
        "model": "resnet50", "momentum": 0.999,
        "optimizer": {"kind": "sgd", "lr": 0.02, "momentum": 0.5, "weight_decay": 1e-3},
    },
    "resnet50-imagenet-byol": IMAGENET | {"model": "resnet50"},
    "resnet50-imagenet-simclr-group": SIMCLR_RUN | GROUPED | IMAGENET | {"model": "resnet50", "temperature": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("mobilenet_v2-simclr-group", SIMCLR_RUN | GROUPED),
        *(pytest.param(name, settings, marks=pytest.mark.slow) for name, settings in OTHERS.items()),
    ],
)
def test_files_of_other_runs(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Other backbones, stems, methods, losses, temperatures, momenta and decays than those of the two fixtures."""
    recorded = _record(_settings(**settings), [[1.0, 0.55], [1.0, 0.25]], aux_head="one-head" not in name)
    (tmp_path / "file.json").write_text(json.dumps(recorded))
    report = run_parity(tmp_path / "file.json", "aten")
    assert report.passed, report.largest()


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return _record(_settings(regulariser=GROUP, optimizer=NO_DECAY), [[1.0, 0.25]])


def test_every_wrong_number_fails(small: dict[str, Any], tmp_path: Path) -> None:
    """Numbers off by a little more than their tolerances: these, and no others."""
    wrong = copy.deepcopy(small)
    full, narrow = wrong["steps"][0]
    narrow["loss"] += 1e-10
    full["loss"] = float("nan")
    full["regulariser"] *= 1 + 1e-8
    names = "encoder_q.features.4.body.1.weight", "encoder_q.features.4.body.0.weight"
    wrong["parameters"][names[0]][0] *= 1 + 2e-5
    wrong["parameters"][names[1]][1] += 0.1
    (tmp_path / "file.json").write_text(json.dumps(wrong))
    report = run_parity(tmp_path / "file.json", "aten")
    assert {(c.quantity, c.where) for c in report.comparisons if not c.passed} == {
        ("loss, first iteration", "iteration 1, width 0.25"),
        ("loss, before any update", "iteration 1, width 1.0"),
        ("regulariser, before any update", "iteration 1, width 1.0"),
        ("parameter norm", names[0]),
        ("parameter sum", names[1]),
    }


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (lambda r: r["config"].update(momentum=0.5), None),
        (lambda r: r["config"]["optimizer"].update(momentum=0.5), "parameter norm"),
        (lambda r: r["config"]["regulariser"].update(epoch=40), "regulariser, first iteration"),
    ],
)
def test_another_algorithm_fails(
    change: Callable[[dict[str, Any]], None], quantity: str | None, small: dict[str, Any], tmp_path: Path
) -> None:
    wrong = copy.deepcopy(small)
    change(wrong)
    (tmp_path / "file.json").write_text(json.dumps(wrong))
    report = run_parity(tmp_path / "file.json", "aten")
    failed = {c.quantity for c in report.comparisons if not c.passed}
    # One iteration from equal networks cannot tell the momentum of the teacher.
    assert report.passed == (quantity is None)
    assert quantity is None or quantity in failed


def test_the_report_prints_the_largest_errors(small: dict[str, Any], tmp_path: Path) -> None:
    wrong = copy.deepcopy(small)
    wrong["steps"][0][1]["loss"] += 0.5
    (tmp_path / "file.json").write_text(json.dumps(wrong))
    text = StringIO()
    run_parity(tmp_path / "file.json", "aten").print(Console(file=text, width=160))
    line = next(line for line in text.getvalue().splitlines() if "loss, first iteration" in line)
    assert "FAILED" in line and "iteration 1, width 0.25" in line and "1e-09" in line
    assert "1 above tolerance" in text.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("steps"), "file.steps: this key is missing"),
        (lambda r: r["config"].pop("stem"), "config.stem: this key is missing"),
        (lambda r: r["config"].update(queue=1), "config.queue: this key is not known"),
        (lambda r: r["config"].update(model="vgg"), "config.model: expected one of resnet18.*'vgg'"),
        (lambda r: r["config"].update(method="moco"), "config.method: expected one of.*'moco'"),
        (lambda r: r["config"].update(base_loss="l1"), "config.base_loss: expected one of.*'l1'"),
        (lambda r: r["config"].update(batch="4"), "config.batch: expected int, got '4'"),
        (lambda r: r["config"].update(temperature=None), "config.temperature: expected a number, got None"),
        (lambda r: r["config"]["optimizer"].update(kind="lars"), "config.optimizer.kind: expected one of sgd"),
        (lambda r: r["config"]["optimizer"].update(weight_decay=0.1), "config.optimizer.weight_decay: expected 0"),
        (lambda r: r["config"]["regulariser"].update(decay="exp"), "config.regulariser.decay.*linear.*'exp'"),
        (lambda r: r["config"].update(regulariser="group"), "config.regulariser: expected dict or NoneType"),
        (lambda r: r["steps"][0][1].pop("regulariser"), r"steps\[0\]\[1\].regulariser: this key is missing"),
        (lambda r: r.update(steps=[]), "steps: expected at least one iteration"),
        (lambda r: r["steps"].append([]), r"steps\[1\]: expected a list of widths"),
        (lambda r: r["parameters"].update({"encoder_q.conv9.weight": [1, 1]}), "unknown.*encoder_q.conv9.weight"),
        (lambda r: next(iter(r["parameters"].values())).pop(), r"parameters.encoder_q.*: expected \[norm, sum\]"),
    ],
)
def test_a_wrong_file_names_the_key(
    change: Callable[[dict[str, Any]], Any], message: str, small: dict[str, Any], tmp_path: Path
) -> None:
    wrong = copy.deepcopy(small)
    change(wrong)
    (tmp_path / "file.json").write_text(json.dumps(wrong))
    with pytest.raises(ParityFileError, match=message):
        run_parity(tmp_path / "file.json")


def test_unreadable_files_and_dtypes(tmp_path: Path) -> None:
    with pytest.raises(ParityFileError, match="cannot read the parity file .*nowhere.json"):
        run_parity(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ParityFileError, match="torn.json is not a JSON file"):
        run_parity(tmp_path / "torn.json")
    with pytest.raises(ValueError, match="dtype must be one of float64, float32, got 'int8'"):
        run_parity(tmp_path / "torn.json", dtype="int8")
