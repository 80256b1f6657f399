"""What one US3L step must compute, move and launch on a GPU, from the layers of the library's own models.

A model, not a measurement: a kernel takes the longest of its operations at the peak rate, its bytes at the bandwidth
(nothing is found in a cache) and the shortest time that kernels take. A step runs every width forward and backward and
the teacher forward, on two views, with bfloat16 activations and float32 parameters; the heads, a few small matrix
products, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals import VIEWS
from us3l.errors import ConfigError
from us3l.models import VITS, build_model
from us3l.models.vit import MLP, Attention, Block
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, SlicedLayerNorm, SlicedLinear
from us3l_kernels.width import use_width

HALF, FULL = 2, 4  # bytes of a bfloat16 activation or cast weight, and of a float32 parameter or gradient
FINALISE = 10_000  # bytes about, to combine a norm's partial sums: as short as a kernel can be


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU. The defaults are what is assumed of an H100."""

    tflops: float = 800.0  # of bfloat16 matrix products
    tbps: float = 3.0  # of memory, TB/s
    launch_us: float = 9.0  # of the host, for a kernel in eager mode
    gap_us: float = 1.0  # between the kernels of a CUDA graph
    kernel_us: float = 2.0  # of the shortest kernel


@dataclass(frozen=True)
class Way:
    """A way to run the step. All have both the convolutions in channels_last and one pass of the teacher."""

    title: str
    batched: bool = False  # both views in one batch
    fused: bool = False  # norm, residual sum and activation in one kernel, after the statistics
    statistics: bool = False  # the statistics in the convolution's epilogue
    in_place: bool = False  # sliced weights read, and their gradients added, where they lie
    needed: bool = False  # of a linear layer's output, only what the prefix that the next one reads comes from
    compiled: bool = False  # zero-fill and cast of a sliced gradient in one kernel, as Inductor makes it
    # The sums of a norm's backward, and joins of gradients, in the epilogue of dX. What is built does so where `triton`
    # runs the convolution, and reads the mask of a sum twice: the gradient between two blocks is stored whole.
    deep: bool = False
    ideal: bool = False  # every tensor once
    update: bool = False  # optimizer, regulariser and EMA in two kernels
    graph: bool = False  # in CUDA graphs


WAYS = {
    "A": Way("published code, eager"),
    "B": Way("eager, fused optimizer, EMA and regulariser", update=True),
    "C": Way("B in CUDA graphs", update=True, graph=True),
    "I": Way("fused as by Inductor", batched=True, fused=True, compiled=True, update=True, graph=True),
    "F": Way(
        "statistics in convolutions, slices in place",
        batched=True, fused=True, statistics=True, in_place=True, needed=True, update=True, graph=True,
    ),
    "D": Way(
        "F, and sums of norms' backward in dX",
        batched=True, fused=True, statistics=True, in_place=True, needed=True, deep=True, update=True, graph=True,
    ),
    "X": Way(
        "every tensor once", batched=True, in_place=True, needed=True, ideal=True, update=True, graph=True,
    ),
}  # fmt: skip


# --- the layers of a model at a width --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """Active and full channels, taps of the kernel, pixels of one image before and after."""

    c: int
    k: int
    full_c: int
    full_k: int
    taps: int
    pixels: int
    out_pixels: int
    depthwise: bool
    first: bool  # reads the images, which need no gradient


@dataclass(frozen=True)
class Norm:
    """With the activation and the residual sum after it. `shortcut`: its output is only ever another's residual."""

    c: int
    full_c: int
    pixels: int
    activation: bool
    residual: bool
    shortcut: bool = False


@dataclass(frozen=True)
class Pool:
    """Max pooling."""

    c: int
    pixels: int
    out_pixels: int


@dataclass(frozen=True)
class Join:
    """The gradients of a tensor that two layers read are added."""

    c: int
    pixels: int


@dataclass(frozen=True)
class Linear:
    """Active and full features, tokens of one image.

    prefix: only inputs are sliced, so that ordinary code computes more of the input and of the output than is read.
    """

    c: int
    k: int
    full_c: int
    full_k: int
    tokens: int
    prefix: bool


@dataclass(frozen=True)
class Products:
    """Of an attention: queries with keys, the result with values. Channels of all heads, active and full."""

    c: int
    full_c: int
    tokens: int
    prefix: bool


@dataclass(frozen=True)
class Gelu:
    """Between the layers of an MLP."""

    c: int
    full_c: int
    tokens: int
    prefix: bool


@dataclass(frozen=True)
class LayerNorm:
    """`read`: how many of its channels the next layer reads."""

    c: int
    read: int
    tokens: int


@dataclass(frozen=True)
class Sum:
    """The residual sum of a transformer's block."""

    c: int
    tokens: int


OfTokens = Linear | Products | Gelu | LayerNorm | Sum
Layer = Conv | Norm | Pool | Join | OfTokens


def layers(model: nn.Module, size: int, width: float) -> list[Layer]:
    """What `model` (on the meta device) runs at `width` for one image of `size` pixels, in the order of the results."""
    found: list[Layer] = []
    alive: list[Tensor] = []  # or an id could be that of another tensor later on
    reads: dict[int, int] = {}
    norms: dict[int, int] = {}  # id of the output -> place in `found`
    residuals: set[int] = set()
    prefix = any(isinstance(layer, SlicedLinear) and layer.slice_in for layer in model.modules())

    def read(x: Tensor) -> None:
        reads[id(x)] = reads.get(id(x), 0) + 1
        if reads[id(x)] > 1:
            found.append(Join(x.size(1), x[0, 0].numel()))

    def visit(layer: nn.Module, inputs: tuple[Tensor | None, ...], y: Tensor) -> None:
        x, *rest = inputs
        assert x is not None
        residual = rest[0] if rest else None
        alive.extend(tensor for tensor in (x, residual, y) if tensor is not None)
        pixels, out_pixels = x[0, 0].numel(), y[0, 0].numel()
        read(x)
        if isinstance(layer, SlicedConv2d):
            taps, depthwise = layer.weight[0, 0].numel(), layer.groups > 1
            full = (layer.in_channels, layer.out_channels)
            found.append(Conv(x.size(1), y.size(1), *full, taps, pixels, out_pixels, depthwise, x is images))
        elif isinstance(layer, SlicedBatchNorm2d):
            if residual is not None:
                read(residual)
                residuals.add(id(residual))
            norms[id(y)] = len(found)
            activation = layer.activation is not None
            found.append(Norm(x.size(1), layer.num_features, pixels, activation, residual is not None))
        else:
            found.append(Pool(x.size(1), pixels, out_pixels))

    def visit_tokens(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0]
        alive.extend((x, y))
        c, tokens = x.size(-1), x[0, ..., 0].numel()
        if isinstance(layer, SlicedLinear):
            c = layer.read_features(c)
            full = (layer.in_features, layer.out_features)
            found.append(Linear(c, y.size(-1), *full, tokens, prefix))
            if id(x) in norms:
                norm = found[norms[id(x)]]
                assert isinstance(norm, LayerNorm)
                found[norms[id(x)]] = replace(norm, read=c)
        elif isinstance(layer, SlicedLayerNorm):
            norms[id(y)] = len(found)
            found.append(LayerNorm(c, c, tokens))
        elif isinstance(layer, Attention):
            of_three = layer.qkv.active_out_features, layer.qkv.out_features
            found.append(Products(*(features // 3 for features in of_three), tokens, prefix))
        elif isinstance(layer, MLP):
            hidden = layer.fc1
            found.append(Gelu(hidden.active_out_features, hidden.out_features, tokens, prefix))
        else:
            found.extend([Sum(c, tokens)] * 2)

    hooks = {
        visit: (SlicedConv2d, SlicedBatchNorm2d, nn.MaxPool2d),
        visit_tokens: (SlicedLinear, SlicedLayerNorm, Attention, MLP, Block),
    }
    handles = [
        layer.register_forward_hook(hook)
        for hook, kinds in hooks.items()
        for layer in model.modules()
        if isinstance(layer, kinds)
    ]
    images = torch.empty(2, 3, size, size, device="meta")
    try:
        with use_width(model, width), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for output in residuals & norms.keys():
        norm = found[norms[output]]
        if reads[output] == 1 and isinstance(norm, Norm):
            found[norms[output]] = replace(norm, shortcut=True)
    return found


# --- the kernels that run them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """`launches` kernels that move `size` bytes and do `operations` together. `part`: of the step."""

    part: str
    size: float
    operations: float = 0.0
    launches: int = 1

    def microseconds(self, machine: Machine) -> float:
        compute, memory = self.operations / machine.tflops / 1e6, self.size / machine.tbps / 1e6
        return max(compute, memory, machine.kernel_us * self.launches)


def kernels(layer: Layer, images: int, way: Way, *, trained: bool) -> Iterator[Kernel]:
    """The kernels of a layer for `images` images: forward, and backward if it is `trained`."""
    if isinstance(layer, Conv):
        yield from _convolution(layer, images, way, trained)
    elif isinstance(layer, Norm):
        yield from _norm(layer, images, way, trained)
    elif isinstance(layer, Pool):
        elements, results = (images * layer.c * pixels for pixels in (layer.pixels, layer.out_pixels))
        for _ in range(1 + trained):  # input, output and 4-byte indices, in both directions
            yield Kernel("elementwise", HALF * (elements + results) + 4 * results)
    elif isinstance(layer, Join):
        if trained and not (way.deep or way.ideal):
            yield Kernel("elementwise", 3 * HALF * images * layer.c * layer.pixels)
    else:
        yield from _of_tokens(layer, images * layer.tokens, way, trained)


def _convolution(layer: Conv, images: int, way: Way, trained: bool) -> Iterator[Kernel]:
    x, y = HALF * images * layer.c * layer.pixels, HALF * images * layer.k * layer.out_pixels
    inputs, full_inputs = (1, 1) if layer.depthwise else (layer.c, layer.full_c)
    weights = layer.k * inputs * layer.taps
    rows, full = layer.k * full_inputs * layer.taps, layer.full_k * full_inputs * layer.taps
    # Depthwise convolutions do not run on the tensor cores, and are bound by memory.
    operations = 0.0 if layer.depthwise else 2.0 * images * layer.out_pixels * weights
    if not way.in_place:
        yield Kernel("weights", weights * (FULL + HALF))  # autocast's copy is the slice's
    yield Kernel("convolution", x + y + weights * HALF, operations)
    if not trained:
        return
    if way.ideal:  # dX and dW read dy and the layer's input once
        dx = 0 if layer.first else x
        yield Kernel("convolution", y + x + dx + weights * (HALF + 2 * FULL), operations * (1 if layer.first else 2))
        return
    if not layer.first:
        yield Kernel("convolution", y + x + weights * HALF, operations)
    yield Kernel("convolution", y + x + weights * (2 * FULL if way.in_place else HALF), operations)
    yield from _accumulation(weights, rows, full, way)


def _accumulation(weights: int, rows: int, full: int, way: Way) -> Iterator[Kernel]:
    """A weight's gradient of that many active elements, in `rows` elements of its active outputs, `full` in all."""
    if way.in_place:
        return
    if way.compiled:
        yield Kernel("gradients", weights * HALF + full * FULL)
    else:
        yield Kernel("gradients", weights * (HALF + FULL))  # to float32
        if weights < rows:  # the backward of a slice is a zero-filled tensor and a copy into it
            yield Kernel("gradients", rows * FULL + weights * 2 * FULL, launches=2)
        if rows < full:
            yield Kernel("gradients", full * FULL + rows * 2 * FULL, launches=2)
    yield Kernel("gradients", full * 3 * FULL)  # added to what is there


def _norm(layer: Norm, images: int, way: Way, trained: bool) -> Iterator[Kernel]:
    t = HALF * images * layer.c * layer.pixels
    residual = t if layer.residual else 0
    if way.ideal:  # the next convolution normalises what it reads; only the output of a block is written
        if layer.residual:
            yield Kernel("norm", 3 * t)
        if trained and layer.residual:
            yield Kernel("norm", t)
        if trained:
            yield Kernel("norm", t)
        return
    if not way.statistics:
        yield Kernel("norm", t)
    yield Kernel("norm", FINALISE)
    if way.fused:
        if not layer.shortcut:  # a shortcut's norm is applied where it is added
            yield Kernel("norm", 2 * t + residual)
        if trained:
            if way.deep:
                yield Kernel("norm", t, launches=0)
            else:
                yield Kernel("norm", 2 * t + residual)
            yield Kernel("norm", 3 * t + residual + (0 if way.deep else residual))
    else:
        yield Kernel("norm", 2 * t)
        if layer.residual:
            yield Kernel("elementwise", 3 * t)
        if layer.activation:
            yield Kernel("elementwise", 2 * t)
        if trained:
            if layer.activation:
                yield Kernel("elementwise", 3 * t)
            yield Kernel("norm", 2 * t)
            yield Kernel("norm", 3 * t)
    if trained and not way.in_place:  # weight and bias: zero-fill, copy, addition
        yield Kernel("gradients", 2 * 4 * FULL * layer.full_c, launches=2 if way.compiled else 6)


def _of_tokens(layer: OfTokens, rows: int, way: Way, trained: bool) -> Iterator[Kernel]:
    """Eager mode keeps the residual stream, and what comes of norms, in float32, as autocast does."""
    bfloat16 = way.fused or way.ideal
    stream = HALF if bfloat16 else FULL
    if isinstance(layer, Linear):
        yield from _linear(layer, rows, way, trained)
    elif isinstance(layer, LayerNorm):
        c, read = rows * layer.c, rows * (layer.read if bfloat16 else layer.c)
        yield Kernel("norm", stream * (c + read))
        if trained:
            yield Kernel("norm", stream * (3 * c + read), launches=1 if bfloat16 else 2)
    elif isinstance(layer, Sum):
        yield Kernel("elementwise", rows * layer.c * (2 * stream + HALF))
        if trained:
            yield Kernel("elementwise", rows * layer.c * 3 * stream)
    else:
        c = layer.full_c if layer.prefix and not way.needed else layer.c
        t = HALF * rows * c
        if isinstance(layer, Products):  # fused attention: nothing of size tokens^2 is in memory
            products = 2.0 * rows * layer.tokens * c
            yield Kernel("attention", 4 * t, 2 * products)
            if trained:
                yield Kernel("attention", 8 * t, 5 * products, launches=3)
        elif not way.ideal:
            yield Kernel("elementwise", 2 * t)
            if trained:
                yield Kernel("elementwise", 3 * t)


def _linear(layer: Linear, rows: int, way: Way, trained: bool) -> Iterator[Kernel]:
    k = layer.full_k if layer.prefix and not way.needed else layer.k
    x, y, weights = rows * layer.c, rows * k, layer.c * k
    operations = 2.0 * rows * weights
    eager = not (way.fused or way.ideal)
    if not way.in_place:
        yield Kernel("weights", weights * (FULL + HALF))
    # A pass beside every product: the cast of a norm's output; of what is in bfloat16 already the sliced input makes
    # the bias a pass of its own, which is taken to be as long.
    if eager:
        yield Kernel("casts", x * (FULL + HALF))
    yield Kernel("product", HALF * (x + y + weights), operations)
    if not trained:
        return
    yield Kernel("product", HALF * (x + y + weights), operations)
    yield Kernel("product", HALF * (x + y) + weights * (2 * FULL if way.in_place else HALF), operations)
    yield Kernel("elementwise", HALF * y)  # the bias's gradient
    if eager:
        yield Kernel("casts", x * (FULL + HALF))
        if layer.prefix and layer.c < layer.full_c:  # the input's slice
            yield Kernel("casts", rows * layer.full_c * FULL + x * 2 * FULL, launches=2)
    yield from _accumulation(weights, k * layer.full_c, layer.full_k * layer.full_c, way)
    if not way.in_place:
        yield Kernel("gradients", FINALISE, launches=2)  # the bias's


def update(parameters: int, tensors: int, widths: int, way: Way) -> Iterator[Kernel]:
    """The kernels of optimizer, EMA and regulariser for that many float32 parameters in so many tensors."""
    if way.update:  # read p, g, momentum, write p, momentum, zero g; a bfloat16 copy; EMA
        yield Kernel("update", parameters * (5 * FULL + HALF + 3 * FULL), launches=2)
        return
    yield Kernel("update", widths * parameters * 11 * FULL, launches=widths * 8)  # foreach, a step per width
    yield Kernel("update", parameters * 7 * FULL, launches=3 * tensors)  # EMA into new tensors
    # Counted in the published code: 18.9 operations a tensor, 120 bytes a parameter, at every width.
    yield Kernel("regulariser", widths * parameters * 120, launches=widths * round(18.9 * tensors))


# --- the step --------------------------------------------------------------------------------------------------------


def measure(
    model: str,
    *,
    stem: str,
    size: int,
    batch: int,
    widths: Sequence[float],
    machine: Machine,
    slicing: str = "input",
) -> dict[str, Any]:
    """The model's time of a step in every way of `WAYS`: `rows` by letter, ms; and `parts`, the GPU's ms by part.

    `batch`: images per view; `widths`: the full one first, which the teacher has too. `slicing`: of a ViT, "input" as
    published; it has no batch norms, and so no way D. Raises ConfigError for a size that the model does not take.
    """
    try:
        with torch.device("meta"):
            network = build_model(model, stem=stem, slicing=slicing, image_size=size).train()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = {width: layers(network, size, width) for width in widths}
    sizes = [parameter.numel() for parameter in network.parameters()]
    passes = [*((found[width], True) for width in widths), (found[widths[0]], False)]
    ways = {name: way for name, way in WAYS.items() if model not in VITS or not way.deep}
    rows, parts = {}, {}
    for name, way in ways.items():
        images, repeats = (VIEWS * batch, 1) if way.batched else (batch, VIEWS)
        run = [
            kernel
            for run_layers, trained in passes
            for layer in run_layers
            for kernel in kernels(layer, images, way, trained=trained)
        ] * repeats + list(update(sum(sizes), len(sizes), len(widths), way))
        rows[name] = {"title": way.title, **_summary(run, way, machine)}
        parts[name] = {
            part: sum(kernel.microseconds(machine) for kernel in run if kernel.part == part) / 1e3
            for part in dict.fromkeys(kernel.part for kernel in run)
        }
    config = {"model": model, "stem": stem, "input": size, "batch": batch, "widths": list(widths)}
    return {
        "benchmark": "roofline",
        "rows": rows,
        "parts": parts,
        "config": config | ({"slicing": slicing} if model in VITS else {}),
        "machine": asdict(machine),
    }


def _summary(run: Sequence[Kernel], way: Way, machine: Machine) -> dict[str, float]:
    operations, size = sum(kernel.operations for kernel in run), sum(kernel.size for kernel in run)
    launches = sum(kernel.launches for kernel in run)
    gpu = sum(kernel.microseconds(machine) for kernel in run) / 1e3
    host = launches * machine.launch_us / 1e3
    return {
        "tflop": operations / 1e12,
        "gbyte": size / 1e9,
        "kernels": launches,
        "compute_ms": operations / machine.tflops / 1e9,
        "memory_ms": size / machine.tbps / 1e9,
        "gpu_ms": gpu,
        "wall_ms": gpu + launches * machine.gap_us / 1e3 if way.graph else max(gpu, host),
    }
