"""Width-sliced backbones."""

from __future__ import annotations

from collections.abc import Sequence

from us3l.models.backbone import Backbone
from us3l.models.layers import Layers
from us3l.models.mobilenet_v2 import MobileNetV2
from us3l.models.resnet import BasicBlock, Bottleneck, ResNet
from us3l.models.vit import VisionTransformer

RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet_tiny": (BasicBlock, (1, 1, 1)),
}
VITS = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12), "vit_mini": (64, 4, 4)}
"""Channels, blocks and heads."""
MODELS = (*RESNETS, "mobilenet_v2", *VITS)


def build_model(
    name: str,
    *,
    stem: str = "imagenet",
    num_classes: int | None = None,
    in_channels: int = 3,
    divisor: int = 8,
    norm: str = "sliced",
    widths: Sequence[float] | None = None,
    base_channels: int = 16,
    slicing: str = "full",
    patch_size: int = 16,
    image_size: int | None = None,
) -> Backbone:
    """Build a backbone for images [N, in_channels, H, W].

    Args:
        name: one of MODELS.
        stem: "imagenet", "cifar" or (ResNets only) "small"; a ViT has none.
        num_classes: outputs of the classifier `fc`; None for none: forward returns the pooled features.
        divisor: active channels of a width are multiples of it.
        norm: "sliced", or "switchable" for one private norm per width of `widths`.
        base_channels: channels of resnet_tiny's stem; the other models have their published ones.
        slicing: of a ViT: "full", "mlp" or "input", see us3l.models.vit.
        patch_size, image_size: of a ViT, pixels; image_size None: 224.
    """
    if norm not in ("sliced", "switchable"):
        raise ValueError(f"norm must be sliced or switchable, got {norm!r}")
    if (norm == "switchable") != (widths is not None):
        raise ValueError(f"widths is the list of a switchable norm's widths: got norm={norm!r}, widths={widths}")
    if name in VITS:
        if norm == "switchable":
            raise ValueError(f"norm=switchable is for batch norms, {name} has layer norms")
        return VisionTransformer(
            *VITS[name],
            slicing=slicing,
            image_size=image_size or 224,
            patch_size=patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            divisor=divisor,
        )
    layers = Layers(divisor, widths)
    if name == "mobilenet_v2":
        return MobileNetV2(layers, stem=stem, in_channels=in_channels, num_classes=num_classes)
    if name not in RESNETS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    block, blocks = RESNETS[name]
    return ResNet(
        block,
        blocks,
        layers,
        stem=stem,
        in_channels=in_channels,
        num_classes=num_classes,
        base_channels=base_channels if name == "resnet_tiny" else 64,
    )


__all__ = ["MODELS", "Backbone", "MobileNetV2", "ResNet", "VisionTransformer", "build_model"]
