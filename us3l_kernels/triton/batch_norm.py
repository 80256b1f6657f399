"""Batch norm in Triton, with residual, activation and statistics per view; forward and backward.

x is read as rows of channels (channels_last, or a prefix slice of it), the rows of a view being contiguous. Programs
take a block of channels and a chunk of rows. Whatever is summed over rows is summed in two stages, in an order that
depends on the shapes alone: chunks into a workspace, then the chunks, of each channel.

Bytes per element of x, which is what bounds the time (2 a value in half precision):

- training, forward: x twice, y once: 6; with a residual 8. Evaluation, and behind a convolution that has given the
  moments of x: 4; with a residual 6.
- backward: grad and x twice, dX once: 10. With a residual grad, x and y once, dResidual (grad where the activation
  passes it) once written and once read, x again, dX: 14.

All arithmetic is in float32. Variances are Welford's over the rows of a lane, Chan's over lanes and chunks, so that
they survive a mean much larger than the deviation. The mask of an activation is computed from x if nothing was
added to it, rounded as the forward rounded, and else from y.

Sources: Ioffe and Szegedy, 2015; Welford, 1962; Chan, Golub and LeVeque, 1979.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from us3l_kernels.triton import DTYPES, Active, Binary, Norm, ceil_div
from us3l_kernels.triton.reductions import (
    CHUNKS,
    WARPS,
    Moments,
    active_channels,
    add_sums,
    by_width,
    in_chunks,
    load_partials,
    load_vector,
    partial_sums,
    passed,
)
from us3l_kernels.triton.rows import as_rows, in_units, new_rows

# ---------------------------------------------------------------------------------------------- kernels


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """NaN stays NaN, as in torch: it is less than nothing."""
    if ACTIVATION is not None:
        y = tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == "relu6":
        y = tl.where(y > 6.0, 6.0, y)
    return y


@triton.jit
def _place(
    rows, rows_per_chunk, channels, active_ptr, VIEWS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The part of this program: (channels, how many of all are active, view, chunk, its first row, its rows)."""
    blocks = tl.cdiv(channels, BLOCK_C)  # fastest: neighbours read the same rows
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    view = tl.program_id(1)
    first = chunk.to(tl.int64) * rows_per_chunk
    count = tl.minimum(rows - first, rows_per_chunk).to(tl.int32)
    active = active_channels(channels, active_ptr, view // VIEWS, VECTOR)
    if active_ptr is not None:
        # None of the channels are active: of one row nothing is read.
        count = tl.where(tl.program_id(0) % blocks * BLOCK_C < active, count, 1)
    return c, active, view, chunk, view * rows.to(tl.int64) + first, count


@triton.jit(do_not_specialize=["rows", "rows_per_chunk", "chunks", "c_units", "x_stride"])
def moments_kernel(
    x_ptr,
    partials_ptr,  # [views, chunks, 2, channels]: mean and sum of squared deviations
    rows,  # of a view
    rows_per_chunk,
    chunks,
    c_units,  # channels in units of VECTOR, as is the stride
    x_stride,
    active_ptr,
    VIEWS: tl.constexpr,  # of a width
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    c, active, view, chunk, first, count = _place(
        rows, rows_per_chunk, channels, active_ptr, VIEWS, VECTOR, BLOCK_C
    )
    c_ok = c < active
    lane = tl.arange(0, BLOCK_ROWS)
    stride = x_stride.to(tl.int64) * VECTOR
    x_ptr += first * stride
    offsets = lane[:, None] * stride + c[None, :]
    mean = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for i in range(0, count, BLOCK_ROWS):
        ok = (lane < count - i)[:, None] & c_ok[None, :]
        x = tl.load(x_ptr + i * stride + offsets, mask=ok, other=0.0).to(tl.float32)
        delta = tl.where(ok, x - mean, 0.0)
        mean += delta * (1.0 / (i // BLOCK_ROWS + 1))
        m2 += delta * (x - mean)
    terms = tl.maximum(tl.cdiv(count - lane, BLOCK_ROWS), 0).to(tl.float32)[:, None]  # of a lane
    of_chunk = tl.sum(terms * mean, 0) / count
    deviation = mean - of_chunk[None, :]
    partials_ptr += (view * chunks + chunk).to(tl.int64) * 2 * channels
    tl.store(partials_ptr + c, of_chunk, mask=c_ok)
    tl.store(partials_ptr + channels + c, tl.sum(m2 + terms * deviation * deviation, 0), mask=c_ok)


@triton.jit(do_not_specialize=["rows", "rows_per_chunk", "chunks", "views", "channels", "momentum", "eps"])
def statistics_kernel(
    partials_ptr,  # [views, chunks, 2, channels]: mean and sum of squared deviations
    mean_ptr,  # [views, channels]
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    rows,
    rows_per_chunk,
    chunks,
    views,
    channels,
    momentum,
    eps,
    active_ptr,
    VIEWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    running_mean = load_vector(running_mean_ptr, c, channels, 0.0)
    running_var = load_vector(running_var_ptr, c, channels, 0.0)
    for view in range(tl.program_id(1), views, tl.num_programs(1)):
        active = active_channels(channels, active_ptr, view // VIEWS, 1)
        lanes = tl.zeros((BLOCK_CHUNKS, 1), tl.float32)  # rows, mean and squared deviations so far, of every lane
        means = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
        m2 = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
        for i in range(0, chunks, BLOCK_CHUNKS):
            of_chunk, m2_of_chunk, _ = load_partials(partials_ptr, view, i, chunks, c, channels, active, BLOCK_CHUNKS)
            first = (i + tl.arange(0, BLOCK_CHUNKS)).to(tl.int64) * rows_per_chunk
            count = tl.maximum(tl.minimum(rows - first, rows_per_chunk), 0).to(tl.float32)[:, None]
            share = count / tl.maximum(lanes + count, 1.0)
            deviation = of_chunk - means  # of no rows: nothing is added
            means += deviation * share
            m2 += m2_of_chunk + deviation * deviation * (lanes * share)
            lanes += count
        mean = tl.sum(means * (lanes / rows), 0)
        deviation = means - mean[None, :]
        var = tl.sum(m2 / rows + deviation * deviation * (lanes / rows), 0)
        tl.store(mean_ptr + view * channels + c, mean, mask=c < active)
        tl.store(rstd_ptr + view * channels + c, 1.0 / tl.sqrt(var + eps), mask=c < active)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var * (rows / (rows - 1.0)) - running_var)
    if running_mean_ptr is not None:
        tl.store(running_mean_ptr + c, running_mean.to(running_mean_ptr.dtype.element_ty), mask=c_ok)
        tl.store(running_var_ptr + c, running_var.to(running_var_ptr.dtype.element_ty), mask=c_ok)


@triton.jit(do_not_specialize=["rows", "rows_per_chunk", "c_units", "x_stride", "residual_stride", "y_stride", "eps"])
def normalise_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,  # [views, channels]
    rstd_ptr,
    running_mean_ptr,  # given in evaluation, where mean and rstd are made of them
    running_var_ptr,
    rows,
    rows_per_chunk,
    c_units,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    active_ptr,
    ACTIVATION: tl.constexpr,
    VIEWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    c, active, view, chunk, first, count = _place(
        rows, rows_per_chunk, channels, active_ptr, VIEWS, VECTOR, BLOCK_C
    )
    c_ok = c < active
    if running_mean_ptr is not None:
        mean = load_vector(running_mean_ptr, c, active, 0.0)
        rstd = 1.0 / tl.sqrt(load_vector(running_var_ptr, c, active, 0.0) + eps)
        if chunk == 0:
            tl.store(mean_ptr + c, mean, mask=c_ok)
            tl.store(rstd_ptr + c, rstd, mask=c_ok)
    else:
        mean = tl.load(mean_ptr + view * channels + c, mask=c_ok, other=0.0)
        rstd = tl.load(rstd_ptr + view * channels + c, mask=c_ok, other=0.0)
    scale = (rstd * load_vector(weight_ptr, c, active, 1.0))[None, :]
    bias = load_vector(bias_ptr, c, active, 0.0)[None, :]
    lane = tl.arange(0, BLOCK_ROWS)
    for i in range(0, count, BLOCK_ROWS):
        ok = (lane < count - i)[:, None] & c_ok[None, :]
        row = (first + i + lane)[:, None]
        x = tl.load(x_ptr + row * (x_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale + bias
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row * (residual_stride * VECTOR) + c[None, :], mask=ok, other=0.0)
            y += residual.to(tl.float32)
        y = _activate(y, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * (y_stride * VECTOR) + c[None, :], y, mask=ok)


@triton.jit(
    do_not_specialize=[
        "rows",
        "rows_per_chunk",
        "chunks",
        "c_units",
        "grad_stride",
        "x_stride",
        "y_stride",
        "dresidual_stride",
    ]
)
def sums_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,  # given if the mask is to come from it
    dresidual_ptr,  # grad where the activation passes it, if asked for
    weight_ptr,
    bias_ptr,
    mean_ptr,  # [views, channels]
    rstd_ptr,
    partials_ptr,  # [views, chunks, 2, channels]: sums of g and of g * normalised x
    rows,
    rows_per_chunk,
    chunks,
    c_units,
    grad_stride,
    x_stride,
    y_stride,
    dresidual_stride,
    active_ptr,
    ACTIVATION: tl.constexpr,
    VIEWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    c, active, view, chunk, first, count = _place(
        rows, rows_per_chunk, channels, active_ptr, VIEWS, VECTOR, BLOCK_C
    )
    c_ok = c < active
    mean = tl.load(mean_ptr + view * channels + c, mask=c_ok, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + view * channels + c, mask=c_ok, other=0.0)
    scale = (rstd * load_vector(weight_ptr, c, active, 1.0))[None, :]
    bias = load_vector(bias_ptr, c, active, 0.0)[None, :]
    lane = tl.arange(0, BLOCK_ROWS)
    sum_g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for i in range(0, count, BLOCK_ROWS):
        ok = (lane < count - i)[:, None] & c_ok[None, :]
        row = (first + i + lane)[:, None]
        g = tl.load(grad_ptr + row * (grad_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * (x_stride * VECTOR) + c[None, :], mask=ok, other=0.0)
        centred = x.to(tl.float32) - mean
        y_offsets = row * (y_stride * VECTOR) + c[None, :]
        g = passed(g, x, centred, scale, bias, y_ptr, y_offsets, ok, ACTIVATION)
        if dresidual_ptr is not None:
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + row * (dresidual_stride * VECTOR) + c[None, :], dresidual, mask=ok)
        sum_g += g
        sum_gx += g * centred  # where g is masked it is 0
    partials_ptr += (view * chunks + chunk).to(tl.int64) * 2 * channels
    tl.store(partials_ptr + c, tl.sum(sum_g, 0), mask=c_ok)
    tl.store(partials_ptr + channels + c, tl.sum(sum_gx, 0) * rstd, mask=c_ok)


@triton.jit(
    do_not_specialize=[
        "rows",
        "rows_per_chunk",
        "c_units",
        "grad_stride",
        "x_stride",
        "y_stride",
        "dresidual_stride",
        "dx_stride",
    ]
)
def dx_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,  # given if the mask is to come from it
    dresidual_ptr,  # grad where the activation passes it, if asked for
    dx_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,  # [views, channels]
    rstd_ptr,
    means_ptr,  # [views, 2, channels]: of g and of g * normalised x; not given in evaluation
    rows,
    rows_per_chunk,
    c_units,
    grad_stride,
    x_stride,
    y_stride,
    dresidual_stride,
    dx_stride,
    active_ptr,
    ACTIVATION: tl.constexpr,
    VIEWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    c, active, view, chunk, first, count = _place(
        rows, rows_per_chunk, channels, active_ptr, VIEWS, VECTOR, BLOCK_C
    )
    c_ok = c < active
    mean = tl.load(mean_ptr + view * channels + c, mask=c_ok, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + view * channels + c, mask=c_ok, other=0.0)[None, :]
    scale = rstd * load_vector(weight_ptr, c, active, 1.0)[None, :]
    bias = load_vector(bias_ptr, c, active, 0.0)[None, :]
    if means_ptr is not None:
        mean_g = tl.load(means_ptr + view * 2 * channels + c, mask=c_ok, other=0.0)[None, :]
        mean_gx = tl.load(means_ptr + (view * 2 + 1) * channels + c, mask=c_ok, other=0.0)[None, :] * rstd
    lane = tl.arange(0, BLOCK_ROWS)
    for i in range(0, count, BLOCK_ROWS):
        ok = (lane < count - i)[:, None] & c_ok[None, :]
        row = (first + i + lane)[:, None]
        g = tl.load(grad_ptr + row * (grad_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * (x_stride * VECTOR) + c[None, :], mask=ok, other=0.0)
        centred = x.to(tl.float32) - mean
        y_offsets = row * (y_stride * VECTOR) + c[None, :]
        g = passed(g, x, centred, scale, bias, y_ptr, y_offsets, ok, ACTIVATION)
        if dresidual_ptr is not None:
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + row * (dresidual_stride * VECTOR) + c[None, :], dresidual, mask=ok)
        if means_ptr is not None:
            g -= mean_g + centred * mean_gx
        tl.store(dx_ptr + row * (dx_stride * VECTOR) + c[None, :], (g * scale).to(dx_ptr.dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------------------------- launches

BLOCKS_C = (16, 32, 64)
"""Channels of a program: one that wastes the least, the largest of these."""

def _elements(vector: int, itemsize: int) -> int:
    """Of a tile that a program holds in registers: fewer one at a time, which takes more addresses, and of float32."""
    return (4096 if itemsize == 2 else 2048) if vector > 1 else 1024


MOST_REGISTERS = 128
"""Of a thread, for the smaller tiles. The compiler is told, or else it spills some to have less than it needs."""


TILES_A_PROGRAM = 4
"""A program that reduces nothing takes this many tiles, so that reading its parameters does not count."""

STATISTICS = {"BLOCK_CHUNKS": 512, "BLOCK_C": 8}
"""The tile of the second stage of the statistics: many chunks at a time, for a convolution gives one for each tile."""


def _block_c(channels: int) -> int:
    return min(BLOCKS_C, key=lambda block: (ceil_div(channels, block) * block, -block))


def _tile(block_c: int, vector: int, itemsize: int) -> dict[str, int]:
    """What a launch is given of it."""
    elements = _elements(vector, itemsize)
    bound = {"maxnreg": MOST_REGISTERS} if elements < 4096 else {}
    return {"VECTOR": vector, "BLOCK_ROWS": elements // block_c, "BLOCK_C": block_c, "num_warps": WARPS, **bound}


def _reduction(rows: int, views: int, channels: int, vector: int, itemsize: int) -> tuple[dict[str, int], int, int]:
    """(the tile, rows of a chunk, chunks of a view) where sums over rows are taken."""
    tile = _tile(_block_c(channels), vector, itemsize)
    most = max(1, CHUNKS // (ceil_div(channels, tile["BLOCK_C"]) * views))
    return tile, *in_chunks(rows, tile["BLOCK_ROWS"], most)


def _elementwise(
    rows: int, views: int, channels: int, vector: int, itemsize: int
) -> tuple[dict[str, int], int, tuple[int, int]]:
    """(the tile, rows of a chunk, the grid) where no sums are taken."""
    tile = _tile(_block_c(channels), vector, itemsize)
    per_chunk = tile["BLOCK_ROWS"] * TILES_A_PROGRAM
    return tile, per_chunk, (max(1, ceil_div(rows, per_chunk)) * ceil_div(channels, tile["BLOCK_C"]), views)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    views: int,
    activation: str | None,
    moments: Moments | None = None,
    active: Active | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.batch_norm`, for x that is rows of channels; in training with its `moments`, if they are known.

    active: of x, if they are read from the device; in training alone, without running statistics.
    """
    channels = x.size(1)
    rows = x.numel() // (channels * views)
    y = new_rows(x)
    residual = None if residual is None else as_rows(residual)
    vector, units, (x_stride, residual_stride, y_stride) = in_units(channels, (x, residual, y), active=active)
    of_width = by_width(views, active)
    mean = x.new_empty(views, channels, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if training:
        if moments is None:
            tile, per_chunk, chunks = _reduction(rows, views, channels, vector, x.element_size())
            moments = Moments(partial_sums(chunks, channels, x, views), per_chunk)
            moments_kernel[(chunks * ceil_div(channels, tile["BLOCK_C"]), views)](
                x,
                moments.partials,
                rows,
                per_chunk,
                chunks,
                units,
                x_stride,
                **of_width,
                **tile,
            )
        one_by_one = running_mean is not None  # which every view changes
        statistics_kernel[(ceil_div(channels, STATISTICS["BLOCK_C"]), 1 if one_by_one else views)](
            moments.partials,
            mean,
            rstd,
            running_mean,
            running_var,
            rows,
            moments.rows,
            moments.partials.size(1),
            views,
            channels,
            momentum,
            eps,
            **of_width,
            **STATISTICS,
            num_warps=WARPS,
        )
        running_mean = running_var = None
    tile, per_chunk, grid = _elementwise(rows, views, channels, vector, x.element_size())
    normalise_kernel[grid](
        x,
        residual,
        y,
        weight,
        bias,
        mean,
        rstd,
        running_mean,
        running_var,
        rows,
        per_chunk,
        units,
        x_stride,
        residual_stride,
        y_stride,
        eps,
        ACTIVATION=activation,
        **of_width,
        **tile,
    )
    return y, mean, rstd


def backward(
    grad: Tensor,
    norm: Norm,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    need_grad_x: bool,
    need_grad_residual: bool,
    training: bool,
    sums: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `Backend.batch_norm_backward`, for x that is rows of channels; grad and y may have any strides.

    sums: float32 [views, chunks, 2, channels], of g and of g * normalised x, where g is grad as the activation passes
    it, if they are known (`conv2d.input_gradient`); only with need_grad_x.
    """
    x, y, weight, bias, mean, rstd, activation, active = norm
    views, channels = mean.shape
    rows = x.numel() // (channels * views)
    of_width = by_width(views, active)
    grad = as_rows(grad)
    y = None if y is None or activation is None else as_rows(y)
    dresidual = unwritten = new_rows(x) if need_grad_residual else None
    means = x.new_empty(views, 2, channels, dtype=torch.float32) if training and need_grad_x else None
    if sums is None and (
        means is not None or grad_weight is not None or grad_bias is not None or dresidual is not None
    ):
        vector, units, strides = in_units(channels, (grad, x, y, dresidual), active=active)
        tile, per_chunk, chunks = _reduction(rows, views, channels, vector, x.element_size())
        sums = partial_sums(chunks, channels, x, views)
        sums_kernel[(chunks * ceil_div(channels, tile["BLOCK_C"]), views)](
            grad,
            x,
            y,
            dresidual,
            weight,
            bias,
            mean,
            rstd,
            sums,
            rows,
            per_chunk,
            chunks,
            units,
            *strides,
            ACTIVATION=activation,
            **of_width,
            **tile,
        )
        if dresidual is not None:  # already masked
            grad, y, unwritten, activation = dresidual, None, None, None
    if sums is not None:
        add_sums(sums, rows, grad_weight, grad_bias, means, active)
    if not need_grad_x:
        return None, dresidual
    dx = new_rows(x)
    vector, units, strides = in_units(channels, (grad, x, y, unwritten, dx), active=active)
    tile, per_chunk, grid = _elementwise(rows, views, channels, vector, x.element_size())
    dx_kernel[grid](
        grad,
        x,
        y,
        unwritten,
        dx,
        weight,
        bias,
        mean,
        rstd,
        means,
        rows,
        per_chunk,
        units,
        *strides,
        ACTIVATION=activation,
        **of_width,
        **tile,
    )
    return dx, dresidual


# ---------------------------------------------------------------------------------------------- shipped binaries


def binaries(capability: int) -> Iterator[Binary]:
    """What the launches above ask for: of one tile every kind, of the others the largest."""
    for activation in (None, "relu"):
        yield from _binaries(64, "bf16", 8, activation, residual=False)
    for block_c in BLOCKS_C:
        yield from _binaries(block_c, "bf16", 8, "relu6", residual=True)
    for dtype in ("fp16", "fp32"):
        yield from _binaries(64, dtype, 8, "relu6", residual=True)
    yield from _binaries(64, "bf16", 1, "relu6", residual=True)
    for residual in (False, True):
        yield from _binaries(64, "bf16", 8, "relu", residual=residual, any_width=True)
    scalars = {"momentum": "fp32", "eps": "fp32", "active_ptr": "*i32"}
    for any_width in (False, True):
        yield Binary(
            f"batch norm statistics{', any width' * any_width}",
            statistics_kernel,
            {**dict.fromkeys(("partials_ptr", *_VECTORS), "*fp32"), **scalars},
            {**STATISTICS, **({"VIEWS": 2} if any_width else by_width(1, None))},
            warps=WARPS,
            stages=3,
            matrix=False,
            narrow=None,
        )


_VECTORS = ("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr", "means_ptr", "running_mean_ptr", "running_var_ptr")


def _binaries(
    block_c: int, dtype: str, vector: int, activation: str | None, residual: bool, any_width: bool = False
) -> Iterator[Binary]:
    """The kernels of a training step, and of evaluation, which does not read the numbers of active channels."""
    tensors = ("x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "dresidual_ptr", "dx_ptr")
    vectors = dict.fromkeys(("partials_ptr", *_VECTORS), "*fp32")
    types = {**dict.fromkeys(tensors, f"*{dtype}"), **vectors, "eps": "fp32", "active_ptr": "*i32"}
    tile = _tile(block_c, vector, DTYPES[dtype])
    kind = f"{dtype} {tile['BLOCK_ROWS']}x{block_c}{'' if vector > 1 else ', any channels'}{', any width' * any_width}"
    of_width = {"VIEWS": 2} if any_width else by_width(1, None)
    settings: dict[str, Any] = {"warps": tile.pop("num_warps"), "stages": 3, "registers": tile.pop("maxnreg", None)}
    settings |= {"matrix": False, "narrow": 4 if vector > 1 else None}
    fused = f" +{activation}" * (activation is not None) + " +residual" * residual
    running: dict[str, Any] = {"running_mean_ptr": None, "running_var_ptr": None}
    added: dict[str, Any] = {} if residual else {"residual_ptr": None}
    unread: dict[str, Any] = {"y_ptr": None, "dresidual_ptr": None}
    masking: dict[str, Any] = {"bias_ptr": None} if residual else unread
    behind_sums = {"ACTIVATION": None if residual else activation, **unread}  # dResidual is masked
    evaluation = (f"normalise{fused}, evaluation", normalise_kernel, {"ACTIVATION": activation, **added})
    for name, kernel, constants in (
        ("moments", moments_kernel, {}),
        (f"normalise{fused}", normalise_kernel, {"ACTIVATION": activation, **added, **running}),
        *([] if any_width else [evaluation]),
        (f"sums{fused}", sums_kernel, {"ACTIVATION": activation, **masking}),
        (f"dX{fused}", dx_kernel, behind_sums),
        *([(f"dX{fused}, sums known", dx_kernel, {"ACTIVATION": activation, **masking})] if residual else []),
    ):
        yield Binary(f"batch norm {name} {kind}", kernel, types, {**tile, **of_width, **constants}, **settings)
