"""us3l.search: plans that keep to the budget, from a seed, out of a file that survives a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from us3l import cli
from us3l.config import DataConfig
from us3l.data import Data, make_data
from us3l.errors import CheckpointError, ConfigError
from us3l.models import Backbone, build_model
from us3l.profile import profile
from us3l.search import Budget, Search, latency_ms, pareto_front, width_groups
from us3l_kernels import use_width
from us3l_kernels.nn import SlicedLinear, statistics


@pytest.fixture(scope="module")
def data() -> Data:
    return make_data(DataConfig(name="random", size=8, train_samples=40, test_samples=10, batch_size=8), seed=0)


@pytest.fixture(scope="module")
def model() -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model("resnet_tiny", stem="small", divisor=4)


def macs(model: Backbone, data: Data, plan: dict[str, float]) -> int:
    twin = build_model("resnet_tiny", stem="small", divisor=4)
    twin.fc = SlicedLinear(model.feature_dim, data.num_classes, slice_out=False)
    return profile(twin, (3, 8, 8), [plan])[0].macs


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("resnet18", [["conv1", "layer1"], ["layer2"], ["layer3"], ["layer4"]]),
        ("resnet50", [["conv1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]),
    ],
)
def test_groups_are_stages(name: str, groups: list[list[str]]) -> None:
    assert width_groups(build_model(name)) == groups


def test_groups_of_a_vision_transformer_are_its_blocks_where_sums_are_whole(data: Data, tmp_path: Path) -> None:
    models = [build_model("vit_mini", slicing=slicing, image_size=8, patch_size=4) for slicing in ("mlp", "full")]
    assert width_groups(models[0]) == [[f"blocks.{i}"] for i in range(4)]
    assert width_groups(models[1]) == [["blocks", "patch_embed"]]
    rows = Search(models[0], data, tmp_path / "a.jsonl", steps=3).run(Budget(macs=1e9), evaluations=2)
    assert len(rows) == 2 and latency_ms(models[0], 0.5, (3, 8, 8), rounds=3) > 0


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet50", "mobilenet_v2"])
def test_every_group_can_have_a_width_of_its_own(name: str) -> None:
    model = build_model(name)
    groups = width_groups(model)
    assert len(groups) >= 3
    for names in groups:
        before = profile(model, (3, 32, 32), [1.0])[0].macs
        with use_width(model, dict.fromkeys(names, 0.5)):  # no residual sum breaks
            pass
        assert profile(model, (3, 32, 32), [dict.fromkeys(names, 0.5)])[0].macs < before


def test_candidates_keep_to_the_budget_and_use_it_up(model: Backbone, data: Data, tmp_path: Path) -> None:
    bound = 0.4 * macs(model, data, {"": 1.0})
    search = Search(model, data, tmp_path / "a.jsonl", steps=7)
    rows = search.run(Budget(macs=bound), evaluations=14, seed=3)
    assert len(rows) == 14 == len({row["width"] for row in rows})
    order = [(-row["accuracy"], row["macs"]) for row in rows]
    assert order == sorted(order) and len({accuracy for accuracy, _ in order}) < len(rows)  # there are equals
    for row in rows:
        assert row["macs"] == macs(model, data, row["plan"]) <= bound
        if set(row["plan"]) == {""}:
            continue
        for group in search.groups:  # not one of them could be a step wider
            names = [""] if group is search.groups[0] else group
            index = search.grid.index(row["plan"][names[0]])
            if index < len(search.grid) - 1:
                assert macs(model, data, row["plan"] | dict.fromkeys(names, search.grid[index + 1])) > bound
    uniform = [row for row in rows if set(row["plan"]) == {""}]
    assert max(row["plan"][""] for row in uniform) == max(
        width for width in search.grid if macs(model, data, {"": width}) <= bound
    )
    assert not statistics(model)  # the network that was given is as it was


def test_a_search_that_was_killed_goes_on_with_the_same_draws(
    model: Backbone, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(params=0.5 * 78042)
    whole = Search(model, data, tmp_path / "whole.jsonl", steps=7).run(budget, evaluations=12)

    path = tmp_path / "killed.jsonl"
    Search(model, data, path, steps=7).run(budget, evaluations=5)
    path.write_bytes(path.read_bytes()[:-9])  # died in the middle of a line
    evaluated: list[Any] = []
    calibrate = Search._evaluate

    def count(self: Search, genes: Any) -> Any:
        known = len(self.results.rows)
        row = calibrate(self, genes)
        evaluated.append(len(self.results.rows) - known)
        return row

    monkeypatch.setattr(Search, "_evaluate", count)
    assert Search(model, data, path, steps=7).run(budget, evaluations=12) == whole
    assert sum(evaluated) == 8 and len(evaluated) == 12
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()
    ]


def test_results_of_something_else_are_refused(model: Backbone, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Search(model, data, path, subject={"data": 1})
    with pytest.raises(CheckpointError, match=r"results of something else \(data: 1 there, 2 here\)"):
        Search(model, data, path, subject={"data": 2})
    with pytest.raises(CheckpointError, match=r"something else \(weights: "):
        Search(build_model("resnet_tiny", stem="small", divisor=4), data, path, subject={"data": 1})
    for foreign in (b"[]\n", b"a note of somebody's", b"{", b"\xff\n"):
        path.write_bytes(foreign)
        if foreign == b"{":  # of our own, torn in its first line
            Search(model, data, path)
            continue
        with pytest.raises(CheckpointError, match="is not a results file"):
            Search(model, data, path)
        assert path.read_bytes() == foreign


def test_switchable_norms_have_the_widths_of_their_list(data: Data, tmp_path: Path) -> None:
    model = build_model("resnet_tiny", stem="small", divisor=4, norm="switchable", widths=[1.0, 0.5, 0.25])
    rows = Search(model, data, tmp_path / "a.jsonl", widths=[1.0, 0.5, 0.25]).run(Budget(macs=1e9))
    assert sorted(row["width"] for row in rows) == ["0.25", "0.5", "1.0"]


def test_latency_is_measured_once_and_bounds(
    model: Backbone, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert latency_ms(model, 0.5, (3, 8, 8), rounds=3) > 0
    calls: list[Any] = []

    def fake(network: nn.Module, width: Any, image_shape: Any) -> float:
        calls.append(str(width))
        return 2.0 if width == 1.0 else 1.0

    monkeypatch.setattr("us3l.search.latency_ms", fake)
    rows = Search(model, data, tmp_path / "a.jsonl", steps=3).run(Budget(latency_ms=1.5), evaluations=6)
    assert "1.0" not in {row["width"] for row in rows} and all(row["latency_ms"] == 1.0 for row in rows)
    assert len(calls) == len(set(calls))
    calls.clear()
    assert Search(model, data, tmp_path / "a.jsonl", steps=3).run(Budget(latency_ms=1.5), evaluations=6) == rows
    assert not calls


def test_impossible_budgets_are_said(model: Backbone, data: Data, tmp_path: Path) -> None:
    search = Search(model, data, tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="expected a budget"):
        search.run(Budget())
    with pytest.raises(ConfigError, match=r"the narrowest sub-network \(width 0.25\) has .* macs, more than 10"):
        search.run(Budget(macs=10))


def test_pareto_front() -> None:
    rows = [{"macs": m, "accuracy": a} for m, a in [(3, 60.0), (1, 50.0), (2, 70.0), (2, 65.0), (4, 70.0), (5, 71.0)]]
    assert [(row["macs"], row["accuracy"]) for row in pareto_front(rows, "macs")] == [(1, 50.0), (2, 70.0), (5, 71.0)]


TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
    "data.train_samples=64", "data.test_samples=32", "data.batch_size=32", "method.hidden_dim=16", "method.dim=8",
    "train.epochs=1", "train.device=cpu",
]  # fmt: skip


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_command(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        run("pretrain", *TINY, f"checkpoint.dir={tmp_path}")
    plot = tmp_path / "pareto.png"
    arguments = ["search", tmp_path, "--max-macs", "0.05M", "--max-params", "12k", "--evaluations", "5"]
    output = run(*arguments, "--plot", plot)
    assert "Pareto front" in output and "5 sub-networks evaluated" in output and plot.read_bytes()[1:4] == b"PNG"
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 6
    assert run(*arguments) in output  # all of it known
    command = output.partition("Next: us3l ")[2].partition(" Plotted")[0].split()
    assert "Wrote" in run(*command, "--format", "safetensors", "--out", tmp_path / "exported")
    for wrong in ("many", "-3M", "M"):
        with pytest.raises(ConfigError, match="--max-macs: expected a positive number such as 300M"):
            run("search", tmp_path, "--max-macs", wrong)
