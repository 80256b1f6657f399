"""The native convolutions that are matrix products: any geometry against float64, layouts, threads, ISAs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from us3l_kernels import _native, functional
from us3l_kernels import backend as use_backend
from us3l_kernels.backends import BACKENDS, choose

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native = torch.ops.us3l_native
NAN, CANARY = float("nan"), 3.0
TOLERANCE = 2e-6  # largest error over largest value


def images(n: int, c: int, h: int, w: int, gap: int = 0) -> Tensor:
    """Random images, channels innermost; with a gap, the prefix slice of one with that many more channels."""
    full = torch.randn(n, h, w, c + gap)
    full[..., c:] = NAN
    return full.permute(0, 3, 1, 2)[:, :c]


def error(actual: Tensor, exact: Tensor, terms: Tensor | None = None) -> float:
    """The largest error over the largest value, or over an eighth of the largest sum of the terms' absolute values,
    where these cancel."""
    assert actual.shape == exact.shape
    scale = exact.abs().max() if terms is None else torch.maximum(exact.abs().max(), terms.max() / 8)
    return ((actual.double() - exact).abs().max() / scale.clamp_min(1e-30)).item()


@dataclass
class Case:
    """The inputs of both directions; the parameters have NaN past the active channels."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: int
    geometry: tuple[list[int], list[int], list[int]]
    groups: int = 1  # of the full weight

    @classmethod
    def random(
        cls,
        n: int,
        c: int,
        k: int,
        size: tuple[int, int],
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        *,
        groups: int = 1,
        gap: int = 2,
        channels_last: bool = True,
        bias: bool = True,
    ) -> Case:
        """c and k: active channels, of all `groups` groups; the full weight has `gap` channels (or groups) more."""
        per_group = c // groups
        if groups == 1:
            weight = torch.full((k + gap, c + gap, *kernel), NAN)
        else:
            weight = torch.full(((groups + gap) * (k // groups), per_group, *kernel), NAN)
        weight[:k, :per_group] = torch.randn(k, per_group, *kernel) / (per_group * kernel[0] * kernel[1]) ** 0.5
        vector = torch.full(weight.shape[:1], NAN)
        vector[:k] = torch.randn(k)
        return cls(
            images(n, c, *size, gap),
            weight.contiguous(memory_format=torch.channels_last) if channels_last else weight,
            vector if bias else None,
            k,
            (list(stride), list(padding), list(dilation)),
            1 if groups == 1 else groups + gap,
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.geometry, self.groups)

    def forward(self) -> Tensor:
        y: Tensor = native.conv2d(self.x, self.weight, self.bias, self.out, *self.arguments)
        return y

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gw, gb = torch.zeros_like(self.weight), torch.zeros(self.weight.size(0))
        dx = native.conv2d_backward(grad, self.x, self.weight, gw, gb, True, *self.arguments)
        return dx, gw, gb

    def check(self, tolerance: float = TOLERANCE) -> None:
        per_group = self.x.size(1) if self.groups == 1 else self.weight.size(1)
        x = self.x.double().requires_grad_()
        weight = self.weight[: self.out, :per_group].double().requires_grad_()
        bias = None if self.bias is None else self.bias[: self.out].double()
        groups = self.x.size(1) // per_group
        exact = F.conv2d(x, weight, bias, *self.geometry, groups)
        x_terms, weight_terms = (t.detach().abs().requires_grad_() for t in (x, weight))
        terms = F.conv2d(x_terms, weight_terms, None, *self.geometry, groups)
        y = self.forward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, exact.detach(), terms.detach()) <= tolerance
        grad = images(*exact.shape)
        exact.backward(grad.double())
        terms.backward(grad.double().abs())
        assert x.grad is not None and weight.grad is not None
        dx, gw, gb = self.backward(grad)
        assert error(dx, x.grad, x_terms.grad) <= tolerance
        assert error(gw[: self.out, :per_group], weight.grad, weight_terms.grad) <= tolerance
        summed = grad.double().abs().sum((0, 2, 3))
        assert error(gb[: self.out], grad.double().sum((0, 2, 3)), summed) <= tolerance
        gw[: self.out, :per_group] = 0
        gb[: self.out] = 0
        assert not gw.any() and not gb.any(), "written past the active channels"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


STRIDED = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3/2": STRIDED,
    "1x1": {"kernel": (1, 1)},
    "1x1/2": {"kernel": (1, 1), "stride": (2, 2)},
    "1x1 padded": {"kernel": (1, 1), "padding": (1, 0)},
    "7x7/2": {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "1x5": {"kernel": (1, 5), "padding": (0, 2)},
    "5x1/3": {"kernel": (5, 1), "stride": (3, 1), "padding": (2, 0)},
    "asymmetric": {"kernel": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
    "dilated": {"kernel": (3, 3), "padding": (2, 2), "dilation": (2, 2)},
    "dilated/2": {"kernel": (3, 3), "stride": (2, 2), "padding": (2, 2), "dilation": (2, 2)},
    "2x2/2": {"kernel": (2, 2), "stride": (2, 2)},
    "gaps": {"kernel": (2, 2), "stride": (3, 4)},
    "padding wider than the kernel": {"kernel": (2, 2), "padding": (3, 4)},
}


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(geometry: dict[str, Any], channels_last: bool) -> None:
    Case.random(2, 24, 40, (9, 8), **geometry, channels_last=channels_last).check()
    Case.random(3, 3, 7, (8, 11), **geometry, channels_last=channels_last, gap=0, bias=False).check()


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 65, 127])
@pytest.mark.parametrize("geometry", ["3x3/2", "1x1"])
def test_every_tail_of_the_channels(channels: int, geometry: str) -> None:
    Case.random(2, channels, 9, (6, 7), **GEOMETRIES[geometry]).check()
    Case.random(2, 9, channels, (6, 7), **GEOMETRIES[geometry]).check()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("geometry", ["1x1", "1x1 padded"])  # in place, and gathered
@pytest.mark.parametrize("c, k", [(8, 8), (8, 48), (48, 8), (12, 36), (40, 24), (24, 144), (72, 264), (28, 512)])
def test_tails_of_half_a_vector(c: int, k: int, geometry: str, threads: int) -> None:
    """Results are written where they belong up to the half vector, and the filters' gradients may be summed turned."""
    torch.set_num_threads(threads)
    Case.random(3, c, k, (9, 11), **GEOMETRIES[geometry]).check()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [8, 24, 64])
@pytest.mark.parametrize("c, gap", [(1, 0), (2, 3), (3, 0), (3, 1), (4, 0)])
@pytest.mark.parametrize("geometry", ["3x3", "7x7/2", "1x5", "asymmetric", "rows dilated", "gaps", "wide padding"])
def test_images_of_few_channels(c: int, gap: int, k: int, geometry: str, threads: int) -> None:
    """Their samples are read as runs of neighbouring pixels: whole ones, within the zeros around and across them."""
    torch.set_num_threads(threads)
    geometries = GEOMETRIES | {
        "3x3": {"kernel": (3, 3), "padding": (1, 1)},
        "asymmetric": {"kernel": (3, 2), "stride": (1, 3), "padding": (2, 0)},
        "rows dilated": {"kernel": (3, 3), "stride": (2, 1), "padding": (3, 1), "dilation": (2, 1)},
        "wide padding": {"kernel": (2, 2), "padding": (3, 4)},
    }
    Case.random(2, c, k, (9, 11), **geometries[geometry], gap=gap).check()
    Case.random(1, c, k, (4, 150), **geometries[geometry], gap=gap, channels_last=False, bias=False).check()


@pytest.mark.parametrize(
    "shape, geometry",
    [
        ((9, 512, 48, (7, 7)), "3x3/2"),
        ((2, 48, 512, (8, 8)), "3x3/2"),
        ((16, 32, 48, (32, 32)), "3x3/2"),
        ((1, 2048, 64, (7, 7)), "1x1"),
        ((2, 3, 64, (40, 40)), "7x7/2"),
        ((1, 700, 720, (3, 3)), "1x1"),
        ((2, 16, 32, (56, 56)), "1x1"),
    ],
    ids=str,
)
def test_accuracy_of_long_sums(shape: tuple[Any, ...], geometry: str) -> None:
    Case.random(*shape, **GEOMETRIES[geometry]).check(3e-6)


@pytest.mark.parametrize("groups, c, k", [(2, 16, 32), (3, 9, 6), (5, 5, 10), (2, 34, 46)])
@pytest.mark.parametrize("geometry", ["3x3/2", "1x1"])
def test_groups(groups: int, c: int, k: int, geometry: str) -> None:
    Case.random(2, c, k, (7, 6), **GEOMETRIES[geometry], groups=groups).check()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3)
    height, width = (max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) for d in (0, 1))
    more = pair(0, 9)
    c, k = pair(1, 40)
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    Case.random(
        data.draw(st.integers(1, 4)),
        c,
        k,
        (height + more[0], width + more[1]),
        kernel,
        stride,
        padding,
        dilation,
        gap=data.draw(st.integers(0, 3)),
        channels_last=data.draw(st.booleans()),
    ).check()


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "shape, geometry",
    [
        ((7, 24, 40, (16, 16)), "3x3/2"),
        ((1, 128, 272, (4, 4)), "3x3/2"),
        ((2, 300, 330, (5, 5)), "1x1"),
        ((5, 3, 16, (9, 9)), "3x3/2"),
    ],
    ids=["points", "channels", "tiles", "few channels"],
)
def test_threads(shape: tuple[Any, ...], geometry: str, threads: int) -> None:
    """Right with any number of threads, and the same bits each time."""
    torch.set_num_threads(threads)
    case = Case.random(*shape, **GEOMETRIES[geometry])
    case.check()
    grad = images(*case.forward().shape)
    assert torch.equal(case.forward(), case.forward())
    for first, second in zip(case.backward(grad), case.backward(grad), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("c, k, geometry", [(20, 36, "3x3/2"), (20, 36, "1x1"), (3, 40, "3x3/2")])
def test_adds_to_the_slice_and_writes_nothing_else(c: int, k: int, geometry: str, channels_last: bool) -> None:
    case = Case.random(3, c, k, (7, 6), **GEOMETRIES[geometry], channels_last=channels_last)
    grad = images(*case.forward().shape)
    inputs = [case.x, case.weight, case.bias, grad]
    before = [t.clone() for t in inputs if t is not None]
    dx, fresh, fresh_bias = case.backward(grad)
    gw, gb = torch.full_like(case.weight, CANARY), torch.full((k + 2,), CANARY)
    native.conv2d_backward(grad, case.x, case.weight, gw, None, False, *case.arguments)
    untouched = gw.clone()
    alone = native.conv2d_backward(grad, case.x, case.weight, None, gb, True, *case.arguments)
    assert torch.equal(alone, dx) and torch.equal(gw, untouched)
    torch.testing.assert_close(gw - CANARY, fresh, rtol=0, atol=1e-5)
    torch.testing.assert_close(gb - CANARY, fresh_bias, rtol=0, atol=1e-5)
    gw[:k, :c] = CANARY
    gb[k:] -= CANARY
    assert torch.equal(gw, torch.full_like(gw, CANARY)) and not gb[k:].any()
    for old, new in zip(before, [t for t in inputs if t is not None], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("geometry", ["3x3/2", "1x1", "1x1/2"])
def test_tensors_of_other_strides(geometry: str) -> None:
    """x: every other row and image of a larger tensor, a transposed one. grad: any layout, expanded."""
    case = Case.random(2, 24, 16, (5, 6), **GEOMETRIES[geometry])
    case.x = images(4, 24, 10, 6)[::2, :, ::2]
    case.check()
    case.x = images(2, 24, 6, 5).transpose(2, 3)
    case.check()
    grad = images(*case.forward().shape)
    for first, second in zip(case.backward(grad), case.backward(grad.contiguous()), strict=True):
        assert torch.equal(first, second)
    wider = images(*grad.shape, 3)
    for first, second in zip(case.backward(wider), case.backward(wider.contiguous()), strict=True):
        assert torch.equal(first, second)
    constant = grad[:, :, :1, :1].expand_as(grad)
    for first, second in zip(case.backward(constant), case.backward(constant.contiguous()), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)], ids=str)
def test_strides_of_dimensions_of_size_1_say_nothing(size: tuple[int, int]) -> None:
    case = Case.random(8, 24, 16, size, **STRIDED)
    grad = images(*case.forward().shape)
    expected = case.backward(grad)
    strides = [1 if n == 1 else s for n, s in zip(grad.shape, grad.stride(), strict=True)]
    for first, second in zip(expected, case.backward(grad.as_strided(grad.shape, strides)), strict=True):
        assert torch.equal(first, second)
    y = case.forward()
    strides = [1 if n == 1 else s for n, s in zip(case.x.shape, case.x.stride(), strict=True)]
    case.x = case.x.as_strided(case.x.shape, strides)
    assert torch.equal(case.forward(), y)
    for first, second in zip(expected, case.backward(grad), strict=True):
        assert torch.equal(first, second)


def test_scratch_memory_of_another_call_does_not_leak_in() -> None:
    """Working memory is kept between calls; what an earlier one left there, NaN even, must not be seen."""
    small, large = Case.random(2, 9, 11, (5, 5), **STRIDED), Case.random(4, 70, 50, (12, 12), **STRIDED)
    grad = images(*small.forward().shape)
    expected = small.forward(), *small.backward(grad)
    large.x = torch.full_like(large.x, NAN)
    large.backward(torch.full_like(large.forward(), NAN))
    for first, second in zip(expected, (small.forward(), *small.backward(grad)), strict=True):
        assert torch.equal(first, second)


def test_through_autograd() -> None:
    x = images(3, 24, 9, 9).requires_grad_()
    weight, bias = torch.randn(40, 32, 3, 3, requires_grad=True), torch.randn(40, requires_grad=True)
    grad = images(3, 36, 5, 5)

    def gradients(name: str) -> tuple[Tensor, ...]:
        with use_backend(name):
            y = functional.conv2d(x, weight, bias, out_channels=36, padding=1, stride=2)
        return y, *torch.autograd.grad(y, (x, weight, bias), grad)

    for actual, expected in zip(gradients("native"), gradients("aten"), strict=True):
        assert error(actual, expected.double()) <= TOLERANCE
        assert actual.stride() == expected.stride()


def test_nothing_to_compute() -> None:
    """An empty batch; pixels of x that no tap reaches."""
    x, weight = images(0, 8, 5, 5), torch.randn(8, 8, 3, 3)
    geometry = ([2, 2], [1, 1], [1, 1], 1)
    assert native.conv2d(x, weight, None, 8, *geometry).shape == (0, 8, 3, 3)
    gw = torch.zeros_like(weight)
    dx = native.conv2d_backward(images(0, 8, 3, 3), x, weight, gw, None, True, *geometry)
    assert dx.shape == x.shape and not gw.any()
    dx = native.conv2d_backward(
        images(2, 16, 2, 2), images(2, 8, 5, 5), torch.randn(16, 8, 1, 1), None, None, True, [3, 4], [0, 0], [1, 1], 1
    )
    dx[:, :, ::3, ::4] = 0
    assert not dx.any()


@pytest.mark.parametrize(
    "x, kernel, groups, chosen",
    [
        (images(2, 64, 32, 32), 3, 1, "native"),
        (images(2, 64, 32, 32), 1, 1, "native"),
        (images(2, 3, 32, 32), 3, 1, "native"),  # runs of few channels
        (images(2, 6, 32, 32), 3, 1, "aten"),
        (images(2, 8, 32, 32), 1, 1, "native"),  # half a vector of them
        (images(2, 12, 32, 32), 1, 1, "aten"),
        (images(2, 64, 8, 8), 3, 16, "aten"),  # four to a group
    ],
)
def test_the_automatic_choice_is_the_faster(x: Tensor, kernel: int, groups: int, chosen: str) -> None:
    weight = torch.empty(64, x.size(1) // groups, kernel, kernel)
    arguments = {"out_channels": 64, "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": groups}
    assert BACKENDS["native"].can_run("conv2d", x, weight, **arguments)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert choose("conv2d", x, weight, **arguments) == chosen
    with use_backend("native"):
        assert choose("conv2d", x, weight, **arguments) == "native"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 16, 5, 5)}, "x: expected channels innermost"),
        ({"x": images(2, 16, 5, 5).double()}, "x: expected float32"),
        ({"weight": torch.randn(7, 16, 3, 3)}, "weight: expected float32 .>= 8, C, kh, kw., got .7, 16, 3, 3."),
        ({"weight": torch.randn(8, 15, 3, 3)}, "weight: expected at least 16 channels"),
        ({"weight": torch.randn(8, 5, 3, 3), "groups": 4}, "expected the channels of whole groups"),
        ({"bias": torch.randn(7)}, "bias: expected a float32 vector of at least 8"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    case = Case.random(2, 16, 8, (5, 5), **STRIDED, gap=0)
    with pytest.raises(RuntimeError, match=message):
        Case(**{**vars(case), **change}).forward()


def test_bad_gradient() -> None:
    with pytest.raises(RuntimeError, match="grad: expected the images of the output"):
        Case.random(2, 16, 8, (5, 5), **STRIDED).backward(images(2, 8, 5, 5))
