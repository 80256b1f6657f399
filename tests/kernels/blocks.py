"""Residual blocks of every kind, with what is expected of them by plain PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l_kernels import gradients, set_width, views
from us3l_kernels.backends.native import is_depthwise
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, residual_block
from us3l_kernels.width import active_channels

NAN, CANARY = float("nan"), 3.0
BENDS = {None: (), "relu": (0.0,), "relu6": (0.0, 6.0)}
# Where a value lies this close to where its activation bends, rounding decides whether a gradient passes.
TOO_CLOSE = 5e-6


class Layer(NamedTuple):
    """A convolution, depthwise without `out`, and the norm behind it; padding: None for half of the kernel."""

    out: int | None = None
    kernel: int = 3
    stride: int | tuple[int, int] = 1
    activation: str | None = "relu"
    padding: int | tuple[int, int] | None = None


def basic(channels: int, stride: int = 1) -> list[Layer]:
    return [Layer(channels, 3, stride), Layer(channels)]


def bottleneck(channels: int, out: int, stride: int = 1) -> list[Layer]:
    return [Layer(channels, 1), Layer(channels, 3, stride), Layer(out, 1)]


def inverted(hidden: int, out: int, stride: int = 1, kernel: int = 3) -> list[Layer]:
    return [Layer(hidden, 1, 1, "relu6"), Layer(None, kernel, stride, "relu6"), Layer(out, 1, 1, None)]


class Block(nn.Module):
    """The layers' modules, at a width, with NaN outside of the active slices of all parameters."""

    def __init__(self, in_channels: int, layers: list[Layer], width: float = 1.0) -> None:
        super().__init__()
        self.in_channels = active_channels(in_channels, width)
        self.body = nn.Sequential()
        for layer in layers:
            out = layer.out or in_channels
            groups = in_channels if layer.out is None else 1
            padding = layer.kernel // 2 if layer.padding is None else layer.padding
            self.body.append(
                SlicedConv2d(in_channels, out, layer.kernel, layer.stride, padding, groups=groups, bias=False)
            )
            self.body.append(SlicedBatchNorm2d(out, track_running_stats=False, activation=layer.activation))
            nn.init.normal_(self.body[-1].weight, 1.0, 0.3)
            nn.init.normal_(self.body[-1].bias, 0.0, 0.3)
            in_channels = out
        set_width(self, width)
        for parameter, active in zip(self.parameters(), self.active(list(self.parameters())), strict=True):
            values = active.detach().clone()
            parameter.data.fill_(NAN)
            active.data.copy_(values)
        self.to(memory_format=torch.channels_last)

    def pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self.body[::2], self.body[1::2], strict=True))

    def active(self, full: list[Tensor]) -> list[Tensor]:
        """The active slices of tensors like the parameters."""
        slices, channels = [], self.in_channels
        for i, (conv, _) in enumerate(self.pairs()):
            weight, read = full[3 * i], channels
            channels = read if is_depthwise(conv.weight, conv.groups) else conv.active_out_channels
            slices += [weight[:channels, :read], *(vector[:channels] for vector in full[3 * i + 1 : 3 * i + 3])]
        return slices

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return residual_block(x, residual, *self.body)


def images(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)


def gathered(y: Tensor, x: Tensor, residual: Tensor | None, parameters: list[Tensor]) -> dict[str, Tensor]:
    """Result and gradients by name. A norm's two are one: the bias's is 0 where another norm takes it away again."""
    given: dict[str, Tensor | None] = {"y": y.detach(), "dx": x.grad}
    given["dresidual"] = None if residual is None or residual is x else residual.grad
    for i in range(0, len(parameters), 3):
        of_conv, *of_norm = (p.grad for p in parameters[i : i + 3])
        given[f"dweight{i // 3}"] = of_conv
        given[f"dnorm{i // 3}"] = None if None in of_norm else torch.stack(of_norm)  # type: ignore[arg-type]
    return {name: t for name, t in given.items() if t is not None}


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.detach().to(dtype or t.dtype).requires_grad_()


def run(block: Block, x: Tensor, residual: Tensor | None, upstream: Tensor, n_views: int) -> dict[str, Tensor]:
    given = leaf(x)
    added = given if residual is x else None if residual is None else leaf(residual)
    with views(n_views):
        y = block(given, added)
    y.backward(upstream.to(y.dtype))
    return gathered(y, given, added, list(block.parameters()))


FROZEN = ("weights", "norms", "first", "last", "all", "x", "residual", "x and first")


def run_frozen(
    block: Block, x: Tensor, residual: Tensor, upstream: Tensor, n_views: int, frozen: str
) -> dict[str, Tensor]:
    """As `run`, with one of FROZEN needing no gradient."""
    frozen_modules = {
        "weights": block.body[::2],
        "norms": block.body[1::2],
        "first": block.body[:2],
        "last": block.body[-2:],
        "all": block.body,
        "x and first": block.body[:2],
    }
    for parameter in frozen_modules.get(frozen, nn.Sequential()).parameters():
        parameter.requires_grad_(False)
    given = x.clone().requires_grad_("x" not in frozen.split())
    added = residual.clone().requires_grad_(frozen != "residual")
    with views(n_views):
        y = block(given, added)
    y.backward(upstream)
    return gathered(y, given, added, list(block.parameters()))


def run_with_canary(block: Block, x: Tensor, upstream: Tensor, n_views: int) -> dict[str, Tensor]:
    """As `run`, with x as the residual. Gradients are added in place to a canary, which must stay outside of slices."""
    gradients.attach(block).flat.fill_(CANARY)
    given = leaf(x)
    with views(n_views):
        y = block(given, given)
    y.backward(upstream)
    grads = [p.grad for p in block.parameters()]
    for active in block.active(grads):
        active -= CANARY
    outside = [torch.ones_like(grad, dtype=torch.bool) for grad in grads]
    for active in block.active(outside):
        active.fill_(False)
    for grad, mask in zip(grads, outside, strict=True):
        assert mask.any() and (grad[mask] == CANARY).all()
        grad[mask] = 0
    return gathered(y, given, given, list(block.parameters()))


def exact(
    block: Block, x: Tensor, residual: Tensor | None, upstream: Tensor, n_views: int, too_close: float = TOO_CLOSE
) -> dict[str, Tensor] | None:
    """By plain PyTorch in float64, from weights sliced by hand. None where rounding decides what activations pass."""
    given = leaf(x, torch.float64)
    added = given if residual is x else None if residual is None else leaf(residual, torch.float64)
    parameters = [leaf(p, torch.float64) for p in block.parameters()]
    active, pairs = block.active(parameters), block.pairs()
    y = given
    for i, (conv, norm) in enumerate(pairs):
        weight, scale, shift = active[3 * i : 3 * i + 3]
        groups = weight.size(0) if conv.groups > 1 else 1
        y = F.conv2d(y, weight, None, conv.stride, conv.padding, groups=groups)
        y = torch.cat([F.batch_norm(v, None, None, scale, shift, True, eps=norm.eps) for v in y.chunk(n_views)])
        if added is not None and i == len(pairs) - 1:
            y = y + added
        if any((y.detach() - bend).abs().min() < too_close for bend in BENDS[norm.activation]):
            return None
        if norm.activation is not None:
            y = y.clamp(0, 6 if norm.activation == "relu6" else math.inf)
    y.backward(upstream.double())
    return gathered(y, given, added, parameters)


def errors(given: dict[str, Tensor], expected: dict[str, Tensor], least: float = 1e-30) -> dict[str, float]:
    """Largest error over largest value, or `least`, by name."""
    assert given.keys() == expected.keys()
    return {
        name: float((given[name].double() - e).abs().max() / e.abs().max().clamp_min(least))
        for name, e in expected.items()
    }


def assert_close(
    given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5, least: float = 1e-30
) -> None:
    found = errors(given, expected, least)
    assert max(found.values()) <= tolerance, {name: f"{e:.1e}" for name, e in found.items() if not e <= tolerance}


class Case(NamedTuple):
    """residual: what is added, "x", "another" tensor or "none". size: batch, height, width."""

    in_channels: int
    layers: list[Layer]
    residual: str
    size: tuple[int, int, int]
    views: int = 1
    width: float = 1.0
    eps: float = 1e-5

    def inputs(self) -> tuple[Block, Tensor, Tensor | None, Tensor]:
        """Block, x, residual and upstream gradient."""
        block = Block(self.in_channels, self.layers, self.width)
        for _, norm in block.pairs():
            norm.eps = self.eps
        n, h, w = self.size
        x = images(n, block.in_channels, h, w)
        with torch.no_grad():
            shape = block(x).shape
        residual = {"x": x, "another": images(*shape), "none": None}[self.residual]
        return block, x, residual, images(*shape)

    def drawn(self) -> tuple[Block, Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
        """The same, and what is expected."""
        for _ in range(50):
            inputs = self.inputs()
            if (expected := exact(*inputs, self.views)) is not None:
                return *inputs, expected
        raise AssertionError("no draw without a value where an activation bends")
