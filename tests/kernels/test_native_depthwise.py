"""The native depthwise convolution against float64, and its own: geometries, layouts, threads, instruction sets."""

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
FLOAT, BF16 = torch.float32, torch.bfloat16
ROUNDING = {FLOAT: 1e-6, BF16: 2**-8}  # largest error over largest value: of the sums, of storing a result


def images(n: int, c: int, h: int, w: int, gap: int = 0, dtype: torch.dtype = FLOAT) -> Tensor:
    """Random images, channels innermost; with a gap, the prefix slice of one with that many more channels."""
    full = torch.randn(n, h, w, c + gap).to(dtype)
    full[..., c:] = NAN
    return full.permute(0, 3, 1, 2)[:, :c]


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


@dataclass
class Case:
    """The inputs of both directions; weight and bias are full, with NaN past the active channels."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def random(
        cls,
        n: int,
        c: int,
        h: int,
        w: int,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        *,
        gap: int = 2,
        bias: bool = False,
        taps_innermost: bool = True,
        dtype: torch.dtype = FLOAT,
    ) -> Case:
        weight = torch.full((c + gap, 1, *kernel), NAN)
        weight[:c] = torch.randn(c, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5
        if not taps_innermost:
            weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        size = [
            (side + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d, side in enumerate((h, w))
        ]
        return cls(
            images(n, c, h, w, gap, dtype),
            weight,
            torch.cat([torch.randn(c), torch.full((gap,), NAN)]) if bias else None,
            images(n, c, *size, dtype=dtype),
            stride,
            padding,
            dilation,
        )

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.weight.size(0)

    def run(
        self, need_grad_x: bool = True, need_grad_weight: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Forward and backward; the gradient of the weight is full, and was zero."""
        y = native.conv2d(self.x, self.weight, self.bias, self.x.size(1), *self.geometry)
        gw = torch.zeros_like(self.weight)
        into = gw if need_grad_weight else None
        dx = native.conv2d_backward(self.grad, self.x, self.weight, into, None, need_grad_x, *self.geometry)
        return y, dx, gw

    def check(self, threads: int = 1) -> None:
        c = self.x.size(1)
        torch.set_num_threads(1)  # for the reference: waiting threads are what takes time here
        x, weight = self.x.double().requires_grad_(), self.weight[:c].double().requires_grad_()
        bias = None if self.bias is None else self.bias[:c].double()
        exact = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, c)
        exact.backward(self.grad.double())
        # What was added up: few terms may cancel, and leave little beside the rounding of each.
        x_terms, weight_terms = x.detach().abs().requires_grad_(), weight.detach().abs().requires_grad_()
        terms = F.conv2d(x_terms, weight_terms, None, self.stride, self.padding, self.dilation, c)
        terms.backward(self.grad.double().abs())
        torch.set_num_threads(threads)
        y, dx, gw = self.run()
        assert dx is not None and x.grad is not None and weight.grad is not None
        assert y.dtype == dx.dtype == self.x.dtype
        assert x_terms.grad is not None and weight_terms.grad is not None
        for actual, wanted, added in (
            (y, exact, terms), (dx, x.grad, x_terms.grad), (gw[:c], weight.grad, weight_terms.grad)
        ):  # fmt: skip
            allowed = ROUNDING[actual.dtype] * wanted.abs().max() + 2**-23 * added.abs().max()
            assert actual.shape == wanted.shape and ((actual.double() - wanted).abs().max() <= allowed)
        assert not gw[c:].any(), "written past the active channels"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", [1, 2, 7, 14, 33])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_the_kernels_of_mobile_networks(kernel: int, stride: int, side: int, dtype: torch.dtype) -> None:
    pair = (kernel // 2, kernel // 2)
    for channels in (24, 40):
        Case.random(2, channels, side, side, (kernel, kernel), (stride, stride), pair, dtype=dtype).check()


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 65])
def test_every_tail_of_the_channels(channels: int) -> None:
    for dtype in (FLOAT, BF16):
        Case.random(2, channels, 6, 9, bias=True, dtype=dtype).check()
        Case.random(2, channels, 6, 9, stride=(2, 2), taps_innermost=False, dtype=dtype).check()


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 40),
    h=st.integers(1, 19),
    w=st.integers(1, 19),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=pairs,
    padding=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    dilation=pairs,
    gap=st.integers(0, 5),
    bias=st.booleans(),
    taps_innermost=st.booleans(),
    threads=st.integers(1, 4),
)
def test_any_geometry(
    n: int,
    c: int,
    h: int,
    w: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    gap: int,
    bias: bool,
    taps_innermost: bool,
    threads: int,
) -> None:
    reach = [dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d] for d in (0, 1)]
    h, w = max(h, reach[0]), max(w, reach[1])
    Case.random(
        n, c, h, w, kernel, stride, padding, dilation, gap=gap, bias=bias, taps_innermost=taps_innermost
    ).check(threads)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_threads(threads: int) -> None:
    """Right with any number of threads, also more than images or rows, and the same bits each time."""
    for case in (Case.random(3, 100, 13, 17, stride=(2, 2)), Case.random(1, 4000, 3, 3)):
        case.check(threads)
        for first, second in zip(case.run(), case.run(), strict=True):
            assert torch.equal(first, second)  # type: ignore[arg-type]


def test_long_sums() -> None:
    """The gradient of a filter is a sum over all pixels, here of one sign: float32 alone would lose digits."""
    case = Case.random(8, 16, 128, 128)
    case.x, case.grad = case.x.abs(), case.grad.abs()
    case.check()


def test_the_gradients_do_not_depend_on_each_other() -> None:
    for stride in ((1, 1), (2, 2)):
        case = Case.random(3, 40, 9, 9, stride=stride)
        _, dx, gw = case.run()
        _, dx_alone, untouched = case.run(need_grad_weight=False)
        _, nothing, gw_alone = case.run(need_grad_x=False)
        assert nothing is None and not untouched.any()
        assert torch.equal(dx, dx_alone) and torch.equal(gw, gw_alone)  # type: ignore[arg-type]


def test_inputs_that_no_output_reads() -> None:
    """Stride 3 under a 1x1 filter, and a last row and column that are never reached: their gradient is zero."""
    case = Case.random(2, 20, 8, 9, (1, 1), (3, 3), (0, 0))
    case.check()
    _, dx, _ = case.run()
    assert dx is not None and not dx[:, :, 1::3].any() and not dx[..., 2::3].any()


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("taps_innermost", [True, False])
def test_adds_to_the_slice_and_writes_nothing_else(taps_innermost: bool, dtype: torch.dtype) -> None:
    case = Case.random(3, 36, 7, 6, bias=True, taps_innermost=taps_innermost, dtype=dtype)
    inputs = [case.x, case.weight, case.bias, case.grad]
    before = [t.clone() for t in inputs if t is not None]
    _, _, fresh = case.run()
    gw, gb = torch.full_like(case.weight, CANARY), torch.full((38,), CANARY)
    native.conv2d_backward(case.grad, case.x, case.weight, gw, gb, False, *case.geometry)
    torch.testing.assert_close(gw - CANARY, fresh, rtol=0, atol=1e-5)
    torch.testing.assert_close(gb[:36], (CANARY + case.grad.double().sum((0, 2, 3))).float())
    gw[:36] = CANARY
    assert torch.equal(gw, torch.full_like(gw, CANARY)) and torch.equal(gb[36:], torch.full((2,), CANARY))
    for old, new in zip(before, [t for t in inputs if t is not None], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_other_layouts() -> None:
    """The upstream gradient may lie in any way, expanded even; of x only the channels must be innermost."""
    case = Case.random(3, 24, 6, 6)
    case.grad = case.grad.contiguous()
    case.check()
    case.grad = case.grad[:, :, :1, :1].expand(3, 24, 6, 6)
    case.check()
    case = Case.random(2, 24, 5, 6)
    case.x = images(4, 24, 10, 6)[::2, :, ::2]
    case.check()
    case.x = images(2, 24, 6, 5).transpose(2, 3)
    case.check()
    case.x = torch.randn(2, 1, 1, 1).expand(2, 1, 5, 6)
    case.grad = case.grad[:, :1]
    case.check()


def test_nothing_outside_of_the_images_is_read() -> None:
    """An image in the midst of a larger one that is NaN; what is padding must come from nowhere."""
    for kernel, padding in (((3, 3), (1, 1)), ((5, 5), (2, 2)), ((7, 2), (3, 1))):
        case = Case.random(2, 20, 6, 6, kernel, padding=padding)
        around = torch.full((2, 12, 12, 32), NAN).permute(0, 3, 1, 2)
        around[:, 6:26, 3:9, 3:9] = case.x
        case.x = around[:, 6:26, 3:9, 3:9]
        case.check()


def test_scratch_memory_of_another_call_does_not_leak_in() -> None:
    small, large = Case.random(2, 19, 5, 5), Case.random(4, 70, 12, 12, (5, 5))
    expected = small.run()
    large.x, large.weight = torch.full_like(large.x, NAN), torch.full_like(large.weight, NAN)
    large.run()
    for first, second in zip(expected, small.run(), strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bfloat16"])
def test_through_autograd(dtype: torch.dtype) -> None:
    """Full-size parameters, a prefix of the channels, the whole way from functional to the gradients."""
    x = images(3, 24, 9, 9, dtype=dtype).requires_grad_()
    weight, bias = torch.randn(40, 1, 3, 3, requires_grad=True), torch.randn(40, requires_grad=True)
    grad = images(3, 24, 5, 5, dtype=dtype)

    def gradients(name: str) -> tuple[Tensor, ...]:
        with use_backend(name):
            y = functional.conv2d(x, weight, bias, stride=2, padding=1, groups=40)
        return y, *torch.autograd.grad(y, (x, weight, bias), grad)

    for actual, expected in zip(gradients("native"), gradients("aten"), strict=True):
        assert error(actual, expected.double()) <= 4 * ROUNDING[dtype]
        assert actual.stride() == expected.stride() and actual.dtype == expected.dtype


def test_empty_batch() -> None:
    case = Case.random(0, 8, 5, 5)
    y, dx, gw = case.run()
    assert y.shape == (0, 8, 5, 5) and dx is not None and dx.shape == case.x.shape and not gw.any()


def test_the_automatic_choice() -> None:
    x, weight = images(2, 24, 9, 9), torch.randn(40, 1, 3, 3)
    arguments = {"out_channels": 24, "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 40}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert choose("conv2d", x, weight, **arguments) == "native"
    assert choose("conv2d", x.contiguous(), weight, **arguments) == "aten"
    assert choose("conv2d", x.double(), weight.double(), **arguments) == "aten"


@pytest.mark.parametrize(
    "x, groups, reason",
    [
        (torch.randn(2, 16, 9, 9), 16, "channels_last"),
        (images(2, 16, 9, 9).half(), 16, "float16"),
    ],
)
def test_says_what_it_cannot_run(x: Tensor, groups: int, reason: str) -> None:
    weight = torch.randn(16, 16 // groups, 3, 3)
    with use_backend("native"), pytest.raises(BackendError, match=reason):
        functional.conv2d(x, weight, padding=1, groups=groups)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 16, 5, 5)}, "x: expected channels innermost"),
        ({"x": images(2, 16, 5, 5).double()}, "x: expected float32 or bfloat16"),
        ({"weight": torch.randn(15, 1, 3, 3)}, "weight: expected float32 .>= 16, 1, kh, kw., got .15, 1, 3, 3."),
        ({"weight": torch.randn(16, 2, 3, 3)}, "weight: expected"),
        ({"bias": torch.randn(7)}, "bias: expected a contiguous float32 vector of at least 16"),
        ({"grad": images(2, 16, 4, 5)}, "grad: expected .2, 16, 5, 5., got .2, 16, 4, 5."),
        ({"grad": images(2, 16, 5, 5).double()}, "grad: expected the dtype of x"),
        ({"stride": (0, 1)}, "stride, padding, dilation: expected at least 1, 0 and 1, got 0"),
        ({"padding": (0, 0), "dilation": (3, 1)}, "x: expected at least the pixels that the filter covers"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    good = vars(Case.random(2, 16, 5, 5, gap=0))
    x, weight, bias, grad, *geometry = {**good, **change}.values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.us3l_native.depthwise_conv2d(x, weight, bias, *geometry)
        torch.ops.us3l_native.depthwise_conv2d_backward(grad, x, weight, None, True, *geometry)
