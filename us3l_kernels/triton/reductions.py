"""Sums over rows in two stages, in a fixed order: programs sum chunks of rows, then the chunks are summed.

Of every channel there are two sums; those of a chunk are in a workspace, float32 [views, chunks, 2, channels].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from us3l_kernels.triton import Active, Binary, ceil_div


@triton.jit
def active_channels(channels, active_ptr, width, VECTOR: tl.constexpr):
    """All of the channels; of the width of that index if their numbers are given in memory (`Active`), multiples of
    VECTOR."""
    if active_ptr is not None:
        channels = tl.load(active_ptr + width) // VECTOR * VECTOR  # the compiler's proof
    return channels


@triton.jit
def most_active_channels(channels, active_ptr, widths):
    """Those of the widest width in a batch."""
    if active_ptr is not None:
        channels = tl.load(active_ptr)
        for width in range(1, widths):
            channels = tl.maximum(channels, tl.load(active_ptr + width))
    return channels


@triton.jit
def load_vector(pointer, c, channels, default):
    """The active part of a parameter in float32; `default` everywhere if there is none."""
    if pointer is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(pointer + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def passed(g, x, centred, scale, bias, y_ptr, y_offsets, ok, ACTIVATION: tl.constexpr):
    """The gradient g of an activation's result where the activation passes it, else 0.

    By the result if y_ptr is given, else by what it was computed of, rounded as the forward rounded: centred * scale +
    bias, of x's dtype.
    """
    if ACTIVATION is not None:
        if y_ptr is not None:
            y = tl.load(y_ptr + y_offsets, mask=ok, other=0.0).to(tl.float32)
        else:
            y = (centred * scale + bias).to(x.dtype).to(tl.float32)
        passes = y > 0.0
        if ACTIVATION == "relu6":
            passes = passes & (y < 6.0)
        g = tl.where(passes, g, 0.0)
    return g


@triton.jit
def sums_for_norm(
    g,
    x_ptr,
    x_offsets,
    y_ptr,
    y_offsets,
    weight_ptr,
    bias_ptr,
    mean_ptr,  # [views, channels]
    rstd_ptr,
    view,
    c,
    channels,
    active,
    ok,
    ACTIVATION: tl.constexpr,
):
    """What the backward of a norm needs of a tile of its result's gradient, rows by channels, all of one view: the sums
    of g and of g * normalised x, g as its activation passes it. x, y: the norm's input, and its result as in `passed`.
    """
    mean = tl.load(mean_ptr + view * channels + c, mask=c < active, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + view * channels + c, mask=c < active, other=0.0)
    scale = (rstd * load_vector(weight_ptr, c, active, 1.0))[None, :]
    bias = load_vector(bias_ptr, c, active, 0.0)[None, :]
    x = tl.load(x_ptr + x_offsets, mask=ok, other=0.0)
    centred = x.to(tl.float32) - mean
    g = passed(g, x, centred, scale, bias, y_ptr, y_offsets, ok, ACTIVATION)
    return tl.sum(g, 0), tl.sum(g * centred, 0) * rstd


@triton.jit
def load_partials(partials_ptr, view, first, chunks, c, channels, active, BLOCK_CHUNKS: tl.constexpr):
    """Of BLOCK_CHUNKS chunks from the `first` on: both sums, zero past the last chunk, and which of them are there."""
    chunk = first + tl.arange(0, BLOCK_CHUNKS)
    ok = (chunk < chunks)[:, None] & (c < active)[None, :]
    offsets = (view * chunks + chunk).to(tl.int64)[:, None] * (2 * channels) + c[None, :]
    sum0 = tl.load(partials_ptr + offsets, mask=ok, other=0.0)
    sum1 = tl.load(partials_ptr + offsets + channels, mask=ok, other=0.0)
    return sum0, sum1, ok


@triton.jit(do_not_specialize=["rows", "chunks", "views", "channels"])
def add_sums_kernel(
    partials_ptr,  # [views, chunks, 2, channels]: sums of g and of g * normalised x
    means_ptr,  # [views, 2, channels]: their means over the rows of a view, if asked for
    grad_weight_ptr,  # full size: the sums over all views are added
    grad_bias_ptr,
    rows,
    chunks,
    views,
    channels,
    active_ptr,
    VIEWS: tl.constexpr,  # of a width
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    most = most_active_channels(channels, active_ptr, views // VIEWS)
    c_ok = c < most
    grad_weight = load_vector(grad_weight_ptr, c, most, 0.0)
    grad_bias = load_vector(grad_bias_ptr, c, most, 0.0)
    for view in range(0, views):
        active = active_channels(channels, active_ptr, view // VIEWS, 1)
        lanes_g = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
        lanes_gx = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
        for first in range(0, chunks, BLOCK_CHUNKS):
            g, gx, _ = load_partials(partials_ptr, view, first, chunks, c, channels, active, BLOCK_CHUNKS)
            lanes_g += g
            lanes_gx += gx
        sum_g = tl.sum(lanes_g, 0)
        sum_gx = tl.sum(lanes_gx, 0)
        grad_bias += sum_g
        grad_weight += sum_gx
        if means_ptr is not None:
            tl.store(means_ptr + view * 2 * channels + c, sum_g / rows, mask=c < active)
            tl.store(means_ptr + (view * 2 + 1) * channels + c, sum_gx / rows, mask=c < active)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + c, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=c_ok)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + c, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=c_ok)


CHUNKS = 512
"""At most this many programs take part in a first stage: about four for each multiprocessor of a large GPU."""

STAGE2 = {"BLOCK_CHUNKS": 128, "BLOCK_C": 8}
"""The tile of a second stage: few channels, so that it has many programs."""

STAGE2_OF_TILES = {"BLOCK_CHUNKS": 512, "BLOCK_C": 8}
"""Behind a convolution, which gives a chunk for each tile: many of them at a time."""

WARPS = 4


def partial_sums(chunks: int, channels: int, like: Tensor, views: int = 1) -> Tensor:
    """The workspace of a two-stage reduction: float32 [views, chunks, 2, channels]."""
    return torch.empty(views, chunks, 2, channels, dtype=torch.float32, device=like.device)


def by_width(views: int, active: Active | None) -> dict[str, Any]:
    """What kernels are given of active channels, and how many of the views in a batch have one width."""
    if active is None:
        return {"active_ptr": None, "VIEWS": 1}
    return {"active_ptr": active.counts, "VIEWS": views // active.widths}


class Moments(NamedTuple):
    """Of chunks of rows. partials: their means and sums of squared deviations. rows: of a chunk; a view's last has
    what is left."""

    partials: Tensor
    rows: int


def in_chunks(rows: int, block: int, most: int) -> tuple[int, int]:
    """(rows of a chunk, chunks): whole blocks, at most `most` chunks, at least one."""
    per_chunk = block * max(1, ceil_div(rows, block * most))
    return per_chunk, max(1, ceil_div(rows, per_chunk))


def add_sums(
    partials: Tensor,
    rows: int,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    means: Tensor | None = None,
    active: Active | None = None,
) -> None:
    """The second stage: adds sums of g and of g * normalised x to the gradients, and gives their means per view."""
    views, chunks, _, channels = partials.shape
    tile = STAGE2 if chunks <= CHUNKS else STAGE2_OF_TILES
    add_sums_kernel[(ceil_div(channels, tile["BLOCK_C"]),)](
        partials,
        means,
        grad_weight,
        grad_bias,
        rows,
        chunks,
        views,
        channels,
        **by_width(views, active),
        **tile,
        num_warps=WARPS,
    )


def binaries(capability: int) -> Iterator[Binary]:
    """What `add_sums` asks for."""
    pointers = ("partials_ptr", "means_ptr", "grad_weight_ptr", "grad_bias_ptr")
    types = {**dict.fromkeys(pointers, "*fp32"), "active_ptr": "*i32"}
    all_channels = by_width(1, None)
    for name, tile, counts in (
        ("add_sums", STAGE2, all_channels),
        ("add_sums of tiles", STAGE2_OF_TILES, all_channels),
        ("add_sums of tiles, any width", STAGE2_OF_TILES, {"VIEWS": 2}),
    ):
        constants = {**tile, **counts}
        yield Binary(name, add_sums_kernel, types, constants, warps=WARPS, stages=3, matrix=False, narrow=None)
