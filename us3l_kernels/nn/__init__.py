"""Drop-in modules for networks of many widths: the parameters and state_dict keys of their torch.nn
namesakes."""

from us3l_kernels.nn.batch_norm import SlicedBatchNorm1d, SlicedBatchNorm2d, SwitchableBatchNorm2d, synchronise
from us3l_kernels.nn.calibration import calibrating, load_statistics, statistics
from us3l_kernels.nn.compat import SlimmableConv2d, SlimmableLinear, USBatchNorm2d, USConv2d, USLinear
from us3l_kernels.nn.conv import SlicedConv2d
from us3l_kernels.nn.conv_norm import conv_norm
from us3l_kernels.nn.layer_norm import SlicedLayerNorm
from us3l_kernels.nn.linear import SlicedLinear, SlicedQKV
from us3l_kernels.nn.residual import residual_block

__all__ = [
    "SlicedBatchNorm1d",
    "SlicedBatchNorm2d",
    "SlicedConv2d",
    "SlicedLayerNorm",
    "SlicedLinear",
    "SlicedQKV",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SwitchableBatchNorm2d",
    "USBatchNorm2d",
    "USConv2d",
    "USLinear",
    "calibrating",
    "conv_norm",
    "load_statistics",
    "residual_block",
    "statistics",
    "synchronise",
]
