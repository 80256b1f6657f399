"""Any convolutional classifier becomes a network of many widths, in place and in one call.

    model = timm.create_model("resnet18")
    print(us3l_kernels.slim(model))
    with us3l_kernels.use_width(model, 0.5):
        y = model(x)

A sub-network keeps a prefix of the channels of every layer. That is right only if every tensor in it is a prefix of
the same tensor in the full network, so the model is run on the meta device (shapes, no numbers), and every tensor
that passes between its layers is followed:

- A convolution or a linear layer starts a set of channels of its own. Norms, activations, pooling, depthwise and
  grouped convolutions and flattening pass it on.
- Sums and products of two such tensors (residual connections, squeeze-and-excitation) make two sets one.
- Every other operation (concatenation, channel shuffle, attention, a parameter of full size, the model's output, ...)
  needs its input whole: the layers that made that input keep all their channels. Nothing need be known of an
  operation for this to be exact.

A last run at a narrow width finds what only shows there, such as a size written into a reshape.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from us3l_kernels.nn import SlicedBatchNorm1d, SlicedBatchNorm2d, SlicedConv2d, SlicedLayerNorm, SlicedLinear
from us3l_kernels.width import Sliced, active_channels

# ---------------------------------------------------------------------------------------------- layers


class SlicedBatchNormAct2d(SlicedBatchNorm2d):
    """timm's BatchNormAct2d: a batch norm, then its `drop` and its `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W] with C <= num_features; residual: like x, added before `drop` and `act` -> like x."""
        return self.act(self.drop(super().forward(x, residual)))


class SlicedLayerNorm2d(SlicedLayerNorm):
    """The LayerNorm2d of timm and of torchvision: a layer norm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] with C <= normalized_shape -> like x."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# By name: a subclass may compute something else, and timm need not be imported to know its layers.
_SLICED: dict[str, type[Sliced]] = {
    "torch.nn.modules.conv.Conv2d": SlicedConv2d,
    "torch.nn.modules.linear.Linear": SlicedLinear,
    "torch.nn.modules.batchnorm.BatchNorm1d": SlicedBatchNorm1d,
    "torch.nn.modules.batchnorm.BatchNorm2d": SlicedBatchNorm2d,
    "torch.nn.modules.normalization.LayerNorm": SlicedLayerNorm,
    "timm.layers.norm_act.BatchNormAct2d": SlicedBatchNormAct2d,
    "timm.layers.linear.Linear": SlicedLinear,
    "timm.layers.norm.LayerNorm": SlicedLayerNorm,
    "timm.layers.norm.LayerNorm2d": SlicedLayerNorm2d,
    "torchvision.models.convnext.LayerNorm2d": SlicedLayerNorm2d,
}


def _sliced_class(module: nn.Module) -> type[Sliced] | None:
    """What `module` becomes; None: it stays, and gets its input whole."""
    sliced = _SLICED.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None
    return sliced


# ---------------------------------------------------------------------------------------------- channels


@dataclass(eq=False)
class _Channels:
    """A set of output channels with one number of active channels: those of one layer, or of several tied ones."""

    count: int
    layers: list[str] = field(default_factory=list)
    step: int = 1  # the active number is a multiple of it: whole groups of the grouped convolutions they reach
    kept: str | None = None  # why all of them stay at every width

    def ratio(self, divisor: int) -> int:
        """The `ratio` that makes `active_channels` step by a multiple of `step`."""
        return math.lcm(divisor, self.step) // divisor

    def active(self, width: float, divisor: int) -> int:
        if self.kept is not None:
            return self.count
        return active_channels(self.count, width, divisor=divisor, ratio=self.ratio(divisor))


@dataclass(frozen=True)
class _Prefix:
    """What is known of a tensor: in `dim` its active part is the prefix of active(layer's channels) * scale."""

    layer: str
    dim: int
    scale: Fraction = Fraction(1)


# ---------------------------------------------------------------------------------------------- operations
# Where an operation moves the channels: (shape of x, their dimension, its arguments, shape of the result) -> (their
# new dimension, how many elements of it one element of the old makes up), or None where they do not survive it.

_Shape = Sequence[int]
_Arguments = Mapping[str, Any]
_Move = Callable[[_Shape, int, _Arguments, _Shape], "tuple[int, int] | None"]


def _reduce(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int] | None:
    dims = arguments.get("dim")
    reduced = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
    if dim in reduced:
        return None
    return (dim if arguments.get("keepdim") else dim - sum(d < dim for d in reduced)), 1


def _spatial(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int] | None:
    return (dim, 1) if dim == len(shape) - 3 else None


def _stay(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int]:
    return dim, 1


def _permute(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int]:
    return [d % len(shape) for d in arguments["dims"]].index(dim), 1


def _transpose(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int]:
    a, b = (arguments[name] % len(shape) for name in ("dim0", "dim1"))
    return {a: b, b: a}.get(dim, dim), 1


def _unsqueeze(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int]:
    return dim + (arguments["dim"] % len(out) <= dim), 1


def _squeeze(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int]:
    dims = arguments.get("dim", range(len(shape)))
    gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    return dim - sum(d < dim and shape[d] == 1 for d in gone), 1


def _select(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int] | None:
    selected = arguments["dim"] % len(shape)
    return None if selected == dim else (dim - (selected < dim), 1)


def _view(shape: _Shape, dim: int, arguments: _Arguments, out: _Shape) -> tuple[int, int] | None:
    """The channels keep a dimension of their own, or merge with dimensions after them (flatten: channel-major)."""
    before, seen = math.prod(shape[:dim]), 1
    for new, size in enumerate(out):
        if seen == before and size != 1:
            merged, rest = divmod(size, shape[dim])
            return None if rest else (new, merged)
        seen *= size
    return None


_MOVES: dict[str, _Move] = {
    **dict.fromkeys(["mean", "sum", "amax", "amin"], _reduce),
    **dict.fromkeys(["avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d"], _spatial),
    **dict.fromkeys(["upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"], _spatial),
    # These two may cut or pad the channels too: the size of the result tells.
    **dict.fromkeys(["slice", "constant_pad_nd"], _stay),
    "permute": _permute,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    **dict.fromkeys(["view", "_unsafe_view"], _view),
}
_ELEMENTWISE = {"hardswish", "copy", "_to_copy", "detach", "alias", "expand", "native_dropout", "bernoulli"} | {
    f"{what}_like" for what in ("zeros", "ones", "full", "empty", "rand", "randn")
}  # besides those that torch tags as such
_NEW = {"new_empty", "new_zeros", "new_ones", "new_full"}  # read only the dtype and the device of x


def _restates(x: Tensor, size: _Shape, stride: _Shape, storage_offset: int | None = None) -> bool:
    """Whether as_strided gives back x itself, as global pooling of a channels_last input has it."""
    same = [n == 1 or a == b for n, a, b in zip(size, stride, x.stride(), strict=False)]
    return tuple(size) == x.shape and all(same) and storage_offset in (None, x.storage_offset())


# ---------------------------------------------------------------------------------------------- the run
# ---------------------------------------------------------------------------------------------- the run


class _KeptMore(Exception):
    """A layer has to keep its channels that did not have to before: the run at a narrow width starts again."""


class _Trace(TorchDispatchMode):
    """Runs a model on the meta device and finds which channels belong together and which must all stay.

    model: on the meta device, and for this use alone: its layers are wrapped.
    """

    def __init__(self, model: nn.Module, divisor: int) -> None:
        super().__init__()
        self.model = model
        self.divisor = divisor
        self.width = 1.0
        self.channels: dict[str, _Channels] = {}  # of each convolution and linear layer that has its own
        self.inputs: dict[str, _Prefix | None] = {}  # of each layer, at its first call
        self.prefixes = WeakTensorKeyDictionary()  # Tensor -> _Prefix
        self.paused = False
        self.place: list[str] = []  # the modules that are running, outermost first
        for name, module in model.named_modules():
            self._watch(name, module)

    def run(self, example: Tensor, width: float) -> bool:
        """Follow one forward in evaluation and one in training; whether no more layers had to be kept.

        Raises ValueError, naming the place, if the model does not run.
        """
        self.width = width
        try:
            for training in (False, True):
                self.model.train(training)
                self.place.clear()
                self.prefixes.clear()
                with torch.no_grad(), torch.device("meta"), self:
                    self._finish(self.model(torch.empty_like(example)))
        except _KeptMore:
            return False
        except Exception as error:
            raise ValueError(
                f"model: cannot follow the forward of {type(self.model).__name__} at width {width} on an input of "
                f"shape {tuple(example.shape)}: {self._here()} raised {type(error).__name__}: {error}. Another "
                "example_input, or keep=(the layers before that place), may help"
            ) from error
        return True

    def keep(self, prefix: _Prefix, reason: str) -> None:
        """All channels of the layer that `prefix` comes from stay, at every width."""
        channels = self.channels[prefix.layer]
        if channels.kept is None:
            channels.kept = reason
            if self.width != 1.0:
                raise _KeptMore

    def _finish(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                if (prefix := self.prefixes.get(leaf)) is not None:
                    self.keep(prefix, "an output of the model")
            elif leaf is not None and not isinstance(leaf, (int, float, str)):
                raise TypeError(f"expected tensors as the output, got a {type(leaf).__name__}")

    def _here(self) -> str:
        return (self.place[-1] if self.place else "") or type(self.model).__name__

    def _size(self, prefix: _Prefix) -> int:
        return int(self.channels[prefix.layer].active(self.width, self.divisor) * prefix.scale)

    def _mark(self, x: Tensor, prefix: _Prefix, reason: str) -> None:
        """Note what is known of `x`, unless its size says otherwise."""
        if x.size(prefix.dim) == self._size(prefix):
            self.prefixes[x] = prefix
        else:
            self.keep(prefix, reason)

    def _tie(self, a: _Prefix | None, b: _Prefix | None, reason: str) -> None:
        """Two tensors that must have the same active part; None is one that is whole at every width."""
        if a is None or b is None or a.scale != b.scale or a.dim != b.dim:
            for prefix in (a, b):
                if prefix is not None:
                    self.keep(prefix, reason)
            return
        if self.channels[a.layer] is self.channels[b.layer]:
            return
        for prefix, other in ((a, self.channels[b.layer]), (b, self.channels[a.layer])):
            if other.kept is not None:
                self.keep(prefix, other.kept)
        order = list(self.channels)
        tied = (self.channels[a.layer], self.channels[b.layer])
        one, other = sorted(tied, key=lambda channels: order.index(channels.layers[0]))
        one.layers += other.layers
        one.step = math.lcm(one.step, other.step)
        self.channels.update(dict.fromkeys(other.layers, one))

    # ------------------------------------------------------------------------------------------ layers

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.place.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.place.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        layer = self._layer(name, module)
        if layer is not None:
            module.forward = layer

    def _layer(self, name: str, module: Any) -> Callable[[Tensor], Tensor] | None:
        """The forward in place of `module`'s, for the layers whose channels are understood as a whole."""
        if type(module).__module__ == nn.modules.dropout.__name__:
            return lambda x: x
        sliced = _sliced_class(module)
        if sliced is SlicedConv2d:
            return lambda x: self._convolution(name, module, x)
        if sliced is SlicedLinear:
            return lambda x: self._linear(name, module, x)
        if sliced is SlicedLayerNorm:
            return lambda x: self._norm(name, x, x.dim() - 1)
        if sliced is SlicedBatchNormAct2d:
            return lambda x: module.act(module.drop(self._norm(name, x, 1)))
        return None if sliced is None else lambda x: self._norm(name, x, 1)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def _input(self, name: str, x: Tensor, dim: int) -> _Prefix | None:
        """What is known of the input of a layer that expects its channels in `dim`; the same at every call."""
        prefix = self.prefixes.get(x)
        if prefix is not None and prefix.dim != dim:
            self.keep(prefix, f"{name} gets them in dimension {prefix.dim}")
            prefix = None
        self._tie(self.inputs.setdefault(name, prefix), prefix, f"{name} is called with different channels")
        return prefix

    def _full(self, module: nn.Module, x: Tensor, prefix: _Prefix | None) -> Tensor:
        """The output of the full layer for the full input."""
        with self._pause():
            if prefix is not None:
                shape = list(x.shape)
                shape[prefix.dim] = int(self.channels[prefix.layer].count * prefix.scale)
                x = x.new_empty(shape)
            return type(module).forward(module, x)

    def _active(self, y: Tensor, prefix: _Prefix) -> Tensor:
        """The active part of the full `y`, as a layer would return it."""
        with self._pause():
            y = torch.empty_like(y.narrow(prefix.dim, 0, self._size(prefix)))
        self.prefixes[y] = prefix
        return y

    def _own(self, name: str, y: Tensor, dim: int) -> Tensor:
        self.channels.setdefault(name, _Channels(y.size(dim), [name]))
        return self._active(y, _Prefix(name, dim))

    def _convolution(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        prefix = self._input(name, x, x.dim() - 3)
        y = self._full(module, x, prefix)
        if module.groups == 1:
            return self._own(name, y, y.dim() - 3)
        if prefix is None:
            return y
        # As many groups are active as x fills.
        groups_per_channel = prefix.scale * module.groups / module.in_channels
        channels = self.channels[prefix.layer]
        channels.step = math.lcm(channels.step, groups_per_channel.denominator)
        scale = groups_per_channel * module.out_channels / module.groups
        return self._active(y, _Prefix(prefix.layer, prefix.dim, scale))

    def _linear(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        y = self._full(module, x, self._input(name, x, x.dim() - 1))
        return self._own(name, y, y.dim() - 1)

    def _norm(self, name: str, x: Tensor, dim: int) -> Tensor:
        prefix = self._input(name, x, dim)
        with self._pause():
            y = torch.empty_like(x)
        if prefix is not None:
            self.prefixes[y] = prefix
        return y

    # ------------------------------------------------------------------------------------------ other operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [t for t in tensors if t in self.prefixes]
        name = func._schema.name.removeprefix("aten::").removesuffix("_")  # relu and relu_ are one
        reason = f"{name} in {self._here()}"
        if name == "as_strided" and _restates(*args, **kwargs):
            name = "alias"
        try:
            out = func(*args, **kwargs)
        except Exception:
            if self.width != 1.0:  # a size that is written into the model, perhaps
                self._keep_all(known, reason)
            raise
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not known or name in _NEW:
            pass
        elif torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            for result in results:
                self._elementwise(tensors, result, reason)
        elif name in _MOVES:
            (x,) = tensors
            arguments = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            for result in results:
                self._move(_MOVES[name], x, {**arguments, **kwargs}, result, reason)
        else:
            self._keep_all(known, reason)
        return out

    def _keep_all(self, tensors: Sequence[Tensor], reason: str) -> None:
        for t in tensors:
            self.keep(self.prefixes[t], reason)

    def _move(self, move: _Move, x: Tensor, arguments: Mapping[str, Any], result: Tensor, reason: str) -> None:
        prefix = self.prefixes[x]
        moved = move(x.shape, prefix.dim, arguments, result.shape)
        if moved is None:
            self.keep(prefix, reason)
        else:
            dim, elements = moved
            self._mark(result, _Prefix(prefix.layer, dim, prefix.scale * elements), reason)

    def _elementwise(self, tensors: Sequence[Tensor], result: Tensor, reason: str) -> None:
        """Dimensions are aligned from the last, and a size of 1 is repeated."""
        shifts = {t: result.dim() - t.dim() for t in tensors}
        aligned = [
            _Prefix(prefix.layer, prefix.dim + shifts[t], prefix.scale)
            for t in tensors
            if (prefix := self.prefixes.get(t)) is not None
        ]
        first = aligned[0]
        for other in aligned[1:]:
            self._tie(first, other, reason)
        for t in tensors:
            dim = first.dim - shifts[t]
            if t not in self.prefixes and dim >= 0 and t.size(dim) != 1:
                self.keep(first, f"{reason}, with a tensor of full size")
        self._mark(result, first, reason)


# ---------------------------------------------------------------------------------------------- the conversion


@dataclass(frozen=True)
class SlimReport:
    """What `slim` did to a model, by the names of its modules."""

    converted: dict[str, str]
    """Layer -> its new class: every convolution, linear layer and norm that a forward reaches."""
    kept: dict[str, str]
    """Convolution or linear layer with all its output channels at every width -> what needs them."""
    tied: list[list[str]]
    """Convolutions and linear layers with the same active channels: a plan must give them one width."""
    unreached: list[str]
    """Layers that no forward reached; they are as they were."""

    @property
    def count(self) -> int:
        """How many layers were converted."""
        return len(self.converted)

    def __str__(self) -> str:
        kinds = Counter(self.converted.values())
        lines = [f"{self.count} layers converted: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())]
        if self.kept:
            lines.append(f"{len(self.kept)} with all their output channels at every width, because of:")
            lines += [f"  {name}: {reason}" for name, reason in self.kept.items()]
        if self.unreached:
            lines.append("not reached by the forward, and left alone: " + ", ".join(self.unreached))
        return "\n".join(lines)


def slim(
    model: nn.Module, *, divisor: int = 8, example_input: Tensor | None = None, keep: Sequence[str] = ()
) -> SlimReport:
    """Turn `model` into a network of many widths, in place; `use_width(model, 0.5)` then runs a sub-network.

    Its Conv2d, Linear, BatchNorm1d/2d and LayerNorm (and timm's BatchNormAct2d, LayerNorm and LayerNorm2d) become
    the sliced modules of `us3l_kernels.nn`. The modules and parameters stay the same objects, with their hooks and
    their names, so optimizers, checkpoints and averages of the weights go on as before; at width 1.0 so do the
    results, to the last bit on the `aten` backend. Sub-networks in evaluation need calibrated batch norms
    (`us3l_kernels.nn.calibrating`).

    Layers whose channels some operation needs whole keep all of them; the report says which and why. A model
    without its classifier, whose features are its output, therefore keeps the features.

    model: any module; its forward takes one tensor, returns tensors, and must run on the meta device (no decision on
    the values of a tensor; forward hooks run there too).
    divisor: channels are rounded to it, see `us3l_kernels.width.make_divisible`.
    example_input: what the forward takes, [N, C, H, W]; only its shape and dtype are used. None: [2, C, 224, 224], or
    the input size in timm's configuration of the model, with the channels of the first convolution.
    keep: names of modules; the layers in them keep all their output channels.

    Sets `model.residual_sums`, from which `set_width` checks a plan.

    Raises ValueError, and changes nothing, for a model that is converted already, whose forward cannot be followed,
    that has normalisation statistics of a kind that is not known by width, or in which no channels could be left out;
    also for an unknown name in `keep`. TypeError for a `keep` that is a single text.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    _check_convertible(model, modules)
    if divisor < 1:
        raise ValueError(f"divisor: expected an integer >= 1, got {divisor}")
    example = example_of(model) if example_input is None else example_input
    # On the meta device nothing is computed and nothing of the model is touched. Two samples tell a batch from a
    # dimension of size 1.
    example = torch.empty_like(example[:1].expand(2, *example.shape[1:]), device="meta")
    trace = _Trace(on_meta(model), divisor)
    trace.run(example, 1.0)
    _keep_named(trace, keep, modules)
    while not trace.run(example, 0.4):  # a width at which hardly two numbers of channels coincide with other sizes
        pass
    if not any(channels.active(1e-9, divisor) < channels.count for channels in trace.channels.values()):
        reasons = "; ".join(f"{name}: {channels.kept}" for name, channels in trace.channels.items() if channels.kept)
        raise ValueError(f"model: no layer of {type(model).__name__} can leave out channels. {reasons}")
    return _convert(model, modules, trace)


def _check_convertible(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, Sliced):
            raise ValueError(f"model: {name!r} is a {type(module).__name__}: the model has sliced layers already")
        if isinstance(module, _NormBase) and module.track_running_stats and _sliced_class(module) is None:
            instead = ""
            if isinstance(module, nn.SyncBatchNorm):
                instead = ". Convert the model with these, and set `sync` of its sliced norms to True"
            raise ValueError(
                f"model: {name!r} is of type {type(module).__name__}, whose running statistics would mix all widths; "
                "slim knows BatchNorm1d, BatchNorm2d and timm's BatchNormAct2d" + instead
            )


def example_of(model: nn.Module) -> Tensor:
    """Two images on the meta device, of the size in timm's configuration of `model`, or of 224 pixels."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(
            f"example_input: expected a tensor, as {type(model).__name__} has no convolution to tell its shape"
        )
    configuration = getattr(model, "pretrained_cfg", None) or {}
    size = configuration.get("input_size", (3, 224, 224))[1:]
    return torch.empty(2, first.in_channels, *size, dtype=first.weight.dtype, device="meta")


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device, made without a copy of its tensors."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _keep_named(trace: _Trace, keep: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    if isinstance(keep, str):
        raise TypeError(f"keep: expected a sequence of module names, got the text {keep!r}")
    for name in keep:
        below = [layer for layer in trace.channels if f"{layer}.".startswith(f"{name}.")]
        if not below:
            nearest = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
            raise ValueError(
                f"keep: expected the name of a module with convolutions or linear layers that the forward reaches, got "
                f"{name!r}; the nearest name is {nearest[0]!r}"
            )
        for layer in below:
            trace.keep(_Prefix(layer, 0), "asked for by keep")


def _convert(model: nn.Module, modules: Mapping[str, nn.Module], trace: _Trace) -> SlimReport:
    namesakes = {name: _namesake(name, module, trace) for name, module in modules.items() if name in trace.inputs}
    unreached = [
        name for name, module in modules.items() if _sliced_class(module) is not None and name not in trace.inputs
    ]
    for name, namesake in namesakes.items():
        _become(modules[name], namesake)
    sets: dict[_Channels, list[str]] = {}
    for name, channels in trace.channels.items():
        sets.setdefault(channels, []).append(name)
    tied = [names for channels, names in sets.items() if channels.kept is None and len(names) > 1]
    model.residual_sums = tied  # type: ignore[assignment]
    return SlimReport(
        converted={name: type(namesake).__name__ for name, namesake in namesakes.items()},
        kept={name: channels.kept for name, channels in trace.channels.items() if channels.kept is not None},
        tied=tied,
        unreached=unreached,
    )


def _namesake(name: str, module: Any, trace: _Trace) -> nn.Module:
    """A sliced layer like `module`, without parameters of its own."""
    sliced: Any = _sliced_class(module)
    if isinstance(module, nn.LayerNorm):
        return sliced(module.normalized_shape[0], device="meta")
    if isinstance(module, _NormBase):
        return sliced(module.num_features, device="meta")
    options: dict[str, Any] = {"divisor": trace.divisor, "device": "meta"}
    if name in trace.channels:
        channels = trace.channels[name]
        options |= {"slice_out": channels.kept is None, "ratio": channels.ratio(trace.divisor)}
    else:
        options["ratio"] = _input_ratio(name, module, trace)
    if isinstance(module, nn.Linear):
        return sliced(module.in_features, module.out_features, **options)
    return sliced(module.in_channels, module.out_channels, 1, groups=module.groups, **options)


def _input_ratio(name: str, module: nn.Conv2d, trace: _Trace) -> int:
    """The `ratio` of the channels that a grouped convolution follows; where they are all kept, one step is all."""
    prefix = trace.inputs[name]
    if prefix is None or trace.channels[prefix.layer].kept is not None:
        return module.in_channels
    return math.ceil(trace.channels[prefix.layer].ratio(trace.divisor) * prefix.scale)


def _become(module: nn.Module, namesake: nn.Module) -> None:
    """Give `module` the class of `namesake` and the attributes that only this has.

    The module stays the object it was, so whoever holds it (a hook, a list, an attribute of another module) does not
    see two.
    """
    vars(module).update({key: value for key, value in vars(namesake).items() if key not in vars(module)})
    module.__class__ = type(namesake)
