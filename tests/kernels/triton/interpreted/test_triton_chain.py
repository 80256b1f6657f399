"""Residual blocks as one operation on Triton's kernels, interpreted: against plain PyTorch in float64; and what a block
leaves for the one that made its input."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.kernels.blocks import (
    FROZEN,
    Block,
    Case,
    Layer,
    assert_close,
    basic,
    bottleneck,
    exact,
    images,
    inverted,
    leaf,
    run,
    run_frozen,
    run_with_canary,
)
from us3l.models.layers import Layers
from us3l.models.resnet import Bottleneck, ResNet
from us3l_kernels import backend, fused, set_width, views
from us3l_kernels.triton import batch_norm


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of each block that ran as one operation."""
    seen: list[int] = []
    original = fused.pair_chain
    monkeypatch.setattr(fused, "pair_chain", lambda *args: (seen.append(len(args[2])), original(*args))[1])
    return seen


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The grid of every pass over a gradient that is only there for a norm's sums."""
    seen: list[Any] = []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            seen.append(grid)
            return original[grid]

    original = batch_norm.sums_kernel
    monkeypatch.setattr(batch_norm, "sums_kernel", Counted())
    return seen


CASES = {
    "basic": Case(24, basic(24), "x", (4, 6, 5), 2),
    "basic, odd channels": Case(7, basic(13, 2), "another", (4, 5, 6), 2),
    "bottleneck, sliced": Case(40, bottleneck(24, 40), "x", (2, 5, 6), 1, 0.6),
    "bottleneck, stride 2": Case(16, bottleneck(8, 32, 2), "another", (4, 5, 6), 2),
    "inverted": Case(16, inverted(48, 16), "x", (4, 6, 5), 2),
    "inverted, stride 2": Case(16, inverted(24, 24, 2), "none", (4, 6, 5), 2),
    "inverted, nothing expands": Case(8, inverted(8, 8)[1:], "x", (2, 5, 4), 2),
    "depthwise alone": Case(16, [Layer(None, 5, 2, "relu6")], "none", (4, 6, 5), 2),
    "1x1 alone": Case(24, [Layer(24, 1)], "x", (3, 5, 4), 3),
    "no activation": Case(16, [Layer(24, activation=None), Layer(16, activation=None)], "x", (2, 5, 6)),
    "relu6 of a sum": Case(16, [Layer(24, 3, 1, "relu6"), Layer(16, 1, 1, "relu6")], "another", (2, 5, 4)),
    "taps that phases lack": Case(16, [Layer(16, 3, (2, 1)), Layer(8, 1, 2), Layer(16)], "none", (2, 9, 9), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_against_float64(name: str, chains: list[int], passes: list[Any]) -> None:
    """Of the norms only the last one's sums take a pass."""
    case = CASES[name]
    with backend("triton"):
        block, x, residual, upstream, expected = case.drawn()
        assert_close(run(block, x, residual, upstream, case.views), expected)
    assert chains[-1] == len(case.layers) and len(passes) == 1


@pytest.mark.parametrize("kernel", [1, 3])
def test_some_convolutions_run_elsewhere(
    kernel: int, chains: list[int], passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one size. Norms in front of the others still get their sums, and the residual's gradient is added."""

    def choose(op: str, x: Tensor, weight: Tensor, **arguments: Any) -> str:
        return "aten" if weight.size(2) == kernel else "triton"

    monkeypatch.setattr(import_module("us3l_kernels.nn.conv_norm"), "choose", choose)
    with backend("triton"):
        block, x, residual, upstream, expected = Case(16, bottleneck(24, 16), "x", (4, 5, 6), 2).drawn()
        assert_close(run(block, x, residual, upstream, 2), expected)
    assert chains[-1] == 3 and len(passes) == 2


@pytest.mark.parametrize("layers", [bottleneck(24, 16), inverted(24, 16)], ids=["bottleneck", "inverted"])
def test_half_precision_is_as_good_as_the_modules(layers: list[Layer], chains: list[int]) -> None:
    block, x, _, upstream = Case(16, layers, "x", (4, 6, 5), 2).inputs()
    x = x.half()
    expected = exact(block, x, x, upstream, 2, too_close=0.0)
    assert expected is not None

    def found(spec: str) -> dict[str, float]:
        with torch.autocast("cpu", torch.float16), backend(spec):
            given = run(copy.deepcopy(block), x, x, upstream, 2)
        return {name: float((given[name].double() - e).norm() / e.norm()) for name, e in expected.items()}

    whole, apart = found("triton"), found("triton,batch_norm=aten")
    assert chains == [3]
    assert all(whole[name] <= max(1.2 * apart[name], 1e-6) for name in expected), (whole, apart)


@pytest.mark.parametrize("layers", [basic(24), inverted(48, 24)], ids=["basic", "inverted"])
def test_nothing_outside_of_the_slice(layers: list[Layer], chains: list[int]) -> None:
    with backend("triton"):
        block, x, _, upstream, expected = Case(24, layers, "x", (2, 5, 4), 1, 0.6).drawn()
        found = run_with_canary(block, x, upstream, 1)
    assert chains
    # What was added to the canary has lost digits by it.
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("frozen", FROZEN)
def test_only_what_needs_a_gradient_gets_one(frozen: str, chains: list[int]) -> None:
    with backend("triton"):
        block, x, residual, upstream, expected = Case(16, [Layer(8, 1), Layer(16)], "another", (4, 4, 5), 2).drawn()
        found = run_frozen(block, x, residual, upstream, 2, frozen)
    assert chains and len(found) < len(expected)
    assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("residual_is_x", [True, False])
def test_inputs_of_other_strides(residual_is_x: bool, chains: list[int]) -> None:
    """x is a prefix slice, the residual contiguous, and the upstream gradient one number for each image."""
    block = Block(16, basic(16))
    x = torch.full((4, 5, 6, 24), torch.nan).permute(0, 3, 1, 2)[:, :16]
    x.copy_(torch.randn(x.shape))
    residual = x if residual_is_x else torch.randn(x.shape)
    upstream = torch.randn(4, 1, 1, 1).expand(x.shape)
    expected = exact(block, x, residual, upstream, 2)
    assert expected is not None
    with backend("triton"):
        assert_close(run(block, x, residual, upstream, 2), expected)
    assert chains


# ---------------------------------------------------------------------------------------------- blocks in a row


class Blocks(nn.Module):
    """Two blocks."""

    def __init__(self, activation: str | None = "relu", residual: bool = True) -> None:
        super().__init__()
        self.one = Block(8, [Layer(16), Layer(8, 1, 1, activation)])
        self.two = Block(8, [Layer(16, 1), Layer(8, 3, 1, activation)])
        self.residual = residual

    def first(self, x: Tensor) -> Tensor:
        return self.one(x, x if self.residual else None)

    def second(self, y: Tensor) -> Tensor:
        return self.two(y, y if self.residual else None)


def gradients_of(model: Blocks, x: Tensor, upstream: Tensor, work: Callable[..., Any]) -> list[Tensor]:
    """What `work` gives, and all gradients."""
    given = leaf(x)
    results = work(model, given, upstream)
    grads = [t.grad for t in (given, *model.parameters())]
    return [t.detach().double() for t in (*(results or ()), *grads) if t is not None]


def check(model: Blocks, work: Callable[..., Any], passes: list[Any], expected_passes: int) -> None:
    """`work` on Triton's kernels against the modules in float64, and how often sums were taken in a pass."""
    x, upstream = images(2, 8, 5, 4), images(2, 8, 5, 4)
    expected = gradients_of(copy.deepcopy(model).double(), x.double(), upstream.double(), work)
    assert not passes
    with backend("triton"):
        found = gradients_of(model, x, upstream, work)
    # A gradient may be 0: that of a bias that the next norm takes away again.
    errors = [float((a - b).norm() / b.norm().clamp_min(1.0)) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5, errors
    assert len(passes) == expected_passes


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"], ids=str)
def test_the_block_behind_gives_the_sums(activation: str | None, residual: bool, passes: list[Any]) -> None:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        model.second(model.first(x)).backward(upstream)

    check(Blocks(activation, residual), work, passes, 1)


def _read_again(model: Blocks, x: Tensor, upstream: Tensor) -> None:
    y = model.first(x)
    (model.second(y) + 0.5 * y).backward(upstream)


def _read_by_another_block(model: Blocks, x: Tensor, upstream: Tensor) -> None:
    y = model.first(x)
    (model.second(y) + model.two(y)).backward(upstream)


def _read_as_a_residual(model: Blocks, x: Tensor, upstream: Tensor) -> None:
    y = model.first(x)
    model.two(model.second(y), y).backward(upstream)


def _write(grad: Tensor) -> None:
    grad.mul_(2)


def _hook(hook: Callable[[Tensor], Tensor | None]) -> Callable[..., None]:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = model.first(x)
        z = model.second(y)
        y.register_hook(hook)
        z.backward(upstream)

    return work


def _view(model: Blocks, x: Tensor, upstream: Tensor) -> None:
    model.second(model.first(x)[:, :]).backward(upstream)


def _hooks_on_saved_tensors(which: int) -> Callable[..., None]:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = x
        for i, block in enumerate((model.first, model.second)):
            if i == which:
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous().clone(), lambda t: t):
                    y = block(y)
            else:
                y = block(y)
        y.backward(upstream)

    return work


def _checkpoint(*which: int, reentrant: bool = False) -> Callable[..., None]:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = x
        for i, block in enumerate((model.first, model.second)):
            y = checkpoint(block, y, use_reentrant=reentrant) if i in which else block(y)
        y.backward(upstream)

    return work


def _create_graph(model: Blocks, x: Tensor, upstream: Tensor) -> None:
    model.second(model.first(x)).backward(upstream, create_graph=True)


INSTEAD: dict[str, tuple[Callable[..., Any], int]] = {
    # How the first block's result is used, and how many norms take their own sums. Hooks see what they would see.
    "another reader": (_read_again, 2),
    "another block": (_read_by_another_block, 3),
    "a residual": (_read_as_a_residual, 2),
    "a hook that changes the gradient": (_hook(lambda g: 2 * g), 2),
    "a hook that writes to the gradient": (_hook(_write), 2),
    "a view": (_view, 2),
    "saved tensors of the first": (_hooks_on_saved_tensors(0), 2),
    "saved tensors of the second": (_hooks_on_saved_tensors(1), 2),
    "checkpoint of the first": (_checkpoint(0), 2),
    "checkpoint of the second": (_checkpoint(1), 2),
    "checkpoints": (_checkpoint(0, 1), 2),
    "reentrant checkpoints": (_checkpoint(0, 1, reentrant=True), 2),
    "create_graph": (_create_graph, 2),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", INSTEAD)
def test_a_norm_takes_its_own_sums_where_its_gradient_is_another(name: str, passes: list[Any]) -> None:
    work, expected_passes = INSTEAD[name]
    check(Blocks(), work, passes, expected_passes)


def test_nobody_sees_a_masked_gradient(passes: list[Any]) -> None:
    """Hooks, retained and asked-for gradients of the result between the blocks are what they are without all this."""

    def work(model: Blocks, x: Tensor, upstream: Tensor) -> list[Tensor]:
        y = model.first(x)
        z = model.second(y)
        seen: list[Tensor] = []
        y.register_hook(lambda g: seen.append(g.clone()))
        y.retain_grad()
        (asked_for,) = torch.autograd.grad(z, y, upstream, retain_graph=True)
        z.backward(upstream)
        assert y.grad is not None
        return [asked_for, *seen, y.grad]

    check(Blocks(), work, passes, 2)  # of the second block alone, twice


def test_writes_that_torch_does_not_count(passes: list[Any]) -> None:
    """By a hook of the result, and to a gradient that was asked for in another backward."""

    def double(grad: Tensor) -> None:
        grad.data.mul_(2)

    def by_hook(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = model.first(x)
        y.register_hook(double)
        model.second(y).backward(upstream)

    def in_another_backward(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = model.first(x)
        (grad,) = torch.autograd.grad(model.second(y), y, upstream, retain_graph=True)
        grad.data.mul_(2)
        y.backward(grad)

    check(Blocks(), by_hook, passes, 2)
    passes.clear()
    check(Blocks(), in_another_backward, passes, 2)


def test_backward_twice(passes: list[Any]) -> None:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        z = model.second(model.first(x))
        z.backward(upstream, retain_graph=True)
        z.backward(2 * upstream)

    check(Blocks(), work, passes, 2)


def test_a_producer_that_has_run_already(passes: list[Any]) -> None:
    """What it saved is freed: the gradient of its result may still be asked for."""

    def work(model: Blocks, x: Tensor, upstream: Tensor) -> list[Tensor]:
        y = model.first(x)
        z = model.second(y)
        y.backward(upstream)
        return list(torch.autograd.grad(z, y, upstream))

    check(Blocks(), work, passes, 2)


def test_a_producer_of_another_thread(passes: list[Any]) -> None:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(model.first(x)))
        thread.start()
        thread.join()
        model.second(results[0]).backward(upstream)

    check(Blocks(), work, passes, 1)


def test_two_backwards_of_one_graph_at_a_time(passes: list[Any]) -> None:
    """One waits in the middle for the other: what was left for it is not what the other left."""

    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = model.first(x)
        z = model.second(y)
        once: list[None] = []

        def hook(grad: Tensor) -> None:
            if not once:
                once.append(None)
                thread = threading.Thread(target=lambda: z.backward(3 * upstream, retain_graph=True))
                thread.start()
                thread.join()

        y.register_hook(hook)
        z.backward(upstream, retain_graph=True)

    check(Blocks(), work, passes, 3)


def test_results_that_change_in_place(passes: list[Any]) -> None:
    def work(model: Blocks, x: Tensor, upstream: Tensor) -> None:
        y = model.first(x)
        y.add_(1)
        model.second(y).backward(upstream)

    check(Blocks(None, residual=False), work, passes, 2)


def test_a_result_of_a_sum_must_not_change() -> None:
    model, x = Blocks(), leaf(images(2, 8, 5, 4))
    with backend("triton"):
        y = model.first(x)
        z = model.second(y)
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_nothing_is_kept_after_backward() -> None:
    model, x = Blocks(), leaf(images(2, 8, 5, 4))
    with backend("triton"):
        y = model.first(x)
        z = model.second(y)
        left: list[Any] = []
        y.register_hook(lambda grad: left.append(y.grad_fn.known))
        z.backward(torch.ones_like(z))
    assert left[0] is not None and y.grad_fn.known is None


def test_a_network(chains: list[int], passes: list[Any]) -> None:
    """Of 15 norms five take their own sums: the last, those of two shortcuts, and two whose results a shortcut reads,
    too."""
    network = ResNet(Bottleneck, [2, 2], Layers(), stem="small", base_channels=8)
    network.to(memory_format=torch.channels_last)
    set_width(network, 0.5)
    x, upstream = images(4, 3, 12, 12), torch.randn(4, 32)

    def found(model: nn.Module, spec: str, dtype: torch.dtype) -> list[Tensor]:
        with backend(spec), views(2):
            y = model(x.to(dtype))
        y.backward(upstream.to(dtype))
        return [y.detach(), *(p.grad for p in model.parameters())]

    expected = found(copy.deepcopy(network).double(), "aten", torch.float64)
    errors = [
        float((a.double() - e).norm() / e.norm().clamp_min(0.1))
        for a, e in zip(found(network, "triton", torch.float32), expected, strict=True)
    ]
    assert max(errors) < 1e-5, errors
    assert sorted(chains) == [1, 1, 1, 3, 3, 3, 3] and len(passes) == 5
