"""The native batch norm against the reference in float64, and its own: layouts, threads, instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from us3l_kernels import _native, functional
from us3l_kernels import backend as use_backend
from us3l_kernels.backends import BACKENDS, BackendError, choose

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native, reference = BACKENDS["native"], BACKENDS["reference"]
EPS, MOMENTUM = 1e-5, 0.1
FLOAT, BF16 = torch.float32, torch.bfloat16
ROUNDING = {FLOAT: 2**-24, BF16: 2**-8}  # of storing a result


def rows(shape: tuple[int, ...], dtype: torch.dtype = FLOAT, gap: int = 0) -> Tensor:
    """Random values, channels innermost; with a gap, the prefix slice of a tensor with that many more channels."""
    full = torch.randn(shape[0], *shape[2:], shape[1] + gap, dtype=torch.float64).to(dtype)
    full[..., shape[1] :] = float("nan")
    return full.movedim(-1, 1)[:, : shape[1]]


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def largest(t: Tensor | None) -> float:
    return 0.0 if t is None else t.double().nan_to_num(0).abs().max().item()


def assert_near(actual: Tensor, exact: Tensor, terms: float) -> None:
    """Right but for storing the result, and for a few roundings in float32 of the `terms` that may have cancelled."""
    allowed = ROUNDING[actual.dtype] * largest(exact) + 1e-6 * terms
    assert (actual.double() - exact).abs().max().item() <= allowed


def padded(values: Tensor) -> Tensor:
    """A full-size vector of which `values` are the active prefix and the rest must never be read."""
    return torch.cat([values, torch.full((5,), float("nan"))])


@dataclass
class Case:
    """Inputs of both directions; parameters and running statistics have NaN past the active channels."""

    x: Tensor
    grad: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    training: bool
    views: int
    activation: str | None

    @classmethod
    def random(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype = FLOAT,
        *,
        gap: int = 0,
        residual: bool = False,
        affine: bool = True,
        training: bool = True,
        views: int = 1,
        activation: str | None = None,
    ) -> Case:
        c = shape[1]
        return cls(
            x=rows(shape, dtype, gap) * 2 + 1,
            grad=rows(shape, dtype, gap),
            residual=rows(shape, dtype, gap) if residual else None,
            weight=padded(torch.rand(c) + 0.5) if affine else None,
            bias=padded(torch.randn(c)) if affine else None,
            running_mean=padded(torch.randn(c)),
            running_var=padded(torch.rand(c) + 0.5),
            training=training,
            views=views if training else 1,
            activation=activation,
        )

    def double(self) -> Case:
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Case(**wide)

    def forward(self, backend: object) -> tuple[Tensor, Tensor, Tensor]:
        return backend.batch_norm(  # type: ignore[attr-defined, no-any-return]
            self.x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.residual,
            self.training,
            MOMENTUM,
            EPS,
            self.views,
            self.activation,
        )

    def backward(
        self, backend: object, y: Tensor, mean: Tensor, rstd: Tensor, need_residual: bool | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """dx, dresidual and the full-size gradients of weight and bias, which hold ones before."""
        c = self.x.size(1)
        gw, gb = torch.ones(c + 5, dtype=mean.dtype), torch.ones(c + 5, dtype=mean.dtype)
        if need_residual is None:
            need_residual = self.residual is not None and self.activation is not None
        bias = self.bias if self.residual is None else None
        dx, dresidual = backend.batch_norm_backward(  # type: ignore[attr-defined]
            self.grad, self.x, y, self.weight, bias, mean, rstd, gw, gb, True, need_residual,
            self.training, self.views, self.activation,
        )  # fmt: skip
        return dx, dresidual, gw, gb

    def check(self) -> None:
        """Every output of both directions against float64."""
        c, exact = self.x.size(1), self.double()
        y, mean, rstd = self.forward(native)
        exact_y, exact_mean, exact_rstd = exact.forward(reference)
        assert y.dtype == self.x.dtype and y.shape == self.x.shape
        assert_near(mean, exact_mean, largest(self.x))
        assert error(rstd, exact_rstd) < 1e-6
        assert_near(self.running_mean[:c], exact.running_mean[:c], largest(self.x) + largest(self.running_mean))
        assert error(self.running_var[:c], exact.running_var[:c]) < 1e-6
        assert self.running_mean[c:].isnan().all() and self.running_var[c:].isnan().all()
        weight = 1.0 if self.weight is None else largest(self.weight)
        slope = weight * largest(exact_rstd)
        deviation = largest(self.x) + largest(exact_mean)
        assert_near(y, exact_y, deviation * slope + largest(self.bias) + largest(self.residual))

        dx, dresidual, gw, gb = self.backward(native, y, mean, rstd)
        exact_dx, exact_dresidual, exact_gw, exact_gb = exact.backward(reference, y.double(), exact_mean, exact_rstd)
        assert dx is not None and exact_dx is not None and dx.dtype == self.x.dtype
        normalised = deviation * largest(exact_rstd)
        assert_near(dx, exact_dx, largest(self.grad) * slope * (1 + normalised))
        summed = self.grad.double().abs().transpose(0, 1).flatten(1).sum(1).max().item()
        assert_near(gb[:c], exact_gb[:c], summed)
        assert_near(gw[:c], exact_gw[:c], summed * normalised)
        assert gw[c:].eq(1).all() and gb[c:].eq(1).all(), "written past the active channels"
        if self.activation is not None and self.residual is not None:
            assert dresidual is not None and exact_dresidual is not None
            assert torch.equal(dresidual.double(), exact_dresidual)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("training, views", [(True, 1), (True, 2), (False, 1)], ids=["train", "views", "eval"])
def test_matches_float64(
    dtype: torch.dtype, activation: str | None, residual: bool, training: bool, views: int
) -> None:
    # 139 = 2 blocks of 64 + 8 + 2 + 1 lanes with AVX-512; 2 * 9 * 9 rows: blocks of 64 with a remainder.
    for shape in ((4, 139, 9, 9), (6, 40, 5)):
        Case.random(shape, dtype, residual=residual, training=training, views=views, activation=activation).check()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 15, 16, 17, 31, 48, 63, 65, 96, 127, 200])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_every_tail_of_the_channels(channels: int, dtype: torch.dtype) -> None:
    Case.random((70, channels), dtype, activation="relu", residual=True).check()
    Case.random((3, channels, 2, 2), dtype, affine=False).check()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 6),
    channels=st.integers(1, 80),
    space=st.lists(st.integers(1, 9), max_size=3),
    views=st.integers(1, 3),
    gap=st.integers(0, 9),
    dtype=st.sampled_from([FLOAT, BF16]),
    activation=st.sampled_from([None, "relu", "relu6"]),
    residual=st.booleans(),
    training=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape(
    batch: int, channels: int, space: list[int], views: int, gap: int, dtype: torch.dtype,
    activation: str | None, residual: bool, training: bool, threads: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    shape = (2 * batch * views, channels, *space)
    Case.random(shape, dtype, gap=gap, residual=residual, training=training, views=views, activation=activation).check()


@pytest.mark.parametrize("shape", [(8, 64, 24, 24), (2, 8, 64, 64), (40, 3000)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads(shape: tuple[int, ...], threads: int) -> None:
    """Right with any number of threads, and the same bits each time."""
    torch.set_num_threads(threads)
    case = Case.random(shape, residual=True, views=2, activation="relu")
    again = Case(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(case).items()})
    case.check()
    again_first = Case(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(again).items()})
    one, two = again.forward(native), again_first.forward(native)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    first, second = again.backward(native, *one), again_first.backward(native, *two)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["first row far off", "drift", "constant offset"])
def test_mean_far_from_zero(layout: str) -> None:
    """The variance does not come out of the difference of two large numbers."""
    x = torch.randn(4096, 72)
    if layout == "constant offset":
        x += 1e4
    elif layout == "first row far off":
        x[0] = 0
        x[1:] += 3e3
    else:
        x += torch.linspace(0, 1e4, 4096).view(-1, 1)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    _, actual_mean, rstd = native.batch_norm(x, None, None, None, None, None, True, MOMENTUM, EPS, 1, None)
    assert error(actual_mean[0], mean) < 1e-7
    assert error(rstd[0], (var + EPS).rsqrt()) < 1e-6


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
def test_inputs_are_not_written(dtype: torch.dtype) -> None:
    case = Case.random((4, 24, 6, 6), dtype, gap=3, residual=True, activation="relu")
    before = [case.x.clone(), case.residual.clone(), case.weight.clone(), case.bias.clone(), case.grad.clone()]  # type: ignore[union-attr]
    y, mean, rstd = case.forward(native)
    kept = y.clone()
    case.backward(native, y, mean, rstd)
    case.backward(native, y, mean, rstd, need_residual=False)
    after = [case.x, case.residual, case.weight, case.bias, case.grad]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True))  # type: ignore[union-attr]
    assert torch.equal(kept, y)


def test_dx_does_not_depend_on_what_else_is_asked_for() -> None:
    case = Case.random((4, 40, 6, 6), activation="relu6", residual=True)
    y, mean, rstd = case.forward(native)
    with_residual, without = case.backward(native, y, mean, rstd), case.backward(native, y, mean, rstd, False)
    assert without[1] is None
    assert torch.equal(with_residual[0], without[0])  # type: ignore[arg-type]
    gw = torch.ones(45)
    dx, dresidual = native.batch_norm_backward(
        case.grad, case.x, y, case.weight, None, mean, rstd, gw, None, False, False, True, 1, "relu6"
    )
    assert dx is None and dresidual is None and torch.equal(gw, without[2])


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_mask_is_the_same_from_x_and_from_y(dtype: torch.dtype, activation: str) -> None:
    """Without a residual the mask is computed from x once more; y, rounded as it was stored, must agree to the bit."""
    case = Case.random((64, 40, 9, 9), dtype, activation=activation)
    case.weight, case.bias = torch.full((40,), 4.0), torch.full((40,), 3.0)  # many values at either bound
    y, mean, rstd = case.forward(native)
    tensors = (case.grad, case.x, y, case.weight)
    options = (None, None, True, False, True, 1, activation)
    from_x, _ = native.batch_norm_backward(*tensors, case.bias, mean, rstd, *options)
    from_y, _ = native.batch_norm_backward(*tensors, None, mean, rstd, *options)
    assert from_x is not None and from_y is not None
    assert torch.equal(from_x, from_y)


def test_gradients_of_other_layouts() -> None:
    """The upstream gradient and the residual may lie in any way; a mean's gradient is expanded."""
    case = Case.random((4, 24, 6, 6), residual=True, activation="relu")
    case.residual = case.residual.contiguous()  # type: ignore[union-attr]
    case.grad = case.grad[:, :, :1, :1].expand(4, 24, 6, 6)
    case.check()
    case = Case.random((4, 24, 6, 6))
    case.grad = case.grad.contiguous()
    case.check()


def test_rounds_to_bfloat16_as_torch_does() -> None:
    values = torch.cat(
        [
            torch.randn(4000),
            torch.arange(0x3F7F0000, 0x3F830000, 0x1111, dtype=torch.int32).view(FLOAT),
            torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-40, 0.0]),
        ]
    )
    c = len(values)
    x = torch.zeros(1, c, dtype=BF16)
    y, _, _ = native.batch_norm(x, None, values, torch.zeros(c), torch.ones(c), None, False, MOMENTUM, 0.0, 1, None)
    torch.testing.assert_close(y[0], values.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_nan_and_infinity_pass(activation: str | None) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -1.0, 3.0, 9.0]])
    y, _, _ = native.batch_norm(x, None, None, torch.zeros(6), torch.ones(6), None, False, MOMENTUM, 0.0, 1, activation)
    expected = {None: x, "relu": x.relu(), "relu6": torch.nn.functional.relu6(x)}[activation]
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_through_autograd() -> None:
    """Full-size parameters, a prefix of the channels, the whole way from functional to the gradients."""
    x = rows((4, 24, 5, 5)).requires_grad_()
    residual = rows((4, 24, 5, 5)).requires_grad_()
    weight, bias = (torch.rand(40) + 0.5).requires_grad_(), torch.randn(40, requires_grad=True)
    grad = rows((4, 24, 5, 5))

    def gradients(name: str) -> tuple[Tensor, ...]:
        with use_backend(name):
            y = functional.batch_norm(x, weight, bias, training=True, views=2, activation="relu", residual=residual)
        return y, *torch.autograd.grad(y, (x, weight, bias, residual), grad)

    for actual, expected in zip(gradients("native"), gradients("aten"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert actual.stride() == expected.stride()


def test_opcheck() -> None:
    case = Case.random((4, 8, 3, 3), residual=True, views=2, activation="relu")
    args = (MOMENTUM, EPS, case.views, case.activation, "native")
    tensors = [case.x, torch.rand(8), torch.rand(8), torch.rand(8), torch.rand(8), case.residual]
    tensors = [tensors[0].requires_grad_(), *(t.requires_grad_() for t in tensors[1:3]), *tensors[3:]]  # type: ignore[union-attr]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.us3l.batch_norm.default, (*tensors, True, *args), test_utils=checks)


def test_compiles_to_a_full_graph() -> None:
    x, weight, bias, grad = rows((4, 8, 3, 3)).requires_grad_(), torch.rand(12), torch.rand(12), rows((4, 8, 3, 3))

    def step(x: Tensor) -> Tensor:
        with use_backend("native"):
            return functional.batch_norm(x * 2, weight, bias, training=True, activation="relu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (actual,), (expected,) = (torch.autograd.grad(f(x), (x,), grad) for f in (compiled, step))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "x, weight, reason",
    [
        (torch.randn(2, 8, 3, 3), torch.rand(8), "channels_last"),
        (torch.randn(8, 4).t(), torch.rand(8), "channels_last"),
        (torch.randn(4, 8, dtype=torch.float64), torch.rand(8).double(), "float64"),
        (torch.randn(4, 8).half(), torch.rand(8), "float16"),
        (torch.randn(4, 8).bfloat16(), torch.rand(8).bfloat16(), "float32 parameters"),
    ],
)
def test_says_what_it_cannot_run(x: Tensor, weight: Tensor, reason: str) -> None:
    assert choose("batch_norm", x, weight) != "native"
    with use_backend("native"), pytest.raises(BackendError, match=reason):
        functional.batch_norm(x, weight, None, training=True)


def test_is_the_automatic_choice() -> None:
    assert choose("batch_norm", rows((2, 8, 3, 3)), torch.rand(9)) == "native"
    assert choose("batch_norm", rows((2, 8, 3, 3), BF16, gap=3), torch.rand(9)) == "native"


def test_empty_and_too_small_batches() -> None:
    y, _, _ = native.batch_norm(
        torch.zeros(0, 8), None, None, torch.zeros(8), torch.ones(8), None, False, MOMENTUM, EPS, 1, "relu"
    )
    assert y.shape == (0, 8)
    for x, views in ((torch.randn(1, 8), 1), (torch.randn(2, 8), 2), (torch.randn(0, 8), 1)):
        with pytest.raises(RuntimeError, match="more than 1 value per channel"):
            native.batch_norm(x, None, None, None, None, None, True, MOMENTUM, EPS, views, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.rand(7)}, "weight: expected .* at least 8 elements, got .7."),
        ({"bias": torch.rand(16)[::2]}, "bias: expected a contiguous"),
        ({"running_mean": torch.rand(8).double()}, "running_mean: expected a contiguous float32"),
        ({"residual": torch.rand(4, 9)}, "residual: expected the shape of x, .4, 8., got .4, 9."),
        ({"residual": torch.rand(4, 8).bfloat16()}, "residual: expected the dtype of x"),
        ({"views": 3}, "views: expected a divisor of the batch of 4, got 3"),
        ({"training": False, "running_var": None}, "running_mean, running_var: expected both"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    case = Case.random((4, 8))
    with pytest.raises(RuntimeError, match=message):
        Case(**{**vars(case), **change}).forward(native)  # type: ignore[arg-type]
