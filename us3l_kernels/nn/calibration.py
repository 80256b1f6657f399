"""Statistics of the batch norms for a width, taken after training.

A batch norm that serves every width has no running statistics that fit them all. After training, forward
training data at each width of interest; the exact mean and variance of what every norm sees are kept by
width:

    model.eval()
    with torch.no_grad(), use_width(model, 0.5), calibrating(model):
        for images in loader:
            model(images)

Source: post-statistics of Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques",
ICCV 2019.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from us3l_kernels.nn.batch_norm import SlicedBatchNorm

Statistics = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""width key -> module name -> (mean [C], biased variance [C])."""


class Moments:
    """Mean and variance per channel over any number of batches, pooled exactly.

    Batches are combined by count, mean and sum of squared deviations (Chan, Golub and LeVeque, 1979), in
    float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.m2: Tensor | float = 0.0
        self.dtype = torch.float32

    def update(self, x: Tensor) -> None:
        """Add a batch x: [N, C, ...]."""
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        n = x.numel() // x.size(1)
        wide = x.detach().to(self.dtype)
        batch_var, batch_mean = torch.var_mean(wide, dim=[0, *range(2, x.dim())], correction=0)
        total = self.count + n
        difference = batch_mean.double() - self.mean
        self.mean = self.mean + difference * (n / total)
        self.m2 = self.m2 + batch_var.double() * n + difference.square() * (self.count * n / total)
        self.count = total

    def statistics(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Mean [C] and biased variance [C]; dtype None is float32 (float64 for float64 batches)."""
        assert isinstance(self.mean, Tensor) and isinstance(self.m2, Tensor)
        return self.mean.to(dtype or self.dtype), (self.m2 / self.count).to(dtype or self.dtype)


def _norms(model: nn.Module) -> dict[str, SlicedBatchNorm]:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SlicedBatchNorm)}
    if not norms:
        raise ValueError(f"model: expected a module with sliced batch norms, {type(model).__name__} has none")
    return norms


def _dtype_and_device(norm: SlicedBatchNorm) -> tuple[torch.dtype | None, torch.device | None]:
    """Those of the norm's vectors, which its statistics share; None, None for a norm that has none."""
    vectors = [*norm.parameters(), *norm.buffers()]
    return (vectors[0].dtype, vectors[0].device) if vectors else (None, None)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, the sliced batch norms of `model` normalise with batch statistics and pool them.

    The pooled statistics belong to the width that is set at a forward; several widths may take their turns.
    They replace older ones on exit, unless an exception leaves the context. Every rank takes those of its
    own data.

    Raises ValueError for a model without sliced batch norms; RuntimeError if a calibration of them is under
    way, or if no forward reached one.
    """
    norms = _norms(model).values()
    if any(norm.moments is not None for norm in norms):
        raise RuntimeError("calibrating: a calibration of this model is under way already")
    for norm in norms:
        norm.moments = defaultdict(Moments)
    try:
        yield
        taken = [(norm, dict(norm.moments or {})) for norm in norms]
    finally:
        for norm in norms:
            norm.moments = None
    if not any(by_width for _, by_width in taken):
        raise RuntimeError(
            "calibrating: no forward reached a batch norm; run training data through the model"
        )
    for norm, by_width in taken:
        dtype, _ = _dtype_and_device(norm)
        norm.calibrated |= {key: moments.statistics(dtype) for key, moments in by_width.items()}


def statistics(model: nn.Module) -> Statistics:
    """All calibrated statistics of `model`, by width key and module name: an entry for a checkpoint.

    The tensors are the model's own, not copies. Raises ValueError for a model without sliced batch norms.
    """
    table: Statistics = {}
    for name, norm in _norms(model).items():
        for key, entry in norm.calibrated.items():
            table.setdefault(key, {})[name] = entry
    return table


def load_statistics(model: nn.Module, table: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
    """Replace the calibrated statistics of `model` by those of `statistics`, after its weights are loaded.

    The tensors are copied, to the device and dtype of each norm. Raises ValueError, and changes nothing, for
    a name that is no sliced batch norm of the model or for statistics of more channels than it has.
    """
    norms = _norms(model)
    for key, entries in table.items():
        for name, (mean, var) in entries.items():
            if name not in norms:
                raise ValueError(
                    f"table: {name!r} (width {key}): no such batch norm in {type(model).__name__}"
                )
            full = norms[name].num_features
            if mean.dim() != 1 or mean.shape != var.shape or not 1 <= mean.size(0) <= full:
                raise ValueError(
                    f"table: {name!r} (width {key}): expected mean and variance of one to {full} channels, "
                    f"got shapes {tuple(mean.shape)} and {tuple(var.shape)}"
                )
    for name, norm in norms.items():
        dtype, device = _dtype_and_device(norm)
        norm.calibrated = {
            key: (mean.to(device, dtype, copy=True), var.to(device, dtype, copy=True))
            for key, entries in table.items()
            if name in entries
            for mean, var in [entries[name]]
        }
