"""Feature distillation: sub-networks imitate intermediate features too, through sliced 1x1 projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from us3l.errors import ConfigError
from us3l.losses import mean_squared_error
from us3l.models import Backbone
from us3l_kernels.nn import SlicedConv2d


class FeatureDistillation(nn.Module):
    """For every stage of the backbone a 1x1 convolution from the active channels to all of the teacher's.

    The loss is the mean squared error to the teacher's features of the same view (features have places, which two views
    do not share), averaged over the stages. Source: Romero et al., 2015, "FitNets", eq. 3, with 1x1 regressors; the
    input of each is sliced, so that one serves every width.

    Raises ConfigError for a backbone without stages (a vision transformer).
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        if not encoder.stages:
            raise ConfigError(
                f"method.feature_weight: expected 0 for {type(encoder).__name__}, which has no stages with feature maps"
            )
        self.projections = nn.ModuleList(
            SlicedConv2d(channels, channels, 1, bias=False, slice_out=False) for channels in encoder.stages.values()
        )

    def forward(self, features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """features: [N, C_active, H, W] of every stage; targets: [N, C, H, W]. Returns a scalar."""
        losses = [
            mean_squared_error(projection(feature).flatten(1), target.flatten(1))
            for projection, feature, target in zip(self.projections, features, targets, strict=True)
        ]
        return torch.stack(losses).mean()


@contextmanager
def recorded(encoder: Backbone) -> Iterator[list[Tensor]]:
    """The outputs of the stages in the forward inside the context."""
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        features.append(output)

    handles = [encoder.get_submodule(name).register_forward_hook(keep) for name in encoder.stages]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
