"""Backend `cuda` on the CPU (see conftest.py): the tests of the operations, and what is special to its kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import test_ops
from us3l_kernels import backends, functional
from us3l_kernels.backends import BACKENDS, BackendError, backend, cuda, native

HALVES = (torch.float32, torch.bfloat16, torch.float16)


class HostBackend(cuda.CudaBackend):
    name = "cuda on host"
    device = "cpu"

    def unavailable(self) -> str | None:
        return None


@pytest.fixture(autouse=True)
def on_host(cuda_host, monkeypatch):
    """The backend takes tensors of the CPU, and has the kernels compiled for it."""
    monkeypatch.setattr(native, "native", cuda_host.ops)
    monkeypatch.setitem(BACKENDS, HostBackend.name, HostBackend())
    with backend(f"conv2d={HostBackend.name},batch_norm={HostBackend.name}"):
        yield


# ---------------------------------------------------------------------------------------------- batch norm


def orders(*seeds: int):
    return pytest.mark.parametrize("order", seeds)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "views,shape,activation,fused",
    [
        (1, (4, 5, 3, 7), None, False),
        (1, (5, 16, 6, 3), "relu6", True),
        (2, (6, 8, 4, 4), "relu", True),
        (2, (4, 33, 1, 5), None, True),
        (3, (9, 17), "relu", False),
        (2, (4, 40, 9, 7), "relu", False),
        (2, (4, 136, 3, 3), "relu6", False),
        (1, (2, 1, 3, 3), "relu", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_batch_norm(layout, activation, fused, views, shape, training, dtype):
    test_ops.test_batch_norm(HostBackend.name, layout, activation, fused, views, shape, training, dtype)


def test_batch_norm_writes_only_the_slice():
    test_ops.test_batch_norm_backward_writes_only_the_slice(HostBackend.name)


def norm_arguments(x: Tensor, **changes):
    c = x.size(1)
    weight, bias, mean, var = torch.rand(c + 3), torch.rand(c + 3), torch.zeros(c + 3), torch.ones(c + 3)
    return {"x": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var, **changes}


def many_rows(c: int, dtype: torch.dtype = torch.float32, images: int = 12) -> Tensor:
    """More rows than one block has, not a multiple of what it takes."""
    x = torch.randn(images, c, 37, 23).to(dtype).contiguous(memory_format=torch.channels_last)
    assert 2 * x.numel() // c > 256
    return x


@pytest.mark.parametrize("c,images", [(3, 12), (24, 12), (40, 32)])
def test_statistics_survive_a_large_mean(c, images):
    """Means of 1000 to 4000 deviations, in several blocks (67 of the last) and views, against float64."""
    torch.manual_seed(0)
    x = many_rows(c, images=images).add_(torch.linspace(1000, 4000, c).view(1, c, 1, 1))
    _, mean, rstd = torch.ops.us3l.batch_norm(
        x, None, None, None, None, None, True, 0.1, 0.0, 2, None, HostBackend.name
    )
    parts = x.double().view(2, images // 2, c, -1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean.double(), parts.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(rstd.double(), parts.var(2, unbiased=False).rsqrt(), rtol=2e-5, atol=0)


@orders(0, 1, 2)
def test_batch_norm_of_many_blocks(order, cuda_host):
    """Every stage has several blocks; turns of blocks and threads change no bit."""
    torch.manual_seed(0)
    arguments = norm_arguments(many_rows(24, torch.bfloat16), training=True, views=2, activation="relu")
    x = arguments["x"].requires_grad_()
    with cuda_host.order(order):
        y = functional.batch_norm(**arguments)
        grad = torch.randn_like(y)
        y.backward(grad)
    xd = x.detach().double().requires_grad_()
    w, b = (arguments[n][:24].double() for n in ("weight", "bias"))
    expected = F.relu(torch.cat([F.batch_norm(part, None, None, w, b, True) for part in xd.chunk(2)]))
    kinks = expected.abs() < 0.01
    test_ops.assert_close(y, expected, torch.bfloat16)
    expected.backward(torch.where(kinks, 0.0, grad.double()))
    x.grad[kinks] = xd.grad[kinks].to(x.dtype)
    test_ops.assert_close(x.grad, xd.grad, torch.bfloat16)
    outputs = (y.detach(), x.grad, arguments["running_mean"], arguments["running_var"])
    first = _first_results.setdefault("batch_norm", outputs)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))


_first_results: dict[str, tuple[Tensor, ...]] = {}


def test_running_statistics_are_those_of_one_forward_for_each_view():
    torch.manual_seed(0)
    x = torch.randn(6, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    together, apart = norm_arguments(x, training=True), norm_arguments(x, training=True)
    functional.batch_norm(**together, views=3)
    for part in x.chunk(3):
        functional.batch_norm(**{**apart, "x": part})
    for name in ("running_mean", "running_var"):
        assert torch.equal(together[name], apart[name])


@pytest.mark.parametrize("c", [5, 8])
def test_nan_is_nobodys_zero(c):
    """relu hands on NaN, as torch's does."""
    x = torch.randn(3, c, 2, 2).contiguous(memory_format=torch.channels_last)
    x[1, 2] = torch.nan
    y = functional.batch_norm(**norm_arguments(x, training=False, activation="relu"))
    assert y[1, 2].isnan().all() and y.isnan().sum() == 4


def test_gradient_of_the_mean_is_expanded():
    """grad_output with strides of 0 becomes a matrix of rows first."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    functional.batch_norm(**norm_arguments(x, training=True, activation="relu")).mean().backward()
    got, x.grad = x.grad, None
    with backend("reference"):
        torch.manual_seed(0)
        torch.randn(4, 16, 3, 3)
        functional.batch_norm(**norm_arguments(x, training=True, activation="relu")).mean().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-8)


BAD_NORMS = {
    "views": ({"views": 3}, "views: expected a divisor of the batch of 4, got 3"),
    "layout": ({"x": torch.zeros(4, 8, 3, 3)}, "expected channels innermost"),
    "short weight": ({"weight": torch.zeros(7)}, "weight: expected a contiguous float32 vector of at least 8"),
    "residual": ({"residual": torch.zeros(4, 8, 3, 2)}, "residual: expected the shape of x"),
    "activation": ({"activation": 3}, "activation: expected 0, 1 or 2, got 3"),
    "dtype": ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "x: expected float32, bfloat16 or float16"),
    "one value": ({"x": torch.zeros(1, 8)}, "expected more than 1 value per channel and view"),
    "evaluation": ({"training": False}, "running_mean, running_var: expected both"),
}


@pytest.mark.parametrize("case", BAD_NORMS)
def test_norms_that_cannot_be(case, cuda_host):
    changes, message = BAD_NORMS[case]
    x = torch.zeros(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    names = ("weight", "bias", "running_mean", "running_var", "residual")
    arguments = {"x": x, **dict.fromkeys(names), "training": True, "momentum": 0.1, "eps": 1e-5, "views": 1}
    with pytest.raises(RuntimeError, match=message):
        cuda_host.ops.batch_norm(**{**arguments, "activation": 0, **changes})


# ---------------------------------------------------------------------------------------------- depthwise

# name: (images, c, H, W, C full, kernel, options)
DEPTHWISE = {
    "3x3": (2, 16, 6, 7, 24, (3, 3), {"padding": 1}),
    "3x3 stride 2": (2, 16, 7, 6, 24, (3, 3), {"padding": 1, "stride": 2}),
    "3x3 stride 2 on even padding": (2, 8, 9, 10, 8, (3, 3), {"padding": (0, 2), "stride": 2}),
    "5x5": (1, 40, 5, 9, 48, (5, 5), {"padding": 2}),
    "5x5 stride 2": (2, 8, 8, 5, 16, (5, 5), {"padding": 2, "stride": 2}),
    "7x7": (1, 72, 8, 8, 80, (7, 7), {"padding": 3}),
    "7x7 stride 2": (1, 8, 13, 9, 8, (7, 7), {"padding": 3, "stride": 2}),
    "more padding than the filter": (1, 8, 4, 4, 8, (3, 3), {"padding": 4}),
    "no padding": (2, 16, 8, 11, 16, (5, 5), {}),
    "one channel": (2, 1, 6, 6, 12, (3, 3), {"padding": 1}),
    "odd channels": (2, 33, 5, 6, 40, (3, 3), {"padding": 1}),
    "odd channels stride 2": (1, 5, 6, 7, 12, (5, 5), {"padding": 2, "stride": 2}),
    "dilated": (1, 8, 9, 9, 12, (3, 3), {"padding": (2, 1), "dilation": 2}),
    "strides apart": (2, 8, 9, 7, 8, (3, 5), {"padding": (1, 2), "stride": (2, 3)}),
    "1x1": (2, 8, 3, 3, 12, (1, 1), {}),
    "2x4": (1, 7, 9, 9, 9, (2, 4), {"stride": (3, 2), "padding": (1, 2), "dilation": (2, 1)}),
    "global": (2, 8, 7, 7, 8, (7, 7), {}),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", DEPTHWISE)
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_depthwise(layout, case, dtype):
    torch.manual_seed(0)
    n, c, h, w, full, kernel, options = DEPTHWISE[case]
    x = test_ops.laid_out(test_ops.random(n, c, h, w, dtype=dtype), layout).requires_grad_()
    weight, inner = test_ops.poisoned((full, 1, *kernel), (c, 1, *kernel), torch.float32)
    bias, inner_bias = test_ops.poisoned((full,), (c,), torch.float32)
    y = functional.conv2d(x, weight, bias, groups=full, **options)
    xd = x.detach().double().requires_grad_()
    expected = F.conv2d(xd, inner, inner_bias, groups=c, **options)
    test_ops.assert_close(y, expected, dtype)
    grad = test_ops.laid_out(test_ops.random(*y.shape, dtype=dtype), layout)
    y.backward(grad)
    expected.backward(grad.double())
    test_ops.assert_close(x.grad, xd.grad, dtype)
    test_ops.assert_prefix_gradient(weight, inner.grad, torch.float32)
    test_ops.assert_prefix_gradient(bias, inner_bias.grad, torch.float32)


@orders(0, 1, 2)
@pytest.mark.parametrize("kernel", [3, 4])
def test_depthwise_filter_gradient_of_many_blocks(kernel, order, cuda_host):
    torch.manual_seed(0)
    x = torch.randn(5, 24, 37, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(30, 1, kernel, kernel).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(5, 24, 38 - kernel, 10 - kernel).contiguous(memory_format=torch.channels_last)
    gw = torch.full_like(weight, test_ops.CANARY)
    with cuda_host.order(order):
        cuda_host.ops.depthwise_conv2d_backward(dy, x, weight, gw, False, [1, 1], [0, 0], [1, 1])
    assert torch.equal(gw[24:], torch.full_like(gw[24:], test_ops.CANARY))
    exact = torch.nn.grad.conv2d_weight(x.double(), (24, 1, kernel, kernel), dy.double(), groups=24)
    first = _first_results.setdefault(f"depthwise {kernel}", (gw,))
    assert torch.equal(first[0], gw)
    test_ops.assert_close(gw[:24] - test_ops.CANARY, exact, torch.float32)


# ---------------------------------------------------------------------------------------------- on tensor cores

# name: (images, c, k, H, W, C full, K full, kernel, options)
PRODUCTS = {
    "3x3": (2, 40, 24, 9, 8, 48, 40, (3, 3), {"padding": 1}),
    "several tiles of channels": (1, 24, 104, 5, 7, 24, 136, (1, 3), {"padding": (0, 1)}),
    "of a chunk": (3, 8, 8, 7, 7, 16, 8, (3, 3), {"padding": 1}),
    "wide": (1, 72, 56, 6, 5, 80, 80, (2, 1), {"padding": (1, 0)}),
    "1x1": (3, 80, 40, 7, 9, 96, 64, (1, 1), {}),
    "1x1 padded": (1, 16, 8, 3, 3, 16, 16, (1, 1), {"padding": 1}),
    "dilated, taps apart": (2, 16, 16, 9, 7, 24, 24, (3, 2), {"padding": (0, 2), "dilation": (2, 1)}),
    "no padding": (1, 32, 24, 7, 7, 32, 40, (3, 3), {}),
    "one pixel": (5, 24, 40, 1, 1, 40, 40, (3, 3), {"padding": 1}),
    "5x5": (1, 8, 24, 6, 6, 8, 24, (5, 5), {"padding": 2}),
}


def in_chunks(x: Tensor, layout: str) -> Tensor:
    """The values of x, channels innermost; in a slice NaN lies between them, 8 channels or a multiple to a pixel."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    big = torch.full((n, c + 8, h + 1, w + 2), torch.nan, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    big[:, 8:, 1:, 1:-1] = x
    return big[:, 8:, 1:, 1:-1]


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize(
    "layout,dtype,order",
    [("channels_last", torch.bfloat16, 0), ("slice", torch.float16, 1)],
    ids=["bfloat16", "float16 slice in turns"],
)
def test_product(layout, dtype, order, case, cuda_host):
    """y, dX and what is added to the gradients, from the prefix of the weight in both layouts of parameters."""
    torch.manual_seed(0)
    n, c, k, h, w, full_c, full_k, kernel, options = PRODUCTS[case]
    x = in_chunks(test_ops.random(n, c, h, w, dtype=dtype), layout).requires_grad_()
    values = test_ops.random(k, c, *kernel, dtype=dtype).float()
    weight = torch.full((full_k, full_c, *kernel), torch.nan)
    if layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    weight[:k, :c] = values
    weight.requires_grad_()
    bias, inner_bias = test_ops.poisoned((full_k,), (k,), torch.float32)
    xd, inner = x.detach().double().requires_grad_(), values.double().requires_grad_()
    expected = F.conv2d(xd, inner, inner_bias, **options)
    grad = test_ops.random(*expected.shape, dtype=dtype)
    with cuda_host.order(order):
        y = functional.conv2d(x, weight, bias, out_channels=k, **options)
        y.backward(in_chunks(grad, layout))
    expected.backward(grad.double())
    test_ops.assert_close(y, expected, dtype)
    test_ops.assert_close(x.grad, xd.grad, dtype)
    test_ops.assert_prefix_gradient(weight, inner.grad, torch.float32)
    test_ops.assert_prefix_gradient(bias, inner_bias.grad, torch.float32)


@orders(0, 1, 2)
def test_product_in_pieces(order, cuda_host):
    """Several tiles, pieces of dW that the pixels do not fill; turns change no bit, and what is inactive stays."""
    torch.manual_seed(0)
    x, dy = (in_chunks(torch.randn(2, c, 15, 13).bfloat16(), "channels_last") for c in (8, 16))
    weight = torch.randn(24, 16, 2, 2).bfloat16().contiguous(memory_format=torch.channels_last)
    geometry = ([1, 1], [1, 1], [2, 2], 1)
    gw = torch.full((24, 16, 2, 2), test_ops.CANARY)
    with cuda_host.order(order):
        y = cuda_host.ops.conv2d(x, weight, None, 16, *geometry)
        dx = cuda_host.ops.conv2d_backward(dy, x, weight, gw, None, True, *geometry)
    exact = torch.nn.grad.conv2d_weight(x.double(), (16, 8, 2, 2), dy.double(), padding=1, dilation=2)
    test_ops.assert_close(gw[:16, :8] - test_ops.CANARY, exact, torch.float32)
    gw_outside = gw.clone()
    gw_outside[:16, :8] = test_ops.CANARY
    assert (gw_outside == test_ops.CANARY).all()
    first = _first_results.setdefault("product", (y, dx, gw))
    assert all(torch.equal(a, b) for a, b in zip(first, (y, dx, gw), strict=True))


def test_product_of_a_gradient_without_memory():
    """The gradient of a sum has strides of 0, and is made channels_last first; x and the weight want none, in turn."""
    torch.manual_seed(0)
    x = in_chunks(torch.randn(1, 8, 4, 4).half(), "channels_last").requires_grad_()
    weight = torch.randn(8, 8, 1, 1, requires_grad=True)
    functional.conv2d(x, weight.detach()).sum().backward()
    functional.conv2d(x.detach(), weight).sum().backward()
    expected = weight.detach().half().sum(0).view(1, 8, 1, 1).expand_as(x)
    test_ops.assert_close(x.grad, expected.double(), torch.float16)
    test_ops.assert_close(weight.grad, x.detach().double().sum((0, 2, 3)).expand(8, 8)[..., None, None], torch.float32)


def zeros(channels: int) -> Tensor:
    return torch.zeros(2, channels, 5, 5).half().contiguous(memory_format=torch.channels_last)


BAD_PRODUCTS = {
    "float32": ({"x": zeros(8).float()}, {}, "tensor-core tiles are for half precision"),
    "stride": ({}, {"stride": 2}, "tensor-core tiles are for stride 1"),
    "channels": ({"x": zeros(12)}, {}, "channels that are multiples of 8, there are 12 to 24"),
    "outputs": ({}, {"out_channels": 20}, "channels that are multiples of 8, there are 8 to 20"),
    "groups": ({"weight": torch.zeros(24, 8, 3, 3)}, {"groups": 3}, "one group or one filter per channel"),
    "between chunks": ({"x": zeros(12)[:, 4:]}, {}, "at multiples of 8 elements"),
    "NCHW": ({"x": zeros(8).contiguous()}, {}, "it takes channels_last at multiples"),
}


@pytest.mark.parametrize("case", BAD_PRODUCTS)
def test_products_that_cannot_be(case):
    changes, options, message = BAD_PRODUCTS[case]
    with pytest.raises(BackendError, match=message):
        functional.conv2d(**({"x": zeros(8), "weight": torch.zeros(24, 16, 3, 3)} | changes | options))


@pytest.mark.parametrize(
    "capability,channels,kernel,message",
    [
        ((8, 0), (40, 80), 3, None),
        ((8, 6), (24, 72), 3, None),
        ((9, 0), (40, 40), 3, "mma.sync"),
        ((8, 0), (64, 40), 3, "Triton's tiles of 64 and 64 columns fit 64 and 40 channels"),
        ((8, 0), (40, 56), 3, "Triton's tiles"),
        ((8, 0), (40, 40), 1, "waits for memory"),
        ((8, 0), (40, 152), 3, "faster than cuDNN up to 128 channels"),
    ],
)
def test_where_a_product_is_predicted_to_be_faster(capability, channels, kernel, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    weight = torch.zeros(160, 160, kernel, kernel)
    reason = BACKENDS[HostBackend.name].why_slower(
        "conv2d", zeros(channels[0]), weight, out_channels=channels[1], **geometry
    )
    assert reason is None if message is None else message in reason


def test_columns_of_triton():
    conv2d = pytest.importorskip("us3l_kernels.triton.conv2d")
    for channels in range(8, 400, 8):
        tile = next(t for t in conv2d.PRODUCT_TILES["half"] if channels <= t.channels and t.capability == 80)
        assert cuda.columns_of_triton(channels) == -(-channels // tile.n) * tile.n


def test_what_it_does_not_take():
    x = torch.zeros(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(BackendError, match="it takes channels_last"):
        functional.conv2d(x.contiguous(), torch.zeros(8, 1, 3, 3), groups=8)
    with pytest.raises(BackendError, match="x is torch.float64"):
        functional.batch_norm(x.double(), None, None, training=True)
    with pytest.raises(BackendError, match="it takes channels_last"):
        functional.batch_norm(x.contiguous(), None, None, training=True)
    with pytest.raises(BackendError, match="it takes float32 parameters"):
        functional.batch_norm(x.half(), torch.ones(8).half(), None, training=True)


def test_order_of_auto_on_a_gpu():
    names = list(backends.BACKENDS)
    assert names.index("cuda") < names.index("triton") < names.index("aten")
