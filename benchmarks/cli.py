"""`us3l bench`, or `python -m benchmarks` without installing: measure and write the result as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from benchmarks import (
    communication,
    data,
    harness,
    inference,
    memory,
    ops,
    roofline,
    scaling,
    static,
    step,
    tables,
)
from benchmarks import widths as random_widths
from benchmarks.rivals import MODELS, Settings
from benchmarks.roofline import Machine
from us3l.errors import US3LError
from us3l.models import MODELS as ALL_MODELS
from us3l.models.vit import SLICINGS

Number = TypeVar("Number", int, float)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

app = typer.Typer(help="Measure speed beside plain PyTorch, the sides taking turns.", no_args_is_help=True)
console = Console(stderr=True)
output = Console(width=None if sys.stdout.isatty() else 120)

Model = Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")]
Input = Annotated[int, typer.Option("--input", min=8, help="Side of the square images, pixels.")]
Stem = Annotated[str, typer.Option(help="cifar, imagenet, or auto: cifar up to 32 pixels.")]
Batch = Annotated[int, typer.Option(min=2, help="Images per view.")]
Widths = Annotated[str, typer.Option(help="Widths of a step, the full one first.")]
Dtype = Annotated[str, typer.Option(help="fp32, or bf16 (autocast for all sides).")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of every side.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Json = Annotated[Path | None, typer.Option("--json", help="Where to write the result.")]


@app.callback()
def _prepare(context: typer.Context) -> None:
    if context.invoked_subcommand != "static":  # where nothing is timed, and what is kept would be gigabytes
        harness.fix_allocator()


@app.command("step")
def step_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Batch = 32,
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
    names = _several("--rivals", rivals, step.RIVALS)
    if dtype == "bf16" and "eager_bf16" in names:
        raise typer.BadParameter("eager_bf16: under --dtype bf16 it is eager; ask for that", param_hint="--rivals")
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


@app.command("widths")
def widths_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Batch = 32,
    least: Annotated[float, typer.Option(min=0.01, max=0.99, help="The smallest width of a step.")] = 0.25,
    dtype: Dtype = "fp32",
    steps: Annotated[int, typer.Option(min=1, help="Steps of either kind, taken twice.")] = 50,
    rivals: Annotated[str, typer.Option(help="compile: torch.compile at the random widths too.")] = "",
    rival_seconds: Annotated[float, typer.Option(min=0, help="Of the rival at most, compilation and all.")] = 300,
    threads: Threads = 2,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """A new random width in every step, beside a fixed one of equal multiply-accumulates."""
    settings = _settings(model, size, stem, f"1.0,{least}", dtype, device, threads)
    with console.status("") as status:
        result = random_widths.measure(
            settings,
            size=size,
            batch=batch,
            steps=steps,
            rivals=_several("--rivals", rivals, random_widths.RIVALS),
            rival_seconds=rival_seconds,
            progress=status.update,
        )
    for phase, ratio in result["ratios"].items():
        output.print(f"us3l, {phase}: a step of random widths takes {ratio:.3f} of one of fixed widths")
    if "compile" in result:
        random = result["compile"]["random"]
        output.print(
            f"compile: {result['compile']['ratio']:.1f} of it, {random['graphs']} graphs compiled "
            f"in {len(random['seconds'])} steps"
        )
    _write(json, result)


@app.command("memory")
def memory_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Batch = 32,
    widths: Widths = "1.0,0.6,0.25",
    dtype: Dtype = "fp32",
    rivals: Annotated[str, typer.Option(help=f"Of {', '.join(memory.RIVALS)}.")] = "published,eager",
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """The memory of a training step at its peak, each side in a process of its own (Linux, CPU)."""
    settings = _settings(model, size, stem, widths, dtype, "cpu", threads)
    with console.status("") as status:
        result = memory.measure(
            settings,
            size=size,
            batch=batch,
            rivals=_several("--rivals", rivals, memory.RIVALS),
            progress=status.update,
        )
    table = Table("side", "peak MB", "before the first step", "cached weights", "us3l's part of it")
    for name, reading in result["readings"].items():
        ratio = result["ratios"].get(name)
        table.add_row(
            name,
            f"{reading['peak_mb']:.0f}",
            f"{reading['made_mb']:.0f}",
            f"{reading['weight_cache_mb']:.0f}",
            f"{1 / ratio:.0%}" if ratio else "",
        )
    output.print(table)
    _write(json, result)


@app.command("scaling")
def scaling_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Batch = 32,
    widths: Annotated[str, typer.Option(help="At the batch and size given.")] = "1,.875,.75,.625,.5,.375,.25",
    batches: Annotated[str, typer.Option(help="At full width.")] = "4,8,16,32,64",
    sizes: Annotated[str, typer.Option(help="Pixels, at full width.")] = "16,24,32,48,64",
    dtype: Dtype = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; every point runs once in each.")] = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Where to plot to, as .svg or .png.")] = None,
) -> None:
    """The time of a step against width, batch and image size, beside its operations."""
    settings = _settings(model, size, stem, "1.0", dtype, device, threads)
    if plot is not None:
        _one_of("--plot", plot.suffix, (".svg", ".png"))
    with console.status("") as status:
        result = scaling.measure(
            settings,
            size=size,
            batch=batch,
            widths=_numbers("--widths", widths, float, least=0.01, most=1.0),
            batches=_numbers("--batches", batches, int, least=2),
            sizes=_numbers("--sizes", sizes, int, least=8),
            rounds=rounds,
            progress=status.update,
        )
    table = Table("", "value", "ms", "GFLOP/s of direct convolution")
    for point in result["points"]:
        rate = point["gflop"] / point["median_ms"] * 1e3
        table.add_row(point["axis"], f"{point['value']:g}", f"{point['median_ms']:.0f}", f"{rate:.0f}")
    output.print(table)
    _write(json, result)
    if plot is not None:
        scaling.plot(result, plot)


@app.command("inference")
def inference_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batches: Annotated[str, typer.Option(help="Images of a forward pass.")] = "1,32",
    widths: Widths = "1.0,0.75,0.5,0.25",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; every side runs once in each.")] = 20,
    threads: Threads = 2,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """A forward pass in evaluation at every width: the sliced network, the exported one, and with its norms folded."""
    settings = _settings(model, size, stem, widths, "fp32", device, threads)
    with console.status("") as status:
        result = inference.measure(
            settings,
            size=size,
            batches=_numbers("--batches", batches, int, least=1),
            rounds=rounds,
            progress=status.update,
        )
    columns = [text for side in inference.SIDES for text in (f"{side} ms", "faster by")]
    table = Table("batch", "width", "MMACs", *columns, title=f"{model}, {size} px; faster than the same at full width")
    for row in result["rows"]:
        readings = [(f"{row['median_ms'][side]:.2f}", f"{row['faster'][side]:.2f}x") for side in inference.SIDES]
        cells = [text for pair in readings for text in pair]
        table.add_row(f"{row['batch']}", f"{row['width']:g}", f"{row['macs'] / 1e6:.0f}", *cells)
    output.print(table)
    _write(json, result)


@app.command("communication")
def communication_command(
    model: Model = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Annotated[int, typer.Option(min=2, help="Images per view and process.")] = 16,
    widths: Widths = "1.0,0.6,0.25",
    processes: Annotated[int, typer.Option(min=2, help="Of the run, all on this machine.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every process.")] = 1,
    json: Json = None,
) -> None:
    """What the processes of a run send to each other in a step, beside DistributedDataParallel (Linux, CPU, gloo)."""
    settings = _settings(model, size, stem, widths, "fp32", "cpu", threads)
    with console.status("") as status:
        result = communication.measure(
            settings, size=size, batch=batch, processes=processes, steps=steps, progress=status.update
        )
    table = Table("side", "MB sent per step", "of the weights", "step ms", title=f"{model}, {processes} processes")
    for name, reading in result["readings"].items():
        sent = reading["sent_bytes"]
        share, milliseconds = sent / reading["weight_bytes"], reading["step_ms"]
        table.add_row(communication.SIDES[name], f"{sent / 1e6:.1f}", f"{share:.2f}", f"{milliseconds:.0f}")
    output.print(table)
    own = result["readings"]["us3l"]
    output.print(
        f"us3l sends 1/{result['ratios']['ddp']:.2f} of it. The all-reduce takes {own['all_reduce_ms']:.0f} ms, the "
        f"backward of the last width, with which it could overlap, {own['last_backward_ms']:.0f} ms"
    )
    _write(json, result)


@app.command("data")
def data_command(
    model: Model = "resnet18",
    size: Input = 224,
    stem: Stem = "auto",
    batch: Batch = 32,
    widths: Widths = "1.0,0.6,0.25",
    dtype: Dtype = "fp32",
    workers: Annotated[str, typer.Option(help="Numbers of loader processes.")] = "1,2",
    images: Annotated[int, typer.Option(min=8, help="JPEG files that are made, 500x375 pixels.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of measuring, for each path.")] = 5.0,
    threads: Threads = 2,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Images per second of every way to load them (files, shards, memory), beside what a training step consumes."""
    settings = _settings(model, size, stem, widths, dtype, device, threads)
    if images < 2 * batch:
        message = f"expected two batches of --batch {batch} at least, got {images}"
        raise typer.BadParameter(message, param_hint="--images")
    with console.status("") as status:
        result = data.measure(
            settings,
            size=size,
            batch=batch,
            workers=_numbers("--workers", workers, int, least=0),
            images=images,
            seconds=seconds,
            progress=status.update,
        )
    step = result["step"]["images_per_second"]
    table = Table("path", "workers", "colours and blur on", "images/s", "of what the step takes")
    for row in result["rows"]:
        rate = row["images_per_second"]
        table.add_row(row["path"], f"{row['workers']}", row["augment_on"], f"{rate:.0f}", f"{rate / step:.2f}")
    output.print(table)
    output.print(f"a step of {model} takes {step:.0f} images/s")
    _write(json, result)


@app.command("roofline")
def roofline_command(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(ALL_MODELS)}.")] = "resnet18",
    size: Input = 32,
    stem: Stem = "auto",
    batch: Batch = 128,
    widths: Widths = "1.0,0.625,0.25",
    slicing: Annotated[str, typer.Option(help=f"Of a ViT: one of {', '.join(SLICINGS)}.")] = "input",
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak of bf16 matrix products.")] = Machine.tflops,
    tbps: Annotated[float, typer.Option(min=0.001, help="Bandwidth of the memory, TB/s.")] = Machine.tbps,
    launch_us: Annotated[float, typer.Option(min=0, help="Of the host, for a kernel.")] = Machine.launch_us,
    gap_us: Annotated[float, typer.Option(min=0, help="Between kernels of a CUDA graph.")] = Machine.gap_us,
    kernel_us: Annotated[float, typer.Option(min=0, help="Of the shortest kernel.")] = Machine.kernel_us,
    json: Json = None,
) -> None:
    """What a step must compute, move and launch on a GPU, modelled for several ways to run it (measures nothing)."""
    result = roofline.measure(
        _one_of("--model", model, ALL_MODELS),
        stem=_stem(stem, size),
        size=size,
        batch=batch,
        widths=_widths(widths),
        slicing=_one_of("--slicing", slicing, SLICINGS),
        machine=Machine(tflops, tbps, launch_us, gap_us, kernel_us),
    )
    parts = list(dict.fromkeys(part for row in result["parts"].values() for part in row))
    columns = [Column(name, overflow="fold") for name in ("", "wall ms", "kernels", "TFLOP", "GB", *parts)]
    table = Table(*columns, title=f"{model}, {size} px, {batch} per view")
    for name, row in result["rows"].items():
        spent = [f"{result['parts'][name].get(part, 0):.1f}" for part in parts]
        counts = [f"{row['wall_ms']:.1f}", f"{row['kernels']}", f"{row['tflop']:.2f}", f"{row['gbyte']:.1f}"]
        table.add_row(name, *counts, *spent)
    output.print(table)
    for name, row in result["rows"].items():
        output.print(f"{name}  {row['title']}")
    _write(json, result)


@app.command("static")
def static_command(
    capabilities: Annotated[str, typer.Option(help="Compute capabilities to compile for.")] = ",".join(
        map(str, static.CAPABILITIES)
    ),
    out: Annotated[Path, typer.Option(help="Folder to write to, as JSON and Markdown.")] = static.RESULTS,
) -> None:
    """Compile every shipped Triton binary, without a GPU: registers, spills, instructions. Fails if one is not well."""
    wanted = [
        int(_one_of("--capabilities", c, tuple(map(str, static.CAPABILITIES)))) for c in capabilities.split(",")
    ]
    with console.status("") as status:
        result = static.measure(wanted, progress=status.update)
    file = static.path(out, result["triton"])
    harness.write_json(file, result)
    file.with_suffix(".md").write_text(static.markdown(result), encoding="utf-8")
    wrong = [f"sm_{row['capability']} {row['name']}: {'; '.join(row['problems'])}" for row in result["rows"]]
    wrong = [text for text, row in zip(wrong, result["rows"], strict=True) if row["problems"]]
    more = sum(result["more_of_steps"].values())
    output.print(f"{len(result['rows'])} binaries, {more} more of steps, {len(wrong)} not well: {file}")
    for text in wrong:
        output.print(text)
    if wrong:
        raise typer.Exit(1)


@app.command("table")
def table_command() -> None:
    """Make the README's tables of speed from the results in benchmarks/results/."""
    tables.README.write_text(tables.updated(tables.README.read_text(encoding="utf-8")), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run `arguments` (default: the command line's) as `step ...` or `ops ...`."""
    try:
        app(arguments, prog_name="us3l bench")
    except (US3LError, harness.Mismatch) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, US3LError) else 1)


def _settings(model: str, size: int, stem: str, widths: str, dtype: str, device: str, threads: int) -> Settings:
    """The options that all commands share; also sets the number of threads."""
    torch.set_num_threads(threads)
    return Settings(
        model=_one_of("--model", model, MODELS),
        stem=_stem(stem, size),
        widths=_widths(widths),
        dtype=DTYPES[_one_of("--dtype", dtype, tuple(DTYPES))],
        device=_device(device),
    )


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        harness.write_json(path, result)


def _device(name: str) -> torch.device:
    if _one_of("--device", name, ("cpu", "cuda")) == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here (`us3l doctor` says why)", param_hint="--device")
    return torch.device(name)


def _stem(stem: str, size: int) -> str:
    if stem == "auto":
        return "cifar" if size <= 32 else "imagenet"
    return _one_of("--stem", stem, ("cifar", "imagenet"))


def _widths(text: str) -> tuple[float, ...]:
    values = tuple(_numbers("--widths", text, float, least=0.01, most=1.0))
    if values[0] != 1.0:
        raise typer.BadParameter(f"expected 1.0, then different widths below it, got {text}", param_hint="--widths")
    return values


def _numbers(
    option: str, text: str, kind: Callable[[str], Number], *, least: float, most: float = math.inf
) -> list[Number]:
    """"1,0.5" as numbers of that kind, all different and from `least` to `most`."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers between commas, got {text!r}", param_hint=option) from None
    if not all(least <= value <= most for value in values) or len(set(values)) < len(values):
        bounds = f"of {least:g} and more" if most == math.inf else f"from {least:g} to {most:g}"
        raise typer.BadParameter(f"expected different numbers {bounds}, got {text!r}", param_hint=option)
    return values


def _several(option: str, text: str, choices: tuple[str, ...]) -> list[str]:
    return [_one_of(option, value, choices) for value in text.split(",") if value]


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise typer.BadParameter(f"expected one of {', '.join(choices)}, got {value!r}", param_hint=option)
    return value
