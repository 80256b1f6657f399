"""The Triton kernels, one file per operation, and the binaries that are shipped of them.

Nothing here imports Triton: the files with kernels do, and `us3l_kernels.backends.triton` imports those at the first
call. A file with kernels has a function `binaries(capability)`, which lists the configurations that its launchers ask
for, as data: the static gates (`us3l bench static`) compile every one of them, without a GPU, and look at the machine
code.

TRITON_INTERPRET=1, set before Triton is imported, runs the kernels on CPU tensors by Triton's interpreter: very slowly,
for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNEL_FILES = ("conv2d", "tma", "depthwise", "batch_norm", "layer_norm", "reductions")
"""The modules of this package that have `binaries(capability)`."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICE = "cpu" if INTERPRETED else "cuda"
"""Where the tensors of the kernels are."""

WHY_NOT_INSTALLED = None if importlib.util.find_spec("triton") is not None else "Triton is not installed"

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that one block may have, by compute capability, of the GPUs that the gates compile for."""

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Triton's names of the dtypes that kernels take, and the bytes of an element."""


@dataclass(frozen=True)
class Gpu:
    """What launches ask of a GPU. shared_memory: bytes that a block may have."""

    capability: int
    multiprocessors: int
    shared_memory: int


def gpu_of(x: Tensor) -> Gpu:
    """Where x is."""
    return _gpu(x.device.index)


@cache
def _gpu(index: int | None) -> Gpu:
    if index is None:  # the interpreter's
        return Gpu(90, 4, SHARED_MEMORY[90])
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class Binary:
    """One configuration of a kernel, as a launcher asks for it, to be compiled ahead of time.

    types: Triton types of the arguments that are not int32, e.g. {"x": "*bf16"}. constants: values of the constexpr
    arguments; pointers count as 16-byte aligned, as torch's allocations are. matrix: it must use the tensor cores.
    narrow: how many of its loads and stores may be of less than 16 bytes (per-channel vectors, say); None for any
    number, as for the binaries of channels that are no multiple of 8. registers: of a thread, at most; without it the
    compiler may spill some so that one more block fits on a multiprocessor.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    matrix: bool
    narrow: int | None = 0
    registers: int | None = None


class Active(NamedTuple):
    """How many channels of a tensor are active, where kernels read it: tensors and grids are then those of the full
    width, what lies behind the active channels is neither read nor written, and one launch serves every width.

    counts: int32 [widths] on the device, for a batch of that many stacked widths. unit: divides whatever they may be.
    """

    counts: Tensor
    unit: int

    @property
    def widths(self) -> int:
        return self.counts.numel()


class Sizes(NamedTuple):
    """Of an operation whose active channels are read from the device: those of its input and of its output, of which at
    least one is given. None: all channels of the tensor. version: of the counts in its forward."""

    inputs: Active | None
    outputs: Active | None
    version: int | None = None

    @property
    def _given(self) -> Active:
        given = self.inputs or self.outputs
        assert given is not None
        return given

    @property
    def widths(self) -> int:
        return self._given.widths

    def check_version(self) -> None:
        """Raises RuntimeError in a backward if the widths are no longer those of the forward."""
        if self.version not in (None, self._given.counts._version):
            raise RuntimeError("the widths on the device were set anew between a forward and its backward")


def counts_of(*active: Active | None) -> list[Tensor | None]:
    """What kernels are given of active channels."""
    return [None if each is None else each.counts for each in active]


def units_of(*active: Active | None) -> list[int]:
    """What divides active channels that are read from the device."""
    return [each.unit for each in active if each is not None]


class Norm(NamedTuple):
    """A batch norm as its backward reads it. x: its input, rows of channels. y: its result, given if the mask of its
    activation is to come from it, and not from x. weight, bias: full, or None. mean, rstd: [views, channels]. active:
    None for all channels."""

    x: Tensor
    y: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    activation: str | None
    active: Active | None = None
