"""The paper's Table 1 at a scale that a laptop trains: every row of it, the claims it makes, checked.

A *cell* is one training run: a row of the table and a seed, and for individually trained networks a width.
Cells are independent, run in processes of one thread each, and leave a JSON file; a cell whose file is there,
of the same configuration and version of us3l, is not run again.

What this scale can show are the gaps between methods, not accuracies: raw pixels are good features of these
images. Much of the collapse of S-Net comes from four optimizer steps per batch under a strong weight decay,
and neither the auxiliary head nor the group regularisation makes a difference larger than that between seeds.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor

from us3l.config import Config, load, recipes, to_dict
from us3l.engine import Trainer
from us3l.evaluation import effective_rank, evaluate, spread
from us3l.methods import Method
from us3l.report import plot_accuracy, write_json
from us3l_kernels.version import __version__
from us3l_kernels.width import use_width

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SPREAD_IMAGES = 512
SCALES = ("mini",)


@dataclass(frozen=True)
class Row:
    """A row of the table: its title, its recipe, and the paper's accuracies by width (%; None: collapses)."""

    title: str
    recipe: str
    paper: tuple[float | None, ...] = ()


ROWS = {
    "random": Row("random initialisation", "mini_us3l"),
    "individual": Row("SimSiam, individually trained", "mini_individual", (65.2, 64.0, 60.6, 51.2)),
    "snet": Row("SimSiam, S-Net", "mini_snet", (None, None, None, None)),
    "snet_distilled": Row("SimSiam, S-Net + distillation", "mini_snet_distilled", (46.9, 46.9, 46.7, 45.3)),
    "us3l": Row("US3L", "mini_us3l", (65.5, 65.3, 63.2, 59.7)),
    "us3l_no_teacher": Row("US3L without momentum teacher", "mini_us3l_no_teacher"),
    "us3l_sandwich": Row("US3L, sandwich rule throughout", "mini_us3l_sandwich"),
}


@dataclass(frozen=True)
class Cell:
    """One training run. `width` is that of an individually trained network, else None."""

    row: str
    seed: int
    width: float | None = None

    @property
    def name(self) -> str:
        width = "" if self.width is None else f"-{self.width}"
        return f"{self.row}{width}-seed{self.seed}"

    def config(self) -> Config:
        overrides = [f"train.seed={self.seed}", "checkpoint.dir=null"]  # short enough to start again
        if self.width is not None:
            overrides.append(f"sampler.widths=[{self.width}]")
        return load(ROWS[self.row].recipe, overrides)


def cells(rows: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells of the rows, the longest runs first, so that parallel processes finish together."""
    found = []
    for row in sorted(rows, key=lambda row: row in ("random", "individual")):
        for seed in seeds:
            found += [Cell(row, seed, width) for width in (WIDTHS if row == "individual" else (None,))]
    return found


# ------------------------------------------------------------------------------------------- one training run


def run_cell(cell: Cell, on_epoch: Callable[[int], None]) -> dict[str, Any]:
    """Train (except random weights) and evaluate one cell; its result, as its JSON file holds it.

    on_epoch: called with the number of epochs done.
    """
    start = time.perf_counter()
    config = cell.config()
    trainer = Trainer(config, console=Console(quiet=True), on_epoch=on_epoch)
    if cell.row != "random":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*violates all three guidelines")  # that is their point
            trainer.fit()
    method, data = trainer.method, trainer.data
    widths = WIDTHS if cell.width is None else (cell.width,)
    rows = evaluate(method.encoder_q, data, widths, probe="linear")
    images = torch.cat([images for images, _ in data.train_eval])[:SPREAD_IMAGES].to(trainer.device)
    for row in rows:
        embeddings = projections(method, images, row["width"])
        row.update(spread=spread(embeddings), effective_rank=effective_rank(embeddings))
    return {
        "row": cell.row,
        "seed": cell.seed,
        "width": cell.width,
        "rows": rows,
        "average_widths": trainer.sampler.average_widths(config.train.epochs),
        "seconds": round(time.perf_counter() - start, 1),
        **_decisive(config),
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


def run_cells(
    todo: Sequence[Cell], folder: Path, console: Console, *, processes: int | None = None
) -> list[dict[str, Any]]:
    """Results of the cells, in their order; those that `folder` lacks are run, with a progress display.

    processes: at the same time, each of one thread; None: one per CPU core.
    """
    results = {cell: _kept(cell, folder) for cell in todo}
    missing = [cell for cell in todo if results[cell] is None]
    if len(missing) < len(todo):
        console.print(f"{len(todo) - len(missing)} of {len(todo)} runs are kept from before (in {folder})")
    if missing:
        processes = min(processes or os.cpu_count() or 1, len(missing))
        for cell, result in _run_parallel(missing, console, processes):
            write_json(folder / f"{cell.name}.json", result)
            results[cell] = result
    return [result for result in results.values() if result is not None]


def _decisive(config: Config) -> dict[str, Any]:
    """What decides a cell's result: the version, and all of its configuration but the place of its checkpoints."""
    values = to_dict(config)
    del values["checkpoint"]
    return {"us3l": __version__, "config": values}


def _kept(cell: Cell, folder: Path) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads((folder / f"{cell.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: torn by a crash
        return None
    return result if _decisive(cell.config()).items() <= result.items() else None


def _run_parallel(todo: Sequence[Cell], console: Console, processes: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run the cells in `processes` processes; yields each as it is done."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    queue: Any = context.Queue()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ProcessPoolExecutor(processes, context, _start_process, (queue,)) as pool,
    ):
        overall = progress.add_task("all runs", total=len(todo), unit="runs")
        running: dict[Cell, TaskID] = {}
        pending = {pool.submit(_run_in_process, cell): cell for cell in todo}
        try:
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for cell, epoch, epochs in _drain(queue):
                    if cell not in pending.values():  # this message came later than its result
                        continue
                    if cell not in running:
                        running[cell] = progress.add_task(cell.name, total=epochs, unit="epochs")
                        if not console.is_terminal:
                            console.print(f"training {cell.name}")
                    progress.update(running[cell], completed=epoch)
                for future in done:
                    cell = pending.pop(future)
                    result = future.result()
                    if cell in running:
                        progress.remove_task(running.pop(cell))
                    progress.advance(overall)
                    console.print(_line(cell, result), soft_wrap=True)
                    yield cell, result
        finally:
            for future in pending:
                future.cancel()


def _line(cell: Cell, result: Mapping[str, Any]) -> str:
    accuracies = "  ".join(f"{row['width']}: {row['accuracy']:.1f}" for row in result["rows"])
    return f"{cell.name:<26} {result['seconds']:5.0f} s   accuracy  {accuracies}"


_queue: Any = None  # of a worker process, to report its progress by


def _start_process(queue: Any) -> None:
    global _queue
    _queue = queue
    threading.Thread(target=_die_with_parent, daemon=True).start()
    threadpool_limits(1)  # one core each; results do not depend on how many there are
    torch.set_num_threads(1)


def _die_with_parent() -> None:
    """Or a killed parent would leave its runs behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_process(cell: Cell) -> dict[str, Any]:
    epochs = cell.config().train.epochs
    _queue.put((cell, 0, epochs))
    return run_cell(cell, lambda epoch: _queue.put((cell, epoch, epochs)))


def _drain(queue: Any) -> Iterator[Any]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


# ------------------------------------------------------------------------------------------- the table


def series(results: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means over seeds: for each row of the table and width, widest first, accuracy, deviation, macs, params.

    `values` are the accuracies and `spreads` the spreads of the seeds, in ascending order of the seed.
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
        "spreads": [row["spread"] for row in rows],
    }


def accuracy_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Linear accuracy by row and width, mean over seeds, with the paper's figures beside it."""
    table = Table(title="Linear accuracy (%); paper: CIFAR-100, ResNet-18", title_justify="left")
    table.add_column("")
    for width in WIDTHS:
        table.add_column(str(width), justify="right")
    table.add_column("spread", justify="right")
    table.add_column("paper, same widths", style="dim", no_wrap=True)
    for name, rows in series(results).items():
        accuracies = [f"{row['accuracy']:.1f}" for row in rows]
        if len(rows[0]["values"]) > 1:
            accuracies = [f"{a} ± {row['deviation']:.1f}" for a, row in zip(accuracies, rows, strict=True)]
        smallest = _smallest_spread({row["width"]: row for row in rows})
        paper = " ".join("-" if value is None else f"{value}" for value in ROWS[name].paper)
        table.add_row(ROWS[name].title, *accuracies, f"{smallest:.2f}", paper)
    return table


# ------------------------------------------------------------------------------------------- its claims

# (better row, worse row, width, by how many points of accuracy at least), means over seeds; all hold with a
# margin over the noise between seeds.
GAPS = (
    ("individual", "random", 1.0, 5.0),
    ("individual", "random", 0.25, 10.0),
    ("individual", "snet", 1.0, 2.0),
    ("individual", "snet", 0.25, 8.0),
    ("individual", "snet_distilled", 1.0, 4.0),
    ("individual", "snet_distilled", 0.25, 3.0),
    ("us3l", "individual", 1.0, -2.5),
    ("us3l", "individual", 0.25, 0.5),
    ("us3l", "snet_distilled", 1.0, 4.0),
    ("us3l", "snet_distilled", 0.25, 4.0),
    ("us3l", "snet", 0.25, 8.0),
    ("us3l", "us3l_no_teacher", 1.0, 2.0),
    ("us3l", "us3l_no_teacher", 0.25, 5.0),
)
WORST_SEED_GAP = -1.0  # US3L against an individual network at the smallest width, in every seed
COLLAPSED_SPREAD, HEALTHY_SPREAD = 0.85, 0.90
AVERAGE_WIDTHS = 2.5  # of dynamic sampling with n = 3: (1 + 3 + 3 + 3) / 4


@dataclass(frozen=True)
class Threshold:
    """One claim: what was required (e.g. ">= 5"), what was measured, and whether it holds."""

    name: str
    required: str
    got: float
    passed: bool


def check_thresholds(results: Sequence[Mapping[str, Any]]) -> list[Threshold]:
    """The claims of the table, for all rows that `results` has; a claim about an absent row is left out.

    Differences of accuracies are in percentage points. All numbers are means over seeds where not said otherwise.
    """
    table = {name: {row["width"]: row for row in rows} for name, rows in series(results).items()}
    checks: list[Threshold] = []

    def least(name: str, required: float, got: float) -> None:
        checks.append(Threshold(name, f">= {required:g}", round(got, 3), got >= required))

    for better, worse, width, gap in GAPS:
        if better in table and worse in table:
            difference = table[better][width]["accuracy"] - table[worse][width]["accuracy"]
            least(f"{better} - {worse}, width {width}", gap, difference)
    smallest = min(WIDTHS)
    if "us3l" in table and "individual" in table:
        pairs = zip(table["us3l"][smallest]["values"], table["individual"][smallest]["values"], strict=True)
        worst = min(universal - individual for universal, individual in pairs)
        least(f"us3l - individual, width {smallest}, worst seed", WORST_SEED_GAP, worst)
    if "snet" in table:
        got = _smallest_spread(table["snet"])
        checks.append(
            Threshold(
                "snet, smallest spread of a width",
                f"<= {COLLAPSED_SPREAD}",
                round(got, 3),
                got <= COLLAPSED_SPREAD,
            )
        )
    if "us3l" in table:
        least("us3l, smallest spread of a width", HEALTHY_SPREAD, _smallest_spread(table["us3l"]))
        averages = {result["average_widths"] for result in results if result["row"] == "us3l"}
        exact = averages == {AVERAGE_WIDTHS}
        checks.append(Threshold("us3l, widths per step", f"== {AVERAGE_WIDTHS}", max(averages), exact))
    return checks


def _smallest_spread(row: Mapping[float, Mapping[str, Any]]) -> float:
    """Mean over seeds of the smallest spread among the widths."""
    by_seed = zip(*(line["spreads"] for line in row.values()), strict=True)
    return statistics.fmean(min(spreads) for spreads in by_seed)


def threshold_table(thresholds: Sequence[Threshold]) -> Table:
    table = Table(title="Claims", title_justify="left")
    for column in ("claim", "required", "got", ""):
        table.add_column(column, justify="right" if column in ("required", "got") else "left")
    for check in thresholds:
        verdict = "[green]holds[/]" if check.passed else "[bold red]FAILS[/]"
        table.add_row(check.name, check.required, f"{check.got:.2f}", verdict)
    return table


# ------------------------------------------------------------------------------------------- commands


def reproduce_table1(
    scale: str = "mini",
    seeds: int = 3,
    out: str | Path = "runs/table1_mini.json",
    *,
    console: Console | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Run (or complete) the whole table, print it beside the paper's, check its claims, and write `out`.

    The results of single runs (not their weights) are kept in a folder named like `out` without its suffix.

    Args:
        scale: "mini", the only one: a three-block ResNet on 14x14 Fashion-MNIST.
        seeds: number of seeds, from 0 on.
        out: the JSON file to write, with all numbers.

    Returns:
        What `out` holds: scale, seeds, table, thresholds, passed, paper, results, versions.
    """
    if scale not in SCALES:
        full = ", ".join(name for name in recipes() if name.startswith("cifar100_"))
        raise ValueError(
            f"scale: expected {' or '.join(SCALES)}, got {scale!r}. The paper's scale (CIFAR-100, days on GPUs) is not "
            f"run by this command: `us3l pretrain --config NAME` with one of {full}, then `us3l evaluate linear`"
        )
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    return _report(cells(tuple(ROWS), range(seeds)), Path(out), console or Console(), processes, scale)


def demo(
    folder: str | Path = "runs/demo", *, console: Console | None = None, processes: int | None = None
) -> dict[str, Any]:
    """US3L against individually trained networks, one seed: the table, and the plot accuracy_vs_macs.png."""
    console, folder = console or Console(), Path(folder)
    console.print(
        "One US3L network, which runs at any width, against four SimSiam networks trained for one width "
        "each: a three-block ResNet on the embedded 14x14 Fashion-MNIST (3000 images, no labels), 20 epochs."
    )
    report = _report(cells(("individual", "us3l"), (0,)), folder / "demo.json", console, processes, "mini")
    plot = plot_accuracy(
        {ROWS[name].title: rows for name, rows in report["table"].items()},
        folder / "accuracy_vs_macs.png",
        title="One network for all widths, or one for each",
    )
    console.print(f"accuracy against cost: {plot}")
    return report


def _report(todo: Sequence[Cell], out: Path, console: Console, processes: int | None, scale: str) -> dict[str, Any]:
    results = run_cells(todo, out.with_suffix(""), console, processes=processes)
    thresholds = check_thresholds(results)
    report = {
        "scale": scale,
        "seeds": sorted({cell.seed for cell in todo}),
        "table": series(results),
        "thresholds": [asdict(threshold) for threshold in thresholds],
        "passed": all(threshold.passed for threshold in thresholds),
        "paper": {name: row.paper for name, row in ROWS.items() if row.paper},
        "results": results,
        "versions": {
            "us3l": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(out, report)
    console.print(accuracy_table(results), threshold_table(thresholds))
    console.print(f"all numbers: {out}")
    return report
