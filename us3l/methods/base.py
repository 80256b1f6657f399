"""What the methods share: student, teacher, heads, and which loss a width gets.

Two switches of the configuration make every row of the paper's tables out of one method:

| | sampler | distillation | target |
|---|---|---|---|
| individually trained | one fixed width | none | the method's own |
| slimmable | a list, or random widths | none | the method's own |
| slimmable + in-place distillation | a list, or random widths | a loss | live |
| US3L | dynamic | a loss | momentum, with the auxiliary head |
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from us3l.distributed import SINGLE, World
from us3l.errors import ConfigError
from us3l.losses import CRITERIA, RELATIVE, Criterion, criterion, cross_view
from us3l.methods.features import FeatureDistillation, recorded
from us3l.methods.heads import MLP, prediction_head
from us3l_kernels.optim import EMA
from us3l_kernels.width import Width, set_width, views

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone

GUIDELINES = {
    "G1": "the base loss has a target that moves slowly (momentum), or not (frozen), or is relative (infonce, ...)",
    "G2": "the distillation loss has a target from such a teacher or is relative (infonce, relational)",
    "G3": "sub-networks are distilled through an auxiliary head of their own",
}
"""The three guidelines of the US3L paper, as satisfied; one of them is enough."""


class StepOutput(NamedTuple):
    """What a width's forward pass gives.

    loss: scalar.
    projection: [2N, D], detached, before a final norm of the projector.
    targets: [2N, D] for the widths that follow in this iteration; None if they need none.
    """

    loss: Tensor
    projection: Tensor
    targets: Tensor | None


class Method(nn.Module):
    """Base of the methods.

    One iteration, with the widths drawn largest first and `images` [2N, C, H, W] two stacked views,
    view-major:

        ema.update()
        first = targets = method.targets(images, width=widths[0])
        for i, width in enumerate(widths):
            loss, projection, targets = method(images, width=width, full=i == 0, targets=targets)
        method.finish_iteration(first)

    A method of its own is a subclass: an __init__(encoder, config, **widths) that builds its heads, and what differs
    of `base_loss`, `criterion`, `compare` and `live_targets`. Buffers (a queue, say) are saved with every checkpoint.

    Args:
        encoder: a backbone of `us3l.models`; its `fc` is replaced by `projector`.
        predictor: the head of the base loss, or None.
        largest_width: of all the widths that will be trained. The teacher of a distillation runs at it.
        slimmable: whether more than one width will be trained.

    Raises:
        ConfigError: a base loss or a target that the method does not have.
    """

    labelled: ClassVar[bool] = False
    """Whether it learns from labels, which are then its first targets, and from one view instead of two."""
    base_losses: ClassVar[tuple[str, ...]] = CRITERIA
    """The values of `method.base_loss` that make sense here."""
    kinds_of_target: ClassVar[tuple[str, ...]] = ("momentum", "live", "frozen")
    """The values of `method.target` that make sense here."""

    world: World = SINGLE
    """The processes that train together, set by the engine."""
    encoder_q: Backbone
    encoder_k: Backbone | None
    predictor: MLP | None
    aux_predictor: MLP | None

    def __init__(
        self,
        encoder: Backbone,
        projector: nn.Module,
        predictor: MLP | None,
        config: MethodConfig,
        *,
        largest_width: float = 1.0,
        slimmable: bool = True,
    ) -> None:
        super().__init__()
        for key, value, known in (
            ("base_loss", config.base_loss, self.base_losses),
            ("target", config.target, self.kinds_of_target),
        ):
            if value not in known:
                raise ConfigError(
                    f"method.{key}: {config.name} has {' or '.join(known)}, got {value!r}: pass method.{key}={known[0]}"
                )
        self.config = config
        self.largest_width = largest_width
        self.slimmable = slimmable
        self.distils = config.distillation != "none"

        self.encoder_q = encoder
        self.encoder_q.fc = projector
        self.predictor = predictor
        self.aux_predictor = None
        if self.distils and config.aux_head:
            self.aux_predictor = prediction_head(config.dim, config.predictor_hidden or config.hidden_dim)
        self.encoder_k = None
        if config.target == "momentum":
            self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.feature_distillation = FeatureDistillation(encoder) if config.feature_weight > 0 else None
        self._feature_targets: list[Tensor] = []  # of the iteration under way

    @property
    def projector(self) -> MLP:
        """The student's projector, which is its encoder's `fc`."""
        return cast(MLP, self.encoder_q.fc)

    @property
    def negatives(self) -> World:
        """The processes whose samples are negatives in InfoNCE: this one alone, unless they are gathered."""
        return self.world if self.config.gather_negatives else SINGLE

    @cached_property
    def frozen_teacher(self) -> Backbone:
        """The trained network, with its projector, of the checkpoint `method.teacher`, at its largest width.

        Read at first use: a trained student does not need it, and its checkpoints do not hold it. Its norms take the
        statistics of the batch, as those of every teacher here.

        Raises CheckpointError if it cannot be read.
        """
        from us3l import checkpoint as checkpoints  # which needs the methods

        if self.config.teacher is None:
            raise ConfigError("method.target=frozen needs method.teacher, the checkpoint of a trained network")
        trained = checkpoints.restore(checkpoints.load(self.config.teacher))
        like = next(self.parameters())
        teacher = trained.encoder_q.to(like.device, like.dtype).train().requires_grad_(False)
        set_width(teacher, trained.largest_width)
        return teacher

    def criterion(self, name: str) -> Criterion:
        """The loss of the configured name; a method with a form of its own overrides this."""
        return criterion(name, self.config.temperature, self.config.teacher_temperature, self.negatives)

    def base_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Of the full width, and of all widths if nothing is distilled; on one view [N, D] each, as `compare` pairs."""
        return self.criterion(self.config.base_loss)(predictions, targets)

    def distillation_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Of the sub-networks; arguments as of `base_loss`."""
        return self.criterion(self.config.distillation)(predictions, targets)

    def compare(self, loss: Criterion, predictions: Tensor, targets: Tensor) -> Tensor:
        """A loss over predictions and targets [2N, D] of both views: each view against the other view's target."""
        return cross_view(loss, predictions, targets)

    @torch.no_grad()
    def targets(self, images: Tensor, *, width: Width) -> Tensor | None:
        """Teacher's projections [2N, D] of both views; None for a live target.

        `width` is that of the student. A distilling momentum teacher runs at the largest width, whatever is drawn;
        without distillation each width is a network of its own, and so is its teacher.
        """
        if self.config.target == "live":
            return None
        if self.encoder_k is not None:
            set_width(self.encoder_k, self.largest_width if self.distils else width)
        teacher = self.encoder_k or self.frozen_teacher
        with views(2), self.recorded(teacher) as self._feature_targets:
            targets = teacher(images)
        if targets.shape[1] != self.config.dim:
            raise ConfigError(
                f"method.dim: expected {targets.shape[1]}, as the projections of {self.config.teacher} have, "
                f"got {self.config.dim}"
            )
        return targets

    def forward(self, images: Tensor, *, width: Width, full: bool, targets: Tensor | None) -> StepOutput:
        """Loss of one width of the iteration.

        Args:
            images: [2N, C, H, W], two views, view-major.
            width: of the student in this pass.
            full: whether it is the first, largest width of the iteration. That one gets the base loss, the
                others the distillation loss; without distillation all get the base loss.
            targets: of `targets()` for the first width, of the previous width's output for the others.
        """
        distilled = self.distils and not full
        set_width(self.encoder_q, width)
        with views(2), self.recorded(self.encoder_q) as features:
            projection = self.projector.before_norm(self.encoder_q.forward_features(images))
            z = self.projector.norm(projection)
            head = self.aux_predictor if distilled and self.aux_predictor is not None else self.predictor
            prediction = z if head is None else head(z)
        shared = self.distils or self.config.target == "frozen"  # one target for all widths of the iteration
        if not distilled:
            if self.config.target == "live":
                targets = self.live_targets(z)
            elif not full and not shared:
                targets = self.targets(images, width=width)
        if targets is None:
            raise ValueError(
                "targets: expected those of Method.targets() for the first width of an iteration, and those that "
                "the first width returned for its sub-networks, got None"
            )
        loss = self.compare(self.distillation_loss if distilled else self.base_loss, prediction, targets)
        loss = self.add_feature_loss(loss, features, distilled)
        return StepOutput(loss, projection.detach(), targets.detach() if shared else None)

    def recorded(self, encoder: Backbone) -> AbstractContextManager[list[Tensor]]:
        """The features of the forward inside the context, if they are distilled; else nothing is kept."""
        return nullcontext([]) if self.feature_distillation is None else recorded(encoder)

    def add_feature_loss(self, loss: Tensor, features: list[Tensor], distilled: bool) -> Tensor:
        """`loss`, with that of the features of this forward if they are a sub-network's and are distilled.

        Their targets are the teacher's features, or those of the live full network.
        """
        if self.feature_distillation is None:
            return loss
        if not distilled:
            if self.encoder_k is None:
                self._feature_targets = [feature.detach() for feature in features]
            return loss
        return loss + self.config.feature_weight * self.feature_distillation(features, self._feature_targets)

    def live_targets(self, z: Tensor) -> Tensor:
        """Targets [2N, D] of the base loss when there is no teacher: the network's own projections, as constants."""
        return z.detach()

    def finish_iteration(self, targets: Tensor | None) -> None:
        """Called once, after all widths of an iteration, with what `targets()` gave; a queue takes them in here."""

    def student_parameters(self) -> list[nn.Parameter]:
        """All that is trained: encoder, projector and predictors."""
        return [p for p in self.parameters() if p.requires_grad]

    def ema(self) -> EMA | None:
        """The teacher's update, to be called once per iteration before `targets`; None for a live target."""
        if self.encoder_k is None:
            return None
        return EMA(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.config.momentum)

    def violates_guidelines(self) -> list[str]:
        """Names of the GUIDELINES that this configuration violates; only violating all of them is a danger.

        A network trained alone has no sub-networks to guide, and violates none.
        """
        if not self.slimmable:
            return []
        slow = self.config.target != "live"
        violated = []
        if not (slow or self.config.base_loss in RELATIVE):
            violated.append("G1")
        guidance = self.config.distillation if self.distils else self.config.base_loss
        if not (slow or guidance in RELATIVE):
            violated.append("G2")
        if self.aux_predictor is None:
            violated.append("G3")
        return violated
