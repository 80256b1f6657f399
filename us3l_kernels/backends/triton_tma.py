"""Backend `triton_tma`: the products of backend `triton` with tiles moved by the tensor memory accelerator.

Only 1x1 convolutions with stride 1 and linear layers, in half precision; dW is made as there. It runs where it is asked
for by name or was measured to be faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from us3l_kernels import triton
from us3l_kernels.backends.triton import TritonBackend
from us3l_kernels.triton import Sizes

POINT = {"stride": [1, 1], "padding": [0, 0]}


class TritonTmaBackend(TritonBackend):
    name = "triton_tma"
    ops = ("conv2d", "linear")

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        assert weight is not None
        reason = super().why_not(op, x, weight, **arguments)
        if reason is None and triton.gpu_of(x).capability < 90:
            reason = "it takes GPUs of compute capability 9.0 and later"
        return reason or _why_not(op, x, weight, **arguments)

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        return "it was not measured beside backend 'triton'"

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        outputs: int,
        geometry: Any,
        precision: str,
        sizes: Sizes | None,
    ) -> Tensor:
        from us3l_kernels.triton import tma

        assert sizes is None  # descriptors have their sizes from the host
        return tma.conv2d(x, weight, bias, outputs)

    def _input_gradient(
        self, grad: Tensor, weight: Tensor, dx: Tensor, geometry: Any, precision: str, sizes: Sizes | None
    ) -> None:
        from us3l_kernels.triton import tma

        assert sizes is None
        tma.input_gradient(grad, weight, dx)


def _why_not(op: str, x: Tensor, weight: Tensor, **arguments: Any) -> str | None:
    if x.dtype == torch.float32:
        return f"it takes half precision, x is {x.dtype}"
    if op == "conv2d":
        channels = [x.size(1), arguments["out_channels"]]
        geometry = {name: list(arguments[name]) for name in POINT}
        if tuple(weight.shape[2:]) != (1, 1) or arguments["groups"] > 1 or geometry != POINT:
            return (
                f"it takes 1x1 convolutions with stride 1, no padding and one group, this is {tuple(weight.shape[2:])} "
                f"with {geometry} and {arguments['groups']} groups"
            )
    else:
        channels = [x.size(-1), *(arguments[name] for name in ("out_features", "in_features") if name in arguments)]
    if any(n % 8 for n in channels):
        return f"it takes channels that are multiples of 8, there are {channels}"
    return None
