"""The README's figures of speed are those of the committed results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import tables


def result(benchmark: str, *, backend: str = "auto", model: str = "resnet18", **readings: Any) -> tables.Result:
    config = {
        "model": model, "input": 32, "batch": 8, "dtype": "float32", "widths": [1.0, 0.5], "step": "joint",
        "backends": {"conv2d": backend, "linear": "auto"},
    }  # fmt: skip
    versions = {"gpu": None, "threads": 2, "cpu": "Some CPU", "cpu_capability": "AVX2", "torch": "2.10.0+cpu"}
    return {"benchmark": benchmark, **readings, "config": config, "versions": versions}


STEP = {
    "ratios": {"eager": 1.5},
    "median_ms": {"us3l": 10.0, "eager": 15.0},
    "limit": {"compute_ms": 12.0, "memory_ms": 3.0},
}


def test_readme_agrees_with_the_committed_results():
    text = tables.README.read_text(encoding="utf-8")
    assert tables.BLOCK.search(text)
    assert tables.updated(text) == text, "run `us3l bench table`"


def test_a_step_is_a_row_of_ratios():
    other = {**STEP, "ratios": {"published": 3.0}}
    text = tables.render([result("step", **STEP), result("step", model="resnet50", **other)])
    assert "| step | images per view | widths | eager | published | limit of direct convolution |" in text
    assert "| ResNet-18, 32 px, fp32 | 8 | 1 / 0.5 | 1.50x |  | 1.20x |" in text
    assert "| ResNet-50, 32 px, fp32 | 8 | 1 / 0.5 |  | 3.00x | 1.20x |" in text
    assert text.count("Taken on 2 threads of Some CPU (AVX2), torch 2.10.0.") == 1


def test_operations_are_rows_by_kind():
    means = {"conv 3x3/1, forward": 2.0, "conv 3x3/1, dX": 1.5, "conv 3x3/1, dW": 3.0,
             "norm+relu, forward": 1.2, "norm+relu, backward": 1.1}  # fmt: skip
    text = tables.render(
        [result("ops", geometric_mean_ratios=means, minimum_ratios={key: 1.0 for key in means})]
    )
    assert "| conv 3x3/1 | 2.00x (1.00x) | 1.50x (1.00x) | 3.00x (1.00x) |" in text
    assert "| norm+relu | 1.20x (1.00x) | 1.10x (1.00x) | 1.10x (1.00x) |" in text


def test_only_the_automatic_choice_of_backends_is_listed(tmp_path):
    folder = tmp_path / "cpu"
    folder.mkdir()
    for name, backend, model in [("a", "auto", "resnet50"), ("b", "aten", "resnet18"), ("c", "auto", "resnet18")]:
        (folder / f"{name}.json").write_text(json.dumps(result("step", backend=backend, model=model, **STEP)))
    assert [r["config"]["model"] for r in tables.load(folder)] == ["resnet18", "resnet50"]
    before = "text\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nmore\n"
    after = tables.updated(before, tmp_path)
    assert "old" not in after and "| ResNet-50, 32 px" in after
    assert after.startswith("text\n<!-- bench:cpu -->\n") and after.endswith("<!-- /bench:cpu -->\nmore\n")
    assert tables.updated(after, tmp_path) == after


def test_a_block_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of benchmark results"):
        tables.updated("<!-- bench:h100 -->\n<!-- /bench:h100 -->", tmp_path)


def test_readings_of_gpus_or_that_there_are_none(tmp_path):
    for folder, gpu in (("cpu", None), ("h100", "NVIDIA H100")):
        (tmp_path / folder).mkdir()
        text = "<!-- bench:gpu -->\n<!-- /bench:gpu -->"
        if gpu:
            assert "**GPU figures are not yet measured.**" in tables.updated(text, tmp_path)
        step = result("step", **STEP)
        step["versions"]["gpu"] = gpu
        (tmp_path / folder / "step.json").write_text(json.dumps(step))
        (tmp_path / folder / "part1_machine.json").write_text(json.dumps({"benchmark": "gpu", "items": {}}))
    text = tables.updated(text, tmp_path)
    assert text.count("| ResNet-18, 32 px, fp32 |") == 1 and "Taken on NVIDIA H100, torch 2.10.0." in text
    assert "not yet measured" not in text
