"""The tuner: measures which backend is the fastest for every call that a model makes, and remembers it.

    tune(model, images, widths=[1.0, 0.5])            # or `us3l tune` for the models of this project
    with views(2): tune(model, images)                # as it will be called in training

From then on `auto` takes the fastest for these calls, in this process and, through a file (see
`us3l_kernels.backends.measured`), in others on this machine. Nothing is ever measured unless asked for here.

On a GPU the times are those of CUDA graphs, as a training step runs its calls: most kernels are shorter than their
launch, by which a backend that is written in Python would always lose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from us3l_kernels import functional
from us3l_kernels.backends import BACKENDS, backend, measured
from us3l_kernels.backends.measured import Call, Measurement
from us3l_kernels.plans import Capture, CudaGraphs
from us3l_kernels.width import use_width

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
LEAST_SECONDS = 1e-3  # of a reading: shorter calls are repeated


def tune(
    model: Callable[..., object],
    *inputs: Tensor,
    widths: Sequence[float] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure every different call of the sliced operations that `model(*inputs)` makes, and write the table.

    model: a module, which is run as it is set (training or evaluation; its buffers are put back) at each of `widths`
    (None: at the width in effect), or any callable. inputs: real ones, or others of their shape, dtype and layout.
    Gradients are measured where they would be needed. Takes as long as some twenty steps of training.

    Returns the measurements. Raises ValueError if the model makes no call on `auto`, SettingError if US3L_TUNE_CACHE
    is empty, OSError if the file cannot be written.
    """
    calls = record(model, *inputs, widths=widths)
    if not calls:
        raise ValueError("model: expected one that calls operations of us3l_kernels on backend 'auto', found none")
    measurements = []
    for index, ((call, threads), gradients) in enumerate(calls.items()):
        progress(f"{index + 1} of {len(calls)}: {title(call)}")
        measurement = measure(call, threads, *gradients)
        if measurement is not None:
            measurements.append(measurement)
    for device in {call[1] for call, _ in calls}:
        measured.save(device, [m for m in measurements if m.call[1] == device])
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
    op, device, _, _, arguments = call
    x, weight = (None if layout is None else _tensor(layout, device) for layout in call[2:4])
    assert x is not None
    x.requires_grad_(x_gradient)
    if weight is not None:
        weight.requires_grad_(weight_gradient)
    candidates = [
        name
        for name, candidate in BACKENDS.items()
        if name != "reference" and candidate.can_run(op, x, weight, **dict(arguments))
    ]
    if len(candidates) < 2 or x.numel() == 0:
        return None
    run, inputs = REPLAYS[op](x, weight, **dict(arguments))
    needed = [t for t in inputs if t is not None and t.requires_grad]

    def forward(name: str) -> Tensor:
        with backend(f"{op}={name}"):
            return run()

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, needed, grad, retain_graph=True)

    # Under autocast x would have been recorded as it was cast.
    with torch.autocast(device, enabled=False), torch.set_grad_enabled(bool(needed)):
        forward_times = _times({name: partial(forward, name) for name in candidates}, capture)
        if not needed:
            return Measurement(call, threads, forward_times, None)
        outputs = {name: forward(name) for name in candidates}
        grad = torch.randn_like(next(iter(outputs.values())))
        backward_times = _times({name: partial(backward, y) for name, y in outputs.items()}, capture)
    return Measurement(call, threads, forward_times, backward_times)


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


Replay = tuple[Callable[[], Tensor], tuple[Tensor | None, ...]]
"""A call of an operation, and the inputs that it may have gradients for."""


def _conv2d(x: Tensor, weight: Tensor, **arguments: Any) -> Replay:
    return lambda: functional.conv2d(x, weight, **arguments), (x, weight)


def _linear(x: Tensor, weight: Tensor, **arguments: Any) -> Replay:
    return lambda: functional.linear(x, weight, **arguments), (x, weight)


def _batch_norm(x: Tensor, weight: Tensor | None, *, training: bool, residual: bool, **arguments: Any) -> Replay:
    dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
    bias = None if weight is None else torch.zeros_like(weight)
    running = [] if training else [torch.full(x.shape[1:2], value, dtype=dtype, device=x.device) for value in (0, 1)]
    added = torch.randn_like(x).requires_grad_(x.requires_grad) if residual else None
    return (
        lambda: functional.batch_norm(x, weight, bias, *running, training=training, residual=added, **arguments),
        (x, weight, added),
    )


def _layer_norm(x: Tensor, weight: Tensor | None) -> Replay:
    bias = None if weight is None else torch.zeros_like(weight)
    return lambda: functional.layer_norm(x, weight, bias), (x, weight)


REPLAYS: dict[str, Callable[..., Replay]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
}


def _times(sides: dict[str, Callable[[], object]], capture: Capture | None) -> dict[str, float]:
    """Median seconds of each, as `capture` records it. They take turns; what is clearly not the fastest drops out."""
    synchronise = (lambda: None) if capture is None else torch.cuda.synchronize

    def seconds(run: Callable[[], object], repeats: int) -> float:
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        return (time.perf_counter() - start) / repeats

    def repeated(side: Callable[[], object], repeats: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                side()

        return run if capture is None else capture(run)

    for side in sides.values():
        side()  # compiles, allocates
    repeats = {name: math.ceil(LEAST_SECONDS / max(seconds(side, 1), 1e-7)) for name, side in sides.items()}
    runs = {name: repeated(side, repeats[name]) for name, side in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    running = list(sides)
    for turn in range(MOST_ROUNDS):
        for name in running:
            samples[name].append(seconds(runs[name], repeats[name]))
        if turn + 1 >= LEAST_ROUNDS:
            quartiles = {name: quantiles(values, n=4, method="inclusive") for name, values in samples.items()}
            fastest = min(running, key=lambda name: quartiles[name][1])
            running = [name for name in running if quartiles[name][0] <= quartiles[fastest][2]]
            if len(running) == 1:
                break
    return {name: float(f"{median(values):.4g}") for name, values in samples.items()}
