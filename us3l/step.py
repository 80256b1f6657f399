"""One iteration of US3L: teacher, every width forward and backward, update.

It needs torch and this project alone: neither files of configuration nor data, nor what shows progress.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from us3l.config import Config, OptimizerConfig
from us3l.distributed import SINGLE, World
from us3l.errors import ConfigError, TrainingError
from us3l.methods import Method
from us3l.schedule import parameter_groups, set_group_regularisation
from us3l_kernels import gradients
from us3l_kernels.any_width import AnyWidth
from us3l_kernels.errors import BackendError
from us3l_kernels.nn.batch_norm import SlicedBatchNorm, synchronise
from us3l_kernels.optim import LARS, SGD, AdamW
from us3l_kernels.plans import CudaGraphs, Plans
from us3l_kernels.width import plan_key, set_width

log = logging.getLogger("us3l")


class StepResult(NamedTuple):
    """losses: [W], one per width, on the device. projections: W detached tensors [2B, D] (us3l.methods.StepOutput).
    skipped: updates that were left out because their gradient was not finite.
    """

    losses: Tensor
    projections: list[Tensor]
    skipped: int


class TrainStep:
    """One iteration of US3L: all widths of it, and their update(s).

    The policy `train.step` is "joint" (the gradients of all widths add up for one update, as in slimmable networks) or
    "per_width" (an update after every width, as in the published US3L code).

    Args:
        method: on its device and in its memory format; its gradients are attached to one flat buffer.
    """

    def __init__(self, config: Config, method: Method, world: World = SINGLE) -> None:
        self.config = config
        self.method = method
        self.world = method.world = world
        self.device = next(method.parameters()).device
        if config.train.sync_norms:
            for network in (method, method.frozen_teacher) if config.method.target == "frozen" else (method,):
                synchronise(network)
        self.teacher = method.ema()
        graphs = CudaGraphs(self.device) if use_graphs(config, method, self.device) else None
        with nullcontext() if graphs is None else graphs.stream():
            self.gradients = gradients.attach(method)
        self.plans = Plans(self.gradients, capture=graphs) if self.device.type == "cuda" else None
        self.any_width = one_for_all_widths(method) if config.train.graphs == "one" else None
        self._norms = [module for module in method.modules() if isinstance(module, SlicedBatchNorm)]
        self._modules = list(method.modules())
        self._channels = lru_cache(maxsize=1024)(self._channels_at)
        self.optimizer = make_optimizer(config.optimizer, method, config.regulariser.groups)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.amp == "fp16")
        self.skipped_in_a_row = 0

    def __call__(
        self, images: Tensor, widths: Sequence[float], *, lr: float, alpha: float, labels: Tensor | None = None
    ) -> StepResult:
        """Train on one batch.

        Args:
            images: [2B, C, H, W], two views of B images, view-major, on the device; [B, C, H, W] with labels.
            widths: largest first.
            lr: learning rate. alpha: of the group regularisation.
            labels: [B], int64, on the device, for a method that is `labelled`; they are its targets.

        Raises:
            TrainingError: more than `train.max_skipped` updates in a row were not finite.
        """
        with nullcontext() if self.plans is None else self.plans.stream():
            return self._train(images, widths, lr, alpha, labels)

    def _train(
        self, images: Tensor, widths: Sequence[float], lr: float, alpha: float, labels: Tensor | None
    ) -> StepResult:
        joint = self.config.train.step == "joint"
        if self.teacher is not None:
            self.teacher.update()
        parts = self._split(images)
        targets: list[Tensor | None] = (
            [*self._split(labels)] if labels is not None else [self._targets(part, widths[0]) for part in parts]
        )
        first = self._join(targets)

        losses, projections = [], []
        skipped = 0
        self.gradients.zero_()
        for index, width in enumerate(widths):
            of_parts = []
            for i, part in enumerate(parts):
                loss, projection, targets[i] = self._pass(part, targets[i], width, full=index == 0)
                of_parts.append((loss, projection))
            losses.append(torch.stack([loss for loss, _ in of_parts]).mean())
            projections.append(self._join([projection for _, projection in of_parts]))
            if not joint:
                # As published: the steps of width 1.0 leave the prediction heads out of the regulariser.
                skipped += self._update(lr, alpha, {width: losses[-1]}, regularise_predictors=width != 1.0)
                self.gradients.zero_()
        if joint:
            skipped += self._update(lr, alpha, dict(zip(widths, losses, strict=True)), regularise_predictors=True)
        if not skipped:  # what made a gradient infinite must not enter a queue
            self.method.finish_iteration(first)
        return StepResult(torch.stack(losses), projections, skipped)

    def _targets(self, images: Tensor, width: float) -> Tensor | None:
        """Of the teacher, if there is one."""

        live = self.method.config.target == "live"
        # A distilling teacher runs at one width, whatever the student's is.
        reading = nullcontext() if self.method.distils or live else self._reading(width)

        def work(images: Tensor) -> tuple[Tensor | None]:
            with reading, self.autocast():
                return (self.method.targets(images, width=width),)

        if self.plans is None or live:
            return work(images)[0]
        return self._planned(("targets", None if self.method.distils else self._channels(width)), work, images)[0]

    def _pass(
        self, images: Tensor, targets: Tensor | None, width: float, *, full: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Forward and backward of one width: its loss, its projections, and the targets of those that follow."""

        reading = self._reading(width)

        def work(images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            with reading:
                with self.autocast():
                    loss, projection, targets = self.method(images, width=width, full=full, targets=targets)
                self.scaler.scale(loss / self.config.train.accumulate).backward()
            return loss.detach(), projection, targets

        if self.plans is None:
            return work(images, targets)
        return self._planned(("pass", self._channels(width), full), work, images, targets)

    def _reading(self, width: float) -> AbstractContextManager[object]:
        """Where a pass runs that reads its width from the device, which is set to this one."""
        if self.any_width is None:
            return nullcontext()
        self.any_width.set(width)
        return self.any_width

    def _planned(self, key: Hashable, work: Callable[..., Any], *inputs: Tensor | None) -> Any:
        assert self.plans is not None
        for norm in self._norms:
            norm.forget_calibration()  # as their forwards would, which a graph does not run
        return self.plans.run((key, tuple([module.training for module in self._modules])), work, *inputs)

    def _channels_at(self, width: float) -> Hashable:
        """Equal for widths that make the same network of the student, or are served by the same pass."""
        if self.any_width is not None:
            return None
        set_width(self.method.encoder_q, width)
        return plan_key(self.method.encoder_q)

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the forward passes."""
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.train.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _split(self, batch: Tensor) -> Sequence[Tensor]:
        """The parts of a batch, `train.accumulate` of them, that pass through the network one by one."""
        if self.config.train.accumulate == 1:
            return [batch]
        views = 1 if self.method.labelled else 2
        parts = batch.unflatten(0, (views, -1)).chunk(self.config.train.accumulate, dim=1)
        return [part.flatten(0, 1) for part in parts]

    def _join(self, parts: Sequence[Tensor | None]) -> Any:
        """What was computed of the parts, [2n, D] each, as if it was of the whole batch."""
        if len(parts) == 1:
            return parts[0]
        views = 1 if self.method.labelled else 2
        stacked = [part.unflatten(0, (views, -1)) for part in parts if part is not None]
        return torch.cat(stacked, dim=1).flatten(0, 1) if stacked else None

    def _update(self, lr: float, alpha: float, losses: dict[float, Tensor], *, regularise_predictors: bool) -> bool:
        """Whether it had to be left out. losses: those that the gradient is of, by width, for the error message."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.regulariser.kind == "group":
            set_group_regularisation(
                self.optimizer,
                weight_decay=self.config.optimizer.weight_decay,
                alpha=alpha,
                predictors=regularise_predictors,
            )
        # The flat buffer holds the gradients of all widths: it is the one bucket of data-parallel training.
        self.world.average_(self.gradients.flat)
        if self._not_finite(losses):
            return True
        if self.config.optimizer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.method.student_parameters(), self.config.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return False

    def _not_finite(self, losses: dict[float, Tensor]) -> bool:
        """Whether to leave out an update because its gradient is not finite; raises after too many in a row.

        The gradient is that of all processes, so that all decide alike. This is where the host waits for the device.
        """
        # NaN is both. One vectorised pass over memory: the maximum norm of torch takes ten times as long on a CPU.
        extremes = torch.stack(torch.aminmax(self.gradients.flat))
        infinite = {width: loss.item() for width, loss in losses.items()} if not extremes.isfinite().all() else {}
        if infinite and self.scaler.is_enabled():
            # The scaler leaves out what overflows and tries a smaller scale; with an infinite loss, none would do.
            wrong = not all(math.isfinite(loss) for loss in infinite.values())
            if not self.world.any(wrong, self.device):
                infinite = {}
        if not infinite:
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.train.max_skipped:
            values = ", ".join(f"{loss:.4g} of width {width:.4g}" for width, loss in infinite.items())
            raise TrainingError(
                f"the gradient is not finite ({self.skipped_in_a_row} updates in a row; losses: {values}). The weights "
                "are those before. Try a lower optimizer.lr, optimizer.clip_norm=1, or train.amp=none"
            )
        return True


def use_graphs(config: Config, method: Method, device: torch.device) -> bool:
    """Whether the passes of a width are to be CUDA graphs.

    Raises ConfigError where they cannot be, and `train.graphs` is true, or one for all widths.
    """
    wanted = config.train.graphs
    reason = why_no_graphs(method, device)
    if reason is not None and wanted in ("true", "one"):
        raise ConfigError(f"train.graphs={wanted}: {reason}")
    own = type(method).__module__.startswith("us3l.")
    if reason is None and not own and wanted == "auto":
        reason = (
            "a graph repeats the kernels of a method and nothing else that it does; train.graphs=true says that "
            f"{type(method).__name__} needs no more"
        )
    if reason is not None and wanted == "auto" and device.type == "cuda":
        log.warning("train.graphs=auto: no CUDA graphs: %s", reason)
    return reason is None and wanted != "false"


def why_no_graphs(method: Method, device: torch.device) -> str | None:
    """Why the passes of a width cannot be CUDA graphs; None if they can."""
    if device.type != "cuda":
        return f"CUDA graphs are for GPUs, train.device is {device}"
    synchronised = any(isinstance(module, SlicedBatchNorm) and module.sync for module in method.modules())
    if method.world.size > 1 and (synchronised or method.config.gather_negatives):
        return "train.sync_norms and method.gather_negatives communicate inside the passes"
    if method.feature_distillation is not None:
        return "the features that method.feature_weight distils pass from one width to the next outside of the graphs"
    return None


def one_for_all_widths(method: Method) -> AnyWidth:
    """The channels of the passes of a width, for kernels to read, so that one graph serves all widths.

    Raises ConfigError for a network that cannot be run so.
    """
    try:
        return AnyWidth(method)
    except (ValueError, BackendError) as error:
        raise ConfigError(f"train.graphs=one: {error}") from error


def make_optimizer(config: OptimizerConfig, method: Method, groups: int) -> SGD | LARS | AdamW:
    """The configured optimizer over the student and its heads (never the teacher)."""
    parameters = parameter_groups(method)
    if config.name == "sgd":
        return SGD(parameters, config.lr, config.momentum, config.weight_decay, groups=groups)
    if config.name == "lars":
        return LARS(parameters, config.lr, config.momentum, config.weight_decay, groups=groups)
    return AdamW(parameters, config.lr, weight_decay=config.weight_decay, groups=groups)
