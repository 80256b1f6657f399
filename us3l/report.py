"""What people read at the end: tables, plots of accuracy against cost, JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from us3l.files import write_bytes, write_text

if TYPE_CHECKING:
    from us3l_kernels.backends.measured import Measurement

Row = Mapping[str, Any]  # one sub-network: width, accuracy (%), macs, params, ... (us3l.evaluation.evaluate)

_OTHER_COLUMNS = {"latency_ms": ("latency ms", ".3g"), "per_class": ("mean per class %", ".2f"), "lr": ("lr", "g")}
_AXES = {"macs": "multiply-adds per image", "params": "parameters", "latency_ms": "milliseconds per image"}
# Okabe & Ito's palette: distinguishable with every common form of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "osD^vP*X"


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON; as of :func:`us3l.files.write_bytes`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns but the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def quantity(number: float) -> str:
    """A count with three digits and a unit: 11.2M, 555M, 1.81G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def evaluation_table(rows: Sequence[Row], *, title: str) -> Table:
    """One line per sub-network, in the order given, with what else was measured of all of them."""
    table = Table(title=title, title_justify="left")
    others = {key: form for key, form in _OTHER_COLUMNS.items() if rows and all(key in row for row in rows)}
    for name in ("width", "accuracy %", "MACs", "params", *(name for name, _ in others.values())):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row["width"]), f"{row['accuracy']:.2f}", quantity(row["macs"]), quantity(row["params"])]
        table.add_row(*cells, *(f"{row[key]:{form}}" for key, (_, form) in others.items()))
    return table


def detection_table(metrics: Mapping[str, Mapping[str, float | None]], *, title: str) -> Table:
    """One line per kind of COCO metrics, boxes or masks; a dash where there was nothing to find."""
    table = Table(title=title, title_justify="left")
    for name in ("", *next(iter(metrics.values()))):
        table.add_column(name, justify="right")
    for kind, values in metrics.items():
        table.add_row(kind, *("-" if value is None else f"{value:.1f}" for value in values.values()))
    return table


def tuning_table(measurements: Sequence[Measurement]) -> Table:
    """One line per operation: how long its calls take on each backend, and on the chosen ones."""
    backends = list(dict.fromkeys(name for m in measurements for name in m.forward))
    columns = ("operation", "calls", *(f"{name} ms" for name in backends), "chosen ms")
    table = Table(*columns, title="The different calls of a step")
    for op in dict.fromkeys(m.call[0] for m in measurements):
        totals, fastest, taken = dict.fromkeys(backends, 0.0), 0.0, Counter[str]()
        for m in (m for m in measurements if m.call[0] == op):
            gradients = m.training is not None
            seconds, choice = m.seconds(gradients), m.choice(gradients)
            assert seconds is not None and choice is not None
            fastest += seconds[choice.backend]
            taken[choice.backend] += 1
            for name in backends:
                totals[name] += seconds.get(name, float("nan"))
        table.add_row(
            op,
            str(taken.total()),
            *(f"{total * 1e3:.1f}" if total == total else "cannot run all" for total in totals.values()),
            f"{fastest * 1e3:.1f} (" + ", ".join(f"{count} {name}" for name, count in taken.items()) + ")",
        )
    return table


def plot_accuracy(
    series: Mapping[str, Sequence[Row]],
    path: str | Path,
    *,
    x: str = "macs",
    title: str = "",
    dots: Sequence[Row] = (),
    y: str = "test accuracy (%)",
) -> Path:
    """Write a PNG of accuracy against `x`, one line per entry of `series` (name -> rows); return its path.

    Rows that carry a `deviation` (of the accuracy, over seeds) get error bars. `dots` are rows without a line.

    Raises:
        ValueError: `series` is empty, or `x` is not a cost ("macs", "params", "latency_ms").
    """
    if x not in _AXES:
        raise ValueError(f"x: expected one of {', '.join(_AXES)}, got {x!r}")
    if not any(series.values()):
        raise ValueError("series: expected at least one row to plot, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullFormatter

    class Quantities(LogFormatter):
        """Numbers as people write them, at as many ticks as there is room for."""

        def __call__(self, value: float, position: int | None = None) -> str:
            if not super().__call__(value, position):
                return ""
            return quantity(value) if value >= 1000 else f"{value:g}"

    # No pyplot: neither a display nor global state is needed, or touched.
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if dots:
        axes.scatter([row[x] for row in dots], [row["accuracy"] for row in dots], s=9, color="0.75", linewidths=0)
    ticks: dict[float, str] = {}
    for index, (name, rows) in enumerate(series.items()):
        if not rows:
            continue
        points = sorted(rows, key=lambda row: row[x])
        deviations = [row.get("deviation", 0.0) for row in points]
        axes.errorbar(
            [row[x] for row in points],
            [row["accuracy"] for row in points],
            yerr=deviations if any(deviations) else None,
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],  # no two lines alike
            markersize=5,
            linewidth=1.6,
            capsize=2,
            elinewidth=0.9,
        )
        ticks.update((row[x], f"{quantity(row[x])}\n{row['width']}") for row in points)
    axes.set_xscale("log")
    if len(ticks) <= 8 and not dots:  # the usual four widths: say which they are
        axes.set_xticks(sorted(ticks), [ticks[value] for value in sorted(ticks)])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_xlabel(f"{_AXES[x]} (below: width)")
    else:
        axes.xaxis.set_major_formatter(Quantities())
        axes.xaxis.set_minor_formatter(Quantities())
        axes.set_xlabel(_AXES[x])
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")  # whatever the name ends in
    write_bytes(path, image.getvalue())
    return Path(path)
