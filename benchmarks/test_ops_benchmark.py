"""`pytest benchmarks`: the operations of the small network in pytest-benchmark's tables, sides in one group."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import ops
from benchmarks.rivals import Settings

SETTINGS = Settings(model="resnet_tiny", hidden_dim=256, dim=64, widths=(1.0, 0.5))
BATCH, SIZE = 64, 32


@pytest.mark.parametrize("side", ["us3l", "eager"])
@pytest.mark.parametrize(
    ("case", "direction"),
    [
        pytest.param(case, direction, id=f"{case.name}, width {case.width:g}, {direction}")
        for case in ops.cases(SETTINGS, SIZE)
        for direction in case.directions
    ],
)
def test_operation(benchmark: BenchmarkFixture, case: ops.Case, direction: str, side: str) -> None:
    torch.set_num_threads(2)
    work = ops.compare(case, direction, batch=BATCH, settings=SETTINGS).work
    benchmark.group = f"{case.name}, width {case.width:g}, {direction}"
    benchmark(work[side])
