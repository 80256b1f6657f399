"""A convolution that runs with a prefix of its channels."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from us3l_kernels import any_width, functional
from us3l_kernels.triton import Sizes
from us3l_kernels.width import SlicedOutput, active_channels


class SlicedConv2d(SlicedOutput, nn.Conv2d):
    """torch.nn.Conv2d whose active output channels follow the width and whose active input channels are x's.

    Parameters, state_dict and initialisation are those of torch.nn.Conv2d, and at width 1.0 so is the result.

    slice_out: False keeps all output channels at every width (the last convolution of MobileNetV2).
    divisor, ratio: the rounding of channels, see `active_channels`.
    groups: of the full layer. With groups > 1 (depthwise, ResNeXt) a group keeps its channels, the number of
    active groups is that of x, and so the output follows x too; `slice_out`, `divisor` and `ratio` then only
    say what to expect (`active_out_channels`, repr).

    active_out_channels: the output channels at the width in effect.
    repr shows active/full channels; for the input it shows what sliced `in_channels` would be at this width.
    """

    active_out_channels: int
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        slice_out: bool = True,
        divisor: int = 8,
        ratio: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.slice_out = slice_out
        self.divisor = divisor
        self.ratio = ratio
        self.active_out_channels = out_channels

    def set_active(self, width: float, key: str) -> None:
        super().set_active(width, key)
        vars(self).update(active_out_channels=self.channels_at(width))

    def in_channels_at(self, width: float) -> int:
        """The input channels that a sliced layer of `in_channels` brings at `width`."""
        ratio = self.ratio if self.groups > 1 else 1
        return active_channels(self.in_channels, width, divisor=self.divisor, ratio=ratio)

    def channels_at(self, width: float) -> int:
        if self.groups > 1:
            return self._grouped_channels(self.in_channels_at(width))
        if not self.slice_out:
            return self.out_channels
        return active_channels(self.out_channels, width, divisor=self.divisor, ratio=self.ratio)

    def _grouped_channels(self, in_channels: int) -> int:
        """Output channels of the groups that `in_channels` fill."""
        return in_channels * self.groups // self.in_channels * (self.out_channels // self.groups)

    def result_channels(self, channels: int, sizes: Sizes | None) -> int:
        """The channels of the result of an x with `channels`; `sizes`: if the active ones are read from the device."""
        if self.groups > 1:
            return self._grouped_channels(channels)
        return self.active_out_channels if sizes is None else self.out_channels

    @property
    def follows_input(self) -> bool:
        return self.groups > 1

    def why_not_any_width(self) -> str | None:
        if type(self).forward is not SlicedConv2d.forward:
            return super().why_not_any_width()
        if self.groups > 1 and (self.weight.size(1) > 1 or self.weight.size(0) != self.groups):
            return "groups are taken from the host, but for one filter for each channel"
        return any_width.why_not_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] (or [C, H, W]) with C <= in_channels -> [N, active_out_channels, H', W']."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4:
            raise ValueError(f"x: {self} expects [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
        channels = x.size(1)
        per_group = self.in_channels // self.groups
        if channels > self.in_channels or (self.groups > 1 and channels % per_group):
            whole = f" in whole groups of {per_group}" if self.groups > 1 else ""
            raise ValueError(
                f"x: {self} expects at most {self.in_channels} channels{whole}, "
                f"got {channels} (shape {tuple(x.shape)})"
            )
        sizes = any_width.sizes_of(self, x)
        x, padding = self._pad(x)
        return any_width.reading(functional.conv2d, sizes)(
            x,
            self.weight,
            self.bias,
            out_channels=self.result_channels(channels, sizes),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x and the zero padding (height, width) that is left to the convolution."""
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if not isinstance(self.padding, str):
            return x, self.padding
        # "same" or "valid", as (left, right, top, bottom). The operation pads both sides alike: where "same"
        # needs one row or column more on the far side, it is added here.
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if (left, top) != (right, bottom):
            x = F.pad(x, (0, right - left, 0, bottom - top))
        return x, (top, left)

    def extra_repr(self) -> str:
        active_in = self.in_channels_at(self.active_width)
        full = f"{self.in_channels}, {self.out_channels}"
        active = f"{active_in}/{self.in_channels}, {self.active_out_channels}/{self.out_channels}"
        return super().extra_repr().replace(full, active, 1)
