"""The section of the GPU suite that times passes which read their width, interpreted: that it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import us3l_kernels
from benchmarks.gpu_sections import Setup, one_graph


@pytest.mark.slow
def test_section(tmp_path: Path) -> None:
    items = dict(one_graph(Setup(torch.device("cpu"), True, tmp_path)))
    with us3l_kernels.backend("triton"):
        result = items["float32 passes tiny"]()
    assert result["median_ms"].keys() == {"a graph per width", "one graph", "all in one pass"}
    assert max(result["differences"].values()) < 1e-3 and "errors" not in result
    for name in ("passes tiny", "steps at random widths tiny"):
        assert items[name]() == {"skipped": "CUDA graphs are for GPUs"}
