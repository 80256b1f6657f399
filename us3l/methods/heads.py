"""Projector and predictor: the MLPs behind the encoder.

Only the projector's first layer is sliced, in its input; everything after it is shared by all widths at full
size. Norms use batch statistics (heads are not used after pre-training) and see the views apart
(`us3l_kernels.views`).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from us3l_kernels.nn import SlicedBatchNorm1d, SlicedLinear


def _linear(in_features: int, out_features: int, bias: bool) -> SlicedLinear:
    return SlicedLinear(in_features, out_features, bias, slice_out=False)


def _norm(features: int) -> SlicedBatchNorm1d:
    return SlicedBatchNorm1d(features, track_running_stats=False, activation="relu")


class Projector(nn.Sequential):
    """Three linear layers: features [N, C_active] to projections [N, dim].

    The layers are named 0, 1, 3, 4, 6 as in the published code, which has a ReLU of its own at 2 and 5.

    Args:
        biases: which of the three linear layers have a bias.
        final_norm: a batch norm without affine parameters behind the last layer (SimSiam), named 7.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        dim: int,
        *,
        biases: tuple[bool, bool, bool],
        final_norm: bool = False,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["0"] = _linear(feature_dim, hidden_dim, biases[0])
        layers["1"] = _norm(hidden_dim)
        layers["3"] = _linear(hidden_dim, hidden_dim, biases[1])
        layers["4"] = _norm(hidden_dim)
        layers["6"] = _linear(hidden_dim, dim, biases[2])
        if final_norm:
            layers["7"] = SlicedBatchNorm1d(dim, affine=False, track_running_stats=False)
        super().__init__(layers)

    def before_norm(self, features: Tensor) -> Tensor:
        """Projections [N, dim] before the final norm, if any: where a collapse can be seen."""
        for name, layer in self.named_children():
            if name != "7":
                features = layer(features)
        return features

    def norm(self, projections: Tensor) -> Tensor:
        """The final norm; the identity without one."""
        final = dict(self.named_children()).get("7")
        return projections if final is None else final(projections)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.before_norm(features))


class Predictor(nn.Sequential):
    """Two linear layers: projections [N, dim] to predictions [N, dim]; named 0, 1, 3."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(
            OrderedDict(
                [
                    ("0", _linear(dim, hidden_dim, False)),
                    ("1", _norm(hidden_dim)),
                    ("3", _linear(hidden_dim, dim, True)),
                ]
            )
        )
