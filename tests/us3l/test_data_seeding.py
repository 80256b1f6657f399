"""The counter-based generator: pinned values, independence of coordinates, uniformity."""

from __future__ import annotations

import numpy as np
import pytest

from us3l.data.seeding import Stream, keys, permutation, uniforms

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def key(seed: int, epoch: int, index: int, stream: int) -> int:
    state = 0
    for word in (seed, epoch, stream, index):
        state = mix(((state ^ (word & MASK)) + GAMMA) & MASK)
    return state


def test_mixing_function_is_splitmix64() -> None:
    # The first three outputs of the published generator with seed 0.
    assert [mix((i * GAMMA) & MASK) for i in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63])
def test_keys_and_uniforms_equal_plain_integer_arithmetic(seed: int) -> None:
    indices = np.array([0, 1, 59_999, 2**40])
    expected = [key(seed, 3, int(i), Stream.VIEW_2) for i in indices]
    assert keys(seed, 3, indices, Stream.VIEW_2).tolist() == expected
    draws = [[(mix((k + d * GAMMA) & MASK) >> 11) * 2.0**-53 for d in range(1, 6)] for k in expected]
    assert uniforms(seed, 3, indices, Stream.VIEW_2, 5).tolist() == draws


def test_numbers_do_not_depend_on_the_batch_or_on_how_many_are_drawn() -> None:
    whole = uniforms(1, 2, np.arange(100), Stream.VIEW_1, 11)
    some = np.array([70, 3, 99])
    assert np.array_equal(uniforms(1, 2, some, Stream.VIEW_1, 4), whole[some, :4])


@pytest.mark.parametrize(
    "other",
    [(2, 0, Stream.VIEW_1), (1, 1, Stream.VIEW_1), (1, 0, Stream.VIEW_2), (0, 1, Stream.VIEW_1)],
    ids=["seed", "epoch", "stream", "seed and epoch exchanged"],
)
def test_every_coordinate_gives_other_numbers(other: tuple[int, int, Stream]) -> None:
    indices = np.arange(20_000)
    a = uniforms(1, 0, indices, Stream.VIEW_1, 1)[:, 0]
    b = uniforms(other[0], other[1], indices, other[2], 1)[:, 0]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(indices))


def test_uniformity_and_independence_of_draws_and_neighbours() -> None:
    u = uniforms(0, 0, np.arange(50_000), Stream.VIEW_1, 11)
    assert u.min() >= 0 and u.max() < 1
    bound = 4.5 / np.sqrt(len(u))
    for column in u.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 2500) ** 2 / 2500).sum() < 60  # chi-square, 19 degrees of freedom: p about 1e-6
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < bound
    correlation = np.corrcoef(u.T) - np.eye(11)
    assert np.abs(correlation).max() < bound


def test_permutation() -> None:
    order = permutation(5, 0, 1000, Stream.TRAIN_ORDER)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, permutation(5, 0, 1000, Stream.TRAIN_ORDER))
    for other in (permutation(5, 1, 1000, Stream.TRAIN_ORDER), permutation(6, 0, 1000, Stream.TRAIN_ORDER)):
        assert (order == other).mean() < 0.02
    assert np.abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
