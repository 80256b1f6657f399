"""The measuring harness: turns, medians, ratios, and no time without equal results."""

from __future__ import annotations

import json
import math
import os
import platform
import sys

import pytest
import torch

from benchmarks import harness


def test_sides_take_turns_and_see_the_same_round():
    calls = []
    samples = harness.interleave(
        {"a": lambda turn: calls.append(("a", turn)), "b": lambda turn: calls.append(("b", turn))},
        rounds=2,
        warmup=1,
    )
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


def test_waits_for_the_device_before_both_readings_of_the_clock():
    order = []
    harness.interleave(
        {"a": lambda _: order.append("work")}, rounds=1, warmup=0, synchronise=lambda: order.append("wait")
    )
    assert order == ["wait", "work", "wait"]


def test_stops_after_the_seconds_given_but_measures_a_few_rounds():
    samples = harness.interleave({"a": lambda _: None}, rounds=50, warmup=1, seconds=0)
    assert len(samples["a"]) == harness.FEWEST_ROUNDS
    assert len(harness.interleave({"a": lambda _: None}, rounds=2, warmup=0, seconds=0)["a"]) == 2


def test_peaks_are_of_products_and_convolutions(monkeypatch):
    monkeypatch.setattr(harness, "_best", lambda work, device: work() is None or 1e-3)
    rates = harness.peaks(torch.bfloat16, torch.device("cpu"))
    assert rates["matrix product"] == pytest.approx(2 * 2048**3 * 1e3)
    assert rates["convolution"] == pytest.approx(2 * 32 * 256 * 256 * 256 * 9 * 1e3)


def test_a_report_says_what_was_measured_and_where():
    result = harness.report("step", {"batch": 2}, torch.device("cpu"), ratios={"eager": 1.0})
    assert result["benchmark"] == "step" and result["ratios"] == {"eager": 1.0}
    assert result["config"]["batch"] == 2 and result["config"]["backends"]["conv2d"] == "auto"
    assert result["versions"]["torch"] == torch.__version__


def test_no_rounds_is_an_error():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        harness.interleave({}, rounds=0, warmup=1)


def test_summary_is_of_medians():
    result = harness.summarise({"us3l": [0.001, 0.002, 0.009], "eager": [0.003, 0.004, 0.005]}, subject="us3l")
    assert result["median_ms"] == {"us3l": 2.0, "eager": 4.0}
    assert result["ratios"] == {"eager": 2.0}
    assert result["spread"]["eager"] == pytest.approx({"q1": 3.5, "q3": 4.5, "iqr": 1.0})
    assert result["samples_ms"]["us3l"] == [1.0, 2.0, 9.0]


def test_summary_of_a_single_round():
    result = harness.summarise({"us3l": [0.002]}, subject="us3l")
    assert result["spread"]["us3l"] == {"q1": 2.0, "q3": 2.0, "iqr": 0.0}


def test_equal_results_give_the_largest_error():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    given = {"a": torch.tensor([3.0, 4.5]), "b": torch.zeros(2)}
    assert harness.require_equal("x", given, expected, 0.2) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [5.0, math.nan, math.inf])
def test_different_results_are_an_error(wrong):
    with pytest.raises(harness.Mismatch, match="step: a differs by .* allowed are 1e-03"):
        harness.require_equal("step", {"a": torch.tensor(wrong)}, {"a": torch.tensor(1.0)}, 1e-3)


def test_different_names_are_an_error():
    with pytest.raises(harness.Mismatch, match=r"different tensors: \['b'\]"):
        harness.require_equal("step", {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)}, 1.0)


def test_an_error_is_told_with_those_below_it():
    """As torch.cuda.graph raises when a capture cannot be ended: what has spoilt it is the context of that."""
    with pytest.raises(RuntimeError) as raised:
        try:
            raise ValueError("a copy to the host\nmore of it")
        except ValueError:
            raise RuntimeError("the capture failed")  # noqa: B904
    assert harness.told(raised.value) == "RuntimeError: the capture failed <- ValueError: a copy to the host"
    assert harness.told(KeyError("missing")) == "KeyError: 'missing'"


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for a GPU that is in order."""
    ones = torch.ones
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: "default")
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))
    return torch.device("cuda")


def failing(*_):
    raise RuntimeError("an illegal memory access was encountered\nCompile with ...")


@pytest.mark.parametrize("call", ["synchronize", "empty_cache"])
def test_a_gpu_is_broken_if_nothing_more_can_be_computed(gpu, call, monkeypatch):
    assert harness.why_broken(gpu) is None
    with pytest.raises(ZeroDivisionError), harness.charged_to("a side", gpu):
        _ = 1 / 0
    monkeypatch.setattr(torch.cuda, call, failing)
    assert harness.why_broken(gpu) == "RuntimeError: an illegal memory access was encountered"
    assert harness.why_broken(torch.device("cpu")) is None
    with pytest.raises(harness.Broken) as raised, harness.charged_to("a side", gpu):
        _ = 1 / 0
    assert raised.value.side == "a side" and isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_gpu_is_broken_if_a_capture_has_left_its_stream(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "of a graph")
    assert "stream" in harness.why_broken(gpu)
    assert harness.why_broken(gpu, "of a graph") is None


def test_breakdown_sorts_operators_into_parts():
    x, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    parts = harness.breakdown(lambda: torch.conv2d(x, weight))
    assert set(parts) == {*harness.PARTS, "other"}
    assert parts["convolution"] > 0.5 * sum(parts.values())
    assert parts["norm"] == parts["update"] == 0


def test_environment_and_json(tmp_path):
    versions = harness.environment(torch.device("cpu"))
    assert versions["torch"] == torch.__version__
    assert versions["threads"] == torch.get_num_threads()
    assert versions["cpu"] and versions["commit"]
    harness.write_json(tmp_path / "new" / "result.json", {"versions": versions})
    assert json.loads((tmp_path / "new" / "result.json").read_text())["versions"] == versions


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_allocator_is_fixed_by_one_restart_with_the_same_arguments(monkeypatch):
    restarts = []
    monkeypatch.setattr(os, "execve", lambda *arguments: restarts.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks", "step"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    harness.fix_allocator()
    ((program, arguments, environment),) = restarts
    assert (program, arguments) == (sys.executable, [sys.executable, "-m", "benchmarks", "step"])
    assert environment == os.environ | {"GLIBC_TUNABLES": harness.ALLOCATOR}

    monkeypatch.setenv("GLIBC_TUNABLES", harness.ALLOCATOR)
    harness.fix_allocator()
    assert len(restarts) == 1
