"""The time of a forward pass in evaluation, against width and batch: narrower has to be faster.

Sides: `sliced`, the sub-network inside of the sliced model; `standalone`, the plain model that
`us3l_kernels.standalone` makes of it; `folded`, that with its batch norms inside the convolutions, as `us3l export
--fold` writes it. All compute the same, which is checked before any time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.rivals import Settings
from us3l.evaluation import calibrate
from us3l.export import folded, plain_graph
from us3l.models import build_model
from us3l.profile import profile
from us3l_kernels import standalone, use_width

SIDES = ("sliced", "standalone", "folded")
TOLERANCE = 1e-3  # relative, of features in float32: a Winograd convolution against a direct one, through all layers


def measure(
    settings: Settings,
    *,
    size: int,
    batches: Sequence[int],
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Milliseconds of every side at every width and batch; `faster` is by how much than the same side at full width."""
    torch.manual_seed(0)
    device, shape = settings.device, (3, size, size)
    model = build_model(settings.model, stem=settings.stem).to(device, memory_format=torch.channels_last).eval()
    images = {n: torch.randn(n, *shape, device=device).to(memory_format=torch.channels_last) for n in batches}
    for width in settings.widths:
        calibrate(model, [(torch.randn(8, *shape), torch.zeros(8))], width)
    networks = {width: _sides(model, width, images[batches[0]]) for width in settings.widths}
    costs = {row.width: row for row in profile(model, shape, settings.widths)}

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for n, x in images.items():
            _require_equal(networks, x)
            sides = {
                f"{side} {width:g}": _forward(network, x)
                for width, by_side in networks.items()
                for side, network in by_side.items()
            }
            samples = harness.interleave(
                sides, rounds=rounds, warmup=3, synchronise=harness.synchroniser(device), progress=progress
            )
            timing = harness.summarise(samples, next(iter(sides)))
            for width in settings.widths:
                names = {side: f"{side} {width:g}" for side in SIDES}
                milliseconds = {side: timing["median_ms"][name] for side, name in names.items()}
                full = {side: timing["median_ms"][f"{side} {settings.widths[0]:g}"] for side in SIDES}
                rows.append(
                    {
                        "batch": n,
                        "width": width,
                        "macs": costs[width].macs,
                        "params": costs[width].params,
                        "median_ms": milliseconds,
                        "spread": {side: timing["spread"][name] for side, name in names.items()},
                        "faster": {side: full[side] / milliseconds[side] for side in SIDES},
                    }
                )
    config = settings.describe() | {"input": size, "batches": list(batches), "rounds": rounds}
    return harness.report("inference", config, device, rows=rows)


def _sides(model: nn.Module, width: float, images: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    def sliced(x: Tensor) -> Tensor:
        with use_width(model, width):
            return model(x)

    dense = standalone(model, width, images)
    return {
        "sliced": sliced,
        "standalone": dense,
        "folded": folded(plain_graph(dense, images)).to(memory_format=torch.channels_last),
    }


def _forward(network: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[int], object]:
    return lambda turn: network(x)


def _require_equal(networks: dict[float, dict[str, Callable[[Tensor], Tensor]]], x: Tensor) -> None:
    for width, by_side in networks.items():
        expected = {"features": by_side["standalone"](x)}
        for side in ("sliced", "folded"):
            harness.require_equal(f"{side}, width {width:g}", {"features": by_side[side](x)}, expected, TOLERANCE)
