"""SimCLR (Chen et al., 2020), and SimCLR with a momentum teacher: the main method of the US3L paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from us3l.methods.base import Method
from us3l.methods.heads import MLP

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class SimCLR(Method):
    """The base loss compares projections directly; only sub-networks have a predictor, the auxiliary head.

    `target="momentum"`, `base_loss="infonce"` contrasts the student with the teacher (SimCLR_Momentum in the
    published code). `target="live"` is SimCLR, with gradients through both views, as long as nothing is distilled.
    With distillation, the live projections are the sub-networks' targets and constants, and the base loss takes
    the same constants: so it differs from the momentum target in nothing but where the targets come from, and its
    gradient has the same scale, which is half of SimCLR's (the loss is the same).
    """

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        projector = MLP((encoder.feature_dim, config.hidden_dim, config.hidden_dim, config.dim), (True, True, True))
        super().__init__(encoder, projector, None, config, **widths)

    def live_targets(self, z: Tensor) -> Tensor:
        return z.detach() if self.distils else z
