"""The CUDA kernels over lists of tensors (csrc/cuda/optimizers.cu, pack.cu), run on the CPU: see conftest.py."""

from __future__ import annotations

import ctypes
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from us3l_kernels.optim import EMA, SGD, AdamW, kernels

NAN = float("nan")
SHAPES = [(20, 3, 3, 3), (16,), (10, 7), (3,), (24, 1, 3, 3), (), (1,), (17, 2, 1, 3), (2, 3, 4)]


def guarded(values: Tensor, offset: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A copy with the strides of `values` inside a larger storage of NaN, `offset` elements after 64 bytes."""
    storage = torch.full((values.numel() + 128,), NAN, dtype=dtype)
    start = (-(storage.data_ptr() // dtype.itemsize)) % (64 // dtype.itemsize) + offset
    view = storage.as_strided(values.shape, values.stride(), start)
    view.copy_(values)
    return view, storage


def untouched_outside(*pairs: tuple[Tensor, Tensor]) -> None:
    for view, storage in pairs:
        assert storage.isnan().sum() == storage.numel() - view.numel(), "written outside of a tensor"


def with_kernels_of(host, monkeypatch) -> None:
    """us3l_kernels.optim calls the host's kernels."""
    monkeypatch.setattr(kernels, "native", host.ops)


def sgd(host, params, grads, buffers, teachers, group, ema_momentum):
    names = ("lr", "momentum", "weight_decay", "nesterov", "alpha", "groups")
    host.ops.sgd_(params, grads, buffers, teachers, **{n: group[n] for n in names}, ema_momentum=ema_momentum)


def check_sgd(host, shapes, *, momentum, nesterov, teacher, groups=8, offset=0, channels_last=False):
    torch.manual_seed(0)
    alpha = 0.7 / max(1, groups - 1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    exact = [torch.randn(s, dtype=torch.float64).contiguous(memory_format=memory_format) for s in shapes]
    exact = [nn.Parameter(p) for p in exact]
    exact_teachers = [torch.randn_like(p) for p in exact]
    params, grads, buffers, teachers = (
        [guarded(like.detach(), offset) for like in tensors]
        for tensors in (exact, exact, [torch.zeros_like(p) for p in exact], exact_teachers)
    )
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.3, "nesterov": nesterov}
    optimizer = SGD(exact, **options, alpha=alpha, groups=groups)
    ema = EMA(exact_teachers, exact, 0.9)
    for _ in range(3):
        for p, (g, _storage) in zip(exact, grads, strict=True):
            g.copy_(torch.randn(p.shape))
            p.grad = g.double()
        optimizer.step(ema=ema)
        views = [[view for view, _ in pairs] for pairs in (params, grads, buffers, teachers)]
        used = [views[0], views[1], views[2] if momentum else [], views[3] if teacher else []]
        sgd(host, *used, optimizer.param_groups[0], 0.9)
    for (p, _), q in zip(params, exact, strict=True):
        torch.testing.assert_close(p, q.float(), rtol=2e-6, atol=2e-6)
    if teacher:
        for (t, _), u in zip(teachers, exact_teachers, strict=True):
            torch.testing.assert_close(t, u.float(), rtol=2e-6, atol=2e-6)
    if momentum:
        for (m, _), q in zip(buffers, exact, strict=True):
            torch.testing.assert_close(m, optimizer.state[q]["momentum_buffer"].float(), rtol=2e-6, atol=4e-6)
    untouched_outside(*params, *grads, *buffers, *teachers)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_against_float64(cuda_host, momentum, nesterov, teacher):
    check_sgd(cuda_host, SHAPES, momentum=momentum, nesterov=nesterov, teacher=teacher)


def test_sgd_of_several_chunks(cuda_host):
    """Groups that begin inside a chunk, span several and are small ones: 8 * 1100, 600 * 8 and 3 * 4096 elements."""
    shapes = [(8, 11, 10, 10), (600, 8, 1, 1), (3, 4096, 1, 1), (9001,), (100, 90)]
    check_sgd(cuda_host, shapes, momentum=0.9, nesterov=False, teacher=True)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_sgd_of_tensors_that_start_anywhere(cuda_host, offset):
    check_sgd(cuda_host, SHAPES, momentum=0.9, nesterov=False, teacher=True, offset=offset)


def test_sgd_in_channels_last(cuda_host):
    shapes = [(20, 5, 3, 3), (24, 1, 3, 3), (16, 600, 1, 1)]
    check_sgd(cuda_host, shapes, momentum=0.9, nesterov=False, teacher=True, channels_last=True)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 13), max_size=4).map(tuple), min_size=1, max_size=6),
    groups=st.integers(1, 20),
    offset=st.integers(0, 3),
)
def test_sgd_of_any_shapes(cuda_host, shapes, groups, offset):
    check_sgd(cuda_host, shapes, momentum=0.9, nesterov=True, teacher=True, groups=groups, offset=offset)


@settings(max_examples=200, deadline=None)
@given(
    begin=st.integers(0, 2**50),
    size=st.one_of(st.integers(1, 5000), st.integers(1, 2**48)),
    i=st.integers(0, 4095),
    groups=st.integers(1, 64),
)
def test_group_of_an_element_in_64_bits(cuda_host, begin, size, i, groups):
    begin -= begin % cuda_host.functions.chunk()
    group = cuda_host.functions.group_of(ctypes.c_int64(begin), ctypes.c_int64(size), i, groups)
    assert group == min((begin + i) // size, groups - 1)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_adamw_against_float64(cuda_host, channels_last, offset):
    torch.manual_seed(1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [(20, 3, 3, 3), (24, 1, 3, 3), (90, 7, 5, 5)] if channels_last else [*SHAPES, (100, 90)]
    exact = [nn.Parameter(torch.randn(s, dtype=torch.float64).contiguous(memory_format=memory_format)) for s in shapes]
    optimizer = AdamW(exact, lr=0.01, weight_decay=0.3, alpha=0.1, betas=(0.8, 0.95))
    params, grads, firsts, seconds = (
        [guarded(p.detach() * factor, offset) for p in exact] for factor in (1.0, 1.0, 0.0, 0.0)
    )
    for step in range(1, 4):
        for p, (g, _) in zip(exact, grads, strict=True):
            g.copy_(torch.randn(p.shape))
            p.grad = g.double()
        optimizer.step()
        lists = [[view for view, _ in pairs] for pairs in (params, grads, firsts, seconds)]
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        rest = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["alpha"], group["groups"])
        cuda_host.ops.adamw_(*lists, [step] * len(exact), *rest)
    for (p, _), (m, _), (v, _), q in zip(params, firsts, seconds, exact, strict=True):
        torch.testing.assert_close(p, q.float(), rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(m, optimizer.state[q]["exp_avg"].float(), rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(v, optimizer.state[q]["exp_avg_sq"].float(), rtol=4e-6, atol=4e-6)
    untouched_outside(*params, *grads, *firsts, *seconds)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_ema_against_float64(cuda_host, momentum):
    torch.manual_seed(2)
    shapes = [*SHAPES, (100, 90)]
    teachers, students = ([guarded(torch.randn(s), 0) for s in shapes] for _ in range(2))
    expected = [
        (t.double() * momentum + s.double() * (1 - momentum)).float()
        for (t, _), (s, _) in zip(teachers, students, strict=True)
    ]
    cuda_host.ops.ema_([t for t, _ in teachers], [s for s, _ in students], momentum)
    for (t, _), e in zip(teachers, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-6, atol=1e-6)
    untouched_outside(*teachers, *students)
    same = [s.clone() for s, _ in students]
    cuda_host.ops.ema_(same, [s for s, _ in students], momentum)
    for t, (s, _) in zip(same, students, strict=True):
        assert torch.equal(t, s)


@pytest.mark.parametrize("kind", ["sgd_", "adamw_", "ema_"])
def test_more_tensors_than_one_launch_takes(cuda_host, kind):
    torch.manual_seed(3)
    lists = [[torch.randn(11) for _ in range(200)] for _ in range(4)]
    alone = [[t.clone() for t in tensors] for tensors in lists]
    calls = {
        "sgd_": lambda a: cuda_host.ops.sgd_(*a, 0.1, 0.9, 0.1, False, 0.1, 8, 0.9),
        "adamw_": lambda a: cuda_host.ops.adamw_(
            *a[:3], [t.abs_() for t in a[3]], [1] * len(a[0]), 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 8
        ),
        "ema_": lambda a: cuda_host.ops.ema_(*a[:2], 0.9),
    }
    before = cuda_host.launches()
    calls[kind](lists)
    assert 2 <= cuda_host.launches() - before <= 4
    for k in range(200):
        calls[kind]([[tensors[k]] for tensors in alone])
    for together, one in zip(lists, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(together, one, strict=True))


# What an optimizer's list must be like: the changed list, and the error.
BAD_LISTS = {
    "grads are too few": (1, lambda ts: ts[:1], "grads: expected 2 tensors, one for each parameter, got 1"),
    "another dtype": (1, lambda ts: [ts[0].double(), ts[1]], r"grads\[0\]: expected a float32 tensor"),
    "another shape": (3, lambda ts: [ts[0], ts[1][:3]], r"teachers\[1\]: expected the shape of its parameter"),
    "another layout": (2, lambda ts: [ts[0].t().contiguous().t(), ts[1]], r"momentum_buffers\[0\]: expected it"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_lists_that_do_not_fit(cuda_host, case):
    position, change, message = BAD_LISTS[case]
    lists = [[torch.zeros(4, 3), torch.zeros(5)] for _ in range(4)]
    lists[position] = change(lists[position])
    with pytest.raises(RuntimeError, match=message):
        cuda_host.ops.sgd_(*lists, 0.1, 0.9, 0.1, False, 0.1, 8, 0.9)


# ---------------------------------------------------------------------------------------------- pack and scatter

# name: (full shape, active shape)
PREFIXES = {
    "3x3": ((24, 20, 3, 3), (16, 8, 3, 3)),
    "odd": ((9, 7, 3, 3), (5, 3, 3, 3)),
    "several chunks": ((40, 80, 3, 3), (33, 72, 3, 3)),
    "1x1": ((64, 24, 1, 1), (40, 16, 1, 1)),
    "1x3": ((12, 16, 1, 3), (12, 8, 1, 3)),
    "3x1": ((12, 9, 3, 1), (6, 9, 3, 1)),
    "stem": ((16, 3, 7, 7), (10, 3, 7, 7)),
    "depthwise": ((24, 1, 5, 5), (17, 1, 5, 5)),
    "linear": ((30, 48), (17, 40)),
    "vector": ((24,), (13,)),
    "one element": ((5, 5, 3, 3), (1, 1, 3, 3)),
    "whole": ((16, 16, 3, 3), (16, 16, 3, 3)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HALVES = (torch.bfloat16, torch.float16, torch.float32)


def in_layout(t: Tensor, layout: str) -> Tensor:
    return t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t


def inside(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)


def prefixes(layout: str, packed_layout: str, dtype: torch.dtype, offset: int = 0):
    """For each case: the whole tensor, NaN outside of its prefix, and a dense one of the prefix's shape, guarded."""
    wholes, packs = [], []
    for full, active in PREFIXES.values():
        whole = in_layout(torch.full(full, NAN), layout)
        whole[inside(active)] = torch.randn(active)
        wholes.append(guarded(whole, offset)[0])
        packs.append(guarded(in_layout(torch.randn(active).to(dtype), packed_layout), offset, dtype))
    return wholes, packs


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("packed_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack(cuda_host, layout, packed_layout, dtype):
    torch.manual_seed(0)
    wholes, packs = prefixes(layout, packed_layout, dtype)
    before = cuda_host.launches()
    cuda_host.ops.multi_tensor_pack(wholes, [view for view, _ in packs])
    assert cuda_host.launches() == before + 1
    for whole, (packed, _) in zip(wholes, packs, strict=True):
        assert torch.equal(packed, whole[inside(packed.shape)].to(dtype))  # rounded to nearest even, as torch does
    untouched_outside(*packs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("packed_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter_add(cuda_host, layout, packed_layout, dtype):
    torch.manual_seed(0)
    wholes, packs = prefixes(layout, packed_layout, dtype)
    expected = [whole.clone() for whole in wholes]
    for whole, (gradient, _) in zip(expected, packs, strict=True):
        whole[inside(gradient.shape)] += gradient.float()
    cuda_host.ops.multi_tensor_scatter_add([view for view, _ in packs], wholes)
    for whole, other in zip(wholes, expected, strict=True):
        torch.testing.assert_close(whole, other, rtol=0, atol=0, equal_nan=True)
    untouched_outside(*packs)


@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_that_start_anywhere(cuda_host, offset):
    torch.manual_seed(0)
    wholes, packs = prefixes("channels_last", "channels_last", torch.bfloat16, offset)
    cuda_host.ops.multi_tensor_pack(wholes, [view for view, _ in packs])
    for whole, (packed, _) in zip(wholes, packs, strict=True):
        assert torch.equal(packed, whole[inside(packed.shape)].bfloat16())
    doubled = [whole[inside(p.shape)] + p for whole, (p, _) in zip(wholes, packs, strict=True)]
    cuda_host.ops.multi_tensor_scatter_add([view for view, _ in packs], wholes)
    for whole, twice in zip(wholes, doubled, strict=True):
        assert torch.equal(whole[inside(twice.shape)], twice)
    untouched_outside(*packs)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(*(st.tuples(st.integers(1, 20), st.integers(0, 5)) for _ in range(2)), *[st.integers(1, 5)] * 2),
        min_size=1,
        max_size=4,
    ),
    layouts=st.tuples(st.sampled_from([*LAYOUTS]), st.sampled_from([*LAYOUTS])),
    order=st.integers(0, 3),
)
def test_pack_and_scatter_of_any_shapes(cuda_host, shapes, layouts, order):
    wholes, packs = [], []
    for (k, more_k), (c, more_c), kh, kw in shapes:
        wholes.append(in_layout(torch.randn(k + more_k, c + more_c, kh, kw), layouts[0]))
        packs.append(in_layout(torch.empty(k, c, kh, kw), layouts[1]))
    expected = [whole.clone() for whole in wholes]
    with cuda_host.order(order):
        cuda_host.ops.multi_tensor_pack(wholes, packs)
        cuda_host.ops.multi_tensor_scatter_add(packs, wholes)
    for whole, packed, before in zip(wholes, packs, expected, strict=True):
        assert torch.equal(packed, before[inside(packed.shape)])
        before[inside(packed.shape)] *= 2
        assert torch.equal(whole, before)


BAD_PREFIXES = {
    "lengths": ([torch.zeros(3)], [], "packed: expected 1 tensors, as many as parameters, got 0"),
    "parameter dtype": ([torch.zeros(3).double()], [torch.zeros(3)], r"parameters\[0\]: expected float32"),
    "packed dtype": ([torch.zeros(3)], [torch.zeros(3).double()], "packed: expected float32, bfloat16 or float16"),
    "mixed dtypes": (
        [torch.zeros(3)] * 2,
        [torch.zeros(3), torch.zeros(3).bfloat16()],
        r"packed\[1\]: expected the dtype of the first",
    ),
    "not a prefix": (
        [torch.zeros(3, 4)],
        [torch.zeros(3, 5)],
        r"packed\[0\]: expected a prefix of parameters, \[3, 4\], got \[3, 5\]",
    ),
    "other taps": ([torch.zeros(3, 4, 3, 3)], [torch.zeros(3, 4, 3, 2)], r"packed\[0\]: expected a prefix"),
    "taps apart": (
        [torch.zeros(3, 4, 3, 5)[..., :3]],
        [torch.zeros(3, 4, 3, 3)],
        r"parameters\[0\]: expected the last two dimensions to lie like one",
    ),
    "nothing side by side": (
        [torch.zeros(3, 4)],
        [torch.zeros(3, 8)[:, ::2]],
        r"packed\[0\]: expected channels or taps side by side",
    ),
}


@pytest.mark.parametrize("case", BAD_PREFIXES)
def test_prefixes_that_do_not_fit(cuda_host, case):
    parameters, packed, message = BAD_PREFIXES[case]
    with pytest.raises(RuntimeError, match=message):
        cuda_host.ops.multi_tensor_pack(parameters, packed)


# ---------------------------------------------------------------------------------------------- the optimizers


@pytest.mark.parametrize("kind", ["sgd_", "adamw_"])
def test_the_optimizer_hands_its_work_to_the_kernel(cuda_host, kind, monkeypatch):
    """The same steps with and without the kernels: teachers of some parameters, missing gradients, option changes."""
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(s)) for s in SHAPES]
    other = [nn.Parameter(p.detach().clone()) for p in plain]
    plain_teachers, other_teachers = ([torch.ones_like(p) for p in plain[:5]] for _ in range(2))
    steps = []
    for params, teachers in ((plain, plain_teachers), (other, other_teachers)):
        kwargs = {"lr": 0.1, "weight_decay": 0.3, "alpha": 0.1, "decay_without_grad": True}
        optimizer = SGD(params, momentum=0.9, **kwargs) if kind == "sgd_" else AdamW(params, **kwargs)
        steps.append((params, optimizer, EMA(teachers, params[:5], 0.9)))
    with_kernels_of(cuda_host, monkeypatch)
    for step in range(3):
        grads = [torch.randn_like(p) for p in plain]
        for use_kernel, (params, optimizer, ema) in enumerate(steps):
            monkeypatch.setattr(kernels, "takes", lambda *_, taken=bool(use_kernel): taken)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            params[step].grad = None
            optimizer.param_groups[0]["alpha"] = 0.1 - 0.01 * step
            before = cuda_host.launches()
            optimizer.step(ema=ema)
            assert cuda_host.launches() - before == 2 * use_kernel  # with and without teachers, or step and average
    for a, b in zip([*plain, *plain_teachers], [*other, *other_teachers], strict=True):
        torch.testing.assert_close(b, a, rtol=4e-6, atol=4e-6)


CONV = (6, 4, 3, 3)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# What goes with a contiguous vector and a filter in channels_last; the strides that are named, or None if it is taken.
STRIDES = {
    "alike": ([torch.zeros(5), channels_last(torch.zeros(CONV))], None),
    "contiguous beside channels_last": ([torch.zeros(5), torch.zeros(CONV)], r"\(36, 9, 3, 1\) for \(36, 1, 12, 4\)"),
    "with gaps": ([torch.zeros(10)[::2], channels_last(torch.zeros(CONV))], r"\(2,\) for \(1,\)"),
    "expanded": ([torch.zeros(5), torch.zeros(()).expand(CONV)], r"\(0, 0, 0, 0\) for \(36, 1, 12, 4\)"),
}


@pytest.mark.parametrize("case", STRIDES)
def test_layouts_that_a_gpu_takes(case):
    params = [torch.zeros(5), channels_last(torch.zeros(CONV))]
    tensors, strides = STRIDES[case]
    reasons = [kernels._why_not_layouts(params, others) for others in ([tensors], [params, tensors], [tensors, params])]
    if strides is None:
        assert reasons == [None] * 3
    else:
        assert all(reasons[0] == reason and re.search(strides, reason) for reason in reasons)


def test_parameters_with_gaps_are_not_taken_either():
    assert "got strides" in kernels._why_not_layouts([torch.zeros(8)[::2]], [[torch.zeros(8)[::2]]])


def test_filters_of_one_pixel_are_both():
    """Strides of dimensions of size 1 say nothing: a 1x1 convolution's gradient may have any."""
    param, other = (torch.zeros(24).as_strided((6, 4, 1, 1), strides) for strides in ((4, 1, 4, 4), (4, 1, 1, 1)))
    assert kernels._why_not_layouts([param], [[other]]) is None


# As Module.to() does it: the tensor object stays the same.
CHANGES = {
    "strides": lambda t: setattr(t, "data", t.data.contiguous()),
    "strides in the same memory": lambda t: setattr(t, "data", t.data.as_strided(CONV, (36, 9, 3, 1))),
    "dtype": lambda t: setattr(t, "data", t.data.double()),
    "dtype in the same memory": lambda t: setattr(t, "data", t.data.view(torch.int32)),
    "device": lambda t: torch.utils.swap_tensors(t, t.to("meta")),
}


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["parameter", "gradient", "buffer"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_tensor_that_changes_between_steps_is_seen(case, changed):
    params, *others = ([channels_last(torch.zeros(CONV)) for _ in range(3)] for _ in range(3))

    def taken() -> bool:
        reasons = (kernels._why_not_kinds(params, others), kernels._why_not_layouts(params, others))
        return reasons == (None, None)

    assert taken()
    CHANGES[case]((params, *others)[changed][1])
    assert not taken()
