"""Every native operation in shapes that nobody thought of: nothing outside is touched, threads agree, nothing leaks.

A problem is one call of an operation, forward and backward. All memory around its inputs is NaN and all memory around
its gradients holds a canary; the oracle is the reference in float64. `test_sanitizers.py` runs this file in libraries
that check every access.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from us3l_kernels import _native, backend, nn, use_width, views
from us3l_kernels.backends import BACKENDS

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native, reference = BACKENDS["native"], BACKENDS["reference"]
NAN, CANARY, GUARD = float("nan"), 3.0, 64
FLOAT, BF16 = torch.float32, torch.bfloat16
# Largest error over 1 + the largest value; inputs are drawn so that values are around 1.
TOLERANCE = {FLOAT: 2e-5, BF16: 3e-2}
Integer = Callable[[int, int], int]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def guarded(values: Tensor, fill: float, strides: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """The values behind those strides in the middle of a piece of memory full of `fill`, and that memory."""
    strides = values.stride() if strides is None else strides
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = torch.full((extent + 2 * GUARD,), fill, dtype=values.dtype)
    view = memory.as_strided(values.shape, strides, GUARD)
    view.copy_(values)
    return view, memory


def innermost(values: Tensor, dim: int, gap: int) -> Tensor:
    """The values with dimension `dim` innermost and NaN around them: `gap` of it between two rows."""
    strides, step = [0] * values.dim(), values.size(dim) + gap
    strides[dim] = 1
    for d in reversed([d for d in range(values.dim()) if d != dim]):
        strides[d] = step
        step *= values.size(d)
    return guarded(values, NAN, tuple(strides))[0]


def parameter(full: tuple[int, ...], active: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """A full-size parameter that is NaN outside of its prefix."""
    values = torch.full(full, NAN)
    values[tuple(slice(n) for n in active)] = torch.randn(active) * scale + shift
    return guarded(values, NAN)[0]


@dataclass
class Problem:
    """One call. Tensors and arguments are those of `Backend.<op>`, by name.

    prefix: the active part of the weight. decides: what `why_not` is told. rows: whether the upstream gradient has the
    channels innermost, or is contiguous.
    """

    op: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    arguments: dict[str, Any]
    prefix: tuple[int, ...]
    extra: dict[str, Tensor | None] = field(default_factory=dict)
    decides: dict[str, Any] = field(default_factory=dict)
    rows: bool = True

    def runs(self) -> bool:
        return self.op in native.ops and native.can_run(self.op, self.x, self.weight, **self.decides)

    def solve(self, grad: Tensor | None = None) -> dict[str, Tensor]:
        """What the native kernels give for this upstream gradient (None: a random one); they leave the inputs alone."""
        inputs = [t for t in (self.x, self.weight, self.bias, *self.extra.values()) if t is not None]
        before = [t.clone() for t in inputs]
        results = self._run(native, self.x, self.weight, self.bias, self.extra, FLOAT, grad)
        for old, new in zip(before, inputs, strict=True):
            torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
        return results

    def check(self) -> None:
        """The native kernels against the reference in float64."""
        results = self.solve()
        wide = {name: None if t is None else t.double() for name, t in self.extra.items()}
        bias = None if self.bias is None else self.bias.double()
        grad = results["grad"].double()
        exact = self._run(
            reference, self.x.double(), self.weight.double(), bias, wide, torch.float64, grad, results["y"].double()
        )
        for name, value in exact.items():
            given = results[name]
            assert given.shape == value.shape, name
            error = (given.double() - value).abs().max().item() if value.numel() else 0.0
            scale = 1 + (value.abs().max().item() if value.numel() else 0.0)
            assert error <= TOLERANCE[self.x.dtype] * scale, f"{name}: {error:.1e} of {scale:.1e}"

    def _run(
        self,
        on: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extra: dict[str, Tensor | None],
        parameter_dtype: torch.dtype,
        grad: Tensor | None = None,
        y: Tensor | None = None,
    ) -> dict[str, Tensor]:
        outputs = getattr(on, self.op)(x, weight, bias, **extra, **self.arguments)
        own_y, *statistics = outputs if isinstance(outputs, tuple) else (outputs,)
        if grad is None:
            grad = torch.randn(own_y.shape).to(own_y.dtype)
            grad = innermost(grad, 1, 0) if self.rows and self.op in ("conv2d", "batch_norm") else grad
        gw, weight_memory = guarded(torch.full_like(weight, CANARY, dtype=parameter_dtype), CANARY)
        gb, bias_memory = guarded(torch.full((weight.size(0),), CANARY, dtype=parameter_dtype), CANARY)
        y = own_y if y is None else y
        results = {"y": own_y, "grad": grad}
        arguments = self.arguments
        if self.op == "conv2d":
            geometry = {k: arguments[k] for k in ("stride", "padding", "dilation", "groups")}
            results["dx"] = on.conv2d_backward(grad, x, weight, gw, gb, True, **geometry)
        elif self.op == "linear":
            results["dx"] = on.linear_backward(grad, x, weight, gw, gb, True, arguments["in_features"])
        elif self.op == "batch_norm":
            training, count, activation = (arguments[k] for k in ("training", "views", "activation"))
            residual = extra["residual"] is not None and activation is not None
            shown = None if extra["residual"] is not None else bias
            results["dx"], dresidual = on.batch_norm_backward(
                grad, x, y, weight, shown, *statistics, gw, gb, True, residual, training, count, activation
            )
            if residual:
                results["dresidual"] = dresidual
        else:
            results["dx"] = on.layer_norm_backward(grad, x, weight, *statistics, gw, gb, True)
        for name, view, memory, size in (
            ("dweight", gw, weight_memory, self.prefix),
            ("dbias", gb, bias_memory, self.prefix[:1]),
        ):
            inside = tuple(slice(n) for n in size)
            results[name] = view[inside] - CANARY
            view[inside] = CANARY
            assert memory.eq(CANARY).all(), f"{name}: written past the active slice"
        return results


def convolution(integer: Integer, kind: str) -> Problem:
    if kind == "winograd":
        kernel = [3, 3]
        stride, padding, dilation = [1, 1], [1, 1], [1, 1]
    elif kind == "winograd_stride2":
        kernel = [3, 3]
        stride, padding, dilation = [2, 2], [1, 1], [1, 1]
    else:
        kernel = [integer(1, 5), integer(1, 5)]
        stride, dilation = [integer(1, 3), integer(1, 3)], [integer(1, 2), integer(1, 2)]
        padding = [integer(0, 3), integer(0, 3)]
    # 8 tiles of 4x4 outputs and 16 channels are what it takes to be transformed with stride 2.
    images, least = (integer(8, 40), 9) if kind == "winograd_stride2" else (integer(1, 4), 1)
    size = [max(least, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) + integer(0, 11) for d in (0, 1)]
    if kind in ("depthwise", "grouped"):
        per_group = (1, 1) if kind == "depthwise" else (integer(1, 9), integer(1, 9))
        active = integer(1, 40 if kind == "depthwise" else 4)
        groups = active + integer(0, 3)
        channels, out = active * per_group[0], active * per_group[1]
        full, prefix = (groups * per_group[1], per_group[0], *kernel), (out, per_group[0], *kernel)
    else:
        channels, out, groups = integer(16 if kind == "winograd_stride2" else 1, 40), integer(1, 40), 1
        prefix = (out, channels, *kernel)
        full = (out + integer(0, 3), channels + integer(0, 3), *kernel)
    fan = prefix[1] * kernel[0] * kernel[1]
    dtype = BF16 if not kind.startswith("winograd") and integer(0, 3) == 0 else FLOAT
    weight = parameter(full, prefix, fan**-0.5)
    if integer(0, 1):
        weight = guarded(weight, NAN, torch.empty_like(weight, memory_format=torch.channels_last).stride())[0]
    arguments = {"out_channels": out, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = torch.randn(images, channels, *size).to(dtype)
    bias = parameter(full[:1], prefix[:1]) if integer(0, 1) else None
    x = innermost(x, 1, integer(0, 3))
    return Problem("conv2d", x, weight, bias, arguments, prefix, decides=arguments, rows=integer(0, 1) == 1)


def matrix_product(integer: Integer) -> Problem:
    rows = [integer(1, 9) for _ in range(integer(1, 3))]
    out, channels, beyond = integer(1, 70), integer(1, 70), integer(0, 5)
    x = torch.randn(*rows, channels + beyond)
    x[..., channels:] = NAN
    weight = parameter((out + integer(0, 3), channels + beyond), (out, channels), channels**-0.5)
    bias = parameter((weight.size(0),), (out,)) if integer(0, 1) else None
    x = innermost(x.to(BF16 if integer(0, 3) == 0 else FLOAT), x.dim() - 1, integer(0, 3))
    arguments = {"out_features": out, "in_features": channels}
    return Problem("linear", x, weight, bias, arguments, (out, channels), decides=arguments)


def batch_norm(integer: Integer) -> Problem:
    count, channels = integer(1, 3), integer(1, 80)
    shape = (count * integer(2, 5), channels, *[integer(1, 6) for _ in range(integer(0, 3))])
    dtype, gap = (BF16 if integer(0, 1) else FLOAT), integer(0, 3)
    training, activation = bool(integer(0, 2)), [None, "relu", "relu6"][integer(0, 2)]
    full = (channels + integer(0, 5),)
    running = [parameter(full, (channels,)), parameter(full, (channels,), 0.1, 1.0).abs()]
    if training:
        running = [None, None]
    rows, residual = integer(0, 1) == 1, torch.randn(shape).to(dtype) if integer(0, 1) else None
    if rows and residual is not None:
        residual = innermost(residual, 1, gap)
    count = count if training else 1
    return Problem(
        "batch_norm",
        innermost(torch.randn(shape).to(dtype), 1, gap),
        parameter(full, (channels,), 0.1, 1.0),
        parameter(full, (channels,)),
        # A large eps: two values of a channel may be nearly the same, and their difference is not what is tested here.
        {"training": training, "momentum": 0.1, "eps": 0.1, "views": count, "activation": activation},
        (channels,),
        {"running_mean": running[0], "running_var": running[1], "residual": residual},
        rows=rows,
    )


def layer_norm(integer: Integer) -> Problem:
    channels = integer(1, 90)
    x = torch.randn(*[integer(1, 9) for _ in range(integer(1, 3))], channels).to(BF16 if integer(0, 1) else FLOAT)
    full = (channels + integer(0, 5),)
    return Problem(
        "layer_norm",
        innermost(x, x.dim() - 1, integer(0, 3)),
        parameter(full, (channels,), 0.1, 1.0),
        parameter(full, (channels,)),
        {"eps": 0.1},
        (channels,),
    )


PROBLEMS: dict[str, Callable[[Integer], Problem]] = {
    "winograd": lambda integer: convolution(integer, "winograd"),
    "winograd_stride2": lambda integer: convolution(integer, "winograd_stride2"),
    "convolution": lambda integer: convolution(integer, "any"),
    "depthwise": lambda integer: convolution(integer, "depthwise"),
    "grouped": lambda integer: convolution(integer, "grouped"),
    "linear": matrix_product,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
}


def drawn(kind: str, seed: int) -> Problem:
    """A problem that native kernels run, the same for the same seed."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(20):
        problem = PROBLEMS[kind](chance.randint)
        if problem.runs():
            return problem
    pytest.skip(f"no native kernel for {kind}")


@pytest.mark.parametrize("kind", PROBLEMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(kind: str, data: st.DataObject) -> None:
    torch.set_num_threads(data.draw(st.integers(1, 4), label="threads"))
    torch.manual_seed(data.draw(st.integers(0, 3), label="seed"))
    problem = PROBLEMS[kind](lambda low, high: data.draw(st.integers(low, high)))
    if problem.runs():
        problem.check()


@pytest.mark.parametrize("threads", range(1, 9))
@pytest.mark.parametrize("kind", PROBLEMS)
def test_any_number_of_threads(kind: str, threads: int) -> None:
    """Right, and the same bits again: also with more threads than there is work, or than there are cores."""
    torch.set_num_threads(threads)
    problem = drawn(kind, threads)
    problem.check()
    first = problem.solve()
    for _ in range(3):
        again = problem.solve(first["grad"])
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_two_python_threads_at_once() -> None:
    """Working memory belongs to a thread: calls of two at the same time do not see each other."""
    kinds = [kind for kind, make in PROBLEMS.items() if any(make(random.Random(i).randint).runs() for i in range(20))]
    problems = [drawn(kind, seed) for kind in kinds for seed in (11, 12)]
    grads = [problem.solve()["grad"] for problem in problems]

    def solve_all(order: list[int]) -> dict[int, dict[str, Tensor]]:
        torch.set_num_threads(2)  # of this thread
        return {i: problems[i].solve(grads[i]) for i in order}

    forwards = list(range(len(problems)))
    with ThreadPoolExecutor(2) as pool:
        alone = pool.submit(solve_all, forwards).result()
        together = [pool.submit(solve_all, order) for order in (forwards, forwards[::-1]) * 8]
        for results in together:
            for i, expected in results.result().items():
                for name, value in expected.items():
                    assert torch.equal(value, alone[i][name]), f"{problems[i].op}: {name}"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow() -> None:
    """1,000 steps of changing widths: what the first hundred took is all there is."""
    model = torch.nn.Sequential(
        nn.SlicedConv2d(8, 24, 3, padding=1, bias=False),
        nn.SlicedBatchNorm2d(24, activation="relu"),
        nn.SlicedConv2d(24, 24, 3, padding=1, groups=24, bias=False),
        nn.SlicedBatchNorm2d(24, activation="relu6"),
        nn.SlicedConv2d(24, 16, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        nn.SlicedLayerNorm(16),
        nn.SlicedLinear(16, 8),
    ).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(4, 8)

    def step(index: int) -> None:
        with use_width(model, (1.0, 0.75, 0.5)[index % 3]), views(2):
            y = model(x)
        y.backward(grad[:, : y.size(1)])
        model.zero_grad()

    with backend("native"):
        for index in range(100):
            step(index)
        before = resident_bytes()
        for index in range(1000):
            step(index)
    assert resident_bytes() - before < 4 << 20
