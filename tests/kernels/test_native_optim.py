"""The optimizers' kernels for the CPU: against float64, in every layout, with every instruction set; who takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from us3l_kernels import _native
from us3l_kernels.optim import EMA, SGD, AdamW, kernels

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native = torch.ops.us3l_native
SHAPES = [(20, 3, 3, 3), (16,), (10, 7), (3,), (24, 1, 3, 3), (), (1,), (17, 2, 1, 3), (2, 3, 4), (0, 5), (11, 50)]
PADDING = 5  # elements on either side that nothing may touch

Layout = Callable[[tuple[int, ...]], Tensor]


def permuted(*order: int) -> Layout:
    """Dense memory whose dimensions lie in this order, outermost first; tensors of other ranks are contiguous."""

    def empty(shape: tuple[int, ...]) -> Tensor:
        if len(shape) != len(order):
            return torch.empty(shape)
        return torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])

    return empty


def spread(shape: tuple[int, ...]) -> Tensor:
    """A prefix slice of a tensor with more columns: there are gaps."""
    return torch.empty(*shape[:-1], shape[-1] + 3)[..., : shape[-1]] if shape else torch.empty(())


LAYOUTS: dict[str, Layout] = {
    "contiguous": torch.empty,
    "channels_last": permuted(0, 2, 3, 1),
    "rows innermost": permuted(1, 2, 3, 0),
    "transposed": permuted(1, 0),
    "gaps": spread,
}


def placed(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The values in float32 and in that layout, inside a larger storage of NaN."""
    strides = layout(tuple(values.shape)).stride()
    size = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
    storage = torch.full((size + 2 * PADDING,), float("nan"))
    view = storage.as_strided(values.shape, strides, PADDING)
    view.copy_(values)
    return view, storage


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(kind: str, params: list[Tensor], alpha: float, groups: int, **options: object) -> SGD | AdamW:
    decay = {"weight_decay": 0.3, "alpha": alpha, "groups": groups}
    return SGD(params, 0.1, **decay, **options) if kind == "sgd" else AdamW(params, 0.1, **decay, **options)  # type: ignore[arg-type]


def check(
    kind: str,
    shapes: list[tuple[int, ...]],
    *,
    layout: str = "contiguous",
    grad_layout: str | None = None,
    groups: int = 8,
    alpha: float | None = None,
    steps: int = 3,
    **options: object,
) -> None:
    """The same steps in float32 by the kernels and in float64 by foreach, with a teacher of every second parameter."""
    alpha = 0.7 / max(1, groups - 1) if alpha is None else alpha
    exact = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    exact_teachers = [torch.randn_like(p) for p in exact[::2]]
    ours, storages = [], []
    for values in (*exact, *exact_teachers):
        view, storage = placed(values.detach(), LAYOUTS[layout])
        ours.append(view)
        storages.append((storage, int(storage.isnan().sum())))
    params, teachers = [nn.Parameter(p) for p in ours[: len(exact)]], ours[len(exact) :]
    optimizers = [make(kind, p, alpha, groups, **options) for p in (params, exact)]
    averages = [EMA(t, p[::2], 0.9) for t, p in ((teachers, params), (exact_teachers, exact))]
    for step in range(steps):
        for index, (p, q) in enumerate(zip(params, exact, strict=True)):
            skipped = step == 1 and index % 3 == 0  # the steps of AdamW's parameters differ from then on
            grad, _ = placed(torch.randn(p.shape), LAYOUTS[grad_layout or layout])
            p.grad, q.grad = (None, None) if skipped else (grad, grad.double())
        before = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        for optimizer, average in zip(optimizers, averages, strict=True):
            optimizer.step(ema=average)
        assert all(torch.equal(a, b) for a, b in before), "a gradient was written"
    for actual, expected in zip((*params, *teachers), (*exact, *exact_teachers), strict=True):
        torch.testing.assert_close(actual.data, expected.data.float(), rtol=2e-6, atol=3e-6)
    for p, q in zip(params, exact, strict=True):
        for name, value in optimizers[1].state[q].items():
            torch.testing.assert_close(optimizers[0].state[p][name], value.float(), rtol=2e-6, atol=4e-6)
    for storage, unused in storages:
        assert storage.isnan().sum() == unused, "written outside of a tensor"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that were called for float32."""
    names: set[str] = set()
    for name in ("sgd_", "adamw_", "ema_"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, kernel=kernel: (names.add(name), kernel(*a)))
    return names


@pytest.mark.parametrize("alpha", [None, 0.0])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(momentum: float, nesterov: bool, alpha: float | None, used: set[str]) -> None:
    check("sgd", SHAPES, alpha=alpha, momentum=momentum, nesterov=nesterov)
    assert used == {"sgd_", "ema_"}  # ema_: for the parameters without a gradient


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_adamw(alpha: float | None, used: set[str]) -> None:
    check("adamw", SHAPES, alpha=alpha, betas=(0.8, 0.95), eps=1e-3)
    check("adamw", SHAPES, alpha=alpha, betas=(0.3, 0.95), eps=1e-3)  # a first moment nearer to the gradient
    assert used == {"adamw_", "ema_"}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(kind: str, layout: str, grad_layout: str) -> None:
    options: dict[str, object] = {"momentum": 0.9} if kind == "sgd" else {"eps": 1e-3}
    check(kind, [(20, 5, 3, 3), (17, 10), (9,), (2, 3, 4)], layout=layout, grad_layout=grad_layout, **options)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["sgd", "adamw"]),
    shapes=st.lists(st.lists(st.integers(0, 13), max_size=4).map(tuple), min_size=1, max_size=6),
    groups=st.integers(1, 20),
    layout=st.sampled_from(list(LAYOUTS)),
    grad_layout=st.sampled_from(list(LAYOUTS)),
)
def test_any_shapes(kind: str, shapes: list[tuple[int, ...]], groups: int, layout: str, grad_layout: str) -> None:
    options: dict[str, object] = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {"eps": 1e-3}
    check(kind, shapes, groups=groups, layout=layout, grad_layout=grad_layout, **options)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_threads_do_not_change_a_bit(kind: str) -> None:
    """Tensors that begin and end inside a thread's part, and parts that begin inside of groups."""
    shapes = [(40, 101, 3, 3), (7,), (70001,), (3,), (301, 207), (64, 33, 5, 5)]
    start, grads = ([torch.randn(s) for s in shapes] for _ in range(2))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [nn.Parameter(p.clone()) for p in start]
        teachers = [torch.ones_like(p) for p in params]
        optimizer = make(kind, params, 0.1, 8)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        EMA(teachers, params, 0.9).update()
        results.append([*params, *teachers])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_ema(momentum: float) -> None:
    teachers, students = ([torch.randn(s) * 10 for s in SHAPES] for _ in range(2))
    exact = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(teachers, students, strict=True)]
    native.ema_(teachers, students, momentum)
    tolerance = 2e-6 if 0 < momentum < 1 else 0
    for t, e in zip(teachers, exact, strict=True):
        torch.testing.assert_close(t, e.float(), rtol=tolerance, atol=tolerance)


def test_writes_are_counted() -> None:
    params = [nn.Parameter(torch.ones(4))]
    teacher = torch.zeros(4)
    params[0].grad = torch.ones(4)
    for kind in ("sgd", "adamw"):
        versions = params[0]._version, teacher._version
        make(kind, params, 0.0, 8).step(ema=EMA([teacher], params, 0.5))
        assert params[0]._version > versions[0] and teacher._version > versions[1]


def test_the_log_says_why_not(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(*params: Tensor) -> str:
        for p in params:
            p.grad = torch.ones_like(p)
        caplog.clear()
        SGD(params, 0.1).step()
        return caplog.text

    with caplog.at_level(logging.DEBUG, "us3l_kernels"):
        assert reason(nn.Parameter(torch.ones(3))) == ""
        one_double = reason(nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).double()))
        assert "sgd_: not on a native kernel: it takes float32 tensors on one device, got torch.float64" in one_double
        assert "there is none for tensors on meta" in reason(nn.Parameter(torch.ones(3, device="meta")))
        monkeypatch.setattr(_native, "load", lambda: None)
        assert "the compiled library is not there" in reason(nn.Parameter(torch.ones(3)))


SGD_OPTIONS = (0.1, 0.0, 0.1, False, 0.1, 8, 0.9)  # lr, momentum, weight_decay, nesterov, alpha, groups, ema_momentum
ADAMW_OPTIONS = (0.1, 0.9, 0.9, 0.0, 0.0, 0.0, 8)  # lr, betas, eps, weight_decay, alpha, groups


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: native.sgd_(p, [], [], [], *SGD_OPTIONS), "sgd_: grads: expected 1, got 0"),
        (lambda p: native.sgd_(p, p, p, [], *SGD_OPTIONS), "momentum_buffers: expected none"),
        (lambda p: native.sgd_(p, p, [], [], 0.1, 0.9, *SGD_OPTIONS[2:]), "momentum_buffers: expected one"),
        (lambda p: native.sgd_(p, p, [], p * 2, *SGD_OPTIONS), "teachers: expected one for each of 1"),
        (lambda p: native.sgd_(p, p, [], [], *SGD_OPTIONS[:-2], 0, 0.9), "groups: expected at least 1, got 0"),
        (lambda p: native.adamw_(p, p, p, p, [], *ADAMW_OPTIONS), "steps: expected 1 each, got 1, 1, 1 and 0"),
        (lambda p: native.adamw_(p, p, p, p, [0], *ADAMW_OPTIONS), "steps: expected at least 1, got 0"),
        (lambda p: native.ema_(p, [], 0.9), "students: expected 1, got 0"),
        (lambda p: native.ema_(p, [torch.ones(4)], 0.9), "students.0.: expected the shape of its parameter"),
        (lambda p: native.ema_(p, [torch.ones(3).double()], 0.9), "students.0.: expected a float32 tensor on the CPU"),
    ],
)
def test_bad_input(call: Callable[[list[Tensor]], None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call([torch.ones(3)])
