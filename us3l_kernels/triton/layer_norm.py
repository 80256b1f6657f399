"""Layer norm in Triton, forward and backward.

x is read as rows of channels at any distance. A program holds whole rows in registers, so a row has at most
8192 channels. Every tensor is touched once: 4 bytes an element of x forward and 6 backward, in half precision.

The gradients of the parameters are summed in two stages, in an order that depends on the shapes alone: each program of
the backward over its rows into a workspace, then the programs, of each channel. All arithmetic is in float32.

Source: Ba, Kiros and Hinton, 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from us3l_kernels.triton import Binary, ceil_div
from us3l_kernels.triton.reductions import CHUNKS, add_sums, in_chunks, load_vector, partial_sums
from us3l_kernels.triton.rows import as_rows, in_units, new_rows

# ---------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows", "c_units", "x_stride", "y_stride", "eps"])
def layer_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,  # [rows]
    rstd_ptr,
    rows,
    c_units,  # channels in units of VECTOR, as are the strides
    x_stride,
    y_stride,
    eps,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    c = tl.arange(0, BLOCK_C)
    c_ok = c < channels
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = row < rows
    ok = row_ok[:, None] & c_ok[None, :]
    x = tl.load(x_ptr + row[:, None] * (x_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / channels
    centred = tl.where(ok, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, c, channels, 1.0)[None, :]
    if bias_ptr is not None:
        y += load_vector(bias_ptr, c, channels, 0.0)[None, :]
    tl.store(y_ptr + row[:, None] * (y_stride * VECTOR) + c[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(mean_ptr + row, mean, mask=row_ok)
    tl.store(rstd_ptr + row, rstd, mask=row_ok)


@triton.jit(do_not_specialize=["rows", "rows_per_chunk", "c_units", "grad_stride", "x_stride", "dx_stride"])
def layer_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,  # None: not asked for
    weight_ptr,
    mean_ptr,  # [rows]
    rstd_ptr,
    partials_ptr,  # [chunks, 2, channels]: sums of grad and of grad * normalised x; None: not asked for
    rows,
    rows_per_chunk,
    c_units,
    grad_stride,
    x_stride,
    dx_stride,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_units * VECTOR
    c = tl.arange(0, BLOCK_C)
    c_ok = c < channels
    first = tl.program_id(0).to(tl.int64) * rows_per_chunk
    count = tl.minimum(rows - first, rows_per_chunk).to(tl.int32)
    lane = tl.arange(0, BLOCK_ROWS)
    if partials_ptr is not None:
        sum_g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
        sum_gx = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    weight = load_vector(weight_ptr, c, channels, 1.0)[None, :]
    for i in range(0, count, BLOCK_ROWS):
        row_ok = lane < count - i
        ok = row_ok[:, None] & c_ok[None, :]
        row = first + i + lane
        g = tl.load(grad_ptr + row[:, None] * (grad_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * (x_stride * VECTOR) + c[None, :], mask=ok, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row_ok, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_ok, other=0.0)
        normalised = tl.where(ok, (x - mean[:, None]) * rstd[:, None], 0.0)
        if partials_ptr is not None:
            sum_g += g
            sum_gx += g * normalised
        if dx_ptr is not None:
            g *= weight
            mean_g = tl.sum(g, 1) / channels
            mean_gx = tl.sum(g * normalised, 1) / channels
            dx = (g - mean_g[:, None] - normalised * mean_gx[:, None]) * rstd[:, None]
            dx_rows = dx_ptr + row[:, None] * (dx_stride * VECTOR)
            tl.store(dx_rows + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=ok)
    if partials_ptr is not None:
        partials_ptr += tl.program_id(0).to(tl.int64) * 2 * channels
        tl.store(partials_ptr + c, tl.sum(sum_g, 0), mask=c_ok)
        tl.store(partials_ptr + channels + c, tl.sum(sum_gx, 0), mask=c_ok)


# ---------------------------------------------------------------------------------------------- launches

ELEMENTS = 4096
"""Of a tile that a program holds in registers, unless a row has more."""


def _tile(channels: int) -> dict[str, int]:
    """The shape of a program's tile: whole rows."""
    block_c = max(16, triton.next_power_of_2(channels))
    return {"BLOCK_ROWS": max(1, ELEMENTS // block_c), "BLOCK_C": block_c}


def _warps(tile: dict[str, int], values: int) -> int:
    """The warps of a program whose threads hold that many values of each tensor."""
    return tile["BLOCK_ROWS"] * tile["BLOCK_C"] // (32 * values)


FORWARD_VALUES, BACKWARD_VALUES = 32, 16
"""Of each tensor in a thread's registers. The backward has two tensors and two sums."""


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.layer_norm`, for x that is rows of channels."""
    channels = x.size(-1)
    rows = x.numel() // channels
    y = new_rows(x, -1)
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return y, mean, rstd
    vector, units, strides = in_units(channels, (x, y), -1)
    tile = _tile(channels)
    layer_norm_kernel[(ceil_div(rows, tile["BLOCK_ROWS"]),)](
        x,
        y,
        weight,
        bias,
        mean,
        rstd,
        rows,
        units,
        *strides,
        eps,
        VECTOR=vector,
        **tile,
        num_warps=_warps(tile, FORWARD_VALUES),
    )
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    need_grad_x: bool,
) -> Tensor | None:
    """As `Backend.layer_norm_backward`, for x that is rows of channels; grad may have any strides."""
    channels = x.size(-1)
    rows = x.numel() // channels
    dx = new_rows(x, -1) if need_grad_x else None
    if rows == 0:
        return dx
    grad = as_rows(grad, -1)
    vector, units, strides = in_units(channels, (grad, x, dx), -1)
    tile = _tile(channels)
    per_chunk, chunks = in_chunks(rows, tile["BLOCK_ROWS"], CHUNKS)
    sums = grad_weight is not None or grad_bias is not None
    partials = partial_sums(chunks, channels, x) if sums else None
    layer_norm_backward_kernel[(chunks,)](
        grad,
        x,
        dx,
        weight,
        mean,
        rstd,
        partials,
        rows,
        per_chunk,
        units,
        *strides,
        VECTOR=vector,
        **tile,
        num_warps=_warps(tile, BACKWARD_VALUES),
    )
    if partials is not None:
        add_sums(partials, rows, grad_weight, grad_bias)
    return dx


# ---------------------------------------------------------------------------------------------- shipped binaries


def binaries(capability: int) -> Iterator[Binary]:
    """What the launches above ask for: rows of most sizes in bfloat16, and of one size what else there is."""
    for channels in (64, 256, 512, 1024, 4096, 8192):
        yield from _binaries(channels, "bf16", 8)
    for channels in (512, 8192):
        yield from _binaries(channels, "fp32", 8)
    yield from _binaries(512, "bf16", 1)


def _binaries(channels: int, dtype: str, vector: int) -> Iterator[Binary]:
    tile = _tile(channels)
    vectors = dict.fromkeys(("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr", "partials_ptr"), "*fp32")
    types = {**vectors, **dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "dx_ptr"), f"*{dtype}"), "eps": "fp32"}
    kind = f"{dtype} {tile['BLOCK_ROWS']}x{tile['BLOCK_C']}{'' if vector > 1 else ', any channels'}"
    settings: dict[str, Any] = {"stages": 3, "matrix": False, "narrow": NARROW if vector > 1 else None}
    for name, kernel, values in (
        ("layer norm", layer_norm_kernel, FORWARD_VALUES),
        ("layer norm backward", layer_norm_backward_kernel, BACKWARD_VALUES),
    ):
        yield Binary(
            f"{name} {kind}", kernel, types, {**tile, "VECTOR": vector}, warps=_warps(tile, values), **settings
        )


NARROW = 12
"""Loads and stores of a mean, of a deviation, and of what a thread has of the parameters and of their sums."""
