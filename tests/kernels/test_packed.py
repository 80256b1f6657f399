"""Packed weights give the results of the unpacked ones bit for bit, whatever changes a parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import us3l_kernels
from us3l_kernels import gradients, packed, use_width, views
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, SlicedLinear, SlicedQKV
from us3l_kernels.optim import EMA, SGD, AdamW
from us3l_kernels.packed import PackedWeights

BF16 = torch.bfloat16


class Network(nn.Module):
    """Every kind of operation with weights, one layer twice, and no width that uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SlicedConv2d(3, 24, 3, padding=1)
        self.norm = SlicedBatchNorm2d(24, track_running_stats=False, activation="relu")
        self.depthwise = SlicedConv2d(24, 24, 3, 2, 1, groups=24, bias=False)
        self.same = SlicedConv2d(24, 24, 1, bias=False)
        self.qkv = SlicedQKV(24, 3)
        self.head = SlicedLinear(72, 10, slice_out=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.same(self.depthwise(self.norm(self.stem(x)))))
        return self.head(self.qkv(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture(autouse=True)
def _on_aten() -> Iterator[None]:
    with us3l_kernels.backend("aten"):
        yield


def network(*, channels_last: bool = True) -> Network:
    torch.manual_seed(0)
    model = Network().train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def run(model: Network, width: float, x: Tensor, grad: Tensor, context: PackedWeights | None) -> Tensor:
    with use_width(model, width), context or nullcontext():
        with torch.autocast("cpu", dtype=x.dtype if x.dtype != torch.float32 else BF16), views(2):
            y = model(x.float())
        y.backward(grad.to(y.dtype))
    return y.detach()


def data(dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(*shape, generator=generator) for shape in ((4, 3, 8, 8), (4, 10)))
    return x.to(dtype, memory_format=torch.channels_last), grad


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_steps_are_those_of_unpacked_weights(dtype: torch.dtype, channels_last: bool) -> None:
    x, grad = data(dtype)
    results = []
    for pack in (False, True):
        model = network(channels_last=channels_last)
        buffer = gradients.attach(model)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        contexts = {width: PackedWeights(buffer) if pack else None for width in (1.0, 0.5, 0.25)}
        outputs = []
        for _ in range(3):
            outputs += [run(model, width, x, grad, context) for width, context in contexts.items()]
            outputs.append(buffer.flat.clone())
            optimizer.step()
            optimizer.zero_grad()
        results.append([*outputs, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_from_packed_weights_are_those_of_float64() -> None:
    x, grad = data()
    model = network()
    buffer = gradients.attach(model)
    run(model, 0.5, x, grad, PackedWeights(buffer))
    exact = network().double()
    with use_width(exact, 0.5), views(2):
        exact(x.double()).backward(grad.double())
    for (name, given), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name == "stem.bias":  # the norm behind it takes it away
            continue
        assert (given.grad.double() - expected.grad).norm() <= 0.05 * expected.grad.norm(), name
        assert not given.grad[expected.grad == 0].any(), name  # outside the slice


def test_inactive_weights_are_not_read_and_inactive_gradients_not_written() -> None:
    x, grad = data()
    model = network()
    buffer = gradients.attach(model)
    buffer.flat.fill_(3.0)  # the canary
    with torch.no_grad():
        model.stem.weight[8:].fill_(torch.nan)
        model.same.weight[8:].fill_(torch.nan)
        model.same.weight[:, 8:].fill_(torch.nan)
        model.depthwise.weight[8:].fill_(torch.nan)
    context = PackedWeights(buffer)
    for _ in range(2):
        assert run(model, 0.25, x, grad, context).isfinite().all()
        with torch.no_grad():
            model.stem.weight.add_(0)
    assert (model.same.weight.grad[8:] == 3).all() and (model.same.weight.grad[:, 8:] == 3).all()
    assert (model.stem.weight.grad[8:] == 3).all() and not (model.stem.weight.grad[:8] == 3).all()


def test_ordinary_gradients_are_complete_after_the_backward() -> None:
    x, grad = data()
    plain, model = network(), network()
    context = PackedWeights()
    with use_width(model, 0.5), context:
        with torch.autocast("cpu", dtype=BF16), views(2):
            y = model(x.float())
        y.backward(grad.to(y.dtype))
        inside = [p.grad.clone() for p in model.parameters()]
    run(plain, 0.5, x, grad, None)
    assert all(torch.equal(a, p.grad) for a, p in zip(inside, plain.parameters(), strict=True))


class Copies:
    """Counts the slices that were copied at once, and the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.calls = 0
        original = torch._foreach_copy_

        def counting(destinations: list[Tensor], sources: list[Tensor]) -> None:
            self.count += len(destinations)
            self.calls += 1
            original(destinations, sources)

        monkeypatch.setattr(torch, "_foreach_copy_", counting)

    def taken(self) -> tuple[int, int]:
        result, self.calls, self.count = (self.calls, self.count), 0, 0
        return result


def _set(model: Network, change: Callable[[Tensor], object]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            change(parameter)


UPDATES: dict[str, Callable[[Network], object]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1).step(),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.1).step(),
    "torch": lambda m: torch.optim.SGD(m.parameters(), lr=0.1).step(),
    "ema": lambda m: EMA(list(m.parameters()), [torch.randn_like(p) for p in m.parameters()], 0.5).update(),
    "copy_": lambda m: _set(m, lambda p: p.copy_(torch.randn_like(p))),
    "load": lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}),
    "invalidate": lambda m: ([p.data.normal_() for p in m.parameters()], us3l_kernels.invalidate(m)),
}


@pytest.mark.parametrize("update", UPDATES)
def test_one_copy_of_all_after_every_kind_of_update(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = data()
    model = network()
    context = PackedWeights(gradients.attach(model))
    copies = Copies(monkeypatch)
    run(model, 0.5, x, grad, context)
    assert copies.taken() == (0, 0)  # it does not know them yet
    UPDATES[update](model)
    y = run(model, 0.5, x, grad, context)
    # weight and bias of the stem, depthwise, the shared one, three segments of qkv with biases, the head with its bias
    assert copies.taken() == (1, 2 + 1 + 1 + 6 + 2)
    assert torch.equal(y, run(copy.deepcopy(model), 0.5, x, grad, None))


def test_writes_that_torch_does_not_count_are_seen_between_two_uses() -> None:
    x, grad = data()
    model = network()
    gradients.attach(model)
    context = PackedWeights()
    before = run(model, 0.5, x, grad, context)
    model.same.weight.data.mul_(2)
    after = run(model, 0.5, x, grad, context)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(copy.deepcopy(model), 0.5, x, grad, None))


def test_a_change_inside_is_followed_too() -> None:
    x, grad = data()
    model = network()
    gradients.attach(model)
    with PackedWeights(), torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        before = model(x.float())
        model.same.weight.mul_(2)
        after = model(x.float())
        model.same.weight.data.mul_(2)  # which torch does not count
        assert torch.equal(after, model(x.float()))
        us3l_kernels.invalidate(model)
        at_last = model(x.float())
    assert not torch.equal(before, after) and not torch.equal(after, at_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        assert torch.equal(at_last, model(x.float()))


def test_memory_is_two_bytes_for_each_active_weight() -> None:
    x, grad = data()
    model = network()
    context = PackedWeights()
    run(model, 0.25, x, grad, context)
    active = 8 * 27 + 8 + 8 * 9 + 8 * 8 + 3 * 8 * 8 + 3 * 8 + 24 * 10 + 10
    assert context.nbytes == 2 * active
    assert not context._copies  # they are gone
    with context:
        assert sum(copy.data.untyped_storage().nbytes() for copy in context._copies.values()) == 2 * active


def test_an_error_inside_leaves_nothing_behind() -> None:
    x, grad = data()
    model = network()
    buffer = gradients.attach(model)
    context = PackedWeights(buffer)
    with pytest.raises(ZeroDivisionError), context:
        with torch.autocast("cpu", dtype=BF16), views(2):
            y = model(x.float())
        y.backward(grad.to(y.dtype))
        raise ZeroDivisionError
    assert packed._current is None
    assert not model.same.weight.grad.any()  # what was noted is not added
    buffer.zero_()
    expected = network()
    run(model, 1.0, x, grad, context)
    run(expected, 1.0, x, grad, None)
    assert torch.equal(model.same.weight.grad, expected.same.weight.grad)


def test_slices_of_parameters_that_were_replaced_are_forgotten() -> None:
    x, grad = data()
    model = network()
    context = PackedWeights()
    run(model, 0.5, x, grad, context)
    before = context.nbytes
    model.same.weight = nn.Parameter(model.same.weight.detach().clone())
    run(model, 0.5, x, grad, context)
    assert context.nbytes == before


def test_float32_and_inference_need_no_copies() -> None:
    model = network()
    context = PackedWeights()
    with context, torch.no_grad():
        model(data()[0].float())
    assert context.nbytes == 0
    with torch.inference_mode():
        frozen = network()
        with context, torch.autocast("cpu", dtype=BF16):
            frozen(data()[0].float())
    assert context.nbytes == 0
