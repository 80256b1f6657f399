"""SEED (Fang et al., 2021): distillation of a pre-trained teacher through the similarities to a queue."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from us3l.losses import Criterion, queue_relations
from us3l.methods.base import Method
from us3l.methods.heads import MLP
from us3l.methods.queue import Queue

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class SEED(Method):
    """Every image shall be as similar to the teacher's past projections as the frozen teacher finds it.

    `target="frozen"` with `teacher`, a checkpoint, and `base_loss="relational"` is the published method, which has
    temperature=0.2, teacher_temperature=0.01 and queue_size=65536; `dim` is that of the teacher's projections. Each
    view is compared with the teacher's projection of the same view. Without distillation every width learns from the
    teacher directly; with `distillation="relational"` and the auxiliary head, sub-networks do so through that head.
    """

    base_losses: ClassVar = ("relational",)
    kinds_of_target: ClassVar = ("frozen",)

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        projector = MLP((encoder.feature_dim, config.hidden_dim, config.dim), (True, True), norms=False)
        super().__init__(encoder, projector, None, config, **widths)
        self.queue = Queue(config.queue_size, config.dim)

    def criterion(self, name: str) -> Criterion:
        if name != "relational":
            return super().criterion(name)
        temperature, of_teacher = self.config.temperature, self.config.teacher_temperature
        temperatures = (temperature, temperature if of_teacher is None else of_teacher)
        return partial(queue_relations, queue=self.queue.keys, temperatures=temperatures)

    def compare(self, loss: Criterion, predictions: Tensor, targets: Tensor) -> Tensor:
        return loss(predictions, targets)

    def finish_iteration(self, targets: Tensor | None) -> None:
        assert targets is not None  # its target is never live
        self.queue.push(self.world.gather_views(targets))
