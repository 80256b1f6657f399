"""One sub-network as a model of its own: ordinary torch.nn layers with the weights of its slice and nothing else.

    small = us3l_kernels.standalone(model, 0.5)

The counterpart of `slim`, for every model with sliced layers. Which channels of a layer are active follows from the
width and from what reaches the layer, so the model is run once at that width on the meta device (shapes, no numbers).
"""

from __future__ import annotations

import copy
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l_kernels.convert import SlicedBatchNormAct2d, SlicedLayerNorm2d, example_of, on_meta
from us3l_kernels.nn.batch_norm import PrivateBatchNorms2d, SlicedBatchNorm, SlicedBatchNorm1d
from us3l_kernels.nn.conv import SlicedConv2d
from us3l_kernels.nn.layer_norm import SlicedLayerNorm
from us3l_kernels.nn.linear import SlicedLinear, SlicedQKV
from us3l_kernels.width import Sliced, Width, use_width


class ResidualBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What a batch norm with a residual sum and an activation of its own becomes; mixed into torch.nn's norms.

    y = activation(norm(x) + residual); activation: None, "relu" or "relu6".
    """

    activation: str | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, ...]; residual: like x -> like x."""
        return self.finish(super().forward(x), residual)

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """What comes after the norm."""
        if residual is not None:
            y = y + residual
        if self.activation == "relu":
            return F.relu(y)
        return F.relu6(y) if self.activation == "relu6" else y

    def plain(self) -> nn.Module:
        """The batch norm alone, a torch.nn layer with these same parameters and buffers."""
        kind = nn.BatchNorm1d if isinstance(self, nn.BatchNorm1d) else nn.BatchNorm2d
        norm = kind(self.num_features, self.eps, self.momentum, self.affine, device="meta")
        norm.load_state_dict(self.state_dict(), assign=True)
        return norm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class ResidualBatchNorm1d(ResidualBatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, see `ResidualBatchNorm`."""


class ResidualBatchNorm2d(ResidualBatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, see `ResidualBatchNorm`."""


class BatchNormAct2d(ResidualBatchNorm2d):
    """The shape of timm's layer of that name: a batch norm, then its `drop` and its `act`."""

    drop: nn.Module
    act: nn.Module

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        return self.act(self.drop(super().finish(y, residual)))


class PrefixLinear(nn.Linear):
    """A linear layer that reads the first `in_features` features of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] with C >= in_features -> [..., out_features]."""
        return super().forward(x[..., : self.in_features])

    def plain(self) -> nn.Module:
        """The layer for the prefix alone, of torch.nn, with these same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.load_state_dict(self.state_dict(), assign=True)
        return linear


class LayerNorm2d(nn.LayerNorm):
    """The LayerNorm2d of timm and of torchvision: a layer norm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] -> like x."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def standalone(model: nn.Module, width: Width, example_input: Tensor | None = None) -> nn.Module:
    """A copy of `model` at one width, in evaluation mode, with torch.nn's own layers for the sliced ones.

    It computes what `model.eval()` computes inside `use_width(model, width)`, needs the memory of the slice only, has
    no width any more, and can be trained, saved, traced and exported as any model. Its modules are those of `model`
    (a ResNet stays a ResNet) and so are the names in its state_dict, except that a switchable norm becomes a norm.

    model: calibrated at `width` (`calibrating`), or at full width with running statistics. It is not changed.
    width: a width in (0, 1], or a plan.
    example_input: what the forward takes, of which only shape and dtype are used; None: two images of the size in the
        model's `pretrained_cfg`, or of 224 pixels.

    Raises RuntimeError for a norm without statistics of this width, or a forward that cannot run on the meta device;
    ValueError for a width that the model refuses, a sliced layer that the forward does not reach, or one that it
    calls with several numbers of channels; TypeError for a sliced layer of an unknown kind (see `dense_layer`).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Sliced)}
    # The private norms of a switchable one are part of it.
    inner = {id(norm) for module in layers.values() if isinstance(module, PrivateBatchNorms2d) for norm in module.norms}
    layers = {name: layer for name, layer in layers.items() if id(layer) not in inner}
    if example_input is None:
        example_input = example_of(model)
    with use_width(model, width):
        calls = _calls(model, set(layers), example_input)
        # A copy that finds the dense layers where the model has sliced ones, also in its lists and attributes.
        dense: dict[int, Any] = {id(layer): _dense(name, layer, calls[name]) for name, layer in layers.items()}
        return copy.deepcopy(model, dense).eval()


Call = tuple[tuple[Any, ...], Tensor]  # the arguments of a layer, and its output


def _calls(model: nn.Module, names: set[str], example: Tensor) -> dict[str, list[Call]]:
    """The calls, in meta tensors, of every sliced layer in a forward at the width that is set."""
    shadow = on_meta(model).to("meta").eval()  # `to`: the calibrated statistics are neither parameters nor buffers
    calls: dict[str, list[Call]] = {name: [] for name in names}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[name].append(((*args, *kwargs.values()), output))

        return hook

    for name, module in shadow.named_modules():
        if name in names:
            module.register_forward_hook(record(name), with_kwargs=True)
    with torch.no_grad():
        shadow(example.to("meta"))
    return calls


def _dense(name: str, layer: Sliced, calls: list[Call]) -> nn.Module:
    if not calls:
        raise ValueError(f"model: the forward does not reach {name!r}, so its active channels are not known")
    dense, *others = [dense_layer(layer, *call) for call in calls]
    for other in others:
        if repr(other) != repr(dense):
            raise ValueError(f"model: the forward uses {name!r} as {dense} and as {other}: no one layer can be both")
    return dense


@singledispatch
def dense_layer(layer: Sliced, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    """The torch.nn layer that does what `layer` does at the width in effect.

    inputs, output: of one call, on the meta device. A new kind of sliced layer registers its own:
    `@dense_layer.register`, with the type of the layer as the annotation of the first argument.
    """
    raise TypeError(f"standalone: no dense layer is known for {type(layer).__name__}; register one with dense_layer")


@dense_layer.register
def _(layer: SlicedConv2d, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    # Channels are the third dimension from the end: a batch may be missing.
    in_channels, out_channels = inputs[0].shape[-3], output.shape[-3]
    groups = layer.groups * in_channels // layer.in_channels if layer.groups > 1 else 1
    dense = nn.Conv2d(
        in_channels,
        out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
    )
    return _fill(dense, layer)


@dense_layer.register
def _(layer: SlicedLinear, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    return _fill(_linear(layer, inputs, output), layer)


@dense_layer.register
def _(layer: SlicedQKV, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    dense = _linear(layer, inputs, output)
    for name, parameter in list(dense.named_parameters()):
        segments = getattr(layer, name).detach().unflatten(0, (3, -1))
        prefix = segments[:, : len(parameter) // 3]
        prefix = prefix[..., : dense.in_features] if name == "weight" else prefix
        setattr(dense, name, nn.Parameter(prefix.flatten(0, 1).clone()))
    return dense


def _linear(layer: SlicedLinear, inputs: tuple[Any, ...], output: Tensor) -> nn.Linear:
    available = inputs[0].shape[-1]
    read = layer.read_features(available)
    kind = nn.Linear if read == available else PrefixLinear
    return kind(read, output.shape[-1], layer.bias is not None, device="meta")


@dense_layer.register
def _(layer: SlicedLayerNorm, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    kind = LayerNorm2d if isinstance(layer, SlicedLayerNorm2d) else nn.LayerNorm
    channels = output.shape[1] if kind is LayerNorm2d else output.shape[-1]
    bias = layer.bias is not None
    return _fill(kind(channels, layer.eps, layer.elementwise_affine, bias, device="meta"), layer)


@dense_layer.register
def _(layer: SlicedBatchNorm, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    flat = isinstance(layer, SlicedBatchNorm1d)
    plain, residual = (nn.BatchNorm1d, ResidualBatchNorm1d) if flat else (nn.BatchNorm2d, ResidualBatchNorm2d)
    kind = plain if layer.activation is None and len(inputs) == 1 else residual
    if isinstance(layer, SlicedBatchNormAct2d):
        kind = BatchNormAct2d
    dense = kind(output.shape[1], layer.eps, layer.momentum, layer.affine, device="meta")
    if isinstance(dense, ResidualBatchNorm):
        dense.activation = layer.activation
    if isinstance(dense, BatchNormAct2d) and isinstance(layer, SlicedBatchNormAct2d):
        dense.drop, dense.act = copy.deepcopy(layer.drop), copy.deepcopy(layer.act)
    mean, var = layer.evaluation_statistics(output.shape[1])
    dense.running_mean, dense.running_var = mean.detach().clone(), var.detach().clone()
    dense.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    return _fill(dense, layer)


@dense_layer.register
def _(layer: PrivateBatchNorms2d, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
    return dense_layer(layer.norms[layer.active_index], inputs, output)


def _fill(dense: nn.Module, layer: nn.Module) -> nn.Module:
    """Give `dense` the prefixes of the parameters of `layer`."""
    for name, parameter in list(dense.named_parameters(recurse=False)):
        full = getattr(layer, name)
        prefix = full.detach()[tuple(slice(size) for size in parameter.shape)]
        setattr(dense, name, nn.Parameter(prefix.clone(), requires_grad=full.requires_grad))
    return dense
