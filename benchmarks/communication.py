"""What the processes of a run send to each other in a step, beside DistributedDataParallel around the same network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import report
from benchmarks.rivals import VIEWS, Settings
from benchmarks.step import trainer_config
from us3l.distributed import World
from us3l.methods import Method, build_method
from us3l.step import TrainStep
from us3l_kernels.optim import SGD

SIDES = {"us3l": "one all-reduce of the flat buffer", "ddp": "DistributedDataParallel, for every width"}
WARMUP = 1


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    processes: int,
    steps: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Of a joint step (CPU, gloo, processes of this machine): bytes that process 0 sends, as the system counts them,
    and medians (ms) of the step, of the all-reduce in it, and of the backward of the last width, the only one that a
    reduction could overlap with, as the gradients of all widths add up in one buffer.
    """
    readings = {}
    for side in SIDES:
        progress(f"{side}: {WARMUP} + {steps} steps of {processes} processes")
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        ):
            runs = [
                pool.submit(
                    _run, side, settings, size, batch, steps, World(rank, processes, rank), f"file://{folder}/store",
                    torch.get_num_threads(),
                )
                for rank in range(processes)
            ]  # fmt: skip
            readings[side] = [run.result() for run in runs][0]
    return report(
        "communication",
        settings.describe() | {"input": size, "batch": batch, "processes": processes, "steps": steps},
        settings.device,
        readings=readings,
        ratios={"ddp": readings["ddp"]["sent_bytes"] / readings["us3l"]["sent_bytes"]},
    )


def _run(
    side: str, settings: Settings, size: int, batch: int, steps: int, world: World, store: str, threads: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=world.rank, world_size=world.size)
    torch.manual_seed(0)
    method = build_method(trainer_config(settings, "joint")).to(memory_format=torch.channels_last).train()
    shape = (VIEWS * batch, 3, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(world.rank)).to(
        memory_format=torch.channels_last
    )
    step = _US3L(settings, method, world) if side == "us3l" else _DDP(settings, method)
    sent, seconds = [], []
    for turn in range(WARMUP + steps):
        dist.barrier()
        before, start = _sent_bytes(), time.perf_counter()
        step(images)
        if turn >= WARMUP:
            seconds.append(time.perf_counter() - start)
            sent.append(_sent_bytes() - before)
    parts = step.parts(images, steps) if isinstance(step, _US3L) else {}
    weights = sum(p.numel() * p.element_size() for p in method.student_parameters())
    dist.destroy_process_group()
    return {"sent_bytes": median(sent), "weight_bytes": weights, "step_ms": median(seconds) * 1e3} | parts


class _US3L:
    """The trainer's own step."""

    def __init__(self, settings: Settings, method: Method, world: World) -> None:
        self.settings = settings
        self.step = TrainStep(trainer_config(settings, "joint"), method, world)

    def __call__(self, images: Tensor) -> None:
        self.step(images, self.settings.widths, lr=self.settings.lr, alpha=self.settings.alpha)

    def parts(self, images: Tensor, repeats: int) -> dict[str, float]:
        """Medians (ms) of the all-reduce, with nobody to wait for, and of the backward of the last width."""
        targets = self.step.method.targets(images, width=1.0)
        seconds: dict[str, list[float]] = {"all_reduce_ms": [], "last_backward_ms": []}
        for _ in range(WARMUP + repeats):
            loss = self.step.method(images, width=self.settings.widths[-1], full=False, targets=targets).loss
            start = time.perf_counter()
            loss.backward()
            seconds["last_backward_ms"].append(time.perf_counter() - start)
            dist.barrier()
            start = time.perf_counter()
            self.step.world.average_(self.step.gradients.flat)
            seconds["all_reduce_ms"].append(time.perf_counter() - start)
        return {name: median(values[WARMUP:]) * 1e3 for name, values in seconds.items()}


class _DDP:
    """The same losses and update; every backward reduces all gradients, as DistributedDataParallel does."""

    def __init__(self, settings: Settings, method: Method) -> None:
        self.settings, self.method = settings, method
        teacher = method.ema()
        assert teacher is not None
        self.teacher = teacher
        # A width leaves a predictor unused, so that it has to look for what is.
        self.network: nn.Module = DistributedDataParallel(method, find_unused_parameters=True)
        self.optimizer = SGD(method.student_parameters(), settings.lr, settings.momentum, settings.weight_decay)

    def __call__(self, images: Tensor) -> None:
        self.teacher.update()
        targets = self.method.targets(images, width=1.0)
        self.optimizer.zero_grad()
        for index, width in enumerate(self.settings.widths):
            self.network(images, width=width, full=index == 0, targets=targets).loss.backward()
        self.optimizer.step()


def _sent_bytes() -> int:
    """Bytes that this process has written, to sockets too (Linux)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["wchar"])
