"""The launches of Triton kernels that a GPU would be asked for, without one.

Triton's launcher runs as it does on a GPU: it binds the arguments, and decides by their types and values which binary
they need. A driver that says what GPU there is, and a hook of Triton's that takes what it would compile, stand at its
two ends: nothing is compiled or launched. Tensors are on the CPU, and results are whatever their memory held.

So it is known of a whole training step which binaries it asks for, which the static gates then compile
(`benchmarks.static`), and that another width asks for no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import us3l_kernels
from us3l.models import build_model
from us3l_kernels import gradients, triton, use_width, views
from us3l_kernels.any_width import AnyWidth
from us3l_kernels.triton import SHARED_MEMORY, Binary, Gpu

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of an A100, an H100 and a B200."""

NARROW = 20
"""Loads and stores of less than 16 bytes that a binary of whole vectors may have."""

BACKENDS = "conv2d=triton,batch_norm=triton"


@dataclass(frozen=True)
class Launch:
    """binary: as it would be compiled. aligned: the arguments that are known to be at multiples of 16 bytes."""

    binary: Binary
    aligned: frozenset[str]
    grid: tuple[int, ...]


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Inside, backend `triton` takes tensors on the CPU, and its launches for a GPU of that capability are listed."""
    from triton import knobs, runtime
    from triton.backends.compiler import GPUTarget

    launches: list[Launch] = []
    asked: list[tuple[tuple[int, ...], int | None]] = []  # the grid, and the bound on registers
    gpu = Gpu(capability, MULTIPROCESSORS[capability], SHARED_MEMORY[capability])
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"a GPU of capability {capability}, of which there is none",  # keys of a cache
        get_current_stream=lambda device: 0,
        utils=None,
    )
    run = runtime.JITFunction.run

    def take_what_hooks_are_not_told(self: Any, *arguments: Any, grid: Any, **options: Any) -> Any:
        asked.append((tuple(grid), options.get("maxnreg")))
        return run(self, *arguments, grid=grid, **options)

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(_launch(fn.jit_function, compile, *asked[-1]))
        return True  # it is not to be compiled

    with (
        patch.object(triton, "DEVICE", "cpu"),
        patch.object(triton, "_gpu", lambda index: gpu),
        patch.object(runtime.driver, "_active", driver),
        patch.object(runtime.JITFunction, "run", take_what_hooks_are_not_told),
        patch.object(knobs.runtime, "jit_cache_hook", take),
    ):
        yield launches


def _launch(kernel: Any, asked: dict[str, Any], grid: tuple[int, ...], registers: int | None) -> Launch:
    names = kernel.arg_names
    constants = {names[path[0]]: value for path, value in asked["constants"].items()}
    types = {name: kind for name, kind in asked["signature"].items() if name not in constants and kind != "i32"}
    (attributes,) = asked["configs"]
    aligned = frozenset(names[path[0]] for path, facts in attributes.items() if ["tt.divisibility", 16] in facts)
    dtype = next(kind for kind in types.values() if kind.startswith("*"))
    binary = Binary(
        f"{kernel.__name__} {dtype} {constants}",
        kernel,
        types,
        constants,
        warps=asked["num_warps"],
        stages=asked["num_stages"],
        matrix="BLOCK_K" in constants and constants.get("PRECISION") != "ieee",
        # Per-channel vectors and counts of active channels.
        narrow=NARROW if constants.get("VECTOR", 1) > 1 and dtype == "*bf16" else None,
        registers=registers,
    )
    return Launch(binary, aligned, grid)


# ---------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """Forward and backward of a network on two views. pixels: of an image's side. images: of a view.

    any_width: the kernels read their channels from the device. dtype: float32 or what autocast makes of it.
    """

    model: str
    pixels: int
    images: int
    divisor: int = 8
    any_width: bool = False
    dtype: torch.dtype = torch.bfloat16

    def record(self, capability: int, widths: Sequence[float]) -> list[list[Launch]]:
        """The launches at each of the widths."""
        stem = "imagenet" if self.pixels > 64 else "cifar"
        model = build_model(self.model, stem=stem, divisor=self.divisor, num_classes=16)
        model.to(memory_format=torch.channels_last).train()
        gradients.attach(model)
        images = torch.empty(2 * self.images, 3, self.pixels, self.pixels).to(memory_format=torch.channels_last)
        precision = nullcontext() if self.dtype == torch.float32 else torch.autocast("cpu", self.dtype)
        of_widths = []
        for width in widths:
            with recorded(capability) as launches, us3l_kernels.backend(BACKENDS), precision, views(2):
                if self.any_width:
                    table = AnyWidth(model)
                    table.set(width)
                with table if self.any_width else use_width(model, width):
                    model(images).sum().backward()
            of_widths.append(launches)
        return of_widths


NETWORKS = (("resnet18", 32, 128), ("resnet50", 224, 32), ("mobilenet_v2", 224, 128))
WIDTHS = (1.0, 0.61, 0.44, 0.27)
STEPS = (
    *(Step(*network, any_width=any_width) for network in NETWORKS for any_width in (False, True)),
    *(Step(*network, divisor=1) for network in NETWORKS),
    *(Step(*network, dtype=torch.float32) for network in NETWORKS),
)
"""Whose binaries the static gates compile: those of the GPU suite, the same with odd channels, and in float32."""

