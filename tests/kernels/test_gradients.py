"""Gradients accumulated in place: every statement of us3l_kernels.gradients."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from us3l.models import build_model
from us3l_kernels import nn, optim, use_width
from us3l_kernels.gradients import ALIGNMENT, attach, detach, has_gradient, slot_of


class Network(torch.nn.Module):
    """Sliced layers, an ordinary layer and one that some widths never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.SlicedConv2d(3, 16, 3, padding=1)
        self.norm = nn.SlicedBatchNorm2d(16, activation="relu")
        self.plain = torch.nn.Conv2d(3, 3, 1)
        self.fc = nn.SlicedLinear(16, 5, slice_out=False)
        self.spare = nn.SlicedLinear(5, 5, slice_out=False)

    def forward(self, x: torch.Tensor, spare: bool = False) -> torch.Tensor:
        y = self.fc(self.norm(self.conv(self.plain(x))).mean((2, 3)))
        return self.spare(y) if spare else y


@pytest.fixture
def setup():
    torch.manual_seed(0)
    network = Network().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(4, 5)
    return network, x, grad


def ordinary(network, x, grad, widths, **options):
    """What ordinary gradients of a copy add up to."""
    twin = copy.deepcopy(network)
    for width in widths:
        with use_width(twin, width):
            twin(x, **options).backward(grad)
    return {n: p.grad for n, p in twin.named_parameters()}


def test_widths_add_up_to_the_ordinary_gradients(setup):
    network, x, grad = setup
    expected = ordinary(network, x, grad, (1.0, 0.5))
    buffer = attach(network)
    for width in (1.0, 0.5):
        with use_width(network, width):
            network(x).backward(grad)
    for name, p in network.named_parameters():
        if expected[name] is None:
            assert not slot_of(p).touched and not has_gradient(p) and not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, expected[name])
            assert slot_of(p).touched and has_gradient(p)
    total = sum(g.double().square().sum() for g in expected.values() if g is not None)
    torch.testing.assert_close(buffer.flat.double().square().sum(), total)  # nothing anywhere else


def test_grads_are_aligned_views_with_the_parameters_strides(setup):
    network, x, grad = setup
    buffer = attach(network)
    network(x).backward(grad)
    first = buffer.flat.data_ptr()
    for p in network.parameters():
        assert p.grad.stride() == p.stride()
        assert (p.grad.data_ptr() - first) % ALIGNMENT == 0
        assert first <= p.grad.data_ptr() < first + buffer.flat.nbytes
    assert network.conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_written_outside_the_slice(setup):
    network, x, grad = setup
    attach(network)
    canary = 1024.0
    network.conv.weight.grad.fill_(canary)
    with use_width(network, 0.5):
        network(x).backward(grad)
    assert (network.conv.weight.grad[8:] == canary).all()
    assert (network.conv.weight.grad[:8] != canary).all()
    assert (network.fc.weight.grad[:, :8] != 0).any() and not network.fc.weight.grad[:, 8:].any()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["model", "stock optimizer", "our optimizer"])
def test_both_forms_of_zero_grad(setup, by, set_to_none):
    network, x, grad = setup
    buffer = attach(network)
    network(x, spare=True).backward(grad)  # what must be forgotten, in layers that later steps never reach too
    zeroer = {
        "model": network,
        "stock optimizer": torch.optim.SGD(network.parameters(), 0.1),
        "our optimizer": optim.SGD(network.parameters(), 0.1),
    }[by]
    for _ in range(2):
        zeroer.zero_grad(set_to_none=set_to_none)
        network(x).backward(grad)
        expected = ordinary(network, x, grad, (1.0,))
        torch.testing.assert_close(network.conv.weight.grad, expected["conv.weight"])
        torch.testing.assert_close(network.plain.weight.grad, expected["plain.weight"])
        assert network.conv.weight.grad.data_ptr() == slot_of(network.conv.weight).view.data_ptr()
        assert network.plain.weight.grad.data_ptr() == slot_of(network.plain.weight).view.data_ptr()
        total = sum(g.double().square().sum() for g in expected.values() if g is not None)
        torch.testing.assert_close(buffer.flat.double().square().sum(), total)
    buffer.zero_()
    assert not buffer.flat.any() and not any(slot.touched for slot in buffer.slots)


def test_our_zero_grad_clears_the_touched_flags(setup):
    network, x, grad = setup
    buffer = attach(network)
    optimizer = optim.SGD(network.parameters(), 0.1)
    for set_to_none in (True, False):
        network(x).backward(grad)
        assert any(has_gradient(p) for p in network.parameters())
        optimizer.zero_grad(set_to_none=set_to_none)
        assert not any(has_gradient(p) for p in network.parameters())
    assert not any(slot.touched for slot in buffer.slots)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_untouched_parameters_are_skipped_as_if_their_gradient_were_none(setup, kind):
    network, x, grad = setup
    options = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if kind is optim.SGD else {})
    twin = copy.deepcopy(network)
    attach(network)
    results = []
    for model in (network, twin):
        optimizer = kind(model.parameters(), **options)
        for spare in (True, False, True):  # `spare` has momentum when it is skipped
            optimizer.zero_grad()
            model(x, spare=spare).backward(grad)
            optimizer.step()
        results.append(list(model.parameters()))
    for attached, plain in zip(*results, strict=True):
        torch.testing.assert_close(attached, plain)


def test_clipping(setup):
    network, x, grad = setup
    expected = ordinary(network, x, grad, (1.0,))
    norm = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    buffer = attach(network)
    network(x).backward(grad)
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1), norm)
    torch.testing.assert_close(buffer.flat.norm(), torch.tensor(0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("stock", [True, False])
def test_grad_scaler(setup, stock):
    network, x, grad = setup
    twin = copy.deepcopy(network)
    attach(network)
    for model in (network, twin):
        optimizer = (torch.optim.SGD if stock else optim.SGD)(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for poison in (False, True, False):
            optimizer.zero_grad()
            loss = (model(x) * grad).sum() * (torch.inf if poison else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 4.0  # the poisoned step was seen, and skipped
    for attached, plain in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(attached, plain)


def test_deepcopy_is_not_attached_and_detach_gives_ordinary_gradients(setup):
    network, x, grad = setup
    attach(network)
    twin = copy.deepcopy(network)
    assert slot_of(twin.conv.weight) is None
    network(x).backward(grad)
    held = network.conv.weight.grad.clone()
    detach(network)
    assert slot_of(network.conv.weight) is None
    assert torch.equal(network.conv.weight.grad, held)
    network.zero_grad()
    (dw,) = torch.autograd.grad(network(x), network.conv.weight, grad)
    torch.testing.assert_close(dw, held)
    attach(network)  # again


def test_a_saved_model_is_not_attached(setup, tmp_path):
    network, x, grad = setup
    attach(network)
    network(x).backward(grad)
    torch.save(network, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert slot_of(loaded.conv.weight) is None
    torch.testing.assert_close(loaded(x), network(x))
    (dw,) = torch.autograd.grad(loaded(x), loaded.conv.weight, grad)
    torch.testing.assert_close(dw, network.conv.weight.grad)


def test_frozen_parameters_stay_out(setup):
    network, x, grad = setup
    network.conv.requires_grad_(False)
    buffer = attach(network)
    network(x).backward(grad)
    assert network.conv.weight.grad is None and slot_of(network.conv.weight) is None
    assert {"conv.weight", "conv.bias"}.isdisjoint(slot.name for slot in buffer.slots)


def test_an_assigned_grad_is_taken_over(setup):
    network, x, grad = setup
    expected = ordinary(network, x, grad, (1.0,))
    attach(network)
    network.conv.weight.grad = torch.ones_like(network.conv.weight)
    network(x).backward(grad)
    torch.testing.assert_close(network.conv.weight.grad, expected["conv.weight"] + 1)
    assert network.conv.weight.grad is slot_of(network.conv.weight).view


def test_gradients_with_respect_to_inputs_leave_the_buffer_alone(setup):
    network, x, grad = setup
    buffer = attach(network)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(network(x), x, grad)
    network(x).backward(grad, inputs=[x])
    torch.testing.assert_close(x.grad, dx)
    assert not buffer.flat.any() and not any(slot.touched for slot in buffer.slots)


def test_checkpointed_activations(setup):
    network, x, grad = setup
    expected = ordinary(network, x, grad, (0.5,))
    attach(network)
    with use_width(network, 0.5):
        torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False).backward(grad)
    torch.testing.assert_close(network.conv.weight.grad, expected["conv.weight"])


def test_autocast_accumulates_in_float32(setup):
    network, x, grad = setup
    attach(network)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    y.backward(grad.to(y.dtype))
    assert network.conv.weight.grad.dtype == torch.float32 and network.conv.weight.grad.any()


def test_compiled_model_accumulates(setup):
    network, x, grad = setup
    expected = ordinary(network, x, grad, (1.0,))
    buffer = attach(network)
    torch.compile(network, backend="aot_eager")(x).backward(grad)
    torch.testing.assert_close(network.conv.weight.grad, expected["conv.weight"])
    assert slot_of(network.conv.weight).touched
    assert network.conv.weight.grad.data_ptr() >= buffer.flat.data_ptr()


def test_autograd_grad_raises(setup):
    network, x, grad = setup
    attach(network)
    with pytest.raises(RuntimeError, match="'conv.weight'.*accumulated in place"):
        torch.autograd.grad(network(x), network.conv.weight, grad)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_tensor_hooks_raise(setup, kind):
    network, x, grad = setup
    attach(network)
    getattr(network.conv.weight, kind)(lambda g: None)
    with pytest.raises(RuntimeError, match="'conv.weight' has tensor hooks"):
        network(x).backward(grad)


def test_ddp_takes_full_gradients(setup, tmp_path):
    network, x, grad = setup
    network(x).backward(grad)
    plain = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(network, find_unused_parameters=True)
        wrapped(x).backward(grad)
    finally:
        torch.distributed.destroy_process_group()
    assert len(plain) > 2
    for name, gradient in plain.items():
        assert torch.equal(network.get_parameter(name).grad, gradient)


def test_ddp_raises_when_attached(setup, tmp_path):
    network, x, _ = setup
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(network)
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
            attach(wrapped)
        attach(network)
        with pytest.raises(RuntimeError, match="DistributedDataParallel cannot see"):
            wrapped(x)
    finally:
        torch.distributed.destroy_process_group()


def test_loading_by_assignment_raises_and_changes_nothing(setup):
    network, x, grad = setup
    buffer = attach(network)
    other = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    for part, prefix in ((network, ""), (network.conv, "conv.")):
        state = {name.removeprefix(prefix): value for name, value in other.items() if name.startswith(prefix)}
        with pytest.raises(RuntimeError, match="assign=True.*would replace '.*weight', whose gradient is attached"):
            part.load_state_dict(state, assign=True)
    assert network.conv.weight.count_nonzero() > 0
    network.load_state_dict(copy.deepcopy(network).state_dict())  # as ever
    network(x).backward(grad)
    assert buffer.flat.count_nonzero() > 0
    copy.deepcopy(network).load_state_dict(other, assign=True)  # a copy is not attached
    detach(network)
    network.load_state_dict(other, assign=True)
    assert not network.conv.weight.any()


def test_moving_an_attached_model_raises(setup):
    network, x, grad = setup
    attach(network)
    network.double()
    with pytest.raises(RuntimeError, match="detach and attach the model again"):
        network(x.double()).backward(grad.double())


@pytest.mark.parametrize("widths", [(), (1.0,), (1.0, 0.5)], ids=str)
def test_an_attached_model_is_let_go_of(widths):
    """Many are trained in a process, by a search or in a notebook."""
    model = build_model("resnet_tiny", stem="cifar", num_classes=8)
    alive = [weakref.ref(each) for each in (attach(model), *model.parameters())]
    for width in widths:
        with use_width(model, width):
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    del model
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


def test_bad_models_are_refused(setup):
    network, _, _ = setup
    attach(network)
    with pytest.raises(ValueError, match="attached already"):
        attach(network)
    with pytest.raises(ValueError, match="parameters that require gradients"):
        attach(torch.nn.ReLU())
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="one dtype on one device"):
        attach(mixed)
