"""The forward benchmark: its sides agree before they are timed, and its result says what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import harness, inference
from benchmarks.rivals import Settings
from us3l.models import build_model
from us3l.profile import profile

SETTINGS = Settings(model="resnet_tiny", stem="cifar", widths=(1.0, 0.5))


def test_result_has_every_width_batch_and_side() -> None:
    with torch.random.fork_rng():
        result = inference.measure(SETTINGS, size=8, batches=[1, 3], rounds=2)
    rows = result["rows"]
    assert [(row["batch"], row["width"]) for row in rows] == [(1, 1.0), (1, 0.5), (3, 1.0), (3, 0.5)]
    (cost,) = profile(build_model("resnet_tiny", stem="cifar"), (3, 8, 8), [0.5])
    for row in rows:
        assert set(row["median_ms"]) == set(inference.SIDES) and min(row["median_ms"].values()) > 0
        full = next(r for r in rows if r["batch"] == row["batch"] and r["width"] == 1.0)
        for side in inference.SIDES:
            assert row["faster"][side] == full["median_ms"][side] / row["median_ms"][side]
    assert rows[1]["macs"] == cost.macs and result["config"]["batches"] == [1, 3]


def test_nothing_is_timed_where_the_sides_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    standalone = inference.standalone

    def wrong(*arguments: Any) -> Any:
        dense = standalone(*arguments)
        with torch.no_grad():
            dense.bn1.bias += 0.1
        return dense

    monkeypatch.setattr(inference, "standalone", wrong)
    monkeypatch.setattr(harness, "interleave", lambda *_, **__: pytest.fail("timed"))
    with torch.random.fork_rng(), pytest.raises(harness.Mismatch, match="sliced, width 1: features differs"):
        inference.measure(SETTINGS, size=8, batches=[1], rounds=2)
