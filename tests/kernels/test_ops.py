"""Every operation on every backend against float64 oracles computed from hand-sliced weights.

The inactive part of every parameter is NaN (nothing outside the slice may be read); the inactive part of every
gradient holds a canary (nothing outside may be written).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from us3l_kernels import functional, reference
from us3l_kernels.backends import BACKENDS, OPS, BackendError, backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest error over largest value: a few roundings of the dtype, sums being accumulated in float32 or better.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CANARY = 3.0  # a value every dtype holds exactly
LAYOUTS = ("contiguous", "channels_last", "slice", "transposed")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random values that `dtype` holds exactly, so that the float64 oracle sees the very same input."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x behind other strides; what lies between them in memory is NaN."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        big = torch.full((x.size(0), x.size(1) + 3, *x.shape[2:]), torch.nan, dtype=x.dtype)
        if x.dim() == 4:
            big = big.contiguous(memory_format=torch.channels_last)
        big[:, : x.size(1)] = x
        return big[:, : x.size(1)]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()


def poisoned(full: tuple[int, ...], active: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A full parameter that is NaN outside its prefix, and the prefix in float64."""
    inner = random(*active, dtype=dtype)
    parameter = torch.full(full, torch.nan, dtype=dtype)
    parameter[tuple(slice(a) for a in active)] = inner
    return parameter.requires_grad_(), inner.double().requires_grad_()


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-3)
    error = (got.double() - expected).abs().max().item() / scale
    assert error <= TOLERANCE[dtype] * factor, f"relative error {error:.2e}"


def assert_prefix_gradient(parameter: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """The ordinary gradient: full size, the parameter's strides, exact zeros outside."""
    grad = parameter.grad
    assert grad is not None and grad.shape == parameter.shape and grad.stride() == parameter.stride()
    inside = tuple(slice(n) for n in expected.shape)
    assert_close(grad[inside], expected, dtype, factor)
    outside = grad.clone()
    outside[inside] = 0
    assert torch.equal(outside, torch.zeros_like(outside))


def arguments_of(out: int, options: dict) -> dict:
    """What a backend is told of a convolution beside its tensors."""
    pair = lambda v: [v, v] if isinstance(v, int) else list(v)  # noqa: E731
    geometry = {k: pair(options.get(k, d)) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))}
    return {"out_channels": out, "groups": options.get("groups", 1), **geometry}


def runs(name: str, op: str, x: Tensor, weight: Tensor | None, **arguments) -> None:
    if not BACKENDS[name].can_run(op, x, weight, **arguments):
        pytest.skip(f"{name} does not take {op} for {x.dtype}")


ON = {op: [n for n, b in BACKENDS.items() if op in b.ops] for op in OPS}


CONVOLUTIONS = {
    # name: (N, c, H, W, K full, k active, C full, kernel, options)
    "3x3": (2, 7, 6, 5, 13, 9, 11, (3, 3), {"padding": 1}),
    "1x1": (3, 8, 4, 4, 16, 8, 16, (1, 1), {}),
    "stem": (2, 3, 9, 9, 12, 5, 3, (7, 7), {"stride": 2, "padding": 3}),
    "strided": (2, 16, 7, 8, 24, 8, 24, (3, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (1, 5, 9, 9, 6, 6, 8, (3, 2), {"dilation": (2, 3), "padding": 2}),
    "full": (2, 8, 5, 5, 8, 8, 8, (3, 3), {"padding": 1}),
    "depthwise": (2, 5, 6, 6, 12, 5, 12, (3, 3), {"padding": 1, "groups": 12}),
    "depthwise multiplier": (2, 5, 6, 6, 16, 10, 8, (5, 5), {"padding": 2, "stride": 2, "groups": 8}),
    "grouped": (2, 6, 5, 5, 20, 10, 12, (3, 3), {"padding": 1, "groups": 4}),
}


def convolution(case: str, dtype: torch.dtype, layout: str, bias: bool):
    n, c, h, w, full_out, out, full_in, kernel, options = CONVOLUTIONS[case]
    groups = options.get("groups", 1)
    x = laid_out(random(n, c, h, w, dtype=dtype), layout).requires_grad_()
    per_group = full_in // groups
    weight, inner = poisoned((full_out, per_group, *kernel), (out, c if groups == 1 else per_group, *kernel), dtype)
    b, inner_b = poisoned((full_out,), (out,), dtype) if bias else (None, None)
    xd = x.detach().double().requires_grad_()
    expected = F.conv2d(xd, inner, inner_b, **{**options, "groups": 1 if groups == 1 else c // per_group})
    return x, weight, b, out, options, xd, inner, inner_b, expected


@pytest.mark.parametrize("on", ON["conv2d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(on, case, layout, dtype):
    x, weight, b, out, options, xd, inner, inner_b, expected = convolution(case, dtype, layout, bias=True)
    runs(on, "conv2d", x, weight, **arguments_of(out, options))
    with backend(f"conv2d={on}"):
        y = functional.conv2d(x, weight, b, out_channels=out, **options)
    assert_close(y, expected, dtype)
    grad = laid_out(random(*y.shape, dtype=dtype), layout)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, xd.grad, dtype)
    assert_prefix_gradient(weight, inner.grad, dtype)
    assert_prefix_gradient(b, inner_b.grad, dtype)


@pytest.mark.parametrize("on", ON["conv2d"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_backward_writes_only_the_slice(on, case):
    x, weight, _, out, options, xd, inner, _, expected = convolution(case, torch.float32, "channels_last", bias=False)
    runs(on, "conv2d", x, weight, **arguments_of(out, options))
    grad = random(*expected.shape, dtype=torch.float32)
    expected.backward(grad.double())
    gw, gb = torch.full_like(weight, CANARY), torch.full((weight.size(0),), CANARY)
    arguments = arguments_of(out, options)
    pair = [arguments[k] for k in ("stride", "padding", "dilation")]
    inputs = [t.detach().clone(memory_format=torch.preserve_format) for t in (grad, x, weight)]
    torch.ops.us3l.conv2d_backward(
        grad, x.detach(), weight.detach(), gw, gb, False, *pair, options.get("groups", 1), on
    )
    inside = tuple(slice(n) for n in inner.shape)
    assert_close(gw[inside] - CANARY, inner.grad, torch.float32, factor=4)  # the canary costs a rounding
    gw[inside] = CANARY
    assert torch.equal(gw, torch.full_like(gw, CANARY))
    assert torch.equal(gb[out:], torch.full_like(gb[out:], CANARY))
    for before, after in zip(inputs, (grad, x, weight), strict=True):  # inputs are never written
        torch.testing.assert_close(before, after.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("on", ON["linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 9), (4,), (2, 1, 3, 6)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "slice"])
def test_linear(on, shape, layout, dtype):
    if layout == "slice" and len(shape) == 1:
        pytest.skip("a vector has no channel dimension to slice")
    x = random(*shape, dtype=dtype)
    if layout == "slice":
        x = torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.size(-1)]
    x.requires_grad_()
    weight, inner = poisoned((11, 12), (6, shape[-1]), dtype)
    b, inner_b = poisoned((11,), (6,), dtype)
    xd = x.detach().double().requires_grad_()
    runs(on, "linear", x, weight)
    with backend(f"linear={on}"):
        y = functional.linear(x, weight, b, out_features=6)
    expected = F.linear(xd, inner, inner_b)
    assert_close(y, expected, dtype)
    grad = random(*y.shape, dtype=dtype)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, xd.grad, dtype)
    assert_prefix_gradient(weight, inner.grad, dtype)
    assert_prefix_gradient(b, inner_b.grad, dtype)


@pytest.mark.parametrize("on", ON["linear"])
def test_linear_reads_the_prefix_of_x(on):
    x = random(3, 9)
    x[:, 5:] = torch.nan
    x.requires_grad_()
    weight, inner = poisoned((4, 9), (4, 5), torch.float64)
    runs(on, "linear", x, weight)
    with backend(f"linear={on}"):
        y = functional.linear(x, weight, in_features=5)
    xd = x.detach()[:, :5].clone().requires_grad_()
    expected = F.linear(xd, inner)
    grad = random(3, 4)
    y.backward(grad)
    expected.backward(grad)
    assert_close(y, expected, torch.float64)
    assert_close(x.grad[:, :5], xd.grad, torch.float64)
    assert torch.equal(x.grad[:, 5:], torch.zeros(3, 4, dtype=torch.float64))
    assert_prefix_gradient(weight, inner.grad, torch.float64)


def normed(x, w, b, mean, var, residual, activation, views, training):
    """torch's own batch norm, view by view, then residual and activation: the oracle."""
    parts = [F.batch_norm(v, mean, var, w, b, training, 0.1, 1e-5) for v in (x.chunk(views) if training else [x])]
    y = torch.cat(parts)
    y = y if residual is None else y + residual
    return {None: lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](y)


@pytest.mark.parametrize("on", ON["batch_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "views,shape,activation,fused",
    [
        (1, (4, 5, 3, 7), None, False),
        (1, (5, 16, 6, 3), "relu6", True),
        (2, (6, 8, 4, 4), "relu", True),
        (2, (4, 33, 1, 5), None, True),
        (3, (9, 17), "relu", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm(on, layout, activation, fused, views, shape, training, dtype):
    parameter_dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    c, full = shape[1], shape[1] + 6
    x = laid_out(random(*shape, dtype=dtype), layout).requires_grad_()
    w, inner_w = poisoned((full,), (c,), parameter_dtype)
    b, inner_b = poisoned((full,), (c,), parameter_dtype)
    mean, var = (torch.full((full,), torch.nan, dtype=parameter_dtype) for _ in range(2))
    mean[:c], var[:c] = random(c, dtype=parameter_dtype), random(c, dtype=parameter_dtype).abs() + 0.5
    mean_d, var_d = mean[:c].double(), var[:c].double()
    residual = laid_out(random(*shape, dtype=dtype), layout).requires_grad_() if fused else None
    xd, rd = (None if t is None else t.detach().double().requires_grad_() for t in (x, residual))
    runs(on, "batch_norm", x, w)
    with backend(f"batch_norm={on}"):
        y = functional.batch_norm(
            x, w, b, mean, var, training=training, views=views, activation=activation, residual=residual
        )
    expected = normed(xd, inner_w, inner_b, mean_d, var_d, rd, activation, views, training)
    assert y.dtype == dtype
    assert_close(y, expected, dtype)
    assert_close(mean[:c], mean_d, parameter_dtype)
    assert_close(var[:c], var_d, parameter_dtype)
    assert mean[c:].isnan().all() and var[c:].isnan().all()
    # The oracle's gradient passes where OUR output does: a value within rounding of a kink has no one answer.
    grad = random(*shape, dtype=dtype)
    near = 0.1 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    kinks = {None: torch.zeros_like(y, dtype=torch.bool), "relu": expected.abs() < near}
    kinks["relu6"] = kinks["relu"] | ((expected - 6).abs() < near)
    grad[kinks[activation]] = 0
    y.backward(grad)
    expected.backward(grad.double())
    # dX of a norm is a difference of nearly equal terms, more so with few values per channel.
    assert_close(x.grad, xd.grad, dtype, factor=4)
    assert_prefix_gradient(w, inner_w.grad, dtype, factor=4)
    assert_prefix_gradient(b, inner_b.grad, dtype, factor=4)
    if fused:
        assert_close(residual.grad, rd.grad, dtype)


@pytest.mark.parametrize("on", ON["batch_norm"])
def test_batch_norm_backward_writes_only_the_slice(on):
    x = random(6, 5, 3, 3, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    w, b = torch.rand(9), torch.rand(9)
    runs(on, "batch_norm", x, w)
    with torch.no_grad():
        y, mean, rstd = torch.ops.us3l.batch_norm(x, w, b, None, None, None, True, 0.1, 1e-5, 2, "relu", on)
    assert mean.shape == rstd.shape == (2, 5)
    gw, gb = torch.full((9,), CANARY), torch.full((9,), CANARY)
    grad = random(*x.shape, dtype=torch.float32)
    untouched = grad.clone()
    torch.ops.us3l.batch_norm_backward(grad, x, y, w, b, mean, rstd, gw, gb, True, False, True, 2, "relu", on)
    assert torch.equal(grad, untouched)
    assert (gw[:5] != CANARY).all() and (gb[:5] != CANARY).all()
    assert torch.equal(gw[5:], torch.full((4,), CANARY)) and torch.equal(gb[5:], torch.full((4,), CANARY))


@pytest.mark.parametrize("on", ON["layer_norm"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 16), (9,)], ids=str)
def test_layer_norm(on, shape, dtype, affine):
    parameter_dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    c = shape[-1]
    x = random(*shape, dtype=dtype).requires_grad_()
    w, inner_w = poisoned((c + 4,), (c,), parameter_dtype) if affine else (None, None)
    b, inner_b = poisoned((c + 4,), (c,), parameter_dtype) if affine else (None, None)
    xd = x.detach().double().requires_grad_()
    runs(on, "layer_norm", x, w)
    with backend(f"layer_norm={on}"):
        y = functional.layer_norm(x, w, b)
    expected = F.layer_norm(xd, (c,), inner_w, inner_b)
    assert_close(y, expected, dtype)
    grad = random(*shape, dtype=dtype)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, xd.grad, dtype, factor=4)
    if affine:
        assert_prefix_gradient(w, inner_w.grad, dtype)
        assert_prefix_gradient(b, inner_b.grad, dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_conv2d_any_shape(data):
    """Shapes nobody thought of: all backends against the oracle in float64."""
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, stride, dilation = (
        (integer(1, 4), integer(1, 4)),
        (integer(1, 3), integer(1, 3)),
        (integer(1, 2), integer(1, 2)),
    )
    padding = (integer(0, 2), integer(0, 2))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    group_in, group_out = integer(1, 4), integer(1, 4)
    size = [max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) + integer(0, 4) for d in (0, 1)]
    if groups == 1:
        full_in, full_out = group_in + integer(0, 3), group_out + integer(0, 3)
        c, out, active = group_in, group_out, (group_out, group_in, *kernel)
    else:
        g = integer(1, groups)
        full_in, full_out, c, out = group_in * groups, group_out * groups, g * group_in, g * group_out
        active = (out, group_in, *kernel)
    weight, inner = poisoned((full_out, full_in // groups, *kernel), active, torch.float64)
    layout = data.draw(st.sampled_from(LAYOUTS))
    x = laid_out(random(integer(1, 3), c, *size), layout).requires_grad_()
    xd = x.detach().clone().requires_grad_()
    expected = F.conv2d(xd, inner, None, stride, padding, dilation, c // (full_in // groups) if groups > 1 else 1)
    grad = random(*expected.shape)
    expected.backward(grad)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for name, candidate in BACKENDS.items():
        if candidate.can_run("conv2d", x, weight, **arguments_of(out, options)):
            x.grad = weight.grad = None
            with backend(f"conv2d={name}"):
                y = functional.conv2d(x, weight, out_channels=out, **options)
            y.backward(grad)
            assert_close(y, expected, torch.float64)
            assert_close(x.grad, xd.grad, torch.float64)
            assert_prefix_gradient(weight, inner.grad, torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    views=st.integers(1, 3),
    per_view=st.integers(2, 5),
    c=st.integers(1, 40),
    spatial=st.sampled_from([(), (1, 1), (2, 3), (5, 1)]),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from([None, "relu", "relu6"]),
)
def test_batch_norm_any_shape(views, per_view, c, spatial, layout, activation):
    x = laid_out(random(views * per_view, c, *spatial, dtype=torch.float32), layout)
    w, inner_w = poisoned((c + 3,), (c,), torch.float32)
    b, inner_b = poisoned((c + 3,), (c,), torch.float32)
    with torch.no_grad():
        expected = normed(x.double(), inner_w, inner_b, None, None, None, activation, views, True)
        for name, candidate in BACKENDS.items():
            if candidate.can_run("batch_norm", x, w):
                with backend(f"batch_norm={name}"):
                    y = functional.batch_norm(x, w, b, training=True, views=views, activation=activation)
                # Two values per channel can nearly coincide: rstd then amplifies the rounding of x - mean.
                assert_close(y, expected, torch.float32, factor=50)


@pytest.mark.parametrize("name", ["aten", "reference"])  # those that take float64
def test_gradcheck(name):
    weight = random(6, 4, 3, 3).requires_grad_()
    vector = random(6).requires_grad_()
    x, flat, residual = (random(4, 3, 4, 4), random(5, 4), random(4, 3, 4, 4))
    for t in (x, flat, residual):
        t.requires_grad_()
    matrix = random(6, 5).requires_grad_()
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda x, w, b: functional.conv2d(x, w, b, out_channels=5, padding=1, stride=2),
            (x, weight, vector),
        )
        assert torch.autograd.gradcheck(
            lambda x, w, b: functional.linear(x, w, b, out_features=3), (flat, matrix, vector)
        )
        assert torch.autograd.gradcheck(
            lambda x, w, b, r: functional.batch_norm(x, w, b, training=True, views=2, residual=r, activation="relu"),
            (x, vector, vector, residual),
        )
        assert torch.autograd.gradcheck(lambda x, w, b: functional.layer_norm(x, w, b), (flat, vector, vector))


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_opcheck(on, channels_last, requires_grad):
    dtype = torch.float32
    x = torch.randn(4, 6, 5, 5, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, vector = torch.randn(12, 8, 3, 3, dtype=dtype), torch.rand(12, dtype=dtype)
    matrix = torch.randn(12, 8, dtype=dtype)
    tensors = [t.requires_grad_(requires_grad) for t in (x, weight, vector, matrix)]
    x, weight, vector, matrix = tensors
    running = [torch.zeros(12, dtype=dtype), torch.ones(12, dtype=dtype)]
    pairs = ([1, 1] if on == "native" else [2, 1], [1, 1], [1, 1])
    arguments = {"conv2d": arguments_of(9, dict(zip(("stride", "padding", "dilation"), pairs, strict=True)))}
    samples = {
        "conv2d": (x, weight, vector, 9, *pairs, 1, on),
        "linear": (x.flatten(1)[:, :6], matrix, vector, 9, 6, on),
        "batch_norm": (x, vector, vector, *running, x.detach().clone(), True, 0.1, 1e-5, 2, "relu", on),
        "layer_norm": (x.flatten(1)[:, :12], vector, vector, 1e-5, on),
    }
    for name, sample in samples.items():
        if BACKENDS[on].can_run(name, sample[0], sample[1], **arguments.get(name, {})):
            torch.library.opcheck(getattr(torch.ops.us3l, name).default, sample)
    y = torch.randn(4, 9, 5 if on == "native" else 3, 5)
    plain = [t.detach() for t in (x, weight, vector, matrix)]
    backward = {
        "conv2d": (
            "conv2d_backward",
            (y, plain[0], plain[1], plain[1].clone(), plain[2].clone(), True, *pairs, 1, on),
        ),
        "batch_norm": (
            "batch_norm_backward",
            (
                plain[0],
                plain[0],
                plain[0],
                plain[2],
                None,
                torch.rand(2, 6),
                torch.rand(2, 6),
                plain[2].clone(),
                plain[2].clone(),
                True,
                True,
                True,
                2,
                "relu",
                on,
            ),
        ),
        "linear": (
            "linear_backward",
            (torch.randn(4, 9), torch.randn(4, 6), plain[3], plain[3].clone(), None, True, 5, on),
        ),
    }
    for op, (name, sample) in backward.items():
        weight_of = sample[2] if op != "batch_norm" else sample[3]
        if BACKENDS[on].can_run(op, sample[1], weight_of, **arguments.get(op, {})):
            torch.library.opcheck(
                getattr(torch.ops.us3l, name).default, sample, test_utils=["test_schema", "test_faketensor"]
            )


class Network(torch.nn.Module):
    """All four operations in a row; the widths are arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Parameter(torch.randn(16, 8, 3, 3) * 0.1)
        self.scale, self.shift = torch.nn.Parameter(torch.rand(16)), torch.nn.Parameter(torch.rand(16))
        self.matrix = torch.nn.Parameter(torch.randn(5, 16))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def forward(self, x: Tensor, channels: int) -> Tensor:
        y = functional.conv2d(x.sin(), self.conv, self.shift, out_channels=channels, padding=1)
        y = functional.batch_norm(
            y,
            self.scale,
            self.shift,
            self.mean,
            self.var,
            training=self.training,
            views=2,
            activation="relu",
            residual=y,
        )
        y = functional.layer_norm(y.mean((2, 3)), self.scale, None)
        return functional.linear(y, self.matrix)


CASES = list(itertools.product((12, 16), (True, False)))


@pytest.mark.parametrize(
    ("compiler", "cases"),
    [
        ("aot_eager", CASES),
        ("inductor", CASES[:1]),  # its compiler takes seconds for each graph
        pytest.param("inductor", CASES, marks=pytest.mark.slow),
    ],
)
def test_compile_full_graph(compiler, cases):
    torch.manual_seed(0)
    network, x = Network(), torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    for channels, training in cases:
        network.train(training)
        running = network.mean.clone(), network.var.clone()
        results = []
        for run in (network, compiled):
            network.mean.copy_(running[0]), network.var.copy_(running[1])
            network.zero_grad()
            x.grad = None
            y = run(x, channels)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            results.append([y, x.grad, network.mean.clone(), *(p.grad for p in network.parameters())])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_casts_as_torch_does(training, dtype):
    """Under autocast, with and without gradients: the dtypes of torch.nn, and its values bit for bit at full width."""
    x = torch.randn(4, 8, 5, 5)
    conv, norm, layer, linear = (
        torch.nn.Conv2d(8, 12, 3),
        torch.nn.BatchNorm2d(12),
        torch.nn.LayerNorm(12),
        torch.nn.Linear(12, 7),
    )
    norm.train(training)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype), backend("aten"):
        for expected, got in (
            (conv(x), functional.conv2d(x, conv.weight, conv.bias)),
            (
                norm(conv(x)),
                functional.batch_norm(
                    conv(x),
                    norm.weight,
                    norm.bias,
                    norm.running_mean.clone(),
                    norm.running_var.clone(),
                    training=training,
                ),
            ),
            (layer(torch.ones(3, 12)), functional.layer_norm(torch.ones(3, 12), layer.weight, layer.bias)),
            (
                linear(x[0, :, 0].new_ones(3, 12)),
                functional.linear(torch.ones(3, 12), linear.weight, linear.bias),
            ),
        ):
            assert got.dtype == expected.dtype
            if training or got.dim() != 4:
                assert torch.equal(got, expected)


def test_autocast_gives_float32_gradients_to_float32_weights():
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(8, 6, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv2d(x, weight, out_channels=4)
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert weight.grad.dtype == x.grad.dtype == torch.float32
    assert torch.equal(weight.grad[4:], torch.zeros(4, 6, 3, 3))


@pytest.mark.parametrize("parameters", ["half", "float32", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on", BACKENDS)
def test_norms_keep_float32_statistics_of_half_precision_images(on, dtype, parameters):
    """mean and rstd of a half precision x are float32 tensors whatever the parameters are, as the fakes promise."""
    kind = {"half": dtype, "float32": torch.float32}.get(parameters)
    x = (torch.randn(6, 8, 3, 3) + 30).to(dtype).contiguous(memory_format=torch.channels_last)
    w, b = (None if kind is None else torch.rand(12).to(kind) for _ in range(2))
    running = [t.to(kind or torch.float32) for t in (torch.zeros(12), torch.ones(12))]
    sample = (x, w, b, *running, None, True, 0.1, 1e-5, 2, "relu", on)
    if BACKENDS[on].can_run("batch_norm", x, running[0]):
        torch.library.opcheck(torch.ops.us3l.batch_norm.default, sample)
        wide = [None if t is None else t.double() for t in (x, w, b)]
        expected = reference.batch_norm(*wide, None, None, None, True, 0.1, 1e-5, 2, "relu")
        y, mean, rstd = torch.ops.us3l.batch_norm(*sample)
        assert mean.dtype == rstd.dtype == torch.float32
        if on != "aten" or parameters == "float32":  # ATen takes them in the parameters' dtype, and so does torch.nn
            assert_close(y, expected[0], dtype)
            assert_close(mean, expected[1], torch.float32)
            assert_close(rstd, expected[2], torch.float32, factor=10)  # of a variance, beside a mean of 30
    flat = x.flatten(1)[:, :12]
    if BACKENDS[on].can_run("layer_norm", flat, w):
        torch.library.opcheck(torch.ops.us3l.layer_norm.default, (flat, w, b, 1e-5, on))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_half_precision_modules_compile_and_run_under_autocast(compiler):
    for dtype in (torch.bfloat16, torch.float16):
        network, x = Network().to(dtype), torch.randn(4, 6, 5, 5, dtype=dtype)
        expected = network(x, 12)
        compiled = torch.compile(network, fullgraph=True, backend=compiler)
        torch.testing.assert_close(compiled(x, 12), expected, rtol=5e-2, atol=5e-2)
        with torch.autocast("cpu", torch.bfloat16):
            linear, norm = torch.nn.Linear(12, 7).to(dtype), torch.nn.LayerNorm(12).to(dtype)
            y = torch.randn(3, 12, dtype=dtype)
            assert torch.equal(functional.linear(y, linear.weight, linear.bias), linear(y))
            assert torch.equal(functional.layer_norm(y, norm.weight, norm.bias), norm(y))


def test_full_width_is_bit_equal_to_torch():
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv, norm = torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.BatchNorm2d(16)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    with backend("aten"):
        y = functional.conv2d(x, conv.weight, conv.bias, padding=1)
        z = functional.batch_norm(y, norm.weight, norm.bias, mean, var, training=True)
    grad = torch.randn_like(z)
    ours = torch.autograd.grad(z, (x, *conv.parameters(), *norm.parameters()), grad)
    expected = norm(conv(x))
    theirs = torch.autograd.grad(expected, (x, *conv.parameters(), *norm.parameters()), grad)
    assert torch.equal(z, expected)
    assert torch.equal(mean, norm.running_mean) and torch.equal(var, norm.running_var)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_differentiating_twice_raises():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    grad = torch.randn(2, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(functional.linear(x, weight), x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="us3l::linear.*first derivatives"):
        dx.norm().backward()


X = torch.zeros(2, 4, 5, 5)
W = torch.zeros(8, 6, 3, 3)
BAD = [
    (lambda: functional.conv2d(X[0], W), "4 dimensions"),
    (lambda: functional.conv2d(torch.zeros(2, 7, 5, 5), W), "channels of x.*between 1 and 6.*got 7"),
    (lambda: functional.conv2d(X, W, out_channels=9), "out_channels.*between 1 and 8.*got 9"),
    (lambda: functional.conv2d(X, W, out_channels=0), "out_channels.*got 0"),
    (lambda: functional.conv2d(X, W.double()), "weight: expected the dtype of x"),
    (lambda: functional.conv2d(X, W, torch.zeros(4)), "bias: expected full shape"),
    (lambda: functional.conv2d(X, W, groups=3), "groups: expected a divisor"),
    (lambda: functional.conv2d(torch.zeros(2, 5, 5, 5), W[:, :2], groups=4), "groups of 2 channels, got 5"),
    (lambda: functional.conv2d(X, W[:, :2], groups=4, out_channels=5), "give 4, got 5"),
    (lambda: functional.conv2d(X, W, stride=(1, 2, 3)), "stride: expected an int or a pair"),
    (lambda: functional.conv2d(X, W, dilation=4), "at least 9 pixels"),
    (lambda: functional.linear(X, W), "weight \\[K, C\\]"),
    (lambda: functional.linear(torch.zeros(2, 7), W[:, :, 0, 0]), "in_features.*between 1 and 6"),
    (lambda: functional.batch_norm(X, torch.ones(3), None, training=True), "weight: expected a full vector"),
    (
        lambda: functional.batch_norm(X, None, None, training=True, views=3),
        "views: expected a divisor of the batch of 2",
    ),
    (lambda: functional.batch_norm(X, None, None, training=False), "expected tensors when training is False"),
    (
        lambda: functional.batch_norm(X, None, None, training=True, activation="gelu"),
        "activation: expected one of",
    ),
    (lambda: functional.batch_norm(X, None, None, training=True, residual=X[:1]), "residual: expected"),
    (
        lambda: functional.batch_norm(X[:2, :, 0, 0], None, None, training=True, views=2),
        "more than 1 value per channel",
    ),
    (lambda: functional.batch_norm(X, None, None, torch.zeros(4), training=True), "both or neither"),
    (lambda: functional.conv2d(X, W, stride=0), "stride: expected an int or a pair of ints, at least 1"),
    (lambda: functional.conv2d(X, W, padding=-1), "padding: expected an int or a pair of ints, at least 0"),
    (lambda: functional.batch_norm(X[:, :0], None, None, training=True), "at least one channel"),
    (lambda: functional.batch_norm(X, None, None, training=True, residual=X.to("meta")), "device of x"),
    (lambda: functional.batch_norm(X, torch.ones(8)[::2], None, training=True), "contiguous vector, got stride 2"),
    (
        lambda: functional.batch_norm(X.bfloat16(), torch.ones(4), torch.ones(4).bfloat16(), training=True),
        "one dtype for all of weight, bias",
    ),
    (lambda: functional.layer_norm(X, torch.ones(4), None), "weight: expected a full vector of at least 5"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_explicit_backend_runs_or_raises():
    x = torch.zeros(2, 4, dtype=torch.float64)
    with backend("native"), pytest.raises(BackendError, match="native.*cannot run layer_norm"):
        functional.layer_norm(x, None, None)
    with pytest.raises(ValueError, match="expected one of"), backend("cudnn"):
        pass
    with pytest.raises(ValueError, match="expected an operation"), backend("conv3d=aten"):
        pass


def test_backend_context_restores_after_an_error():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(KeyError), backend("native"):
        raise KeyError
    functional.linear(x, weight)  # `auto` again: native has no linear and would raise
