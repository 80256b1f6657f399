"""How the time of a step grows with width, batch and image size, beside its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness import interleave, report, summarise, synchroniser
from benchmarks.rivals import VIEWS, Settings, initial_weights
from benchmarks.step import US3L, encoder_macs, random_images

AXES = {"width": "width", "batch": "images per view", "input": "side of the images, pixels"}


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    widths: Sequence[float],
    batches: Sequence[int],
    sizes: Sequence[int],
    rounds: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Steps of us3l at one width, all taking turns: every width at `batch` and `size`, and full width at every batch
    and every size. `points`: the axis, the value on it, median and quartiles (ms), and operations (1e9): forward and
    backward of the student, forward of the teacher, of products and direct convolutions.
    """
    settings = replace(settings, widths=(1.0,))  # one network, and its teacher, at whatever width the point has
    side = US3L(settings, initial_weights(settings), policy="joint")
    values = [
        *(("width", width, width, batch, size) for width in widths),
        *(("batch", count, 1.0, count, size) for count in batches),
        *(("input", pixels, 1.0, batch, pixels) for pixels in sizes),
    ]
    points = [
        {
            "axis": axis,
            "value": value,
            "gflop": 2 * 4 * VIEWS * count * encoder_macs(settings, pixels, [width])[0] / 1e9,
        }
        for axis, value, width, count, pixels in values
    ]
    samples = interleave(
        {
            f"{axis} {value}": _point(side, width, random_images(settings, size=pixels, batch=count))
            for axis, value, width, count, pixels in values
        },
        rounds=rounds,
        warmup=1,
        synchronise=synchroniser(settings.device),
        progress=progress,
    )
    summary = summarise(samples, subject=next(iter(samples)))
    for point in points:
        name = f"{point['axis']} {point['value']}"
        point |= {"median_ms": summary["median_ms"][name], **summary["spread"][name]}
    return report(
        "scaling",
        settings.describe() | {"input": size, "batch": batch, "rounds": rounds},
        settings.device,
        points=points,
    )


def _point(side: US3L, width: float, images: list[Tensor]) -> Callable[[int], Tensor]:
    def step(turn: int) -> Tensor:
        side.settings = replace(side.settings, widths=(width,))
        return side.step(images[turn % len(images)])

    return step


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against each axis with its quartiles; dashed, the operations scaled to the point with most of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (axis, label) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        points = sorted((p for p in result["points"] if p["axis"] == axis), key=lambda point: point["value"])
        largest = max(points, key=lambda point: point["gflop"])
        x, y = ([point[key] for point in points] for key in ("value", "median_ms"))
        spread = [[p["median_ms"] - p["q1"] for p in points], [p["q3"] - p["median_ms"] for p in points]]
        axes.errorbar(x, y, spread, marker="o", capsize=2, label="us3l, one step")
        expected = [point["gflop"] / largest["gflop"] * largest["median_ms"] for point in points]
        axes.plot(x, expected, "--", color="grey", label="operations")
        axes.set(xlabel=label, ylabel="ms", ylim=(0, None))
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
