"""US3L: universally slimmable self-supervised learning. One training run, one set of weights, a network for every width."""

from __future__ import annotations

__version__ = "0.1.0"
