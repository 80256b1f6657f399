"""What dX of a convolution may do beside: for the tests of all convolutions that do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from us3l_kernels.triton import Norm


class Epilogue(NamedTuple):
    """added: another gradient. mask: by the norm's "x" or "y"; None for no norm."""

    added: bool
    mask: str | None
    activation: str | None


EPILOGUES = {
    "added": Epilogue(True, None, None),
    "sums": Epilogue(False, "x", None),
    "relu": Epilogue(False, "x", "relu"),
    "added, relu6": Epilogue(True, "x", "relu6"),
    "added, relu of a sum": Epilogue(True, "y", "relu"),
    "relu6 of a sum": Epilogue(False, "y", "relu6"),
}


def surrounded(x: Tensor, channels: int) -> Tensor:
    """x [N, c, H, W] as a prefix of a wider channels_last tensor, with NaN between its pixels, before and behind."""
    n, c, h, w = x.shape
    memory = torch.full(((n * h * w + 2) * channels,), torch.nan, dtype=x.dtype)
    view = memory[channels:].as_strided((n, c, h, w), (h * w * channels, 1, w * channels, channels))
    return view.copy_(x)


def check_epilogue(
    epilogue: Epilogue,
    input_gradient: Callable[[Tensor | None, Norm | None], tuple[Tensor, Tensor | None]],
    expected: Tensor,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """expected: dX alone, in float64. Every image is a view; parameters are longer than they need be, with NaN."""
    (n, c), (added, mask, activation) = expected.shape[:2], epilogue
    wider = -(-c // 8) * 8 + 8
    x, y, other = (surrounded((torch.randn(expected.shape) * 3).to(dtype), wider) for _ in range(3))
    vectors = [torch.cat([torch.randn(c), torch.full((3,), torch.nan)]) for _ in range(2)]
    statistics = [torch.randn(n, c) for _ in range(2)]
    norm = None if mask is None else Norm(x, y if mask == "y" else None, *vectors, *statistics, activation)
    dx, sums = input_gradient(other if added else None, norm)
    assert_close(dx, expected + other.double() * added, tolerance)
    assert (sums is None) == (norm is None)
    if sums is not None:
        mean, rstd, scale, shift = (t[..., :c, None, None] for t in (*statistics, *vectors))
        before = y if mask == "y" else ((x - mean) * (rstd * scale) + shift).to(dtype)  # rounded as the forward rounds
        centred = x.double() - mean
        passes = (before > 0) & ((before < 6) | (activation == "relu")) | (activation is None)
        g = dx.double() * passes
        assert_close(sums.double().sum(1)[:, 0], g.sum((2, 3)), 5e-6)
        assert_close(sums.double().sum(1)[:, 1], (g * centred * rstd).sum((2, 3)), 5e-6)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= tolerance, f"relative error {error:.2e}"
