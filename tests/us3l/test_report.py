"""Atomic JSON, numbers as people read them, tables and plots."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from us3l import files
from us3l.report import evaluation_table, plot_accuracy, quantity, write_json

ROWS = [
    {"width": 1.0, "accuracy": 77.5, "macs": 692_240, "params": 77_754, "deviation": 0.4},
    {"width": 0.25, "accuracy": 71.4, "macs": 44_708, "params": 5_142, "deviation": 1.1},
]


def test_json_round_trip_makes_folders_and_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"rows": ROWS})
    assert json.loads(path.read_text()) == {"rows": ROWS}
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_refuses_what_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "result.json", {"accuracy": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (44_708, "44.7k"), (692_240, "692k"), (999_800, "1.00M")]
    + [(11_689_512, "11.7M"), (555_400_000, "555M"), (1_814_000_000, "1.81G"), (99_960_000, "100M")],
)
def test_quantities(number: int, text: str) -> None:
    assert quantity(number) == text


def test_table_shows_every_width() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_table(ROWS, title="Linear accuracy"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Linear accuracy" in text
    for line in (("1.0", "77.50", "692k", "77.8k"), ("0.25", "71.40", "44.7k", "5.14k")):
        assert any(all(cell in found for cell in line) for found in text.splitlines())


@pytest.mark.parametrize("x", ["macs", "params"])
def test_plot_has_one_labelled_series_per_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: str) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    other = [{**row, "accuracy": row["accuracy"] - 3} for row in ROWS]
    for row in other:
        del row["deviation"]
    path = plot_accuracy({"US3L": ROWS, "individual": other, "absent": []}, tmp_path / "plot.png", x=x)

    assert imread(path).shape[:2] == (630, 960) and os.listdir(tmp_path) == ["plot.png"]
    [axes] = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["US3L", "individual"]
    assert "accuracy" in axes.get_ylabel() and axes.get_xlabel()
    lines = {tuple(line.get_ydata()) for line in axes.get_lines()}
    assert {(71.4, 77.5), (68.4, 74.5)} <= lines


def test_a_plot_is_a_png_by_any_name(tmp_path: Path) -> None:
    path = plot_accuracy({"US3L": ROWS}, tmp_path / "accuracy.plot")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_names_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: expected one of macs, params, latency_ms, got 'seconds'"):
        plot_accuracy({"US3L": ROWS}, tmp_path / "plot.png", x="seconds")
    with pytest.raises(ValueError, match="series"):
        plot_accuracy({"US3L": []}, tmp_path / "plot.png")
