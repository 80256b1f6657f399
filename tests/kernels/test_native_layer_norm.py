"""The native layer norm against the reference in float64, and its own: layouts, threads, instruction sets."""

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
EPS, NAN, CANARY = 1e-5, float("nan"), 3.0
FLOAT, BF16 = torch.float32, torch.bfloat16
ROUNDING = {FLOAT: 2e-6, BF16: 2**-8}  # largest error over largest value: of the sums, of storing a result


def rows(shape: tuple[int, ...], dtype: torch.dtype = FLOAT, gap: int = 0) -> Tensor:
    """Random values; with a gap, the prefix slice of a tensor with that many more channels."""
    full = torch.randn(*shape[:-1], shape[-1] + gap).to(dtype)
    full[..., shape[-1] :] = NAN
    return full[..., : shape[-1]]


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def largest(t: Tensor) -> float:
    return t.double().abs().max().item()


@dataclass
class Case:
    """The inputs of both directions; weight and bias are full, with NaN past the active channels."""

    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def random(
        cls, shape: tuple[int, ...], dtype: torch.dtype = FLOAT, *, gap: int = 3, affine: bool = True
    ) -> Case:
        vectors = [torch.cat([torch.randn(shape[-1]), torch.full((gap,), NAN)]) for _ in range(2)]
        return cls(
            rows(shape, dtype, gap), rows(shape, dtype), vectors[0] if affine else None, vectors[1] if affine else None
        )

    @property
    def full(self) -> int:
        return self.x.size(-1) if self.weight is None else self.weight.size(0)

    def run(self, need_grad_x: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """y, mean, rstd, dx, and the gradients of weight and bias: full, and they were zero."""
        y, mean, rstd = native.layer_norm(self.x, self.weight, self.bias, EPS)
        gw, gb = torch.zeros(self.full), torch.zeros(self.full)
        dx = native.layer_norm_backward(self.grad, self.x, self.weight, mean, rstd, gw, gb, need_grad_x)
        return y, mean, rstd, dx, gw, gb

    def check(self, threads: int = 1) -> None:
        c = self.x.size(-1)
        weight, bias = (None if t is None else t[:c].double() for t in (self.weight, self.bias))
        exact = reference.layer_norm(self.x.double(), weight, bias, EPS)
        gw, gb = torch.zeros(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        dx = reference.layer_norm_backward(self.grad.double(), self.x.double(), weight, *exact[1:], gw, gb, True)
        assert dx is not None
        torch.set_num_threads(threads)
        y, mean, rstd, actual, *gradients = self.run()
        torch.set_num_threads(1)
        assert actual is not None
        assert y.dtype == actual.dtype == self.x.dtype and y.is_contiguous()
        normalised, blur = (self.x.double() - exact[1]) * exact[2], 2**-24 * largest(exact[1] * exact[2])
        scale = 1.0 if weight is None else largest(weight)  # blur: what it costs `normalised` that the mean is a float
        terms = largest(self.grad) * scale * largest(exact[2])  # of dx; in rows of few channels they cancel
        dx_blur = (ROUNDING[FLOAT] + 2 * blur * largest(normalised)) * terms
        assert largest(y.double() - exact[0]) <= ROUNDING[y.dtype] * largest(exact[0]) + blur * scale
        assert largest(actual.double() - dx) <= ROUNDING[y.dtype] * largest(dx) + dx_blur
        assert largest(mean - exact[1]) <= ROUNDING[FLOAT] * largest(self.x)
        assert error(rstd, exact[2]) <= ROUNDING[FLOAT]
        sum_g = largest(self.grad.double().abs().reshape(-1, c).sum(0))
        for gradient, right in zip(gradients, (gw, gb), strict=True):
            assert largest(gradient[:c] - right) <= ROUNDING[FLOAT] * largest(right) + blur * sum_g
            assert not gradient[c:].any(), "written past the active channels"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 65, 192, 200, 768, 5000])
def test_every_tail_of_the_channels(channels: int, dtype: torch.dtype) -> None:
    Case.random((7, channels), dtype).check()
    Case.random((2, 3, channels), dtype, affine=False).check()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    channels=st.integers(2, 70),
    gap=st.integers(0, 5),
    affine=st.booleans(),
    bf16=st.booleans(),
)
def test_any_shape(shape: list[int], channels: int, gap: int, affine: bool, bf16: bool) -> None:
    Case.random((*shape, channels), BF16 if bf16 else FLOAT, gap=gap, affine=affine).check()


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_threads(threads: int) -> None:
    """Right with any number of threads, also more than rows, and the same bits each time."""
    for case in (Case.random((331, 130)), Case.random((3, 20000))):
        case.check(threads)
        torch.set_num_threads(threads)
        for first, second in zip(case.run(), case.run(), strict=True):
            assert torch.equal(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_mean_far_from_zero(offset: float) -> None:
    """x is exact in float32, deviations and all; only what the statistics lose would show."""
    case = Case.random((9, 200), gap=0)
    case.x = offset + torch.randint(-64, 65, (9, 200)) / 64
    exact = reference.layer_norm(case.x.double(), None, None, EPS)
    y, mean, rstd = native.layer_norm(case.x, None, None, EPS)
    assert error(rstd, exact[2]) <= ROUNDING[FLOAT] and error(mean, exact[1]) <= 2**-24
    assert error(y, exact[0]) <= 2**-24 * offset + ROUNDING[FLOAT]  # that of the mean, which is a float


def test_long_sums() -> None:
    """Gradients of one sign, over many rows: float32 alone would lose digits."""
    case = Case.random((50000, 8), affine=False)
    case.grad = case.grad.abs()
    case.check()


def test_constant_rows() -> None:
    case = Case.random((5, 40))
    case.x = torch.full((5, 40), 7.0)
    y, mean, rstd, dx, _, _ = case.run()
    assert case.bias is not None and dx is not None
    assert torch.equal(y, case.bias[:40].expand(5, 40)) and torch.equal(mean, torch.full((5, 1), 7.0))
    torch.testing.assert_close(rstd, torch.full((5, 1), EPS**-0.5))
    assert dx.isfinite().all()


def test_the_gradients_do_not_depend_on_each_other() -> None:
    case = Case.random((37, 50))
    _, mean, rstd, dx, gw, gb = case.run()
    assert torch.equal(gw, case.run(need_grad_x=False)[4])
    one, other = torch.zeros_like(gw), torch.zeros_like(gb)
    alone = native.layer_norm_backward(case.grad, case.x, case.weight, mean, rstd, None, None, True)
    native.layer_norm_backward(case.grad, case.x, case.weight, mean, rstd, one, None, False)
    nothing = native.layer_norm_backward(case.grad, case.x, case.weight, mean, rstd, None, other, False)
    assert nothing is None and torch.equal(one, gw) and torch.equal(other, gb)
    assert torch.equal(alone, dx)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bfloat16"])
def test_adds_to_the_slice_and_writes_nothing_else(dtype: torch.dtype) -> None:
    case = Case.random((21, 36), dtype)
    inputs = [t for t in (case.x, case.weight, case.bias, case.grad) if t is not None]
    before = [t.clone() for t in inputs]
    _, mean, rstd, _, fresh_w, fresh_b = case.run()
    gw, gb = torch.full((39,), CANARY), torch.full((39,), CANARY)
    native.layer_norm_backward(case.grad, case.x, case.weight, mean, rstd, gw, gb, True)
    for actual, fresh in ((gw, fresh_w), (gb, fresh_b)):
        torch.testing.assert_close(actual - CANARY, fresh, rtol=0, atol=2e-5)
        assert torch.equal(actual[36:], torch.full((3,), CANARY))
    for old, new in zip(before, inputs, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_other_layouts() -> None:
    """Every other row of a larger tensor, and upstream gradients that are transposed or expanded."""
    case = Case.random((4, 6, 24))
    case.x = rows((8, 6, 24))[::2][:, :1]
    case.grad = rows((4, 1, 24))
    case.check()
    case.x = rows((4, 6, 24))
    case.grad = rows((24, 4, 6)).permute(1, 2, 0)
    case.check()
    case.grad = rows((4, 6, 1)).expand(4, 6, 24)
    case.check()


def test_through_autograd() -> None:
    """Full-size parameters, a prefix of the channels, the whole way from functional to the gradients."""
    for dtype in (FLOAT, BF16):
        x = rows((3, 5, 24), dtype, gap=2).requires_grad_()
        weight, bias = torch.randn(40, requires_grad=True), torch.randn(40, requires_grad=True)
        grad = rows((3, 5, 24), dtype)
        results = []
        for name in ("native", "reference"):
            with use_backend(name):
                y = functional.layer_norm(x, weight, bias)
            results.append((y, *torch.autograd.grad(y, (x, weight, bias), grad)))
        for actual, expected in zip(*results, strict=True):
            assert error(actual, expected.double()) <= 4 * ROUNDING[dtype]
            assert actual.stride() == expected.stride() and actual.dtype == expected.dtype


def test_no_rows() -> None:
    case = Case.random((0, 24))
    y, mean, _, dx, gw, _ = case.run()
    assert y.shape == (0, 24) and mean.shape == (0, 1) and dx is not None and dx.shape == (0, 24) and not gw.any()


def test_the_automatic_choice() -> None:
    weight = torch.randn(40)
    assert choose("layer_norm", rows((4, 5, 24), gap=3), weight) == "native"
    assert choose("layer_norm", rows((4, 24), BF16), weight) == "native"
    assert choose("layer_norm", rows((4, 24), BF16), weight.bfloat16()) == "aten"
    assert choose("layer_norm", rows((24, 4, 5)).permute(1, 2, 0), weight) == "aten"


@pytest.mark.parametrize(
    "x, reason",
    [
        (rows((24, 5)).t(), "rows of contiguous channels"),
        (rows((9, 4, 24))[::2, ::3], "rows of contiguous channels"),
        (rows((4, 24)).double(), "float64"),
    ],
)
def test_says_what_it_cannot_run(x: Tensor, reason: str) -> None:
    with use_backend("native"), pytest.raises(BackendError, match=reason):
        functional.layer_norm(x, torch.randn(24, dtype=x.dtype), None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": rows((24, 5)).t()}, "x: expected rows at one distance"),
        ({"x": rows((5, 24)).double()}, "x: expected float32 or bfloat16"),
        ({"weight": torch.randn(23)}, "weight: expected a contiguous float32 vector of at least 24 elements"),
        ({"bias": torch.randn(24).double()}, "bias: expected a contiguous float32 vector"),
        ({"grad": rows((6, 24))}, "grad: expected the shape of x, .5, 24., got .6, 24."),
        ({"grad": rows((5, 24), BF16)}, "grad: expected the dtype of x"),
        ({"mean": torch.zeros(4, 1)}, "mean, rstd: expected contiguous float32, one value for each of 5 rows"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    good = {**vars(Case.random((5, 24), gap=0)), "mean": torch.zeros(5, 1), "rstd": torch.ones(5, 1)}
    x, grad, weight, bias, mean, rstd = {**good, **change}.values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.us3l_native.layer_norm(x, weight, bias, EPS)
        torch.ops.us3l_native.layer_norm_backward(grad, x, weight, mean, rstd, None, None, True)
