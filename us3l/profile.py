"""Parameters and multiply-accumulates of a sliced model at each width."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from us3l.models.vit import Attention, VisionTransformer
from us3l_kernels.nn import SlicedLinear
from us3l_kernels.width import Width, use_width


@dataclass(frozen=True)
class ProfileRow:
    """Cost of one width: parameters of the active slices, MACs of one sample in convolutions, linears and attention."""

    width: Width
    params: int
    macs: int


def profile(model: nn.Module, input_shape: Sequence[int], widths: Iterable[Width]) -> list[ProfileRow]:
    """Count what one forward pass at each width uses.

    Runs a copy of `model` on the meta device, so that nothing is computed and the model is left as it is.

    Args:
        model: maps images [N, C, H, W] to anything; sliced and ordinary torch.nn layers may be mixed.
        input_shape: (C, H, W) of one image.
        widths: widths or plans.

    Raises:
        TypeError: a layer with parameters is of a kind whose cost is not known here.
    """
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (C, H, W), got {tuple(input_shape)}")
    # Training mode: an uncalibrated norm refuses to run in evaluation mode, and the cost is the same.
    model = copy.deepcopy(model).to("meta").train()
    images = torch.empty(2, *input_shape, device="meta")
    rows = []
    for width in widths:
        with use_width(model, width), torch.no_grad():
            rows.append(ProfileRow(width, *_count(model, images)))
    return rows


def _count(model: nn.Module, images: Tensor) -> tuple[int, int]:
    params: dict[nn.Module, int] = {}  # by module: a layer called twice has its parameters once
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            inputs_per_output = x.shape[1] if module.groups == 1 else module.weight.shape[1]
            weights = output.shape[1] * inputs_per_output * module.kernel_size[0] * module.kernel_size[1]
            params[module] = weights + (output.shape[1] if module.bias is not None else 0)
            macs += weights * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            read = module.read_features(x.shape[-1]) if isinstance(module, SlicedLinear) else x.shape[-1]
            weights = output.shape[-1] * read
            params[module] = weights + (output.shape[-1] if module.bias is not None else 0)
            macs += weights * (x.numel() // (x.shape[0] * x.shape[-1]))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            channels = x.shape[-1] if isinstance(module, nn.LayerNorm) else x.shape[1]
            params[module] = channels * sum(p is not None for p in (module.weight, module.bias))
        elif isinstance(module, Attention):
            macs += module.macs(x.shape[1])
        elif isinstance(module, VisionTransformer):
            params[module] = module.embedding_parameters()
        else:
            raise TypeError(f"profile: cannot count the parameters of {type(module).__name__}")

    own = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    layers = [*own, *(m for m in model.modules() if isinstance(m, Attention))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return sum(params.values()), macs
