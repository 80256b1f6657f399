"""The width of a network: how many channels it keeps, which width is in effect, and plans for single layers.

A universally slimmable network (Yu and Huang, "Universally Slimmable Networks and Improved Training
Techniques", ICCV 2019) runs at any width in (0, 1]: every sliced layer keeps a prefix of its channels.

    with use_width(model, 0.5):                          # restored on exit
        y = model(x)
    set_width(model, {"": 0.5, "layer3": 0.25})          # a plan: layer3 at 0.25, the rest at 0.5
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real

from torch import nn

Width = float | Mapping[str, float]
"""A width in (0, 1], or a plan: widths by module name. A name stands for everything below it, the longest
name that fits a layer wins, and "" (1.0 if it is missing) is for the rest."""


def make_divisible(value: float, divisor: int = 8, min_value: int | None = None) -> int:
    """The multiple of `divisor` nearest to `value`, one step up where that is below 0.9 of it.

    At least `min_value` (None: one divisor). The rule of MobileNetV2 and of the slimmable networks.
    """
    if divisor < 1:
        raise ValueError(f"divisor: expected an integer >= 1, got {divisor}")
    minimum = divisor if min_value is None else min_value
    rounded = max(minimum, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def active_channels(channels: int, width: float, *, divisor: int = 8, ratio: int = 1) -> int:
    """How many of `channels` a layer keeps at `width`.

    make_divisible(channels * width / ratio) * ratio, at least one step and never more than `channels`; width
    1.0 keeps all of them. `ratio` is the expansion of a layer that follows another's channels (6 in
    MobileNetV2's expansions).
    """
    if width == 1.0:
        return channels
    return min(channels, make_divisible(channels * width / ratio, divisor) * ratio)


class Sliced:
    """What `set_width` asks of a layer; mixed into every sliced module.

    active_width: the width in effect for this layer. width_key: the text of the whole network's width (a
    plan, say), by which calibrated statistics are kept: what a norm sees depends on the layers before it too.
    """

    active_width: float = 1.0
    width_key: str = "1.0"

    def check_width(self, width: float) -> None:
        """Raise ValueError if the layer cannot run at `width`."""

    def set_active(self, width: float, key: str) -> None:
        """Run at `width` from now on, as a part of the network whose width is `key`."""
        # Not through nn.Module.__setattr__: it would take most of the time of a change of width, and there
        # are several in a training step.
        vars(self).update(active_width=width, width_key=key)

    def plan_key(self) -> Hashable:
        """What the width in effect decides in training: layers with equal keys do the same with the same input."""
        return self.active_width

    @property
    def follows_input(self) -> bool:
        """Whether as many channels are active in the output as in the input."""
        return True

    def why_not_any_width(self) -> str | None:
        """Why it cannot read the number of active channels from the device (`any_width`); None if it can."""
        return f"{type(self).__name__} takes them from the host"


class FixedWidths(Sliced):
    """A sliced layer that offers the widths of a list and no others."""

    widths: tuple[float, ...]

    def index_of(self, width: float) -> int:
        """The place of `width` in `widths`; ValueError if it has none."""
        if width not in self.widths:
            raise ValueError(f"width: {type(self).__name__} offers {list(self.widths)}, got {width}")
        return self.widths.index(width)

    def check_width(self, width: float) -> None:
        self.index_of(width)


class SlicedOutput(Sliced):
    """A sliced layer with channels of its own to choose: a convolution or a linear layer."""

    slice_out: bool
    divisor: int
    ratio: int

    @property
    def follows_input(self) -> bool:
        return False

    def channels_at(self, width: float) -> int:
        """The number of output channels at `width`."""
        raise NotImplementedError

    def plan_key(self) -> Hashable:
        return self.channels_at(self.active_width)


def _check_width(width: object, name: str = "width") -> float:
    if isinstance(width, bool) or not isinstance(width, Real):
        raise TypeError(f"{name}: expected a number in (0, 1], got {width!r}")
    value = float(width)
    if not 0 < value <= 1:  # NaN fails the comparison too
        raise ValueError(f"{name}: expected a number in (0, 1], got {width!r}")
    return value


def _plan(width: Width) -> dict[str, float]:
    """`width` as a checked plan, without the entries that say what the layers would inherit anyway."""
    if not isinstance(width, Mapping):
        return {"": _check_width(width)}
    plan = {"": 1.0}
    for name, value in width.items():
        if not isinstance(name, str):
            raise TypeError(f"width: expected module names as the keys of a plan, got {name!r}")
        plan[name] = _check_width(value, f"width[{name!r}]")
    return {
        name: value
        for name, value in plan.items()
        if name == "" or value != _width_of(name.rpartition(".")[0], plan)
    }


def _width_of(name: str, plan: Mapping[str, float]) -> float:
    while name not in plan:
        name = name.rpartition(".")[0]
    return plan[name]


def _key(plan: Mapping[str, float]) -> str:
    named = [f"{name}={plan[name]!r}" for name in sorted(plan) if name]
    return ",".join([*named, f"*={plan['']!r}"]) if named else repr(plan[""])


def width_key(width: Width) -> str:
    """The canonical text of a width or a plan: "0.5", "layer3=0.4,*=0.5". Equal widths have equal keys.

    Raises TypeError or ValueError for what is not a width.
    """
    return _key(_plan(width))


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _check_names(plan: Mapping[str, float], layers: Mapping[str, Sliced]) -> None:
    known = {""}.union(*map(_ancestors, layers))
    for name in plan:
        if name not in known:
            nearest = difflib.get_close_matches(name, known - {""}, n=1, cutoff=0.0)
            hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
            raise ValueError(f"width: the plan names {name!r}, which has no sliced layer{hint}")


def _check_residual_sums(model: nn.Module, widths: Mapping[Sliced, float]) -> None:
    """Raise if the branches of a residual sum would get different numbers of channels."""
    for prefix, module in model.named_modules():
        for names in getattr(module, "residual_sums", ()):
            channels = {}
            for name in names:
                branch = module.get_submodule(name)
                if not isinstance(branch, SlicedOutput):
                    raise TypeError(
                        f"residual_sums of {type(module).__name__}: expected names of sliced convolutions or "
                        f"linear layers, got {name!r}, a {type(branch).__name__}"
                    )
                channels[f"{prefix}.{name}".lstrip(".")] = branch.channels_at(widths[branch])
            if len(set(channels.values())) > 1:
                listed = ", ".join(f"{name} ({count} channels)" for name, count in channels.items())
                raise ValueError(f"width: the plan breaks a residual sum, {listed}: give them one width")


def _sliced_layers(model: nn.Module) -> dict[str, Sliced]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Sliced)}
    if not layers:
        raise ValueError(
            f"model: expected a module with sliced layers (us3l_kernels.nn), {type(model).__name__} has none"
        )
    return layers


def widths_of_layers(model: nn.Module, width: Width) -> dict[Sliced, float]:
    """The width that every sliced layer of `model` has at `width`. Errors as of `set_width`."""
    plan = _plan(width)
    layers = _sliced_layers(model)
    if isinstance(width, Mapping):
        _check_names(width, layers)
    widths = {layer: _width_of(name, plan) for name, layer in layers.items()}
    for layer, active in widths.items():
        layer.check_width(active)
    if len(plan) > 1:
        _check_residual_sums(model, widths)
    return widths


def set_width(model: nn.Module, width: Width) -> None:
    """Set the width of every sliced layer in `model`, until the next call.

    model: any module with sliced layers, a part of a larger model too. width: see `Width`.

    A plan may not give different channels to layers whose outputs are added: a model says which these are in
    an attribute `residual_sums: list[list[str]]` (names of convolutions or linear layers, relative to the
    module that defines it). Nothing is changed if the width is refused. Statistics are calibrated for the
    width of a whole model: to mix widths in it, use a plan, rather than one call for each part.

    Raises ValueError for a width outside (0, 1], an unknown name in a plan, a plan that breaks a residual
    sum, a width that a layer does not offer, or a model without sliced layers; TypeError for no number.
    """
    widths = widths_of_layers(model, width)
    key = width_key(width)
    for layer, active in widths.items():
        layer.set_active(active, key)


def plan_key(model: nn.Module) -> Hashable:
    """What the widths in effect make of `model` in training: equal for widths that round to the same channels.

    Raises ValueError for a model without sliced layers.
    """
    return tuple([layer.plan_key() for layer in _sliced_layers(model).values()])


@contextmanager
def use_width(model: nn.Module, width: Width) -> Iterator[None]:
    """Run `model` at `width` inside the context, then at what was set before, also after an exception.

    Contexts nest. Errors as of `set_width`.
    """
    before = [(layer, layer.active_width, layer.width_key) for layer in _sliced_layers(model).values()]
    set_width(model, width)
    try:
        yield
    finally:
        for layer, active, key in before:
            layer.set_active(active, key)


_views = 1


@contextmanager
def views(n: int) -> Iterator[None]:
    """Tell every sliced norm that the batch is `n` stacked views, view-major: each has its own statistics.

    The first N/n samples are view 1. Of the process, not of a thread. Raises ValueError for n < 1.
    """
    global _views
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"views: expected an integer >= 1, got {n!r}")
    before, _views = _views, n
    try:
        yield
    finally:
        _views = before


stacked_widths = 1  # of a batch: set by `us3l_kernels.any_width`, each has all of the views


def current_views() -> int:
    """The number of stacked views in a batch; 1 outside of `views`."""
    return _views * stacked_widths
