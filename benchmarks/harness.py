"""The one way this project measures time: all sides in one process, taking turns, only after their results agree.

A *side* is a callable that does the same work as the others in its own way. Reported are medians with their
quartiles and ratios of medians; never a time without the versions, the processor and the settings it was taken with.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels.backends import measured, requested

# Freed memory stays in the process: otherwise large batches measure page faults of the kernel (8-22 % of a step),
# and by chance those of one side more than those of another.
ALLOCATOR = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)

FEWEST_ROUNDS = 5  # of which a median is worth reporting


class Mismatch(AssertionError):
    """Two sides computed different results: there is nothing to time."""


class Broken(BaseException):
    """Nothing more can be computed in this process. No handler of a side's own errors is to take it for one."""

    def __init__(self, side: str) -> None:
        super().__init__(f"by {side}")
        self.side = side


def why_broken(device: torch.device, stream: torch.cuda.Stream | None = None) -> str | None:
    """Why nothing more can be computed on `device` in this process; None if all is well.

    To Python an illegal address is an error like any other, but every later call of the process fails with it. After a
    capture that could not be ended, its stream may stay the current one (which is to be `stream`, or else the default
    one), and the allocator refuses to empty its cache, which every capture begins with.
    """
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        torch.ones(8, device=device).sum().item()
        torch.cuda.empty_cache()
        if torch.cuda.current_stream(device) != (stream or torch.cuda.default_stream(device)):
            return "a capture has left its stream the current one"
    except Exception as error:  # whatever it is, nothing can go on
        return told(error)
    return None


@contextmanager
def charged_to(side: str, device: torch.device) -> Iterator[None]:
    """An error inside that has broken the device is raised as `Broken`, by `side`."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        yield
    except Exception as error:
        if why_broken(device, stream) is not None:
            raise Broken(side) from error
        raise


def told(error: BaseException) -> str:
    """An error in one line, with those that it came on top of: that of a capture hides the one that spoilt it."""
    lines = []
    below: BaseException | None = error
    while below is not None:
        text = str(below).strip().splitlines() or [""]
        lines.append(f"{type(below).__name__}: {text[0]}")
        below = below.__cause__ or (None if below.__suppress_context__ else below.__context__)
    return " <- ".join(lines)


def fix_allocator() -> None:
    """Restart this process once under `ALLOCATOR`, which glibc reads only at start-up (elsewhere: nothing to do)."""
    if platform.libc_ver()[0] == "glibc" and os.environ.get("GLIBC_TUNABLES") != ALLOCATOR:
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": ALLOCATOR}
        )


def interleave(
    sides: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    warmup: int,
    seconds: float = math.inf,
    synchronise: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds of every side in every round. Sides take turns (A B A B), so that drift of the machine hits all of them.

    A side is called with the number of the round, from which it picks its input set: in a round all sides get the
    same one. `synchronise` waits for the device before the clock is read. The first `warmup` rounds are not counted;
    after `seconds` no further round starts, but `FEWEST_ROUNDS` (or `rounds`, if that is less) are always measured.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    samples: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    for turn in range(warmup + rounds):
        if turn >= warmup + FEWEST_ROUNDS and time.perf_counter() >= end:
            break
        for name, side in sides.items():
            synchronise()
            start = time.perf_counter()
            side(turn)
            synchronise()
            seconds = time.perf_counter() - start
            if turn >= warmup:
                samples[name].append(seconds)
            progress(f"round {turn + 1} of {warmup} + {rounds}: {name} {seconds * 1e3:.1f} ms")
    return samples


def summarise(samples: Mapping[str, list[float]], subject: str) -> dict[str, Any]:
    """Medians and quartiles (ms); `ratios[rival] = median(rival) / median(subject)`: above 1, `subject` is faster."""
    medians = {name: median(values) for name, values in samples.items()}
    return {
        "median_ms": {name: value * 1e3 for name, value in medians.items()},
        "ratios": {name: value / medians[subject] for name, value in medians.items() if name != subject},
        "spread": {name: _quartiles_ms(values) for name, values in samples.items()},
        "samples_ms": {name: [value * 1e3 for value in values] for name, values in samples.items()},
    }


def _quartiles_ms(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"q1": low * 1e3, "q3": high * 1e3, "iqr": (high - low) * 1e3}


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    given, expected = given.detach().double(), expected.detach().double()
    scale = torch.linalg.vector_norm(expected).item()
    return torch.linalg.vector_norm(given - expected).item() / (scale or 1.0)


def require_equal(what: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> float:
    """The largest `relative_error` over all tensors; raises `Mismatch` if it is above `tolerance` or not a number."""
    if given.keys() != expected.keys():
        raise Mismatch(f"{what}: different tensors: {sorted(given.keys() ^ expected.keys())}")
    errors = {name: relative_error(given[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if not errors[worst] <= tolerance:
        raise Mismatch(f"{what}: {worst} differs by {errors[worst]:.2e} (relative norm), allowed are {tolerance:.0e}")
    return errors[worst]


# Which part of a step an operator belongs to, by its name: the first line that matches.
PARTS = {
    "convolution": re.compile(r"conv"),
    "norm": re.compile(r"batch_norm|layer_norm"),
    "matrix product": re.compile(r"linear|addmm|(^|::)b?mm$|matmul"),
    "update": re.compile(r"sgd|adamw|lerp|addcmul|Optimizer", re.IGNORECASE),
    "elementwise": re.compile(r"relu|clamp|threshold|hardtanh|add|mul|div|neg|pow|sum|mean"),
    "memory": re.compile(r"cat|copy|fill|zero|clone|contiguous|ones|empty"),
}


def breakdown(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call by part of the step, each operator without those it calls; by the PyTorch profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        part = next((part for part, pattern in PARTS.items() if pattern.search(event.key)), "other")
        parts[part] += event.self_cpu_time_total / 1e3
    return parts


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What `interleave` calls to wait for `device`."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def peaks(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Operations per second of a large matrix product and of a wide 3x3 convolution, both as torch runs them: the best
    of them is the roof that direct convolutions cannot pass (on some processors torch.mm is the weaker one).
    """
    channels, side = 256, 16
    # On a GPU a millisecond of work, or the launch would be a good part of it.
    size, images = (8192, 2048) if device.type == "cuda" else (2048, 32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    x = torch.randn(images, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(x)
    products = {
        "matrix product": (lambda: a @ b, size**3),
        "convolution": (lambda: F.conv2d(x, weight, padding=1), x.numel() * channels * 9),
    }
    with torch.no_grad():
        return {name: 2 * count / _best(work, device) for name, (work, count) in products.items()}


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes read and written per second by a copy far larger than the caches."""
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    return min(interleave({"": lambda _: work()}, rounds=repeats, warmup=2, synchronise=synchroniser(device))[""])


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a time: versions, commit, processor, threads, allocator."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": measured.cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tuned": measured.table(device.type).fingerprint(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "allocator": os.environ.get("GLIBC_TUNABLES"),
    }


def _commit() -> str:
    """The commit of this source tree, marked when files differ from it; "unknown" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def report(benchmark: str, config: Mapping[str, Any], device: torch.device, **readings: Any) -> dict[str, Any]:
    """A result as it is written: which benchmark, its readings, the settings, and where they were taken."""
    return {
        "benchmark": benchmark,
        **readings,
        "config": {**config, "backends": requested()},
        "versions": environment(device),
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
