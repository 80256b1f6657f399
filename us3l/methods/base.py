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
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from us3l.losses import cross_view, info_nce, negative_cosine
from us3l.methods.heads import Predictor, Projector
from us3l_kernels.optim import EMA
from us3l_kernels.width import Width, set_width, views

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone

GUIDELINES = {
    "G1": "the base loss has a target that moves slowly (momentum) or is relative (infonce)",
    "G2": "the distillation loss has a target from the momentum encoder or is relative (infonce)",
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
    """Base of the self-supervised methods.

    One iteration, with the widths drawn largest first and `images` [2N, C, H, W] two stacked views,
    view-major:

        ema.update()
        targets = method.targets(images, width=widths[0])
        for i, width in enumerate(widths):
            loss, projection, targets = method(images, width=width, full=i == 0, targets=targets)

    Args:
        encoder: a backbone of `us3l.models`; its `fc` is replaced by `projector`.
        predictor: the head of the base loss, or None.
        largest_width: of all the widths that will be trained. The teacher of a distillation runs at it.
        slimmable: whether more than one width will be trained.
    """

    encoder_q: Backbone
    encoder_k: Backbone | None
    predictor: Predictor | None
    aux_predictor: Predictor | None

    def __init__(
        self,
        encoder: Backbone,
        projector: Projector,
        predictor: Predictor | None,
        config: MethodConfig,
        *,
        largest_width: float = 1.0,
        slimmable: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.largest_width = largest_width
        self.slimmable = slimmable
        self.distils = config.distillation != "none"
        self.base_loss = _loss(config.base_loss, config.temperature)
        if self.distils:
            self.distillation_loss = _loss(config.distillation, config.temperature)

        self.encoder_q = encoder
        self.encoder_q.fc = projector
        self.predictor = predictor
        self.aux_predictor = None
        if self.distils and config.aux_head:
            self.aux_predictor = Predictor(config.dim, config.predictor_hidden or config.hidden_dim)
        self.encoder_k = None
        if config.target == "momentum":
            self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @property
    def projector(self) -> Projector:
        """The student's projector, which is its encoder's `fc`."""
        return cast(Projector, self.encoder_q.fc)

    @torch.no_grad()
    def targets(self, images: Tensor, *, width: Width) -> Tensor | None:
        """Teacher's projections [2N, D] of both views; None for a live target.

        `width` is that of the student. A distilling teacher runs at the largest width, whatever is drawn;
        without distillation each width is a network of its own, and so is its teacher.
        """
        if self.encoder_k is None:
            return None
        set_width(self.encoder_k, self.largest_width if self.distils else width)
        with views(2):
            return self.encoder_k(images)

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
        with views(2):
            projection = self.projector.before_norm(self.encoder_q.forward_features(images))
            z = self.projector.norm(projection)
            head = self.aux_predictor if distilled and self.aux_predictor is not None else self.predictor
            prediction = z if head is None else head(z)
        if not distilled:
            if self.encoder_k is None:
                targets = self.live_targets(z)
            elif not full:
                targets = self.targets(images, width=width)
        if targets is None:
            raise ValueError(
                "targets: expected those of Method.targets() for the first width of an iteration, and those that "
                "the first width returned for its sub-networks, got None"
            )
        loss = cross_view(self.distillation_loss if distilled else self.base_loss, prediction, targets)
        return StepOutput(loss, projection.detach(), targets.detach() if self.distils else None)

    def live_targets(self, z: Tensor) -> Tensor:
        """Targets [2N, D] of the base loss when there is no teacher: the network's own projections, as constants."""
        return z.detach()

    def student_parameters(self) -> list[nn.Parameter]:
        """All that is trained: encoder, projector and predictors."""
        return [p for name, p in self.named_parameters() if not name.startswith("encoder_k.")]

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
        slow = self.config.target == "momentum"
        violated = []
        if not (slow or self.config.base_loss == "infonce"):
            violated.append("G1")
        guidance = self.config.distillation if self.distils else self.config.base_loss
        if not (slow or guidance == "infonce"):
            violated.append("G2")
        if self.aux_predictor is None:
            violated.append("G3")
        return violated


def _loss(name: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "cosine":
        return negative_cosine
    if name == "infonce":
        return partial(info_nce, temperature=temperature)
    raise ValueError(f"a loss must be cosine or infonce, got {name!r}")
