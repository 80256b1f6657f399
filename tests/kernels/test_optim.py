"""SGD, AdamW and EMA: equality with torch, the regulariser in the loss, which parameters move, torch's contracts."""

from __future__ import annotations

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from us3l_kernels import gradients
from us3l_kernels.functional import conv2d, linear
from us3l_kernels.optim import EMA, SGD, AdamW, kernels

SHAPES = [(20, 3, 3, 3), (16,), (10, 7), (3,), (24, 1, 3, 3), (5, 8, 1, 1), (), (1,), (2, 3, 4), (17, 2, 1, 3)]


def make_params(shapes=SHAPES, dtype=torch.float64, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def copies(params) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(*lists: list[nn.Parameter], seed: int) -> None:
    """The same random gradients for the parameters of every list."""
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, generator=generator, dtype=same[0].dtype)
        for p in same:
            p.grad = grad.clone()


def regularisation(params, weight_decay: float, alpha: float, groups: int) -> Tensor:
    """The loss form, written as the paper states it: sum_g lambda (1 - alpha g) ||p_g||^2, group by group."""
    total = torch.zeros((), dtype=torch.float64)
    for p in params:
        if p.ndim in (1, 4):
            size = max(1, p.shape[0] // groups)
            for g in range(groups):
                rows = p[g * size :] if g == groups - 1 else p[g * size : (g + 1) * size]
                total = total + weight_decay / 2 * (1 - alpha * g) * rows.square().sum()
        else:
            total = total + weight_decay / 2 * p.square().sum()
    return total


def assert_close(ours, theirs, tolerance=1e-12) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def assert_equal(ours, theirs) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


# Equality with torch (the kernels round in another way: test_native_optim, test_cuda_multi_tensor)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "takes", lambda *_: False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_torch(momentum, nesterov, weight_decay, dtype, no_kernels):
    ours = make_params(dtype=dtype)
    theirs = copies(ours)
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    optimizer, reference = SGD(ours, **options), torch.optim.SGD(theirs, **options, foreach=True)
    for step in range(4):
        set_gradients(ours, theirs, seed=step)
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(weight_decay, dtype, no_kernels):
    ours = make_params(dtype=dtype)
    theirs = copies(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, **options, foreach=True)
    for step in range(4):
        set_gradients(ours, theirs, seed=step)
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs)


def test_the_gradients_of_the_caller_stay_as_they_are():
    params = make_params()
    optimizer = SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(2):
        set_gradients(params, seed=step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert_equal([p.grad for p in params], before)


# Group regularisation


def check_loss_form(shapes, momentum, nesterov, weight_decay, alpha, groups, steps=3):
    ours = make_params(shapes)
    theirs = copies(ours)
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov}
    optimizer = SGD(ours, **options, weight_decay=weight_decay, alpha=alpha, groups=groups)
    reference = torch.optim.SGD(theirs, **options)
    for step in range(steps):
        set_gradients(ours, theirs, seed=step)
        regularisation(theirs, weight_decay, alpha, groups).backward()  # adds to .grad
        optimizer.step()
        reference.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("alpha", [0.05, 1 / 7])
def test_sgd_is_exactly_the_regulariser_in_the_loss(momentum, nesterov, alpha):
    check_loss_form(SHAPES, momentum, nesterov, weight_decay=0.3, alpha=alpha, groups=8)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 5), max_size=3).flatmap(
            lambda rest: st.integers(1, 40).map(lambda rows: (rows, *rest))
        ),
        min_size=1,
        max_size=4,
    ),
    groups=st.integers(1, 12),
    fraction=st.floats(0, 1),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_sgd_is_the_regulariser_in_the_loss_for_any_shape(shapes, groups, fraction, momentum):
    alpha = fraction / max(1, groups - 1)
    check_loss_form(shapes, momentum, False, weight_decay=0.2, alpha=alpha, groups=groups, steps=2)


def test_decay_of_every_group_by_hand():
    """20 rows in 8 groups: 2 rows each, and the last group has the 6 that remain."""
    p = nn.Parameter(torch.ones(20, 1, 1, 1, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    SGD([p], lr=1.0, weight_decay=0.5, alpha=0.05).step()
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7, 7, 7])
    torch.testing.assert_close(p.detach().flatten(), 1 - 0.5 * (1 - 0.05 * group.double()), rtol=0, atol=1e-15)


def test_adamw_decays_rows_decoupled():
    params = make_params()
    expected = copies(params)
    lr, weight_decay, alpha = 0.01, 0.3, 0.1
    optimizer = AdamW(params, lr=lr, weight_decay=weight_decay, alpha=alpha)
    reference = torch.optim.AdamW(expected, lr=lr, weight_decay=0.0)
    for step in range(3):
        set_gradients(params, expected, seed=step)
        # The gradient of the loss form is the decay of every element, times the element.
        decay = torch.autograd.grad(regularisation(expected, weight_decay, alpha, 8), expected)
        with torch.no_grad():
            for p, d in zip(expected, decay, strict=True):
                p -= lr * d
        optimizer.step()
        reference.step()
    assert_close(params, expected)


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_options_may_change_between_steps(optimizer_class):
    """A trainer ramps alpha: every step uses the options of that moment."""
    params = make_params()
    optimizer = optimizer_class(params, lr=0.1, weight_decay=0.5)
    for step, alpha in enumerate([0.0, 0.02, 0.1]):
        expected = copies(params)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0].update(alpha=alpha, lr=0.1 / (step + 1), weight_decay=0.5 + step)
        optimizer.step()
        # Without a gradient from the loss, the decay of both optimizers is the gradient of the loss form.
        decays = torch.autograd.grad(regularisation(expected, 0.5 + step, alpha, 8), expected)
        assert_close(params, [p - 0.1 / (step + 1) * d for p, d in zip(expected, decays, strict=True)])


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_memory_format_stays_and_does_not_matter(optimizer_class):
    plain = make_params([(20, 3, 3, 3), (24, 1, 3, 3)])
    nhwc = [nn.Parameter(p.detach().clone(memory_format=torch.channels_last)) for p in plain]
    strides = [p.stride() for p in nhwc]
    first = optimizer_class(plain, lr=0.1, weight_decay=0.5, alpha=0.05)
    second = optimizer_class(nhwc, lr=0.1, weight_decay=0.5, alpha=0.05)
    for step in range(2):
        set_gradients(plain, nhwc, seed=step)
        first.step()
        second.step()
    assert_equal(nhwc, plain)
    assert [p.stride() for p in nhwc] == strides


# Which parameters take part


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_parameters_without_a_gradient_are_skipped(optimizer_class):
    params = make_params()
    optimizer = optimizer_class(params, lr=0.1, weight_decay=0.5, alpha=0.05)
    params[0].grad = torch.randn_like(params[0])
    before = copies(params)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert_equal(params[1:], before[1:])
    assert not any(p in optimizer.state for p in params[1:])


def test_decay_without_grad_is_the_regulariser_in_the_loss():
    ours = make_params()
    theirs = copies(ours)
    optimizer = SGD(ours, lr=0.1, momentum=0.9, weight_decay=0.3, alpha=0.1, decay_without_grad=True)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(4):
        set_gradients(ours, theirs, seed=step)
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if (index + step) % 3 == 0:  # no gradient from the loss, now and then
                p.grad = q.grad = None
        regularisation(theirs, 0.3, 0.1, 8).backward()
        optimizer.step()
        reference.step()
    assert_close(ours, theirs)


def test_decay_without_grad_moves_adamw_too_but_never_a_frozen_parameter():
    params = make_params([(8, 2, 3, 3), (16,)])
    params[1].requires_grad_(False)
    before = copies(params)
    AdamW(params, lr=0.1, weight_decay=0.5, decay_without_grad=True).step()
    torch.testing.assert_close(params[0], before[0] * (1 - 0.1 * 0.5))
    assert_equal(params[1:], before[1:])


class TwoHeads(nn.Module):
    """One head is used at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(16, 3, 3, 3))
        self.first = nn.Parameter(torch.randn(4, 16))
        self.second = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor, head: nn.Parameter) -> Tensor:
        return linear(conv2d(x, self.conv, out_channels=8).mean((2, 3)), head)


@pytest.fixture
def attached():
    torch.manual_seed(0)
    model = TwoHeads()
    buffer = gradients.attach(model)
    return model, buffer


def backward(model: TwoHeads, head: nn.Parameter) -> None:
    y = model(torch.randn(2, 3, 5, 5), head)
    y.backward(torch.randn_like(y))


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_untouched_attached_parameters_are_skipped(optimizer_class, attached):
    model, buffer = attached
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.5)
    backward(model, model.first)
    optimizer.step()  # momentum or moments of `first` are not zero any more
    optimizer.zero_grad()
    before = copy.deepcopy(dict(model.named_parameters()))
    backward(model, model.second)
    assert model.first.grad is not None
    optimizer.step()
    assert_equal([model.first], [before["first"]])
    assert not torch.equal(model.second, before["second"])
    assert not torch.equal(model.conv, before["conv"])


def test_decay_without_grad_moves_untouched_attached_parameters(attached):
    model, _ = attached
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.5, decay_without_grad=True)
    before = model.second.detach().clone()
    backward(model, model.first)
    optimizer.step()
    torch.testing.assert_close(model.second.detach(), before - 0.1 * 0.5 * before)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_zero_grad_of_attached_gradients(optimizer_class, set_to_none, attached):
    model, buffer = attached
    outside = nn.Parameter(torch.ones(3))  # not attached: torch's own behaviour
    outside.grad = torch.ones(3)
    optimizer = optimizer_class([*model.parameters(), outside], lr=0.1)
    backward(model, model.first)
    assert buffer.flat.abs().sum() > 0
    optimizer.zero_grad(set_to_none=set_to_none)
    assert buffer.flat.abs().sum() == 0
    for p in model.parameters():
        slot = gradients.slot_of(p)
        assert p.grad is slot.view and not slot.touched
    assert outside.grad is None if set_to_none else torch.equal(outside.grad, torch.zeros(3))
    backward(model, model.first)  # accumulates in the buffer again
    assert gradients.slot_of(model.first).touched and model.first.grad.abs().sum() > 0


# EMA


def test_ema_by_hand():
    students = make_params()
    teachers = make_params(seed=1)
    before = copies(teachers)
    pointers = [t.data_ptr() for t in teachers]
    ema = EMA(teachers, students, 0.9)
    ema.update()
    assert_close(teachers, [0.9 * t + 0.1 * s for t, s in zip(before, students, strict=True)])
    ema.momentum = 0.25  # BYOL ramps it
    before = copies(teachers)
    ema.update()
    assert_close(teachers, [0.25 * t + 0.75 * s for t, s in zip(before, students, strict=True)])
    assert [t.data_ptr() for t in teachers] == pointers


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ema_at_the_ends(momentum):
    students, teachers = make_params(dtype=torch.float32), make_params(dtype=torch.float32, seed=1)
    expected = copies(teachers if momentum == 1.0 else students)
    EMA(teachers, students, momentum).update()
    assert_equal(teachers, expected)


def test_a_teacher_equal_to_its_student_stays_so():
    students = make_params(dtype=torch.float32)
    teachers = copies(students)
    EMA(teachers, students, 0.99).update()
    assert_equal(teachers, students)


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_ema_in_the_step_is_the_update_after_it(optimizer_class):
    params = make_params(dtype=torch.float32)
    others = copies(params)
    unused = nn.Parameter(torch.ones(4))  # a student that the optimizer does not own is averaged as well
    teachers, other_teachers = (make_params([*SHAPES, (4,)], torch.float32, seed=1) for _ in range(2))
    one = optimizer_class(params, lr=0.1, weight_decay=0.5, alpha=0.05)
    two = optimizer_class(others, lr=0.1, weight_decay=0.5, alpha=0.05)
    ema, other_ema = EMA(teachers, [*params, unused], 0.9), EMA(other_teachers, [*others, unused], 0.9)
    for step in range(3):
        set_gradients(params, others, seed=step)
        params[1].grad = others[1].grad = None  # skipped by the optimizer, not by the average
        one.step(ema=ema)
        two.step()
        other_ema.update()
    assert_equal(params, others)
    assert_equal(teachers, other_teachers)


def test_ema_rejects_what_does_not_match():
    p = [torch.zeros(3), torch.zeros(2)]
    with pytest.raises(ValueError, match="one to one, got 1 and 2"):
        EMA(p[:1], p, 0.9)
    with pytest.raises(ValueError, match=r"shape.*\(3,\).*\(2,\).*index 0"):
        EMA(p[:1], p[1:], 0.9)
    with pytest.raises(ValueError, match="float64"):
        EMA([torch.zeros(3, dtype=torch.float64)], p[:1], 0.9)
    with pytest.raises(ValueError, match="copies; number 0"):
        EMA(p, p, 0.9)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        EMA([torch.ones(3)], p[:1], 1.5)
    ema = EMA([torch.ones(3)], p[:1], 0.9)
    ema.momentum = -0.1
    with pytest.raises(ValueError, match="momentum"):
        ema.update()


# The contracts of torch.optim


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_state_dict_round_trip_through_a_file(optimizer_class):
    def make(params):
        options = {"momentum": 0.9} if optimizer_class is SGD else {}
        return optimizer_class(params, lr=0.1, weight_decay=0.5, alpha=0.05, **options)

    params = make_params()
    optimizer = make(params)
    set_gradients(params, seed=0)
    optimizer.param_groups[0]["alpha"] = 0.1
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = copies(params)
    resumed = make(resumed_params)
    state = torch.load(file, weights_only=True)
    for _ in range(2):  # a run may go back more than once
        resumed.load_state_dict(state)
    for step in (1, 2):
        set_gradients(params, resumed_params, seed=step)
        optimizer.step()
        resumed.step()
    assert_equal(resumed_params, params)


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_state_loads_into_another_dtype(optimizer_class):
    options = {"momentum": 0.9} if optimizer_class is SGD else {}
    params = make_params(dtype=torch.float64)
    optimizer = optimizer_class(params, lr=0.1, alpha=0.05, weight_decay=0.5, **options)
    set_gradients(params, seed=0)
    optimizer.step()
    narrow = [nn.Parameter(p.detach().float()) for p in params]
    resumed = optimizer_class(narrow, lr=0.1, alpha=0.05, weight_decay=0.5, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(params, seed=1)
    for p, q in zip(params, narrow, strict=True):
        q.grad = p.grad.float()
    optimizer.step()
    resumed.step()
    for p, q in zip(params, narrow, strict=True):
        torch.testing.assert_close(q, p.float(), rtol=1e-5, atol=1e-5)


def test_the_state_of_another_optimizer_is_refused():
    params = make_params()
    with pytest.raises(ValueError, match="SGD.*alpha, decay_without_grad, groups"):
        SGD(params, lr=0.1).load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_named_parameters_groups_and_added_groups(optimizer_class):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    named = list(model.named_parameters())
    optimizer = optimizer_class(named[:2], lr=0.1, weight_decay=0.5)
    optimizer.add_param_group({"params": named[2:], "lr": 0.01, "weight_decay": 0.0, "alpha": 0.1})
    assert optimizer.param_groups[1]["param_names"] == ["1.weight", "1.bias"]
    assert optimizer.param_groups[1]["groups"] == 8
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before[0] * 0.95)
    assert_equal([p.detach() for p in model[1].parameters()], before[2:])


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_learning_rate_schedule(optimizer_class):
    params = make_params([(4,)])
    optimizer = optimizer_class(params, lr=1.0, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for lr in (1.0, 0.5, 0.25):
        before = params[0].detach().clone()
        params[0].grad = torch.zeros(4, dtype=torch.float64)
        optimizer.step()
        schedule.step()
        assert_close([params[0].detach()], [before * (1 - lr * 0.5)])


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_closure(optimizer_class):
    p = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * torch.tensor([1.0, 2.0, 3.0])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6.0
    assert (p < 1).all()


def test_grad_scaler_skips_the_step_and_the_average():
    p = nn.Parameter(torch.ones(8))
    teacher = torch.zeros(8)
    optimizer, ema = SGD([p], lr=0.1, momentum=0.9, weight_decay=0.5, alpha=0.05), EMA([teacher], [p], 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer, ema=ema)
    scaler.update()
    assert torch.equal(p, torch.ones(8)) and torch.equal(teacher, torch.zeros(8)) and not optimizer.state
    assert scaler.get_scale() == 2.0

    expected = nn.Parameter(torch.ones(8))
    expected.grad = torch.full((8,), 3.0)
    SGD([expected], lr=0.1, momentum=0.9, weight_decay=0.5, alpha=0.05).step()
    p.grad = None
    scaler.scale((p * 3.0).sum()).backward()
    scaler.step(optimizer, ema=ema)
    scaler.update()
    assert_equal([p], [expected])
    assert_equal([teacher], [expected.detach() / 2])


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_sparse_gradients_are_refused_before_anything_moves(optimizer_class):
    dense, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    dense.grad = torch.ones(3)
    y = embedding(torch.tensor([1, 3]))
    y.backward(torch.randn_like(y))
    optimizer = optimizer_class([("dense", dense), ("embedding", embedding.weight)], lr=0.1)
    with pytest.raises(RuntimeError, match="needs dense gradients, but that of parameter embedding is torch.sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))


@pytest.mark.parametrize(
    "optimizer_class, options, message",
    [
        (SGD, {"lr": -1.0}, "lr must be a number in"),
        (SGD, {"lr": float("nan")}, "lr .* got nan"),
        (SGD, {"lr": float("inf")}, "lr .* got inf"),
        (SGD, {"lr": torch.tensor(0.1)}, "lr must be a number"),
        (SGD, {"weight_decay": -0.1}, "weight_decay .* got -0.1"),
        (SGD, {"momentum": 1.0}, r"momentum must be a number in \[0, 1.0\), got 1.0"),
        (SGD, {"momentum": "0.9"}, "momentum .* got '0.9'"),
        (SGD, {"nesterov": True}, "nesterov needs a momentum > 0"),
        (SGD, {"alpha": -0.05}, "alpha .* got -0.05"),
        (SGD, {"alpha": 0.2}, "alpha must be at most .* = 0.1429.*got 0.2"),
        (SGD, {"groups": 0}, "groups must be an integer >= 1, got 0"),
        (SGD, {"groups": 2.0}, "groups must be an integer >= 1, got 2.0"),
        (AdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] .* got 1.0"),
        (AdamW, {"betas": 0.9}, "betas must be a pair"),
        (AdamW, {"eps": -1e-8}, "eps .* got -1e-08"),
        (AdamW, {"alpha": 0.2}, "alpha must be at most"),
    ],
)
def test_bad_values_are_refused_by_name(optimizer_class, options, message):
    params = make_params([(8,)])
    with pytest.raises(ValueError, match=message):
        optimizer_class(params, **{"lr": 0.1, **options})
    optimizer = optimizer_class(params, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make_params([(2,)]), **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    set_gradients(params, seed=0)
    before = copies(params)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_equal(params, before)


def test_complex_parameters_are_refused():
    optimizer = SGD(make_params([(8,)]), lr=0.1)
    with pytest.raises(ValueError, match="floating-point tensors, got torch.complex64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.complex64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1
