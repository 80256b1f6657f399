"""The native 3x3 convolution with stride 2 by Winograd against float64, and its own; see test_native_conv.py."""

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
from us3l_kernels.backends import native as backend

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native = torch.ops.us3l_native
NAN, CANARY = float("nan"), 3.0
TOLERANCE = 5e-6  # largest error over largest value


def images(n: int, c: int, h: int, w: int, gap: int = 0) -> Tensor:
    """Random images, channels innermost; with a gap, the prefix slice of one with that many more channels."""
    full = torch.randn(n, h, w, c + gap)
    full[..., c:] = NAN
    return full.permute(0, 3, 1, 2)[:, :c]


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


@dataclass
class Case:
    """The inputs of both directions; the weight and the bias have NaN past the active channels."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor

    @classmethod
    def random(
        cls, n: int, c: int, k: int, h: int, w: int, *, gap: int = 2, channels_last: bool = True, bias: bool = True
    ) -> Case:
        weight = torch.full((k + gap, c + gap, 3, 3), NAN)
        weight[:k, :c] = torch.randn(k, c, 3, 3) / (3 * c**0.5)
        return cls(
            images(n, c, h, w, gap),
            weight.contiguous(memory_format=torch.channels_last) if channels_last else weight,
            torch.cat([torch.randn(k), torch.full((gap,), NAN)]) if bias else None,
            images(n, k, (h + 1) // 2, (w + 1) // 2),
        )

    def run(self, need_grad_x: bool = True, need_grad_weight: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward; the gradient of the weight is full, and was zero."""
        y = native.conv2d_3x3_stride2(self.x, self.weight, self.bias, self.grad.size(1))
        gw = torch.zeros_like(self.weight)
        into = gw if need_grad_weight else None
        return y, native.conv2d_3x3_stride2_backward(self.grad, self.x, self.weight, into, need_grad_x), gw

    def check(self) -> None:
        k, c = self.grad.size(1), self.x.size(1)
        x, weight = self.x.double().requires_grad_(), self.weight[:k, :c].double().requires_grad_()
        exact = F.conv2d(x, weight, None if self.bias is None else self.bias[:k].double(), stride=2, padding=1)
        exact.backward(self.grad.double())
        y, dx, gw = self.run()
        assert x.grad is not None and weight.grad is not None
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, exact.detach()) <= TOLERANCE
        assert error(dx, x.grad) <= TOLERANCE
        assert error(gw[:k, :c], weight.grad) <= TOLERANCE
        gw[:k, :c] = 0
        assert not gw.any(), "written past the active channels"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "shape",
    [(2, 512, 72, 9, 7), (3, 24, 512, 8, 8), (9, 256, 64, 32, 31), (16, 40, 48, 64, 64)],
    ids=["512 to a sum, by channels", "dX of 512", "256 to a sum, blocks", "dW of 1024 tiles"],
)
def test_accuracy(shape: tuple[int, ...], channels_last: bool) -> None:
    n, c, k, h, w = shape
    Case.random(n, c, k, h, w, channels_last=channels_last).check()


def test_accuracy_of_activations() -> None:
    """The inputs of a network are not centred: what comes out of a ReLU, and gradients that are zero where it was."""
    case = Case.random(4, 256, 128, 16, 16)
    case.x, case.grad = case.x.relu(), case.grad * (torch.rand_like(case.grad) < 0.5)
    case.check()


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 65, 72, 127])
def test_every_tail_of_the_channels(channels: int) -> None:
    """Few tiles, which go by blocks of channels, and more than 128, which go by blocks of tiles."""
    Case.random(2, channels, 9, 9, 10).check()
    Case.random(2, 9, channels, 9, 10).check()
    Case.random(9, channels, 9, 31, 25).check()
    Case.random(9, 9, channels, 31, 25).check()


@pytest.mark.parametrize("height", range(1, 20))
def test_every_border(height: int) -> None:
    """Images that end anywhere in a tile of 8x8 pixels."""
    for width in (1, 2, 7, 8, 9, 16):
        Case.random(1, 17, 18, height, width).check()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    c=st.integers(1, 70),
    k=st.integers(1, 70),
    h=st.integers(1, 37),
    w=st.integers(1, 37),
    gap=st.integers(0, 5),
    channels_last=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 4),
)
def test_any_shapes(
    n: int, c: int, k: int, h: int, w: int, gap: int, channels_last: bool, bias: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    Case.random(n, c, k, h, w, gap=gap, channels_last=channels_last, bias=bias).check()


SHAPES = {"channels": (3, 80, 100, 17, 9), "blocks": (11, 24, 40, 32, 32), "one image": (1, 16, 20, 100, 90)}


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("way", SHAPES)
def test_threads(way: str, threads: int) -> None:
    """Right with any number of threads, also more than images, and the same bits each time."""
    torch.set_num_threads(threads)
    case = Case.random(*SHAPES[way])
    case.check()
    for first, second in zip(case.run(), case.run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("way", SHAPES)
def test_the_gradients_do_not_depend_on_each_other(way: str) -> None:
    case = Case.random(*SHAPES[way])
    _, dx, gw = case.run()
    _, dx_alone, untouched = case.run(need_grad_weight=False)
    _, nothing, gw_alone = case.run(need_grad_x=False)
    assert nothing.numel() == 0 and not untouched.any()
    assert torch.equal(dx, dx_alone) and torch.equal(gw, gw_alone)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("way", SHAPES)
def test_adds_to_the_slice_and_writes_nothing_else(way: str, channels_last: bool) -> None:
    case = Case.random(*SHAPES[way], channels_last=channels_last)
    k, c = case.grad.size(1), case.x.size(1)
    _, _, fresh = case.run()
    gw = torch.full_like(case.weight, CANARY)
    native.conv2d_3x3_stride2_backward(case.grad, case.x, case.weight, gw, False)
    torch.testing.assert_close(gw - CANARY, fresh, rtol=1e-5, atol=1e-5)
    gw[:k, :c] = CANARY
    assert torch.equal(gw, torch.full_like(gw, CANARY))


def test_scratch_memory_of_another_call_does_not_leak_in() -> None:
    """Working memory is kept between calls; what an earlier one left there, NaN even, must not be seen."""
    small = [Case.random(2, 9, 11, 5, 5), Case.random(9, 9, 11, 31, 31)]
    expected = [case.run() for case in small]
    large = Case.random(12, 70, 50, 34, 34)
    large.x = torch.full_like(large.x, NAN)
    large.run()
    for case, before in zip(small, expected, strict=True):
        for first, second in zip(before, case.run(), strict=True):
            assert torch.equal(first, second)


def test_tensors_of_other_strides() -> None:
    """Every other row and image of a larger x, a transposed one; an upstream gradient that is expanded."""
    case = Case.random(2, 24, 16, 5, 6)
    case.x = images(4, 24, 10, 6)[::2, :, ::2]
    case.check()
    case.x = images(2, 24, 6, 5).transpose(2, 3)
    case.grad = case.grad.contiguous()
    case.check()
    case.grad = case.grad[:, :, :1, :1].expand(2, 16, 3, 3)
    case.check()


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((2, 16, 32, 32), "winograd_stride2"),
        ((8, 64, 7, 8), "winograd_stride2"),
        ((2, 15, 32, 32), "product"),  # few channels
        ((7, 64, 8, 8), "product"),  # few tiles
    ],
)
def test_the_choice_of_the_algorithm(shape: tuple[int, ...], expected: str) -> None:
    x, weight = images(*shape), torch.empty(32, shape[1], 3, 3)
    assert backend.algorithm_of(x, weight, [2, 2], [1, 1], [1, 1], 1) == expected
    assert backend.algorithm_of(x, weight, [2, 2], [0, 1], [1, 1], 1) == "product"
    assert backend.algorithm_of(x.bfloat16(), weight, [2, 2], [1, 1], [1, 1], 1) == "product"


def test_through_autograd() -> None:
    """Full-size parameters, a prefix of the channels, the whole way from functional to the gradients."""
    x = images(9, 24, 15, 16).requires_grad_()
    weight, bias = torch.randn(40, 32, 3, 3, requires_grad=True), torch.randn(40, requires_grad=True)
    grad = images(9, 36, 8, 8)

    def gradients(name: str) -> tuple[Tensor, ...]:
        with use_backend(name):
            y = functional.conv2d(x, weight, bias, out_channels=36, padding=1, stride=2)
        return y, *torch.autograd.grad(y, (x, weight, bias), grad)

    for actual, expected in zip(gradients("native"), gradients("aten"), strict=True):
        assert error(actual, expected.double()) <= TOLERANCE
        assert actual.stride() == expected.stride()


def test_empty_batch() -> None:
    x, weight = images(0, 8, 5, 5), torch.randn(8, 8, 3, 3)
    assert native.conv2d_3x3_stride2(x, weight, None, 8).shape == (0, 8, 3, 3)
    gw = torch.zeros_like(weight)
    dx = native.conv2d_3x3_stride2_backward(images(0, 8, 3, 3), x, weight, gw, True)
    assert dx.shape == x.shape and not gw.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 16, 5, 5)}, "x: expected channels innermost"),
        ({"x": images(2, 16, 5, 5).double()}, "x: expected float32"),
        ({"weight": torch.randn(8, 8, 3, 3)}, "weight: expected float32 .>= 8, >= 16, 3, 3., got .8, 8, 3, 3."),
        ({"bias": torch.randn(7)}, "bias: expected a float32 vector of at least 8"),
        ({"grad": images(2, 8, 2, 3)}, "grad: expected the images of the output"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Case(**{**vars(Case.random(2, 16, 8, 5, 5, gap=0)), **change}).run()
