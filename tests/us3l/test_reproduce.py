"""The small copy of the paper's table: its cells, its claims, resumption; and, slowly, the table itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from us3l import reproduce
from us3l.config import load, recipes, to_dict
from us3l.methods import build_method
from us3l.reproduce import ROWS, WIDTHS, Cell, cells, check_thresholds, projections, reproduce_table1, series

# Accuracies at widths 1.0, 0.75, 0.5, 0.25 (or of each width alone) with which every claim holds.
HEALTHY = {
    "random": (68.8, 65.0, 60.0, 54.5),
    "individual": (78.0, 77.0, 75.1, 70.9),
    "snet": (69.4, 62.0, 68.3, 47.6),
    "snet_distilled": (67.9, 67.4, 64.7, 61.4),
    "us3l": (77.9, 77.3, 75.9, 73.7),
    "us3l_no_teacher": (72.6, 70.0, 66.0, 62.1),
    "us3l_sandwich": (73.9, 73.0, 72.0, 70.0),
}


def result(cell: Cell, accuracies: tuple[float, ...], spread: float) -> dict[str, Any]:
    widths = WIDTHS if cell.width is None else (cell.width,)
    rows = [
        {"width": width, "accuracy": accuracy, "macs": int(1e6 * width**2), "params": 100, "spread": spread}
        for width, accuracy in zip(widths, accuracies, strict=True)
    ]
    return {
        "row": cell.row,
        "seed": cell.seed,
        "width": cell.width,
        "rows": rows,
        "average_widths": 2.5 if cell.row == "us3l" else 1.0,
        "seconds": 1.0,
        "config": {},
    }


def healthy(seeds: int = 2) -> list[dict[str, Any]]:
    found = []
    for cell in cells(tuple(ROWS), range(seeds)):
        accuracies = HEALTHY[cell.row]
        if cell.width is not None:
            accuracies = (accuracies[WIDTHS.index(cell.width)],)
        found.append(result(cell, accuracies, 0.7 if cell.row == "snet" else 0.95))
    return found


def change(results: list[dict[str, Any]], row: str, width: float, by: float, seed: int | None = None) -> None:
    for each in results:
        if each["row"] == row and seed in (None, each["seed"]):
            for line in each["rows"]:
                if line["width"] == width:
                    line["accuracy"] += by


def failing(results: list[dict[str, Any]]) -> list[str]:
    return [check.name for check in check_thresholds(results) if not check.passed]


def test_all_claims_are_checked_and_hold_for_healthy_numbers() -> None:
    checks = check_thresholds(healthy())
    assert len(checks) == 17
    assert failing(healthy()) == []


@pytest.mark.parametrize(
    ("row", "width", "by", "claim"),
    [
        ("random", 1.0, 4.5, "individual - random, width 1.0"),
        ("random", 0.25, 7.0, "individual - random, width 0.25"),
        ("snet", 1.0, 7.0, "individual - snet, width 1.0"),
        ("snet", 0.25, 16.0, "individual - snet, width 0.25"),
        ("snet_distilled", 1.0, 6.2, "individual - snet_distilled, width 1.0"),
        ("snet_distilled", 0.25, 6.6, "individual - snet_distilled, width 0.25"),
        ("us3l", 1.0, -2.5, "us3l - individual, width 1.0"),
        ("us3l", 0.25, -2.4, "us3l - individual, width 0.25"),
        ("us3l_no_teacher", 1.0, 3.4, "us3l - us3l_no_teacher, width 1.0"),
        ("us3l_no_teacher", 0.25, 6.7, "us3l - us3l_no_teacher, width 0.25"),
    ],
)
def test_each_claim_can_fail(row: str, width: float, by: float, claim: str) -> None:
    results = healthy()
    change(results, row, width, by)
    assert claim in failing(results)


def test_one_bad_seed_fails_although_the_mean_holds() -> None:
    results = healthy()
    change(results, "us3l", 0.25, -4.0, seed=1)  # 1.2 points below the individual network of that seed
    assert failing(results) == ["us3l - individual, width 0.25, worst seed"]


def test_spreads_and_widths_per_step_are_claims() -> None:
    for row, spread in (("snet", 0.86), ("us3l", 0.89)):
        results = healthy()
        for each in results:
            if each["row"] == row:
                for line in each["rows"]:
                    line["spread"] = spread
        assert failing(results) == [f"{row}, smallest spread of a width"]
    results = healthy()
    next(each for each in results if each["row"] == "us3l")["average_widths"] = 2.6
    assert failing(results) == ["us3l, widths per step"]


def test_snet_has_collapsed_if_one_width_has() -> None:
    results = healthy()
    for each in results:
        if each["row"] == "snet":
            for line, spread in zip(each["rows"], (0.95, 0.95, 0.95, 0.8), strict=True):
                line["spread"] = spread
    assert failing(results) == []


def test_absent_rows_make_no_claims() -> None:
    results = [each for each in healthy() if each["row"] in ("individual", "us3l")]
    assert [check.name for check in check_thresholds(results)] == [
        "us3l - individual, width 1.0",
        "us3l - individual, width 0.25",
        "us3l - individual, width 0.25, worst seed",
        "us3l, smallest spread of a width",
        "us3l, widths per step",
    ]


def test_series_averages_over_seeds() -> None:
    results = healthy(3)
    change(results, "us3l", 0.25, 3.0, seed=2)
    table = series(results)
    last = table["us3l"][-1]
    assert (last["width"], last["values"]) == (0.25, [73.7, 73.7, 76.7])
    assert last["accuracy"] == pytest.approx(74.7)
    assert last["deviation"] == pytest.approx(3**0.5)
    assert [row["width"] for row in table["individual"]] == list(WIDTHS)


# ------------------------------------------------------------------------------------------- cells and recipes


def test_cells_of_the_table() -> None:
    found = cells(tuple(ROWS), range(2))
    assert len(found) == 2 * (6 + 4) and len({cell.name for cell in found}) == 20
    assert {cell.width for cell in found if cell.row == "individual"} == set(WIDTHS)
    assert {cell.width for cell in found if cell.row != "individual"} == {None}


def test_recipes_say_what_the_table_says() -> None:
    """R1: everything that the rows share, and all in which they differ."""
    configs = {row: Cell(row, 1, 0.25 if row == "individual" else None).config() for row in ROWS}
    for config in configs.values():
        assert (config.train.epochs, config.train.step, config.train.seed) == (20, "per_width", 1)
        assert (config.data.batch_size, config.data.train_samples, config.data.test_samples) == (128, 3000, 4000)
        assert (config.optimizer.weight_decay, config.optimizer.momentum) == (0.01, 0.9)
        assert (config.method.hidden_dim, config.method.dim, config.method.predictor_hidden) == (256, 128, 256)
        assert (config.model.stem, config.model.divisor, config.model.base_channels) == ("small", 4, 16)
    for row in ("individual", "snet", "snet_distilled"):
        config = configs[row]
        assert (config.method.name, config.method.target, config.optimizer.lr) == ("simsiam", "live", 0.1)
        assert config.regulariser.kind == "none" and not config.method.aux_head
        assert config.model.norm == ("sliced" if row == "individual" else "switchable")
        assert config.method.distillation == ("cosine" if row == "snet_distilled" else "none")
        assert config.sampler.widths == ([0.25] if row == "individual" else list(WIDTHS))
    us3l = configs["us3l"]
    assert (us3l.method.name, us3l.method.base_loss, us3l.method.distillation) == ("simclr", "infonce", "cosine")
    assert (us3l.method.momentum, us3l.method.temperature, us3l.optimizer.lr) == (0.97, 0.5, 0.2)
    assert us3l.method.aux_head and us3l.regulariser.kind == "group"
    for row, changed in (
        ("us3l_no_teacher", {"method": {"target": "live", "momentum": 0.99}}),
        ("us3l_sandwich", {"sampler": {"kind": "sandwich"}}),
    ):
        expected = to_dict(us3l)
        for section, values in changed.items():
            expected[section].update(values)
        assert to_dict(configs[row]) == expected


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_builds(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        method = build_method(config)
    assert len(method.violates_guidelines()) < 3 or "snet" in name
    assert config.checkpoint.dir is not None and config.checkpoint.dir.endswith(name)


def test_projections_come_from_before_the_output_norm() -> None:
    method = build_method(Cell("snet", 0).config())
    z = projections(method, torch.rand(64, 1, 14, 14), 0.5)
    assert z.shape == (64, 128) and not z.requires_grad
    assert z.mean(0).abs().max() > 1e-2  # the norm would have centred it
    normed = method.projector.norm(z)
    assert normed.mean(0).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------- runs


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []

    def run(todo: list[Cell], console: Console, processes: int) -> Any:
        for cell in todo:
            ran.append(cell)
            made = result(cell, (70.0,) if cell.width else (70.0,) * 4, 0.9)
            yield cell, {**made, **reproduce._decisive(cell.config())}

    monkeypatch.setattr(reproduce, "_run_parallel", run)
    console, todo = Console(file=io.StringIO()), cells(("individual", "us3l"), (0,))
    first = reproduce.run_cells(todo, tmp_path, console)
    assert ran == todo and len(first) == 5
    ran.clear()
    assert reproduce.run_cells(todo, tmp_path, console) == first
    assert ran == [] and "5 of 5 runs are kept" in console.file.getvalue()  # type: ignore[attr-defined]

    path = tmp_path / "us3l-seed0.json"
    kept = json.loads(path.read_text())
    kept["config"]["optimizer"]["lr"] = 0.3  # a recipe that has changed since
    path.write_text(json.dumps(kept))
    (tmp_path / "individual-0.5-seed0.json").unlink()
    torn = tmp_path / "individual-0.25-seed0.json"
    torn.write_text(torn.read_text()[:100])
    reproduce.run_cells(todo, tmp_path, console)
    assert {cell.name for cell in ran} == {"us3l-seed0", "individual-0.5-seed0", "individual-0.25-seed0"}
    ran.clear()
    monkeypatch.setattr(reproduce, "__version__", "another")
    reproduce.run_cells(todo, tmp_path, console)
    assert ran == todo


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale: expected mini, got 'full'.*--config NAME.*cifar100_resnet18_simclr"):
        reproduce_table1("full", out=tmp_path / "t.json")
    with pytest.raises(ValueError, match="seeds"):
        reproduce_table1("mini", 0, tmp_path / "t.json")


def test_a_cell_reports_its_epochs_and_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["data.train_samples=128", "data.test_samples=64", "train.epochs=2", "checkpoint.dir=null"]
    monkeypatch.setattr(Cell, "config", lambda cell: load("mini_us3l", tiny))
    monkeypatch.chdir(tmp_path)
    epochs: list[int] = []
    done = reproduce.run_cell(Cell("us3l", 0), epochs.append)
    assert epochs == [1, 2] and len(done["rows"]) == 4 and list(tmp_path.iterdir()) == []
    assert done["us3l"] == reproduce.__version__ and done["config"]["data"]["train_samples"] == 128


@pytest.mark.slow
def test_random_weights_in_processes_of_their_own(tmp_path: Path) -> None:
    """The whole path but training: processes, evaluation, files; and results do not depend on the processes."""
    console, todo = Console(file=io.StringIO(), width=200), cells(("random",), (0, 1))
    two = reproduce.run_cells(todo, tmp_path / "two", console, processes=2)
    one = reproduce.run_cells(todo, tmp_path / "one", console, processes=1)
    for a, b in zip(two, one, strict=True):
        assert a["rows"] == b["rows"] and len(a["rows"]) == 4
    assert two[0]["rows"] != two[1]["rows"]
    assert "random-seed1" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_table_of_one_seed_meets_every_claim(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    report = reproduce_table1("mini", 1, tmp_path / "table1.json", console=console)
    failed = [check for check in report["thresholds"] if not check["passed"]]
    assert not failed, console.file.getvalue()  # type: ignore[attr-defined]
    assert len(report["thresholds"]) == 17 and report["passed"]
    assert json.loads((tmp_path / "table1.json").read_text())["results"] == report["results"]
