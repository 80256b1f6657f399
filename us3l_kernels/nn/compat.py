"""Layers with the constructors and the `width_mult` attribute known from the slimmable networks' code.

Code written for those runs unchanged: `model.apply(lambda m: setattr(m, "width_mult", 0.5))` sets the width,
as `set_width(model, 0.5)` does. The layers otherwise are the sliced ones of this package: the active input is
x's, and the batch norm is calibrated by `calibrating`.

The Slimmable layers and SwitchableBatchNorm2d take one entry per width. Which widths these are, the published
code keeps in a global list; declare it here before building a model:

    compat.set_width_mult_list([0.25, 0.5, 0.75, 1.0])

Without a declared list an entry's width is its share of the largest entry.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.common_types import _size_2_t

from us3l_kernels.nn import batch_norm, conv, linear
from us3l_kernels.width import FixedWidths, Sliced, active_channels, make_divisible, width_key

__all__ = [
    "SlimmableConv2d",
    "SlimmableLinear",
    "SwitchableBatchNorm2d",
    "USBatchNorm2d",
    "USConv2d",
    "USLinear",
    "make_divisible",
    "set_width_mult_list",
]

_width_mult_list: tuple[float, ...] = ()


def set_width_mult_list(widths: Sequence[float]) -> None:
    """Declare the widths of the entries of layers that are built from now on; an empty list takes it back."""
    global _width_mult_list
    for width in widths:
        width_key(width)  # raises for what is not a width
    _width_mult_list = tuple(float(width) for width in widths)


def _widths_of(*lists: Sequence[int]) -> tuple[float, ...]:
    """The width of each entry of a layer's lists of channels."""
    lengths = {len(channels) for channels in lists}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"channels: expected lists with one entry per width, got {[list(c) for c in lists]}")
    if _width_mult_list:
        if lengths != {len(_width_mult_list)}:
            raise ValueError(
                f"channels: expected an entry for each of the declared widths {list(_width_mult_list)}, "
                f"got {[list(c) for c in lists]}"
            )
        return _width_mult_list
    for channels in lists:
        shares = tuple(count / max(channels) for count in channels)
        if len(set(shares)) == len(shares):
            return shares
    raise ValueError(
        f"channels: the entries {[list(c) for c in lists]} do not tell their widths; "
        "declare them with us3l_kernels.nn.compat.set_width_mult_list"
    )


class _WidthMult(Sliced):
    """The width as an attribute `width_mult`; None stands for the width of a new layer."""

    def _new_width(self) -> float:
        return 1.0

    @property
    def width_mult(self) -> float:
        return self.active_width

    @width_mult.setter
    def width_mult(self, width: float | None) -> None:
        width = self._new_width() if width is None else width
        key = width_key(width)
        self.check_width(width)
        self.set_active(width, key)


class USConv2d(_WidthMult, conv.SlicedConv2d):
    """Universally slimmable convolution.

    us, ratio: of the (input, output) channels: whether they are sliced, and their expansion.
    depthwise: one group per channel, whatever `groups` says.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        depthwise: bool = False,
        bias: bool = True,
        us: Sequence[bool] = (True, True),
        ratio: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels if depthwise else groups,
            bias,
            slice_out=us[1],
            ratio=ratio[1],
        )
        self.us = tuple(us)
        self.in_ratio = ratio[0]

    def in_channels_at(self, width: float) -> int:
        if not self.us[0]:
            return self.in_channels
        return active_channels(self.in_channels, width, ratio=self.in_ratio)


class USLinear(_WidthMult, linear.SlicedLinear):
    """Universally slimmable linear layer. us: (input, output) sliced or not."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, us: Sequence[bool] = (True, True)
    ) -> None:
        super().__init__(in_features, out_features, bias, slice_out=us[1])
        self.us = tuple(us)

    def in_features_at(self, width: float) -> int:
        return super().in_features_at(width) if self.us[0] else self.in_features


class USBatchNorm2d(_WidthMult, batch_norm.SlicedBatchNorm2d):
    """Universally slimmable batch norm: one affine pair for all widths; statistics by calibration."""

    def __init__(self, num_features: int, ratio: int = 1) -> None:
        super().__init__(num_features, track_running_stats=False)
        self.ratio = ratio


class _Listed(_WidthMult, FixedWidths):
    """A layer with a list entry for each of its widths."""

    def _new_width(self) -> float:
        return max(self.widths)


class SlimmableConv2d(_Listed, conv.SlicedConv2d):
    """Convolution with channels listed for each width; the largest one at first.

    groups_list: one number of groups for all widths or one for each; the channels of a group stay the same.
    """

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels_list: Sequence[int],
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups_list: Sequence[int] = (1,),
        bias: bool = True,
    ) -> None:
        widths = _widths_of(out_channels_list, in_channels_list)
        groups = list(groups_list) * (len(widths) if len(groups_list) == 1 else 1)
        entries = list(zip(in_channels_list, out_channels_list, groups, strict=True))
        if max(groups) > 1 and len({(i / g, o / g) for i, o, g in entries}) > 1:
            raise ValueError(
                "groups_list: expected the same channels per group at every width, got "
                f"(in_channels, out_channels, groups) {entries}"
            )
        super().__init__(
            max(in_channels_list),
            max(out_channels_list),
            kernel_size,
            stride,
            padding,
            dilation,
            max(groups),
            bias,
        )
        self.widths = widths
        self.in_channels_list = list(in_channels_list)
        self.out_channels_list = list(out_channels_list)
        self.width_mult = None

    def in_channels_at(self, width: float) -> int:
        return self.in_channels_list[self.index_of(width)]

    def channels_at(self, width: float) -> int:
        return self.out_channels_list[self.index_of(width)]


class SlimmableLinear(_Listed, linear.SlicedLinear):
    """Linear layer with features listed for each width; the largest one at first."""

    def __init__(
        self, in_features_list: Sequence[int], out_features_list: Sequence[int], bias: bool = True
    ) -> None:
        widths = _widths_of(out_features_list, in_features_list)
        super().__init__(max(in_features_list), max(out_features_list), bias)
        self.widths = widths
        self.in_features_list = list(in_features_list)
        self.out_features_list = list(out_features_list)
        self.width_mult = None

    def in_features_at(self, width: float) -> int:
        return self.in_features_list[self.index_of(width)]

    def channels_at(self, width: float) -> int:
        return self.out_features_list[self.index_of(width)]


class SwitchableBatchNorm2d(_Listed, batch_norm.PrivateBatchNorms2d):
    """A private batch norm for each width, with the channels listed; the largest one at first."""

    def __init__(self, num_features_list: Sequence[int]) -> None:
        super().__init__(num_features_list, _widths_of(num_features_list))
