"""us3l_kernels.plans with a recording of operations in the place of a CUDA graph: it repeats them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import us3l_kernels
from us3l_kernels import gradients, use_width, views
from us3l_kernels.library import _KERNELS
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, SlicedLinear, SwitchableBatchNorm2d
from us3l_kernels.optim import SGD
from us3l_kernels.plans import Plans
from us3l_kernels.width import plan_key, set_width


class Tape(TorchDispatchMode):
    """A `plans.Capture` on the CPU: the operations that ran, with the memory they read and wrote.

    Recording computes, which a capture does not: the first replay does nothing.
    """

    captures = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.fresh = True

    @classmethod
    def capture(cls, work: Callable[[], None]) -> Callable[[], None]:
        cls.captures += 1
        tape = cls()
        with tape:
            work()
        return tape.replay

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "us3l":  # what it consists of, as a GPU would see it
            with self:
                return _KERNELS[op.overloadpacket.__name__][0](*args, **(kwargs or {}))
        results = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        if self.fresh:
            self.fresh = False
            return
        for op, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(op(*args, **kwargs)), strict=True):
                # Neither a view, nor in place, nor empty.
                if isinstance(old, Tensor) and new.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def _count() -> None:
    Tape.captures = 0


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SlicedConv2d(3, 16, 3, padding=1, bias=False)
        self.norm = SlicedBatchNorm2d(16, activation="relu")
        self.dropout = nn.Dropout(0.5)
        self.head = SlicedLinear(16, 4, slice_out=False)
        self.plain = nn.Linear(4, 4)  # an ordinary layer: its gradient comes through AccumulateGrad

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.head(self.dropout(self.norm(self.conv(x))).mean((2, 3))))


def network() -> Network:
    torch.manual_seed(0)
    return Network().train()


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model: Network, plans: Plans | None, widths: list[float], *, pack: bool = True) -> list[Tensor]:
    """Steps of two widths each; everything that came of it."""
    buffer = gradients.attach(model) if plans is None else plans.buffer
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    results = []
    torch.manual_seed(7)
    for step, width in enumerate(widths):
        x = images(step)
        for each in (1.0, width):

            def work(x: Tensor, each: float = each) -> tuple[Tensor]:
                with use_width(model, each), torch.autocast("cpu", dtype=torch.bfloat16), views(2):
                    y = model(x)
                loss = y.float().logsumexp(1).square().mean()
                loss.backward()
                return (loss.detach(),)

            if plans is None:
                results += work(x)
            else:
                with use_width(model, each):
                    key = plan_key(model)
                results += plans.run(key, work, x)
        results.append(buffer.flat.clone())
        optimizer.step()
        buffer.zero_()
    return [*results, *model.parameters(), *model.buffers()]


def planned(**options: Any) -> tuple[Network, Plans]:
    model = network()
    with us3l_kernels.backend("aten"):
        return model, Plans(gradients.attach(model), capture=Tape.capture, **options)


@pytest.mark.parametrize("capture", [True, False])
def test_replayed_steps_are_those_that_are_not_bit_by_bit(capture: bool) -> None:
    widths = [0.5, 0.45, 0.5, 0.7, 1.0, 0.52, 0.7, 0.3]  # of 8 or 16 channels
    with us3l_kernels.backend("aten"):
        expected = train(network(), None, widths)
        model, plans = planned()
        if not capture:
            plans.capture = None
        given = train(model, plans, widths)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert len(plans) == 3  # 16 channels at 0.7, where running statistics are left alone, are a plan of their own
    assert plans.graphs == Tape.captures == (3 if capture else 0)


def test_a_graph_packs_the_weights_of_its_pass_at_once() -> None:
    tapes: list[Tape] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        tapes.append(Tape())
        with tapes[-1]:
            work()
        return tapes[-1].replay

    with us3l_kernels.backend("aten"):
        model, plans = planned()
        plans.capture = capture
        train(model, plans, [0.5, 0.5])
    assert len(tapes) == 2
    for tape in tapes:
        packed = [args[1] for op, args, _, _ in tape.calls if op is torch.ops.aten._foreach_copy_.default]
        weights = [[tuple(weight.shape[2:]) for weight in sources] for sources in packed]
        assert sorted(sum(weights, [])) == [(), (), (3, 3)], weights


def test_the_work_is_called_to_warm_up_and_to_be_captured() -> None:
    model, plans = planned()
    calls = []

    def work(x: Tensor) -> tuple[Tensor, None]:
        calls.append(x)
        return x * 2, None

    results = []
    for i in range(4):
        y, nothing = plans.run("key", work, images(i))
        assert nothing is None
        results.append(y)
    assert len(calls) == 2
    assert all(torch.equal(y, 2 * images(i)) for i, y in enumerate(results))  # none was overwritten


def test_inputs_are_copied_once_while_they_stay_the_same() -> None:
    _, plans = planned()
    x = images(0)
    for _ in range(2):
        for key in "abc":
            plans.run(key, lambda x: (x + 1,), x)
    (held,) = plans._inputs.values()
    assert all(plan.inputs == [held] for plan in plans._plans.values())
    held.data.zero_()  # would be seen
    assert torch.equal(plans.run("a", lambda x: (x + 1,), x)[0], torch.ones_like(x))
    x.mul_(2)
    assert torch.equal(plans.run("b", lambda x: (x + 1,), x)[0], x + 1)
    assert torch.equal(plans.run("c", lambda x: (x + 1,), images(5))[0], images(5) + 1)
    assert torch.equal(plans.run("c", lambda x: (x + 1,), x)[0], x + 1)


def test_what_a_plan_is_for() -> None:
    _, plans = planned()

    def run(key: str, *inputs: Tensor | None) -> None:
        plans.run(key, lambda *given: (None,), *inputs)

    x = images(0)
    different = [
        lambda: run("a", x),
        lambda: run("b", x),
        lambda: run("a", x, None),
        lambda: run("a", x[:2]),
        lambda: run("a", x.double()),
        lambda: run("a", x.to(memory_format=torch.channels_last)),
    ]
    for call in different * 2:
        call()
    assert len(plans) == len(different)
    with us3l_kernels.backend("reference"):
        run("a", x)
    assert len(plans) == len(different) + 1


def test_the_plans_used_last_are_kept() -> None:
    _, plans = planned(capacity=2)

    def run(key: str) -> None:
        plans.run(key, lambda x: (x + 1,), images(0))

    for key in "aabb":
        run(key)
    assert (len(plans), plans.graphs, Tape.captures) == (2, 2, 2)
    run("a")
    run("c")  # in the place of b, which was used before a
    run("a")
    assert (len(plans), plans.graphs, Tape.captures) == (2, 1, 2)
    run("b")
    assert Tape.captures == 2  # a warm-up again
    plans.run("d", lambda x: (x,), images(0)[:1])
    plans.run("e", lambda x: (x,), images(0)[:1])
    assert not plans._inputs  # nothing holds what only dropped plans read
    with pytest.raises(ValueError, match="capacity: expected at least 1 plan, got 0"):
        planned(capacity=0)


def test_replay_marks_gradients_as_the_backward_would() -> None:
    model, plans = planned()

    def work(x: Tensor) -> tuple[Tensor]:
        y = model.head(x)
        y.square().mean().backward()
        return (y.detach(),)

    x = torch.randn(3, 16)
    for _ in range(3):
        plans.buffer.zero_()
        plans.run("head", work, x)
        touched = [slot.name for slot in plans.buffer.slots if slot.touched]
        assert touched == ["head.weight", "head.bias"]
    expected = model.head.weight.grad.clone()
    model.zero_grad()  # lets go of the gradients, which must not be zeroed by the graph
    plans.run("head", work, x)
    assert torch.equal(model.head.weight.grad, expected) and model.head.weight.grad is plans.buffer.slots[3].view
    plans.run("head", work, x)
    assert torch.equal(model.head.weight.grad, 2 * expected)
    plans.buffer.slots[0].touched = True  # by another pass of the step
    plans.run("other", work, x)
    assert plans.buffer.slots[0].touched


def test_a_failed_pass_is_met_again() -> None:
    _, plans = planned()

    def work(x: Tensor) -> tuple[Tensor]:
        if fails:
            raise ZeroDivisionError
        return (x + 1,)

    for fails in (True, False, True):
        try:
            plans.run("key", work, images(0))
        except ZeroDivisionError:
            assert fails
    assert plans.graphs == 0
    fails = False
    assert torch.equal(plans.run("key", work, images(0))[0], images(0) + 1)
    assert plans.graphs == 1


class Switchable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SlicedConv2d(16, 32, 1)
        self.norm = SwitchableBatchNorm2d(32, [1.0, 0.99, 0.5])


def test_keys_of_widths() -> None:
    def keys(model: nn.Module, *widths: float) -> list[Any]:
        found = []
        for width in widths:
            set_width(model, width)
            found.append(plan_key(model))
        return found

    model = network()
    full, nearly, half, less = keys(model, 1.0, 0.99, 0.5, 0.45)
    assert half == less != full
    assert full != nearly  # 16 channels both, but the running statistics are those of width 1.0
    model.norm.track_running_stats = False
    full, nearly = keys(model, 1.0, 0.99)
    assert full == nearly
    assert len(set(keys(Switchable(), 1.0, 0.99, 0.5))) == 3  # each has a norm of its own
    with pytest.raises(ValueError, match="sliced layers"):
        plan_key(nn.Linear(2, 2))
