"""Batch norms of a network with many widths: shared and sliced, or switchable (one per width)."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from us3l_kernels import any_width, functional
from us3l_kernels.collectives import all_gather
from us3l_kernels.triton import Sizes
from us3l_kernels.width import FixedWidths, Sliced, active_channels, current_views, width_key

if TYPE_CHECKING:
    from us3l_kernels.nn.calibration import Moments

_Norm = nn.modules.batchnorm._BatchNorm


class SlicedBatchNorm(Sliced, _Norm):
    """What SlicedBatchNorm1d and SlicedBatchNorm2d share: everything but the shape of x.

    y = activation(norm(x) * weight[:C] + bias[:C] + residual), one operation, for the C channels of x.

    activation: None, "relu" or "relu6".
    sync: in training, take the statistics over all ranks of `process_group` (None: the default one) when
    torch.distributed is initialised with more than one: exact, forward and backward, for unequal batches too.
    The remaining arguments, the parameters and the state_dict are those of torch.nn's.

    Which statistics normalise:
    - training: those of the batch, of each view its own inside `views(n)`. Running statistics describe one
      width, so they are updated at full width only, as n forwards in the order of the views would.
    - evaluation: those calibrated for the width in effect (`calibrating`); without them the running ones, at
      full width. Otherwise it raises: statistics of another width give accuracy of chance, in silence.
    A forward in training and loading a state_dict drop calibrated statistics: they are of other weights.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if activation not in functional.ACTIVATIONS:
            raise ValueError(f"activation: expected one of {functional.ACTIVATIONS}, got {activation!r}")
        self.activation = activation
        self.sync = sync
        self.process_group = process_group
        # The width whose statistics the running ones are.
        self.running_key = width_key(1.0)
        # Calibrated (mean [C], biased variance [C]) by width key; beside the state_dict, never in it.
        self.calibrated: dict[str, tuple[Tensor, Tensor]] = {}
        # Set by `calibrating`: what has been seen so far, by width key.
        self.moments: MutableMapping[str, Moments] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, ...] with C <= num_features; residual: like x, added before the activation -> like x."""
        self._check_input_dim(x)
        channels = x.size(1)
        if channels > self.num_features:
            raise ValueError(
                f"x: {self} expects at most {self.num_features} channels in dimension 1, "
                f"got {channels} (shape {tuple(x.shape)})"
            )
        if self.moments is not None:
            self.moments[self.width_key].update(x)
            return self._normalise(x, residual, views=current_views())
        if not self.training:
            return self._normalise(x, residual, self.evaluation_statistics(channels), training=False)
        self.forget_calibration()
        sizes = any_width.sizes_of(self, x)
        if residual is not None:
            any_width.check_sum(None if sizes is None else sizes.outputs, residual)
        if sizes is not None:
            return self._normalise(x, residual, views=current_views(), sizes=sizes)
        return self._train(x, residual, current_views())

    def uses_batch_statistics_alone(self) -> bool:
        """Whether forward, as things stand, normalises with the statistics of its batch and keeps nothing of them."""
        running = self.track_running_stats and self.width_key == self.running_key
        return self.training and self.moments is None and not running and not self.sync

    def why_not_any_width(self) -> str | None:
        if type(self).forward is not SlicedBatchNorm.forward:
            return super().why_not_any_width()
        if not self.training or self.moments is not None:
            return "evaluation and calibration are of one width"
        if self.track_running_stats:
            return "running statistics are of one width"
        return "its statistics are synchronised" if self.sync else any_width.why_not_plain(self)

    def plan_key(self) -> Hashable:
        return self.track_running_stats and self.width_key == self.running_key  # its channels are x's

    def forget_calibration(self) -> None:
        """Drop the calibrated statistics, unless some are being taken."""
        if self.calibrated and self.moments is None:
            self.calibrated.clear()

    def _describes(self, channels: int) -> bool:
        """Whether the running statistics are those of the width in effect."""
        return (
            self.track_running_stats and self.width_key == self.running_key and channels == self.num_features
        )

    def evaluation_statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean [C] and biased variance [C] that normalise in evaluation at the width in effect.

        Raises RuntimeError if there are none for this width, ValueError if they are of another number of channels.
        """
        if self.width_key in self.calibrated:
            mean, var = self.calibrated[self.width_key]
            if mean.size(0) != channels:
                raise ValueError(
                    f"x: {self} was calibrated at width {self.width_key} with {mean.size(0)} channels, "
                    f"got {channels}"
                )
            return mean, var
        if self._describes(channels):
            assert self.running_mean is not None and self.running_var is not None
            return self.running_mean, self.running_var
        raise RuntimeError(
            f"{self} has no statistics for {channels} channels at width {self.width_key}: before evaluating, "
            "run training data through the model at this width inside "
            "`with us3l_kernels.nn.calibrating(model):`, or load a table with us3l_kernels.nn.load_statistics"
        )

    def _train(self, x: Tensor, residual: Tensor | None, views: int) -> Tensor:
        if x.size(0) % views:
            raise ValueError(f"x: expected a batch of {views} stacked views, got {x.size(0)} samples")
        update = self._describes(x.size(1))
        if self.sync and dist.is_available() and dist.is_initialized():
            group = self.process_group or dist.group.WORLD
            if group is not None and dist.get_world_size(group) > 1:
                return self._train_synchronised(x, residual, views, update, group)
        if not update:
            return self._normalise(x, residual, views=views)
        assert self.running_mean is not None and self.running_var is not None
        running = (self.running_mean, self.running_var)
        if self.momentum is None and views > 1:
            # The factor of a cumulative average changes from one view to the next.
            residuals = [None] * views if residual is None else residual.chunk(views)
            parts = zip(x.chunk(views), residuals, strict=True)
            return torch.cat([self._train(part, of_part, views=1) for part, of_part in parts])
        return self._normalise(x, residual, running, momentum=self._count_batches(views), views=views)

    def _count_batches(self, views: int) -> float:
        """Count `views` more batches; returns the weight of each in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(views)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalise(
        self,
        x: Tensor,
        residual: Tensor | None,
        statistics: tuple[Tensor | None, Tensor | None] = (None, None),
        *,
        training: bool = True,
        momentum: float = 0.0,
        views: int = 1,
        sizes: Sizes | None = None,
    ) -> Tensor:
        return any_width.reading(functional.batch_norm, sizes)(
            x,
            self.weight,
            self.bias,
            *statistics,
            training=training,
            momentum=momentum,
            eps=self.eps,
            views=views,
            activation=self.activation,
            residual=residual,
        )

    def _train_synchronised(
        self, x: Tensor, residual: Tensor | None, views: int, update: bool, group: dist.ProcessGroup
    ) -> Tensor:
        channels = x.size(1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(views, -1, channels, x[0, 0].numel())
        count, mean, var = _synchronised_statistics(wide, group)
        if update:
            self._update_running(count, mean.detach(), var.detach())
        y = (wide - mean[:, None, :, None]) * (var + self.eps).rsqrt()[:, None, :, None]
        y = y.reshape(x.shape)
        column = (-1, *[1] * (x.dim() - 2))
        if self.affine:
            y = y * self.weight[:channels].view(column) + self.bias[:channels].view(column)
        if residual is not None:
            y = y + residual
        if self.activation is not None:
            y = y.clamp(0, 6) if self.activation == "relu6" else y.relu()
        return y.to(x.dtype)

    def _update_running(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        for n, view_mean, view_var in zip(count, mean, var, strict=True):
            weight = self._count_batches(1)
            self.running_mean.lerp_(view_mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_((view_var * n / (n - 1)).to(self.running_var.dtype), weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Calibrated statistics move and change dtype with the module, as its buffers do.
        self.calibrated = {key: (fn(mean), fn(var)) for key, (mean, var) in self.calibrated.items()}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget_calibration()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        sync = ", sync=True" if self.sync else ""
        return f"{super().extra_repr()}{activation}{sync}, width={self.active_width}"


class SlicedBatchNorm1d(SlicedBatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d over the channels that x [N, C] or [N, C, L] brings; see `SlicedBatchNorm`."""


class SlicedBatchNorm2d(SlicedBatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d over the channels that x [N, C, H, W] brings; see `SlicedBatchNorm`."""


class PrivateBatchNorms2d(FixedWidths, nn.Module):
    """A private batch norm with channels[i] channels for widths[i], in `bn`; at first the largest width."""

    def __init__(self, channels: Sequence[int], widths: Sequence[float], **options: Any) -> None:
        super().__init__()
        keys = [width_key(width) for width in widths]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"widths: expected one or more different widths, got {list(widths)}")
        self.widths = tuple(float(width) for width in widths)
        self.num_features = max(channels)
        self.bn = nn.ModuleList(SlicedBatchNorm2d(count, **options) for count in channels)
        for norm, key in zip(self.norms, keys, strict=True):
            norm.running_key = key
        largest = max(self.widths)
        self.set_active(largest, width_key(largest))

    @property
    def norms(self) -> list[SlicedBatchNorm2d]:
        """The private norms, in the order of `widths`."""
        return list(self.bn)  # type: ignore[arg-type]

    def set_active(self, width: float, key: str) -> None:
        super().set_active(width, key)
        self.active_index = self.index_of(width)
        self.norms[self.active_index].set_active(width, key)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W] with the channels of the width in effect; residual: like x -> like x."""
        norm = self.norms[self.active_index]
        if x.dim() == 4 and x.size(1) != norm.num_features:
            raise ValueError(
                f"x: {type(self).__name__} at width {self.active_width} expects {norm.num_features} "
                f"channels, got {x.size(1)} (shape {tuple(x.shape)})"
            )
        if self.training:
            # The weights before all of them are changing, not only those before the one in use.
            for other in self.norms:
                other.forget_calibration()
        return norm(x, residual)

    def extra_repr(self) -> str:
        return f"{self.num_features}, widths={list(self.widths)}, width={self.active_width}"


class SwitchableBatchNorm2d(PrivateBatchNorms2d):
    """One private batch norm, affine pair and running statistics, for each width of a fixed list.

    widths: the widths it offers; the one in effect is the largest at first. The private norms are in `bn`, in
    the order of the list, with the channels that `num_features` keep at each width (`active_channels` with
    `divisor` and `ratio`). Each has running statistics of its own width, so no calibration is needed, except
    for a plan.

    Source: Yu et al., "Slimmable Neural Networks", ICLR 2019.
    """

    def __init__(
        self,
        num_features: int,
        widths: Sequence[float],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        divisor: int = 8,
        ratio: int = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            [active_channels(num_features, width, divisor=divisor, ratio=ratio) for width in widths],
            widths,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            activation=activation,
        )
        self.num_features = num_features


def synchronise(model: nn.Module) -> None:
    """Make all batch norms of `model` take their statistics over all ranks (`sync`), as if their batches were one."""
    for module in model.modules():
        if isinstance(module, SlicedBatchNorm):
            module.sync = True


def _synchronised_statistics(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Count [V, 1], mean [V, C] and biased variance [V, C] over the samples of all ranks; x: [V, n, C, L].

    Combined from each rank's count, mean and sum of squared deviations (Chan, Golub and LeVeque, 1979), since
    sums of squares cancel. Differentiable: the gradient is that of the sum of all ranks' losses.
    """
    views, samples, channels, length = x.shape
    n = samples * length
    var, mean = torch.var_mean(x, dim=(1, 3), correction=0)
    local = torch.cat([x.new_full((views, 1), n), mean, var * n], dim=1)
    counts, means, m2 = all_gather(local, group).split([1, channels, channels], dim=-1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return count, mean, (m2 + counts * (means - mean).square()).sum(0) / count
