"""Backend `reference`: the formulas of `us3l_kernels.reference` as they stand there."""

from __future__ import annotations

from us3l_kernels import reference
from us3l_kernels.backends import Backend


class ReferenceBackend(Backend):
    name = "reference"

    conv2d = staticmethod(reference.conv2d)
    conv2d_backward = staticmethod(reference.conv2d_backward)
    linear = staticmethod(reference.linear)
    linear_backward = staticmethod(reference.linear_backward)
    batch_norm = staticmethod(reference.batch_norm)
    batch_norm_backward = staticmethod(reference.batch_norm_backward)
    layer_norm = staticmethod(reference.layer_norm)
    layer_norm_backward = staticmethod(reference.layer_norm_backward)
