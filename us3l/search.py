"""The best sub-network under a budget: one width for all layers, or one for every stage.

A trained slimmable network needs no training to be searched: a sub-network is calibrated, and judged by kNN. The search
is an evolution of plans (Real et al., AAAI 2019; Cai et al., "Once-for-All", ICLR 2020) in which every candidate uses
the budget up: none of its stages could be one step wider. Its judge are training images held out from the kNN bank,
so that the test images can judge the winner.

Every evaluation is one line of a JSON lines file. A search that is started again finds them there, and, as all draws
follow from the seed, goes on where it was; one with another budget uses them too.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from us3l.errors import ConfigError
from us3l.evaluation import calibrate, features, knn_accuracy
from us3l.evaluation.calibration import has_statistics
from us3l.evaluation.protocol import NEIGHBOURS
from us3l.profile import profile
from us3l.results import Results, Row, weights_checksum
from us3l_kernels import standalone, use_width
from us3l_kernels.nn import SlicedLinear, calibrating, load_statistics
from us3l_kernels.width import SlicedOutput, Width, width_key

if TYPE_CHECKING:
    from us3l.data.base import Data
    from us3l.models import Backbone

HELD_OUT = 5  # every fifth training image is a query, the others are the bank
PARENTS = 8

Genes = tuple[int, ...]  # the index of each group's width in the grid


@dataclass(frozen=True)
class Budget:
    """Upper bounds of a sub-network, with a linear classifier, for one image; None: no bound.

    latency_ms: median time of the standalone network on the model's device, in milliseconds.
    """

    macs: float | None = None
    params: float | None = None
    latency_ms: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that there are, by the name of the cost."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Search:
    """A search of one network.

    Args:
        model: a trained backbone. Its calibrated statistics are not used, and none stay.
        data: its images; of them, `train_eval` alone is read.
        results: the results file.
        min_width: the smallest width of a stage; the grid are `steps` widths from it to 1.0.
        widths: the grid, where the network has no others (switchable norms): plans are not searched then.
        subject: more of what the results depend on, beside the weights (of the data, say).
    """

    def __init__(
        self,
        model: Backbone,
        data: Data,
        results: str | Path,
        *,
        min_width: float = 0.25,
        steps: int = 13,
        widths: Sequence[float] | None = None,
        subject: dict[str, Any] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        self.data = data
        self.image_shape = (data.in_channels, data.size, data.size)
        self.grid = sorted(widths) if widths else [min_width + (1 - min_width) * i / (steps - 1) for i in range(steps)]
        self.groups = [[""]] if widths else width_groups(model)
        # Its cost: a backbone with a linear classifier, as shapes alone.
        self.shadow = copy.deepcopy(model)
        self.shadow.fc = SlicedLinear(model.feature_dim, data.num_classes, slice_out=False)
        self.shadow.to("meta")
        self.costs: dict[str, Row] = {}
        self.results = Results(Path(results), {"weights": weights_checksum(model), **(subject or {})})

    def run(
        self, budget: Budget, *, evaluations: int = 64, seed: int = 0, on_row: Callable[[int, Row], None] | None = None
    ) -> list[Row]:
        """Evaluate up to `evaluations` sub-networks within `budget`; best first, of equals the cheapest.

        The widest ones of a single width come first, so the result is at least as good as the best of these.

        Returns rows with `width` (the text of a width or plan), `plan`, `accuracy` (%, of held-out training images),
        `macs`, `params`, and `latency_ms` where it is bounded.

        Raises:
            ConfigError: no bound, or not even the narrowest sub-network keeps to it.
        """
        if not budget.bounds:
            raise ConfigError("search: expected a budget: --max-macs, --max-params or --max-latency-ms")
        narrowest = (0,) * len(self.groups)
        if over := self._over(narrowest, budget):
            raise ConfigError(f"search: the narrowest sub-network (width {self.grid[0]:g}) has {over}")
        draw = random.Random(seed)
        rows: dict[Genes, Row] = {}
        for genes in self._candidates(budget, draw, rows):
            rows[genes] = self._evaluate(genes)
            if on_row is not None:
                on_row(len(rows), rows[genes])
            if len(rows) == evaluations:
                break
        cost = next(iter(budget.bounds))
        return sorted(rows.values(), key=lambda row: (-row["accuracy"], row[cost]))

    def _candidates(self, budget: Budget, draw: random.Random, rows: dict[Genes, Row]) -> Iterator[Genes]:
        """New genes within the budget; `rows` are those evaluated so far, and grow meanwhile."""
        uniform = ((index,) * len(self.groups) for index in reversed(range(len(self.grid))))
        widest = [genes for genes in uniform if not self._over(genes, budget)][:PARENTS]
        yield from widest
        if len(self.groups) == 1:
            return
        failures = 0
        while failures < 100:  # then there is hardly anything new
            parents = sorted(rows, key=lambda genes: -rows[genes]["accuracy"])[:PARENTS]
            if len(rows) < len(widest) + PARENTS:
                genes = tuple(draw.randrange(len(self.grid)) for _ in self.groups)
            elif draw.random() < 0.5:
                genes = tuple(map(draw.choice, zip(*draw.sample(parents, 2), strict=True)))
            else:
                genes = self._mutated(draw.choice(parents), draw)
            genes = self._fitted(genes, budget, draw)
            if genes in rows:
                failures += 1
            else:
                failures = 0
                yield genes

    def _mutated(self, genes: Genes, draw: random.Random) -> Genes:
        """One stage wider or narrower by up to three steps, the others by chance too."""
        chosen = draw.randrange(len(genes))
        return tuple(
            min(max(gene + draw.choice((-3, -2, -1, 1, 2, 3)), 0), len(self.grid) - 1)
            if index == chosen or draw.random() < 1 / len(genes)
            else gene
            for index, gene in enumerate(genes)
        )

    def _fitted(self, genes: Genes, budget: Budget, draw: random.Random) -> Genes:
        """`genes` made narrower until they keep to the budget, then wider while they do."""
        while self._over(genes, budget):
            genes = _changed(genes, draw.choice([i for i, gene in enumerate(genes) if gene > 0]), -1)
        growing = [i for i, gene in enumerate(genes) if gene < len(self.grid) - 1]
        while growing:
            index = draw.choice(growing)
            wider = _changed(genes, index, 1)
            if self._over(wider, budget):
                growing.remove(index)
                continue
            genes = wider
            if genes[index] == len(self.grid) - 1:
                growing.remove(index)
        return genes

    def _over(self, genes: Genes, budget: Budget) -> str:
        """Which bound the sub-network breaks, in words; "" if it keeps to all."""
        cost = self._cost(self.width(genes), timed=budget.latency_ms is not None)
        for name, bound in budget.bounds.items():
            if cost[name] > bound:
                return f"{cost[name]:.6g} {name}, more than {bound:.6g}"
        return ""

    def _cost(self, width: Width, *, timed: bool) -> Row:
        key = width_key(width)
        if key not in self.costs:
            (row,) = profile(self.shadow, self.image_shape, [width])
            self.costs[key] = {"macs": row.macs, "params": row.params}
        cost = self.costs[key]
        if timed and "latency_ms" not in cost:
            known = self.results.rows.get(key, {}).get("latency_ms")
            if known is None:
                known = latency_ms(self.model, width, self.image_shape)
                self.results.add(key, {"latency_ms": known})
            cost["latency_ms"] = known
        return cost

    def _evaluate(self, genes: Genes) -> Row:
        width = self.width(genes)
        key = width_key(width)
        row = self.results.rows.get(key, {})
        if "accuracy" in row:
            return row
        if has_statistics(self.model):
            calibrate(self.model, self.data.train_eval, width)
        x, labels = features(self.model, self.data.train_eval, width)
        if has_statistics(self.model):
            load_statistics(self.model, {})
        query = torch.arange(len(labels)) % HELD_OUT == 0
        accuracy = knn_accuracy(
            x[~query],
            labels[~query],
            x[query],
            labels[query],
            k=min(NEIGHBOURS, int((~query).sum())),
            device=next(self.model.parameters()).device,
        )
        plan = {"": width} if isinstance(width, int | float) else dict(width)
        return self.results.add(key, {"plan": plan, "accuracy": accuracy, **self.costs[key]})

    def width(self, genes: Genes) -> Width:
        """The plan that genes stand for; a number where they are all the same."""
        widths = [self.grid[gene] for gene in genes]
        if len(set(widths)) == 1:
            return widths[0]
        plan = {"": widths[0]}
        for names, width in zip(self.groups[1:], widths[1:], strict=True):
            plan.update(dict.fromkeys(names, width))
        return plan


def width_groups(model: Backbone) -> list[list[str]]:
    """The parts of a backbone that may have a width of their own, by the names for a plan.

    Parts are blocks, and convolutions outside of blocks; those whose outputs are added go together.
    """
    parts: dict[str, set[str]] = {}
    sliced = set()
    for name, layer in model.named_modules():
        in_head = name == "fc" or name.startswith("fc.")
        if isinstance(layer, SlicedOutput) and not in_head and layer.channels_at(1e-9) < layer.channels_at(1.0):
            sliced.add(name)
            part = _part(model, name)
            parts[part] = {part}
    for names in model.residual_sums:
        together = set().union(*(parts[_part(model, name)] for name in names if name in sliced))
        parts.update(dict.fromkeys(together, together))  # one set object for all of them
    groups = list({id(group): group for group in parts.values()}.values())
    return [_short_names(group, parts) for group in groups]


def _part(model: nn.Module, name: str) -> str:
    """The first module on the way to layer `name` that is no mere container."""
    levels = name.split(".")
    for depth in range(1, len(levels)):
        part = ".".join(levels[:depth])
        if not isinstance(model.get_submodule(part), nn.Sequential | nn.ModuleList):
            return part
    return name


def _short_names(group: set[str], parts: dict[str, set[str]]) -> list[str]:
    """Names for `group`: that of a container for all that is in it."""
    names = set()
    for part in group:
        container = part.rpartition(".")[0]
        whole = container and all(other in group for other in parts if other.startswith(f"{container}."))
        names.add(container if whole else part)
    return sorted(names)


def _changed(genes: Genes, index: int, step: int) -> Genes:
    return (*genes[:index], genes[index] + step, *genes[index + 1 :])


def latency_ms(model: Backbone, width: Width, image_shape: Sequence[int], *, rounds: int = 20) -> float:
    """Median milliseconds of the standalone sub-network (without head) for one image, on the model's device."""
    device = next(model.parameters()).device
    network = copy.deepcopy(model).eval()
    network.fc = nn.Identity()
    image = torch.randn(1, *image_shape, device=device)
    with torch.no_grad():
        if has_statistics(network):  # any will do; one pixel of one image would have no variance
            with use_width(network, width), calibrating(network):
                network(torch.cat([image, image]))
        dense = standalone(network, width, image)
        seconds = []
        for _ in range(5 + rounds):
            start = time.perf_counter()
            dense(image)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds[5:])


def pareto_front(rows: Sequence[Row], cost: str) -> list[Row]:
    """The rows than which none is both cheaper and better; cheapest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front
