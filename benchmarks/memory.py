"""The memory that a training step needs at its peak, each side in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import report
from benchmarks.rivals import Settings, initial_weights
from benchmarks.step import make_side, random_images
from us3l_kernels.weight_cache import cached_bytes

RIVALS = ("published", "eager", "standalone")
STEPS = 4


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    rivals: Sequence[str],
    stacked: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """MB (2^20 bytes) resident above what was before the side was made, all its weights and states with it: `peak_mb`
    over the first steps; `ratios[rival] = peak(rival) / peak(us3l)`, both without us3l's cache of transformed weights,
    which is given beside (`weight_cache_mb`).

    `stacked`: whether eager PyTorch takes both views in one batch. The allocator is as users have it.
    """
    os.environ.pop("GLIBC_TUNABLES", None)  # the setting for timing never gives memory back
    readings = {}
    for name in ("us3l", *rivals):
        progress(f"{name}: {STEPS} steps in a new process")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            reading = pool.submit(
                side_readings,
                name,
                settings,
                size=size,
                batch=batch,
                stacked=stacked,
                threads=torch.get_num_threads(),
            )
            readings[name] = reading.result()
    own = readings["us3l"]["peak_mb"] - readings["us3l"]["weight_cache_mb"]
    return report(
        "memory",
        settings.describe()
        | {"input": size, "batch": batch, "eager_views": "one batch" if stacked else "one by one"},
        settings.device,
        readings=readings,
        ratios={name: reading["peak_mb"] / own for name, reading in readings.items() if name != "us3l"},
    )


def side_readings(
    name: str, settings: Settings, *, size: int, batch: int, stacked: bool, threads: int
) -> dict[str, float]:
    """MB above what is resident now: when the side is made, at the peak of its first steps, and cached weights."""
    torch.set_num_threads(threads)
    images = random_images(settings, size=size, batch=batch)
    weights = initial_weights(settings)
    torch.nn.functional.conv2d(images[0], images[0][:8])  # threads and libraries are there before the first reading
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (man 5 proc)
    side = make_side(name, settings, weights, stacked=stacked, policy="joint")
    made = _status("VmRSS")
    for turn in range(STEPS):
        side.step(images[turn % len(images)])
    return {
        "made_mb": made - before,
        "peak_mb": _status("VmHWM") - before,
        "weight_cache_mb": cached_bytes() / 2**20 if name == "us3l" else 0.0,
    }


def _status(field: str) -> float:
    """MB of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"/proc/self/status has no {field}")
