"""The sliced operations: full weights in, prefix slices used, nothing copied by the caller.

The active input channels are those of `x`; the active output channels are an argument. Parameters come at full size
and get full-size gradients that are zero outside the slice (or see `us3l_kernels.gradients`). Each function checks its
arguments, resolves the dtype under autocast (the same way in training and evaluation), chooses a backend and calls one
registered operator. Any strides; float32, bfloat16, float16, and float64 on `reference` and `aten`. Differentiable
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from us3l_kernels import library
from us3l_kernels.backends import BACKENDS, choose
from us3l_kernels.triton import Sizes

ACTIVATIONS = (None, "relu", "relu6")


def _pair(name: str, value: int | tuple[int, int] | list[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected an int or a pair of ints, at least {least}, got {value!r}")
    return pair


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast, where it is on for x: not for float64, nor on the meta device, which has none."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device) if x.is_floating_point() else None


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch's autocast does to a matrix product, but that float32 weights are cast slice by slice later on."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, weight, bias
    half = [t.to(dtype) if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in (weight, bias)]
    return x.to(dtype), half[0], half[1]  # type: ignore[return-value]


def _check_fits(op: str, name: str, x: Tensor, parameter: Tensor) -> None:
    """A parameter shares device and dtype with x, but for a low precision x (autocast) with float32 masters."""
    if parameter.device != x.device:
        raise ValueError(f"{op}: {name}: expected the device of x, {x.device}, got {parameter.device}")
    mixed = x.dtype in (torch.bfloat16, torch.float16) and parameter.dtype == torch.float32
    if parameter.dtype != x.dtype and not mixed:
        raise TypeError(
            f"{op}: {name}: expected the dtype of x, {x.dtype} (or float32 for a half precision x), "
            f"got {parameter.dtype}"
        )


def _check_parameters(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_fits(op, "weight", x, weight)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias: expected full shape ({weight.size(0)},), as the weight has, got {tuple(bias.shape)}"
            )
        if bias.dtype != weight.dtype or bias.device != weight.device:
            raise TypeError(
                f"{op}: bias: expected {weight.dtype} on {weight.device}, as the weight, "
                f"got {bias.dtype} on {bias.device}"
            )


def _check_active(op: str, name: str, value: int, full: int) -> None:
    if not 1 <= value <= full:
        raise ValueError(f"{op}: {name}: expected between 1 and {full} (the full weight), got {value}")


def _checked(sizes: Sizes, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> Sizes:
    """`sizes`, in place of a backend, if `triton` takes the call: it alone reads them."""
    BACKENDS["triton"].can_run(op, x, weight, raise_error=True, **arguments)
    return sizes


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    sizes: Sizes | None = None,
) -> Tensor:
    """2-D convolution with a prefix of the weight: y = x * weight[:out_channels, :c] + bias[:out_channels].

    x: [N, c, H, W], any strides. weight: [K, C / groups, kh, kw], full. bias: [K], full, or None.
    out_channels: active output channels (None: all; with groups they follow from c). groups: the FULL layer's: 1;
    C (depthwise: one group per active channel); or general, where the channels of a group stay together and
    c // (C / groups) groups are active. Returns [N, out_channels, H', W'], channels_last if x or weight is.
    sizes: x and the result have the channels of the full width, and which are active is read from the device, see
    `us3l_kernels.any_width`. So in the functions below.

    Under autocast x and the slice of the weight are cast to the autocast dtype, as torch.nn.functional.conv2d casts.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"conv2d: x and weight: expected 4 dimensions each, got {x.dim()} and {weight.dim()}")
    channels = x.size(1)
    if groups < 1 or weight.size(0) % groups:
        raise ValueError(f"conv2d: groups: expected a divisor of {weight.size(0)} output channels, got {groups}")
    if groups == 1:
        _check_active("conv2d", "channels of x", channels, weight.size(1))
        out_channels = weight.size(0) if out_channels is None else out_channels
    else:
        group = weight.size(1)
        if channels % group or not 1 <= channels // group <= groups:
            raise ValueError(
                f"conv2d: channels of x: expected 1 to {groups} groups of {group} channels, got {channels}"
            )
        follows = channels // group * (weight.size(0) // groups)
        if out_channels not in (None, follows):
            raise ValueError(
                f"conv2d: out_channels: {channels} channels in {groups} groups give {follows}, got {out_channels}"
            )
        out_channels = follows
    _check_active("conv2d", "out_channels", out_channels, weight.size(0))
    x, weight, bias = _autocast(x, weight, bias)
    _check_parameters("conv2d", x, weight, bias)
    geometry = {
        "stride": _pair("stride", stride, 1),
        "padding": _pair("padding", padding, 0),
        "dilation": _pair("dilation", dilation, 1),
    }
    for d in (0, 1):
        pad, dilated = geometry["padding"][d], geometry["dilation"][d]
        reach = dilated * (weight.size(2 + d) - 1) + 1
        if x.size(2 + d) + 2 * pad < reach:
            raise ValueError(
                f"conv2d: x: expected at least {reach - 2 * pad} pixels in dimension {2 + d} for a kernel "
                f"of {weight.size(2 + d)} with dilation {dilated}, got {x.size(2 + d)}"
            )
    call = {"out_channels": out_channels, "groups": groups, **geometry}
    chosen = choose("conv2d", x, weight, **call) if sizes is None else _checked(sizes, "conv2d", x, weight, **call)
    return library.conv2d(x, weight, bias, out_channels, *geometry.values(), groups, chosen)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    in_features: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """y = x[..., :in_features] @ weight[:out_features, :in_features]^T + bias[:out_features].

    x: [..., c]. weight: [K, C], full. bias: [K], full, or None. in_features: how much of x is read (None: all of
    it). out_features: None for all K. Returns [..., out_features], contiguous. Autocast as in `conv2d`.
    """
    if weight.dim() != 2 or x.dim() < 1:
        raise ValueError(
            f"linear: expected weight [K, C] and x [..., C], got shapes {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    out_features = weight.size(0) if out_features is None else out_features
    in_features = x.size(-1) if in_features is None else in_features
    _check_active("linear", "in_features", in_features, min(x.size(-1), weight.size(1)))
    _check_active("linear", "out_features", out_features, weight.size(0))
    x, weight, bias = _autocast(x, weight, bias)
    _check_parameters("linear", x, weight, bias)
    call = {"out_features": out_features, "in_features": in_features}
    chosen = choose("linear", x, weight, **call) if sizes is None else _checked(sizes, "linear", x, weight, **call)
    return library.linear(x, weight, bias, out_features, in_features, chosen)


def _check_vectors(op: str, x: Tensor, channels: int, **vectors: Tensor | None) -> None:
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    for name, vector in given.items():
        if vector.dim() != 1 or vector.size(0) < channels:
            raise ValueError(
                f"{op}: {name}: expected a full vector of at least {channels} elements, got {tuple(vector.shape)}"
            )
        if vector.stride(0) != 1:
            raise ValueError(f"{op}: {name}: expected a contiguous vector, got stride {vector.stride(0)}")
        _check_fits(op, name, x, vector)
    if len({vector.dtype for vector in given.values()}) > 1:
        dtypes = ", ".join(f"{name} {vector.dtype}" for name, vector in given.items())
        raise TypeError(f"{op}: expected one dtype for all of {', '.join(given)}, got {dtypes}")


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    views: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """y = activation(norm(x) * weight[:c] + bias[:c] + residual), the statistics of each view its own.

    x: [N, c] or [N, c, *], any strides. weight, bias, running_mean, running_var: [C], full, C >= c, or None.
    training: batch statistics; running ones, if given, are updated in their prefix as `views` forwards in that order
    would. Otherwise running_mean and running_var are the statistics. views: the batch is that many stacked views,
    view-major (the first N / views samples are view 1). activation: None, "relu" or "relu6". residual: shape of x.
    Statistics are computed in float32 (float64 for float64 x); y has the dtype of x. Autocast leaves x as it is, as
    it does for torch.nn.functional.batch_norm.

    Source: Ioffe and Szegedy, 2015; per-view statistics are the two forwards of the published US3L code.
    """
    if x.dim() < 2:
        raise ValueError(f"batch_norm: x: expected [N, C, ...], got shape {tuple(x.shape)}")
    channels = x.size(1)
    if channels == 0:
        raise ValueError(f"batch_norm: x: expected at least one channel, got shape {tuple(x.shape)}")
    _check_vectors(
        "batch_norm",
        x,
        channels,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
    )
    if activation not in ACTIVATIONS:
        raise ValueError(f"batch_norm: activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if residual is not None:
        kind, expected = ((tuple(t.shape), t.dtype, t.device) for t in (residual, x))
        if kind != expected:
            raise ValueError(f"batch_norm: residual: expected shape, dtype and device of x, {expected}, got {kind}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var: expected both or neither")
    if not training and running_mean is None:
        raise ValueError("batch_norm: running_mean and running_var: expected tensors when training is False, got None")
    if training:
        if views < 1 or x.size(0) % views:
            raise ValueError(f"batch_norm: views: expected a divisor of the batch of {x.size(0)}, got {views}")
        if x.numel() // (channels * views) <= 1:
            raise ValueError(
                "batch_norm: x: expected more than 1 value per channel and view in training, "
                f"got shape {tuple(x.shape)} with {views} views"
            )
    views = views if training else 1
    like = running_mean if weight is None else weight
    call = {"training": training, "views": views, "activation": activation, "residual": residual is not None}
    chosen = choose("batch_norm", x, like, **call) if sizes is None else _checked(sizes, "batch_norm", x, like, **call)
    return library.batch_norm(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        training,
        momentum,
        eps,
        views,
        activation,
        chosen,
    )[0]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x [..., c], then scale and shift by the prefixes weight[:c], bias[:c].

    weight, bias: [C], full, or None. Under autocast it runs as torch.nn.functional.layer_norm does: in
    float32 on a GPU, in the dtype of x on a CPU.
    Returns x's shape, contiguous. Source: Ba, Kiros and Hinton, 2016.
    """
    if x.dim() < 1:
        raise ValueError("layer_norm: x: expected [..., C], got a scalar")
    if autocast_dtype(x) is not None and x.device.type != "cpu":
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))  # type: ignore[assignment]
    _check_vectors("layer_norm", x, x.size(-1), weight=weight, bias=bias)
    return library.layer_norm(x, weight, bias, eps, choose("layer_norm", x, weight))[0]
