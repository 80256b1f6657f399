"""Collapse measures on embeddings whose answer is known."""

from __future__ import annotations

import pytest
import torch

from us3l.evaluation import effective_rank, spread


def test_spread_is_one_on_the_whole_sphere_and_zero_in_one_point() -> None:
    z = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert spread(z) == pytest.approx(1.0, abs=0.01)
    assert spread(torch.ones(50, 64) * torch.rand(50, 1).add(0.1)) == pytest.approx(0.0, abs=1e-4)


def test_spread_sees_a_common_offset() -> None:
    z = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    # |offset|^2 equals |z|^2 on average: half of the energy is common, and std falls to sqrt(1/2).
    assert spread(z + 1.0) == pytest.approx(0.5**0.5, abs=0.02)


def test_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    coefficients = torch.linalg.qr(torch.randn(500, 33, generator=generator)).Q
    coefficients -= coefficients.mean(0)
    for rank in (1, 5, 32):
        z = coefficients[:, :rank] @ basis[:rank] + 7.0  # an offset is no direction
        assert effective_rank(z) == pytest.approx(rank, rel=0.02)
    assert effective_rank(torch.ones(10, 4)) == 0.0


def test_effective_rank_is_scale_free_and_follows_the_entropy() -> None:
    z = torch.zeros(400, 2)
    z[0::4, 0], z[1::4, 0], z[2::4, 1], z[3::4, 1] = 3.0, -3.0, 1.0, -1.0  # singular values 3 : 1
    share = torch.tensor([0.75, 0.25])
    expected = float((-(share * share.log()).sum()).exp())
    assert effective_rank(z) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(1e-3 * z) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("measure", [spread, effective_rank])
def test_bad_shape_is_named(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="n >= 2, d"):
        measure(torch.randn(1, 8))
