"""SimSiam (Chen and He, 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from us3l.methods.base import Method
from us3l.methods.heads import MLP, prediction_head

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class SimSiam(Method):
    """A predictor, and as its target the network's own projections of the other view, without gradient.

    The projector ends in a batch norm without affine parameters. `target="live"`, `base_loss="cosine"` is the
    published method; with `target="momentum"` the targets are the teacher's. Without the auxiliary head,
    sub-networks are distilled through the predictor of the base loss, which is the S-Net with in-place
    distillation of the paper.
    """

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        projector = MLP(
            (encoder.feature_dim, config.hidden_dim, config.hidden_dim, config.dim),
            (False, False, False),  # a batch norm follows each layer
            final_norm=True,
        )
        predictor = prediction_head(config.dim, config.predictor_hidden or config.hidden_dim)
        super().__init__(encoder, projector, predictor, config, **widths)
