"""MoCo v2 (Chen, Fan, Girshick and He, 2020): contrast with a queue of the teacher's past projections."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from us3l.losses import Criterion, info_nce_queue
from us3l.methods.base import Method
from us3l.methods.heads import MLP
from us3l.methods.queue import Queue

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class MoCoV2(Method):
    """InfoNCE whose positive is the momentum teacher's projection of the other view, and whose negatives are a queue.

    The published method has hidden_dim = the encoder's features, dim=128, temperature=0.2, momentum=0.999 and
    queue_size=65536; the loss is symmetric in the two views here, as everywhere in this package. InfoNCE as
    distillation has the queue's negatives as well, and the auxiliary head before it. Without distillation the queue
    holds the projections of the iteration's first width.
    """

    base_losses: ClassVar = ("infonce",)
    kinds_of_target: ClassVar = ("momentum",)

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        projector = MLP((encoder.feature_dim, config.hidden_dim, config.dim), (True, True), norms=False)
        super().__init__(encoder, projector, None, config, **widths)
        self.queue = Queue(config.queue_size, config.dim)

    def criterion(self, name: str) -> Criterion:
        if name == "infonce":
            return partial(info_nce_queue, queue=self.queue.keys, temperature=self.config.temperature)
        return super().criterion(name)

    def finish_iteration(self, targets: Tensor | None) -> None:
        assert targets is not None  # its target is never live
        self.queue.push(self.world.gather_views(targets))
