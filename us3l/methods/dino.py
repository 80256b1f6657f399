"""DINO (Caron et al., 2021): self-distillation of a momentum teacher's assignments to prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l.losses import Criterion
from us3l.methods.base import Method
from us3l.methods.heads import MLP
from us3l.models import VisionTransformer

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone

BOTTLENECK = 256  # features before the prototypes
CENTER_MOMENTUM = 0.9


class PrototypeHead(MLP):
    """Features [N, C_active] to their cosines with `prototypes` [K, BOTTLENECK]: [N, K].

    norms: batch norms behind the hidden layers.
    """

    def __init__(self, features: int, hidden: int, prototypes: int, *, norms: bool) -> None:
        super().__init__((features, hidden, hidden, BOTTLENECK), (True, True, True), norms=norms)
        # Only their directions count, and the longer they are, the slower these turn: they start short.
        self.prototypes = nn.Parameter(torch.randn(prototypes, BOTTLENECK) * BOTTLENECK**-0.5)

    def norm(self, outputs: Tensor) -> Tensor:
        # A product under autocast would round the cosines, and the temperatures enlarge them.
        with torch.autocast(outputs.device.type, enabled=False):
            outputs = outputs.to(self.prototypes.dtype)
            return F.linear(F.normalize(outputs, dim=1), F.normalize(self.prototypes, dim=1))


class DINO(Method):
    """The student's assignments to K prototypes shall be those of the momentum teacher for the other view.

    Assignments are softmax(cosines / temperature). The teacher's are centred (a running mean of its cosines is taken
    off) and sharpened (a lower temperature): the one keeps single prototypes from taking all images, the other keeps
    the assignments from becoming uniform. Sub-networks learn from the same targets, the teacher's at full width.

    `base_loss="kl"`, `distillation="kl"`, `target="momentum"`, with dim=65536 (the number of prototypes),
    hidden_dim=2048, temperature=0.1, teacher_temperature=0.04, momentum=0.996 and momentum_schedule=cosine is the
    published method with two crops, but for a ReLU instead of GELU in the head, the warm-up of the teacher's
    temperature, and the frozen prototypes of the first epoch. The KL divergence is its cross-entropy (eq. 2) less the
    entropy of the target, which has no gradient. The head has batch norms where the backbone has them (an option of the
    published code, `use_bn_in_head`): without them a ResNet's first outputs hardly differ, and it collapses. The
    auxiliary head has 2 * dim * hidden_dim weights: take fewer prototypes with it, or method.aux_head=false.
    """

    base_losses: ClassVar = ("kl",)
    kinds_of_target: ClassVar = ("momentum",)

    center: Tensor  # [K]

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        projector = PrototypeHead(
            encoder.feature_dim, config.hidden_dim, config.dim, norms=not isinstance(encoder, VisionTransformer)
        )
        super().__init__(encoder, projector, None, config, **widths)
        self.register_buffer("center", torch.zeros(config.dim))

    def criterion(self, name: str) -> Criterion:
        loss = super().criterion(name)
        return (lambda prediction, target: loss(prediction, target - self.center)) if name == "kl" else loss

    @torch.no_grad()
    def finish_iteration(self, targets: Tensor | None) -> None:
        assert targets is not None  # its target is never live
        mean = targets.mean(0)
        self.world.average_(mean)
        self.center.lerp_(mean.to(self.center.dtype), 1 - CENTER_MOMENTUM)
