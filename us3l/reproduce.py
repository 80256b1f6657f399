"""The paper's tables (`us3l.tables`) trained, evaluated, printed beside the paper's figures, and their claims checked.

A *cell* is one training run: a row and a seed, and for individually trained networks a width. Cells are independent
and leave a JSON file; a cell whose file is there, of the same configuration and version of us3l, is not run again, and
tables share cells.

Scales: "full" are the paper's recipes, a cell per GPU at a time, each with its checkpoints, from which it goes on.
"mini" are small networks on the embedded images, in processes of one thread. What that scale can show are the gaps
between methods, not accuracies: raw pixels are good features of these images. Much of the collapse of S-Net comes from
four optimizer steps per batch under a strong weight decay, and neither the auxiliary head nor the group regularisation
makes a difference larger than that between seeds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as PrintedTable
from threadpoolctl import threadpool_limits
from torch import Tensor

from us3l.config import Config, differences, load, to_dict
from us3l.engine import NOT_COMPUTED, Trainer
from us3l.errors import ConfigError, TrainingError
from us3l.evaluation import CIFAR_PROTOCOL, effective_rank, evaluate, spread
from us3l.files import write_text
from us3l.methods import GUIDELINES, Method
from us3l.report import markdown_table, plot_accuracy, write_json
from us3l.tables import ROWS, SCALES, TABLES, WIDTHS, Claim, Gap, Row, Spread, Table
from us3l_kernels.version import __version__
from us3l_kernels.width import use_width

SPREAD_IMAGES = 512
SEEDS = {"mini": 3, "full": 1}
"""Number of seeds, where none is given."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    name: key of `us3l.tables.ROWS`. width: of an individually trained network, else None.
    folder: where its JSON file and checkpoints lie. overrides: of its recipe, after those of the row.
    """

    name: str
    scale: str
    seed: int
    folder: Path
    width: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @property
    def title(self) -> str:
        width = "" if self.width is None else f"-{self.width}"
        return f"{self.name}{width}-seed{self.seed}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.title}.json"

    def config(self) -> Config:
        recipe, *overrides = self.row.recipes[self.scale]
        overrides.append(f"train.seed={self.seed}")
        if self.width is not None:
            overrides.append(f"sampler.widths=[{self.width}]")
        config = load(recipe, [*overrides, *self.overrides])
        # A mini cell is short enough to start again.
        keeps = self.scale == "full" and self.row.trained
        config.checkpoint.dir = str(self.folder / self.title) if keeps else None
        return config


def cells(
    table: Table, scale: str, seeds: Sequence[int], folder: str | Path, overrides: Sequence[str] = ()
) -> list[Cell]:
    """All cells of a table, the longest runs first, so that parallel processes finish together."""
    found = []
    for name in sorted(table.rows, key=lambda name: ROWS[name].alone or not ROWS[name].trained):
        for seed in seeds:
            for width in WIDTHS if ROWS[name].alone else (None,):
                found.append(Cell(name, scale, seed, Path(folder), width, tuple(overrides)))
    return found


# ------------------------------------------------------------------------------------------- one training run


def run_cell(cell: Cell, on_epoch: Callable[[int], None], *, device: str | None = None) -> dict[str, Any]:
    """Train (except initial weights) and evaluate one cell; its result, as its JSON file holds it.

    on_epoch: called with the number of epochs done. device: that of a configuration which leaves the choice.
    """
    start = time.perf_counter()
    config = cell.config()
    if device is not None and config.train.device == "auto":
        config.train.device = device
    trainer = Trainer(config, console=Console(quiet=True), on_epoch=on_epoch)
    if cell.row.trained:
        if config.checkpoint.dir is not None:
            trainer.resume("auto")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*violates all three guidelines")  # that is their point
            trainer.fit()
    method, data = trainer.method, trainer.data
    widths = WIDTHS if cell.width is None else (cell.width,)
    if method.labelled:
        rows = evaluate(method.encoder_q, data, widths, "classifier")
    else:
        protocol = CIFAR_PROTOCOL if cell.scale == "full" else None
        rows = evaluate(method.encoder_q, data, widths, "linear", protocol=protocol)
        images = torch.cat([images for images, _ in data.train_eval])[:SPREAD_IMAGES].to(trainer.device)
        for row in rows:
            embeddings = projections(method, images, row["width"])
            row.update(spread=spread(embeddings), effective_rank=effective_rank(embeddings))
    return {
        "row": cell.name,
        "seed": cell.seed,
        "width": cell.width,
        "rows": rows,
        "average_widths": trainer.sampler.average_widths(config.train.epochs),
        "guidelines": [name for name in GUIDELINES if name not in method.violates_guidelines()],
        "seconds": round(time.perf_counter() - start, 1),
        "us3l": __version__,
        "config": to_dict(config),
    }


@torch.no_grad()
def projections(method: Method, images: Tensor, width: float) -> Tensor:
    """Projections [n, D] of images at `width`, before the projector's output norm.

    All norms take the statistics of this batch, as in training; what the backbone was calibrated with is lost.
    """
    method.train()
    with use_width(method.encoder_q, width):
        return method.projector.before_norm(method.encoder_q.forward_features(images))


# ------------------------------------------------------------------------------------------- all runs


def run_cells(todo: Sequence[Cell], console: Console, *, processes: int | None = None) -> list[dict[str, Any]]:
    """Results of the cells, in their order; those without a file are run, with a progress display.

    processes: at the same time; None: one per CPU core at the scale "mini", one per GPU at "full".
    """
    results = {cell: _kept(cell) for cell in todo}
    missing = [cell for cell in todo if results[cell] is None]
    if len(missing) < len(todo):
        console.print(f"{len(todo) - len(missing)} of {len(todo)} runs are kept from before (in {todo[0].folder})")
    if missing:
        if processes is None:
            processes = (os.cpu_count() or 1) if todo[0].scale == "mini" else max(1, torch.cuda.device_count())
        for cell, result in _run_parallel(missing, console, min(processes, len(missing))):
            write_json(cell.file, result)
            results[cell] = result
    return [result for result in results.values() if result is not None]


def _kept(cell: Cell) -> dict[str, Any] | None:
    config = to_dict(cell.config())  # whatever is wrong with it is said before anything runs
    try:
        result: dict[str, Any] = json.loads(cell.file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: torn by a crash
        return None
    changed = [key for key, _, _ in differences(result["config"], config) if not key.startswith(NOT_COMPUTED)]
    return None if changed or result["us3l"] != __version__ else result


def _run_parallel(todo: Sequence[Cell], console: Console, processes: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run the cells in `processes` processes; yields each as it is done."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    messages: Any = context.Queue()
    places: Any = context.Queue()
    for place in range(processes):
        places.put(place)
    # One core each at the small scale: results do not depend on how many there are.
    threads = 1 if todo[0].scale == "mini" else max(1, (os.cpu_count() or 1) // processes)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ProcessPoolExecutor(processes, context, _start_process, (messages, places, threads)) as pool,
    ):
        overall = progress.add_task("all runs", total=len(todo), unit="runs")
        running: dict[Cell, TaskID] = {}
        pending = {pool.submit(_run_in_process, cell): cell for cell in todo}
        try:
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for cell, epoch, epochs in _drain(messages):
                    if cell not in pending.values():  # this message came later than its result
                        continue
                    if cell not in running:
                        running[cell] = progress.add_task(cell.title, total=epochs, unit="epochs")
                        if not console.is_terminal:
                            console.print(f"training {cell.title}")
                    progress.update(running[cell], completed=epoch)
                for future in done:
                    cell = pending.pop(future)
                    result = future.result()
                    if cell in running:
                        progress.remove_task(running.pop(cell))
                    progress.advance(overall)
                    console.print(_line(cell, result), soft_wrap=True)
                    yield cell, result
        except BrokenProcessPool as error:
            raise TrainingError(
                "the process of a run was killed, for want of memory perhaps: start again with fewer --processes; the "
                "runs that are done are kept"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _line(cell: Cell, result: Mapping[str, Any]) -> str:
    accuracies = "  ".join(f"{row['width']}: {row['accuracy']:.1f}" for row in result["rows"])
    return f"{cell.title:<26} {result['seconds']:5.0f} s   accuracy  {accuracies}"


_messages: Any = None  # of a worker process, to report its progress by
_device = "cpu"  # of a worker process


def _start_process(messages: Any, places: Any, threads: int) -> None:
    global _messages, _device
    _messages = messages
    place = places.get()
    if torch.cuda.is_available():
        _device = f"cuda:{place % torch.cuda.device_count()}"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    threadpool_limits(threads)
    torch.set_num_threads(threads)


def _die_with_parent() -> None:
    """Or a killed parent would leave its runs behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_process(cell: Cell) -> dict[str, Any]:
    epochs = cell.config().train.epochs
    _messages.put((cell, 0, epochs))
    return run_cell(cell, lambda epoch: _messages.put((cell, epoch, epochs)), device=_device)


def _drain(messages: Any) -> Iterator[Any]:
    while True:
        try:
            yield messages.get_nowait()
        except Empty:
            return


# ------------------------------------------------------------------------------------------- the table


def series(results: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means over seeds: for each row of the table and width, widest first, accuracy, deviation, macs, params.

    `values` are the accuracies and `spreads` the spreads of the seeds (absent for supervised networks), in ascending
    order of the seed. Rows are in the order of `us3l.tables.ROWS`.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    for name in ROWS:
        by_width: dict[float, list[Mapping[str, Any]]] = {}
        for result in sorted((r for r in results if r["row"] == name), key=lambda r: r["seed"]):
            for row in result["rows"]:
                by_width.setdefault(row["width"], []).append(row)
        if by_width:
            table[name] = [_summary(width, by_width[width]) for width in sorted(by_width, reverse=True)]
    return table


def _summary(width: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [row["accuracy"] for row in rows]
    return {
        "width": width,
        "accuracy": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "macs": rows[0]["macs"],
        "params": rows[0]["params"],
        "values": values,
        "spreads": [row["spread"] for row in rows if "spread" in row],
    }


def _smallest_spread(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over seeds of the smallest spread among the widths."""
    by_seed = zip(*(row["spreads"] for row in rows), strict=True)
    return statistics.fmean(min(spreads) for spreads in by_seed)


def _spread_column(results: Sequence[Mapping[str, Any]]) -> str:
    (rows,) = series(results).values()
    return f"{_smallest_spread(rows):.2f}" if rows[0]["spreads"] else ""


COLUMNS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "spread": _spread_column,
    "guidelines": lambda results: " ".join(results[0]["guidelines"]),
    "widths per step": lambda results: f"{results[0]['average_widths']:g}",
}
"""Columns that a table may have beside the accuracies: of the results of one row."""


def lines(table: Table, results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, its header first: accuracy by row and width, mean (and deviation) over seeds.

    The last column are the paper's figures (- collapses), if it gives any for these rows.
    """
    averages = series(results)
    shown = [name for name in table.rows if name in averages]
    printed = [["", *map(str, WIDTHS), *table.columns]]
    for name in shown:
        accuracies = [f"{row['accuracy']:.1f}" for row in averages[name]]
        if len(averages[name][0]["values"]) > 1:
            accuracies = [f"{a} ± {row['deviation']:.1f}" for a, row in zip(accuracies, averages[name], strict=True)]
        own = [result for result in results if result["row"] == name]
        printed.append([ROWS[name].title, *accuracies, *(COLUMNS[column](own) for column in table.columns)])
    if any(ROWS[name].paper for name in shown):
        printed[0].append("paper, same widths")
        for name, line in zip(shown, printed[1:], strict=True):
            line.append(" ".join("-" if value is None else f"{value}" for value in ROWS[name].paper))
    return printed


# ------------------------------------------------------------------------------------------- its claims


@dataclass(frozen=True)
class Checked:
    """A claim: what was required (e.g. ">= 5"), what was measured, and whether it holds."""

    name: str
    required: str
    got: float
    passed: bool


def check_claims(claims: Sequence[Claim], results: Sequence[Mapping[str, Any]]) -> list[Checked]:
    """The claims about rows that `results` has. Differences of accuracies are in percentage points."""
    averages = series(results)
    return [_check(claim, averages, results) for claim in claims if _rows_of(claim) <= averages.keys()]


def _rows_of(claim: Claim) -> set[str]:
    return {claim.better, claim.worse} if isinstance(claim, Gap) else {claim.row}


def _check(
    claim: Claim, averages: Mapping[str, Sequence[Mapping[str, Any]]], results: Sequence[Mapping[str, Any]]
) -> Checked:
    if isinstance(claim, Gap):
        name = f"{claim.better} - {claim.worse}, width {claim.width}"
        better, worse = (
            next(row for row in averages[row_name] if row["width"] == claim.width)
            for row_name in (claim.better, claim.worse)
        )
        gap = better["accuracy"] - worse["accuracy"]
        if claim.every_seed:
            name += ", worst seed"
            gap = min(b - w for b, w in zip(better["values"], worse["values"], strict=True))
        return Checked(name, f">= {claim.least:g}", round(gap, 3), gap >= claim.least)
    if isinstance(claim, Spread):
        name, got = f"{claim.row}, smallest spread of a width", _smallest_spread(averages[claim.row])
        if claim.least is not None:
            return Checked(name, f">= {claim.least:g}", round(got, 3), got >= claim.least)
        assert claim.most is not None
        return Checked(name, f"<= {claim.most:g}", round(got, 3), got <= claim.most)
    counts = {result["average_widths"] for result in results if result["row"] == claim.row}
    return Checked(f"{claim.row}, widths per step", f"== {claim.value:g}", max(counts), counts == {claim.value})


# ------------------------------------------------------------------------------------------- commands


def reproduce(
    what: str,
    scale: str = "mini",
    *,
    seeds: int | None = None,
    folder: str | Path = "runs/reproduce",
    overrides: Sequence[str] = (),
    console: Console | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Run (or complete) a table, print it beside the paper's figures, check its claims, and write it.

    Args:
        what: a key of `us3l.tables.TABLES`.
        scale: "mini" or "full".
        seeds: number of seeds, from 0 on; None: SEEDS of the scale.
        folder: gets `<what>_<scale>.json` (all numbers), `.md` and `.png`. The results of single runs, and the
            checkpoints of those that have any, are kept in its folder `<scale>`.
        overrides: of every run, e.g. data.root=DATA. The claims are about runs without any, and not checked with one.
        processes: see :func:`run_cells`.

    Returns:
        What the JSON file holds: table, scale, seeds, overrides, series, claims, passed, paper, results, versions.

    Raises:
        ConfigError: an unknown table or scale, a number of seeds below 1, or a wrong override.
    """
    if what not in TABLES:
        raise ConfigError(f"reproduce: expected {', '.join(TABLES)}, got {what!r}")
    if scale not in SCALES:
        raise ConfigError(f"scale: expected {' or '.join(SCALES)}, got {scale!r}")
    seeds = SEEDS[scale] if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"seeds: expected at least 1, got {seeds}")
    console, folder, table = console or Console(), Path(folder), TABLES[what]
    results = run_cells(
        cells(table, scale, range(seeds), folder / scale, overrides), console, processes=processes
    )
    checked = check_claims(table.claims if scale == "mini" and not overrides else (), results)
    averages = series(results)
    report = {
        "table": what,
        "scale": scale,
        "seeds": list(range(seeds)),
        "overrides": list(overrides),
        "series": averages,
        "claims": [asdict(claim) for claim in checked],
        "passed": all(claim.passed for claim in checked),
        "paper": {name: ROWS[name].paper for name in table.rows if ROWS[name].paper},
        "results": results,
        "versions": {"us3l": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    _publish(table, report, folder / f"{what}_{scale}", console)
    return report


def demo(
    folder: str | Path = "runs/demo", *, console: Console | None = None, processes: int | None = None
) -> dict[str, Any]:
    """US3L against individually trained networks, one seed: see :func:`reproduce`."""
    console = console or Console()
    console.print(
        "One US3L network, which runs at any width, against four SimSiam networks trained for one width "
        "each: a three-block ResNet on the embedded 14x14 Fashion-MNIST (3000 images, no labels), 20 epochs."
    )
    return reproduce("demo", "mini", seeds=1, folder=folder, console=console, processes=processes)


def _publish(table: Table, report: Mapping[str, Any], stem: Path, console: Console) -> None:
    """Print the table and its claims, and write all files."""
    header, *body = lines(table, report["results"])
    title = f"{table.title}. Accuracy (%)" + (
        "; paper: CIFAR-100, ResNet-18" if header[-1].startswith("paper") else ""
    )
    printed = PrintedTable(title=title, title_justify="left")
    for index, name in enumerate(header):
        printed.add_column(name, justify="right" if index else "left", no_wrap=name.startswith("paper"))
    for line in body:
        printed.add_row(*line)
    console.print(printed)
    claims = [
        [claim["name"], claim["required"], f"{claim['got']:.2f}", "holds" if claim["passed"] else "FAILS"]
        for claim in report["claims"]
    ]
    text = f"{title}\n\n{markdown_table(header, body)}"
    if claims:
        printed = PrintedTable("claim", "required", "got", "", title="Claims", title_justify="left")
        for *numbers, verdict in claims:
            printed.add_row(*numbers, f"[{'green' if verdict == 'holds' else 'bold red'}]{verdict}[/]")
        console.print(printed)
        text += f"\n{markdown_table(['claim', 'required', 'got', ''], claims)}"
    write_json(stem.with_suffix(".json"), report)
    write_text(stem.with_suffix(".md"), text)
    curves = {ROWS[name].title: report["series"][name] for name in table.rows if ROWS[name].trained}
    plot_accuracy(curves, stem.with_suffix(".png"), title=table.title)
    console.print(f"all numbers: {stem}.json; the table: {stem}.md; accuracy against cost: {stem}.png", soft_wrap=True)
