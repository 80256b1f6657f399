"""MoCo v3 (Chen, Xie and He, 2021): contrast within the batch, a predictor, a momentum teacher; for ViTs and CNNs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from us3l.losses import Criterion, in_batch_contrast
from us3l.methods.base import Method
from us3l.methods.heads import MLP
from us3l.models import VisionTransformer

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class MoCoV3(Method):
    """InfoNCE of the prediction with the teacher's projections of the other view; the batch's others are negatives.

    The published method has hidden_dim=4096, dim=256 and temperature=0.2 (ViT) or 1.0 (ResNet-50). A ViT's heads are a
    layer deeper and normalise their output, and its patch embedding stays as it was initialised, which keeps its
    training stable (section 4 of the paper). With `gather_negatives`, those of
    all processes are negatives, as in the published code.
    """

    base_losses: ClassVar = ("infonce",)
    kinds_of_target: ClassVar = ("momentum",)

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        is_vit = isinstance(encoder, VisionTransformer)
        if is_vit:
            encoder.patch_embed.requires_grad_(False)
        hidden = [config.hidden_dim] * (2 if is_vit else 1)
        biases = (False, False, False)  # a batch norm follows each layer
        projector = MLP((encoder.feature_dim, *hidden, config.dim), biases, final_norm=True)
        sizes = (config.dim, config.predictor_hidden or config.hidden_dim, config.dim)
        super().__init__(encoder, projector, MLP(sizes, biases, final_norm=is_vit), config, **widths)

    def criterion(self, name: str) -> Criterion:
        if name == "infonce":
            return partial(in_batch_contrast, temperature=self.config.temperature, world=self.negatives)
        return super().criterion(name)
