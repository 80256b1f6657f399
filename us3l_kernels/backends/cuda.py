"""Backend `cuda`: the CUDA C++ kernels of csrc/cuda, for batch norm and depthwise convolution in channels_last.

They are deterministic, allocate through torch, run on the current stream and may be captured in a CUDA graph. All but
the choice is the CPU library's: the operators are the same, and torch calls the kernel of the tensors' device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from us3l_kernels import _native
from us3l_kernels.backends.native import NativeBackend, is_depthwise, why_not_channels_last, why_not_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CudaBackend(NativeBackend):
    name = "cuda"
    ops = ("conv2d", "batch_norm")
    device = "cuda"

    def unavailable(self) -> str | None:
        if _native.load_cuda() is None:
            return f"the compiled CUDA library is not there ({_native.why_cuda})"
        if not torch.cuda.is_available():
            return "no GPU is visible to torch"
        return None

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if x.device.type != self.device:
            return f"its kernels are for {self.device}, x is on {x.device}"
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, x is {x.dtype}"
        if weight is not None and weight.dtype != torch.float32:
            return f"it takes float32 parameters, the weight is {weight.dtype}"
        if op == "batch_norm":
            return why_not_rows(x)
        assert weight is not None
        if not is_depthwise(weight, arguments["groups"]):
            return f"it has the depthwise convolution only, groups are {arguments['groups']}"
        return why_not_channels_last(x)

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        return None
