"""Supervised training of slimmable networks, alone or with in-place distillation (Yu and Huang, 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from us3l.errors import ConfigError
from us3l.losses import cross_entropy
from us3l.methods.base import Method, StepOutput
from us3l_kernels.width import Width, set_width

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class Supervised(Method):
    """A classifier on labelled images; `targets` are the labels, and there is one view.

    `base_loss="cross_entropy"`, `target="live"`. With one width it is the individually trained network; with a list of
    widths, switchable norms and `distillation="none"` the S-Net (Yu et al., 2019); with the sandwich rule the US-Net;
    with `distillation="kl"` and temperature=1, sub-networks learn from the full network's logits instead of labels.
    """

    labelled: ClassVar = True
    base_losses: ClassVar = ("cross_entropy",)
    kinds_of_target: ClassVar = ("live",)

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        super().__init__(encoder, encoder.fc, None, config, **widths)
        if self.aux_predictor is not None:
            raise ConfigError("method.aux_head: expected false for supervised, whose logits have no head, got true")

    def base_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(predictions, targets)

    def forward(self, images: Tensor, *, width: Width, full: bool, targets: Tensor | None) -> StepOutput:
        """As of `Method`, but for images [N, C, H, W] of one view, and int64 labels [N] as the first targets."""
        if targets is None:
            raise ValueError("targets: expected the labels of the images, got None")
        set_width(self.encoder_q, width)
        with self.recorded(self.encoder_q) as features:
            logits = self.encoder_q(images)
        distilled = self.distils and not full
        loss = self.distillation_loss(logits, targets) if distilled else self.base_loss(logits, targets)
        loss = self.add_feature_loss(loss, features, distilled)
        return StepOutput(loss, logits.detach(), logits.detach() if self.distils and full else targets)
