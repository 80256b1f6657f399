"""Which widths are trained in an iteration: the samplers of universally slimmable networks and of US3L.

A sampler owns its random generator, and nothing else draws from it: ranks that build it from the same seed
draw the same widths without talking to each other, and a resumed run continues the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from us3l.config import SamplerConfig


class WidthSampler:
    """Base of the samplers: the generator, its state, and argument checks shared by all."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, epoch: int) -> list[float]:
        """Widths of one iteration of `epoch` (from 0), largest first."""
        raise NotImplementedError

    def count(self, epoch: int) -> int:
        """Number of widths in an iteration of `epoch`."""
        raise NotImplementedError

    def average_widths(self, epochs: int) -> float:
        """Mean number of widths per iteration over the first `epochs` epochs."""
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        return sum(self.count(epoch) for epoch in range(epochs)) / epochs

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])

    def _uniform(self, low: float, n: int) -> list[float]:
        draws = torch.rand(n, generator=self._generator, dtype=torch.float64)
        return (low + (1.0 - low) * draws).tolist()


class FixedSampler(WidthSampler):
    """The same list every time (slimmable networks, Yu et al., 2019); one entry trains a network alone."""

    def __init__(self, widths: Sequence[float], seed: int = 0) -> None:
        super().__init__(seed)
        if not widths:
            raise ValueError("widths must name at least one width, got an empty list")
        for width in widths:
            _check_width("widths", width)
        if len(set(widths)) != len(widths):
            raise ValueError(f"widths must differ from each other, got {list(widths)}")
        self.widths = sorted(widths, reverse=True)

    def draw(self, epoch: int) -> list[float]:
        return list(self.widths)

    def count(self, epoch: int) -> int:
        return len(self.widths)


class UniformSampler(WidthSampler):
    """`n` independent uniform draws from [min_width, 1]."""

    def __init__(self, n: int, min_width: float, seed: int = 0) -> None:
        super().__init__(seed)
        _check_width("min_width", min_width)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.n = n
        self.min_width = min_width

    def draw(self, epoch: int) -> list[float]:
        return sorted(self._uniform(self.min_width, self.n), reverse=True)

    def count(self, epoch: int) -> int:
        return self.n


class SandwichSampler(WidthSampler):
    """The sandwich rule (Yu and Huang, 2019): width 1, the smallest width, and n - 2 uniform draws between."""

    def __init__(self, n: int, min_width: float, seed: int = 0) -> None:
        super().__init__(seed)
        _check_width("min_width", min_width)
        if n < 2:
            raise ValueError(f"n must be at least 2 (the largest and the smallest width), got {n}")
        self.n = n
        self.min_width = min_width

    def lower_bound(self, epoch: int) -> float:
        """Smallest width that `epoch` trains."""
        return self.min_width

    def draw(self, epoch: int) -> list[float]:
        low = self.lower_bound(epoch)
        if low == 1.0:
            return [1.0]
        return [1.0, *sorted(self._uniform(low, self.n - 2), reverse=True), low]

    def count(self, epoch: int) -> int:
        return 1 if self.lower_bound(epoch) == 1.0 else self.n


class DynamicSampler(SandwichSampler):
    """Dynamic sampling of US3L: the sandwich rule over a range that opens downwards in four phases.

    Phase 1 trains the full width alone; in phase q = 2, 3, 4 the smallest width is
    min_width + (4 - q) / 3 * (1 - min_width). With E >= 4 epochs, epoch e (from 0) is in phase
    floor(4 e / E) + 1: quarters, equal where E is a multiple of 4. A shorter run has the last E phases, one
    an epoch, so that every run ends with the whole range.
    """

    def __init__(self, n: int, min_width: float, epochs: int, seed: int = 0) -> None:
        super().__init__(n, min_width, seed)
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.epochs = epochs

    def phase(self, epoch: int) -> int:
        """Phase (1 to 4) of an epoch."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch must be in 0..{self.epochs - 1}, got {epoch}")
        if self.epochs < 4:
            return 4 - (self.epochs - 1 - epoch)
        return 4 * epoch // self.epochs + 1

    def lower_bound(self, epoch: int) -> float:
        phase = self.phase(epoch)
        if phase == 1:
            return 1.0
        return self.min_width + (4 - phase) / 3 * (1.0 - self.min_width)


def make_sampler(config: SamplerConfig, epochs: int, seed: int) -> WidthSampler:
    """Build the sampler that `config.kind` names; `epochs` is the length of the run."""
    if config.kind == "fixed":
        return FixedSampler(config.widths, seed)
    if config.kind == "uniform":
        return UniformSampler(config.n, config.min_width, seed)
    if config.kind == "sandwich":
        return SandwichSampler(config.n, config.min_width, seed)
    if config.kind == "dynamic":
        return DynamicSampler(config.n, config.min_width, epochs, seed)
    raise ValueError(f"sampler.kind must be dynamic, sandwich, uniform or fixed, got {config.kind!r}")


def largest_width(config: SamplerConfig) -> float:
    """Largest width that the configured sampler can draw."""
    return max(config.widths) if config.kind == "fixed" else 1.0


def _check_width(name: str, width: float) -> None:
    if not 0.0 < width <= 1.0:
        raise ValueError(f"{name}: a width must be in (0, 1], got {width}")
