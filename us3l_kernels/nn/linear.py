"""Linear layers that run with a prefix of their features."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from us3l_kernels import any_width, functional
from us3l_kernels.width import SlicedOutput, active_channels


class SlicedLinear(SlicedOutput, nn.Linear):
    """torch.nn.Linear whose active output features follow the width and whose active input features are x's.

    Parameters, state_dict and initialisation are those of torch.nn.Linear, and at width 1.0 so is the result.

    slice_out: False keeps all output features at every width (a classifier, the end of a projector).
    slice_in: True reads only the prefix of x that a sliced layer of `in_features` would bring, where x brings more.
    divisor, ratio: the rounding of features, see `active_channels`.

    active_out_features: the output features at the width in effect.
    repr shows active/full features; for the input it shows what sliced `in_features` would be at this width.
    """

    active_out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        slice_out: bool = True,
        slice_in: bool = False,
        divisor: int = 8,
        ratio: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.slice_out = slice_out
        self.slice_in = slice_in
        self.divisor = divisor
        self.ratio = ratio
        self.active_out_features = out_features

    def set_active(self, width: float, key: str) -> None:
        super().set_active(width, key)
        vars(self).update(active_out_features=self.channels_at(width))

    def in_features_at(self, width: float) -> int:
        """The input features that a sliced layer of `in_features` brings at `width`."""
        return active_channels(self.in_features, width, divisor=self.divisor)

    def read_features(self, available: int) -> int:
        """How many of the features that x brings are read at the width in effect."""
        return min(available, self.in_features_at(self.active_width)) if self.slice_in else available

    def channels_at(self, width: float) -> int:
        if not self.slice_out:
            return self.out_features
        return active_channels(self.out_features, width, divisor=self.divisor, ratio=self.ratio)

    def plan_key(self) -> Hashable:
        return self.active_out_features, self.slice_in and self.in_features_at(self.active_width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] with C <= in_features -> [..., active_out_features]."""
        self._check(x)
        sizes = any_width.sizes_of(self, x)
        if sizes is not None and x.dim() != 2:  # of others the functions that hand marks on would take dimension 1
            raise ValueError(f"any width: x: {self} expects [N, C], got shape {tuple(x.shape)}")
        return any_width.reading(functional.linear, sizes)(
            x,
            self.weight,
            self.bias,
            out_features=self.active_out_features if sizes is None else self.out_features,
            in_features=self.read_features(x.size(-1)),
        )

    def why_not_any_width(self) -> str | None:
        if type(self).forward is not SlicedLinear.forward:
            return super().why_not_any_width()
        return "slice_in takes them from the host" if self.slice_in else any_width.why_not_plain(self)

    def _check(self, x: Tensor) -> None:
        if x.size(-1) > self.in_features:
            raise ValueError(
                f"x: {self} expects at most {self.in_features} features in the last dimension, "
                f"got {x.size(-1)} (shape {tuple(x.shape)})"
            )

    def extra_repr(self) -> str:
        active_in = self.in_features_at(self.active_width)
        return (
            f"{active_in}/{self.in_features}, {self.active_out_features}/{self.out_features}, "
            f"bias={self.bias is not None}"
        )


class SlicedQKV(SlicedLinear):
    """The queries, keys and values of an attention from one weight: three segments, each of which keeps whole heads.

    Parameters are those of torch.nn.Linear(dim, 3 * dim), rows in the order of timm: q, k, v, in each head by head.
    The result is that of three linear layers, one behind the other.

    dim: channels of the input and, at width 1.0, of all heads together. num_heads: a divisor of it.
    slice_out: False keeps all heads at every width.
    cover_input: keep as few heads as cover the active input channels (for an output projection with `slice_in`),
    instead of num_heads * width, rounded as channels are (`active_channels`).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias: bool = True,
        *,
        slice_out: bool = True,
        slice_in: bool = False,
        cover_input: bool = False,
        divisor: int = 8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        super().__init__(
            dim,
            3 * dim,
            bias,
            slice_out=slice_out,
            slice_in=slice_in,
            divisor=divisor,
            device=device,
            dtype=dtype,
        )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.cover_input = cover_input

    def heads_at(self, width: float) -> int:
        """The number of heads at `width`."""
        if not self.slice_out:
            return self.num_heads
        if self.cover_input:
            return -(-self.in_features_at(width) // self.head_dim)
        return active_channels(self.num_heads, width, divisor=1)

    def channels_at(self, width: float) -> int:
        return 3 * self.heads_at(width) * self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] with C <= dim -> [..., 3 * heads * head_dim]."""
        if self.active_out_features == self.out_features:
            return super().forward(x)
        self._check(x)
        weights = self.weight.unflatten(0, (3, -1))
        biases = (None, None, None) if self.bias is None else self.bias.unflatten(0, (3, -1))
        segments = [
            functional.linear(
                x,
                weight,
                bias,
                out_features=self.active_out_features // 3,
                in_features=self.read_features(x.size(-1)),
            )
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return torch.cat(segments, -1)
