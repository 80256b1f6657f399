"""A whole US3L training step (every width, teacher, heads, losses, regulariser, update, EMA), beside its rivals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benchmarks.harness import (
    Mismatch,
    breakdown,
    copy_bandwidth,
    interleave,
    peaks,
    relative_error,
    report,
    require_equal,
    summarise,
    synchroniser,
)
from benchmarks.rivals import (
    VIEWS,
    Compiled,
    Eager,
    Layer,
    Published,
    Settings,
    Standalone,
    copy_weights,
    initial_weights,
)
from us3l.config import (
    Config,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RegulariserConfig,
    SamplerConfig,
    TrainConfig,
)
from us3l.methods import build_method
from us3l.profile import profile
from us3l.step import TrainStep

RIVALS = ("published", "eager", "compile", "compile_graphs", "standalone", "eager_bf16")
POLICIES = ("joint", "per_width")
INPUT_SETS = 4  # so that no side finds its images in the cache
CHECK_BATCH, CHECK_SIZE, CHECK_STEPS = 4, 64, 2

# Tolerances, relative norms of the losses and of all that a step changed. In float64 the same memory format agrees to
# rounding; `published` has another one, and deep networks with small batches amplify rounding up to 1e8 times.
# On a GPU cuDNN may take other algorithms for a slice than for what autograd copies of it, and some sum in any order.
EXACT = {"joint": 1e-9, "per_width": 1e-6}
EXACT_ON_GPU = 1e-6
CHECK_WEIGHT_DECAY = 0.1  # large: makes the regulariser a visible part of the update
# In the dtype that is timed a step differs from the same step in a wider dtype by its rounding and by the activations
# that this flips, the more the deeper the network and the smaller the batch. So plain PyTorch's own error in that step
# is the measure: us3l and compiled PyTorch may have a small multiple of it (which activations flip is chance: compiled
# PyTorch has been seen at 1.8 times eager's), or an error that is small anyway.
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
MULTIPLE = 3.0
SMALL = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Side(Protocol):
    """One way to take the step. Its `settings` may be given other widths between steps."""

    settings: Settings

    def step(self, images: Tensor) -> Tensor:
        """Train on images [2N, C, H, W], both views stacked; the loss of every width."""

    def parameters(self) -> list[Tensor]:
        """What is trained, in the order of `rivals.initial_weights`."""

    def teacher_parameters(self) -> list[Tensor]:
        """Of the momentum encoder, in the same order."""


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    rivals: Sequence[str],
    policy: str = "joint",
    rounds: int = 10,
    warmup: int = 2,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check that us3l and the rivals agree, then time them; see `harness.summarise` for the result's form.

    `size`: pixels of the square images; `batch`: images per view; `policy`: us3l's optimizer steps, joint (one for
    all widths) or per_width. The rival eager_bf16 is `eager` under bfloat16 autocast, whatever the dtype of the others.
    Raises `harness.Mismatch` when results differ.
    """
    images = random_images(settings, size=size, batch=batch)
    progress("both views in one batch, or one after the other: which is faster in eager mode")
    stacked, variants = faster_eager(settings, images)
    progress("comparing results in float64")
    checks = check_exactly(settings, size=min(size, CHECK_SIZE), rivals=rivals, stacked=stacked)

    weights = initial_weights(settings)
    sides: dict[str, Side] = {}
    for name in ("us3l", *rivals):
        if name == "eager_bf16":
            half = replace(settings, dtype=torch.bfloat16)
            sides[name] = Eager(half, weights, stacked=faster_eager(half, images)[0])
        else:
            sides[name] = make_side(name, settings, weights, stacked=stacked, policy=policy)
    progress("comparing results as timed")
    compile_seconds, as_timed = first_steps(settings, sides, weights, images[0], policy)

    samples = interleave(
        {name: stepper(side, images) for name, side in sides.items()},
        rounds=rounds,
        warmup=warmup,
        synchronise=synchroniser(settings.device),
        progress=progress,
    )
    progress("where the time goes")
    return report(
        "step",
        settings.describe()
        | {
            "input": size,
            "batch": batch,
            "step": policy,
            "rounds": rounds,
            "eager_views": "one batch" if stacked else "one by one",
            "eager_views_ms": variants,
        },
        settings.device,
        **summarise(samples, subject="us3l"),
        breakdown_ms={name: breakdown(partial(side.step, images[0])) for name, side in sides.items()},
        limit=limit(settings, images[0]),
        checks=checks | as_timed,
        compile_seconds=compile_seconds,
    )


def random_images(settings: Settings, *, size: int, batch: int, seed: int = 0) -> list[Tensor]:
    """Input sets [2 * batch, 3, size, size] of two views, never zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (VIEWS * batch, 3, size, size)
    return [
        torch.randn(shape, generator=generator).to(settings.device, settings.parameter_dtype)
        for _ in range(INPUT_SETS)
    ]


def trainer_config(settings: Settings, policy: str) -> Config:
    """The trainer's configuration of the step."""
    config = Config(
        model=ModelConfig(name=settings.model, stem=settings.stem, in_channels=3),
        method=MethodConfig(
            name="simclr",
            hidden_dim=settings.hidden_dim,
            dim=settings.dim,
            temperature=settings.temperature,
            momentum=settings.teacher_momentum,
        ),
        sampler=SamplerConfig(kind="fixed", widths=list(settings.widths)),
        optimizer=OptimizerConfig(momentum=settings.momentum, weight_decay=settings.weight_decay),
        regulariser=RegulariserConfig(alpha=settings.alpha, groups=settings.groups),
        train=TrainConfig(step=policy, amp="bf16" if settings.dtype is torch.bfloat16 else "none"),
    )
    if len(settings.widths) == 1:
        config.method.distillation = "none"
    return config


class US3L:
    """The library as its users run it: the ordinary modules, autograd, and the trainer's own iteration."""

    def __init__(self, settings: Settings, weights: list[Tensor], *, policy: str) -> None:
        self.settings = settings
        config = trainer_config(settings, policy)
        method = build_method(config).to(settings.device, settings.parameter_dtype)
        method = method.to(memory_format=torch.channels_last)
        self._parameters = method.student_parameters()
        assert method.encoder_k is not None  # the default target is the momentum encoder
        self._teacher_parameters: list[Tensor] = list(method.encoder_k.parameters())
        copy_weights(self._parameters, weights[: len(self._parameters)])  # one width alone needs no auxiliary head
        copy_weights(self._teacher_parameters, weights[: len(self._teacher_parameters)])
        self.training = TrainStep(config, method.train())

    def step(self, images: Tensor) -> Tensor:
        """Train on images [2N, C, H, W], both views stacked; the losses of the widths, without the regulariser."""
        images = images.to(memory_format=torch.channels_last)
        return self.training(images, self.settings.widths, lr=self.settings.lr, alpha=self.settings.alpha).losses

    def parameters(self) -> list[Tensor]:
        """Of the student, in the order of `rivals.initial_weights`."""
        return list(self._parameters)

    def teacher_parameters(self) -> list[Tensor]:
        """Of the momentum encoder, in the same order."""
        return self._teacher_parameters


def encoder_macs(settings: Settings, size: int, widths: Sequence[float]) -> list[int]:
    """Multiply-accumulates of the backbone and its projector for one image of `size` pixels at each of `widths`."""
    with torch.device("meta"):
        encoder = build_method(trainer_config(settings, "joint")).encoder_q
    return [row.macs for row in profile(encoder, (3, size, size), widths)]


def stepper(side: Side, images: list[Tensor]) -> Callable[[int], Tensor]:
    """The side for `harness.interleave`: a step on the round's input set."""
    return lambda turn: side.step(images[turn % len(images)])


def make_side(name: str, settings: Settings, weights: list[Tensor], *, stacked: bool, policy: str) -> Side:
    """us3l or a rival by its name on the command line; `stacked`: how eager PyTorch takes the views."""
    if name == "us3l":
        return US3L(settings, weights, policy=policy)
    if name == "published":
        return Published(settings, weights)
    kinds: dict[str, Callable[..., Side]] = {
        "eager": Eager, "compile": Compiled, "compile_graphs": partial(Compiled, mode="reduce-overhead"),
        "standalone": Standalone,
    }  # fmt: skip
    return kinds[name](settings, weights, stacked=stacked)


def faster_eager(settings: Settings, images: list[Tensor], rounds: int = 3) -> tuple[bool, dict[str, float]]:
    """Whether eager PyTorch is faster with both views in one batch, and the medians (ms) that say so."""
    weights = initial_weights(settings)
    variants = {"one batch": True, "one by one": False}
    samples = interleave(
        {
            name: stepper(Eager(settings, weights, stacked=stacked), images)
            for name, stacked in variants.items()
        },
        rounds=rounds,
        warmup=1,
        synchronise=synchroniser(settings.device),
    )
    medians = summarise(samples, subject="one batch")["median_ms"]
    return medians["one batch"] <= medians["one by one"], medians


# --- correctness, before any time is taken ---------------------------------------------------------------------------


def check_exactly(settings: Settings, *, size: int, rivals: Sequence[str], stacked: bool) -> dict[str, float]:
    """Largest relative errors in float64 over two steps from the same weights.

    us3l's joint step against `eager` and its per_width step against `published`: losses, update and teacher. A
    standalone network starts as the sub-network that it stands for, so its first losses are those of `eager`.
    """
    exact = replace(settings, dtype=torch.float64, weight_decay=CHECK_WEIGHT_DECAY)
    weights = initial_weights(exact)
    inputs = random_images(exact, size=size, batch=CHECK_BATCH, seed=1)[:CHECK_STEPS]
    references: dict[str, Side] = {
        "joint": Eager(exact, weights, stacked=stacked), "per_width": Published(exact, weights)
    }  # fmt: skip
    errors = {}
    for policy, reference in references.items():
        given, expected = (train(side, inputs, weights) for side in (US3L(exact, weights, policy=policy), reference))
        allowed = EXACT_ON_GPU if settings.device.type == "cuda" else EXACT[policy]
        errors[f"float64 {policy}"] = require_equal(f"float64, {policy}", given, expected, allowed)
    if "standalone" in rivals:
        standalone, eager = (kind(exact, weights, stacked=stacked).step(inputs[0]) for kind in (Standalone, Eager))
        errors["float64 standalone"] = require_equal(
            "float64, standalone", {"losses": standalone}, {"losses": eager}, EXACT["joint"]
        )
    return errors


def train(side: Side, inputs: Sequence[Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
    """Train on each of the inputs: all losses, and what was added to student and teacher since `weights`."""
    losses = [side.step(images) for images in inputs]
    student, teacher = (
        torch.cat([(now.detach() - start).flatten() for now, start in zip(parameters, weights, strict=False)])
        for parameters in (side.parameters(), side.teacher_parameters())
    )
    return {"losses": torch.cat(losses), "update": student, "teacher": teacher}


def first_steps(
    settings: Settings, sides: Mapping[str, Side], weights: list[Tensor], images: Tensor, policy: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Step every side once as it will be timed, and compare with the step in a wider dtype those that do the same.

    Returns the seconds that compilations took, and the relative errors. Raises `harness.Mismatch`.
    """
    joint = ("us3l", "eager", "compile", "compile_graphs", "eager_bf16")
    alike = {"joint": joint, "per_width": ("us3l", "published")}[policy]
    plain = {"joint": "eager", "per_width": "published"}[policy]
    results = {}
    compile_seconds: dict[str, float] = {}
    for name, side in sides.items():
        start = time.perf_counter()
        if name in alike:
            results[name] = train(side, [images], weights)
        else:
            side.step(images)
        if name.startswith("compile"):
            synchroniser(settings.device)()
            compile_seconds[name] = time.perf_counter() - start
    if plain not in results:
        results[plain] = train(
            make_side(plain, settings, weights, stacked=True, policy=policy), [images], weights
        )
    wide = replace(settings, dtype=WIDER[settings.dtype])
    reference = make_side(plain, wide, [weight.to(wide.dtype) for weight in weights], stacked=True, policy=policy)
    expected = train(reference, [images.to(wide.dtype)], weights)

    errors = {}
    for name in results:
        for what in ("losses", "update"):
            error = relative_error(results[name][what], expected[what])
            errors[f"{name} from {wide.dtype}, {what}".replace("torch.", "")] = error
            if name == "eager_bf16":  # plain PyTorch itself: held to its losses, as its update may be all rounding
                allowed = 0.1 if what == "losses" else math.inf
            else:
                own = relative_error(results[plain][what], expected[what])
                allowed = max(MULTIPLE * own, SMALL[settings.dtype])
            if not error <= allowed:
                raise Mismatch(
                    f"{name}: {what} differ by {error:.2e} from the step in {wide.dtype}, allowed are {allowed:.1e}"
                )
    return compile_seconds, errors


# --- the limit -------------------------------------------------------------------------------------------------------


def convolution_backward_operations(grad: Any, x: Any, weight: Any, *others: Any, **_: Any) -> int:
    """Of shapes and the arguments of aten::convolution_backward: the forward's, for each gradient of x and weight.

    torch's own count takes the weight's gradient of a grouped convolution for that of one group.
    """
    transposed, needed = others[4], others[7]
    return conv_flop_count(x, weight, grad, transposed) * sum(needed[:2])


def limit(settings: Settings, images: Tensor) -> dict[str, Any]:
    """What no direct implementation can go below on this machine, whichever of the two is larger.

    compute_ms: operations of all matrix products and direct convolutions over the best of the measured `harness.peaks`.
    memory_ms: bytes over the measured copy bandwidth, if every layer with weights touched its tensors once (forward
    x, y; backward dy, x, dx) and norms, activations and losses nothing; and update, EMA and zeroing every weight once.
    """
    side = Eager(settings, initial_weights(settings), stacked=True)
    moved = 0

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal moved
        trained = torch.is_grad_enabled()
        moved += (3 if trained else 1) * inputs[0].nbytes + (2 if trained else 1) * output.nbytes

    for model in (side.student, side.teacher):
        for layer in model.modules():
            if isinstance(layer, Layer) and isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(count)
    custom = {torch.ops.aten.convolution_backward: convolution_backward_operations}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        side.step(images)
    weights = sum(parameter.nbytes for parameter in side.parameters())
    moved += 8 * weights  # update: read p, g, momentum, write p, momentum, zero g; EMA: read and write the teacher
    rates, bandwidth = peaks(settings.dtype, settings.device), copy_bandwidth(settings.device)
    best = max(rates, key=lambda name: rates[name])
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "gbyte": moved / 1e9,
        "peaks_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "peak_of": best,
        "copy_gbps": bandwidth / 1e9,
        "compute_ms": counter.get_total_flops() / rates[best] * 1e3,
        "memory_ms": moved / bandwidth * 1e3,
    }
