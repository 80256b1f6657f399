"""Low-precision copies of the weights that a width uses, kept from one update to the next, and their gradients.

Under autocast every convolution and matrix product casts the slice of its float32 weight, in the forward and again in
the backward, and adds a low-precision gradient to the slice of the full one. On a GPU these are four short kernels for
each layer. Here they are two for a whole width:

    packed = PackedWeights(buffer)      # for one width; buffer: us3l_kernels.gradients.attach(model)
    ...
    packed.refresh()                    # all slices that the width used before, where their parameters have changed
    with packed:
        loss(model(x)).backward()       # cuDNN and cuBLAS on the copies
                                        # on the way out: all gradients of attached parameters, into their slices

The results are those without it, bit for bit: the same values are cast and added, at other times. The gradients of
attached parameters are complete when the context is left, not yet after `.backward()`; ordinary ones are as ever.

A copy is valid for one version of its parameter, as in `us3l_kernels.weight_cache`: torch counts the writes of
optimizers, `copy_`, `load_state_dict` and averaging; `us3l_kernels.invalidate(model)` is for those it does not, and
US3L_CHECK_CACHE=1 finds a forgotten call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor, nn

from us3l_kernels import _native, weight_cache
from us3l_kernels.gradients import GradientBuffer

_T = TypeVar("_T")


@dataclass
class _Copy:
    """parameter: that it depends on. source: the slice that is copied. version: of the parameter, when it was."""

    parameter: nn.Parameter
    source: Tensor
    data: Tensor
    version: int


class PackedWeights:
    """The copies that one width uses; see the module.

    It fills itself: what is used inside for the first time is copied then, and kept. So use one object for each width
    (of equal rounded channels). It takes two bytes for each active weight, which live as long as it does.

    buffer: that the model's gradients are attached to; None if they are ordinary.
    """

    def __init__(self, buffer: GradientBuffer | None = None) -> None:
        self._copies: dict[tuple[object, ...], _Copy] = {}
        self._gradients: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by address: slices of the buffer, what to add
        self._buffer = None if buffer is None else buffer.flat.untyped_storage().data_ptr()
        self._outer: PackedWeights | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return sum(copy.data.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy again what has changed since it was copied, all at once.

        Raises RuntimeError with US3L_CHECK_CACHE=1 if a parameter has changed and torch did not count it.
        """
        stale = []
        for copy in self._copies.values():
            if copy.version != copy.parameter._version:
                copy.version = copy.parameter._version
                stale.append(copy)
            elif weight_cache.checks() and not _same_bits(copy.data, copy.source.to(copy.data.dtype)):
                raise weight_cache.uncounted_change(copy.parameter)
        for copies in _groups(stale, lambda copy: copy.data):
            sources, data = [copy.source for copy in copies], [copy.data for copy in copies]
            if _has_kernel("multi_tensor_pack", data[0], sources[0]):
                torch.ops.us3l_native.multi_tensor_pack(sources, data)
            else:
                torch._foreach_copy_(data, sources)

    def __enter__(self) -> PackedWeights:
        global _current
        self.refresh()
        # Of the process, not of a thread: on a GPU the backward runs in a thread of torch's.
        self._outer, _current = _current, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        global _current
        _current, self._outer = self._outer, None
        if kind is None:
            self._flush()
        self._gradients.clear()

    def cast(self, weight: Tensor, active: Tensor, dtype: torch.dtype) -> Tensor:
        """`active`, a slice of the full `weight`, in `dtype`: the copy, if it can be told when the weight changes."""
        parameter = weight if isinstance(weight, nn.Parameter) else weight._base  # a segment of a parameter
        if not isinstance(parameter, nn.Parameter) or parameter.is_inference():
            return active.to(dtype)
        key = (active.data_ptr(), active.shape, active.stride(), dtype)
        copy = self._copies.get(key)
        if copy is None:
            copy = _Copy(parameter, active.detach(), active.detach().to(dtype), parameter._version)
            self._copies[key] = copy
        elif copy.version != parameter._version:  # changed inside the context
            copy.data.copy_(active.detach())
            copy.version = parameter._version
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


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


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
