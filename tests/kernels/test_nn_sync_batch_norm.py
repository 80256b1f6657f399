"""Synchronised batch norm: two gloo processes against one process with the whole batch.

Run by itself with a rendezvous file as its argument, this file is the second process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from us3l_kernels import set_width, views
from us3l_kernels.nn import SlicedBatchNorm1d, SlicedBatchNorm2d, calibrating

RANKS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """`samples` are those of one view on each rank; `channels` may be fewer than the norm's 6."""

    shape: tuple[int, ...]
    samples: tuple[int, int] = (4, 4)
    n_views: int = 1
    channels: int = 6
    momentum: float | None = 0.2
    affine: bool = True
    activation: str | None = None
    residual: bool = False
    channels_last: bool = False

    def norm(self, sync: bool) -> SlicedBatchNorm1d | SlicedBatchNorm2d:
        kind = SlicedBatchNorm2d if len(self.shape) == 2 else SlicedBatchNorm1d
        torch.manual_seed(0)
        norm = kind(6, 1e-3, self.momentum, self.affine, activation=self.activation, sync=sync).double()
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        if self.channels < 6:
            set_width(norm, 0.5)
        return norm

    def tensors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input, residual and upstream gradient of a rank, view-major."""
        generator = torch.Generator().manual_seed(rank + 1)
        shape = (self.n_views * self.samples[rank], self.channels, *self.shape)
        x, residual, upstream = (
            torch.randn(shape, dtype=torch.float64, generator=generator) * (rank + 1) + 5 * rank
            for _ in range(3)
        )
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, residual, upstream


CASES = [
    Case((3, 2)),
    Case((3, 2), n_views=2, activation="relu", residual=True, channels_last=True),
    Case((3, 2), samples=(5, 2), n_views=2, activation="relu6", momentum=None),
    Case((3, 2), channels=4, n_views=2, residual=True),
    Case((), samples=(3, 6), affine=False),
    Case((4,), n_views=3, momentum=None, activation="relu"),
]


def run(case: Case, norm: Any, x: Tensor, residual: Tensor, upstream: Tensor) -> dict[str, Any]:
    x.requires_grad_()
    residual.requires_grad_()
    with views(case.n_views):
        y = norm(x, residual if case.residual else None)
    y.backward(upstream)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dresidual": residual.grad,
        "parameters": [p.grad for p in norm.parameters()],
        "buffers": [b.clone() for b in norm.buffers()],
    }


def results_of_rank(rank: int) -> list[dict[str, Any]]:
    results = [run(case, case.norm(sync=True), *case.tensors(rank)) for case in CASES]
    # Evaluation and calibration are each rank's own affair: a rank may do them alone.
    if rank == 0:
        case = CASES[0]
        synced, alone = case.norm(sync=True), case.norm(sync=False)
        x = case.tensors(0)[0]
        with torch.no_grad(), calibrating(synced), calibrating(alone):
            torch.testing.assert_close(synced(x), alone(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(synced.eval()(x), alone.eval()(x), rtol=1e-12, atol=1e-12)
    return results


@contextlib.contextmanager
def process_group(file: Path, rank: int):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def whole_batch(case: Case, tensors: list[Tensor]) -> Tensor:
    """The ranks' view-major batches as one: view 1 of all ranks, then view 2, and so on."""
    return torch.cat(
        [part for parts in zip(*(t.chunk(case.n_views) for t in tensors), strict=True) for part in parts]
    )


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    file = tmp_path / "rendezvous"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, __file__, str(file)], env=environment) as other:
        try:
            with process_group(file, 0):
                by_rank: list[Any] = [None] * RANKS
                dist.gather_object(results_of_rank(0), by_rank)
        except BaseException:
            other.kill()
            raise
    assert other.returncode == 0

    for case, *got in zip(CASES, *by_rank, strict=True):
        batch = [
            whole_batch(case, list(t)) for t in zip(*(case.tensors(r) for r in range(RANKS)), strict=True)
        ]
        expected = run(case, case.norm(sync=False), *batch)
        close = {"rtol": 1e-10, "atol": 1e-10, "msg": lambda m, case=case: f"{case}: {m}"}
        for name in ("y", "dx"):
            torch.testing.assert_close(whole_batch(case, [g[name] for g in got]), expected[name], **close)
        if case.residual:
            both = whole_batch(case, [g["dresidual"] for g in got])
            torch.testing.assert_close(both, expected["dresidual"], **close)
        summed = [sum(gradients) for gradients in zip(*(g["parameters"] for g in got), strict=True)]
        torch.testing.assert_close(summed, expected["parameters"], **close)
        for g in got:
            torch.testing.assert_close(g["buffers"], expected["buffers"], **close)


def test_sync_without_a_process_group_is_the_ordinary_norm():
    case = CASES[1]
    synced, alone = (run(case, case.norm(sync), *case.tensors(0)) for sync in (True, False))
    torch.testing.assert_close(synced, alone, rtol=0, atol=0)


if __name__ == "__main__":
    with process_group(Path(sys.argv[1]), 1):
        dist.gather_object(results_of_rank(1))
