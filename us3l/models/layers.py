"""The two layers that every backbone here is made of, with the choices that hold for a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, SwitchableBatchNorm2d, conv_norm


class ConvNorm(nn.Sequential):
    """A convolution and its norm; forward as `us3l_kernels.nn.conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return conv_norm(x, conv, norm)


@dataclass(frozen=True)
class Layers:
    """Makes convolutions and norms.

    divisor: active channels are multiples of it.
    widths: None for universally slimmable norms (one affine pair, sliced); a list of widths for switchable
        norms, one private norm per width (Yu et al., 2019).

    No norm tracks running statistics: those of all widths would be mixed. Training uses batch statistics, and
    afterwards each width is calibrated.
    """

    divisor: int = 8
    widths: Sequence[float] | None = None

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        ratio: int = 1,
        slice_out: bool = True,
    ) -> SlicedConv2d:
        """Convolution without bias, padded to keep the size at stride 1."""
        return SlicedConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=False,
            slice_out=slice_out,
            divisor=self.divisor,
            ratio=ratio,
        )

    def norm(self, channels: int, activation: str | None = None, *, ratio: int = 1) -> nn.Module:
        """Batch norm with the activation that follows it; forward(x, residual=None)."""
        if self.widths is None:
            return SlicedBatchNorm2d(channels, track_running_stats=False, activation=activation)
        return SwitchableBatchNorm2d(
            channels,
            self.widths,
            track_running_stats=False,
            divisor=self.divisor,
            ratio=ratio,
            activation=activation,
        )


def initialise(model: nn.Module) -> None:
    """Kaiming-normal convolutions by their fan-out, as torchvision initialises ResNet and MobileNetV2."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
