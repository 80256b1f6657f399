"""Derived weights are kept exactly as long as their parameter stays as it is."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import us3l_kernels
from us3l_kernels import _native, weight_cache
from us3l_kernels.functional import conv2d
from us3l_kernels.nn import SlicedConv2d
from us3l_kernels.optim import EMA, SGD, AdamW

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[weight_cache._Cache]:
    fresh = weight_cache._Cache(budget=64 * MEGABYTE, check=False)
    monkeypatch.setattr(weight_cache, "_cache", fresh)
    yield fresh


class Counter:
    """A derivation of 8 numbers that counts how often it ran."""

    def __init__(self) -> None:
        self.fills = 0

    def __call__(self, parameter: Tensor, kind: str = "sum") -> Tensor | None:
        return weight_cache.derived(parameter, kind, size=lambda: 8, fill=lambda out: self._fill(out, parameter))

    def _fill(self, out: Tensor, parameter: Tensor) -> None:
        self.fills += 1
        out.fill_(float(parameter.detach().sum()))


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 3))


def _sgd(p: nn.Parameter, native: bool) -> None:
    p.grad = torch.randn_like(p)
    SGD([p], lr=0.1, momentum=0.9).step()


def _adamw(p: nn.Parameter, native: bool) -> None:
    p.grad = torch.randn_like(p)
    AdamW([p], lr=0.1).step()


def _ema(p: nn.Parameter, native: bool) -> None:
    EMA([p], [torch.randn_like(p)], 0.5).update()


def _teacher_of_a_step(p: nn.Parameter, native: bool) -> None:
    student = nn.Parameter(torch.randn_like(p))
    student.grad = torch.randn_like(student)
    SGD([student], lr=0.1).step(ema=EMA([p], [student], 0.5))


def _stock_optimizer(p: nn.Parameter, native: bool) -> None:
    p.grad = torch.randn_like(p)
    torch.optim.AdamW([p], lr=0.1).step()


def _copy(p: nn.Parameter, native: bool) -> None:
    with torch.no_grad():
        p.copy_(torch.randn_like(p))


def _load(p: nn.Parameter, native: bool) -> None:
    module = nn.Module()
    module.register_parameter("p", p)
    module.load_state_dict({"p": torch.randn_like(p)})


CHANGES = [_sgd, _adamw, _ema, _teacher_of_a_step, _stock_optimizer, _copy, _load]


@pytest.mark.parametrize("change", CHANGES)
def test_every_update_is_noticed(change: Callable[[nn.Parameter, bool], None]) -> None:
    p, derive = parameter(), Counter()
    for _ in range(3):
        derive(p)
        before = derive(p)
        assert before is not None
        torch.testing.assert_close(before[0], p.detach().sum())
        change(p, True)
    after = derive(p)
    assert after is not None
    torch.testing.assert_close(after[0], p.detach().sum())
    assert derive.fills == 4


def test_one_derivation_serves_all_uses_of_a_version() -> None:
    p, derive = parameter(), Counter()
    results = [derive(p) for _ in range(5)]
    assert derive.fills == 1
    assert all(r is results[0] for r in results)


def test_a_version_that_is_used_once_is_not_kept_the_next_time(cache: weight_cache._Cache) -> None:
    p, derive = parameter(), Counter()
    derive(p)
    for _ in range(3):
        _copy(p, True)
        assert derive(p) is None
    assert derive.fills == 1 and cache.bytes() == 0
    assert derive(p) is not None  # a second use after all
    _copy(p, True)
    assert derive(p) is not None


def test_kinds_are_apart() -> None:
    p, derive = parameter(), Counter()
    assert derive(p, "a") is not derive(p, "b")
    assert derive.fills == 2


def test_a_copy_starts_with_nothing() -> None:
    p, derive = parameter(), Counter()
    derive(p)
    twin = copy.deepcopy(p)
    assert derive(twin) is not derive(p)
    _copy(twin, True)
    derive(p)
    assert derive.fills == 2


def test_memory_goes_with_the_parameter(cache: weight_cache._Cache) -> None:
    p, derive = parameter(), Counter()
    derive(p)
    assert weight_cache.cached_bytes() == 32
    del p
    gc.collect()
    assert weight_cache.cached_bytes() == 0


def test_the_budget_is_kept(cache: weight_cache._Cache) -> None:
    cache.budget = 40
    first, second, derive = parameter(), parameter(), Counter()
    assert derive(first) is not None
    assert derive(second) is None
    assert weight_cache.cached_bytes() == 32
    cache.budget = 0
    assert derive(first) is None


def test_writes_through_data_need_invalidate(cache: weight_cache._Cache) -> None:
    module, derive = nn.Linear(3, 4), Counter()
    cache.check = True
    derive(module.weight)
    module.weight.data.add_(1.0)
    with pytest.raises(RuntimeError, match="invalidate"):
        derive(module.weight)
    us3l_kernels.invalidate(module)
    after = derive(module.weight)
    assert after is not None
    torch.testing.assert_close(after[0], module.weight.detach().sum())


def test_inference_tensors_are_left_alone() -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 3)
    assert Counter()(weight) is None


@pytest.mark.parametrize("variable, value", [("US3L_WEIGHT_CACHE_MB", "lots"), ("US3L_CHECK_CACHE", "yes")])
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}.*'{value}'"):
        weight_cache._environment()


@pytest.mark.skipif(_native.load() is None, reason="the native kernels are not built")
def test_a_convolution_of_every_width_follows_its_weight(cache: weight_cache._Cache) -> None:
    layer = SlicedConv2d(40, 24, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    optimizer = SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        for channels, out_channels in ((40, 24), (24, 16), (9, 7)):
            x = torch.randn(2, channels, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
            with us3l_kernels.backend("native"):
                y = conv2d(x, layer.weight, out_channels=out_channels, padding=1)
            wide = x.detach().double().requires_grad_()
            expected = nn.functional.conv2d(wide, layer.weight.detach().double()[:out_channels, :channels], padding=1)
            upstream = torch.randn_like(y)
            y.backward(upstream)
            expected.backward(upstream.double())
            for given, wanted in ((y.detach(), expected.detach()), (x.grad, wide.grad)):
                torch.testing.assert_close(given.double(), wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))
        assert cache.bytes() > 0
        optimizer.step()
        optimizer.zero_grad()
