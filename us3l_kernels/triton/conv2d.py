"""Sliced convolutions and matrix products in Triton: forward, dX and dW, as products of gathered pixels.

Pixels are rows: x [N, H, W, C] with channels innermost, each row at `pixel stride` elements from the next, so that a
prefix slice of a wider tensor is read where it lies. The weight [K, C, kh, kw] is the full one, read by its prefix.

One binary serves every width. Widths and strides are given in units of VECTOR channels and multiplied in the kernel:
with VECTOR = 8 that is the compiler's proof that addresses are aligned to 16 bytes, for whatever width comes. Channels
that are no multiple of 8 have a second binary, VECTOR = 1.

The forward and dX are one kernel. A pixel of y sees x at stride * pixel + dilation * tap - padding. The pixels of dX
that are equal modulo the stride (a phase) see dY at pixel / stride + something linear in every stride-th tap: so each
phase is a convolution with stride 1, over its own taps, and the phases are the second axis of the grid.

The forward can also give the mean and the sum of squared deviations of every tile of pixels that it writes, for a batch
norm behind it. dX can add another gradient of the same pixels, and give the sums over every tile that the backward of a
batch norm needs, if x is its result.

dW splits the pixels into pieces, each summed into a buffer of its own, which a second kernel adds up in a fixed order.
All sums are in float32. Addresses are 64-bit; the number of pixels, and of elements of a weight, is below 2^30.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from us3l_kernels.layout import convolved, is_rows
from us3l_kernels.triton import (
    DTYPES,
    SHARED_MEMORY,
    Active,
    Binary,
    Norm,
    Sizes,
    ceil_div,
    counts_of,
    gpu_of,
    units_of,
)
from us3l_kernels.triton.reductions import (
    Moments,
    active_channels,
    most_active_channels,
    partial_sums,
    sums_for_norm,
)

# ---------------------------------------------------------------------------------------------- kernels

@triton.jit
def first_tap(phase, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """The first tap that connects pixels of dX of this phase with pixels of dY; KERNEL if there is none."""
    first = KERNEL + 0 * phase
    for i in tl.static_range(KERNEL):
        tap = KERNEL - 1 - i
        first = tl.where((phase + PADDING - tap * DILATION) % STRIDE == 0, tap, first)
    return first


@triton.jit
def place_of(pixel, height, width):
    """(image, row, column) of a pixel by its number. Of unsigned numbers: signed ones take more instructions to divide,
    and dW does so for every step of its sum."""
    line = pixel.to(tl.uint32) // width.to(tl.uint32)
    image = line // height.to(tl.uint32)
    row = line - image * height.to(tl.uint32)
    column = pixel.to(tl.uint32) - line * width.to(tl.uint32)
    return image.to(tl.int32), row.to(tl.int32), column.to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "images",
        "a_h",
        "a_w",
        "y_h",
        "y_w",
        "k_units",
        "n_units",
        "a_stride",
        "w_out",
        "w_tap",
        "y_stride",
        "tiles_per_view",
        "added_stride",
        "norm_x_stride",
        "norm_y_stride",
    ]
)
def product_kernel(
    a_ptr,  # pixels to gather: x, or dY
    w_ptr,  # the full weight, channels innermost
    y_ptr,  # pixels to write: y, or dX
    bias_ptr,
    partials_ptr,  # float32 [views, tiles of rows, 2, n]: of a tile of y mean and sum of squared deviations; of one of
    # dX, of every phase, the sums of g and of g * normalised x, where g is what the norm's activation passes
    added_ptr,  # pixels like those of dX, or None
    norm_x_ptr,  # of the norm whose result x is
    norm_y_ptr,  # its result, given if the mask is to come from it
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,  # [views, n]
    rstd_ptr,
    images,  # of a view
    a_h,
    a_w,
    y_h,
    y_w,
    k_units,  # channels that are summed over, in units of VECTOR, as are all strides
    n_units,  # channels of the result
    a_stride,
    w_out,
    w_tap,
    y_stride,
    tiles_per_view,
    added_stride,
    norm_x_stride,
    norm_y_stride,
    k_active_ptr,  # the numbers of active channels, by width, if they are read from memory: `triton.Active`
    n_active_ptr,
    VIEWS: tl.constexpr,  # of a width
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,  # stride / gcd(stride, dilation): from one tap of a phase to the next
    STEP_W: tl.constexpr,
    GRADIENT: tl.constexpr,  # dX from dY, else y from x
    FLAT: tl.constexpr,  # taps and channels are one axis of the sum: for fewer channels than BLOCK_K
    VECTOR: tl.constexpr,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of the norm whose result x is
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k_full = k_units * VECTOR
    n_full = n_units * VECTOR
    tiles_n = tl.cdiv(n_full, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n  # neighbours share pixels, which then come from the L2 cache
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < n_full
    view = tile_m // tiles_per_view
    tile = tile_m - view * tiles_per_view
    k_size = active_channels(k_full, k_active_ptr, view // VIEWS, VECTOR)
    n_size = active_channels(n_full, n_active_ptr, view // VIEWS, VECTOR)
    if n_active_ptr is not None:
        n_ok = n < n_size

    # Where rows lie: pixel (image, top, left) of a at tap 0, and the pixel of y.
    POINTWISE: tl.constexpr = KH * KW * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0
    if GRADIENT:
        phase_h = tl.program_id(1) // STRIDE_W
        phase_w = tl.program_id(1) % STRIDE_W
        first_h = first_tap(phase_h, KH, STRIDE_H, PADDING_H, DILATION_H)
        first_w = first_tap(phase_w, KW, STRIDE_W, PADDING_W, DILATION_W)
        taps_h = (KH - first_h + STEP_H - 1) // STEP_H
        taps_w = (KW - first_w + STEP_W - 1) // STEP_W
        rows_h = (y_h - phase_h + STRIDE_H - 1) // STRIDE_H
        rows_w = (y_w - phase_w + STRIDE_W - 1) // STRIDE_W
    else:
        taps_h = KH
        taps_w = KW
        rows_h = y_h
        rows_w = y_w
    rows = images * rows_h * rows_w
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    if POINTWISE:
        top = tl.zeros((BLOCK_M,), tl.int32)
        left = top
        source = (view * rows + row).to(tl.int64)
        target = source
    else:
        image, h, w = place_of(row, rows_h, rows_w)
        image += view * images
        if GRADIENT:
            top = h + (phase_h + PADDING_H - first_h * DILATION_H) // STRIDE_H
            left = w + (phase_w + PADDING_W - first_w * DILATION_W) // STRIDE_W
            target = (image * y_h + h * STRIDE_H + phase_h).to(tl.int64) * y_w + w * STRIDE_W + phase_w
        else:
            top = h * STRIDE_H - PADDING_H
            left = w * STRIDE_W - PADDING_W
            target = (view * rows + row).to(tl.int64)
        source = (image * a_h + top).to(tl.int64) * a_w + left
    a_rows = a_ptr + source * (a_stride * VECTOR)
    FROM_TAP_TO_TAP_H: tl.constexpr = -(DILATION_H * STEP_H // STRIDE_H) if GRADIENT else DILATION_H
    FROM_TAP_TO_TAP_W: tl.constexpr = -(DILATION_W * STEP_W // STRIDE_W) if GRADIENT else DILATION_W

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k_range = tl.arange(0, BLOCK_K)
    k_rows = k_range.to(tl.int64) * (w_out * VECTOR)
    blocks_k = tl.cdiv(k_size, BLOCK_K)
    blocks = taps_h * taps_w * blocks_k
    if FLAT:
        blocks = tl.cdiv(taps_h * taps_w * k_full, BLOCK_K)
    if n_active_ptr is not None:
        blocks = tl.where(tl.program_id(0) % tiles_n * BLOCK_N < n_size, blocks, 0)  # none of the channels are active
    for block in range(0, blocks):  # one loop over taps and channels: the pipeline is never drained
        if FLAT:
            flat = block * BLOCK_K + k_range
            tap = flat // k_full
            k = flat % k_full
            k_ok = tap < taps_h * taps_w
            if k_active_ptr is not None:
                k_ok = k_ok & (k < k_size)
        else:
            tap = block // blocks_k
            first_k = (block - tap * blocks_k) * BLOCK_K
            k = first_k + k_range
            k_ok = k < k_size
        tap_h = tap // tl.maximum(taps_w, 1)  # a phase may have none, and then no block
        tap_w = tap - tap_h * taps_w
        move_h = tap_h * FROM_TAP_TO_TAP_H
        move_w = tap_w * FROM_TAP_TO_TAP_W
        if GRADIENT:
            tap = (first_h + tap_h * STEP_H) * KW + first_w + tap_w * STEP_W
        move = (move_h * a_w + move_w).to(tl.int64) * (a_stride * VECTOR)
        if POINTWISE:
            a_ok = row_ok[:, None]
        elif FLAT:
            y = top[:, None] + move_h[None, :]
            x = left[:, None] + move_w[None, :]
            a_ok = row_ok[:, None] & (y >= 0) & (y < a_h) & (x >= 0) & (x < a_w)
        else:
            y = top + move_h
            x = left + move_w
            a_ok = (row_ok & (y >= 0) & (y < a_h) & (x >= 0) & (x < a_w))[:, None]
        a = tl.load(a_rows[:, None] + (move + k)[None, :], mask=a_ok & k_ok[None, :], other=0.0)
        from_tap = tap.to(tl.int64) * (w_tap * VECTOR)
        if GRADIENT:  # rows of the weight are summed over
            if FLAT:
                offsets = k.to(tl.int64) * (w_out * VECTOR) + from_tap
            else:
                offsets = k_rows + (first_k.to(tl.int64) * (w_out * VECTOR) + from_tap)
            b = tl.load(w_ptr + offsets[:, None] + n[None, :], mask=k_ok[:, None] & n_ok[None, :], other=0.0)
        else:
            offsets = n.to(tl.int64) * (w_out * VECTOR)
            b = tl.load(
                w_ptr + offsets[:, None] + (from_tap + k)[None, :], mask=n_ok[:, None] & k_ok[None, :], other=0.0
            ).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    ok = row_ok[:, None] & n_ok[None, :]
    if added_ptr is not None:
        added = tl.load(added_ptr + target[:, None] * (added_stride * VECTOR) + n[None, :], mask=ok, other=0.0)
        acc += added.to(tl.float32)
    result = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + target[:, None] * (y_stride * VECTOR) + n[None, :], result, mask=ok)
    if STATISTICS:  # of what was stored, which is what a norm would read; past the last row there are zeros
        values = result.to(tl.float32)
        if GRADIENT:
            sum0, sum1 = sums_for_norm(
                values,
                norm_x_ptr,
                target[:, None] * (norm_x_stride * VECTOR) + n[None, :],
                norm_y_ptr,
                target[:, None] * (norm_y_stride * VECTOR) + n[None, :],
                norm_weight_ptr,
                norm_bias_ptr,
                mean_ptr,
                rstd_ptr,
                view,
                n,
                n_full,
                n_size,
                ok,
                ACTIVATION,
            )
            chunk = (view * tl.num_programs(1) + tl.program_id(1)) * tiles_per_view + tile
        else:
            count = tl.minimum(BLOCK_M, rows - tile * BLOCK_M).to(tl.float32)
            sum0 = tl.sum(values, 0) / count
            deviations = tl.where(row_ok[:, None], values - sum0[None, :], 0.0)
            sum1 = tl.sum(deviations * deviations, 0)
            chunk = tile_m
        partial = partials_ptr + chunk.to(tl.int64) * (2 * n_full) + n
        tl.store(partial, sum0, mask=n_ok)
        tl.store(partial + n_full, sum1, mask=n_ok)


@triton.jit(
    do_not_specialize=[
        "rows",
        "rows_of_piece",
        "x_h",
        "x_w",
        "y_h",
        "y_w",
        "out_units",
        "in_units",
        "dy_stride",
        "x_stride",
        "dw_out",
        "dw_tap",
    ]
)
def weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,  # the gradient itself, added to, or float32 [pieces, out, taps, in], written
    rows,  # pixels of y, of a width
    rows_of_piece,
    x_h,
    x_w,
    y_h,
    y_w,
    out_units,  # channels, in units of VECTOR, as are all strides
    in_units,
    dy_stride,
    x_stride,
    dw_out,
    dw_tap,
    out_active_ptr,  # as in product_kernel
    in_active_ptr,
    WIDTHS: tl.constexpr,  # stacked in the batch; every piece is of one width
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ADD: tl.constexpr,  # to what dw holds; there is one piece then
    FLAT: tl.constexpr,  # taps and channels are one axis of tiles: for fewer channels than BLOCK_N
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of dW[out, tap, in] = sum over pixels of dY[pixel, out] * X[pixel seen through the tap, in]."""
    out_full = out_units * VECTOR
    in_full = in_units * VECTOR
    piece = tl.program_id(2)
    width = 0
    if WIDTHS > 1:
        pieces = tl.cdiv(rows, rows_of_piece)
        width = piece // pieces
        piece -= width * pieces
    out_size = active_channels(out_full, out_active_ptr, width, VECTOR)
    in_size = active_channels(in_full, in_active_ptr, width, VECTOR)
    out = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_ok = out < out_size
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if FLAT:
        tap = column // in_full
        channel = column % in_full
        if in_active_ptr is not None:
            tap = tl.where(channel < in_size, tap, KH * KW)
        channel_ok = tap < KH * KW
    else:
        tiles = tl.cdiv(in_full, BLOCK_N)
        tap = tl.program_id(1) // tiles
        channel = column - tap * (tiles * BLOCK_N)
        channel_ok = channel < in_size
    from_top = tap // KW * DILATION_H - PADDING_H
    from_left = tap % KW * DILATION_W - PADDING_W
    shift = (from_top * x_w + from_left).to(tl.int64) * (x_stride * VECTOR) + channel

    POINTWISE: tl.constexpr = KH * KW * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0
    begin = piece * rows_of_piece
    end = tl.minimum(begin + rows_of_piece, rows)
    if WIDTHS > 1:
        begin += width * rows
        end += width * rows
    if out_active_ptr is not None:
        end = tl.where(tl.program_id(0) * BLOCK_M < out_size, end, begin)  # none of the channels are active
    if in_active_ptr is not None and not FLAT:
        end = tl.where(tl.program_id(1) % tiles * BLOCK_N < in_size, end, begin)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_ok = row < end
        if POINTWISE:
            source = row.to(tl.int64)
            x_ok = row_ok[:, None]
        else:
            image, top, left = place_of(row, y_h, y_w)
            top *= STRIDE_H
            left *= STRIDE_W
            source = (image * x_h + top).to(tl.int64) * x_w + left
            if FLAT:
                y = top[:, None] + from_top[None, :]
                x = left[:, None] + from_left[None, :]
                x_ok = row_ok[:, None] & (y >= 0) & (y < x_h) & (x >= 0) & (x < x_w)
            else:
                y = top + from_top
                x = left + from_left
                x_ok = (row_ok & (y >= 0) & (y < x_h) & (x >= 0) & (x < x_w))[:, None]
        offsets = row.to(tl.int64) * (dy_stride * VECTOR)
        dy = tl.load(dy_ptr + offsets[:, None] + out[None, :], mask=row_ok[:, None] & out_ok[None, :], other=0.0)
        seen = (x_ptr + source * (x_stride * VECTOR))[:, None] + shift[None, :]
        acc = tl.dot(
            dy.T,
            tl.load(seen, mask=x_ok & channel_ok[None, :], other=0.0),
            acc,
            input_precision=PRECISION,
        )
    ok = out_ok[:, None] & channel_ok[None, :]
    offsets = out.to(tl.int64) * (dw_out * VECTOR)
    if not ADD:
        offsets += tl.program_id(2).to(tl.int64) * out_full * (dw_out * VECTOR)
    dw = dw_ptr + offsets[:, None] + (tap * (dw_tap * VECTOR) + channel)[None, :]
    if ADD:
        acc += tl.load(dw, mask=ok, other=0.0).to(tl.float32)
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=["pieces", "size_units", "in_units", "taps", "taps_w", "dw_out", "dw_h", "dw_w", "dw_in"]
)
def add_pieces_kernel(
    pieces_ptr,  # float32 [widths, pieces, out, taps, in]
    dw_ptr,
    pieces,
    size_units,  # elements of a piece, in units of VECTOR, as are the strides of dw but that of its channels
    in_units,
    taps,
    taps_w,
    dw_out,
    dw_h,
    dw_w,
    dw_in,
    out_active_ptr,  # as in weight_gradient_kernel
    in_active_ptr,
    WIDTHS: tl.constexpr,
    INNERMOST: tl.constexpr,  # the channels of dw are: dw_in is 1
    VECTOR: tl.constexpr,
    PIECES: tl.constexpr,  # that are loaded at a time
    BLOCK: tl.constexpr,
):
    """Adds the pieces, in their order, to the prefix of a gradient of any layout."""
    size = size_units * VECTOR
    in_size = in_units * VECTOR
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = element < size
    channel = element % in_size
    tap = element // in_size % taps
    out = element // (in_size * taps)
    lanes = tl.zeros((PIECES, BLOCK), tl.float32)
    written = ok
    if out_active_ptr is not None or in_active_ptr is not None:
        most_out = most_active_channels(size // (in_size * taps), out_active_ptr, WIDTHS)
        most_in = most_active_channels(in_size, in_active_ptr, WIDTHS)
        written = ok & (out < most_out) & (channel < most_in // VECTOR * VECTOR)
    for width in tl.static_range(WIDTHS):
        added = ok
        if out_active_ptr is not None:
            added = added & (out < tl.load(out_active_ptr + width))
        if in_active_ptr is not None:
            added = added & (channel < active_channels(in_size, in_active_ptr, width, VECTOR))
        for first in range(0, pieces, PIECES):
            piece = first + tl.arange(0, PIECES)
            place = (width * pieces + piece).to(tl.int64)[:, None] * size + element[None, :]
            lanes += tl.load(pieces_ptr + place, mask=(piece < pieces)[:, None] & added[None, :], other=0.0)
    total = tl.sum(lanes, 0)
    if not INNERMOST:
        channel *= dw_in
    at_tap = (tap // taps_w) * (dw_h * VECTOR) + (tap % taps_w) * (dw_w * VECTOR)
    dw = dw_ptr + out.to(tl.int64) * (dw_out * VECTOR) + at_tap + channel
    total += tl.load(dw, mask=written, other=0.0).to(tl.float32)
    tl.store(dw, total.to(dw_ptr.dtype.element_ty), mask=written)


# ---------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Tile:
    """What one block computes: m x n results, k terms of the sum at a time.

    Used for results of at most `channels` channels, on GPUs of that compute capability or a later one. pair: its
    registers let a multiprocessor have two blocks, so that one loads and stores while the other multiplies.
    """

    m: int
    n: int
    k: int
    warps: int
    channels: int = 1 << 31
    capability: int = 80
    pair: bool = False

    def stages(self, itemsize: int, shared_memory: int) -> int:
        """How many loads are under way at a time: four or as many as fit, but three if that leaves room for a pair."""
        stage = (self.m + self.n) * self.k * itemsize
        of_pair = (shared_memory // 2 - 2048) // stage
        fit = of_pair if self.pair and of_pair >= 3 else (shared_memory - 2048) // stage
        return max(1, min(4, fit))


# In the order in which they are tried. By precision: of half precision, of float32 rounded to TF32 on the tensor cores,
# of exact float32 without them; with channels that are no multiple of 8 "any" of the first two, "any ieee" of the last.
PRODUCT_TILES = {
    "half": (
        Tile(128, 64, 64, 8, channels=64, pair=True),
        Tile(128, 128, 64, 8, channels=192, pair=True),
        Tile(128, 256, 64, 8, capability=90),
        Tile(128, 128, 64, 8, pair=True),
    ),
    "tf32": (Tile(128, 64, 32, 4, channels=64), Tile(128, 128, 32, 8)),
    "ieee": (Tile(64, 64, 16, 4),),
    "any": (Tile(64, 64, 32, 4, capability=100), Tile(64, 64, 32, 8)),
    "any ieee": (Tile(64, 32, 16, 4, capability=100), Tile(64, 64, 16, 8)),
}
# Of dX with an epilogue, which needs registers for what it reads, of a stride, and for any width.
JOINED_TILES = {
    "half": (
        Tile(128, 64, 64, 8, channels=64, capability=90),
        Tile(64, 64, 64, 8, channels=64),
        Tile(128, 128, 64, 8),
    ),
    "tf32": (Tile(64, 32, 32, 8, capability=90), Tile(32, 64, 32, 4)),
    "ieee": (Tile(64, 32, 16, 8),),
    "any": (Tile(64, 64, 32, 8),),
    "any ieee": (Tile(64, 32, 16, 8),),
}
FEW_ROWS = {"half": Tile(64, 64, 64, 4), "tf32": Tile(64, 32, 32, 8)}
"""Instead of those that would be fewer than the multiprocessors."""
FEW_JOINED_ROWS = {"half": Tile(64, 64, 64, 8)}
"""Instead of JOINED_TILES, also where taps and channels are one axis: larger ones spill there."""
GRADIENT_TILES = {
    "half": (Tile(64, 64, 64, 4, channels=64), Tile(128, 128, 64, 8, pair=True)),
    "tf32": (Tile(64, 64, 32, 4, channels=64), Tile(128, 128, 32, 8)),
    "ieee": (Tile(32, 64, 32, 4),),
    "any": (Tile(64, 64, 32, 8),),
    "any ieee": (Tile(32, 64, 32, 4),),
}
COLUMNS_WITH_STATISTICS = 128  # at most: their epilogue holds the results once more, in float32
LEAST_ROWS_OF_A_PIECE = 512
BLOCKS_PER_MULTIPROCESSOR = 2  # that dW's pieces make at most, if there are rows enough
ADDED = {"PIECES": 1, "BLOCK": 1024}  # pieces and elements of dW that a block loads at a time
MANY_ADDED = {"PIECES": 16, "BLOCK": 256}  # of as many pieces or more, as a small dW has


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: (height, width) of everything."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Geometry:
        kernel = weight.shape[2:]
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
        return cls((kh, kw), (sh, sw), (ph, pw), (dh, dw))

    def output(self, size: Sequence[int]) -> tuple[int, int]:
        return convolved(size, self.kernel, self.stride, self.padding, self.dilation)

    def constants(self) -> dict[str, int]:
        pairs = {"STRIDE": self.stride, "PADDING": self.padding, "DILATION": self.dilation}
        named = {f"{name}_{axis}": pair[d] for name, pair in pairs.items() for d, axis in enumerate("HW")}
        return {"KH": self.kernel[0], "KW": self.kernel[1], **named}

    def steps(self) -> dict[str, int]:
        """From one tap of a phase to the next."""
        h, w = (self.stride[d] // math.gcd(self.stride[d], self.dilation[d]) for d in (0, 1))
        return {"STEP_H": h, "STEP_W": w}


POINT = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
"""Of a 1x1 convolution, and of a matrix product: rows are pixels."""


def _tile(
    tiles: dict[str, tuple[Tile, ...]], precision: str, vector: int, channels: int, capability: int, most: int = 1 << 31
) -> Tile:
    """The first that fits, with at most `most` columns."""
    key = precision if vector > 1 else "any ieee" if precision == "ieee" else "any"
    fitting = (tile for tile in tiles[key] if channels <= tile.channels and capability >= tile.capability)
    return next(tile for tile in fitting if tile.n <= most)


def _reachable(tiles: Sequence[Tile], capability: int) -> list[Tile]:
    """Those that `_tile` takes for some number of channels."""
    found: list[Tile] = []
    for tile in tiles:
        hidden = any(first.channels >= tile.channels and first.n <= tile.n for first in found)
        if capability >= tile.capability and not hidden:
            found.append(tile)
    return found


def _settings(tile: Tile, itemsize: int, shared_memory: int) -> dict[str, int]:
    """What a launch is given of a tile."""
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return {**blocks, "num_warps": tile.warps, "num_stages": tile.stages(itemsize, shared_memory)}


# ---------------------------------------------------------------------------------------------- launches


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """x [N, C, H, W] with channels innermost and pixels at one distance (else a copy that has), and that distance."""
    if not is_rows(x, 1):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, next((x.stride(d) for d in (3, 2, 0) if x.size(d) > 1), x.size(1))


def _filters(weight: Tensor) -> tuple[int, int] | None:
    """The distances of the rows and of the taps of [K, C, kh, kw]; None if its channels are not innermost."""
    kh, kw = weight.shape[2:]
    tap = weight.stride(3) if kw > 1 else weight.stride(2) if kh > 1 else 0
    uniform = kh == 1 or kw == 1 or weight.stride(2) == kw * weight.stride(3)
    return (weight.stride(0), tap) if uniform and (weight.stride(1) == 1 or weight.size(1) == 1) else None


def _readable(weight: Tensor, outputs: int, inputs: int) -> tuple[Tensor, tuple[int, int]]:
    """The weight and its distances: read where it lies if its channels are innermost, else its slice is copied."""
    distances = _filters(weight)
    if distances is None:
        weight = weight[:outputs, :inputs].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        distances = (weight.stride(0), inputs)
    return weight, distances


def _vector(*sizes: int) -> int:
    """The unit of channels and strides: 8 if all are multiples of it, else 1."""
    return 1 if any(size % 8 for size in sizes) else 8


def _is_flat(geometry: Geometry, channels: int, tile: int) -> bool:
    """Whether taps and channels should be one axis: a tile with the channels of one tap would be half empty."""
    return geometry.kernel != (1, 1) and 2 * channels <= tile


def _product_constants(
    geometry: Geometry,
    *,
    gradient: bool,
    flat: bool,
    vector: int,
    bias: bool,
    statistics: bool,
    activation: str | None,
    precision: str,
) -> dict[str, Any]:
    return {
        **geometry.constants(),
        **geometry.steps(),
        "GRADIENT": gradient,
        "FLAT": flat,
        "VECTOR": vector,
        "BIAS": bias,
        "STATISTICS": statistics,
        "ACTIVATION": activation,
        "PRECISION": "tf32" if precision == "half" else precision,
    }


def _product(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    precision: str,
    *,
    gradient: bool = False,
    views: int | None = None,
    added: Tensor | None = None,
    norm: Norm | None = None,
    sizes: Sizes | None = None,
) -> Moments | None:
    """Writes y from a, or, as a gradient, dX from dY, plus `added`.

    With `views`, also gives the moments of y, a tile of rows being a chunk; or, as a gradient, what `norm` needs of it.
    sizes: of the convolution, if they are read from the device.
    """
    (images, k_size, a_h, a_w), (_, n_size, y_h, y_w) = a.shape, y.shape
    outputs, inputs = (k_size, n_size) if gradient else (n_size, k_size)
    a, a_stride = _pixels(a)
    y_stride = _pixels(y)[1]
    added, added_stride = (None, 0) if added is None else _pixels(added)
    norm_x, norm_y, *of_norm, activation, _ = [None] * 8 if norm is None else norm
    norm_x, norm_x_stride = (None, 0) if norm_x is None else _pixels(norm_x)
    norm_y, norm_y_stride = (None, 0) if norm_y is None else _pixels(norm_y)
    weight, (w_out, w_tap) = _readable(weight, outputs, inputs)
    strides = (a_stride, w_out, w_tap, y_stride, added_stride, norm_x_stride, norm_y_stride)
    k_active, n_active = _active(sizes, gradient)
    vector = _vector(k_size, n_size, *strides, *units_of(k_active, n_active))
    a_stride, w_out, w_tap, y_stride, *epilogue_strides = (stride // vector for stride in strides)
    widths = 1 if sizes is None else sizes.widths
    parts = views or widths
    stride_h, stride_w = geometry.stride if gradient else (1, 1)
    rows = images // parts * ceil_div(y_h, stride_h) * ceil_div(y_w, stride_w)  # the largest phase of a view
    phases = stride_h * stride_w
    gpu = gpu_of(a)
    most = 1 << 31 if views is None else COLUMNS_WITH_STATISTICS
    joined = added is not None or norm is not None or (gradient and (sizes is not None or phases > 1))
    tile = _tile(JOINED_TILES if joined else PRODUCT_TILES, precision, vector, n_size, gpu.capability, most)
    few = parts * phases * ceil_div(rows, tile.m) * ceil_div(n_size, tile.n) < gpu.multiprocessors
    if vector > 1 and (few or (joined and _is_flat(geometry, k_size, tile.k))):
        tile = (FEW_JOINED_ROWS if joined else FEW_ROWS).get(precision, tile)
    tiles = ceil_div(rows, tile.m)
    partials = None if views is None else partial_sums(phases * tiles, n_size, a, views)
    constants = _product_constants(
        geometry,
        gradient=gradient,
        flat=_is_flat(geometry, k_size, tile.k),
        vector=vector,
        bias=bias is not None,
        statistics=views is not None,
        activation=activation,
        precision=precision,
    )
    with torch.cuda.device_of(a):
        product_kernel[(tiles * parts * ceil_div(n_size, tile.n), phases)](
            a,
            weight,
            y,
            y if bias is None else bias,
            y if partials is None else partials,
            added,
            norm_x,
            norm_y,
            *of_norm,
            images // parts,
            a_h,
            a_w,
            y_h,
            y_w,
            k_size // vector,
            n_size // vector,
            a_stride,
            w_out,
            w_tap,
            y_stride,
            tiles,
            *epilogue_strides,
            *counts_of(k_active, n_active),
            VIEWS=1 if sizes is None else parts // widths,
            **constants,
            **_settings(tile, a.element_size(), gpu.shared_memory),
        )
    return None if partials is None else Moments(partials, tile.m)


def _active(sizes: Sizes | None, gradient: bool) -> tuple[Active | None, Active | None]:
    """Of what a product sums over, and of its result."""
    if sizes is None:
        return None, None
    return (sizes.outputs, sizes.inputs) if gradient else (sizes.inputs, sizes.outputs)


def _result(x: Tensor, outputs: int, geometry: Geometry) -> Tensor:
    shape = (x.size(0), outputs, *geometry.output(x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    geometry: Geometry,
    precision: str,
    sizes: Sizes | None = None,
) -> Tensor:
    """[N, c, H, W] -> [N, outputs, H', W'], channels_last.

    weight: [>= outputs, >= c, kh, kw], of x's dtype. precision: "half" for half precision, else "tf32" or "ieee".
    """
    y = _result(x, outputs, geometry)
    if y.numel() > 0:
        _product(x, weight, bias, y, geometry, precision, sizes=sizes)
    return y


def conv2d_moments(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    geometry: Geometry,
    precision: str,
    views: int,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Moments]:
    """`conv2d` without bias, and the moments of its result as it is stored, for the batch norm behind it.

    The batch, which is not empty, is `views` stacked views. Every tile of pixels lies in one view.
    """
    y = _result(x, outputs, geometry)
    moments = _product(x, weight, None, y, geometry, precision, views=views, sizes=sizes)
    assert moments is not None
    return y, moments


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    dx: Tensor,
    geometry: Geometry,
    precision: str,
    added: Tensor | None = None,
    norm: Norm | None = None,
    sizes: Sizes | None = None,
) -> Tensor | None:
    """Writes dX [N, c, H, W], whose pixels lie at one distance, from dY [N, outputs, H', W'], plus `added`, like dX.

    With `norm`, whose result x is, also returns the sums that its backward needs (`batch_norm.backward`): of what its
    activation passes of dX, which is stored whole.
    """
    if dx.numel() == 0:
        return None
    views = None if norm is None else norm.mean.size(0)
    sums = _product(
        grad, weight, None, dx, geometry, precision, gradient=True, views=views, added=added, norm=norm, sizes=sizes
    )
    return None if sums is None else sums.partials


@cache
def _pieces(blocks: int, multiprocessors: int) -> int:
    """Into how many to split the rows of dW, for which there are so many blocks: where the busiest multiprocessor has
    the least to do. One block more than there is room for would make all wait for it."""
    most = ceil_div(BLOCKS_PER_MULTIPROCESSOR * multiprocessors, blocks)
    return min(range(1, most + 1), key=lambda pieces: (ceil_div(blocks * pieces, multiprocessors) / pieces, pieces))


def _gradient_constants(geometry: Geometry, *, add: bool, flat: bool, vector: int, precision: str) -> dict[str, Any]:
    precision = "tf32" if precision == "half" else precision
    return {**geometry.constants(), "ADD": add, "FLAT": flat, "VECTOR": vector, "PRECISION": precision}


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    geometry: Geometry,
    precision: str,
    sizes: Sizes | None = None,
) -> None:
    """Adds dW to the prefix [outputs, c] of `grad_weight` [>= outputs, >= c, kh, kw], of any layout and dtype."""
    (images, outputs, y_h, y_w), (_, inputs, x_h, x_w) = grad.shape, x.shape
    out_active, in_active = _active(sizes, gradient=True)
    widths = 1 if sizes is None else sizes.widths
    rows, taps = images // widths * y_h * y_w, math.prod(geometry.kernel)  # rows: of a width
    if rows == 0:
        return
    grad, grad_stride = _pixels(grad)
    x, x_stride = _pixels(x)
    gpu = gpu_of(x)
    distances = _filters(grad_weight)
    vector = _vector(
        outputs, inputs, grad_stride, x_stride, *(distances or ()), *units_of(in_active, out_active)
    )
    tile = _tile(GRADIENT_TILES, precision, vector, inputs, gpu.capability)
    flat = _is_flat(geometry, inputs, tile.n)
    columns = ceil_div(taps * inputs, tile.n) if flat else taps * ceil_div(inputs, tile.n)
    blocks = ceil_div(outputs, tile.m) * columns * widths
    wanted = _pieces(blocks, gpu.multiprocessors)
    rows_of_piece = ceil_div(max(ceil_div(rows, wanted), LEAST_ROWS_OF_A_PIECE), tile.k) * tile.k
    pieces = ceil_div(rows, rows_of_piece)

    add = pieces * widths == 1 and distances is not None
    shape = (widths, pieces, outputs, taps, inputs)
    destination = grad_weight if add else grad.new_empty(shape, dtype=torch.float32)
    dw_out, dw_tap = distances if add and distances is not None else (taps * inputs, inputs)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[(ceil_div(outputs, tile.m), columns, widths * pieces)](
            grad,
            x,
            destination,
            rows,
            rows_of_piece,
            x_h,
            x_w,
            y_h,
            y_w,
            outputs // vector,
            inputs // vector,
            grad_stride // vector,
            x_stride // vector,
            dw_out // vector,
            dw_tap // vector,
            *counts_of(out_active, in_active),
            WIDTHS=widths,
            **_gradient_constants(geometry, add=add, flat=flat, vector=vector, precision=precision),
            **_settings(tile, x.element_size(), gpu.shared_memory),
        )
        if not add:
            _add_pieces(destination, grad_weight, in_active, out_active)


def _add_pieces(
    pieces: Tensor, grad_weight: Tensor, in_active: Active | None, out_active: Active | None
) -> None:
    widths, number, outputs, taps, inputs = pieces.shape
    size = outputs * taps * inputs
    layout = zip(grad_weight.stride(), grad_weight.shape, strict=True)
    dw_out, dw_in, dw_h, dw_w = (stride if count > 1 else 0 for stride, count in layout)
    innermost = dw_in <= 1
    vector = _vector(inputs, dw_out, dw_h, dw_w, *units_of(in_active)) if innermost else 1
    tile = MANY_ADDED if number >= MANY_ADDED["PIECES"] else ADDED
    add_pieces_kernel[(ceil_div(size, tile["BLOCK"]),)](
        pieces,
        grad_weight,
        number,
        size // vector,
        inputs // vector,
        taps,
        grad_weight.size(3),
        dw_out // vector,
        dw_h // vector,
        dw_w // vector,
        dw_in,
        *counts_of(out_active, in_active),
        WIDTHS=widths,
        INNERMOST=innermost,
        VECTOR=vector,
        **tile,
    )


# ---------------------------------------------------------------------------------------------- shipped binaries

_SAME = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
_HALVING = Geometry((3, 3), (2, 2), (1, 1), (1, 1))
_STEM = Geometry((7, 7), (2, 2), (3, 3), (1, 1))
_SHORTCUT = Geometry((1, 1), (2, 2), (0, 0), (1, 1))
_GEOMETRIES = {"1x1": POINT, "1x1/2": _SHORTCUT, "3x3": _SAME, "3x3/2": _HALVING, "7x7/2": _STEM}


def binaries(capability: int) -> Iterator[Binary]:
    """What the launches above ask for: every tile, and every geometry, epilogue, dtype and unit with one of them."""

    def product(geometry: str, tile: Tile, precision: str, dtype: str, **options: Any) -> Binary:
        return _product_binary(capability, geometry, tile, precision, dtype, **options)

    def gradient(geometry: str, tile: Tile, precision: str, dtype: str, **options: Any) -> Binary:
        return _gradient_binary(capability, geometry, tile, precision, dtype, **options)

    for precision, dtype in (("half", "bf16"), ("tf32", "fp32"), ("ieee", "fp32")):
        few_rows, few_joined = ([few[precision]] if precision in few else [] for few in (FEW_ROWS, FEW_JOINED_ROWS))
        for tile in (*_reachable(PRODUCT_TILES[precision], capability), *few_rows):
            for dx in (False, True):
                yield product("3x3", tile, precision, dtype, dx=dx)
            if tile.n <= COLUMNS_WITH_STATISTICS:
                yield product("3x3", tile, precision, dtype, statistics=True)
        for tile in (*_reachable(JOINED_TILES[precision], capability), *few_joined):
            for norm in ("x", "y"):
                yield product("3x3", tile, precision, dtype, dx=True, added=True, norm=norm, activation="relu6")
        for tile in _reachable(GRADIENT_TILES[precision], capability):
            yield gradient("3x3", tile, precision, dtype)
    tile, narrow = PRODUCT_TILES["half"][1], PRODUCT_TILES["half"][0]
    joined = JOINED_TILES["half"][-1]
    of_gradient, narrow_of_gradient = GRADIENT_TILES["half"][1], GRADIENT_TILES["half"][0]
    for dtype in ("bf16", "fp16"):
        for geometry in _GEOMETRIES:
            for dx in (False, True):
                yield product(geometry, tile, "half", dtype, dx=dx)
            yield gradient(geometry, of_gradient, "half", dtype)
    for dx in (False, True):
        yield product("3x3", narrow, "half", "bf16", dx=dx, flat=True)
    for flat in (False, True):
        yield gradient("3x3", narrow_of_gradient, "half", "bf16", flat=flat, add=True)
    yield gradient("3x3", narrow_of_gradient, "half", "bf16", flat=True)
    for dtype in ("bf16", "fp16"):
        yield product("1x1", tile, "half", dtype, statistics=True)
        for geometry in ("1x1", "3x3/2"):
            yield product(geometry, joined, "half", dtype, dx=True, norm="x", activation="relu")
    yield product("3x3", narrow, "half", "bf16", statistics=True, flat=True)
    yield product("3x3", FEW_JOINED_ROWS["half"], "half", "bf16", dx=True, flat=True, norm="x", activation="relu")
    yield product("1x1", joined, "half", "bf16", dx=True, added=True)
    yield product("1x1", joined, "half", "bf16", dx=True, added=True, norm="y", activation="relu")
    yield product("1x1", joined, "half", "bf16", dx=True, added=True, norm="x")
    yield product("1x1", tile, "half", "bf16", bias=True)
    for precision, dtype in (("half", "bf16"), ("tf32", "fp32"), ("ieee", "fp32")):
        tables = (PRODUCT_TILES, JOINED_TILES, GRADIENT_TILES)
        tile, of_dx, of_gradient = (_tile(table, precision, 1, 1, capability) for table in tables)
        for flat in (False, True):
            for dx in (False, True):
                yield product("3x3", tile, precision, dtype, dx=dx, flat=flat, vector=1)
            yield product("3x3", tile, precision, dtype, statistics=True, flat=flat, vector=1)
            of_norm = {"added": True, "norm": "x", "activation": "relu6"}
            yield product("3x3", of_dx, precision, dtype, dx=True, flat=flat, vector=1, **of_norm)
            yield gradient("3x3", of_gradient, precision, dtype, flat=flat, vector=1)
    yield from _for_any_width(capability)
    for any_width in (False, True):
        for dtype in ("fp32",) if any_width else DTYPES:
            for vector, innermost in ((8, True), (1, True), (1, False)):
                for added in (ADDED, MANY_ADDED):
                    yield _added_binary(dtype, vector, innermost, added, any_width)


def _for_any_width(capability: int) -> Iterator[Binary]:
    """Of those that read the numbers of active channels: every tile and geometry in bfloat16, and some in float32."""

    def product(geometry: str, tile: Tile, precision: str = "half", dtype: str = "bf16", **options: Any) -> Binary:
        return _product_binary(capability, geometry, tile, precision, dtype, any_width=True, **options)

    def gradient(geometry: str, tile: Tile, precision: str = "half", dtype: str = "bf16", **options: Any) -> Binary:
        return _gradient_binary(capability, geometry, tile, precision, dtype, any_width=True, **options)

    of_norm: dict[str, Any] = {"added": True, "norm": "y", "activation": "relu6"}
    few = FEW_JOINED_ROWS["half"]
    for tile in (*_reachable(PRODUCT_TILES["half"], capability), FEW_ROWS["half"]):
        yield product("3x3", tile, statistics=tile.n <= COLUMNS_WITH_STATISTICS)
    for tile in (*_reachable(JOINED_TILES["half"], capability), few):
        yield product("3x3", tile, dx=True)
        for norm in ("x", "y"):
            yield product("3x3", tile, dx=True, **{**of_norm, "norm": norm})
    for tile in _reachable(GRADIENT_TILES["half"], capability):
        yield gradient("3x3", tile)
    for geometry in ("1x1", "1x1/2", "3x3/2", "7x7/2"):
        yield product(geometry, PRODUCT_TILES["half"][1], statistics=True)
        yield product(geometry, JOINED_TILES["half"][-1], dx=True)
        yield gradient(geometry, GRADIENT_TILES["half"][1])
    yield product("3x3", PRODUCT_TILES["half"][0], statistics=True, flat=True)
    yield product("3x3", few, dx=True, flat=True)
    yield product("3x3", few, dx=True, flat=True, **of_norm)
    yield gradient("3x3", GRADIENT_TILES["half"][0], flat=True)
    for vector in (8, 1):
        tables = (PRODUCT_TILES, JOINED_TILES, GRADIENT_TILES)
        tile, of_dx, of_gradient = (_tile(table, "tf32", vector, 128, capability) for table in tables)
        yield product("3x3", tile, "tf32", "fp32", statistics=True, vector=vector)
        yield product("3x3", of_dx, "tf32", "fp32", dx=True, vector=vector, **of_norm)
        yield gradient("3x3", of_gradient, "tf32", "fp32", vector=vector)


_ANY = ", any channels"
_ANY_WIDTH = ", any width"
_COUNTS_OF_PRODUCT = {"k_active_ptr": "*i32", "n_active_ptr": "*i32"}
_COUNTS_OF_DW = {"out_active_ptr": "*i32", "in_active_ptr": "*i32"}


def _tiled(
    capability: int,
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    tile: Tile,
    dtype: str,
    narrow: int | None,
) -> Binary:
    settings = _settings(tile, DTYPES[dtype], SHARED_MEMORY[capability])
    warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
    exact = constants["PRECISION"] == "ieee"
    any_channels = constants["VECTOR"] == 1
    name = f"{name} {dtype}{' exact' * exact} {tile.m}x{tile.n}x{tile.k}{', flat' * constants['FLAT']}"
    return Binary(
        name + _ANY * any_channels,
        kernel,
        pointers,
        {**constants, **settings},
        warps=warps,
        stages=stages,
        matrix=not exact,
        narrow=None if any_channels else narrow,
    )


def _product_binary(
    capability: int,
    geometry: str,
    tile: Tile,
    precision: str,
    dtype: str,
    *,
    dx: bool = False,
    flat: bool = False,
    vector: int = 8,
    bias: bool = False,
    statistics: bool = False,
    added: bool = False,
    norm: str | None = None,
    activation: str | None = None,
    any_width: bool = False,
) -> Binary:
    """norm: "x" or "y", if dX gives the sums for a norm and masks by its x or its y. any_width: it reads the numbers of
    active channels from memory."""
    statistics = statistics or norm is not None
    constants = _product_constants(
        _GEOMETRIES[geometry],
        gradient=dx,
        flat=flat,
        vector=vector,
        bias=bias,
        statistics=statistics,
        activation=activation,
        precision=precision,
    )
    tensors = ("a_ptr", "w_ptr", "y_ptr", "bias_ptr", "partials_ptr", "added_ptr", "norm_x_ptr", "norm_y_ptr")
    vectors = ("norm_weight_ptr", "norm_bias_ptr", "mean_ptr", "rstd_ptr")
    pointers = {**dict.fromkeys(tensors, f"*{dtype}"), **dict.fromkeys(vectors, "*fp32"), **_COUNTS_OF_PRODUCT}
    if statistics:
        pointers["partials_ptr"] = "*fp32"
    unused = {"x": ["norm_y_ptr"], "y": ["norm_bias_ptr"], None: ["norm_x_ptr", "norm_y_ptr", *vectors]}[norm]
    constants |= dict.fromkeys(unused if added else [*unused, "added_ptr"])
    constants |= {"VIEWS": 2} if any_width else {"VIEWS": 1, **dict.fromkeys(_COUNTS_OF_PRODUCT)}
    of_norm = "" if norm is None else f" +sums by {norm}{'' if activation is None else f', {activation}'}"
    name = f"{'dX' if dx else 'forward'} {geometry}{' +bias' * bias}{' +statistics' * (statistics and not dx)}"
    name += f"{' +added' * added}{of_norm}{_ANY_WIDTH * any_width}"
    # Bias and statistics: one element of a channel by each thread. TF32 needs both factors with k innermost, which the
    # weight of dX has not, and is transposed on its way, element by element.
    narrow = None if dx and precision == "tf32" else 16 if bias or statistics else 4 * any_width
    return _tiled(capability, name, product_kernel, pointers, constants, tile, dtype, narrow)


def _gradient_binary(
    capability: int,
    geometry: str,
    tile: Tile,
    precision: str,
    dtype: str,
    *,
    flat: bool = False,
    vector: int = 8,
    add: bool = False,
    any_width: bool = False,
) -> Binary:
    constants = _gradient_constants(_GEOMETRIES[geometry], add=add, flat=flat, vector=vector, precision=precision)
    constants |= {"WIDTHS": 2} if any_width else {"WIDTHS": 1, **dict.fromkeys(_COUNTS_OF_DW)}
    pointers = {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "dw_ptr": "*fp32", **_COUNTS_OF_DW}
    name = f"dW {geometry}{', added' * add}{_ANY_WIDTH * any_width}"
    narrow = None if precision == "tf32" else 4 * any_width  # see _product_binary; here it is both factors
    return _tiled(capability, name, weight_gradient_kernel, pointers, constants, tile, dtype, narrow)


def _added_binary(dtype: str, vector: int, innermost: bool, tile: dict[str, int], any_width: bool) -> Binary:
    of_width = {"WIDTHS": 2} if any_width else {"WIDTHS": 1, **dict.fromkeys(_COUNTS_OF_DW)}
    many = tile is MANY_ADDED
    name = f"dW, {'many ' * many}pieces added {dtype}{_ANY if vector == 1 else ''}"
    return Binary(
        f"{name}{'' if innermost else ', any layout'}{_ANY_WIDTH * any_width}",
        add_pieces_kernel,
        {"pieces_ptr": "*fp32", "dw_ptr": f"*{dtype}", **_COUNTS_OF_DW},
        {**of_width, "INNERMOST": innermost, "VECTOR": vector, **tile},
        warps=4,
        stages=3,
        matrix=False,
        narrow=2 * many + 4 * any_width if vector > 1 else None,  # many pieces leave a thread two results
    )
