"""What the rest of the package knows of a backbone."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network from images to pooled features, and a head behind it.

    Attributes:
        feature_dim: channels of the pooled features at width 1.0.
        fc: the head: a classifier, a projector, or the identity.
        stages: the modules whose outputs [N, C_active, H, W] are the features of each resolution, and their channels
            at width 1.0; empty for a vision transformer, which has one resolution and no maps.
        residual_sums: the layers whose outputs meet in a sum, which a width plan must keep equal.
    """

    feature_dim: int
    fc: nn.Module
    stages: dict[str, int]
    residual_sums: list[list[str]]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to pooled features [N, active channels]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The head's output for images [N, C, H, W]."""
        return self.fc(self.forward_features(x))
