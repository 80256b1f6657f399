"""The command line: `us3l <command>`. Nothing heavy is imported before a command runs, so that `--help` is instant."""

from __future__ import annotations

import importlib
import math
import signal
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from us3l.errors import CheckpointError, ConfigError, US3LError
from us3l.monitor import say

if TYPE_CHECKING:
    from us3l.config import Config
    from us3l.evaluation import SGDProtocol
    from us3l_kernels.width import Width

app = typer.Typer(
    help="Universally slimmable self-supervised learning: one run, one set of weights, a network for every width.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


class Probe(str, Enum):
    """How features are judged."""

    knn = "knn"
    linear = "linear"
    classifier = "classifier"


class Format(str, Enum):
    """What an exported sub-network is written as."""

    torch = "torch"
    safetensors = "safetensors"
    onnx = "onnx"


class Task(str, Enum):
    """What a detector finds: boxes, or masks as well."""

    detection = "detection"
    segmentation = "segmentation"


class Norm(str, Enum):
    """What the norms of a detector's backbone do."""

    sync = "sync"
    frozen = "frozen"


class Protocol(str, Enum):
    """How the linear classifier is trained."""

    auto = "auto"
    lbfgs = "lbfgs"
    cifar = "cifar"
    imagenet = "imagenet"


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. train.epochs=20.", show_default=False)
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A checkpoint of `us3l pretrain`, or a run's folder: its newest.")
]
Widths = Annotated[str, typer.Option(help="Widths in (0, 1], separated by commas.")]
Plan = Annotated[
    str, typer.Option(help="A width, or a plan: 0.5,layer3=0.25 is layer3 at 0.25 and the rest at 0.5.")
]
Plot = Annotated[Path | None, typer.Option(help="Plot accuracy against MACs into this PNG.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")]


@app.command()
def pretrain(
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="A YAML file, or the name of a recipe.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="A checkpoint, or a run's folder; or `auto`: the newest one of checkpoint.dir, if any."),
    ] = None,
) -> None:
    """Pre-train a slimmable network. Under torchrun, on several devices.

    With --resume PATH and without --config, the configuration is that of the checkpoint.
    """
    from us3l import checkpoint as checkpoints
    from us3l import config as configs
    from us3l.distributed import launched
    from us3l.engine import Trainer, resolve_device

    if resume is not None and resume != "auto":
        resume = str(_newest(Path(resume)))
    if config is None and resume is not None and resume != "auto":
        loaded = configs.from_dict(checkpoints.load(resume)["config"], overrides or ())
    else:
        loaded = configs.load(config, overrides or ())
    with launched(resolve_device(loaded.train.device).type) as world:
        trainer = Trainer(loaded, world=world, console=console)
        if world.is_main:  # after the data were found: an error is not to be looked for below a page of keys
            console.print(escape(configs.to_yaml(loaded)), highlight=False)
        if resume is not None:
            trainer.resume(resume)
        if trainer.epoch == loaded.train.epochs:
            console.print(f"This run is finished: all {trainer.epoch} epochs are done.")
            return
        try:
            trainer.fit()
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        if world.is_main and loaded.checkpoint.dir is not None:
            console.print(f"Done. Next: us3l evaluate linear {loaded.checkpoint.dir}", soft_wrap=True)


@app.command()
def evaluate(
    probe: Annotated[Probe, typer.Argument(help="Nearest neighbours, a linear classifier, or (supervised) its own.")],
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    widths: Widths = "1.0,0.75,0.5,0.25",
    protocol: Annotated[
        Protocol,
        typer.Option(help="Of the linear classifier. auto: the data's published one (SGD); L-BFGS for small data."),
    ] = Protocol.auto,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Accuracy of sub-networks on frozen features, calibrated where the checkpoint holds no statistics."""
    from us3l import report
    from us3l.evaluation import evaluate as evaluate_widths

    wanted = _parse_widths(widths)
    checkpoint = _newest(checkpoint)
    config, method, data = _open(checkpoint, overrides, wanted)
    if probe is Probe.classifier and not method.labelled:
        raise ConfigError(f"evaluate classifier: {checkpoint} was trained without labels; try knn or linear")
    with console.status("") as status:
        rows = evaluate_widths(
            method.encoder_q,
            data,
            wanted,
            probe.value,
            protocol=_protocol(protocol, config) if probe is Probe.linear else None,
            on_width=lambda row: status.update(f"width {row['width']}: {row['accuracy']:.2f} %"),
        )
    console.print(report.evaluation_table(rows, title=f"{probe.value}, {config.data.name}"))
    if json is not None:
        report.write_json(json, {"checkpoint": str(checkpoint), "probe": probe.value, "rows": rows})
    if plot is not None:
        report.plot_accuracy({probe.value: rows}, plot)
        console.print(f"Plotted to {plot}")


@app.command()
def finetune(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    widths: Widths = "1.0,0.75,0.5,0.25",
    labels: Annotated[
        str | None,
        typer.Option(help="Semi-supervised: a share, e.g. 1%, equal of all classes; or a list.", metavar="SHARE|FILE"),
    ] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rate; several, separated by commas: each width takes its best.")
    ] = None,
    head_lr: Annotated[
        float | None, typer.Option(help="Of the classifier, beside the first --lr; it moves with it.", min=0)
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the labelled share and the classifier.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results and weights; default: finetune/NAME beside CKPT.")
    ] = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Fine-tune sub-networks, each on its own: on another data set (data.name=...), or on a share of the labels.

    What was done is not done again: a run that was interrupted goes on.
    """
    from dataclasses import replace

    from us3l import report
    from us3l.evaluation import finetune as finetune_widths
    from us3l.evaluation.finetune import protocol_for

    wanted, rates = _parse_widths(widths), _parse_rates(lr)
    checkpoint = _newest(checkpoint)
    config, method, data = _open(checkpoint, overrides, wanted)
    indices = None if labels is None else _labelled(labels, data, seed)
    share = 1.0 if indices is None else len(indices) / len(data.train_labels)
    protocol = protocol_for(config.data.name, None if labels is None else share)
    protocol = replace(
        protocol.of(epochs or protocol.epochs),
        lr=rates[0] if rates else protocol.lr,
        head_lr=protocol.head_lr if head_lr is None else head_lr,
        batch_size=batch_size or protocol.batch_size,
    )
    name = config.data.name + ("" if indices is None else f"-{len(indices)}-labels-seed-{seed}")
    folder = checkpoint.parent / "finetune" / name if out is None else out
    with console.status(name) as status:
        rows = finetune_widths(
            method.encoder_q,
            data,
            wanted,
            protocol,
            folder,
            indices=indices,
            learning_rates=rates,
            seed=seed,
            amp=config.train.amp,
            subject={"data": _images_of(config)},
            on_epoch=lambda width, rate, done, loss: status.update(
                f"width {width}, learning rate {rate:g}: epoch {done}/{protocol.epochs}, loss {loss:.4f}"
            ),
        )
    title = f"fine-tuned, {config.data.name}" + ("" if labels is None else f", {share:.2%} of the labels")
    console.print(report.evaluation_table(rows, title=title))
    console.print(f"Results and weights are in {folder}", soft_wrap=True)
    if json is not None:
        about = {"checkpoint": str(checkpoint), "data": config.data.name, "labels": share}
        report.write_json(json, {**about, "rows": rows})
    if plot is not None:
        report.plot_accuracy({title: rows}, plot)
        console.print(f"Plotted to {plot}")


@app.command()
def detect(
    checkpoint: Checkpoint,
    coco_root: Annotated[Path, typer.Option(help="Folder with train2017/, val2017/ and annotations/.")],
    overrides: Overrides = None,
    width: Plan = "0.5",
    task: Annotated[Task, typer.Option(help="Faster R-CNN, or Mask R-CNN.")] = Task.segmentation,
    norm: Annotated[
        Norm, typer.Option(help="Norms of the backbone: statistics of the batch, over all processes; or left alone.")
    ] = Norm.sync,
    iterations: Annotated[int, typer.Option(min=1, help="Default: the schedule called 1x.")] = 90_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per iteration, of all processes together.")] = 16,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; default: 0.02 for 16 images, in proportion.", min=0)
    ] = None,
    min_size: Annotated[
        str, typer.Option(help="Shorter side of images: one of these by chance in training, the last in tests.")
    ] = "640,672,704,736,768,800",
    max_size: Annotated[int, typer.Option(min=1, help="Bound of the longer side.")] = 1333,
    train_split: Annotated[str, typer.Option(help="Of images; their annotations: instances_SPLIT.json.")] = "train2017",
    test_split: Annotated[str, typer.Option(help="Likewise.")] = "val2017",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of state and results; default: detect/ beside CKPT.")] = None,
) -> None:
    """Fine-tune a detector on a sub-network, and give its COCO metrics. Under torchrun, on several devices.

    A run that was stopped goes on from its last state, if it is started with the same options.
    """
    import torch

    from us3l import report
    from us3l.data import image_size, normalisation
    from us3l.distributed import launched
    from us3l.engine import resolve_device
    from us3l.evaluation.detection import CocoImages, Detection, DetectionProtocol, detector
    from us3l.evaluation.finetune import headless
    from us3l.results import weights_checksum

    wanted = _parse_width(width)
    sizes = [int(part) if part.isdecimal() else 0 for part in min_size.split(",")]
    if min(sizes) < 1 or max(sizes) > max_size:
        raise ConfigError(f"--min-size: expected positive numbers up to --max-size={max_size}, got {min_size!r}")
    checkpoint = _newest(checkpoint)
    config, method = _restore(checkpoint, overrides, [wanted])
    encoder = method.encoder_q
    if not encoder.stages:
        raise ConfigError(f"detect: a pyramid needs maps of several resolutions, and {config.model.name} has none")
    channels = config.model.in_channels or 0
    protocol = DetectionProtocol(
        task=task.value,
        norm=norm.value,
        iterations=iterations,
        batch_size=batch_size,
        lr=0.02 * batch_size / 16 if lr is None else lr,
        warmup=min(1000, iterations // 10),
        min_size=tuple(sizes),
        max_size=max_size,
    )
    folder = checkpoint.parent / "detect" / f"{task.value}-width-{width}" if out is None else out
    with launched(resolve_device(config.train.device).type) as world:
        device = resolve_device(config.train.device, world.local_rank)
        masks = task is Task.segmentation
        train = CocoImages(coco_root, train_split, channels=channels, masks=masks, seed=seed)
        test = CocoImages(coco_root, test_split, channels=channels, masks=masks)
        _calibrated(checkpoint, config, encoder, wanted)
        size = image_size(config.data)
        mean, std = normalisation(config.data.name, channels)
        torch.manual_seed(seed)
        model = detector(
            headless(encoder, wanted, (channels, size, size)),
            list(encoder.stages),
            len(train.categories),
            protocol,
            mean=mean,
            std=std,
            synchronise=world.size > 1 and norm is Norm.sync,
        )
        with (console if world.is_main else Console(quiet=True)).status("") as status:
            run = Detection(
                model.to(device),
                train,
                test,
                protocol,
                folder,
                subject={"weights": weights_checksum(encoder), "width": width, "images": len(train)},
                every_minutes=config.checkpoint.every_minutes,
                amp=config.train.amp,
                workers=config.data.workers,
                seed=seed,
                world=world,
                on_step=lambda done, loss: status.update(f"iteration {done}/{iterations}, loss {loss:.4f}"),
            )
            try:
                run.fit()
            except KeyboardInterrupt:
                raise typer.Exit(128 + signal.SIGINT) from None
            status.update(f"evaluating {len(test)} images")
            metrics = run.evaluate()
        if world.is_main:
            console.print(report.detection_table(metrics, title=f"{task.value}, {config.model.name}, width {width}"))
            about = {"checkpoint": str(checkpoint), **run.subject}
            report.write_json(folder / "results.json", {**about, "metrics": metrics})
            console.print(f"Results and weights are in {folder}", soft_wrap=True)


@app.command()
def calibrate(checkpoint: Checkpoint, overrides: Overrides = None, widths: Widths = "1.0,0.75,0.5,0.25") -> None:
    """Take the batch-norm statistics of sub-networks on the training data, and store them in the checkpoint."""
    from us3l import checkpoint as checkpoints
    from us3l.evaluation import calibrate as calibrate_width
    from us3l.evaluation.calibration import has_statistics
    from us3l_kernels.nn.calibration import statistics

    wanted = _parse_widths(widths)
    checkpoint = _newest(checkpoint)
    config, method, data = _open(checkpoint, overrides, wanted, other_images=False)
    if not has_statistics(method.encoder_q):
        raise ConfigError(f"calibrate: {config.model.name} in {checkpoint} has no batch norms, and needs no statistics")
    for width in wanted:
        with console.status(f"calibrating width {width}"):
            calibrate_width(method.encoder_q, data.train_eval, width)
    table = statistics(method.encoder_q)
    checkpoints.save(checkpoint, {**checkpoints.load(checkpoint), "statistics": table})
    console.print(f"{checkpoint} holds the statistics of the widths {', '.join(table)}")


@app.command()
def export(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    width: Plan = "0.5",
    format: Annotated[
        Format, typer.Option(help="A torch.export program; weights with a plain PyTorch file; an ONNX model.")
    ] = Format.torch,
    out: Annotated[
        Path | None, typer.Option(help="File, or folder of safetensors; default: by model and width, beside CKPT.")
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Put batch norms into the convolutions before them.")] = False,
) -> None:
    """Write a sub-network as a plain PyTorch or ONNX model, compared with the sliced network.

    It is calibrated on the run's training data, unless the checkpoint has statistics of this width. Its output is
    the pooled features.
    """
    from us3l import export as exports
    from us3l.data import image_size
    from us3l.report import quantity

    wanted = _parse_width(width)
    checkpoint = _newest(checkpoint)
    config, method = _restore(checkpoint, overrides, [wanted])
    size = image_size(config.data)
    name = f"{config.model.name}_{width}{exports.SUFFIXES[format.value]}"
    try:
        _calibrated(checkpoint, config, method.encoder_q, wanted)
        written = exports.export(
            method.encoder_q,
            wanted,
            checkpoint.parent / "export" / name if out is None else out,
            image_shape=(config.model.in_channels or 0, size, size),
            format=format.value,
            fold=fold,
            about={"model": config.model.name, "data": config.data.name, "checkpoint": checkpoint.name},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    console.print(
        f"Wrote {written.path}: {quantity(written.params)} parameters, {quantity(written.macs)} MACs, "
        f"{written.features} features. Read back, its output is the sub-network's to {written.error:.1e}",
        soft_wrap=True,
    )


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint of the authors' code, of MoCo or SEED; weights of torchvision or timm.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="A YAML file, or the name of a recipe, of this network.")] = None,
) -> None:
    """Make a checkpoint of weights from elsewhere, to evaluate, calibrate, export, search, or train from.

    The configuration has to describe the network of the file, e.g. model.name=resnet50 model.stem=imagenet.
    """
    from us3l import config as configs
    from us3l.imports import few, import_checkpoint

    loaded = configs.load(config, overrides or ())
    imported = import_checkpoint(loaded, file, out)
    console.print(f"Wrote {out}: {len(imported.matched)} tensors of {file}", soft_wrap=True)
    heads = sorted({name.partition(".")[0] for name in imported.initial if not name.startswith("encoder_")})
    notes = {
        "the teacher is a copy of the student": bool(imported.copied),
        "statistics of width 1.0: the running ones of the file": imported.statistics,
        f"as in a new run: {', '.join(['projector'] * any('.fc.' in name for name in imported.initial) + heads)}": bool(
            imported.initial
        ),
        f"in the file and not used: {few(imported.unused)}": bool(imported.unused),
    }
    for note, holds in notes.items():
        if holds:
            console.print(f"  {escape(note)}", soft_wrap=True, highlight=False)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="E.g. resnet18, resnet50, mobilenet_v2.")],
    widths: Widths = "1.0,0.75,0.5,0.25",
    size: Annotated[int, typer.Option("--input", min=1, help="Side of the images, pixels.")] = 224,
    stem: Annotated[str, typer.Option(help="imagenet, cifar or small.")] = "imagenet",
    classes: Annotated[int, typer.Option(min=1, help="Outputs of the classifier.")] = 1000,
    json: Json = None,
) -> None:
    """Parameters and multiply-accumulates of a model's sub-networks, with the classifier."""
    import torch
    from rich.table import Table

    from us3l import report
    from us3l.models import build_model
    from us3l.profile import profile as profile_widths

    wanted = _parse_widths(widths)
    try:
        with torch.device("meta"):
            network = build_model(model, stem=stem, num_classes=classes, image_size=size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows = profile_widths(network, (3, size, size), wanted)
    table = Table("width", "params (M)", "MACs (M)", title=f"{model}, {stem} stem, {size} px, {classes} classes")
    for row in rows:
        table.add_row(f"{row.width}", f"{row.params / 1e6:.2f}", f"{row.macs / 1e6:.0f}")
    console.print(table)
    if json is not None:
        values = [{"width": row.width, "params": row.params, "macs": row.macs} for row in rows]
        report.write_json(json, {"model": model, "input": size, "stem": stem, "classes": classes, "rows": values})


@app.command()
def search(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    max_macs: Annotated[str | None, typer.Option(help="Multiply-adds per image, e.g. 300M.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Parameters, with a linear classifier, e.g. 2.5M.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of one image on train.device, measured.", min=0)
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Sub-networks to evaluate.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the evolution.")] = 0,
    results: Annotated[
        Path | None, typer.Option(help="JSON lines, read and added to; default: search.jsonl beside CKPT.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the Pareto front into this PNG.")] = None,
) -> None:
    """Find the widths of the best sub-network under a budget, also one for each stage, by kNN.

    What was evaluated once is not evaluated again: a search that was interrupted goes on.
    """
    from us3l import report
    from us3l.evaluation import evaluate as evaluate_widths
    from us3l.search import Budget, Search, pareto_front

    budget = Budget(_quantity("--max-macs", max_macs), _quantity("--max-params", max_params), max_latency_ms)
    checkpoint = _newest(checkpoint)
    config, method, data = _open(checkpoint, overrides, [])
    switchable = config.model.norm == "switchable"
    finder = Search(
        method.encoder_q,
        data,
        checkpoint.parent / "search.jsonl" if results is None else results,
        min_width=config.sampler.min_width,
        widths=config.sampler.widths if switchable else None,
        subject={"data": _images_of(config)},
    )
    with console.status("") as status:
        rows = finder.run(
            budget,
            evaluations=evaluations,
            seed=seed,
            on_row=lambda n, row: status.update(f"{n}/{evaluations}: {row['accuracy']:.2f} % {row['width']}"),
        )
    cost = next(iter(budget.bounds))
    front = pareto_front(rows, cost)
    console.print(report.evaluation_table(front[::-1], title="Pareto front, kNN of held-out training images"))
    # Several sub-networks competed for the best reading: the test images, which took no part, judge anew.
    uniform = next((row for row in rows if set(row["plan"]) == {""}), None)
    finalists = [rows[0]] + ([uniform] if uniform not in (None, rows[0]) else [])
    widths = [row["plan"][""] if set(row["plan"]) == {""} else row["plan"] for row in finalists]
    tested = evaluate_widths(method.encoder_q, data, widths, "knn")
    console.print(report.evaluation_table(tested, title="The best, and the best of one width; kNN of the test images"))
    command = f"us3l export {checkpoint} --width {_width_text(widths[0])}"
    console.print(f"{len(rows)} sub-networks evaluated. Next: {command}", soft_wrap=True)
    if plot is not None:
        uniforms = [row for row in rows if set(row["plan"]) == {""}]
        series = {"Pareto front": front, "one width": pareto_front(uniforms, cost)}
        report.plot_accuracy(series, plot, x=cost, dots=rows, y="kNN accuracy, held-out (%)")
        console.print(f"Plotted to {plot}")


@app.command()
def shards(
    root: Annotated[Path, typer.Argument(help="Folder with train/*.tar and val/*.tar: data.root of data.name=shards.")],
    source: Annotated[
        Path | None, typer.Option(help="Write the shards first, of this image folder (train/CLASS/*, val/CLASS/*).")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images in a shard that is written.")] = 1000,
) -> None:
    """Write and index WebDataset shards: what training needs to know of them, and that all of them can be read."""
    from us3l.data.shards import index_shards, write_shards

    with console.status("") as status:
        if source is not None:
            write_shards(source, root, images, progress=status.update)
        for split in ("train", "val"):
            index = index_shards(root / split, progress=status.update)
            count = sum(len(shard["labels"]) for shard in index["shards"])
            console.print(f"{root / split}: {len(index['shards'])} shards, {count} images", soft_wrap=True)


@app.command()
def doctor() -> None:
    """What this machine and this installation offer, what is missing, and why."""
    from rich.table import Table

    from us3l_kernels.doctor import report

    table = Table(show_header=False, box=None, padding=(0, 1))
    for finding in report():
        table.add_row("[green]ok[/]" if finding.ok else "[yellow]no[/]", finding.subject, escape(finding.detail))
    console.print(table)


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="E.g. resnet18, resnet50, mobilenet_v2.")] = "resnet18",
    size: Annotated[int, typer.Option("--input", min=8, help="Side of the images, pixels.")] = 32,
    stem: Annotated[str, typer.Option(help="cifar, imagenet, small, or auto: cifar up to 32 pixels.")] = "auto",
    batch: Annotated[int, typer.Option(min=2, help="Images per step; each gives two views.")] = 64,
    widths: Annotated[str, typer.Option(help="Widths of a step, the full one first.")] = "1.0,0.6,0.25",
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure which backend is the fastest for each call of a training step, and use it from now on."""
    import torch

    from us3l import config as configs
    from us3l import report
    from us3l.allocator import keep_freed_memory
    from us3l.engine import resolve_device
    from us3l.methods import build_method
    from us3l.step import TrainStep
    from us3l_kernels.backends import measured
    from us3l_kernels.tune import tune as tune_calls

    wanted = _parse_widths(widths)
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype: expected fp32 or bf16, got {dtype!r}")
    stem = ("cifar" if size <= 32 else "imagenet") if stem == "auto" else stem
    config = configs.load(
        None,
        [
            f"model.name={model}", f"model.stem={stem}", "model.in_channels=3", "sampler.kind=fixed",
            f"sampler.widths={wanted}", f"train.amp={'none' if dtype == 'fp32' else dtype}",
            *(["method.distillation=none"] if len(wanted) == 1 else []),
        ],
    )  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    target = resolve_device(device)
    if target.type == "cpu":
        keep_freed_memory()  # as in training: fresh pages would be measured with the calls
    step = TrainStep(config, build_method(config).to(target).to(memory_format=torch.channels_last))
    images = torch.randn(2 * batch, 3, size, size, device=target).to(memory_format=torch.channels_last)
    with console.status("one step") as status:
        measurements = tune_calls(lambda: step(images, wanted, lr=0.0, alpha=0.0), progress=status.update)
    console.print(report.tuning_table(measurements))
    console.print(f"Written to {measured.path()}", soft_wrap=True)


@app.command()
def parity(
    file: Annotated[Path, typer.Argument(help="Numbers of the published algorithm (JSON).")],
    backend: Annotated[str | None, typer.Option(help="Of the sliced operations; default: automatic.")] = None,
    dtype: Annotated[str, typer.Option(help="float64, or float32 (first iteration only).")] = "float64",
    tol_first: Annotated[
        float | None, typer.Option(help="Largest error in the first iteration; default: the dtype's.", min=0)
    ] = None,
    tol_later: Annotated[float, typer.Option(help="Largest error later on.", min=0)] = 1e-5,
) -> None:
    """Repeat the published algorithm's first steps and compare; exit status 1 above a tolerance."""
    from us3l.parity import run_parity

    try:
        result = run_parity(file, backend, dtype, tol_first, tol_later)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    result.print(console)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def reproduce(
    what: Annotated[
        str, typer.Argument(help="table1, ablation-guidelines, ablation-sampling, ablation-groupreg, cifar or vit.")
    ],
    overrides: Overrides = None,
    scale: Annotated[
        str, typer.Option(help="mini: small networks on 14x14 images, half a minute a run; full: the paper's recipes.")
    ] = "mini",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, from 0 on; default: 3, or 1 for full.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results, and of what is kept of single runs.")] = Path(
        "runs/reproduce"
    ),
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one for each CPU core, or for full each GPU.")
    ] = None,
    json: Json = None,
) -> None:
    """Train and evaluate every row of a table of the paper; exit status 1 if one of its claims fails.

    What was done before is not done again.
    """
    from us3l import report
    from us3l.reproduce import reproduce as run_table

    result = run_table(
        what,
        scale,
        seeds=seeds,
        folder=out,
        overrides=overrides or (),
        console=console,
        processes=processes,
    )
    if json is not None:
        report.write_json(json, result)
    if not result["passed"]:
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """One US3L network against four individually trained ones, on real images, in a few minutes."""
    from us3l.reproduce import demo as run_demo

    run_demo(console=console)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure speed beside plain PyTorch (in a source checkout): `us3l bench step --help`."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "cli.py").is_file():
        raise US3LError(
            f"`us3l bench` needs a source checkout: there is no benchmarks folder beside the package in {checkout}"
        )
    sys.path.insert(0, str(checkout))
    importlib.import_module("benchmarks.cli").main(context.args)


def main() -> None:
    """Entry point of the console script. A user's error is one message and exit status 2."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="us3l")
    except _users_errors() as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _users_errors() -> tuple[type[Exception], ...]:
    """The user's to fix: ours, and files that cannot be read or written (their message names them)."""
    kernels = sys.modules.get("us3l_kernels.errors")  # importing it would import torch: there if a command got so far
    return (US3LError, OSError, *((kernels.SettingError, kernels.BackendError) if kernels else ()))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Warnings for people: no source line. Those of other kinds than UserWarning are for developers, and say where."""
    where = "" if category is UserWarning else f" ({category.__name__} at {filename}:{lineno})"
    say(errors, f"{message}{where}", warning=True)


def _parse_widths(text: str) -> list[float]:
    try:
        widths = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--widths: expected numbers separated by commas, got {text!r}") from None
    if not all(0 < width <= 1 for width in widths):
        raise ConfigError(f"--widths: expected widths in (0, 1], got {text!r}")
    return widths


def _parse_width(text: str) -> Width:
    """"0.5", or a plan: "0.5,layer3=0.25"."""
    from us3l_kernels.width import width_key

    plan: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            if name in plan:
                raise ValueError
            plan[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"--width: expected one width, or a plan such as 0.5,layer3=0.25, got {text!r}"
            ) from None
    width: Width = plan[""] if set(plan) == {""} else plan
    try:
        width_key(width)
    except ValueError as error:
        raise ConfigError(f"--width: {error}") from None
    return width


def _width_text(width: Width) -> str:
    """What :func:`_parse_width` reads."""
    if isinstance(width, int | float):
        return f"{width:g}"
    return ",".join([f"{width.get('', 1.0):g}", *(f"{name}={value:g}" for name, value in width.items() if name)])


def _quantity(option: str, text: str | None) -> float | None:
    """"300M" is 3e8; also k and G, or a plain number."""
    if text is None:
        return None
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{option}: expected a positive number such as 300M, 2.5M or 900k, got {text!r}")
    return number


# Keys of the data that do not change what a network sees in calibration.
_SAME_IMAGES = ("data.root", "data.workers", "data.batch_size", "data.download")


def _images_of(config: Config) -> dict[str, Any]:
    """The keys of `data` that say which images there are."""
    from us3l.config import to_dict

    return {key: value for key, value in to_dict(config)["data"].items() if f"data.{key}" not in _SAME_IMAGES}


def _newest(path: Path) -> Path:
    """A checkpoint file as it is; of a run's folder, the newest checkpoint that can be read."""
    from us3l.checkpoint import CheckpointFolder

    if not path.is_dir():
        return path
    found = CheckpointFolder(path, keep=1).newest(lambda message: say(errors, message, warning=True))
    if found is None:
        raise CheckpointError(f"no checkpoint in the folder {path}")
    return found[0]


def _open(
    path: Path, overrides: list[str] | None, widths: Sequence[Width], *, other_images: bool = True
) -> tuple[Config, Any, Any]:
    """What :func:`_restore` gives, and the data."""
    config, method = _restore(path, overrides, widths, other_images=other_images)
    return config, method, _data(path, config)


def _restore(
    path: Path, overrides: list[str] | None, widths: Sequence[Width], *, other_images: bool = True
) -> tuple[Config, Any]:
    """Configuration and method (on the configured device, calibrated as stored) of a checkpoint.

    Overrides may change where things are and run (`data.*`, `train.device`, ...), but not the network. Statistics that
    were stored for other images are dropped; with other_images=False, overrides that ask for others are refused.
    """
    from us3l import checkpoint as checkpoints
    from us3l import config as configs
    from us3l.engine import resolve_device
    from us3l_kernels.width import use_width

    saved = checkpoints.load(path)
    config = configs.from_dict(saved["config"], overrides or ())
    changed = [key for key, _, _ in configs.differences(saved["config"], configs.to_dict(config))]
    for key in changed:
        if not key.startswith(("data.", "train.")):
            raise ConfigError(f"{key} is part of the trained network in {path} and cannot be changed")
    images = [key for key in changed if key.startswith("data.") and key not in _SAME_IMAGES]
    if images and not other_images:
        raise ConfigError(
            f"{images[0]}: {path} can only hold statistics of the data that it was trained on. `us3l evaluate` takes "
            "those of other data by itself"
        )
    if images and saved["statistics"] is not None:
        saved["statistics"] = None
        say(errors, f"The statistics in {path} were taken with another {', '.join(images)}: taking them anew.")
    if config.model.norm == "switchable" and not all(width in config.sampler.widths for width in widths):
        raise ConfigError(
            f"--widths: the switchable norms of {path} have the widths {config.sampler.widths} alone, got {widths}"
        )
    method = checkpoints.restore(saved).to(resolve_device(config.train.device))
    for width in widths:
        try:
            with use_width(method.encoder_q, width):
                pass
        except ValueError as error:  # a plan that names what is not there
            raise ConfigError(f"--{error}") from None
    return config, method


def _data(path: Path, config: Config) -> Any:
    """The data of a checkpoint's configuration, on its device."""
    from us3l.data import make_data
    from us3l.engine import resolve_device

    data = make_data(config.data, config.train.seed, device=resolve_device(config.train.device))
    if data.in_channels != config.model.in_channels:
        raise ConfigError(
            f"data.name={config.data.name}: its images have {data.in_channels} channels, but the network in {path} "
            f"takes {config.model.in_channels}"
        )
    return data


def _calibrated(path: Path, config: Config, encoder: Any, width: Width) -> None:
    """Take the statistics of a width on the run's training images, unless the checkpoint has them."""
    from us3l.evaluation import calibrate as calibrate_width
    from us3l.evaluation.calibration import has_statistics
    from us3l_kernels.nn.calibration import statistics
    from us3l_kernels.width import width_key

    if has_statistics(encoder) and width_key(width) not in statistics(encoder):
        with console.status(f"calibrating width {_width_text(width)}"):
            calibrate_width(encoder, _data(path, config).train_eval, width)


def _protocol(protocol: Protocol, config: Config) -> SGDProtocol | None:
    from us3l.evaluation import CIFAR_PROTOCOL, IMAGENET_PROTOCOL

    published = {"cifar10": "cifar", "cifar100": "cifar", "image_folder": "imagenet", "shards": "imagenet"}
    name = published.get(config.data.name, "lbfgs") if protocol is Protocol.auto else protocol.value
    return {"lbfgs": None, "cifar": CIFAR_PROTOCOL, "imagenet": IMAGENET_PROTOCOL}[name]


def _labelled(text: str, data: Any, seed: int) -> Any:
    """Indices of the labelled images that --labels asks for."""
    from us3l.evaluation.finetune import balanced_subset, listed_subset

    if not text.endswith("%"):
        return listed_subset(data.train_names, Path(text))
    try:
        return balanced_subset(data.train_labels, float(text[:-1]) / 100, seed)
    except ValueError:
        raise ConfigError(f"--labels: expected a share such as 1%, or a file, got {text!r}") from None


def _parse_rates(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"--lr: expected positive numbers separated by commas, got {text!r}")
    return rates
