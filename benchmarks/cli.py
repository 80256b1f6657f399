"""`us3l bench`, or `python -m benchmarks` without installing: measure and write the result as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import harness, ops, step, tables
from benchmarks.rivals import MODELS, Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

app = typer.Typer(help="Measure speed beside plain PyTorch, the sides taking turns.", no_args_is_help=True)
console = Console(stderr=True)
output = Console(width=None if sys.stdout.isatty() else 120)

Model = Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")]
Input = Annotated[int, typer.Option("--input", min=8, help="Side of the square images, pixels.")]
Stem = Annotated[str, typer.Option(help="cifar, imagenet, or auto: cifar up to 32 pixels.")]
Widths = Annotated[str, typer.Option(help="Widths of a step, the full one first.")]
Dtype = Annotated[str, typer.Option(help="fp32, or bf16 (autocast for all sides).")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of every side.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Json = Annotated[Path | None, typer.Option("--json", help="Where to write the result.")]


@app.callback()
def _prepare() -> None:
    harness.fix_allocator()


@app.command("step")
def step_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Annotated[int, typer.Option(min=2, help="Images per view.")] = 32,
    widths: Widths = "1.0,0.6,0.25",
    dtype: Dtype = "fp32",
    rivals: Annotated[str, typer.Option(help=f"Of {', '.join(step.RIVALS)}.")] = "published,eager,standalone",
    policy: Annotated[str, typer.Option("--step", help="us3l's updates: joint or per_width.")] = "joint",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; every side runs once in each.")] = 10,
    threads: Threads = 2,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """A whole training step: all widths, teacher, heads, losses, regulariser, update, EMA."""
    settings = _settings(model, size, stem, widths, dtype, device, threads)
    names = [_one_of("--rivals", name, step.RIVALS) for name in rivals.split(",")]
    with console.status("") as status:
        result = step.measure(
            settings,
            size=size,
            batch=batch,
            rivals=names,
            policy=_one_of("--step", policy, step.POLICIES),
            rounds=rounds,
            progress=status.update,
        )
    table = Table(
        "side", "median ms", "quartiles ms", "us3l is faster by", title=f"{model}, {size} px, {batch} per view"
    )
    for name, milliseconds in result["median_ms"].items():
        spread, ratio = result["spread"][name], result["ratios"].get(name)
        table.add_row(
            name, f"{milliseconds:.0f}", f"{spread['q1']:.0f} - {spread['q3']:.0f}", f"{ratio:.2f}x" if ratio else ""
        )
    output.print(table)
    _write(json, result)


@app.command("ops")
def ops_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Annotated[int, typer.Option(min=2, help="Images, both views together.")] = 64,
    widths: Widths = "1.0,0.75,0.5,0.25",
    only: Annotated[str, typer.Option(help="Layers with this in their name alone, e.g. 'conv 3x3/1'.")] = "",
    dtype: Dtype = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds at most; every side runs once in each.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Of measuring at most, for each layer and direction.")] = 0.8,
    threads: Threads = 2,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Forward and both gradients of every different layer of a model, with the errors against float64."""
    settings = _settings(model, size, stem, widths, dtype, device, threads)
    with console.status("") as status:
        result = ops.measure(
            settings, size=size, batch=batch, rounds=rounds, seconds=seconds, only=only, progress=status.update
        )
    table = Table("layer", "width", "direction", "backend", "us3l ms", "rate", "faster by", "error", "eager's error")
    for row in result["rows"]:
        unit = "gflops" if "gflops" in row else "gbps"
        table.add_row(
            row["layer"],
            f"{row['width']:g}",
            row["direction"],
            row["backend"],
            f"{row['median_ms']['us3l']:.2f}",
            f"{row[unit]['us3l']:.0f} {'GFLOP/s' if unit == 'gflops' else 'GB/s'}",
            f"{row['ratios']['eager']:.2f}x",
            f"{row['errors']['us3l']:.1e}",
            f"{row['errors']['eager']:.1e}",
        )
    output.print(table)
    kinds = Table("kind", "faster than eager by (geometric mean)", "at least")
    for kind, mean in result["geometric_mean_ratios"].items():
        kinds.add_row(kind, f"{mean:.2f}x", f"{result['minimum_ratios'][kind]:.2f}x")
    output.print(kinds)
    _write(json, result)


@app.command("table")
def table_command() -> None:
    """Make the README's tables of speed from the results in benchmarks/results/."""
    tables.README.write_text(tables.updated(tables.README.read_text(encoding="utf-8")), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run `arguments` (default: the command line's) as `step ...` or `ops ...`."""
    app(arguments, prog_name="us3l bench")


def _settings(model: str, size: int, stem: str, widths: str, dtype: str, device: str, threads: int) -> Settings:
    """The options that all commands share; also sets the number of threads."""
    torch.set_num_threads(threads)
    if stem == "auto":
        stem = "cifar" if size <= 32 else "imagenet"
    try:
        values = tuple(float(width) for width in widths.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected numbers between commas, got {widths!r}", param_hint="--widths") from None
    if values[0] != 1.0 or any(not 0 < width < 1 for width in values[1:]) or len(set(values)) < len(values):
        raise typer.BadParameter(f"expected 1.0, then different widths below it, got {widths}", param_hint="--widths")
    return Settings(
        model=_one_of("--model", model, MODELS),
        stem=_one_of("--stem", stem, ("cifar", "imagenet")),
        widths=values,
        dtype=DTYPES[_one_of("--dtype", dtype, tuple(DTYPES))],
        device=torch.device(_one_of("--device", device, ("cpu", "cuda"))),
    )


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        harness.write_json(path, result)


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise typer.BadParameter(f"expected one of {', '.join(choices)}, got {value!r}", param_hint=option)
    return value
