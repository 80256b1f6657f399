"""Optimizers with the group regularisation of US3L inside the update, and the moving average of a teacher."""

from us3l_kernels.optim.adamw import AdamW
from us3l_kernels.optim.ema import EMA
from us3l_kernels.optim.lars import LARS
from us3l_kernels.optim.sgd import SGD

__all__ = ["EMA", "LARS", "SGD", "AdamW"]
