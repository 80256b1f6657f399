"""US3L: universally slimmable self-supervised learning: one run, one set of weights, a network per width."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from us3l.config import load as load_config
    from us3l.engine import Trainer
    from us3l.evaluation import calibrate, evaluate
    from us3l.methods import build_method
    from us3l.models import build_model
    from us3l_kernels.version import __version__

# Loaded on first use (PEP 562): the command line must not wait for torch before it can print its help.
_EXPORTS = {
    "Trainer": ("us3l.engine", "Trainer"),
    "__version__": ("us3l_kernels.version", "__version__"),
    "build_method": ("us3l.methods", "build_method"),
    "build_model": ("us3l.models", "build_model"),
    "calibrate": ("us3l.evaluation", "calibrate"),
    "evaluate": ("us3l.evaluation", "evaluate"),
    "load_config": ("us3l.config", "load"),
}

__all__ = ["Trainer", "__version__", "build_method", "build_model", "calibrate", "evaluate", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)
