"""The registry of backends: who can run an operation, who was asked for, who is taken.

Every backend is one file with one class. It says in `why_not` what it cannot do, and that one predicate serves the
automatic choice, an explicit request and the text of the error. A backend that was asked for by name runs or raises;
only `auto` (the default) goes on to the next.

    with us3l_kernels.backend("aten"): ...            # every operation
    with us3l_kernels.backend("conv2d=aten"): ...     # one operation; the others stay on `auto`
    US3L_BACKEND=reference python train.py            # the same, from the environment
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from us3l_kernels.backends import measured
from us3l_kernels.errors import BackendError, SettingError

log = logging.getLogger("us3l_kernels")

OPS = ("conv2d", "linear", "batch_norm", "layer_norm")


class Backend:
    """One implementation of the sliced operations.

    Methods have the names and the arguments of the registered operators (see `us3l_kernels.library`), less the
    backend's name: `conv2d`, `conv2d_backward`, and so on. A backend implements the forward and the backward of
    each operation that its `ops` names.
    """

    name: str
    ops: tuple[str, ...] = OPS

    def unavailable(self) -> str | None:
        """Why this backend cannot run here at all (a missing library, say); None if it can.

        Raises SettingError if an environment variable asks for what is not there.
        """
        return None

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        """Why this backend cannot run `op` on x and parameters (or statistics) like `weight`; None if it can.

        `arguments` are those of the operator that decide it: out_channels, stride, padding, dilation and groups of a
        convolution; out_features and in_features of a matrix product; training, views, activation, and whether there
        is a residual, of a batch norm.
        """
        return None

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        """Why `auto` passes this backend over for an input that it can run: the next was measured to be faster."""
        return None

    def can_run(
        self, op: str, x: Tensor, weight: Tensor | None, *, raise_error: bool = False, **arguments: Any
    ) -> bool:
        """Whether the backend takes `op` for these tensors; with `raise_error`, a BackendError tells the reason."""
        reason = self.unavailable()
        if reason is None and op not in self.ops:
            reason = f"it has no {op}"
        if reason is None:
            reason = self.why_not(op, x, weight, **arguments)
        if reason is not None and raise_error:
            raise BackendError(
                f"backend {self.name!r} was asked for and cannot run {op}: {reason}. "
                f"Use backend('auto'), or name a backend for this operation alone: backend('{op}=aten')"
            )
        return reason is None

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_channels: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H', W'], in any memory format."""
        raise NotImplementedError

    def conv2d_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor | None:
        """Adds into the prefixes of the full-size `grad_weight` and `grad_bias` (None: not needed); returns dX."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
        """[..., >= in_features] -> [..., out_features]."""
        raise NotImplementedError

    def linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        in_features: int,
    ) -> Tensor | None:
        """Adds into the prefixes of `grad_weight` and `grad_bias`; returns dX (zero past `in_features`)."""
        raise NotImplementedError

    def batch_norm(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, C, *] -> (y, mean [V, C], rstd [V, C]) (V = 1 unless training); updates running statistics.

        All vectors are full size (>= C): their prefix is used. mean and rstd have the dtype of the statistics:
        float32 for half precision x, that of x otherwise.
        """
        raise NotImplementedError

    def batch_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        need_grad_residual: bool,
        training: bool,
        views: int,
        activation: str | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Adds into the prefixes of `grad_weight` and `grad_bias`; returns (dX, dResidual).

        `y` is the forward's output (the activation's mask comes from it); it is only read with an activation.
        `bias` is given if the forward added no residual: the mask may then be computed from x, and y left alone.
        dResidual is asked for only with an activation: without one it is `grad` itself.
        """
        raise NotImplementedError

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., C] -> (y, mean [..., 1], rstd [..., 1])."""
        raise NotImplementedError

    def layer_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
    ) -> Tensor | None:
        """Adds into the prefixes of `grad_weight` and `grad_bias`; returns dX."""
        raise NotImplementedError


def _parse(spec: str, source: str = "backend") -> dict[str, str]:
    """'aten' or 'conv2d=aten,batch_norm=native' -> backend per operation; what is not named is 'auto'."""
    chosen = dict.fromkeys(OPS, "auto")
    for part in filter(None, (p.strip() for p in spec.split(","))):
        op, separator, name = part.rpartition("=")
        if name not in (*BACKENDS, "auto"):
            raise ValueError(f"{source}: expected one of {['auto', *BACKENDS]}, got {name!r}")
        if separator and op not in OPS:
            raise ValueError(f"{source}: expected an operation out of {list(OPS)}, got {op!r}")
        chosen.update({op: name} if separator else dict.fromkeys(OPS, name))
    return chosen


@contextmanager
def backend(spec: str) -> Iterator[None]:
    """Run the operations inside on the named backend; `spec` is a name or 'op=name,op=name'.

    Raises ValueError for an unknown name. An operation that the backend cannot run raises BackendError.
    """
    global _requested
    before, _requested = _requested, _parse(spec)
    try:
        yield
    finally:
        _requested = before


def _from_environment() -> dict[str, str]:
    try:
        return _parse(os.environ.get("US3L_BACKEND", "auto"), "US3L_BACKEND")
    except ValueError as error:
        raise SettingError(str(error)) from None


def choose(op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str:
    """The name of the backend for `op`: the requested one (or an error), else the one measured to be the fastest on
    this machine (`us3l_kernels.tune`), else, for a call that was not measured, the first that can run it well.

    arguments: see `Backend.why_not`.
    """
    requested = _requested[op]
    if requested != "auto":
        BACKENDS[requested].can_run(op, x, weight, raise_error=True, **arguments)
        return requested
    return measured_choice(op, x, weight, arguments) or heuristic_choice(op, x, weight, arguments)


def measured_choice(op: str, x: Tensor, weight: Tensor | None, arguments: dict[str, Any]) -> str | None:
    """What this machine's table has for the call; None if it was not measured."""
    if not measured.in_use(x.device.type):
        return None
    call = measured.describe(op, x, weight, arguments)
    if torch.compiler.is_compiling() and not measured.is_static(call):
        return None
    gradients = torch.is_grad_enabled()
    weight_gradient = gradients and weight is not None and weight.requires_grad
    found = measured.look_up(call, gradients and x.requires_grad, weight_gradient)
    if found is None:
        return None
    name, reason = found
    if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
        log.debug("%s: on %s: %s", op, name, reason)
    return name


def heuristic_choice(op: str, x: Tensor, weight: Tensor | None, arguments: dict[str, Any]) -> str:
    """The first backend that can run the call and does not know of a faster one; BackendError if there is none."""
    for name, candidate in BACKENDS.items():
        runs = candidate.can_run(op, x, weight, **arguments)
        if runs and candidate.why_slower(op, x, weight, **arguments) is None:
            return name
        if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
            why = candidate.why_slower if runs else candidate.why_not
            reason = candidate.unavailable() or why(op, x, weight, **arguments)
            log.debug("%s: not on %s: %s", op, name, reason or "not implemented")
    raise BackendError(
        f"no backend can run {op} for dtype {x.dtype} on {x.device}; the DEBUG log of 'us3l_kernels' says why not"
    )


def _registry() -> dict[str, Backend]:
    from us3l_kernels.backends.aten import AtenBackend
    from us3l_kernels.backends.cuda import CudaBackend
    from us3l_kernels.backends.native import NativeBackend
    from us3l_kernels.backends.reference import ReferenceBackend
    from us3l_kernels.backends.triton import TritonBackend
    from us3l_kernels.backends.triton_tma import TritonTmaBackend

    in_the_order_of_auto = (
        NativeBackend(),
        CudaBackend(),
        TritonBackend(),
        TritonTmaBackend(),
        AtenBackend(),
        ReferenceBackend(),
    )
    return {b.name: b for b in in_the_order_of_auto}


BACKENDS: dict[str, Backend] = _registry()
_requested: dict[str, str] = _from_environment()


def requested() -> dict[str, str]:
    """What `backend(...)` or US3L_BACKEND asks for at the moment: operation -> name of a backend, or 'auto'."""
    return dict(_requested)
