"""A linear layer that runs with a prefix of its features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from us3l_kernels import functional
from us3l_kernels.width import SlicedOutput, active_channels


class SlicedLinear(SlicedOutput, nn.Linear):
    """torch.nn.Linear whose active output features follow the width and whose active input features are x's.

    Parameters, state_dict and initialisation are those of torch.nn.Linear, and at width 1.0 so is the result.

    slice_out: False keeps all output features at every width (a classifier, the end of a projector).
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
        divisor: int = 8,
        ratio: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.slice_out = slice_out
        self.divisor = divisor
        self.ratio = ratio
        self.active_out_features = out_features

    def set_active(self, width: float, key: str) -> None:
        super().set_active(width, key)
        vars(self).update(active_out_features=self.channels_at(width))

    def in_features_at(self, width: float) -> int:
        """The input features that a sliced layer of `in_features` brings at `width`."""
        return active_channels(self.in_features, width, divisor=self.divisor)

    def channels_at(self, width: float) -> int:
        if not self.slice_out:
            return self.out_features
        return active_channels(self.out_features, width, divisor=self.divisor, ratio=self.ratio)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] with C <= in_features -> [..., active_out_features]."""
        if x.size(-1) > self.in_features:
            raise ValueError(
                f"x: {self} expects at most {self.in_features} features in the last dimension, "
                f"got {x.size(-1)} (shape {tuple(x.shape)})"
            )
        return functional.linear(x, self.weight, self.bias, out_features=self.active_out_features)

    def extra_repr(self) -> str:
        active_in = self.in_features_at(self.active_width)
        return (
            f"{active_in}/{self.in_features}, {self.active_out_features}/{self.out_features}, "
            f"bias={self.bias is not None}"
        )
