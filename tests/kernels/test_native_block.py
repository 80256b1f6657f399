"""Residual blocks as one operation: against plain PyTorch in float64, and when their modules are called instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import us3l_kernels
from tests.kernels.blocks import (
    BENDS,
    FROZEN,
    NAN,
    Block,
    Case,
    Layer,
    assert_close,
    basic,
    bottleneck,
    exact,
    gathered,
    images,
    inverted,
    leaf,
    run,
    run_frozen,
    run_with_canary,
)
from us3l_kernels import _native, fused, gradients, tune, views
from us3l_kernels.backends.native import in_pairs
from us3l_kernels.errors import BackendError
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, calibrating, residual_block

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

@pytest.fixture(autouse=True)
def _native_kernels() -> Iterator[None]:
    """Whatever `auto` would take on this machine; and the number of threads as it was."""
    before = torch.get_num_threads()
    with us3l_kernels.backend("native"):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each block that ran as one operation."""
    seen: list[int] = []

    def counted(x: Tensor, residual: Tensor | None, layers: Any, n_views: int) -> Tensor:
        seen.append(len(layers))
        return original(x, residual, layers, n_views)

    original = fused.conv_chain
    monkeypatch.setattr(fused, "conv_chain", counted)
    return seen


# ---------------------------------------------------------------------------------------------- results

CASES = {
    "basic": Case(24, basic(24), "x", (4, 8, 8), 2),
    "basic, sliced": Case(40, basic(40), "x", (4, 9, 7), 1, 0.6),
    "basic, narrow": Case(64, basic(64), "x", (2, 32, 32), 2, 0.25),
    "basic, odd channels": Case(17, basic(33, 2), "another", (6, 11, 5), 3),
    "basic, few tiles of many channels": Case(200, basic(200), "x", (4, 4, 4), 2),
    "basic, more channels": Case(16, basic(24), "another", (3, 13, 6), 3),
    "basic, stride 2, transformed": Case(32, basic(40, 2), "another", (8, 21, 18), 2),
    "basic, one pixel in the end": Case(16, basic(16, 2), "another", (8, 2, 2), 2),
    "basic, one row": Case(24, basic(24), "x", (2, 1, 40)),
    "bottleneck": Case(64, bottleneck(16, 64), "x", (4, 9, 7), 2),
    "bottleneck, sliced": Case(80, bottleneck(40, 80), "x", (4, 12, 9), 2, 0.6),
    "bottleneck, stride 2": Case(32, bottleneck(24, 64, 2), "another", (6, 9, 12), 3),
    "bottleneck, stride 2, narrow": Case(64, bottleneck(64, 128, 2), "another", (4, 16, 16), 1, 0.25),
    "bottleneck, too wide": Case(296, bottleneck(232, 296), "x", (4, 7, 7), 2),
    "bottleneck, few pixels": Case(32, bottleneck(16, 32), "x", (2, 4, 4), 2),
    "bottleneck, odd channels": Case(33, bottleneck(17, 33), "x", (3, 8, 7)),
    "inverted": Case(24, inverted(72, 24), "x", (4, 10, 9), 2),
    "inverted, sliced": Case(40, inverted(120, 40), "x", (6, 7, 9), 3, 0.6),
    "inverted, narrow": Case(64, inverted(128, 96), "none", (4, 10, 10), 2, 0.25),
    "inverted, stride 2": Case(24, inverted(72, 32, 2), "none", (4, 11, 13), 2),
    "inverted, nothing expands": Case(32, inverted(32, 16)[1:], "none", (4, 11, 10)),
    "inverted, nothing expands, residual": Case(16, inverted(16, 16)[1:], "x", (4, 9, 10), 2),
    "inverted, odd channels": Case(17, inverted(33, 17), "x", (3, 9, 9)),
    "inverted, few pixels": Case(160, inverted(480, 160), "x", (4, 4, 4), 2),
    "inverted, 5x5": Case(16, inverted(48, 24, 1, 5), "none", (3, 9, 11)),
    "inverted, 5x5, stride 2": Case(16, inverted(48, 24, 2, 5), "another", (4, 10, 7), 2),
    "in strips": Case(8, [Layer(96, 1, 1, None), Layer(None, 3, 1, "relu6"), Layer(8, 1)], "x", (1, 40, 40)),
    "in strips, stride 2": Case(8, [Layer(96, 1), Layer(None, 3, 2, None), Layer(8, 1)], "none", (2, 37, 41), 2),
    "in strips, 5x5": Case(8, [Layer(96, 1, 1, None), Layer(None, 5, 2), Layer(8, 1)], "none", (1, 64, 64)),
    "a strip is a row": Case(8, [Layer(56, 1), Layer(None, 5)], "none", (1, 6, 330)),
    "depthwise alone": Case(24, [Layer(None)], "x", (3, 9, 7), 3),
    "depthwise alone, no activation": Case(24, [Layer(None, activation=None)], "x", (2, 9, 7)),
    "depthwise, uneven": Case(24, [Layer(24, 1), Layer(None, 3, (2, 1), "relu6", (0, 2))], "another", (3, 9, 7)),
    "depthwise, stride beyond kernel": Case(16, [Layer(None, 1, 3), Layer(16, 1)], "none", (3, 9, 7)),
    "depthwise, padding beyond kernel": Case(16, [Layer(16, 1), Layer(None, 1, 2, "relu", 3)], "none", (3, 5, 7)),
    "1x1 alone": Case(24, [Layer(24, 1)], "x", (3, 9, 7), 3),
    "1x1 alone, no activation": Case(24, [Layer(24, 1, 1, None)], "x", (3, 9, 7)),
    "1x1, stride 2": Case(24, [Layer(40, 1, 2), Layer(24, 1)], "none", (3, 9, 11)),
    "1x1, padded": Case(16, [Layer(24, 1), Layer(16, 1, 1, "relu6", 1)], "another", (3, 6, 7)),
    "1x1 behind no activation": Case(16, [Layer(24, 1, 1, None), Layer(16, 1)], "x", (2, 9, 7)),
    "3x3 alone": Case(16, [Layer(16)], "x", (4, 9, 7), 2),
    "3x3 alone, no activation": Case(16, [Layer(16, activation=None)], "x", (4, 9, 7), 2),
    "3x3 and relu6": Case(16, [Layer(16, 3, 1, "relu6"), Layer(24), Layer(16, 3, 1, "relu6")], "x", (4, 7, 9)),
    "3x3 and no activation": Case(16, [Layer(24, activation=None), Layer(16, activation=None)], "x", (4, 9, 7), 2),
    "3x3, uneven": Case(16, [Layer(24, 3, (2, 1)), Layer(16, 3, 1, "relu6", (0, 2))], "another", (3, 9, 7)),
    "3x3, few channels": Case(3, [Layer(5), Layer(7), Layer(1)], "none", (3, 6, 7)),
    "all kinds": Case(16, [Layer(24), Layer(32, 1), Layer(), Layer(40, 3, 2), Layer(16, 5)], "none", (4, 13, 12), 2),
}


def check(case: Case, threads: tuple[int, ...] = (1, 2, 3), least: float = 1e-30) -> None:
    """Right, and the same bits again."""
    block, x, residual, upstream, expected = case.drawn()
    before = [t.clone() for t in (x, upstream) if t is not None]
    for count in threads:
        torch.set_num_threads(count)
        model = copy.deepcopy(block)
        if count == 2:
            model.to(memory_format=torch.contiguous_format)
        first, second = (run(copy.deepcopy(model), x, residual, upstream, case.views) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert_close(first, expected, least=least)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, upstream), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_blocks_against_float64(name: str, chains: list[int]) -> None:
    check(CASES[name])
    assert chains and set(chains) == {len(CASES[name].layers)}


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    channels = first = draw(st.integers(1, 48))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.none() | st.integers(1, 48) | st.just(channels))
        pair = st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3))
        # The norm takes the size of a single weight away: its gradient is 0, and what comes is rounding.
        kernel = draw(st.sampled_from([3, 5] if (out is None or channels == 1) else [1, 3, 5]))
        padding = draw(st.none() | st.integers(0, 3) | st.tuples(st.integers(0, 3), st.integers(0, 3)))
        activation = draw(st.sampled_from(list(BENDS)))
        layers.append(Layer(out, kernel, draw(st.just(1) | pair), activation, padding))
        channels = out or channels
    n_views = draw(st.integers(1, 3))
    size = (n_views * draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    residual = draw(st.sampled_from(["none", "another", "x"]))
    return Case(first, layers, residual, size, n_views, draw(st.sampled_from([1.0, 0.6, 0.25])), eps=0.1)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases(), threads=st.integers(1, 4), seed=st.integers(0, 3))
def test_any_chain(case: Case, threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    try:
        block, x, residual, _ = case.inputs()
        with views(case.views):
            shape = block(x).shape
    except (ValueError, BackendError):  # the modules': an image smaller than the kernel, one value to a channel
        assume(False)
    assume(residual is None or residual.shape == shape)
    # Of two values in a channel, both are 1 or -1 but for eps, and gradients are differences of nearly equal numbers.
    assume(shape.numel() // shape[1] // case.views >= 8)
    check(case, (threads,), least=1.0)


KINDS = {"basic": basic(48), "bottleneck": bottleneck(32, 48), "inverted": inverted(96, 48)}


@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
def test_nothing_outside_of_the_slice(layers: list[Layer], chains: list[int]) -> None:
    block, x, residual, upstream, expected = Case(48, layers, "x", (4, 8, 8), 2, 0.5).drawn()
    found = run_with_canary(block, x, upstream, 2)
    assert chains
    # What was added to the canary has lost digits by it.
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("residual_is_x", [True, False])
@pytest.mark.parametrize("layers", [*KINDS.values(), inverted(48, 48)[1:]], ids=[*KINDS, "depthwise first"])
def test_inputs_of_other_strides(layers: list[Layer], residual_is_x: bool, chains: list[int]) -> None:
    """x is a prefix slice, the residual contiguous, and the upstream gradient one number for each image."""
    for _ in range(50):
        block = Block(48, layers)
        x = torch.full((4, 7, 9, 72), NAN).permute(0, 3, 1, 2)[:, :48]
        x.copy_(torch.randn(x.shape))
        assert not x.is_contiguous(memory_format=torch.channels_last)
        residual = x if residual_is_x else torch.randn(x.shape)
        upstream = torch.randn(4, 1, 1, 1).expand(x.shape)
        if (expected := exact(block, x, residual, upstream, 2)) is not None:
            break
    assert_close(run(block, x, residual, upstream, 2), expected)
    assert chains


@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_only_what_needs_a_gradient_gets_one(layers: list[Layer], frozen: str, chains: list[int]) -> None:
    block, x, residual, upstream, expected = Case(48, layers, "another", (4, 7, 6), 2).drawn()
    found = run_frozen(block, x, residual, upstream, 2, frozen)
    assert chains and len(found) < len(expected)
    assert_close(found, {name: expected[name] for name in found})


def test_without_gradients_the_result_is_the_same(chains: list[int]) -> None:
    block, x, residual, _ = CASES["inverted"].inputs()
    chains.clear()
    with torch.no_grad():
        alone = block(x, residual)
    assert not alone.requires_grad and torch.equal(alone, block(x, residual)) and len(chains) == 2


@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
def test_bfloat16_is_as_good_as_the_modules(layers: list[Layer], chains: list[int]) -> None:
    block, x, _, upstream = Case(48, layers, "x", (8, 12, 12), 2).inputs()
    x = x.bfloat16()
    expected = exact(block, x, x, upstream, 2, too_close=0.0)
    assert expected is not None
    chains.clear()

    def found() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            given = run(copy.deepcopy(block), x, x, upstream, 2)
        return {name: float((given[name].double() - e).norm() / e.norm()) for name, e in expected.items()}

    whole = found()
    # Products of bfloat16 need an instruction for pairs; those of the other two kinds are float32's.
    has_products = any(layer.kernel == 1 for layer in layers)
    assert len(chains) == (not has_products or in_pairs(x, block.body[0].weight, 48, 1))
    block.body[-1].register_forward_hook(lambda *_: None)
    apart = found()
    assert all(whole[name] <= max(1.1 * apart[name], 1e-6) for name in expected), (whole, apart)


# ---------------------------------------------------------------------------------------------- when modules are called


def _hook(of: int, kind: str) -> Callable[[Block], None]:
    return lambda block: getattr(block.body[of], f"register_{kind}")(lambda *_: None)


def _evaluate(block: Block) -> None:
    with calibrating(block), torch.no_grad():
        block(images(4, 24, 9, 7))
    block.eval()


def _track(block: Block) -> None:
    block.body[1] = SlicedBatchNorm2d(48, activation="relu")


def _synchronise(block: Block) -> None:
    block.body[3].sync = True


def _without_parameters(block: Block) -> None:
    block.body[3] = SlicedBatchNorm2d(48, affine=False, track_running_stats=False)


def _another_norm(block: Block) -> None:
    block.body[3] = nn.BatchNorm2d(48, track_running_stats=False)


def _convolution(**changes: Any) -> Callable[[Block], None]:
    def change(block: Block) -> None:
        arguments: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False, **changes}
        block.body[2] = SlicedConv2d(48, 48, **arguments).to(memory_format=torch.channels_last)

    return change


INSTEAD: dict[str, Callable[[Block], Any]] = {
    "hook on a convolution": _hook(2, "forward_hook"),
    "hook before a convolution": _hook(0, "forward_pre_hook"),
    "hook on a norm": _hook(1, "forward_hook"),
    "hook on a norm's gradient": _hook(3, "full_backward_hook"),
    "evaluation": _evaluate,
    "running statistics": _track,
    "synchronised": _synchronise,
    "norm without parameters": _without_parameters,
    "another norm": _another_norm,
    "double": lambda block: block.double(),
    "groups": _convolution(groups=4),
    "bias": _convolution(bias=True),
    "dilation": _convolution(dilation=2, padding=2),
    "padding by name": _convolution(padding="same"),
    "reflected": _convolution(padding_mode="reflect"),
}


def one_by_one(block: Block, x: Tensor, residual: Tensor | None = None) -> Tensor:
    *first, (last_conv, last_norm) = block.pairs()
    for conv, norm in first:
        x = norm(conv(x))
    return last_norm(last_conv(x)) if residual is None else last_norm(last_conv(x), residual)


@pytest.mark.parametrize("change", INSTEAD.values(), ids=INSTEAD)
def test_the_modules_are_called_when_more_is_asked_of_them(
    change: Callable[[Block], Any], chains: list[int]
) -> None:
    block = Block(24, [Layer(48, 1), Layer(48, activation=None)])
    change(block)
    chains.clear()
    x = images(4, 24, 9, 7).to(block.body[0].weight.dtype)
    with us3l_kernels.backend("auto"):
        y = block(x)
        assert not chains and torch.equal(y, one_by_one(block, x))


@pytest.mark.parametrize("spec", ["aten", "conv2d=aten", "batch_norm=reference"])
def test_another_backend_calls_the_modules(spec: str, chains: list[int]) -> None:
    block, x, residual, _ = CASES["bottleneck"].inputs()
    chains.clear()
    with us3l_kernels.backend(spec):
        assert torch.equal(block(x, residual), one_by_one(block, x, residual))
    assert not chains


def test_a_mix_of_dtypes_is_the_modules(chains: list[int]) -> None:
    block, x, _, _ = CASES["basic"].inputs()
    chains.clear()
    with us3l_kernels.backend("auto"):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block(x), one_by_one(block, x))
        with pytest.raises(ValueError, match="residual: expected shape, dtype and device of x"):
            block(x, x.double())
    assert not chains


def test_a_compiled_model_calls_the_modules(chains: list[int]) -> None:
    block, x, residual, _ = CASES["bottleneck"].inputs()
    chains.clear()
    with us3l_kernels.backend("auto"):
        y = torch.compile(block, backend="eager", fullgraph=True)(x, residual)
        assert not chains and torch.equal(y, one_by_one(block, x, residual))


def test_the_tuner_sees_the_operations(chains: list[int]) -> None:
    block, x, residual, _ = CASES["inverted"].inputs()
    chains.clear()
    with us3l_kernels.backend("auto"):
        calls = tune.record(block, x, residual)
    assert not chains
    assert {call[0] for call, _ in calls} == {"conv2d", "batch_norm"}


class Seen(TorchDispatchMode):
    """The names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operations(chains: list[int]) -> None:
    block, x, residual, _ = CASES["bottleneck"].inputs()
    chains.clear()
    with Seen() as seen:
        block(x, residual)
    assert not chains and {"us3l::conv2d", "us3l::batch_norm"} <= seen.names


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
def test_tracers_and_fake_tensors_see_the_modules(layers: list[Layer], chains: list[int]) -> None:
    block, x, residual, _ = Case(48, layers, "another", (4, 8, 8), 1).inputs()
    chains.clear()
    traced = torch.jit.trace(block, (x, residual), check_trace=False)
    assert torch.equal(traced(x, residual), one_by_one(block, x, residual))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = block(mode.from_tensor(x), mode.from_tensor(residual))
    assert fake.shape == residual.shape and not chains


@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
def test_hooks_on_saved_tensors(layers: list[Layer], strides: torch.memory_format, chains: list[int]) -> None:
    """What they hand back is what the backward computes with, whatever its strides."""

    def packed(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=strides if t.dim() == 4 else torch.contiguous_format)

    block, x, residual, upstream, expected = Case(48, layers, "x", (4, 8, 8), 2).drawn()
    given = leaf(x)
    with views(2), torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        y = block(given, given)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    chains_before = list(chains)
    y.backward(upstream)
    assert chains_before
    assert_close(gathered(y, given, given, list(block.parameters())), expected, 1e-5)


def test_a_result_that_the_backward_does_not_need_may_change(chains: list[int]) -> None:
    block, x, residual, upstream, expected = Case(48, KINDS["inverted"], "x", (4, 8, 8), 2).drawn()
    given = leaf(x)
    with views(2):
        y = block(given, given)
    y.add_(1)
    y.backward(upstream)
    given_back = gathered(y - 1, given, given, list(block.parameters()))
    assert chains
    assert_close(given_back, expected, 1e-5)


def test_calibrated_statistics_are_forgotten_in_training(chains: list[int]) -> None:
    block = Block(24, basic(24))
    _evaluate(block)
    assert all(norm.calibrated for _, norm in block.pairs())
    block.train()(images(4, 24, 9, 7))
    assert chains and not any(norm.calibrated for _, norm in block.pairs())


# ---------------------------------------------------------------------------------------------- errors


def test_twice_differentiating_says_so() -> None:
    block, x, _, _ = CASES["bottleneck"].inputs()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(block(x), x, torch.randn(x.shape), create_graph=True)
    with pytest.raises(RuntimeError, match="conv_chain has first derivatives only"):
        gradient.sum().backward()


def test_data_parallel_is_refused_when_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _, _ = CASES["bottleneck"].inputs()
    gradients.attach(block)
    active = classmethod(lambda cls: object())
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "_get_active_ddp_module", active)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        block(x)


def test_modules_come_in_pairs() -> None:
    block, x, _, _ = CASES["basic"].inputs()
    for modules in ([], block.body[:3]):
        with pytest.raises(ValueError, match=f"a norm behind each convolution, got {len(modules)} modules"):
            residual_block(x, None, *modules)


BAD: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor | None]], int]] = {
    "too many channels": (lambda x: (images(4, 25, 8, 8), None), 1),
    "views that do not divide the batch": (lambda x: (x, None), 3),
    "one value to a channel": (lambda x: (x[:2, :, :1, :1], None), 2),
    "residual of another shape": (lambda x: (x, x[:, :, 1:]), 1),
    "residual of other channels": (lambda x: (x, x[:, 1:]), 1),
    "not images": (lambda x: (x[0, 0], None), 1),
}


@pytest.mark.parametrize(("given", "n_views"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_as_the_modules_refuse_it(given: Callable[[Tensor], Any], n_views: int) -> None:
    block, x, _, _ = CASES["basic"].inputs()
    messages = []
    for call in (block, lambda *inputs: one_by_one(block, *inputs)):
        with views(n_views), pytest.raises(ValueError) as error:
            call(*given(x))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_an_image_smaller_than_the_kernel_is_refused() -> None:
    block = Block(16, [Layer(16), Layer(16, 5, 1, "relu", 0)])
    with pytest.raises(ValueError, match="expected at least 5 pixels in dimension 2"):
        block(images(2, 16, 3, 8))


def arguments(**changes: Any) -> dict[str, Any]:
    """Of the operation itself, for a 3x3 convolution."""
    parameters = [torch.randn(16, 16, 3, 3), torch.ones(16), torch.zeros(16)]
    given = {"x": images(4, 16, 8, 8), "residual": None, "parameters": parameters, "filters": [None]}
    return {**given, "sizes": [1, 16, 1, 1, 1, 1, 1], "eps": [1e-5], "views": 1, **changes}


def parameters_of(**changes: Tensor) -> dict[str, Any]:
    given = {"weight": torch.randn(16, 16, 3, 3), "norm_weight": torch.ones(16), "norm_bias": torch.zeros(16)}
    return {"parameters": list({**given, **changes}.values())}


DIRECT: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"eps": []}, "expected 3, 1 and 7 for each of the 0 eps"),
    "a parameter is missing": ({"parameters": [torch.ones(16)] * 2}, "for each of the 1 eps, got 2, 1 and 7"),
    "no filters": ({"filters": []}, "got 3, 0 and 7"),
    "a size is missing": ({"sizes": [1, 16, 1, 1, 1, 1]}, "got 3, 1 and 6"),
    "no stride": ({"sizes": [0, 16, 0, 1, 1, 1, 1]}, "strides of at least 1"),
    "negative padding": ({"sizes": [0, 16, 1, 1, -1, 1, 1]}, "no negative padding"),
    "an activation that is none": ({"sizes": [0, 16, 1, 1, 1, 1, 3]}, "activation: expected 0, 1 or 2, got 3"),
    "double x": ({"x": images(4, 16, 8, 8).double()}, "x: expected float32 or bfloat16"),
    "x that is no images": ({"x": torch.randn(4, 16)}, "x: expected float32 or bfloat16 .N, C, H, W., got .4, 16."),
    "no images": ({"x": images(0, 16, 8, 8)}, "x: expected images, got .0, 16, 8, 8."),
    "too many channels of x": ({"x": images(4, 17, 8, 8)}, ">= 16, >= 17, kh, kw., got .16, 16, 3, 3."),
    "double weight": (parameters_of(weight=torch.randn(16, 16, 3, 3).double()), "parameters: expected float32"),
    "few filters": (parameters_of(weight=torch.randn(8, 16, 3, 3)), "got .8, 16, 3, 3."),
    "other filters": (parameters_of(weight=torch.randn(16, 16, 1, 1)), "expected an algorithm that takes"),
    "no algorithm": ({"sizes": [9, 16, 1, 1, 1, 1, 1]}, "takes the convolution, got 9 for a weight .16, 16, 3, 3."),
    "Winograd's padding": ({"sizes": [1, 16, 1, 1, 0, 1, 1]}, "got 1 for .*, padding 0 and 1"),
    "Winograd's stride": ({"sizes": [1, 16, 2, 1, 1, 1, 1]}, "got 1 for .*, stride 2 and 1"),
    "Winograd's stride of 2": ({"sizes": [2, 16, 1, 1, 1, 1, 1]}, "got 2 for .*, stride 1 and 1"),
    "depthwise filters": ({"sizes": [3, 16, 1, 1, 1, 1, 1]}, "got 3 for a weight .16, 16, 3, 3."),
    "depthwise channels": (
        {**parameters_of(weight=torch.randn(16, 1, 3, 3)), "sizes": [3, 8, 1, 1, 1, 1, 1]},
        "got 3 for a weight .16, 1, 3, 3., 16 to 8 channels",
    ),
    "small images": ({"x": images(4, 16, 1, 8), "sizes": [0, 16, 1, 1, 0, 1, 1]}, "at least the pixels that"),
    "short norm": (parameters_of(norm_weight=torch.ones(8)), "norm weight: expected .* at least 16 elements"),
    "double norm": (parameters_of(norm_bias=torch.ones(16).double()), "norm bias: expected .*float32"),
    "views": ({"views": 3}, "views: expected a divisor of the batch of 4, got 3"),
    "residual": ({"residual": images(4, 16, 8, 7)}, "residual: expected the shape of the result"),
    "residual's dtype": ({"residual": images(4, 16, 8, 8).bfloat16()}, "residual: expected the dtype of the result"),
    "transformed filters": ({"filters": [torch.ones(5)]}, "filters: expected a float32 vector of .*, got .5."),
}


@pytest.mark.parametrize(("changes", "message"), DIRECT.values(), ids=DIRECT)
def test_the_operation_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.us3l_native.conv_chain(**arguments(**changes))


BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    "no result": ({"convolved": []}, "expected a result, two statistics and three gradients"),
    "no statistics": ({"statistics": []}, "expected a result, two statistics and three gradients"),
    "few gradients": ({"gradients": [None]}, "expected a result, two statistics and three gradients"),
    "shape of grad": ({"grad": images(4, 8, 8, 8)}, "grad: expected the shape of the result"),
    "shape of a result": ({"convolved": [images(4, 8, 8, 8)]}, "convolved: expected the results of the forward"),
    "dtype of a result": ({"convolved": [images(4, 16, 8, 8).double()]}, "convolved: expected the results"),
    "shape of the statistics": ({"statistics": [torch.zeros(1, 16), torch.zeros(1, 8)]}, "expected float32 .1, 16."),
    "vectors for statistics": ({"statistics": [torch.zeros(16)] * 2}, "views: expected a divisor of the batch of 4"),
    "y": ({"y": images(4, 8, 8, 8), "grad": images(4, 8, 8, 8)}, "grad: expected the shape of the result"),
    "x": ({"x": images(4, 16, 9, 8)}, "convolved: expected the results of the forward"),
    "gradient's filters": ({"gradients": [torch.zeros(16, 16, 1, 1), None, None]}, "gradients: expected float32"),
    "dtype of grad": ({"grad": images(4, 16, 8, 8).double()}, "grad: expected the dtype of the result"),
    "small gradient": ({"gradients": [torch.zeros(8, 16, 3, 3), None, None]}, "got .8, 16, 3, 3."),
    "short gradient": ({"gradients": [None, torch.zeros(4), None]}, "gradient of a norm's weight: expected"),
}


@pytest.mark.parametrize(("changes", "message"), BACKWARD.values(), ids=BACKWARD)
def test_the_backward_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    given = arguments()
    y, convolved, statistics = torch.ops.us3l_native.conv_chain(**given)
    kept = {name: given[name] for name in ("x", "parameters", "filters", "sizes", "eps")}
    kept |= {"y": y, "convolved": convolved, "statistics": statistics, "grad": torch.randn_like(y)}
    kept |= {"gradients": [None] * 3, "need_grad_x": True, "residual_is_x": False}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.us3l_native.conv_chain_backward(**{**kept, **changes})
