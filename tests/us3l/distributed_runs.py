"""Runs of several processes under torch's elastic agent, the one behind torchrun.

    python distributed_runs.py FOLDER {all,few}

Importing torch takes seconds, and a process that is forked from one which has done so none: a fork server starts them
all. Writes FOLDER/results.pt, which test_distributed.py reads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from us3l.config import Config, load
from us3l.data import make_data
from us3l.distributed import World, launched
from us3l.engine import Trainer
from us3l.methods import build_method
from us3l.step import TrainStep

BATCH, STEPS = 16, 2  # images of all processes together
TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4", "model.in_channels=3",
    "data.name=random", "data.size=8", "data.train_samples=32", "data.test_samples=8",
    "method.hidden_dim=16", "method.dim=8", "train.epochs=2", "train.device=cpu", "train.threads=1",
    "sampler.kind=sandwich",
]  # fmt: skip
GATHERED = ["train.sync_norms=true", "method.gather_negatives=true"]
VIT = ["model.name=vit_mini", "model.patch_size=4"]
EQUAL = {
    "simclr_momentum": [*GATHERED, "method.distillation=infonce"],
    "simclr": [*GATHERED, "method.target=live", "method.distillation=none"],
    "moco_v3": [*GATHERED, *VIT, "method.name=moco_v3", "method.distillation=infonce", "regulariser.kind=none"],
    "byol": ["train.sync_norms=true", "method.name=byol", "method.base_loss=cosine", "train.step=per_width"],
    "simsiam": ["train.sync_norms=true", "method.name=simsiam", "method.base_loss=cosine", "method.target=live"],
    "moco_v2": ["train.sync_norms=true", "method.name=moco_v2", "method.queue_size=80"],
    "dino": [
        "train.sync_norms=true", "method.name=dino", "method.base_loss=kl", "method.distillation=kl",
        "method.teacher_temperature=0.1",
    ],
    "seed": [
        "train.sync_norms=true", "method.name=seed", "method.base_loss=relational", "method.target=frozen",
        "method.teacher=TEACHER", "method.queue_size=80",
    ],
    "supervised": [
        "train.sync_norms=true", "method.name=supervised", "method.base_loss=cross_entropy", "method.target=live",
        "method.aux_head=false", "method.distillation=kl",
    ],
    "accumulated": ["method.name=byol", "method.base_loss=cosine"],
    "accumulated_queue": ["method.name=moco_v2", "method.queue_size=80"],
    "accumulated_per_width": ["train.step=per_width", "method.target=live"],
    "not_synchronised": [],
}  # fmt: skip
"""Overrides of runs whose result must not depend on the number of processes (but for the last)."""
FEW = {
    2: ["simclr_momentum", "simclr", "moco_v3", "byol", "accumulated", "not_synchronised"],
    4: ["simclr_momentum"],
}
"""Cases of the default test suite, by number of processes."""


def train_teacher(folder: Path) -> None:
    """What `method.teacher=TEACHER` stands for: the checkpoint of a short run."""
    overrides = [*TINY, "data.batch_size=16", f"checkpoint.dir={folder}", "checkpoint.keep=1"]
    Trainer(load(None, overrides), console=Console(quiet=True)).fit()


def configuration(case: str, size: int, folder: Path) -> Config:
    """Of one of `size` processes; where `case` says so, they have four parts together, each with its own statistics."""
    parts = [f"train.accumulate={4 // size}"] if case.startswith("accumulated") else []
    teacher = str(next(folder.glob("teacher/*.pt"), "none"))
    overrides = [override.replace("TEACHER", teacher) for override in EQUAL[case]]
    return load(None, [*TINY, *overrides, *parts, f"data.batch_size={BATCH // size}"])


def train_in_double(case: str, world: World, folder: Path) -> dict[str, Any]:
    """The weights after STEPS steps of `case` in float64, and what went in."""
    config = configuration(case, world.size, folder)
    torch.manual_seed(0)
    method = build_method(config).double().train()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(world.rank)  # process 0 alone decides where training starts
    world.broadcast_(method)
    step = TrainStep(config, method, world)
    data = make_data(config.data, 0, rank=world.rank, world_size=world.size)
    batches = data.labelled.epoch(0) if method.labelled else ((images, None) for images in data.train.epoch(0))
    reduced: list[int] = []
    images, losses = [], []
    with counted_all_reduces(reduced):
        for batch, labels in batches:
            images.append(batch)
            losses.append(step(batch.double(), [1.0, 0.5], lr=0.1, alpha=0.05, labels=labels).losses)
    assert len(images) == STEPS
    return {
        "weights": {key: value.clone() for key, value in method.state_dict().items()},
        "images": torch.stack(images),
        "losses": torch.stack(losses),
        "flat": step.gradients.flat.numel(),
        "reduced": reduced,
    }


class counted_all_reduces:
    """Context manager: the size of every tensor that is all-reduced goes into a list."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __enter__(self) -> None:
        self.original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def equality(cases: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    with launched("cpu") as world:
        return {case: train_in_double(case, world, folder) for case in cases}


def dying(folder: Path, die: bool) -> dict[str, Any]:
    """Train with checkpoints; with `die`, process 1 is killed in the middle of its sixth step, the first time."""
    with launched("cpu") as world:
        run = Trainer(
            load(None, [*TINY, "data.batch_size=4", f"checkpoint.dir={folder}", "checkpoint.every_steps=2"]),
            world=world,
            console=Console(quiet=True),
        )
        resumed = run.resume("auto")
        widths: list[list[float]] = []
        numbers: list[float] = []
        draw = run.sampler.draw

        def drawn(epoch: int) -> list[float]:
            widths.append(draw(epoch))
            return widths[-1]

        def before_forward(*_: object) -> None:
            if len(numbers) < len(widths):
                numbers.append(torch.rand(()).item())
            if die and not resumed and run.steps_done == 5 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        run.sampler.draw = drawn  # type: ignore[method-assign]
        run.method.register_forward_pre_hook(before_forward)
        start = run.steps_done
        run.fit()
        weights = {key: value.clone() for key, value in run.method.state_dict().items()}
        return {"weights": weights, "start": start, "widths": widths, "numbers": numbers}


def launch(size: int, task: Callable[..., dict[str, Any]], *arguments: Any, restarts: int = 0) -> dict[int, Any]:
    """What `task` returns in every process of a world, by rank."""
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=f"{task.__name__}{size}", rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=restarts, monitor_interval=0.1,
        start_method="forkserver",
    )  # fmt: skip
    return elastic_launch(settings, task)(*arguments)


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(
        ["us3l.engine", "torch.utils.tensorboard", "torch.distributed.launcher.api"]  # what takes time to import
    )
    folder, everything = Path(sys.argv[1]), sys.argv[2] == "all"
    if everything:
        train_teacher(folder / "teacher")
    cases = {size: list(EQUAL) if everything else FEW[size] for size in (2, 4)}
    results: dict[str, Any] = {size: launch(size, equality, cases[size], folder) for size in cases}
    results[1] = {0: equality(cases[2], folder)}
    for name in ("undisturbed", "killed"):
        results[name] = launch(2, dying, folder / name, name == "killed", restarts=1)
    torch.save(results, folder / "results.pt")
