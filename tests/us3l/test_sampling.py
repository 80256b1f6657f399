"""Width samplers: the rules, for every argument, and reproducibility."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from us3l.config import SamplerConfig
from us3l.sampling import (
    DynamicSampler,
    FixedSampler,
    SandwichSampler,
    UniformSampler,
    WidthSampler,
    largest_width,
    make_sampler,
)


@given(n=st.integers(2, 8), low=st.floats(0.05, 0.95), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_sandwich_draws_both_ends_and_n_minus_2_between(n: int, low: float, seed: int) -> None:
    widths = SandwichSampler(n, low, seed).draw(0)
    assert len(widths) == n
    assert widths[0] == 1.0 and widths[-1] == low
    assert widths == sorted(widths, reverse=True)
    assert all(low <= width <= 1.0 for width in widths)


def test_sandwich_covers_the_range_evenly() -> None:
    sampler = SandwichSampler(3, 0.25, seed=0)
    middle = torch.tensor([sampler.draw(0)[1] for _ in range(4000)])
    counts = torch.histc(middle, 10, 0.25, 1.0)
    assert counts.min() > 320 and counts.max() < 480


@given(epochs=st.integers(1, 40), n=st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_dynamic_opens_the_range_downwards(epochs: int, n: int) -> None:
    sampler = DynamicSampler(n, 0.25, epochs)
    bounds = [sampler.draw(epoch)[-1] for epoch in range(epochs)]
    assert bounds == sorted(bounds, reverse=True)
    assert set(bounds) <= {1.0, 0.75, 0.5, 0.25}
    assert bounds[-1] == 0.25  # every run, however short, ends with the whole range
    for epoch in range(epochs):
        widths = sampler.draw(epoch)
        assert widths[0] == 1.0
        assert len(widths) == (1 if widths[-1] == 1.0 else n) == sampler.count(epoch)


@pytest.mark.parametrize("epochs", [4, 8, 20, 400])
def test_dynamic_has_four_equal_phases(epochs: int) -> None:
    sampler = DynamicSampler(3, 0.25, epochs)
    phases = [sampler.phase(epoch) for epoch in range(epochs)]
    assert phases == [q for q in (1, 2, 3, 4) for _ in range(epochs // 4)]
    assert sampler.average_widths(epochs) == 2.5


@pytest.mark.parametrize(("epochs", "phases"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (6, [1, 1, 2, 3, 3, 4])])
def test_dynamic_phases_of_other_lengths(epochs: int, phases: list[int]) -> None:
    sampler = DynamicSampler(3, 0.25, epochs)
    assert [sampler.phase(epoch) for epoch in range(epochs)] == phases


def test_dynamic_bounds_follow_the_smallest_width() -> None:
    sampler = DynamicSampler(2, 0.4, 4)
    assert [sampler.draw(epoch)[-1] for epoch in range(4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_fixed_and_uniform() -> None:
    assert FixedSampler([0.5, 1.0, 0.25]).draw(7) == [1.0, 0.5, 0.25]
    assert FixedSampler([0.25]).draw(0) == [0.25]
    widths = UniformSampler(5, 0.3, seed=1).draw(0)
    assert len(set(widths)) == 5 and all(0.3 <= width <= 1.0 for width in widths)
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("kind", ["dynamic", "sandwich", "uniform", "fixed"])
def test_samplers_repeat_and_resume(kind: str) -> None:
    config = SamplerConfig(kind=kind, n=4)

    def make(seed: int) -> WidthSampler:
        return make_sampler(config, 4, seed)

    one, other = make(3), make(3)
    torch.rand(100)  # the global generator has no part in it
    assert [one.draw(e) for e in (1, 2, 3)] == [other.draw(e) for e in (1, 2, 3)]
    state = one.state_dict()
    resumed = make(99)
    resumed.load_state_dict(state)
    assert [one.draw(3) for _ in range(5)] == [resumed.draw(3) for _ in range(5)]
    if kind != "fixed":
        assert make(4).draw(3) != make(5).draw(3)


def test_largest_width() -> None:
    assert largest_width(SamplerConfig(kind="fixed", widths=[0.25, 0.5])) == 0.5
    assert largest_width(SamplerConfig(kind="dynamic", widths=[0.5])) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SandwichSampler(1, 0.25), "n must be at least 2.*got 1"),
        (lambda: UniformSampler(0, 0.25), "n must be at least 1, got 0"),
        (lambda: SandwichSampler(3, 0.0), r"min_width: a width must be in \(0, 1\], got 0.0"),
        (lambda: FixedSampler([]), "at least one width"),
        (lambda: FixedSampler([1.0, 1.5]), "widths: a width must be in"),
        (lambda: FixedSampler([0.5, 0.5]), "must differ"),
        (lambda: DynamicSampler(3, 0.25, 0), "epochs must be at least 1, got 0"),
        (lambda: DynamicSampler(3, 0.25, 8).draw(8), r"epoch must be in 0..7, got 8"),
        (lambda: FixedSampler([1.0]).average_widths(0), "epochs must be at least 1"),
        (lambda: make_sampler(SamplerConfig(kind="nested"), 4, 0), "sampler.kind.*'nested'"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
