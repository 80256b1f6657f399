"""1x1 convolutions with stride 1, and linear layers, whose tiles the tensor memory accelerator moves: forward and dX.

A descriptor has the base and the strides of the full tensor and the shape of the slice: what lies past the slice is
read as zeros and never written, without a mask, and no thread computes an address. Every block makes its descriptors
itself, from the arguments of one binary that serves every width, and works on tile after tile: it makes them once.

Half precision, channels that are multiples of 8, compute capability 9.0 or later. dW is conv2d.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from us3l_kernels.triton import SHARED_MEMORY, Binary, ceil_div, gpu_of
from us3l_kernels.triton.conv2d import FEW_ROWS, PRODUCT_TILES, Tile
from us3l_kernels.triton.rows import VECTOR, as_rows, row_stride

# ---------------------------------------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["rows", "k_units", "n_units", "a_stride", "w_stride", "y_stride"])
def tma_product_kernel(
    a_ptr,  # x, or dY
    w_ptr,  # the full weight [outputs, inputs]
    y_ptr,  # y, or dX
    bias_ptr,
    rows,
    k_units,  # channels that are summed over, in units of 8, as are all strides
    n_units,  # channels of the result
    a_stride,
    w_stride,
    y_stride,
    GRADIENT: tl.constexpr,  # dX from dY, else y from x
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k_size = k_units * 8
    n_size = n_units * 8
    a = tl.make_tensor_descriptor(a_ptr, [rows, k_size], [a_stride.to(tl.int64) * 8, 1], [BLOCK_M, BLOCK_K])
    if GRADIENT:  # rows of the weight are summed over
        w = tl.make_tensor_descriptor(w_ptr, [k_size, n_size], [w_stride.to(tl.int64) * 8, 1], [BLOCK_K, BLOCK_N])
    else:
        w = tl.make_tensor_descriptor(w_ptr, [n_size, k_size], [w_stride.to(tl.int64) * 8, 1], [BLOCK_N, BLOCK_K])
    y = tl.make_tensor_descriptor(y_ptr, [rows, n_size], [y_stride.to(tl.int64) * 8, 1], [BLOCK_M, BLOCK_N])
    tiles_n = tl.cdiv(n_size, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * tiles_n
    # Flattened with the loop inside: the loads of the next tile are under way while this one is stored.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, k_size, BLOCK_K):
            if GRADIENT:
                acc = tl.dot(a.load([m, k]), w.load([k, n]), acc)
            else:
                acc = tl.dot(a.load([m, k]), w.load([n, k]).T, acc)
        if BIAS:
            channel = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + channel, mask=channel < n_size, other=0.0).to(tl.float32)[None, :]
        y.store([m, n], acc.to(y_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------- launches


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """[N, c, H, W] -> [N, outputs, H, W], channels_last. weight: [>= outputs, >= c, 1, 1], of x's dtype."""
    shape = (x.size(0), outputs, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _product(x, weight[:outputs, : x.size(1)], bias, y, gradient=False)
    return y


def input_gradient(grad: Tensor, weight: Tensor, dx: Tensor) -> None:
    """Writes dX [N, c, H, W], rows of channels at a multiple of 8, from dY [N, outputs, H, W]."""
    _product(grad, weight[: grad.size(1), : dx.size(1)], None, dx, gradient=True)


def _product(a: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, gradient: bool) -> None:
    if y.numel() == 0:
        return
    a, weight = _described(a), _described(weight)
    k_size, n_size = a.size(1), y.size(1)
    rows = y.numel() // n_size
    gpu = gpu_of(a)
    tile = next(t for t in PRODUCT_TILES["half"] if n_size <= t.channels and gpu.capability >= t.capability)
    if _tiles(tile, rows, n_size) < gpu.multiprocessors:
        tile = FEW_ROWS["half"]

    def launch() -> None:
        triton.set_allocator(lambda size, alignment, stream: a.new_empty(size, dtype=torch.int8))
        tma_product_kernel[(min(gpu.multiprocessors, _tiles(tile, rows, n_size)),)](
            a,
            weight,
            y,
            y if bias is None else bias,
            rows,
            k_size // VECTOR,
            n_size // VECTOR,
            row_stride(a, 1) // VECTOR,
            row_stride(weight, 1) // VECTOR,
            row_stride(y, 1) // VECTOR,
            GRADIENT=gradient,
            BIAS=bias is not None,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            num_warps=tile.warps,
            num_stages=_stages(tile, gpu.shared_memory),
        )

    with torch.cuda.device_of(a):
        copy_context().run(launch)  # the allocator, of the memory of the descriptors, is the caller's again afterwards


def _described(t: Tensor) -> Tensor:
    """t, whose rows are along its dimension 1, where it lies if a descriptor can have it, else a copy."""
    t = as_rows(t)
    stride = row_stride(t, 1)
    if stride % VECTOR or stride < t.size(1) or t.data_ptr() % 16:
        t = t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    return t


def _tiles(tile: Tile, rows: int, channels: int) -> int:
    return ceil_div(rows, tile.m) * ceil_div(channels, tile.n)


def _stages(tile: Tile, shared_memory: int) -> int:
    """As many as fit beside the result, which is stored from shared memory."""
    return tile.stages(2, shared_memory - 2 * tile.m * tile.n)


# ---------------------------------------------------------------------------------------------- shipped binaries


def binaries(capability: int) -> Iterator[Binary]:
    """What the launches above ask for."""
    if capability < 90:
        return
    tiles = [tile for tile in (*PRODUCT_TILES["half"], FEW_ROWS["half"]) if capability >= tile.capability]
    for tile in tiles:
        for dx in (False, True):
            yield _binary(capability, tile, "bf16", dx=dx)
    for dtype in ("bf16", "fp16"):
        yield _binary(capability, tiles[1], dtype, bias=True)


def _binary(capability: int, tile: Tile, dtype: str, *, dx: bool = False, bias: bool = False) -> Binary:
    constants: dict[str, Any] = {"GRADIENT": dx, "BIAS": bias}
    return Binary(
        f"TMA {'dX' if dx else 'forward'} 1x1{' +bias' * bias} {dtype} {tile.m}x{tile.n}x{tile.k}",
        tma_product_kernel,
        {name: f"*{dtype}" for name in ("a_ptr", "w_ptr", "y_ptr", "bias_ptr")},
        {**constants, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
        warps=tile.warps,
        stages=_stages(tile, SHARED_MEMORY[capability]),
        matrix=True,
        narrow=32 if bias else 0,  # one element of the bias by each thread, in both copies of the flattened loop's end
    )
