"""Projectors and predictors: the MLPs behind the encoder.

Only the first layer of a projector is sliced, in its input; everything after it is shared by all widths at full
size. Norms use batch statistics (heads are not used after pre-training) and see the views apart
(`us3l_kernels.views`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from us3l_kernels.nn import SlicedBatchNorm1d, SlicedLinear


class MLP(nn.Sequential):
    """Linear layers with a batch norm and a ReLU between them: features [N, C_active] to [N, sizes[-1]].

    The layers are named as in the published codes, which have a ReLU of their own behind each hidden norm:
    0, 1, 3, 4, 6 for three linear layers, or 0, 2 for two without norms.

    Args:
        sizes: features of the input, of the hidden layers and of the output.
        biases: which of the linear layers have a bias.
        norms: False leaves out the batch norms.
        final_norm: a batch norm without affine parameters behind the last layer.
    """

    def __init__(
        self, sizes: Sequence[int], biases: Sequence[bool], *, norms: bool = True, final_norm: bool = False
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        index = 0
        for i, (inputs, outputs, bias) in enumerate(zip(sizes, sizes[1:], biases, strict=False)):
            layers[str(index)] = SlicedLinear(inputs, outputs, bias, slice_out=False)
            if i == len(sizes) - 2:
                break
            if norms:
                layers[str(index + 1)] = SlicedBatchNorm1d(outputs, track_running_stats=False, activation="relu")
            else:
                layers[str(index + 1)] = nn.ReLU()
            index += 3 if norms else 2
        super().__init__(layers)
        self.final_norm_name: str | None = None
        if final_norm:
            self.final_norm_name = str(index + 1)
            self.add_module(self.final_norm_name, SlicedBatchNorm1d(sizes[-1], affine=False, track_running_stats=False))

    def before_norm(self, features: Tensor) -> Tensor:
        """Outputs [N, sizes[-1]] before the final norm, if any: where a collapse can be seen."""
        for name, layer in self.named_children():
            if name != self.final_norm_name:
                features = layer(features)
        return features

    def norm(self, outputs: Tensor) -> Tensor:
        """The final norm; the identity without one."""
        return outputs if self.final_norm_name is None else self.get_submodule(self.final_norm_name)(outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.before_norm(features))


def prediction_head(dim: int, hidden_dim: int) -> MLP:
    """The head of BYOL and SimSiam, and the auxiliary head of US3L: two layers, projections to predictions."""
    return MLP((dim, hidden_dim, dim), (False, True))
