"""The native matrix product against float64: few and many rows, prefixes, threads, instruction sets, the choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from us3l_kernels import _native, functional
from us3l_kernels import backend as use_backend
from us3l_kernels.backends import BACKENDS, BackendError, choose

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native = BACKENDS["native"]
NAN, CANARY = float("nan"), 3.0
TOLERANCE = 2e-6  # largest error over largest value


def prefix(shape: tuple[int, ...], gap: int) -> Tensor:
    """Random values [..., c], the prefix of rows that go on with NaN."""
    full = torch.randn(*shape[:-1], shape[-1] + gap)
    full[..., shape[-1] :] = NAN
    return full[..., : shape[-1]]


def error(actual: Tensor, exact: Tensor, terms: Tensor) -> float:
    """The largest error over the largest value, or over an eighth of the largest sum of terms' absolute values, where
    these cancel."""
    assert actual.shape == exact.shape
    return ((actual.double() - exact).abs().max() / torch.maximum(exact.abs().max(), terms.max() / 8)).item()


@dataclass
class Case:
    """The inputs of both directions; the parameters have NaN past the active features."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor

    @classmethod
    def random(cls, rows: int, c: int, k: int, *, gap: int = 3, transposed: bool = False, bias: bool = True) -> Case:
        shape = (c + gap, k + gap) if transposed else (k + gap, c + gap)
        weight = torch.full(shape, NAN)
        weight = weight.t() if transposed else weight
        weight[:k, :c] = torch.randn(k, c) / c**0.5
        vector = torch.cat([torch.randn(k), torch.full((gap,), NAN)])
        return cls(prefix((rows, c), gap), weight, vector if bias else None, prefix((rows, k), gap))

    def run(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        k, c = self.grad.size(-1), self.x.size(-1)
        y = native.linear(self.x, self.weight, self.bias, k, c)
        gw, gb = torch.zeros_like(self.weight), torch.zeros(self.weight.size(0))
        dx = native.linear_backward(self.grad, self.x, self.weight, gw, gb, True, c)
        return y, dx, gw, gb

    def check(self) -> None:
        k, c = self.grad.size(-1), self.x.size(-1)
        x, weight = self.x.double(), self.weight[:k, :c].double()
        bias = None if self.bias is None else self.bias[:k].double()
        grad = self.grad.double()
        y, dx, gw, gb = self.run()
        assert dx is not None
        assert error(y, F.linear(x, weight, bias), F.linear(x.abs(), weight.abs())) <= TOLERANCE
        assert error(dx, grad @ weight, grad.abs() @ weight.abs()) <= TOLERANCE
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        assert error(gw[:k, :c], grad.t() @ x, grad.abs().t() @ x.abs()) <= TOLERANCE
        assert error(gb[:k], grad.sum(0), grad.abs().sum(0)) <= TOLERANCE
        gw[:k, :c] = 0
        gb[:k] = 0
        assert not gw.any() and not gb.any(), "written past the active features"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    "shape", [(64, 1040, 600), (3, 2048, 40), (300, 80, 96), (257, 33, 520), (700, 400, 24)], ids=str
)
def test_sizes(shape: tuple[int, int, int], transposed: bool) -> None:
    Case.random(*shape, transposed=transposed).check()


@pytest.mark.parametrize("features", [1, 2, 7, 8, 15, 16, 17, 33, 65, 127])
@pytest.mark.parametrize("rows", [1, 7, 33, 260])
def test_every_tail(rows: int, features: int) -> None:
    Case.random(rows, features, 9).check()
    Case.random(rows, 9, features, bias=False).check()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    c=st.integers(1, 80),
    k=st.integers(1, 80),
    gap=st.integers(0, 3),
    transposed=st.booleans(),
    threads=st.integers(1, 4),
)
def test_any_shape(rows: int, c: int, k: int, gap: int, transposed: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    Case.random(rows, c, k, gap=gap, transposed=transposed).check()


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(7, 24, 40), (64, 300, 530), (600, 72, 24)], ids=str)
def test_threads(shape: tuple[int, int, int], threads: int) -> None:
    """Right with any number of threads, also more than there is work for, and the same bits each time."""
    torch.set_num_threads(threads)
    case = Case.random(*shape)
    case.check()
    for first, second in zip(case.run(), case.run(), strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize("c", [20, 32])
@pytest.mark.parametrize("rows", [5, 300])
def test_adds_to_the_slice_and_writes_nothing_else(rows: int, c: int) -> None:
    case = Case.random(rows, c, 36, gap=2)
    inputs = [case.x, case.weight, case.grad]
    before = [t.clone() for t in inputs]
    _, dx, fresh, fresh_bias = case.run()
    gw, gb = torch.full_like(case.weight, CANARY), torch.full((38,), CANARY)
    assert native.linear_backward(case.grad, case.x, case.weight, gw, None, False, c) is None
    untouched = gw.clone()
    alone = native.linear_backward(case.grad, case.x, case.weight, None, gb, True, c)
    assert torch.equal(alone, dx) and torch.equal(gw, untouched)  # type: ignore[arg-type]
    torch.testing.assert_close(gw - CANARY, fresh, rtol=0, atol=2e-5)
    torch.testing.assert_close(gb - CANARY, fresh_bias, rtol=0, atol=2e-5)
    gw[:36, :c] = CANARY
    gb[36:] -= CANARY
    assert torch.equal(gw, torch.full_like(gw, CANARY)) and not gb[36:].any()
    for old, new in zip(before, inputs, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["native", "aten"])
def test_tensors_of_other_layouts(name: str) -> None:
    """Tokens, a vector, a prefix of x, x and the gradient transposed or expanded: as the reference computes them."""
    weight, bias = torch.randn(24, 20, requires_grad=True), torch.randn(24, requires_grad=True)
    for x in (torch.randn(3, 5, 20), torch.randn(20), torch.randn(20, 6).t(), torch.randn(1, 20).expand(4, 20)):
        for in_features in (20, 13):
            x = x.detach().requires_grad_()
            grads = torch.randn(*x.shape[:-1], 17)
            for grad in (grads, torch.randn(17).expand_as(grads), grads.mT.contiguous().mT if x.dim() > 1 else grads):
                found = []
                for on, dtype in ((name, torch.float32), ("reference", torch.float64)):
                    inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
                    with use_backend(on):
                        y = functional.linear(*inputs, out_features=17, in_features=in_features)
                    found.append((y, *torch.autograd.grad(y, inputs, grad.to(dtype))))
                for actual, exact in zip(*found, strict=True):
                    assert error(actual, exact, exact.abs()) <= TOLERANCE


def test_nothing_to_compute() -> None:
    weight = torch.randn(8, 6)
    assert native.linear(torch.zeros(0, 6), weight, None, 5, 6).shape == (0, 5)
    gw = torch.zeros_like(weight)
    dx = native.linear_backward(torch.zeros(0, 5), torch.zeros(0, 6), weight, gw, None, True, 6)
    assert dx is not None and dx.shape == (0, 6) and not gw.any()


def test_the_automatic_choice_is_the_faster() -> None:
    weight = torch.empty(256, 256)
    for rows, chosen in ((64, "native"), (2, "native"), (1, "aten")):
        x = torch.randn(rows, 128)
        arguments = {"out_features": 96, "in_features": 128}
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            assert choose("linear", x, weight, **arguments) == chosen
        with use_backend("native"):
            assert choose("linear", x, weight, **arguments) == "native"


def test_says_what_it_cannot_run() -> None:
    x, weight = torch.randn(4, 16).double(), torch.randn(8, 16).double()
    with use_backend("native"), pytest.raises(BackendError, match="float64"):
        functional.linear(x, weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(5, 6).double()}, "x: expected float32"),
        ({"weight": torch.randn(8, 5)}, "weight: expected float32 .>= 4, >= 6., got .8, 5."),
        ({"bias": torch.randn(3)}, "bias: expected a contiguous float32 vector of at least 4"),
        ({"grad": torch.randn(4, 4)}, "grad: expected the rows of x, 5, got 4"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    good = {"x": torch.randn(5, 6), "weight": torch.randn(8, 6), "bias": None, "grad": torch.randn(5, 4)}
    with pytest.raises(RuntimeError, match=message):
        Case(**{**good, **change}).run()  # type: ignore[arg-type]
