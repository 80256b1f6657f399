"""Width-sliced MobileNetV2 (Sandler et al., 2018), with the names of slimmable networks.

`features.0` is the stem, `features.1` to `features.17` are the inverted residuals, `features.18` the 1x1
convolution to 1280 channels, which is not sliced. The expansion of a block is sliced in steps of its ratio,
so that it stays that multiple of the block's active input.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from us3l.models.backbone import Backbone
from us3l.models.layers import ConvNorm, Layers, initialise
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedLinear, residual_block

# expansion ratio, channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (3x3) and project (1x1), with a residual sum where shapes allow.

    `body` keeps the numbering of the published code, where the ReLU6 that run inside the norms here are
    modules of their own: 0 expand, 1 norm, 3 depthwise, 4 norm, 6 project, 7 norm; three less where nothing
    expands.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, ratio: int, layers: Layers) -> None:
        super().__init__()
        hidden = in_channels * ratio
        body: OrderedDict[str, nn.Module] = OrderedDict()
        first = 0
        if ratio != 1:
            body["0"] = layers.conv(in_channels, hidden, 1, ratio=ratio)
            body["1"] = layers.norm(hidden, "relu6", ratio=ratio)
            first = 3
        body[f"{first}"] = layers.conv(hidden, hidden, 3, stride, groups=hidden, ratio=ratio)
        body[f"{first + 1}"] = layers.norm(hidden, "relu6", ratio=ratio)
        body[f"{first + 3}"] = layers.conv(hidden, out_channels, 1)
        body[f"{first + 4}"] = layers.norm(out_channels)
        self.body = nn.Sequential(body)
        self.last_conv = f"body.{first + 3}"
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return residual_block(x, x if self.has_residual else None, *self.body)


class MobileNetV2(Backbone):
    """MobileNetV2.

    Args:
        stem: "imagenet" (stride 2) or "cifar" (stride 1 in the stem and in the 24-channel stage).
        num_classes: outputs of the classifier; None for none (`fc` is then the identity).
    """

    def __init__(
        self, layers: Layers, *, stem: str = "imagenet", in_channels: int = 3, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem: MobileNetV2 has imagenet or cifar, got {stem!r}")
        stem_stride = 2 if stem == "imagenet" else 1
        self.features = nn.Sequential(
            ConvNorm(layers.conv(in_channels, STEM_CHANNELS, 3, stem_stride), layers.norm(STEM_CHANNELS, "relu6"))
        )
        self.residual_sums = []
        self.stages = {}
        channels = STEM_CHANNELS
        for ratio, out_channels, depth, stage_stride in STAGES:
            summed = []
            for j in range(depth):
                stride = stage_stride if j == 0 else 1
                if stem == "cifar" and out_channels == 24:
                    stride = 1
                if stride == 2:
                    self.stages[f"features.{len(self.features) - 1}"] = channels
                block = InvertedResidual(channels, out_channels, stride, ratio, layers)
                summed.append(f"features.{len(self.features)}.{block.last_conv}")
                self.features.append(block)
                channels = out_channels
            if depth > 1:
                self.residual_sums.append(summed)
        self.stages[f"features.{len(self.features) - 1}"] = channels
        # This norm has 1280 channels at every width: never a switchable one, whose width-w member has fewer.
        self.features.append(
            ConvNorm(
                layers.conv(channels, LAST_CHANNELS, 1, slice_out=False),
                SlicedBatchNorm2d(LAST_CHANNELS, track_running_stats=False, activation="relu6"),
            )
        )

        self.feature_dim = LAST_CHANNELS
        self.fc = nn.Identity()
        if num_classes is not None:
            self.fc = SlicedLinear(self.feature_dim, num_classes, slice_out=False, divisor=layers.divisor)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))
