"""The operations one by one: every different layer of a model at every width, us3l_kernels beside eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Mismatch, interleave, report, summarise, synchroniser
from benchmarks.rivals import VIEWS, BatchNorm1d, BatchNorm2d, Conv2d, Linear, Norm, Settings, Student, geometry
from us3l.errors import ConfigError
from us3l_kernels import gradients, views
from us3l_kernels.nn import SlicedBatchNorm1d, SlicedBatchNorm2d, SlicedConv2d, SlicedLinear

# Largest error beside the largest value, above which there is nothing to time.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """A layer of the eager network at one width, and the shapes [C, ...] of what it reads and gives there."""

    layer: Conv2d | Linear | BatchNorm1d | BatchNorm2d
    width: float
    shape: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Operation, kernel and stride: what results are averaged over. A stem reads colours, not channels."""
        layer = self.layer
        if isinstance(layer, Conv2d):
            prefix = "depthwise " if layer.groups > 1 else "stem " if layer.in_channels <= 3 else ""
            return f"{prefix}conv {layer.kernel_size[0]}x{layer.kernel_size[1]}/{layer.stride[0]}"
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
        """What is timed: a norm gives all its gradients at once, images have none."""
        if isinstance(self.layer, Norm):
            return ("forward", "backward")
        return ("forward", "dW") if self.kind.startswith("stem") else ("forward", "dX", "dW")

    def work(self, direction: str, batch: int, itemsize: int) -> tuple[str, float]:
        """What a call has to do: ("gflops", multiplications and additions of the direct way, 1e9), the same in every
        direction; or for a norm ("gbps", bytes if x, y, dy and dx went through memory once each, 1e9).
        """
        layer = self.layer
        if isinstance(layer, Norm):
            tensors = 2 if direction == "forward" else 3
            return "gbps", tensors * batch * torch.Size(self.shape).numel() * itemsize / 1e9
        products = self.shape[0]
        if isinstance(layer, Conv2d):
            products = (1 if layer.groups > 1 else products) * layer.kernel_size[0] * layer.kernel_size[1]
        return "gflops", 2 * batch * torch.Size(self.output).numel() * products / 1e9


def cases(settings: Settings, size: int) -> Iterator[Case]:
    """Every different layer of the model at every width; layers of equal sizes are one."""
    student = Student(settings)
    found: dict[tuple[Any, ...], Case] = {}

    def add(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        case = Case(copy.deepcopy(layer), width, tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))
        case.layer._forward_hooks.clear()
        found.setdefault((case.name, case.shape, case.output), case)

    for layer in student.modules():
        if isinstance(layer, (Conv2d, Linear, Norm)):
            layer.register_forward_hook(add)
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


class Comparison(NamedTuple):
    """work: the task of either side. errors: largest error beside float64 over the largest value. backend: who computes
    us3l's, as the dispatcher chose.
    """

    work: dict[str, Callable[[], Tensor]]
    errors: dict[str, float]
    backend: str


class _Backends(TorchDispatchMode):
    """Collects the backends of the sliced operators that run inside: their last argument."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "us3l":
            self.names.add(args[-1])
        return op(*args, **(kwargs or {}))


def compare(case: Case, direction: str, *, batch: int, settings: Settings) -> Comparison:
    """The tasks of both sides, ready to be timed. Raises `Mismatch` if one of them is wrong."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if len(case.shape) == 3 else torch.contiguous_format
    x, grad = (
        torch.randn(batch, *shape, generator=generator).to(settings.device, settings.dtype, memory_format=memory_format)
        for shape in (case.shape, case.output)
    )
    if isinstance(case.layer, Norm):  # rounding decides on which side of the ReLU a 0 is: no gradient comes from there
        before = Eager(case).to(settings.device).double().layer(x.double())
        grad = grad.masked_fill(before.detach().abs() < 1e-4, 0)
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
    with _Backends() as backends:
        for name, call in work.items():
            errors[name] = (call().double() - expected).abs().max().item() / largest
            if not errors[name] <= TOLERANCES[settings.dtype]:
                raise Mismatch(
                    f"{name}, {case.name}, width {case.width:g}, {direction}: largest error {errors[name]:.2e}"
                )
    return Comparison(work, errors, "+".join(sorted(backends.names)))


def _in_any_round(call: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    return lambda turn: call()


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    rounds: int,
    seconds: float,
    only: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times, ratios, errors, backend and attained rate of every case and direction whose case has `only` in its name.

    By kind and direction: the geometric means of the ratios, and the least of them. `rounds`: at most, `seconds`: about
    how long each row is measured at most. Raises ConfigError if no case has `only` in its name.
    """
    found = [case for case in cases(settings, size) if only in case.name]
    if not found:
        names = ", ".join(dict.fromkeys(case.name for case in cases(settings, size)))
        raise ConfigError(f"only: no layer has {only!r} in its name; there are {names}")
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(found, start=1):
        for direction in case.directions:
            progress(f"{number} of {len(found)}: {case.name}, width {case.width:g}, {direction}")
            work, errors, backend = compare(case, direction, batch=batch, settings=settings)
            samples = interleave(
                {name: _in_any_round(call) for name, call in work.items()},
                rounds=rounds,
                warmup=3,
                seconds=seconds,
                synchronise=synchroniser(settings.device),
            )
            summary = summarise(samples, subject="us3l")
            del summary["samples_ms"]
            unit, amount = case.work(direction, batch, settings.dtype.itemsize)
            attained = {name: amount / ms * 1e3 for name, ms in summary["median_ms"].items()}
            rows.append(
                {"layer": case.name, "kind": case.kind, "width": case.width, "direction": direction, "backend": backend}
                | summary
                | {"errors": errors, unit: attained}
            )
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(f"{row['kind']}, {row['direction']}", []).append(row["ratios"]["eager"])
    return report(
        "ops",
        settings.describe() | {"input": size, "batch": batch, "rounds": rounds, "only": only},
        settings.device,
        rows=rows,
        geometric_mean_ratios={kind: geometric_mean(values) for kind, values in ratios.items()},
        minimum_ratios={kind: min(values) for kind, values in ratios.items()},
    )
