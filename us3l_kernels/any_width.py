"""Networks whose kernels read from the device how many channels are active: one CUDA graph then serves every width.

In an ordinary pass a slice has a shape of its own, so that every width has its own launches. Here all activations have
the channels of the full width, of which the kernels of backend `triton` read and write the active ones alone. What lies
behind them is whatever the memory held, NaN perhaps. Shapes, strides and grids are the same for every width.

    table = AnyWidth(model)
    table.set(0.5)                              # a few hundred bytes, copied to the device; a plan of widths, too
    with table:
        loss(model(x)).backward()               # a CUDA graph of it serves any width that is set before a replay

Several widths can share one pass, `AnyWidth(model, widths=3)`: the batch is then that many batches behind each other,
one for each of `table.set(1.0, 0.5, 0.25)`, and each of them as many views as `views(n)` says.

Which channels of a tensor are active goes with the tensor, as its shape does in an ordinary pass: the sliced layers
mark their results, and functions of torch that work on each channel for itself (CHANNELWISE, means over pixels) hand
the mark on. Any other function of a marked tensor raises: it would see what lies behind. Behind a layer with
`slice_out=False` everything is as ever. Of a network that ends with sliced features, `table.active_prefix` gives them.
The backward belongs inside the context, too: layers that it would run again (a checkpoint's) are refused there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from us3l_kernels import width as widths_
from us3l_kernels.backends import BACKENDS, requested
from us3l_kernels.errors import BackendError
from us3l_kernels.library import is_plain_call
from us3l_kernels.triton import Active, Sizes
from us3l_kernels.width import Sliced, SlicedOutput, Width, widths_of_layers

CHANNELWISE = frozenset(
    {
        *("relu", "relu6", "hardtanh", "dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
        *("to", "float", "half", "bfloat16", "contiguous", "clone", "detach"),
    }
)
"""Names of functions of torch that take each channel for itself, and give as many."""

ALIGNMENT = 4  # numbers of a row: rows begin at multiples of 16 bytes, as all pointers that kernels are compiled for


class AnyWidth:
    """The numbers of active channels of a model's layers, in memory that kernels read; see the module.

    model: its parameters are on a GPU, float32 or half precision; in training. widths: that share a batch.

    Raises ValueError for a layer that has to know its channels on the host, with its name.
    """

    def __init__(self, model: nn.Module, *, widths: int = 1) -> None:
        if widths < 1:
            raise ValueError(f"widths: expected an integer >= 1, got {widths!r}")
        self.model = model
        self.widths = widths
        self._names = {module: name for name, module in model.named_modules() if isinstance(module, Sliced)}
        self.check()
        self._layers = [
            layer
            for layer in self._names
            if isinstance(layer, SlicedOutput) and layer.slice_out and not layer.follows_input
        ]
        rows, row = len(self._layers), -(-widths // ALIGNMENT) * ALIGNMENT
        self._memory = torch.zeros(rows, row, dtype=torch.int32, device=next(model.parameters()).device)
        self._counts: list[list[int]] = []
        self._active = [
            Active(numbers[:widths], math.gcd(layer.channels_at(1.0), layer.divisor * layer.ratio))
            for layer, numbers in zip(self._layers, self._memory, strict=True)
        ]
        self._sums: set[tuple[int, int]] = set()  # rows that must have equal numbers
        self._outer: list[tuple[AnyWidth | None, int, _Marks]] = []  # what was in effect at every entry; its marks
        self.set(*[1.0] * widths)

    def set(self, *widths: Width) -> None:
        """The widths of the passes that follow, or of the replays. Errors as of `set_width`."""
        if len(widths) != self.widths:
            raise ValueError(f"widths: expected {self.widths}, got {len(widths)}")
        of_layers = [widths_of_layers(self.model, width) for width in widths]
        counts = [[layer.channels_at(of[layer]) for of in of_layers] for layer in self._layers]
        for layer, active, row in zip(self._layers, self._active, counts, strict=True):
            if any(count % active.unit for count in row):
                raise ValueError(f"width: {self._names[layer]!r} keeps {row} channels, no multiples of {active.unit}")
        for pair in self._sums:
            self._check_equal(counts, *pair)
        self._counts = counts
        padding = [0] * (self._memory.size(1) - self.widths)
        # Fresh memory: the copy may still be under way when the next one is made.
        numbers = torch.tensor(
            [[*row, *padding] for row in counts], dtype=torch.int32, pin_memory=self._memory.is_cuda
        )
        self._memory.copy_(numbers.view_as(self._memory), non_blocking=True)

    def check(self) -> None:
        """Raises ValueError or BackendError if the model, as it stands, cannot run so."""
        unavailable = BACKENDS["triton"].unavailable()
        if unavailable is not None:
            raise BackendError(f"any width: it needs backend 'triton': {unavailable}")
        for op in ("conv2d", "linear", "batch_norm"):
            if (name := requested()[op]) not in ("auto", "triton"):
                raise BackendError(f"any width: it runs {op} on backend 'triton', {name!r} was asked for")
        if not self._names:
            raise ValueError(f"model: expected a module with sliced layers, {type(self.model).__name__} has none")
        for layer, name in self._names.items():
            assert isinstance(layer, nn.Module)
            reason = layer.why_not_any_width()
            if reason is None and any(p.dtype == torch.float64 for p in layer.parameters(recurse=False)):
                reason = "it is of float64"
            if reason is not None:
                raise ValueError(f"any width: {name!r} cannot read its channels from the device: {reason}")

    def __enter__(self) -> AnyWidth:
        global _current
        self.check()
        # Of the process, not of a thread: on a GPU the backward runs in a thread of torch's.
        marks = _Marks()
        self._outer.append((_current, widths_.stacked_widths, marks))
        _current, widths_.stacked_widths = self, self.widths
        marks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        global _current
        _current, widths_.stacked_widths, marks = self._outer.pop()
        marks.__exit__(kind, error, _)

    def sizes_of(self, layer: Sliced, x: Tensor) -> Sizes | None:
        """What an operation of `layer` on x reads; None if neither x nor its result is sliced.

        Raises ValueError for an x of something else, BackendError where the operation is not to be seen as it is.
        """
        inputs = active_of(x)
        if layer not in self._names:
            if inputs is None:
                return None
            raise ValueError(f"any width: {layer} is not of the model whose widths are read, and its input is")
        name = self._names[layer]
        if torch._C._current_graph_task_id() != -1:  # where marks are lost
            raise BackendError(f"any width: {name!r} is called by a backward, as of a checkpoint")
        if inputs is not None:
            self._row(inputs)
        if layer.follows_input:
            outputs = inputs
        else:
            outputs = next((a for a, of in zip(self._active, self._layers, strict=True) if of is layer), None)
        if inputs is None and outputs is None:
            return None
        if x.size(0) % self.widths:
            raise ValueError(f"x: {name!r} expects a batch of {self.widths} widths, got {x.size(0)} samples")
        if not is_plain_call((x,)):
            raise BackendError(f"any width: {name!r} runs under torch.compile, another tracer or a mode")
        return Sizes(inputs, outputs, self._memory._version)

    def check_sum(self, a: Active | None, b: Active | None) -> None:
        """Raises ValueError if two summands have different active channels, now or at widths that are set later."""
        if a is b:
            return
        if a is None or b is None:
            raise ValueError("any width: a sum of a slice and of something with the channels of the full width")
        rows = self._row(a), self._row(b)
        pair = (min(rows), max(rows))
        self._check_equal(self._counts, *pair)
        self._sums.add(pair)

    def _row(self, active: Active) -> int:
        row = next((i for i, each in enumerate(self._active) if each is active), None)
        if row is None:
            raise ValueError("any width: a tensor whose active channels another AnyWidth has")
        return row

    def _check_equal(self, counts: Sequence[Sequence[int]], a: int, b: int) -> None:
        if counts[a] != counts[b]:
            names = [self._names[self._layers[row]] for row in (a, b)]
            raise ValueError(
                f"width: a sum of {names[0]} ({counts[a]} channels) and {names[1]} ({counts[b]} channels): "
                "give them one width"
            )

    def active_prefix(self, x: Tensor) -> list[Tensor]:
        """The active channels of x, of each width, copied: for the host to read. It makes no graph."""
        active = active_of(x)
        with unmarked():
            parts = x.chunk(self.widths)
            counts = [x.size(1)] * self.widths if active is None else active.counts.tolist()
            return [part[:, :count].clone() for part, count in zip(parts, counts, strict=True)]


_current: AnyWidth | None = None


def current() -> AnyWidth | None:
    """The table of the context that is in effect."""
    return _current


def active_of(x: Tensor) -> Active | None:
    """Which channels of x are active; None for all."""
    return getattr(x, "_us3l_active", None)


def mark(x: Tensor, active: Active | None) -> Tensor:
    """x, which is new, with the channels that are active."""
    if active is not None:
        x._us3l_active = active  # type: ignore[attr-defined]
    return x


def unmarked() -> AbstractContextManager[object]:
    """Inside, functions of torch take tensors as they are."""
    return nullcontext() if _current is None else torch._C.DisableTorchFunction()


def sizes_of(layer: Sliced, x: Tensor) -> Sizes | None:
    """What an operation of the layer on x reads from the device; None for an ordinary one."""
    return None if _current is None else _current.sizes_of(layer, x)


def why_not_plain(module: nn.Module) -> str | None:
    """Why a call of the module may be more than its class's forward: what it hands to others would be seen whole."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks, which would see what lies behind the active channels" if any(hooks) else None


def check_sum(active: Active | None, residual: Tensor) -> None:
    """Raise ValueError if `residual` has other active channels than what it is added to."""
    if _current is not None:
        _current.check_sum(active, active_of(residual))


def reading(operation: Callable[..., Tensor], sizes: Sizes | None) -> Callable[..., Tensor]:
    """The operation, which reads what is active and marks its result; as it is without sizes."""
    if sizes is None:
        return operation

    def call(*args: Any, **options: Any) -> Tensor:
        with unmarked():
            return mark(operation(*args, sizes=sizes, **options), sizes.outputs)

    return call


class _Marks(TorchFunctionMode):
    """Hands marks on from what functions of torch are given to what they return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and active_of(t) is not None]
        if not given or not any(isinstance(t, Tensor) for t in tree_leaves(result)):
            return result
        name = getattr(func, "__name__", str(func))
        if (
            len(given) != 1
            or not isinstance(result, Tensor)
            or not _keeps_channels(name, given[0], result, kwargs.get("dim", args[1] if len(args) > 1 else None))
        ):
            raise ValueError(
                f"any width: torch's {name!r} would see what lies behind the active channels of {tuple(given[0].shape)}"
            )
        return mark(result, active_of(given[0]))


def _keeps_channels(name: str, x: Tensor, result: Tensor, dim: Any) -> bool:
    """Whether each channel of `result`, which a function gave of x and `dim`, is of that channel of x alone."""
    if name == "mean":
        dims = [dim] if isinstance(dim, int) else dim or [1]
        return all(d % x.dim() > 1 for d in dims)
    if name == "flatten":
        return result.shape == x.shape[:2]
    return name in CHANNELWISE
