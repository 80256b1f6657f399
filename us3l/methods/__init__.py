"""The self-supervised methods, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from us3l.methods.base import GUIDELINES, Method, StepOutput
from us3l.methods.byol import BYOL
from us3l.methods.simclr import SimCLR
from us3l.methods.simsiam import SimSiam
from us3l.models import build_model
from us3l.sampling import largest_width

if TYPE_CHECKING:
    from us3l.config import Config

METHODS = {"simsiam": SimSiam, "simclr": SimCLR, "byol": BYOL}


def build_method(config: Config) -> Method:
    """Build the configured backbone and the method around it."""
    if config.method.name not in METHODS:
        raise ValueError(f"method.name must be one of {', '.join(METHODS)}, got {config.method.name!r}")
    model, sampler = config.model, config.sampler
    assert model.in_channels is not None  # Config fills it in
    encoder = build_model(
        model.name,
        stem=model.stem,
        in_channels=model.in_channels,
        divisor=model.divisor,
        norm=model.norm,
        widths=sampler.widths if model.norm == "switchable" else None,
        base_channels=model.base_channels,
    )
    return METHODS[config.method.name](
        encoder,
        config.method,
        largest_width=largest_width(sampler),
        slimmable=sampler.kind != "fixed" or len(sampler.widths) > 1,
    )


__all__ = ["BYOL", "GUIDELINES", "METHODS", "Method", "SimCLR", "SimSiam", "StepOutput", "build_method"]
