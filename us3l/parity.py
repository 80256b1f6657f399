"""Parity with the published algorithm: repeat a recorded run and compare its numbers.

A parity file (JSON) holds what the authors' published code computed in float64 for a few iterations from a
deterministic start: the loss (and regulariser) of every width, and [norm, sum] of every parameter afterwards.
Here the trainer's own step (`us3l.step.TrainStep`, with an update after every width) repeats it.

Rounding is amplified some 30 times per iteration, hence a strict tolerance for the first iteration and a
looser one for the rest.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import us3l_kernels
from us3l.config import Config, MethodConfig, ModelConfig, OptimizerConfig, RegulariserConfig, TrainConfig
from us3l.errors import US3LError
from us3l.methods import Method, build_method
from us3l.schedule import group_alpha
from us3l.step import TrainStep

# Of the losses before any update, and of those after one. In float32 the first update leaves some ReLUs on the other
# side, which moves the next losses by 0.005 or so: a tenth of their size, enough to tell another algorithm and no more.
FIRST_TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-4, 0.3)}

_LOSSES = ("cosine", "infonce")
_FILE = {"name": str, "config": dict, "steps": list, "parameters": dict}
_CONFIG = {
    "model": ("resnet18", "resnet34", "resnet50", "mobilenet_v2"),
    "stem": ("cifar", "imagenet"),
    "batch": int,
    "size": int,
    "method": ("simclr_momentum", "byol"),
    "hidden_dim": int,
    "dim": int,
    "momentum": float,
    "temperature": float,
    "base_loss": _LOSSES,
    "distillation_loss": _LOSSES,
    "optimizer": dict,
    "regulariser": (dict, type(None)),
}
_OPTIMIZER = {"kind": ("sgd",), "lr": float, "momentum": float, "weight_decay": float}
_REGULARISER = {
    "kind": ("group",),
    "lambda": float,
    "alpha": float,
    "decay": ("linear",),
    "groups": int,
    "warmup_epochs": int,
    "epochs": int,
    "epoch": int,
}


class ParityFileError(US3LError):
    """A parity file misses a key, or has one or a value that is not known; the message names the key."""


@dataclass(frozen=True)
class Comparison:
    """One number of the file and ours. `error` is relative, as the quantity's measure defines it."""

    quantity: str
    where: str
    expected: float
    actual: float
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for a NaN


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of a run."""

    name: str
    backend: str
    dtype: str
    comparisons: Sequence[Comparison]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def largest(self) -> list[Comparison]:
        """The comparison with the largest error of each quantity."""
        worst: dict[str, Comparison] = {}
        for comparison in self.comparisons:
            known = worst.get(comparison.quantity)
            if known is None or comparison.error > known.error or math.isnan(comparison.error):
                worst[comparison.quantity] = comparison
        return list(worst.values())

    def print(self, console: Console | None = None) -> None:
        """Print the largest error of each quantity, and the verdict."""
        console = console or Console()
        table = Table(title=f"{self.name}: backend {self.backend}, {self.dtype}")
        for column in ("quantity", "largest error", "tolerance", "", "at", "file", "here"):
            table.add_column(column, overflow="fold")
        for c in self.largest():
            table.add_row(
                c.quantity,
                f"{c.error:.2e}",
                f"{c.tolerance:.0e}",
                "[green]ok[/]" if c.passed else "[red]FAILED[/]",
                c.where,
                f"{c.expected:.6g}",
                f"{c.actual:.6g}",
            )
        console.print(table)
        failed = sum(not c.passed for c in self.comparisons)
        verdict = f"{failed} above tolerance" if failed else "all within tolerance"
        console.print(f"{len(self.comparisons)} numbers compared: {verdict}")


def run_parity(
    file: str | Path,
    backend: str | None = None,
    dtype: str = "float64",
    tol_first: float | None = None,
    tol_later: float = 1e-5,
) -> ParityReport:
    """Repeat the run of a parity file and compare.

    Args:
        file: a JSON file of the published algorithm's numbers.
        backend: of the sliced operations; None for the automatic choice.
        dtype: float64, or float32, which repeats the first iteration only: its rounding, amplified, would say
            nothing about the later ones.
        tol_first: largest error in the first iteration; None for the dtype's own (FIRST_TOLERANCES).
        tol_later: largest error in the later iterations and of the final parameters.

    Raises:
        ParityFileError: the file cannot be read, or a key is missing or unknown.
        ValueError: an unknown dtype.
    """
    if dtype not in FIRST_TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(FIRST_TOLERANCES)}, got {dtype!r}")
    recorded = _read(Path(file))
    config = _config(recorded)
    method = build_method(config).to(getattr(torch, dtype))
    _set_start(method, recorded)
    if dtype != "float64":
        recorded["steps"] = recorded["steps"][:1]
    first = FIRST_TOLERANCES[dtype] if tol_first is None else (tol_first, tol_first)
    with nullcontext() if backend is None else us3l_kernels.backend(backend):
        comparisons = _run(config, method, recorded, first, tol_later)
    if dtype == "float64":
        comparisons += _compare_parameters(method, recorded, tol_later)
    return ParityReport(recorded["name"], backend or "auto", dtype, comparisons)


def _run(
    config: Config,
    method: Method,
    recorded: Mapping[str, Any],
    tol_first: tuple[float, float],
    tol_later: float,
) -> list[Comparison]:
    """The trainer's own steps, at a constant learning rate and alpha."""
    settings = recorded["config"]
    dtype = next(method.parameters()).dtype
    alpha, regulariser = 0.0, settings["regulariser"]
    if regulariser is not None:
        alpha = group_alpha(
            regulariser["epoch"], regulariser["epochs"], regulariser["warmup_epochs"], regulariser["alpha"]
        )
    step = TrainStep(config, method.train())
    regularisers: list[float] = []  # before every update
    step.optimizer.register_step_pre_hook(lambda optimizer, *_: regularisers.append(_regulariser(optimizer)))

    comparisons = []
    for i, widths in enumerate(recorded["steps"]):
        images = _images(i, settings["batch"], settings["size"]).to(dtype)
        regularisers.clear()
        losses = step(
            images, [entry["width"] for entry in widths], lr=settings["optimizer"]["lr"], alpha=alpha
        ).losses.tolist()
        for j, (entry, loss, value) in enumerate(zip(widths, losses, regularisers, strict=True)):
            iteration, tolerance = ("later iterations", tol_later)
            if i == 0:
                iteration, tolerance = (
                    ("before any update", tol_first[0]) if j == 0 else ("first iteration", tol_first[1])
                )
            where = f"iteration {i + 1}, width {entry['width']}"
            comparisons.append(_compare(f"loss, {iteration}", where, entry["loss"], loss, tolerance))
            if regulariser is not None:
                name = f"regulariser, {iteration}"
                comparisons.append(_compare(name, where, entry["regulariser"], value, tolerance))
    return comparisons


def _compare(quantity: str, where: str, expected: float, actual: float, tolerance: float) -> Comparison:
    error = abs(actual - expected) / max(abs(expected), 0.01)
    return Comparison(quantity, where, expected, actual, error, tolerance)


def _compare_parameters(method: Method, recorded: Mapping[str, Any], tolerance: float) -> list[Comparison]:
    comparisons = []
    for name, parameter in _published_names(method).items():
        norm, total = recorded["parameters"][name]
        ours = parameter.detach().double()
        error = abs(ours.norm().item() - norm) / norm
        comparisons.append(Comparison("parameter norm", name, norm, ours.norm().item(), error, tolerance))
        error = abs(ours.sum().item() - total) / (norm * math.sqrt(ours.numel()))
        comparisons.append(Comparison("parameter sum", name, total, ours.sum().item(), error, tolerance))
    return comparisons


def _regulariser(optimizer: torch.optim.Optimizer) -> float:
    """sum_g lambda_g ||p_g||^2 over what the optimizer is about to regularise, from its settings, in float64."""
    total = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            squares = parameter.detach().double().square()
            if parameter.dim() in (1, 4):
                rows = squares.flatten(1).sum(1) if parameter.dim() == 4 else squares
                index = torch.arange(len(rows)) // max(1, len(rows) // group["groups"])
                squares = rows * (1 - group["alpha"] * index.clamp(max=group["groups"] - 1).double())
            total += group["weight_decay"] / 2 * squares.sum().item()
    return total


def _images(step: int, batch: int, size: int) -> Tensor:
    """Both views [2 * batch, 3, size, size] of an iteration (from 0), float64."""
    generator = torch.Generator().manual_seed(1000 + step)
    views = [torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    return torch.cat(views)


def _config(recorded: Mapping[str, Any]) -> Config:
    """The file's run as a configuration of the trainer."""
    config, regulariser = recorded["config"], recorded["config"]["regulariser"]
    simclr = config["method"] == "simclr_momentum"
    head = "predictor." if simclr else "predictor_new."
    optimizer = config["optimizer"]
    return Config(
        model=ModelConfig(name=config["model"], stem=config["stem"], in_channels=3),
        method=MethodConfig(
            name="simclr" if simclr else "byol",
            hidden_dim=config["hidden_dim"],
            dim=config["dim"],
            base_loss=config["base_loss"],
            temperature=config["temperature"],
            target="momentum",
            momentum=config["momentum"],
            distillation=config["distillation_loss"],
            aux_head=any(name.startswith(head) for name in recorded["parameters"]),
        ),
        optimizer=OptimizerConfig(
            name="sgd",
            lr=optimizer["lr"],
            momentum=optimizer["momentum"],
            weight_decay=optimizer["weight_decay"] if regulariser is None else 2 * regulariser["lambda"],
        ),
        regulariser=RegulariserConfig(
            kind="none" if regulariser is None else "group",
            groups=1 if regulariser is None else regulariser["groups"],
        ),
        train=TrainConfig(step="per_width", amp="none"),
    )


def _set_start(method: Method, recorded: Mapping[str, Any]) -> None:
    """Draw every parameter from a generator seeded by its published name; the teacher starts as a copy."""
    ours, theirs = _published_names(method), recorded["parameters"]
    if ours.keys() != theirs.keys():
        raise ParityFileError(
            "parameters: the file's names are not those of its model: "
            f"missing {sorted(ours.keys() - theirs.keys())[:5]}, "
            f"unknown {sorted(theirs.keys() - ours.keys())[:5]}"
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            student = name.replace("encoder_k.", "encoder_q.", 1)
            parameter.copy_(_start(student, parameter))


def _start(name: str, parameter: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    r = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if parameter.dim() in (2, 4):
        return r * math.sqrt(2 / parameter[0].numel())
    return 1 + 0.1 * r if name.endswith(".weight") else 0.1 * r


def _published_names(method: Method) -> dict[str, Tensor]:
    """Parameters by their published names: those of sub-networks' head differ from ours.

    SimCLR has one head, `predictor`; in BYOL `predictor` is that of the base loss, `predictor_new` the other.
    """
    head = "predictor." if method.predictor is None else "predictor_new."
    return {re.sub("^aux_predictor[.]", head, name): parameter for name, parameter in method.named_parameters()}


def _read(path: Path) -> dict[str, Any]:
    """The file's content, checked."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParityFileError(f"cannot read the parity file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ParityFileError(f"{path} is not a JSON file: {error}") from None
    _check("file", recorded, _FILE)
    config = recorded["config"]
    _check("config", config, _CONFIG)
    _check("config.optimizer", config["optimizer"], _OPTIMIZER)
    entry: dict[str, Any] = {"width": float, "loss": float}
    if config["regulariser"] is not None:
        _check("config.regulariser", config["regulariser"], _REGULARISER)
        entry["regulariser"] = float
        if config["optimizer"]["weight_decay"] != 0:
            raise ParityFileError(
                "config.optimizer.weight_decay: expected 0 beside a regulariser, which takes its place, "
                f"got {config['optimizer']['weight_decay']}"
            )
    if not recorded["steps"]:
        raise ParityFileError("steps: expected at least one iteration, got none")
    for i, step in enumerate(recorded["steps"]):
        if not isinstance(step, list) or not step:
            raise ParityFileError(f"steps[{i}]: expected a list of widths, got {step!r}")
        for j, width in enumerate(step):
            _check(f"steps[{i}][{j}]", width, entry)
    for name, numbers in recorded["parameters"].items():
        if not (isinstance(numbers, list) and len(numbers) == 2 and all(map(_is_number, numbers))):
            raise ParityFileError(f"parameters.{name}: expected [norm, sum], got {numbers!r}")
    return recorded


def _check(section: str, values: Any, expected: Mapping[str, Any]) -> None:
    """Check keys, types and choices. `expected`: by key, a type, a tuple of types, or the allowed strings."""
    if not isinstance(values, dict):
        raise ParityFileError(f"{section}: expected an object, got {values!r}")
    for key in expected.keys() - values.keys():
        raise ParityFileError(f"{section}.{key}: this key is missing")
    for key in values.keys() - expected.keys():
        raise ParityFileError(f"{section}.{key}: this key is not known; expected {', '.join(expected)}")
    for key, kind in expected.items():
        value = values[key]
        if isinstance(kind, tuple) and isinstance(kind[0], str):
            if value not in kind:
                raise ParityFileError(f"{section}.{key}: expected one of {', '.join(kind)}, got {value!r}")
        elif kind is float:
            if not _is_number(value):
                raise ParityFileError(f"{section}.{key}: expected a number, got {value!r}")
        elif not isinstance(value, kind) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ParityFileError(f"{section}.{key}: expected {names}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
