"""A method of one's own: Barlow Twins, slimmable, in one class that the trainer finds by its name.

    PYTHONPATH=examples us3l pretrain method.name=own_method:BarlowTwins method.options.off_diagonal=0.005 \\
        method.target=live method.distillation=cosine

Everything else is us3l's: widths, distillation of sub-networks through the auxiliary head, checkpoints, evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from us3l.config import MethodConfig
from us3l.methods import Method
from us3l.methods.heads import MLP
from us3l.models import Backbone


class BarlowTwins(Method):
    """The cross-correlation of two views' projections shall be the identity (Zbontar et al., 2021, eq. 1).

    method.options.off_diagonal: weight of the terms off the diagonal.
    """

    kinds_of_target = ("momentum", "live")

    def __init__(self, encoder: Backbone, config: MethodConfig, **widths: Any) -> None:
        sizes = (encoder.feature_dim, config.hidden_dim, config.hidden_dim, config.dim)
        super().__init__(encoder, MLP(sizes, (False, False, False), final_norm=True), None, config, **widths)
        self.off_diagonal = float(config.options.get("off_diagonal", 0.005))

    def base_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """predictions, targets: [N, D], one view each; the projector's last norm has standardised them."""
        correlation = predictions.float().T @ targets.float() / len(predictions)  # [D, D]
        weights = torch.full_like(correlation, self.off_diagonal).fill_diagonal_(1.0)
        return (weights * (correlation - torch.eye(len(correlation), device=correlation.device)).square()).sum()

    def live_targets(self, z: Tensor) -> Tensor:
        """Gradients flow through both views, unless the projections are also what sub-networks learn from."""
        return z.detach() if self.distils else z
