"""Width-sliced residual networks (He et al., 2016), with torchvision's names, so that its weights load.

The bottleneck has its stride on the 3x3 convolution (v1.5), as torchvision's. The ReLU after a norm and the
residual sum before it run inside the norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from us3l.models.backbone import Backbone
from us3l.models.layers import ConvNorm, Layers, initialise
from us3l_kernels.nn import SlicedLinear, conv_norm, residual_block


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1
    last_conv = "conv2"

    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.bn1 = layers.norm(channels, "relu")
        self.conv2 = layers.conv(channels, channels, 3)
        self.bn2 = layers.norm(channels, "relu")
        self.downsample = _downsample(in_channels, channels, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        return residual_block(x, residual, self.conv1, self.bn1, self.conv2, self.bn2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; four times as many channels come out as the 3x3 has."""

    expansion = 4
    last_conv = "conv3"

    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = layers.conv(in_channels, channels, 1)
        self.bn1 = layers.norm(channels, "relu")
        self.conv2 = layers.conv(channels, channels, 3, stride)
        self.bn2 = layers.norm(channels, "relu")
        self.conv3 = layers.conv(channels, out_channels, 1)
        self.bn3 = layers.norm(out_channels, "relu")
        self.downsample = _downsample(in_channels, out_channels, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        return residual_block(x, residual, self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3)


def _downsample(in_channels: int, out_channels: int, stride: int, layers: Layers) -> ConvNorm | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return ConvNorm(layers.conv(in_channels, out_channels, 1, stride), layers.norm(out_channels))


class ResNet(Backbone):
    """A residual network whose stages have `blocks[i]` blocks of `base_channels * 2**i` channels.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: blocks of each stage; every stage but the first halves the resolution.
        stem: "imagenet" (7x7, stride 2, and 3x3 max pooling, stride 2), "cifar" (3x3) or "small" (3x3, stride
            2).
        num_classes: outputs of the classifier; None for none (`fc` is then the identity).
        base_channels: channels of the stem and, times the block's expansion, of the first stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        layers: Layers,
        *,
        stem: str = "imagenet",
        in_channels: int = 3,
        num_classes: int | None = None,
        base_channels: int = 64,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar", "small"):
            raise ValueError(f"stem: a ResNet has imagenet, cifar or small, got {stem!r}")
        kernel_size, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[stem]
        self.conv1 = layers.conv(in_channels, base_channels, kernel_size, stride)
        self.bn1 = layers.norm(base_channels, "relu")
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()

        self.stages = {}
        sums = [["conv1"]]
        width_in = base_channels
        for i, depth in enumerate(blocks):
            channels = base_channels * 2**i
            stage, name = nn.Sequential(), f"layer{i + 1}"
            for j in range(depth):
                stage.append(block(width_in, channels, 2 if j == 0 and i > 0 else 1, layers))
                width_in = channels * block.expansion
                if stage[j].downsample is not None:
                    sums.append([f"{name}.{j}.downsample.0"])
                sums[-1].append(f"{name}.{j}.{block.last_conv}")
            self.add_module(name, stage)
            self.stages[name] = width_in
        self.residual_sums = [members for members in sums if len(members) > 1]

        self.feature_dim = width_in
        self.fc = nn.Identity()
        if num_classes is not None:
            self.fc = SlicedLinear(self.feature_dim, num_classes, slice_out=False, divisor=layers.divisor)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(conv_norm(x, self.conv1, self.bn1))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x.mean((2, 3))
