"""us3l_kernels: width-sliced ("slimmable") operations, drop-in modules, optimizers.

from us3l_kernels import nn, use_width
conv = nn.SlicedConv2d(64, 128, 3, padding=1)
with use_width(model, 0.5): y = model(x)
"""

from us3l_kernels import functional, gradients, nn, optim
from us3l_kernels.backends import backend
from us3l_kernels.convert import slim
from us3l_kernels.dense import standalone
from us3l_kernels.version import __version__
from us3l_kernels.weight_cache import invalidate
from us3l_kernels.width import set_width, use_width, views

__all__ = [
    "__version__",
    "backend",
    "functional",
    "gradients",
    "invalidate",
    "nn",
    "optim",
    "set_width",
    "slim",
    "standalone",
    "use_width",
    "views",
]
