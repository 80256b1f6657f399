"""The methods, one file each; `method.name=module:Class` takes one from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from us3l.errors import ConfigError
from us3l.methods.base import GUIDELINES, Method, StepOutput
from us3l.methods.byol import BYOL
from us3l.methods.dino import DINO
from us3l.methods.moco_v2 import MoCoV2
from us3l.methods.moco_v3 import MoCoV3
from us3l.methods.seed import SEED
from us3l.methods.simclr import SimCLR
from us3l.methods.simsiam import SimSiam
from us3l.methods.supervised import Supervised
from us3l.models import build_model
from us3l.sampling import largest_width

if TYPE_CHECKING:
    from us3l.config import Config

METHODS: dict[str, Callable[..., Method]] = {
    "simsiam": SimSiam,
    "simclr": SimCLR,
    "byol": BYOL,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "dino": DINO,
    "seed": SEED,
    "supervised": Supervised,
}


def build_method(config: Config) -> Method:
    """Build the configured backbone and the method around it."""
    method = _method_class(config.method.name)
    model, sampler = config.model, config.sampler
    assert model.in_channels is not None  # Config fills it in
    encoder = build_model(
        model.name,
        stem=model.stem,
        num_classes=model.num_classes,
        in_channels=model.in_channels,
        divisor=model.divisor,
        norm=model.norm,
        widths=sampler.widths if model.norm == "switchable" else None,
        base_channels=model.base_channels,
        slicing=model.slicing,
        patch_size=model.patch_size,
        image_size=model.image_size,
    )
    return method(
        encoder,
        config.method,
        largest_width=largest_width(sampler),
        slimmable=sampler.kind != "fixed" or len(sampler.widths) > 1,
    )


def _method_class(name: str) -> Callable[..., Method]:
    if ":" not in name:
        if name not in METHODS:
            raise ValueError(f"method.name must be one of {', '.join(METHODS)}, or module:Class, got {name!r}")
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.name: cannot import {name}: {error}. Is its folder in PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method.name: {name} is no subclass of us3l.methods.Method")
    return found


__all__ = [
    "BYOL", "DINO", "GUIDELINES", "METHODS", "Method", "MoCoV2", "MoCoV3", "SEED", "SimCLR", "SimSiam",
    "StepOutput", "Supervised", "build_method",
]  # fmt: skip
