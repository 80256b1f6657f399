"""The operations one by one: every different layer of a model at every width, us3l_kernels beside eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Mismatch, environment, interleave, summarise, synchroniser
from benchmarks.rivals import VIEWS, BatchNorm1d, BatchNorm2d, Conv2d, Linear, Norm, Settings, Student, geometry
from us3l_kernels import gradients, views
from us3l_kernels.nn import SlicedBatchNorm1d, SlicedBatchNorm2d, SlicedConv2d, SlicedLinear

# Largest error beside the largest value, above which there is nothing to time.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """A layer of the eager network at one width, and the shape [C, ...] of what it reads there."""

    layer: Conv2d | Linear | BatchNorm1d | BatchNorm2d
    width: float
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Operation, kernel and stride: what results are averaged over."""
        layer = self.layer
        if isinstance(layer, Conv2d):
            depthwise = "depthwise " if layer.groups > 1 else ""
            return f"{depthwise}conv {layer.kernel_size[0]}x{layer.kernel_size[1]}/{layer.stride[0]}"
        return "linear" if isinstance(layer, Linear) else "norm+relu"

    @property
    def name(self) -> str:
        """The kind with full channels and pixels."""
        layer, size = self.layer, f" @{self.shape[1]}" if len(self.shape) == 3 else ""
        if isinstance(layer, Conv2d):
            return f"{self.kind} {layer.in_channels}->{layer.out_channels}{size}"
        if isinstance(layer, Linear):
            return f"{self.kind} {layer.in_features}->{layer.out_features}"
        return f"{self.kind} {layer.num_features}{size}"

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed: a norm gives all its gradients at once."""
        return ("forward", "backward") if isinstance(self.layer, Norm) else ("forward", "dX", "dW")


def cases(settings: Settings, size: int) -> Iterator[Case]:
    """Every different layer of the model at every width; layers of equal sizes are one."""
    student = Student(settings)
    found: dict[tuple[Any, ...], Case] = {}

    def add(layer: Any, inputs: tuple[Tensor]) -> None:
        case = Case(copy.deepcopy(layer), width, tuple(inputs[0].shape[1:]))
        case.layer._forward_pre_hooks.clear()
        found.setdefault((case.name, width), case)

    for layer in student.modules():
        if isinstance(layer, (Conv2d, Linear, Norm)):
            layer.register_forward_pre_hook(add)
    for width in settings.widths:
        with torch.no_grad():
            student(torch.randn(VIEWS, 3, size, size, device=settings.device), width)
    yield from found.values()


def library_layer(case: Case) -> nn.Module:
    """The layer of us3l_kernels.nn for the layer of a case, with its weights and active channels."""
    layer = case.layer
    sliced: nn.Module
    if isinstance(layer, Conv2d):
        sliced = SlicedConv2d(*geometry(layer))
        sliced.active_out_channels = layer.active
    elif isinstance(layer, Linear):
        sliced = SlicedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    else:
        kind = SlicedBatchNorm2d if len(case.shape) == 3 else SlicedBatchNorm1d
        sliced = kind(layer.num_features, layer.eps, track_running_stats=False, activation="relu")
    sliced.load_state_dict(layer.state_dict())
    return sliced


class Eager(nn.Module):
    """The eager layer; a norm is followed by its activation, which us3l_kernels computes with it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer = copy.deepcopy(case.layer)
        if isinstance(self.layer, Norm):
            self.layer.views = VIEWS
            self.activation: nn.Module = nn.ReLU(inplace=True)
        else:
            self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


def task(
    layer: nn.Module, direction: str, x: Tensor, grad: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """What is timed: forward, or the gradient of x or the weight (added up in .grad, as over the widths of a step)."""
    layer.requires_grad_(direction in ("dW", "backward"))
    x = x.detach().requires_grad_(direction in ("dX", "backward"))
    autocast = torch.autocast(x.device.type, dtype=dtype, enabled=dtype is torch.bfloat16)

    def forward() -> Tensor:
        with autocast, views(VIEWS):
            return layer(x)

    if direction == "forward":
        return torch.no_grad()(forward)
    y = forward()
    grad = grad.to(y.dtype)
    if direction == "dW":
        weight = next(layer.parameters())

        def weight_gradient() -> Tensor:
            y.backward(grad, retain_graph=True)
            assert weight.grad is not None
            return weight.grad

        return weight_gradient

    def input_gradient() -> Tensor:
        x.grad = None
        y.backward(grad, retain_graph=True)
        assert x.grad is not None
        return x.grad

    return input_gradient


def tasks(
    case: Case, direction: str, *, batch: int, settings: Settings
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """The task of either side, and their errors beside float64: largest error over largest value."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if len(case.shape) == 3 else torch.contiguous_format
    x = torch.randn(batch, *case.shape, generator=generator).to(settings.device, memory_format=memory_format)
    with torch.no_grad():
        shape = Eager(case)(x.contiguous()).shape
    grad = torch.randn(shape, generator=generator).to(settings.device, memory_format=memory_format)
    layers = {"us3l": library_layer(case), "eager": Eager(case)}
    work = {}
    for name, layer in layers.items():
        layer.to(settings.device).to(memory_format=torch.channels_last)
        if name == "us3l" and direction in ("dW", "backward"):
            gradients.attach(layer)
        work[name] = task(layer, direction, x, grad, settings.dtype)
    expected = task(Eager(case).double(), direction, x.double(), grad.double(), torch.float64)()
    largest = expected.abs().max().item()
    errors = {}
    for name, call in work.items():
        errors[name] = (call().double() - expected).abs().max().item() / largest
        if not errors[name] <= TOLERANCES[settings.dtype]:
            raise Mismatch(f"{name}, {case.name}, width {case.width:g}, {direction}: largest error {errors[name]:.2e}")
    return work, errors


def _in_any_round(call: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    return lambda turn: call()


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times, ratios and errors of every case and direction, and the geometric means of the ratios by kind."""
    rows: list[dict[str, Any]] = []
    for case in cases(settings, size):
        for direction in case.directions:
            progress(f"{case.name}, width {case.width:g}, {direction}")
            work, errors = tasks(case, direction, batch=batch, settings=settings)
            samples = interleave(
                {name: _in_any_round(call) for name, call in work.items()},
                rounds=rounds,
                warmup=3,
                synchronise=synchroniser(settings.device),
            )
            summary = summarise(samples, subject="us3l")
            del summary["samples_ms"]
            rows.append(
                {"layer": case.name, "kind": case.kind, "width": case.width, "direction": direction}
                | summary
                | {"errors": errors}
            )
    kinds = dict.fromkeys((row["kind"], row["direction"]) for row in rows)
    means = {
        f"{kind}, {direction}": geometric_mean(
            row["ratios"]["eager"] for row in rows if (row["kind"], row["direction"]) == (kind, direction)
        )
        for kind, direction in kinds
    }
    return {
        "rows": rows,
        "geometric_mean_ratios": means,
        "config": {
            "model": settings.model,
            "stem": settings.stem,
            "input": size,
            "batch": batch,
            "widths": list(settings.widths),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "rounds": rounds,
        },
        "versions": environment(settings.device),
    }
