"""BYOL (Grill et al., 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from us3l.methods.base import Method
from us3l.methods.heads import MLP, prediction_head

if TYPE_CHECKING:
    from us3l.config import MethodConfig
    from us3l.models import Backbone


class BYOL(Method):
    """A predictor, and as its target the projections of a momentum teacher for the other view.

    `target="momentum"`, `base_loss="cosine"` is the published method. Sub-networks are distilled through the
    auxiliary head, a second predictor, or through the first without it.
    """

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        projector = MLP((encoder.feature_dim, config.hidden_dim, config.hidden_dim, config.dim), (True, False, True))
        predictor = prediction_head(config.dim, config.predictor_hidden or config.hidden_dim)
        super().__init__(encoder, projector, predictor, config, **widths)
