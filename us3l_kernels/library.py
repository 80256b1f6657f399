"""The registered operators `torch.ops.us3l.*`: schemas, fakes, autograd formulas.

Every operation is one forward operator and one backward operator; the backend is an argument, chosen before the call
(`us3l_kernels.backends.choose`), so that a traced graph holds the choice. A backward operator ADDS the parameters'
gradients into the prefixes of the full-size tensors it is given: fresh zeros in the ordinary case, the attached buffer
when gradients are accumulated in place (`us3l_kernels.gradients`). That is the whole difference between the two.

`conv2d`, `linear`, `batch_norm` and `layer_norm` below call the operators; where no tracer, no mode and no subclass of
Tensor could see the difference, they call the kernels without PyTorch's dispatcher.

Outputs have defined strides: channels_last if x or the weight is, contiguous otherwise. Gradients of x have the
strides of x made dense. Differentiating twice raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from us3l_kernels.backends import BACKENDS
from us3l_kernels.gradients import slot_of
from us3l_kernels.layout import convolved
from us3l_kernels.triton import Sizes

LIBRARY = torch.library.Library("us3l", "DEF")

_CONV = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
SCHEMAS = (
    f"conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels, {_CONV}, str backend) -> Tensor",
    "conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, Tensor(b!)? grad_bias,"
    f" bool need_grad_x, {_CONV}, str backend) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, SymInt in_features, str backend) -> Tensor",
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, Tensor(b!)? grad_bias,"
    " bool need_grad_x, SymInt in_features, str backend) -> Tensor",
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor? residual, bool training, float momentum, float eps, SymInt views, str? activation, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, bool need_grad_x, bool need_grad_residual, bool training,"
    " SymInt views, str? activation, str backend) -> (Tensor, Tensor)",
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor(a!)? grad_weight,"
    " Tensor(b!)? grad_bias, bool need_grad_x, str backend) -> Tensor",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)
ops = torch.ops.us3l


# ---------------------------------------------------------------------------------------------- strides


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-D tensor is laid out with channels innermost (also as a prefix slice of such a tensor)."""
    return t.dim() == 4 and t.stride(1) == 1 and not t.is_contiguous()


def _dense(t: Tensor, channels_last: bool) -> Tensor:
    """`t` with exactly the strides of a fresh dense tensor of that format; no copy if it has them."""
    t = t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if 1 not in t.shape:
        return t
    wanted = _empty(t, t.shape, channels_last, device="meta").stride()
    if t.stride() == wanted:
        return t
    # Dimensions of size 1. Not as a view: nobody may write to a view that a Function returns.
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, wanted)


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool, **options: Any) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=memory_format, **{"device": like.device, **options})


def _gradient_of(x: Tensor, dx: Tensor | None, needed: bool) -> Tensor:
    """An operator must return a tensor: an empty one stands for a gradient that was not asked for."""
    return _dense(dx, is_channels_last(x)) if needed and dx is not None else x.new_empty(0)


def _fake_gradient_of(x: Tensor, needed: bool) -> Tensor:
    return _empty(x, x.shape, is_channels_last(x)) if needed else x.new_empty(0)


# ---------------------------------------------------------------------------------------------- kernels and fakes


def _of_backend(operation: str, chosen: str | Sizes) -> Callable[..., Any]:
    """The operation of the backend that is named. `Sizes` in place of a name are for `triton`, which reads them."""
    if isinstance(chosen, Sizes):
        chosen.check_version()
        return partial(getattr(BACKENDS["triton"], operation), sizes=chosen)
    of_named: Callable[..., Any] = getattr(BACKENDS[chosen], operation)
    return of_named


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    y = _of_backend("conv2d", args[-1])(x, weight, bias, *args[:-1])
    return _dense(y, is_channels_last(x) or is_channels_last(weight))


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    height, width = convolved(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty(x, (x.size(0), out_channels, height, width), is_channels_last(x) or is_channels_last(weight))


def _conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gw: Tensor | None,
    gb: Tensor | None,
    need_grad_x: bool,
    *args: Any,
) -> Tensor:
    dx = _of_backend("conv2d_backward", args[-1])(grad, x, weight, gw, gb, need_grad_x, *args[:-1])
    return _gradient_of(x, dx, need_grad_x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: int, in_: int, chosen: str | Sizes) -> Tensor:
    y: Tensor = _of_backend("linear", chosen)(x, weight, bias, out, in_)
    return y.contiguous()


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, out: int, in_: int, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gw: Tensor | None,
    gb: Tensor | None,
    need_grad_x: bool,
    in_features: int,
    chosen: str | Sizes,
) -> Tensor:
    dx = _of_backend("linear_backward", chosen)(grad, x, weight, gw, gb, need_grad_x, in_features)
    return dx.contiguous() if dx is not None else x.new_empty(0)


def _batch_norm(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _of_backend("batch_norm", args[-1])(x, *args[:-1])
    return _dense(y, is_channels_last(x)), mean, rstd


def _batch_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    views: int,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((views if training else 1, x.size(1)), dtype=dtype)
    return _empty(x, x.shape, is_channels_last(x)), mean, torch.empty_like(mean)


def _batch_norm_backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    need_grad_x, need_grad_residual = args[5], args[6]
    dx, dresidual = _of_backend("batch_norm_backward", args[-1])(grad, x, y, weight, *args[:-1])
    if dresidual is grad and need_grad_residual:  # an operator never returns its input
        dresidual = grad.clone()
    return _gradient_of(x, dx, need_grad_x), _gradient_of(x, dresidual, need_grad_residual)


def _batch_norm_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return _fake_gradient_of(x, args[5]), _fake_gradient_of(x, args[6])


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = BACKENDS[backend].layer_norm(x, weight, bias, eps)
    return y.contiguous(), mean, rstd


def _layer_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((*x.shape[:-1], 1), dtype=dtype)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, *args: Any) -> Tensor:
    dx = BACKENDS[args[-1]].layer_norm_backward(grad, x, weight, *args[:-1])
    return dx.contiguous() if dx is not None else x.new_empty(0)


def _fake_plain_backward(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    need_grad_x = next(a for a in args if isinstance(a, bool))
    return x.new_empty(x.shape if need_grad_x else 0)


def _fake_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, gw: Any, gb: Any, need: bool, *_: Any) -> Tensor:
    return _fake_gradient_of(x, need)


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv2d": (_conv2d, _conv2d_fake),
    "conv2d_backward": (_conv2d_backward, _fake_conv2d_backward),
    "linear": (_linear, _linear_fake),
    "linear_backward": (_linear_backward, _fake_plain_backward),
    "batch_norm": (_batch_norm, _batch_norm_fake),
    "batch_norm_backward": (_batch_norm_backward, _batch_norm_backward_fake),
    "layer_norm": (_layer_norm, _layer_norm_fake),
    "layer_norm_backward": (_layer_norm_backward, _fake_plain_backward),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"us3l::{_name}", _fake, lib=LIBRARY)


# ---------------------------------------------------------------------------------------------- autograd


def first_derivative_only(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A Function's backward without a derivative of its own: asking for one raises and names the operator."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():  # it is under create_graph=True
                return backward(ctx, *grads)
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            message = f"us3l::{name} has first derivatives only: its backward cannot be differentiated again"
            error = torch._C._functions.DelayedError(message.encode(), len(outputs))
            # Fresh leaves, because the error must be in the history whatever the gradients depended on.
            fresh = [None if t is None else t.detach().requires_grad_() for t in outputs]
            return error(*fresh)  # type: ignore[arg-type]  # None is allowed, its stub says not

        return checked

    return decorate


class GradientDestinations:
    """Where the gradients of a layer's parameters go, and what is handed back to autograd."""

    def __init__(self, ctx: Any, positions: dict[int, Tensor | None]) -> None:
        self.into: list[Tensor | None] = []
        self.returned: list[Tensor | None] = []
        for position, parameter in positions.items():
            if parameter is None or not ctx.needs_input_grad[position]:
                destination, returned = None, None
            elif (slot := slot_of(parameter)) is not None:
                destination, returned = slot.destination(ctx), None
            else:
                destination = returned = torch.zeros_like(parameter)
            self.into.append(destination)
            self.returned.append(returned)


def is_plain_call(args: Sequence[Any]) -> bool:
    """Whether nobody but autograd has a say in a call: the dispatcher is then two detours through C++ for nothing,
    which take longer than the kernels of small layers.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and (args[0].is_cpu or args[0].is_cuda)
        and all(t is None or type(t) in (Tensor, nn.Parameter) for t in args[:3])
    )


def _below_autograd(name: str) -> Callable[..., Any]:
    """The operator, or its kernel."""
    op, kernel = getattr(ops, name).default, _KERNELS[name][0]

    def call(*args: Any) -> Any:
        if is_plain_call(args):
            return kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


below_autograd = {name: _below_autograd(name) for name in _KERNELS}


def _forward(ctx: Any, op: Callable[..., Any], tensors: Sequence[Tensor | None], args: Sequence[Any]) -> Any:
    """Run the operator below autograd and remember what the backward needs."""
    for t in tensors[1:3]:
        if t is not None and (slot := slot_of(t)) is not None:
            slot.refuse_ddp()
    ctx.args = args
    return op(*tensors, *args)


def _product(name: str) -> type[torch.autograd.Function]:
    """The Function of a convolution or a matrix product: both are linear in x and in the weight."""
    forward_op, backward_op = below_autograd[name], below_autograd[f"{name}_backward"]

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
            ctx.save_for_backward(x, weight, bias)
            return _forward(ctx, forward_op, (x, weight, bias), args)

        @staticmethod
        @first_derivative_only(name)
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, bias = ctx.saved_tensors
            parameters = GradientDestinations(ctx, {1: weight, 2: bias})
            need_grad_x = ctx.needs_input_grad[0]
            # args: the number of active outputs, which the gradient shows, and what the backward needs as well.
            dx = backward_op(grad, x, weight, *parameters.into, need_grad_x, *ctx.args[1:])
            return (dx if need_grad_x else None, *parameters.returned, *[None] * len(ctx.args))

    return Product


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (x, weight, bias, running_mean, running_var, residual)
        y, mean, rstd = _forward(ctx, below_autograd["batch_norm"], tensors, args)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        training, _, _, _, activation, _ = args
        # y gives the activation's mask, and is kept by the next layer anyway.
        ctx.save_for_backward(x, y if activation is not None else None, weight, bias, mean, rstd)
        ctx.had_residual = residual is not None
        return y, mean, rstd

    @staticmethod
    @first_derivative_only("batch_norm")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (6 + len(ctx.args))
        x, y, weight, bias, mean, rstd = ctx.saved_tensors
        training, _, _, views, activation, backend = ctx.args
        parameters = GradientDestinations(ctx, {1: weight, 2: bias})
        need_grad_x, need_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        dx, dresidual = below_autograd["batch_norm_backward"](
            grad,
            x,
            x if y is None else y,
            weight,
            None if ctx.had_residual else bias,
            mean,
            rstd,
            *parameters.into,
            need_grad_x,
            need_residual and activation is not None,
            training,
            views,
            activation,
            backend,
        )
        if activation is None:
            dresidual = grad
        return (
            dx if need_grad_x else None,
            *parameters.returned,
            None,
            None,
            dresidual if need_residual else None,
            *[None] * len(ctx.args),
        )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = _forward(ctx, below_autograd["layer_norm"], (x, weight, bias), args)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y, mean, rstd

    @staticmethod
    @first_derivative_only("layer_norm")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + len(ctx.args))
        x, weight, bias, mean, rstd = ctx.saved_tensors
        parameters = GradientDestinations(ctx, {1: weight, 2: bias})
        need_grad_x = ctx.needs_input_grad[0]
        dx = below_autograd["layer_norm_backward"](
            grad, x, weight, mean, rstd, *parameters.into, need_grad_x, ctx.args[-1]
        )
        return (dx if need_grad_x else None, *parameters.returned, *[None] * len(ctx.args))


def _operation(name: str, function: type[torch.autograd.Function], tensors: int) -> Callable[..., Any]:
    """The operation for everybody to call, registered above the operator: the Function if anything needs a gradient."""
    op, below = getattr(ops, name).default, below_autograd[name]

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:tensors]):
            return function.apply(*args)
        return below(*args)

    LIBRARY.impl(name, autograd, "Autograd")
    return lambda *args: (autograd if is_plain_call(args) else op)(*args)


conv2d = _operation("conv2d", _product("conv2d"), 3)
linear = _operation("linear", _product("linear"), 3)
batch_norm = _operation("batch_norm", _BatchNorm, 6)
layer_norm = _operation("layer_norm", _LayerNorm, 3)
