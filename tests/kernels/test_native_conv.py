"""The native 3x3 convolution against float64, and its own: accuracy, layouts, threads, instruction sets, the choice."""

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
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)
NAN, CANARY = float("nan"), 3.0
TOLERANCE = 5e-6  # largest error over largest value


def images(n: int, c: int, h: int, w: int, gap: int = 0) -> Tensor:
    """Random images, channels innermost; with a gap, the prefix slice of one with that many more channels."""
    full = torch.randn(n, h, w, c + gap)
    full[..., c:] = NAN
    return full.permute(0, 3, 1, 2)[:, :c]


def filters(out: int, channels: int, gap: int, channels_last: bool) -> Tensor:
    """A full weight that is NaN outside of its prefix [out, channels]."""
    full = torch.full((out + gap, channels + gap, 3, 3), NAN)
    full[:out, :channels] = torch.randn(out, channels, 3, 3) / (3 * channels**0.5)
    return full.contiguous(memory_format=torch.channels_last) if channels_last else full


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
        cls,
        n: int,
        c: int,
        k: int,
        h: int,
        w: int,
        *,
        gap: int = 2,
        channels_last: bool = True,
        bias: bool = False,
    ) -> Case:
        vector = torch.cat([torch.randn(k), torch.full((gap,), NAN)])
        return cls(
            images(n, c, h, w, gap),
            filters(k, c, gap, channels_last),
            vector if bias else None,
            images(n, k, h, w),
        )

    def run(
        self, need_grad_x: bool = True, need_grad_weight: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Forward and backward; the gradient of the weight is full, and was zero."""
        y = native.conv2d(self.x, self.weight, self.bias, self.grad.size(1), *GEOMETRY)
        gw = torch.zeros_like(self.weight)
        into = gw if need_grad_weight else None
        dx = native.conv2d_backward(self.grad, self.x, self.weight, into, None, need_grad_x, *GEOMETRY)
        return y, dx, gw

    def check(self) -> None:
        k, c = self.grad.size(1), self.x.size(1)
        x, weight = self.x.double().requires_grad_(), self.weight[:k, :c].double().requires_grad_()
        exact = F.conv2d(x, weight, None if self.bias is None else self.bias[:k].double(), padding=1)
        exact.backward(self.grad.double())
        y, dx, gw = self.run()
        assert dx is not None and x.grad is not None and weight.grad is not None
        assert error(y, exact.detach()) <= TOLERANCE
        assert error(dx, x.grad) <= TOLERANCE
        assert error(gw[:k, :c], weight.grad) <= TOLERANCE
        gw[:k, :c] = 0
        assert torch.equal(gw, torch.zeros_like(gw)), "written past the active channels"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "shape", [(1, 512, 512, 4, 4), (3, 512, 40, 9, 7), (3, 24, 512, 8, 8), (16, 40, 48, 32, 32)], ids=str
)
def test_accuracy(shape: tuple[int, ...], channels_last: bool) -> None:
    """512 channels in a sum, and (dW) more than 1000 tiles."""
    n, c, k, h, w = shape
    Case.random(n, c, k, h, w, channels_last=channels_last).check()


def test_accuracy_of_activations() -> None:
    """The inputs of a network are not centred: what comes out of a ReLU, and gradients that are zero where it was."""
    case = Case.random(4, 512, 128, 8, 8)
    case.x, case.grad = case.x.relu(), case.grad * (torch.rand_like(case.grad) < 0.5)
    case.check()


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 65, 72, 80, 127])
def test_every_tail_of_the_channels(channels: int) -> None:
    Case.random(2, channels, 9, 6, 7, bias=True).check()
    Case.random(2, 9, channels, 6, 7, bias=True).check()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    c=st.integers(1, 70),
    k=st.integers(1, 70),
    h=st.integers(1, 13),
    w=st.integers(1, 13),
    gap=st.integers(0, 5),
    channels_last=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 4),
)
def test_any_shape(
    n: int, c: int, k: int, h: int, w: int, gap: int, channels_last: bool, bias: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    Case.random(n, c, k, h, w, gap=gap, channels_last=channels_last, bias=bias).check()


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "shape",
    [(7, 24, 40, 16, 16), (9, 200, 208, 4, 4), (1, 32, 32, 12, 12)],
    ids=["blocks", "positions", "one image"],
)
def test_threads(shape: tuple[int, ...], threads: int) -> None:
    """Right with any number of threads, also more than images, and the same bits each time."""
    torch.set_num_threads(threads)
    n, c, k, h, w = shape
    case = Case.random(n, c, k, h, w)
    case.check()
    for first, second in zip(case.run(), case.run(), strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


def test_the_gradients_do_not_depend_on_each_other() -> None:
    """dX and dW share the transformed gradient; either may be asked for alone."""
    for shape in ((3, 24, 40, 9, 9), (9, 200, 208, 4, 4)):
        case = Case.random(*shape)
        _, dx, gw = case.run()
        _, dx_alone, untouched = case.run(need_grad_weight=False)
        _, nothing, gw_alone = case.run(need_grad_x=False)
        assert nothing is None and torch.equal(untouched, torch.zeros_like(untouched))
        assert torch.equal(dx, dx_alone) and torch.equal(gw, gw_alone)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_adds_to_the_slice_and_writes_nothing_else(channels_last: bool) -> None:
    case = Case.random(3, 20, 36, 7, 6, channels_last=channels_last, bias=True)
    inputs = [case.x, case.weight, case.bias, case.grad]
    before = [t.clone() for t in inputs if t is not None]
    _, _, fresh = case.run()
    gw, gb = torch.full_like(case.weight, CANARY), torch.full((38,), CANARY)
    native.conv2d_backward(case.grad, case.x, case.weight, gw, gb, False, *GEOMETRY)
    torch.testing.assert_close(gw - CANARY, fresh, rtol=0, atol=1e-5)
    torch.testing.assert_close(gb[:36], CANARY + case.grad.sum((0, 2, 3)))
    gw[:36, :20] = CANARY
    assert torch.equal(gw, torch.full_like(gw, CANARY)) and torch.equal(gb[36:], torch.full((2,), CANARY))
    for old, new in zip(before, [t for t in inputs if t is not None], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_gradients_of_other_layouts() -> None:
    """The upstream gradient may lie in any way; that of a mean is expanded."""
    case = Case.random(3, 24, 16, 6, 6)
    case.grad = case.grad.contiguous()
    case.check()
    case.grad = case.grad[:, :, :1, :1].expand(3, 16, 6, 6)
    case.check()


def test_x_of_other_strides() -> None:
    """Channels innermost is all that is asked for: every other row and image of a larger tensor, a transposed one."""
    case = Case.random(2, 24, 16, 5, 6)
    case.x = images(4, 24, 10, 6)[::2, :, ::2]
    case.check()
    case.x = images(2, 24, 6, 5).transpose(2, 3)
    case.check()


def test_scratch_memory_of_another_call_does_not_leak_in() -> None:
    """Working memory is kept between calls; what an earlier one left there, NaN even, must not be seen."""
    small, large = Case.random(2, 9, 11, 5, 5), Case.random(4, 70, 50, 12, 12)
    expected = small.run()
    large.x = torch.full_like(large.x, NAN)
    large.run()
    for first, second in zip(expected, small.run(), strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


def test_through_autograd() -> None:
    """Full-size parameters, a prefix of the channels, the whole way from functional to the gradients."""
    x = images(3, 24, 9, 9).requires_grad_()
    weight, bias = torch.randn(40, 32, 3, 3, requires_grad=True), torch.randn(40, requires_grad=True)
    grad = images(3, 36, 9, 9)

    def gradients(name: str) -> tuple[Tensor, ...]:
        with use_backend(name):
            y = functional.conv2d(x, weight, bias, out_channels=36, padding=1)
        return y, *torch.autograd.grad(y, (x, weight, bias), grad)

    for actual, expected in zip(gradients("native"), gradients("aten"), strict=True):
        assert error(actual, expected.double()) <= TOLERANCE
        assert actual.stride() == expected.stride()


def test_empty_batch() -> None:
    x, weight = torch.zeros(0, 8, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(8, 8, 3, 3)
    assert native.conv2d(x, weight, None, 8, *GEOMETRY).shape == (0, 8, 5, 5)
    gw = torch.zeros_like(weight)
    dx = native.conv2d_backward(torch.zeros(0, 8, 5, 5), x, weight, gw, None, True, *GEOMETRY)
    assert dx is not None and dx.shape == x.shape and not gw.any()


@pytest.mark.parametrize(
    "x, reason", [(torch.randn(2, 16, 9, 9), "channels_last"), (images(2, 16, 9, 9).double(), "float64")]
)
def test_says_what_it_cannot_run(x: Tensor, reason: str) -> None:
    weight = torch.randn(16, 16, 3, 3, dtype=x.dtype)
    functional.conv2d(x, weight, padding=1)
    with use_backend("native"), pytest.raises(BackendError, match=reason):
        functional.conv2d(x, weight, padding=1)


@pytest.mark.parametrize(
    "shape, chosen",
    [
        ((2, 64, 64, 32, 32), "native"),
        ((2, 8, 8, 9, 9), "native"),
        ((64, 256, 256, 4, 4), "native"),
        ((8, 3, 64, 32, 32), "native"),  # runs of few channels
        ((8, 6, 64, 32, 32), "aten"),
        ((1, 256, 256, 8, 8), "aten"),  # few tiles for many filters
    ],
)
def test_the_automatic_choice_is_the_faster(shape: tuple[int, ...], chosen: str) -> None:
    n, c, k, h, w = shape
    x, weight = images(n, c, h, w), torch.empty(k, c, 3, 3)
    arguments = {"out_channels": k, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    assert native.can_run("conv2d", x, weight, **arguments)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert choose("conv2d", x, weight, **arguments) == chosen
    with use_backend("native"):
        assert choose("conv2d", x, weight, **arguments) == "native"


def test_slower_shapes_run_when_asked_for() -> None:
    x, weight = images(1, 3, 5, 5), torch.randn(70, 3, 3, 3)
    with use_backend("native"):
        y = functional.conv2d(x, weight, padding=1)
    assert error(y, F.conv2d(x.double(), weight.double(), padding=1)) <= TOLERANCE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 16, 5, 5)}, "x: expected channels innermost"),
        ({"x": images(2, 16, 5, 5).double()}, "x: expected float32"),
        (
            {"weight": torch.randn(8, 8, 3, 3)},
            "weight: expected float32 .>= 8, >= 16, 3, 3., got .8, 8, 3, 3.",
        ),
        ({"bias": torch.randn(7)}, "bias: expected a float32 vector of at least 8"),
        ({"grad": images(2, 8, 4, 5)}, "grad: expected the images of x"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    good = {
        "x": images(2, 16, 5, 5),
        "weight": torch.randn(8, 16, 3, 3),
        "bias": None,
        "grad": images(2, 8, 5, 5),
    }
    with pytest.raises(RuntimeError, match=message):
        Case(**{**good, **change}).run()  # type: ignore[arg-type]
