"""Gradients accumulated in place: opt in with `attach(model)`.

A width-sliced layer's weight gradient is zero outside the slice. The ordinary way, which needs nothing from here, is
a full-size tensor with exact zeros, so that everything in torch works as with any layer. The other way is to keep one
flat buffer for the whole model whose pieces ARE the parameters' `.grad`: `.backward()` adds each layer's gradient
straight into the active slice, several widths add up, and one all-reduce of the flat buffer is the whole
communication of a step.

    buffer = attach(model)
    for width in widths:
        with use_width(model, width):
            loss(model(x)).backward()       # adds up in buffer.flat
    optimizer.step()                        # us3l_kernels.optim: parameters that nothing touched are skipped
    buffer.zero_()                          # or optimizer.zero_grad(), either form

`.grad` stays an ordinary tensor: clipping, GradScaler and stock optimizers work. So does a stock `zero_grad()`; it
lets go of the gradients only, and `flat` follows with the next backward. What cannot work on an attached
model says so: `torch.autograd.grad` with respect to an attached parameter, tensor hooks on one,
`load_state_dict(assign=True)`, and DistributedDataParallel (the flat buffer is the bucket: reduce it once).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


class Slot:
    """The place of one parameter's gradient in the buffer.

    view: the gradient, with the parameter's shape, strides and dtype.  touched: whether anything was added to it since
    the buffer was last zeroed; our optimizers skip an untouched parameter as if its gradient were None.
    """

    def __init__(self, buffer: GradientBuffer, parameter: nn.Parameter, name: str, view: Tensor) -> None:
        self.buffer = buffer
        self.parameter = parameter
        self.name = name
        self.view = view
        self.touched = False
        self.zero = True  # nothing has been written since the view was last zeroed
        self._address = view.data_ptr()
        self._kind = (parameter.shape, parameter.dtype, parameter.device)
        slot = weakref.ref(self)  # Python's garbage collector does not see what such a hook keeps

        def after_autograd(parameter: Tensor) -> None:
            if (alive := slot()) is not None:
                alive._after_autograd(parameter)

        self._hook = parameter.register_post_accumulate_grad_hook(after_autograd)

    def destination(self, ctx: Any) -> Tensor | None:
        """Where the backward of `ctx`, which took the parameter, adds the gradient; None if it is not wanted."""
        p = self.parameter
        # Not kept from one backward to the next: it keeps the parameter, and so the model would live for ever.
        accumulate = next(node for node, _ in ctx.next_functions if getattr(node, "variable", None) is p)
        # Module.to moves a gradient by giving the same tensor object other memory: the address tells.
        if self.view.data_ptr() != self._address or (p.shape, p.dtype, p.device) != self._kind:
            raise RuntimeError(
                f"{self.name!r} was moved or converted after its gradient was attached (as {self._kind[1]} on "
                f"{self._kind[2]}): detach and attach the model again"
            )
        try:
            wanted = torch._C._will_engine_execute_node(accumulate)
        except RuntimeError as e:
            raise RuntimeError(
                f"torch.autograd.grad with respect to {self.name!r}: its gradients are accumulated in place and "
                "never returned. Use .backward() and .grad, or us3l_kernels.gradients.detach(model) first"
            ) from e
        if not wanted:
            return None
        if p._backward_hooks or len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) > 1:
            raise RuntimeError(
                f"{self.name!r} has tensor hooks, which never see a gradient that is accumulated in place. "
                "Remove them, or us3l_kernels.gradients.detach(model) first"
            )
        self.mark()
        return self.view

    def mark(self) -> None:
        """Something is added to the gradient now, by a backward or by a replay of one (us3l_kernels.plans)."""
        self._link()
        self.touched, self.zero = True, False

    def refuse_ddp(self) -> None:
        """Raises inside the forward of a DistributedDataParallel, whose reducer would wait for gradients in vain."""
        if DistributedDataParallel._get_active_ddp_module() is not None:
            raise RuntimeError(
                f"{self.name!r} accumulates its gradient in place, which DistributedDataParallel cannot see. "
                "Call us3l_kernels.gradients.detach(model) before wrapping it, or drop the wrapper and "
                "all-reduce buffer.flat once per step"
            )

    def _link(self) -> None:
        """Make `.grad` the view again after `zero_grad(set_to_none=True)` or an assignment from outside."""
        grad = self.parameter.grad
        if grad is self.view:
            return
        if grad is None:
            self.buffer.zero_released_()
            self.view.zero_()
        else:
            self.view.copy_(grad)
        self.parameter.grad = self.view

    def _after_autograd(self, parameter: Tensor) -> None:
        """A layer that is not ours (or a compiled one) delivered the ordinary way: AccumulateGrad has added it."""
        grad = parameter.grad
        if grad is None:
            return
        if grad is not self.view:
            self.buffer.zero_released_()
            self.view.copy_(grad)
            parameter.grad = self.view
        self.touched, self.zero = True, False

    def __reduce__(self) -> tuple[Any, ...]:
        return _not_attached, ()  # a saved model is not attached, as a copied one is not

    def release(self) -> None:
        self._hook.remove()
        del self.parameter._us3l_slot  # type: ignore[attr-defined]


def _not_attached() -> None:
    return None


class GradientBuffer:
    """All gradients of a model in one flat tensor; made by `attach`.

    flat: 1-D, the parameters' dtype, on their device; every slot starts on a multiple of 64 bytes and the padding
    between slots is zero for ever, so that norms and all-reduces may run over the whole of it.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("attach: expected a model with parameters that require gradients, got none")
        kinds = {(p.dtype, p.device) for _, p in named}
        if len(kinds) > 1:
            raise ValueError(f"attach: expected parameters of one dtype on one device, got {sorted(map(str, kinds))}")
        taken = [n for n, p in named if slot_of(p) is not None]
        if taken:
            raise ValueError(f"attach: {taken[0]!r} is attached already; call detach(model) first")
        dtype, device = kinds.pop()
        step = ALIGNMENT // dtype.itemsize
        starts, size = [], 0
        for _, p in named:
            starts.append(size)
            size += -(-p.numel() // step) * step
        self.flat = torch.zeros(size, dtype=dtype, device=device)
        self.slots: list[Slot] = []
        for (name, p), start in zip(named, starts, strict=True):
            strides = torch.empty_like(p, device="meta").stride()  # the parameter's own, made dense
            slot = Slot(self, p, name, self.flat.as_strided(p.shape, strides, start))
            p._us3l_slot = slot  # type: ignore[attr-defined]
            self.slots.append(slot)
        self._guards = [module.register_load_state_dict_pre_hook(_refuse_assign) for module in model.modules()]
        self.zero_()

    def zero_(self) -> None:
        """Zero every gradient, clear every touched flag, make every `.grad` the view it should be."""
        self.flat.zero_()
        for slot in self.slots:
            slot.touched, slot.zero = False, True
            slot.parameter.grad = slot.view

    def zero_released_(self) -> None:
        """Zero what `zero_grad(set_to_none=True)` of a model or a stock optimizer let go of, and left in `flat`."""
        for slot in self.slots:
            if slot.parameter.grad is None and not slot.zero:
                slot.view.zero_()
                slot.touched, slot.zero = False, True

    def release(self) -> None:
        """Let the model load as any other again."""
        for guard in self._guards:
            guard.remove()


def _refuse_assign(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Before a module loads a state_dict. Parameters put in place of attached ones would leave the buffer unused."""
    attached = [name for name, p in module.named_parameters(recurse=False) if slot_of(p) is not None]
    if attached and metadata.get("assign_to_params_buffers", False):
        raise RuntimeError(
            f"load_state_dict(assign=True) would replace {prefix + attached[0]!r}, whose gradient is attached. Load "
            "without assign, or detach the model first, and attach it again (and make its optimizer) afterwards"
        )


def attach(model: nn.Module) -> GradientBuffer:
    """Accumulate the gradients of `model` in place from now on. Returns the buffer that holds them.

    Parameters must share one dtype and one device; those that do not require gradients are left out. Attach after
    moving the model (`to`, `channels_last`); a copy of the model (deepcopy) is not attached.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("attach: expected the model itself, got it wrapped in DistributedDataParallel")
    return GradientBuffer(model)


def detach(model: nn.Module) -> None:
    """Back to ordinary gradients. What has been accumulated stays in `.grad`."""
    for p in model.parameters():
        slot = slot_of(p)
        if slot is not None:
            slot.release()
            slot.buffer.release()


def slot_of(parameter: Tensor) -> Slot | None:
    """The attached slot of a parameter; None if its gradients are ordinary."""
    return getattr(parameter, "_us3l_slot", None)


def has_gradient(parameter: Tensor) -> bool:
    """Whether an optimizer should move the parameter: it has a gradient that something has been added to."""
    slot = slot_of(parameter)
    return parameter.grad is not None and (slot is None or slot.touched)
