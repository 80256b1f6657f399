"""Random widths, memory, scaling, loading and communication of a step: tiny ones, for the form of the results."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from benchmarks import communication, data, memory, scaling, step, tables, widths
from benchmarks.rivals import Settings

TINY = Settings(model="resnet_tiny", hidden_dim=32, dim=16, widths=(1.0, 0.25))


def test_random_widths_beside_a_fixed_one_of_equal_operations():
    result = widths.measure(TINY, size=8, batch=4, steps=3)
    fixed = result["config"]["widths"][1]
    drawn = result["random_widths"]
    assert len(set(drawn)) == 3 and min(drawn) >= 0.25 and max(drawn) < 1
    *macs, middle = step.encoder_macs(TINY, 8, [*drawn, fixed])
    assert middle == pytest.approx(sum(macs) / 3, rel=0.1)
    for phase in ("cold", "warm"):
        samples = result[phase]["samples_ms"]
        assert len(samples["random"]) == len(samples["fixed"]) == 3
        per_mac = {name: sum(times) / result["macs_per_image"][name] for name, times in samples.items()}
        assert result["ratios"][phase] == pytest.approx(per_mac["random"] / per_mac["fixed"])
    assert "of equal operations" in tables.render([result])


def test_macs_of_a_step_are_those_of_its_layers():
    full, half = step.encoder_macs(TINY, 8, [1.0, 0.5])
    stem, first = 3 * 16 * 9 * 64, 2 * 16 * 16 * 9 * 64
    second, third = ((c * 2 * c * 9 + 4 * c * c * 9 + c * 2 * c) * pixels for c, pixels in ((16, 16), (32, 4)))
    projector = 64 * 32 + 32 * 32 + 32 * 16
    assert full == stem + first + second + third + projector
    assert half < full / 2


@pytest.mark.slow
def test_compiled_steps_of_random_widths_are_counted():
    result = widths.measure(TINY, size=8, batch=4, steps=2, rivals=["compile"], rival_seconds=1e-3)
    assert result["compile"]["fixed"]["graphs"] > 0
    assert len(result["compile"]["random"]["seconds"]) == 1


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize("name", ["us3l", pytest.param("eager", marks=pytest.mark.slow)])
def test_memory_of_a_side(name):
    # A process of its own, as `measure` has one: in this one freed memory may lie ready.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        side = pool.submit(memory.side_readings, name, TINY, size=32, batch=32, stacked=True, threads=1)
        readings = side.result()
    # At least the weights' gradients and the first activation of both views, [64, 16, 32, 32] in float32: 4 MB.
    assert readings["peak_mb"] > 4
    assert readings["peak_mb"] >= readings["made_mb"]
    assert (readings["weight_cache_mb"] > 0) <= (name == "us3l")


@linux
@pytest.mark.slow
def test_memory_is_read_in_a_process_of_each_side(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.top_pad=1")
    result = memory.measure(TINY, size=32, batch=16, rivals=["eager"])
    assert result["versions"]["allocator"] is None
    own, eager = result["readings"]["us3l"], result["readings"]["eager"]
    assert result["ratios"]["eager"] == pytest.approx(eager["peak_mb"] / (own["peak_mb"] - own["weight_cache_mb"]))
    assert "| of eager's |" in tables.render([result])


def test_scaling_is_timed_at_every_point_and_plotted(tmp_path):
    result = scaling.measure(TINY, size=8, batch=4, widths=[1.0, 0.5], batches=[2], sizes=[8, 12], rounds=2)
    points = {(point["axis"], point["value"]): point for point in result["points"]}
    assert list(points) == [("width", 1.0), ("width", 0.5), ("batch", 2), ("input", 8), ("input", 12)]
    # student forward and backward, teacher forward: four forwards' worth of two views
    (macs,) = step.encoder_macs(TINY, 8, [1.0])
    assert points["width", 1.0]["gflop"] == pytest.approx(2 * 4 * 2 * 4 * macs / 1e9)
    assert points["batch", 2]["gflop"] == pytest.approx(points["width", 1.0]["gflop"] / 2)
    assert all(point["q1"] <= point["median_ms"] <= point["q3"] for point in result["points"])
    scaling.plot(result, tmp_path / "new" / "scaling.svg")
    assert (tmp_path / "new" / "scaling.svg").read_text().startswith("<?xml")


def test_a_single_width_needs_no_auxiliary_head():
    settings = replace(TINY, widths=(1.0,))
    images = step.random_images(settings, size=8, batch=4)[0]
    side = step.US3L(settings, step.initial_weights(settings), policy="joint")
    assert torch.isfinite(side.step(images)).all()


def test_every_way_of_loading_is_timed_beside_the_step():
    result = data.measure(TINY, size=16, batch=4, workers=[0], images=8, seconds=0.01)
    ways = [(row["path"], row["augment_on"]) for row in result["rows"]]
    assert ways == [(path, on) for path in ("image_folder", "shards") for on in ("workers", "device")] + [
        ("memory", "device")
    ]
    assert all(row["images_per_second"] > 0 for row in [*result["rows"], result["step"]])


@pytest.mark.slow
def test_one_reduction_sends_a_share_of_one_for_every_width():
    settings = replace(TINY, widths=(1.0, 0.5, 0.25), hidden_dim=256)  # weights that outweigh the messages' headers
    result = communication.measure(settings, size=16, batch=4, processes=2, steps=1)
    sent = result["readings"]["us3l"]["sent_bytes"]
    assert sent == pytest.approx(result["readings"]["us3l"]["weight_bytes"], rel=0.05)
    assert result["ratios"]["ddp"] == pytest.approx(3, rel=0.05)
