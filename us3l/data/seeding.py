"""Random numbers that depend on their coordinates alone: (seed, epoch, sample index, stream, draw).

A counter-based generator keeps no state, so a sample's augmentation is the same whatever batch, worker,
process or resumed run it is made in (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
The mixing function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What the numbers are for. The values are part of every run's randomness: never renumber."""

    VIEW_1 = 0
    VIEW_2 = 1
    TRAIN_ORDER = 2
    LINEAR_VIEW = 3
    LINEAR_ORDER = 4
    SUBSET = 5
    ITERATION = 6
    SHARD_ORDER = 7


def _mix(z: UInt64Array) -> UInt64Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keys(seed: int, epoch: int, indices: IndexArray, stream: Stream) -> UInt64Array:
    """One 64-bit key per sample index, shape [n]."""
    key = np.zeros(len(indices), np.uint64)
    for word in (np.uint64(seed & _MASK), np.uint64(epoch), np.uint64(stream), indices.astype(np.uint64)):
        key = _mix((key ^ word) + _GAMMA)
    return key


def uniforms(seed: int, epoch: int, indices: IndexArray, stream: Stream, draws: int) -> FloatArray:
    """Uniform numbers in [0, 1), float64 [n, draws]; column d is the same for any number of draws > d."""
    counters = np.arange(1, draws + 1, dtype=np.uint64) * _GAMMA
    bits = _mix(keys(seed, epoch, indices, stream)[:, None] + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def iteration_seed(seed: int, step: int, rank: int) -> int:
    """For the global generators in iteration `step` of process `rank`: every process has numbers of its own."""
    return int(keys(seed, step, np.array([rank]), Stream.ITERATION)[0])


def permutation(seed: int, epoch: int, n: int, stream: Stream) -> IndexArray:
    """A random order of range(n), int64 [n]."""
    return np.argsort(keys(seed, epoch, np.arange(n), stream), kind="stable")
