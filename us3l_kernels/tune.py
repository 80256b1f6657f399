"""The tuner: measures which backend is the fastest for every call that a model makes, and remembers it.

    tune(model, images, widths=[1.0, 0.5])            # or `us3l tune` for the models of this project
    with views(2): tune(model, images)                # as it will be called in training

From then on `auto` takes the fastest for these calls, in this process and, through a file (see
`us3l_kernels.backends.measured`), in others on this machine. Nothing is ever measured unless asked for here.

On a GPU the times are those of CUDA graphs, as a training step runs its calls: most kernels are shorter than their
launch, by which a backend that is written in Python would always lose. Weights are packed and gradients accumulated in
place, as there, and calls take turns at several inputs: a GPU's cache would hold those of a small layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from us3l_kernels import functional, gradients
from us3l_kernels.backends import BACKENDS, backend, measured
from us3l_kernels.backends.measured import Call, Measurement
from us3l_kernels.packed import PackedWeights
from us3l_kernels.plans import Capture, CudaGraphs
from us3l_kernels.width import use_width

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
LEAST_SECONDS = 1e-3  # of a reading: shorter calls are repeated
SETS = 3  # of inputs and weights, on a GPU
SAVED_EVERY = 10  # calls that were measured


def tune(
    model: Callable[..., object],
    *inputs: Tensor,
    widths: Sequence[float] | None = None,
    seconds: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure every different call of the sliced operations that `model(*inputs)` makes, and write the table.

    model: a module, which is run as it is set (training or evaluation; its buffers are put back) at each of `widths`
    (None: at the width in effect), or any callable. inputs: real ones, or others of their shape, dtype and layout.
    Gradients are measured where they would be needed. Takes as long as some twenty steps of training; seconds: after
    which no further call is measured. The table is written now and then on the way: what ends early has not been for
    nothing.

    Returns the measurements. Raises ValueError if the model makes no call on `auto`, SettingError if US3L_TUNE_CACHE
    is empty, OSError if the file cannot be written.
    """
    calls = record(model, *inputs, widths=widths)
    if not calls:
        raise ValueError("model: expected one that calls operations of us3l_kernels on backend 'auto', found none")
    measurements: list[Measurement] = []

    def save() -> None:
        for device in {call[1] for call, _ in calls}:
            measured.save(device, [m for m in measurements if m.call[1] == device])

    end = time.monotonic() + seconds
    for index, ((call, threads), needed) in enumerate(calls.items()):
        if time.monotonic() >= end:
            break
        progress(f"{index + 1} of {len(calls)}: {title(call)}")
        measurement = measure(call, threads, *needed)
        if measurement is not None:
            measurements.append(measurement)
            if len(measurements) % SAVED_EVERY == 0:
                save()
    save()
    return measurements


def record(
    model: Callable[..., object], *inputs: Tensor, widths: Sequence[float] | None = None
) -> dict[tuple[Call, int], tuple[bool, bool]]:
    """Every different call (with its threads) of `model(*inputs)`: whether x and the weight need a gradient."""
    calls: dict[tuple[Call, int], tuple[bool, bool]] = {}

    def observer(call: Call, threads: int, x_gradient: bool, weight_gradient: bool) -> None:
        x_before, weight_before = calls.get((call, threads), (False, False))
        calls[call, threads] = (x_before or x_gradient, weight_before or weight_gradient)

    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [buffer.clone() for buffer in buffers]
    with measured.observed(observer), torch.random.fork_rng():
        for width in [None] if widths is None else widths:
            with nullcontext() if width is None else use_width(model, width):  # type: ignore[arg-type]
                model(*inputs)
    with torch.no_grad():
        for buffer, before in zip(buffers, saved, strict=True):
            buffer.copy_(before)
    return calls


def measure(call: Call, threads: int, x_gradient: bool, weight_gradient: bool) -> Measurement | None:
    """Time a call on every backend that runs it but the reference; None if there is no choice of these."""
    if call[1] != "cuda":
        return _measure(call, threads, x_gradient, weight_gradient)
    graphs = CudaGraphs(torch.device("cuda"))
    with graphs.stream():
        return _measure(call, threads, x_gradient, weight_gradient, graphs)


def _measure(
    call: Call, threads: int, x_gradient: bool, weight_gradient: bool, capture: Capture | None = None
) -> Measurement | None:
    op, device, x_layout, weight_layout, given = call
    arguments = dict(given)
    xs = [_input(_tensor(x_layout, device), x_gradient) for _ in range(1 if capture is None else SETS)]
    weights = [
        None if weight_layout is None else nn.Parameter(_tensor(weight_layout, device), requires_grad=weight_gradient)
        for _ in xs
    ]
    candidates = [
        name
        for name, candidate in BACKENDS.items()
        if name != "reference" and candidate.can_run(op, xs[0], weights[0], **arguments)
    ]
    if len(candidates) < 2 or xs[0].numel() == 0:
        return None
    trained = weight_gradient and weight_layout is not None
    needed = x_gradient or trained
    buffer = gradients.attach(nn.ParameterList(weights)) if trained else None
    calls = [REPLAYS[op](x, weight, **arguments) for x, weight in zip(xs, weights, strict=True)]
    packed = {name: nullcontext() if capture is None else PackedWeights(buffer) for name in candidates}

    def forward(name: str) -> None:
        with backend(f"{op}={name}"), packed[name]:
            for run in calls:
                run()

    def forward_and_backward(name: str) -> None:
        with backend(f"{op}={name}"), packed[name]:
            for run, grad in zip(calls, grads, strict=True):
                run().backward(grad)

    def times(work: Callable[[str], None]) -> dict[str, float]:
        return _times({name: partial(work, name) for name in candidates}, len(calls), capture)

    # Under autocast x would have been recorded as it was cast.
    with torch.autocast(device, enabled=False), torch.set_grad_enabled(needed):
        with backend(f"{op}={candidates[0]}"):
            y = calls[0]().detach()
        grads = [torch.randn_like(y) for _ in calls]
        return Measurement(call, threads, times(forward), times(forward_and_backward) if needed else None)


def title(call: Call) -> str:
    """A call in a few words, for people."""
    op, _, (dtype, shape, _), weight, arguments = call
    told = [f"{name} {value}" for name, value in arguments if value not in (None, False, 1, (1, 1))]
    parts = [f"x {list(shape)}", *([f"weight {list(weight[1])}"] if weight else []), *told]
    return f"{op} {dtype.removeprefix('torch.')}: {', '.join(parts)}"


def _tensor(layout: tuple[str, tuple[int, ...], tuple[int, ...]], device: str) -> Tensor:
    """Random values of that dtype, shape and strides."""
    dtype, shape, strides = layout
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    values = torch.randn(extent, device=device).to(getattr(torch, dtype.removeprefix("torch.")))
    return values.as_strided(shape, strides)


class _Unkept(torch.autograd.Function):
    """`values`, whose gradient is computed and not kept: as in a network, where the layer before takes it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, leaf: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _input(values: Tensor, gradient: bool) -> Tensor:
    """`values` as the result of another layer, for which a gradient is needed or not."""
    return _Unkept.apply(values, torch.zeros((), requires_grad=True)) if gradient else values


Replay = Callable[[], Tensor]
"""A call of an operation."""


def _conv2d(x: Tensor, weight: Tensor, **arguments: Any) -> Replay:
    return lambda: functional.conv2d(x, weight, **arguments)


def _linear(x: Tensor, weight: Tensor, **arguments: Any) -> Replay:
    return lambda: functional.linear(x, weight, **arguments)


def _batch_norm(x: Tensor, weight: Tensor | None, *, training: bool, residual: bool, **arguments: Any) -> Replay:
    dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
    bias = None if weight is None else torch.zeros_like(weight)
    running = [] if training else [torch.full(x.shape[1:2], value, dtype=dtype, device=x.device) for value in (0, 1)]
    added = _input(torch.randn_like(x), x.requires_grad) if residual else None
    return lambda: functional.batch_norm(x, weight, bias, *running, training=training, residual=added, **arguments)


def _layer_norm(x: Tensor, weight: Tensor | None) -> Replay:
    bias = None if weight is None else torch.zeros_like(weight)
    return lambda: functional.layer_norm(x, weight, bias)


REPLAYS: dict[str, Callable[..., Replay]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
}


def _times(sides: dict[str, Callable[[], object]], calls: int, capture: Capture | None) -> dict[str, float]:
    """Median seconds of one of the `calls` of each side, as `capture` records it. They take turns; what is clearly not
    the fastest drops out."""
    synchronise = (lambda: None) if capture is None else torch.cuda.synchronize

    def seconds(run: Callable[[], object]) -> float:
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        return time.perf_counter() - start

    def often(runs: Mapping[str, Callable[[], object]]) -> dict[str, int]:
        """How often each has to run; on a GPU all as often as the fastest, as a launch and a wait are in a reading."""
        taken = {name: seconds(run) for name, run in runs.items()}
        if capture is not None:
            taken = dict.fromkeys(taken, min(taken.values()))
        return {name: math.ceil(LEAST_SECONDS / max(one, 1e-7)) for name, one in taken.items()}

    def repeated(run: Callable[[], object], repeats: int) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(repeats):
                run()

        return repeat

    for side in sides.values():
        side()  # compiles, allocates
    repeats = often(sides)
    runs = {name: repeated(side, repeats[name]) for name, side in sides.items()}
    if capture is not None:  # a graph may be much shorter than what has recorded it
        runs = {name: capture(run) for name, run in runs.items()}
        replays = often(runs)
        runs = {name: repeated(run, replays[name]) for name, run in runs.items()}
        repeats = {name: count * replays[name] for name, count in repeats.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    running = list(sides)
    for turn in range(MOST_ROUNDS):
        for name in running:
            samples[name].append(seconds(runs[name]) / (repeats[name] * calls))
        if turn + 1 >= LEAST_ROUNDS:
            quartiles = {name: quantiles(values, n=4, method="inclusive") for name, values in samples.items()}
            fastest = min(running, key=lambda name: quartiles[name][1])
            running = [name for name in running if quartiles[name][0] <= quartiles[fastest][2]]
            if len(running) == 1:
                break
    return {name: float(f"{median(values):.4g}") for name, values in samples.items()}
