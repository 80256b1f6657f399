"""A layer norm over the channels that x brings."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from us3l_kernels import functional
from us3l_kernels.width import Sliced


class SlicedLayerNorm(Sliced, nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension of x, whose length C may be any prefix of
    `normalized_shape`.

    Mean and variance are those of the C channels that are there; weight and bias are read by their prefix.
    Parameters and state_dict are those of torch.nn.LayerNorm (Ba, Kiros and Hinton, 2016).
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not isinstance(normalized_shape, int):
            raise TypeError(
                "normalized_shape: expected an int, as the norm is over the last dimension, "
                f"got {normalized_shape!r}"
            )
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)

    def plan_key(self) -> Hashable:
        return None  # its channels are x's

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] with C <= normalized_shape -> [..., C]."""
        if x.size(-1) > self.normalized_shape[0]:
            raise ValueError(
                f"x: {self} expects at most {self.normalized_shape[0]} channels in the last dimension, "
                f"got {x.size(-1)} (shape {tuple(x.shape)})"
            )
        return functional.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.active_width}"
