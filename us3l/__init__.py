"""US3L: universally slimmable self-supervised learning: one run, one set of weights, a network per width."""

from __future__ import annotations

__version__ = "0.1.0"
