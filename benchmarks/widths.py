"""What a new random width in every step costs, beside a fixed one of equal multiply-accumulates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.harness import interleave, report, summarise, synchroniser
from benchmarks.rivals import Compiled, Settings, initial_weights
from benchmarks.step import CHECK_SIZE, US3L, Side, check_exactly, encoder_macs, random_images

RIVALS = ("compile",)
STEADY_STEPS = 5  # of the compiled step at fixed widths, whose median is reported


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    steps: int = 50,
    rivals: Sequence[str] = (),
    rival_seconds: float = 300.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Steps at the widths 1.0, a random one and the least, and as many at 1.0, a fixed one and the least, taking turns.

    The fixed width has the multiply-accumulates of the random ones on average. They are run twice: `cold`, when every
    random width is met for the first time, and `warm`, the same widths again. `ratios`: mean time of the random steps
    over that of the fixed ones, for equal multiply-accumulates. Of `settings.widths` the first and last are kept.

    The rival compile takes the random steps until `rival_seconds` have passed, recompilations counted.
    """
    least = settings.widths[-1]
    generator = torch.Generator().manual_seed(0)
    drawn = (least + (1 - least) * torch.rand(steps, generator=generator, dtype=torch.float64)).tolist()
    macs = encoder_macs(settings, size, drawn)
    fixed = _width_of(settings, size, fmean(macs))
    full_macs, fixed_macs, least_macs = encoder_macs(settings, size, [1.0, fixed, least])
    # Per step and image: teacher at full width, forward and backward (three forwards' worth) of three widths.
    step_macs = {
        name: full_macs + 3 * (full_macs + middle + least_macs)
        for name, middle in {"random": fmean(macs), "fixed": fixed_macs}.items()
    }
    schedules: dict[str, list[tuple[float, ...]]] = {
        "random": [(1.0, width, least) for width in drawn],
        "fixed": [(1.0, fixed, least)] * steps,
    }
    settings = replace(settings, widths=(1.0, fixed, least))
    progress("comparing results")
    first = replace(settings, widths=schedules["random"][0])
    checks = check_exactly(first, size=min(size, CHECK_SIZE), rivals=(), stacked=True)

    images = random_images(settings, size=size, batch=batch)
    weights = initial_weights(settings)
    sides = {
        name: _scheduled(US3L(settings, weights, policy="joint"), widths, images) for name, widths in schedules.items()
    }
    readings, ratios = {}, {}
    for phase in ("cold", "warm"):
        samples = interleave(
            sides, rounds=steps, warmup=0, synchronise=synchroniser(settings.device), progress=progress
        )
        readings[phase] = summarise(samples, subject="fixed")
        quotient = fmean(samples["random"]) / fmean(samples["fixed"])
        ratios[phase] = quotient * step_macs["fixed"] / step_macs["random"]
    compiled = {}
    if "compile" in rivals:
        compiled["compile"] = _compiled(settings, schedules, weights, images, rival_seconds, progress)
    return report(
        "widths",
        settings.describe() | {"input": size, "batch": batch, "steps": steps},
        settings.device,
        ratios=ratios,
        macs_per_image=step_macs,
        random_widths=drawn,
        **readings,
        **compiled,
        checks=checks,
    )


def _width_of(settings: Settings, size: int, macs: float) -> float:
    """The width whose multiply-accumulates come nearest to `macs`; they grow in steps, as channels are rounded."""
    grid = [percent / 100 for percent in range(1, 100)]
    return min(zip(encoder_macs(settings, size, grid), grid, strict=True), key=lambda pair: abs(pair[0] - macs))[1]


def _scheduled(side: Side, schedule: Sequence[tuple[float, ...]], images: list[Tensor]) -> Callable[[int], Tensor]:
    """The side for `harness.interleave`: in a round it runs at the round's widths."""

    def step(turn: int) -> Tensor:
        side.settings = replace(side.settings, widths=schedule[turn])
        return side.step(images[turn % len(images)])

    return step


def _compiled(
    settings: Settings,
    schedules: dict[str, list[tuple[float, ...]]],
    weights: list[Tensor],
    images: list[Tensor],
    seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """torch.compile at the same widths: seconds of its steps, and the graphs it made for them."""
    counters.clear()
    side = Compiled(settings, weights, stacked=True)
    synchronise = synchroniser(settings.device)

    def run(kind: str, steps: int) -> dict[str, Any]:
        call, before = _scheduled(side, schedules[kind], images), counters["stats"]["unique_graphs"]
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < steps and (not taken or time.perf_counter() < end):
            synchronise()
            start = time.perf_counter()
            call(len(taken))
            synchronise()
            taken.append(time.perf_counter() - start)
            progress(f"compile, {kind} widths: step {len(taken)} of at most {steps}, {taken[-1]:.1f} s")
        return {"seconds": taken, "graphs": counters["stats"]["unique_graphs"] - before}

    fixed = run("fixed", 1 + STEADY_STEPS)
    random = run("random", len(schedules["random"]))
    return {
        "fixed": fixed,
        "random": random,
        "recompile_limit": torch._dynamo.config.recompile_limit,
        "ratio": fmean(random["seconds"]) / median(fixed["seconds"][1:] or fixed["seconds"]),
    }
