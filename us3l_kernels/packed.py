"""Low-precision copies of the weights that a width uses, made at once for all layers, and their gradients.

Under autocast every convolution and matrix product casts the slice of its float32 weight, in the forward and again in
the backward, and adds a low-precision gradient to the slice of the full one. On a GPU these are four short kernels for
each layer. Here they are two for a whole width:

    packed = PackedWeights(buffer)      # for one width; buffer: us3l_kernels.gradients.attach(model)
    ...
    with packed:                        # on the way in: copies of all slices that it used before
        loss(model(x)).backward()       # cuDNN and cuBLAS on the copies
                                        # on the way out: all gradients of attached parameters, into their slices

The results are those without it, bit for bit: the same values are cast and added, at other times. The gradients of
attached parameters are complete when the context is left, not yet after `.backward()`; ordinary ones are as ever.

The copies live inside the context. Keeping them would gain little, for between two uses of a width there is an update
of the weights, unless gradients are accumulated; and a CUDA graph that was captured around the context makes them in
memory that it shares with others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor, nn

from us3l_kernels import _native
from us3l_kernels.gradients import GradientBuffer

_T = TypeVar("_T")


@dataclass
class _Slice:
    """parameter: that it is a part of. stride, dtype: of its copy."""

    parameter: nn.Parameter
    source: Tensor
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Copy:
    """version: of the parameter, when it was copied. used: since the context was entered."""

    data: Tensor
    version: int
    used: bool = False


class PackedWeights:
    """The copies that one width uses; see the module.

    It learns what they are: what is used inside for the first time is copied then, and with all others from the next
    time on; what was not used the last time is forgotten. So use one object for each width (of equal rounded channels).
    Inside, it takes two bytes for each active weight.

    buffer: that the model's gradients are attached to; None if they are ordinary.
    """

    def __init__(self, buffer: GradientBuffer | None = None) -> None:
        self._slices: dict[tuple[object, ...], _Slice] = {}
        self._copies: dict[tuple[object, ...], _Copy] = {}
        self._gradients: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by address: slices of the buffer, what to add
        self._buffer = None if buffer is None else buffer.flat.untyped_storage().data_ptr()
        self._outer: PackedWeights | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the copies, inside."""
        return sum(each.source.numel() * each.dtype.itemsize for each in self._slices.values())

    @torch.no_grad()
    def _pack(self) -> dict[tuple[object, ...], _Copy]:
        packed = {}
        for key, each in self._slices.items():
            shape, device = each.source.shape, each.source.device
            data = torch.empty_strided(shape, each.stride, dtype=each.dtype, device=device)
            packed[key] = _Copy(data, each.parameter._version)
        pairs = [(each.source, packed[key].data) for key, each in self._slices.items()]
        for alike in _groups(pairs, lambda pair: pair[1]):
            sources, copies = map(list, zip(*alike, strict=True))
            if _has_kernel("multi_tensor_pack", copies[0], sources[0]):
                torch.ops.us3l_native.multi_tensor_pack(sources, copies)
            else:
                torch._foreach_copy_(copies, sources)
        return packed

    def load(self) -> None:
        """Run what entering the context runs: kernels must not be loaded while a CUDA graph is captured."""
        self._pack()

    def __enter__(self) -> PackedWeights:
        global _current
        self._copies = self._pack()
        # Of the process, not of a thread: on a GPU the backward runs in a thread of torch's.
        self._outer, _current = _current, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        global _current
        _current, self._outer = self._outer, None
        if kind is None:
            self._flush()
            self._slices = {key: each for key, each in self._slices.items() if self._copies[key].used}
        self._gradients.clear()
        self._copies.clear()

    def cast(self, weight: Tensor, active: Tensor, dtype: torch.dtype) -> Tensor:
        """`active`, a slice of the full `weight`, in `dtype`: the copy, if it can be told when the weight changes."""
        parameter = weight if isinstance(weight, nn.Parameter) else weight._base  # a segment of a parameter
        if not isinstance(parameter, nn.Parameter) or parameter.is_inference():
            return active.to(dtype)
        key = (active.data_ptr(), active.shape, active.stride(), dtype)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _Copy(active.detach().to(dtype), parameter._version)
            self._slices[key] = _Slice(parameter, active.detach(), copy.data.stride(), dtype)
        elif copy.version != parameter._version:  # changed inside the context
            copy.data.copy_(active.detach())
            copy.version = parameter._version
        copy.used = True
        return copy.data

    def add(self, destination: Tensor, gradient: Tensor) -> bool:
        """Take note to add `gradient` to a part of the attached buffer; False if `destination` is none."""
        if destination.untyped_storage().data_ptr() != self._buffer:
            return False
        self._gradients.setdefault(destination.data_ptr(), []).append((destination, gradient))
        return True

    @torch.no_grad()
    def _flush(self) -> None:
        # What is added to one place more than once (views, shared layers) must be in different kernels, in order.
        for turn in range(max(map(len, self._gradients.values()), default=0)):
            pairs = [additions[turn] for additions in self._gradients.values() if turn < len(additions)]
            for alike in _groups(pairs, lambda pair: pair[1]):
                destinations, gradients = map(list, zip(*alike, strict=True))
                if _has_kernel("multi_tensor_scatter_add", gradients[0], destinations[0]):
                    torch.ops.us3l_native.multi_tensor_scatter_add(gradients, destinations)
                else:
                    torch._foreach_add_(destinations, gradients)


def _groups(items: Iterable[_T], tensor: Callable[[_T], Tensor]) -> Iterable[list[_T]]:
    """Items whose tensors one kernel takes together: of one dtype, dense or not."""
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        t = tensor(item)
        groups.setdefault((t.dtype, _is_dense(t)), []).append(item)
    return groups.values()


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _has_kernel(op: str, packed: Tensor, full: Tensor) -> bool:
    """Whether the kernel `op` of csrc/cuda takes tensors like these."""
    return (
        packed.is_cuda
        and _native.load_cuda() is not None
        and hasattr(torch.ops.us3l_native, op)
        and packed.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and full.dtype == torch.float32
        and _is_dense(packed)
    )


_current: PackedWeights | None = None


def cast(weight: Tensor, active: Tensor, dtype: torch.dtype) -> Tensor:
    """`active`, a slice of the full `weight`, in `dtype`; inside a PackedWeights, its copy. Only to be read."""
    if active.dtype == dtype:
        return active
    return active.to(dtype) if _current is None else _current.cast(weight, active, dtype)


def accumulate_(destination: Tensor, gradient: Tensor) -> None:
    """destination += gradient: at once, or, into an attached buffer inside a PackedWeights, when that is left."""
    if _current is None or not _current.add(destination, gradient):
        destination.add_(gradient)
