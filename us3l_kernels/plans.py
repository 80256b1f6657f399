"""What can be kept for a width from one training step to the next: which weights to pack, and a CUDA graph.

A pass (the forward and backward of one width, say) launches hundreds of short kernels, and so waits for the host. A
CUDA graph launches all of them at once, but only for the very shapes and addresses that it was captured with. Widths
that round to the same channels run the same kernels, and there are few of those (between 0.25 and 1, ResNet-18 has 90
and ResNet-50 378): a graph for each is made when it is needed, and kept while it is in use.

    plans = Plans(buffer, capture=CudaGraphs(device))
    with plans.stream():
        loss, = plans.run(("student", plan_key(model)), work, images)      # work(images) -> (loss.detach(),)

A pass that is met for the first time runs as it is written: it counts, and it is the warm-up (libraries are loaded,
algorithms chosen, the weights to pack known) of the capture at the second time. From then on it is replayed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from us3l_kernels.backends import requested
from us3l_kernels.gradients import GradientBuffer, Slot
from us3l_kernels.packed import PackedWeights

Work = Callable[..., tuple[Tensor | None, ...]]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the kernels that a call launches, without running them; returns what runs them again, where they lie."""


class CudaGraphs:
    """A `Capture` by CUDA graphs, which share one pool of memory: they never run at the same time.

    All passes run on one stream of their own: graphs cannot be captured on the default one, and the nodes that
    accumulate gradients stay on the stream on which they were made (so attach the model inside `stream()`).
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of data loaders may pin memory meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run what is inside on the stream of the graphs, behind what came before and ahead of what comes after."""
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)


class _Input:
    """Memory that graphs read: `data` is a copy of the tensor that was held last."""

    def __init__(self, like: Tensor) -> None:
        self.data = torch.empty_like(like)
        self._of: Callable[[], Tensor | None] = lambda: None
        self._version = -1

    def hold(self, given: Tensor) -> None:
        """Copy `given`, unless that is what `data` is: the images of a step are those of all its widths."""
        if self._of() is not given or self._version != given._version:
            self.data.copy_(given)
            self._of, self._version = weakref.ref(given), given._version


@dataclass
class _Plan:
    """slots: whose gradients the pass adds to. outputs: memory of the results, like those of the first run."""

    packed: PackedWeights
    met: bool = False
    slots: list[Slot] = field(default_factory=list)
    inputs: list[_Input | None] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    replay: Callable[[], None] | None = None


class Plans:
    """Runs passes, each with its packed weights, and from its second time on as a graph.

    The `capacity` passes that were used last are kept: by default more than a network has. All tensors of the graphs,
    packed weights among them, share the memory of the largest one; what each takes for itself are its launches.

    buffer: that the gradients of the model are attached to.
    capture: how to make graphs; None for packed weights alone.
    """

    def __init__(self, buffer: GradientBuffer, *, capture: Capture | None = None, capacity: int = 512) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 plan, got {capacity}")
        self.buffer = buffer
        self.capture = capture
        self.capacity = capacity
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()  # the one used last is the last one
        self._inputs: weakref.WeakValueDictionary[Hashable, _Input] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def graphs(self) -> int:
        """How many passes are kept as graphs."""
        return sum(plan.replay is not None for plan in self._plans.values())

    def run(self, key: Hashable, work: Work, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """work(*inputs), a tuple of tensors without history, whichever way it is computed.

        key: of everything that decides what `work` does, but for the shapes, strides and dtypes of its inputs and the
        requested backends. For equal keys it must launch the same kernels on the same memory, inputs and results
        apart, and do nothing else that matters: nothing of it but its kernels is repeated. Random numbers are drawn
        from the default generators, and are new ones in every run.
        """
        key = (key, tuple(requested().values()), torch.are_deterministic_algorithms_enabled(), *map(_kind, inputs))
        plan = self._plans.pop(key, None) or _Plan(PackedWeights(self.buffer))
        self._plans[key] = plan
        if len(self._plans) > self.capacity:
            self._plans.popitem(last=False)
        if self.capture is None or not plan.met:
            return self._run(plan, work, inputs)
        for slot in plan.slots:
            slot.mark()
        if plan.replay is None:
            plan.inputs = [None if given is None else self._input(i, given) for i, given in enumerate(inputs)]
        for held, given in zip(plan.inputs, inputs, strict=True):
            if held is not None and given is not None:
                held.hold(given)
        if plan.replay is None:
            plan.packed.load()  # the first pass had nothing to pack
            plan.replay = self.capture(lambda: self._recorded(plan, work))
        plan.replay()
        # The next replay overwrites its results.
        return tuple([None if output is None else output.clone() for output in plan.outputs])

    def _run(self, plan: _Plan, work: Work, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """As it is written; notes what a graph of it would have to do beside its kernels."""
        touched = [slot for slot in self.buffer.slots if slot.touched]
        for slot in touched:
            slot.touched = False
        with plan.packed:
            results = work(*inputs)
        plan.slots = [slot for slot in self.buffer.slots if slot.touched]
        for slot in touched:
            slot.touched = True
        if self.capture is not None:
            plan.outputs = [None if result is None else torch.empty_like(result) for result in results]
        plan.met = True
        return results

    def _recorded(self, plan: _Plan, work: Work) -> None:
        """The pass as a graph runs it: on memory that stays."""
        with plan.packed:
            results = work(*[None if held is None else held.data for held in plan.inputs])
        # Results that lay in the graphs' own memory would not outlive the next graph.
        for output, result in zip(plan.outputs, results, strict=True):
            if output is not None and result is not None:
                output.copy_(result)

    def _input(self, position: int, given: Tensor) -> _Input:
        """The memory for inputs like `given`, which all plans share that are alive."""
        key = (position, _kind(given))
        found = self._inputs.get(key)
        if found is None:
            found = self._inputs[key] = _Input(given)
        return found

    def stream(self) -> AbstractContextManager[None]:
        """Where passes have to run: see `CudaGraphs`."""
        return self.capture.stream() if isinstance(self.capture, CudaGraphs) else nullcontext()


def _kind(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
