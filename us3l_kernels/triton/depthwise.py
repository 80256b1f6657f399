"""Depthwise convolution in Triton: one filter per channel, any geometry; forward, dX and dW.

x is read as rows of channels (channels_last, or a prefix slice of it), of the filters [C, 1, kh, kw] the first c.
Sums are in float32, and in an order that depends on the shapes alone. Addresses are 64-bit; pixels are fewer than 2^31.

The forward and dX are one kernel, which writes tiles of pixels. A pixel of y sees x at stride * pixel + dilation * tap
- padding. The pixels of dX that are equal modulo the stride (a phase) see dY at their place plus something linear in
every stride-th tap: each phase is a correlation with stride 1 and its own taps, and the phases are an axis of the grid.
dX has the epilogue that conv2d.py has: another gradient added, and the sums for the norm whose result x is.

4 bytes an element are read and written in half precision, with stride 1, and as many by dW, which reads x and dY. What
a pixel's neighbours have read comes from the L1 cache: kh * kw vectors of 16 bytes for each one written, which is what
bounds 5x5 and larger filters on an H100 (29 TB/s from L1 against 3 TB/s from memory, where 3x3 is bounded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from us3l_kernels.triton import DTYPES, Active, Binary, Norm, ceil_div
from us3l_kernels.triton.conv2d import Geometry, first_tap, place_of
from us3l_kernels.triton.reductions import (
    CHUNKS,
    STAGE2,
    WARPS,
    active_channels,
    by_width,
    in_chunks,
    load_vector,
    most_active_channels,
    partial_sums,
    sums_for_norm,
)
from us3l_kernels.triton.rows import as_rows, in_units, new_rows

# ---------------------------------------------------------------------------------------------- kernels


@triton.jit
def _phase(
    size, phase, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr
):
    """One dimension of dX: (pixels of a phase, its first tap, where pixel 0 of the phase sees dY through that tap)."""
    first = first_tap(phase, KERNEL, STRIDE, PADDING, DILATION)
    return (size - phase + STRIDE - 1) // STRIDE, first, (phase + PADDING - first * DILATION) // STRIDE


@triton.jit(
    do_not_specialize=[
        "images",
        "a_h",
        "a_w",
        "y_h",
        "y_w",
        "tile_h",
        "tile_w",
        "tiles_per_view",
        "c_units",
        "a_stride",
        "y_stride",
        "added_stride",
        "norm_x_stride",
        "norm_y_stride",
    ]
)
def correlation_kernel(
    a_ptr,  # pixels to gather: x, or dY
    taps_ptr,  # [kh * kw, channels]
    y_ptr,  # pixels to write: y, or dX
    bias_ptr,
    partials_ptr,  # these as in conv2d.py, each None where it is not asked for
    added_ptr,
    norm_x_ptr,
    norm_y_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    images,  # of a view
    a_h,
    a_w,
    y_h,
    y_w,
    tile_h,  # powers of two; the rest of BLOCK_PIXELS is images
    tile_w,
    tiles_per_view,
    c_units,  # channels in units of VECTOR, as are the strides
    a_stride,
    y_stride,
    added_stride,
    norm_x_stride,
    norm_y_stride,
    active_ptr,  # the numbers of active channels, by width, if they are read from memory: `triton.Active`
    VIEWS: tl.constexpr,  # of a width
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,  # from one tap of a phase to the next; 1 in the forward
    STEP_W: tl.constexpr,
    GRADIENT: tl.constexpr,  # dX from dY, else y from x
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    view = tl.program_id(0) // blocks_c // tiles_per_view
    active = active_channels(channels, active_ptr, view // VIEWS, VECTOR)
    c_ok = c < active
    if GRADIENT:
        phase_h = tl.program_id(1) // STRIDE_W
        phase_w = tl.program_id(1) % STRIDE_W
        rows_h, first_h, origin_h = _phase(y_h, phase_h, KH, STRIDE_H, PADDING_H, DILATION_H)
        rows_w, first_w, origin_w = _phase(y_w, phase_w, KW, STRIDE_W, PADDING_W, DILATION_W)
        move_per_tap_h = -(DILATION_H * STEP_H // STRIDE_H)
        move_per_tap_w = -(DILATION_W * STEP_W // STRIDE_W)
    else:
        rows_h = y_h
        rows_w = y_w
        first_h = 0
        first_w = 0
        move_per_tap_h = DILATION_H
        move_per_tap_w = DILATION_W

    tiles_w = tl.cdiv(rows_w, tile_w)
    tiles_h = tl.cdiv(rows_h, tile_h)
    tile = tl.program_id(0) // blocks_c % tiles_per_view
    pixel = tl.arange(0, BLOCK_PIXELS)
    w = tile % tiles_w * tile_w + pixel % tile_w
    h = tile // tiles_w % tiles_h * tile_h + pixel // tile_w % tile_h
    image = tile // (tiles_w * tiles_h) * (BLOCK_PIXELS // (tile_h * tile_w)) + pixel // (tile_h * tile_w)
    pixel_ok = (w < rows_w) & (h < rows_h) & (image < images)
    image += view * images
    if GRADIENT:
        top = h + origin_h
        left = w + origin_w
        target = (image * y_h + h * STRIDE_H + phase_h).to(tl.int64) * y_w + w * STRIDE_W + phase_w
    else:
        top = h * STRIDE_H - PADDING_H
        left = w * STRIDE_W - PADDING_W
        target = (image * y_h + h).to(tl.int64) * y_w + w

    stride = a_stride.to(tl.int64) * VECTOR
    a_ptr += ((image * a_h + top).to(tl.int64) * a_w + left)[:, None] * stride + c[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    for i in range(0, (KH + STEP_H - 1) // STEP_H):
        tap_h = first_h + i * STEP_H
        row = top + i * move_per_tap_h
        row_ok = pixel_ok & (row >= 0) & (row < tl.where(tap_h < KH, a_h, 0))  # some phases have a tap less
        for j in tl.static_range((KW + STEP_W - 1) // STEP_W):
            tap_w = first_w + j * STEP_W
            column = left + j * move_per_tap_w
            ok = row_ok & (column >= 0) & (column < tl.where(tap_w < KW, a_w, 0))
            filters_ok = c < tl.where((tap_h < KH) & (tap_w < KW), active, 0)
            move = (i * move_per_tap_h * a_w + j * move_per_tap_w) * stride
            a = tl.load(a_ptr + move, mask=ok[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
            filters = tl.load(taps_ptr + (tap_h * KW + tap_w) * channels + c, mask=filters_ok, other=0.0)
            acc += a * filters.to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += load_vector(bias_ptr, c, active, 0.0)[None, :]
    ok = pixel_ok[:, None] & c_ok[None, :]
    target = target[:, None]
    if added_ptr is not None:
        acc += tl.load(added_ptr + target * (added_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
    result = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + target * (y_stride * VECTOR) + c[None, :], result, mask=ok)
    if norm_x_ptr is not None:
        sum0, sum1 = sums_for_norm(
            result.to(tl.float32),
            norm_x_ptr,
            target * (norm_x_stride * VECTOR) + c[None, :],
            norm_y_ptr,
            target * (norm_y_stride * VECTOR) + c[None, :],
            norm_weight_ptr,
            norm_bias_ptr,
            mean_ptr,
            rstd_ptr,
            view,
            c,
            channels,
            active,
            ok,
            ACTIVATION,
        )
        chunk = (view * tl.num_programs(1) + tl.program_id(1)) * tiles_per_view + tile
        partial = partials_ptr + chunk.to(tl.int64) * (2 * channels) + c
        tl.store(partial, sum0, mask=c_ok)
        tl.store(partial + channels, sum1, mask=c_ok)


@triton.jit(
    do_not_specialize=[
        "pixels",
        "pixels_per_chunk",
        "x_h",
        "x_w",
        "y_h",
        "y_w",
        "c_units",
        "grad_stride",
        "x_stride",
    ]
)
def filter_sums_kernel(
    grad_ptr,
    x_ptr,
    partials_ptr,  # [widths, chunks, kh * kw, channels]: sums of grad * x over the pixels of y in a chunk
    pixels,  # of a width
    pixels_per_chunk,
    x_h,
    x_w,
    y_h,
    y_w,
    c_units,
    grad_stride,
    x_stride,
    active_ptr,
    WIDTHS: tl.constexpr,  # stacked in the batch; every chunk is of one width
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,  # of one row of the filter, a power of two
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    blocks_c = tl.cdiv(channels, BLOCK_C)
    tap_h = tl.program_id(0) % KH  # fastest: the rows of a filter read the same pixels
    c = tl.program_id(0) // KH % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = tl.program_id(0) // (KH * blocks_c)
    tap_w = tl.arange(0, BLOCK_TAPS)
    lane = tl.arange(0, BLOCK_PIXELS)
    of_width = chunk
    width = 0
    if WIDTHS > 1:
        chunks = tl.cdiv(pixels, pixels_per_chunk)
        width = chunk // chunks
        of_width = chunk % chunks
    active = active_channels(channels, active_ptr, width, VECTOR)
    c_ok = c < active
    first = of_width * pixels_per_chunk
    count = tl.minimum(pixels - first, pixels_per_chunk)
    if WIDTHS > 1:
        first += width * pixels
    if active_ptr is not None:
        count = tl.where(tl.program_id(0) // KH % blocks_c * BLOCK_C < active, count, 0)  # none of the channels are
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_TAPS, BLOCK_C), tl.float32)
    for i in range(0, count, BLOCK_PIXELS):
        pixel = first + i + lane
        pixel_ok = lane < count - i
        grad = tl.load(
            grad_ptr + (pixel.to(tl.int64) * (grad_stride.to(tl.int64) * VECTOR))[:, None, None] + c[None, None, :],
            mask=pixel_ok[:, None, None] & c_ok[None, None, :],
            other=0.0,
        )
        image, row, column = place_of(pixel, y_h, y_w)
        row = row * STRIDE_H - PADDING_H + tap_h * DILATION_H
        column = (column * STRIDE_W - PADDING_W)[:, None] + (tap_w * DILATION_W)[None, :]
        source = (image * x_h + row).to(tl.int64)[:, None] * x_w + column
        inside = (pixel_ok & (row >= 0) & (row < x_h))[:, None] & (column >= 0) & (column < x_w) & (tap_w < KW)[None, :]
        x = tl.load(
            x_ptr + (source * (x_stride.to(tl.int64) * VECTOR))[:, :, None] + c[None, None, :],
            mask=inside[:, :, None] & c_ok[None, None, :],
            other=0.0,
        )
        acc += grad.to(tl.float32) * x.to(tl.float32)
    taps = (chunk.to(tl.int64) * KH + tap_h) * KW + tap_w
    ok = (tap_w < KW)[:, None] & c_ok[None, :]
    tl.store(partials_ptr + taps[:, None] * channels + c[None, :], tl.sum(acc, 0), mask=ok)


@triton.jit(do_not_specialize=["chunks", "taps", "taps_w", "channels", "dw_out", "dw_h", "dw_w"])
def add_filters_kernel(
    partials_ptr,  # [widths, chunks, taps, channels]
    dw_ptr,  # full size, any strides
    chunks,
    taps,
    taps_w,
    channels,
    dw_out,
    dw_h,
    dw_w,
    active_ptr,
    WIDTHS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tap = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < most_active_channels(channels, active_ptr, WIDTHS)
    lanes = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
    for width in tl.static_range(WIDTHS):
        added = c < active_channels(channels, active_ptr, width, 1)
        for first in range(0, chunks, BLOCK_CHUNKS):
            chunk = first + tl.arange(0, BLOCK_CHUNKS)
            offsets = ((width * chunks + chunk).to(tl.int64) * taps + tap)[:, None] * channels + c[None, :]
            lanes += tl.load(partials_ptr + offsets, mask=(chunk < chunks)[:, None] & added[None, :], other=0.0)
    target = dw_ptr + c.to(tl.int64) * dw_out + (tap // taps_w * dw_h + tap % taps_w * dw_w)
    total = tl.load(target, mask=c_ok, other=0.0).to(tl.float32) + tl.sum(lanes, 0)
    tl.store(target, total.to(dw_ptr.dtype.element_ty), mask=c_ok)


# ---------------------------------------------------------------------------------------------- launches

BLOCK_C = 32
"""Channels of a program. Few: the tiles of pixels are then large, and share more of what they read."""

BLOCK_PIXELS = {8: 128, 1: 32}
"""Pixels of a program of the forward and of dX, by VECTOR. 128 are two images of 8 x 8, or 16 of 2 x 4."""

TILE = 8
"""The side of a tile within an image, where the image is that large."""

DW_SUMS = {2: 32, 4: 16}
"""Sums that a thread of dW has under way, by the bytes of an element; half as many where VECTOR is 1."""


def _correlate(
    a: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    gradient: bool,
    added: Tensor | None = None,
    norm: Norm | None = None,
    active: Active | None = None,
) -> Tensor | None:
    """y from x; or dX from dY with the phases of dX as the second axis of the grid, plus `added`. Returns what `norm`
    needs of dX."""
    images, channels, height, width = y.shape
    norm_x, norm_y, *of_norm, activation, _ = [None] * 8 if norm is None else norm
    views = norm.mean.size(0) if norm is not None else 1 if active is None else active.widths
    images //= views
    phases = geometry.stride if gradient else (1, 1)
    rows_h, rows_w = ceil_div(height, phases[0]), ceil_div(width, phases[1])
    vector, units, strides = in_units(channels, (a, y, added, norm_x, norm_y), active=active)
    pixels = _block_pixels(vector, y.element_size(), joined=added is not None or norm is not None)
    tile_w = min(TILE, triton.next_power_of_2(rows_w))
    tile_h = min(TILE, triton.next_power_of_2(rows_h), pixels // tile_w)
    images_of_tile = pixels // (tile_h * tile_w)
    tiles = ceil_div(images, images_of_tile) * ceil_div(rows_h, tile_h) * ceil_div(rows_w, tile_w)
    # Filters with channels innermost, so that a program reads a tap as a vector.
    taps = weight[:channels].flatten(1).t().contiguous()
    partials = None if norm is None else partial_sums(math.prod(phases) * tiles, channels, a, views)
    correlation_kernel[(views * tiles * ceil_div(channels, BLOCK_C), math.prod(phases))](
        a,
        taps,
        y,
        bias,
        partials,
        added,
        norm_x,
        norm_y,
        *of_norm,
        images,
        *a.shape[2:],
        height,
        width,
        tile_h,
        tile_w,
        tiles,
        units,
        *strides,
        **by_width(views, active),
        **_correlation_constants(geometry, gradient, vector, pixels, activation),
        num_warps=WARPS,
        maxnreg=_most_registers(vector, pixels),
    )
    return partials


def _block_pixels(vector: int, itemsize: int, joined: bool) -> int:
    """Of a program; half as many of float32 where dX has an epilogue, which would else spill."""
    return BLOCK_PIXELS[vector] // (2 if joined and itemsize == 4 else 1)


def _most_registers(vector: int, pixels: int) -> int | None:
    """Of a thread, for the smaller tiles: the compiler is told, or else it spills some to have less than it needs."""
    return None if pixels == BLOCK_PIXELS[vector] else 168


def _correlation_constants(
    geometry: Geometry, gradient: bool, vector: int, pixels: int, activation: str | None
) -> dict[str, Any]:
    return {
        **geometry.constants(),
        **(geometry.steps() if gradient else {"STEP_H": 1, "STEP_W": 1}),
        "GRADIENT": gradient,
        "ACTIVATION": activation,
        "VECTOR": vector,
        "BLOCK_PIXELS": pixels,
        "BLOCK_C": BLOCK_C,
    }


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, active: Active | None = None
) -> Tensor:
    """x [N, c, H, W], weight [C, 1, kh, kw], bias [C] -> [N, c, H', W'], channels_last."""
    y = x.new_empty(x.size(0), *geometry.output(x.shape[2:]), x.size(1)).movedim(-1, 1)
    if y.numel() > 0:
        _correlate(as_rows(x), weight, y, bias, geometry, gradient=False, active=active)
    return y


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    geometry: Geometry,
    added: Tensor | None = None,
    norm: Norm | None = None,
    active: Active | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dX plus `added`, like x, channels_last; what `norm` needs of it, if x is its result), as in conv2d.py."""
    dx = new_rows(x)
    if dx.numel() == 0:
        return dx, None
    added = None if added is None else as_rows(added)
    return dx, _correlate(
        as_rows(grad), weight, dx, None, geometry, gradient=True, added=added, norm=norm, active=active
    )


def weight_gradient(
    grad: Tensor, x: Tensor, grad_weight: Tensor, geometry: Geometry, active: Active | None = None
) -> None:
    """Adds dW to the first c filters of the full `grad_weight` [C, 1, kh, kw], of any layout and dtype."""
    images, channels, height, width = grad.shape
    widths = 1 if active is None else active.widths
    pixels, (kh, kw) = images // widths * height * width, geometry.kernel
    if pixels == 0:
        return
    grad, x = as_rows(grad), as_rows(x)
    vector, units, strides = in_units(channels, (grad, x), active=active)
    constants = _gradient_constants(geometry, vector, x.element_size())
    blocks_c = ceil_div(channels, BLOCK_C)
    per_chunk, chunks = in_chunks(pixels, constants["BLOCK_PIXELS"], max(1, CHUNKS // (blocks_c * kh * widths)))
    partials = torch.empty(widths, chunks, kh * kw, channels, dtype=torch.float32, device=x.device)
    of_widths = {"active_ptr": None if active is None else active.counts, "WIDTHS": widths}
    filter_sums_kernel[(widths * chunks * blocks_c * kh,)](
        grad,
        x,
        partials,
        pixels,
        per_chunk,
        *x.shape[2:],
        height,
        width,
        units,
        *strides,
        **of_widths,
        **constants,
        num_warps=WARPS,
    )
    dw_out, _, dw_h, dw_w = grad_weight.stride()
    add_filters_kernel[(ceil_div(channels, STAGE2["BLOCK_C"]), kh * kw)](
        partials,
        grad_weight,
        chunks,
        kh * kw,
        kw,
        channels,
        dw_out,
        dw_h,
        dw_w,
        **of_widths,
        **STAGE2,
        num_warps=WARPS,
    )


def _gradient_constants(geometry: Geometry, vector: int, itemsize: int) -> dict[str, int]:
    block_taps = triton.next_power_of_2(geometry.kernel[1])
    sums = DW_SUMS[itemsize] // (2 if vector == 1 else 1)
    return {
        **geometry.constants(),
        "VECTOR": vector,
        "BLOCK_PIXELS": max(1, sums * 32 * WARPS // (block_taps * BLOCK_C)),
        "BLOCK_TAPS": block_taps,
        "BLOCK_C": BLOCK_C,
    }


# ---------------------------------------------------------------------------------------------- shipped binaries

_GEOMETRIES = {
    f"{k}x{k}{f'/{s}' if s > 1 else ''}": Geometry((k, k), (s, s), (k // 2, k // 2), (1, 1))
    for k, s in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2))
}


def binaries(capability: int) -> Iterator[Binary]:
    """What the launches above ask for: of every usual geometry in bfloat16, and of 3x3 what else there is."""
    for name in _GEOMETRIES:
        yield from _binaries(name, "bf16", 8)
    yield from _binaries("3x3", "fp32", 8)
    yield from _binaries("3x3", "bf16", 1)
    for name in ("3x3", "3x3/2"):
        yield from _binaries(name, "bf16", 8, any_width=True)
    for any_width in (False, True):
        yield Binary(
            f"depthwise add_filters{', any width' * any_width}",
            add_filters_kernel,
            {"partials_ptr": "*fp32", "dw_ptr": "*fp32", "active_ptr": "*i32"},
            {**STAGE2, **({"WIDTHS": 2} if any_width else {"WIDTHS": 1, "active_ptr": None})},
            warps=WARPS,
            stages=3,
            matrix=False,
            narrow=None,
        )


def _binaries(name: str, dtype: str, vector: int, any_width: bool = False) -> Iterator[Binary]:
    geometry = _GEOMETRIES[name]
    kind = f"{name} {dtype}{'' if vector > 1 else ', any channels'}{', any width' * any_width}"
    settings: dict[str, Any] = {"warps": WARPS, "stages": 3, "matrix": False, "narrow": 2 if vector > 1 else None}
    tensors = ("a_ptr", "y_ptr", "added_ptr", "norm_x_ptr", "norm_y_ptr")
    vectors = ("taps_ptr", "partials_ptr", "norm_weight_ptr", "norm_bias_ptr", "mean_ptr", "rstd_ptr")
    types = {**dict.fromkeys(tensors, f"*{dtype}"), **dict.fromkeys(vectors, "*fp32"), "active_ptr": "*i32"}
    all_channels: dict[str, Any] = {} if any_width else {"active_ptr": None}
    epilogue = dict.fromkeys((*tensors[2:], *vectors[1:]))
    for kind_of, gradient, activation, unused in (
        ("forward", False, None, epilogue),
        ("dX", True, None, epilogue),
        ("dX +sums by x, relu6", True, "relu6", dict.fromkeys(("added_ptr", "norm_y_ptr"))),
        ("dX +added +sums by y, relu", True, "relu", {"norm_bias_ptr": None}),
    ):
        joined = unused is not epilogue
        pixels = _block_pixels(vector, DTYPES[dtype], joined)
        narrow = 16 if joined and vector > 1 else settings["narrow"]  # vectors of channels
        constants: dict[str, Any] = {
            **_correlation_constants(geometry, gradient, vector, pixels, activation),
            **all_channels,
            "VIEWS": 1 + any_width,
            "bias_ptr": None,
            **unused,
        }
        yield Binary(
            f"depthwise {kind_of} {kind}",
            correlation_kernel,
            types,
            constants,
            **{**settings, "narrow": narrow, "registers": _most_registers(vector, pixels)},
        )
    types = {"grad_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "partials_ptr": "*fp32", "active_ptr": "*i32"}
    constants = {**_gradient_constants(geometry, vector, DTYPES[dtype]), **all_channels, "WIDTHS": 1 + any_width}
    yield Binary(f"depthwise dW {kind}", filter_sums_kernel, types, constants, **settings)
