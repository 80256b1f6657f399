"""The README's tables of speed, made from the results: no figure there is typed by hand.

Between `<!-- bench:cpu -->` and `<!-- /bench:cpu -->` stands what `render` makes of the JSON files in `results/cpu/`;
so for every other folder of results. `bench:gpu` stands for all folders with readings of a GPU (`gpu_suite.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- bench:(?P<folder>[\w-]+) -->\n).*?(<!-- /bench:(?P=folder) -->)", re.DOTALL)

MODELS = {
    "resnet_tiny": "tiny ResNet", "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
}  # fmt: skip
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}

Result = dict[str, Any]


UNMEASURED = "\n**GPU figures are not yet measured.**\n\n"


def updated(text: str, results: Path = RESULTS) -> str:
    """`text` with every block rendered anew from the folder of `results` that it names."""

    def table(folder: str) -> str:
        return render_gpus(results) if folder == "gpu" else render(load(results / folder))

    return BLOCK.sub(lambda block: f"{block[1]}{table(block['folder'])}{block[3]}", text)


def render_gpus(results: Path) -> str:
    """Markdown: the tables of every folder with readings of a GPU, one behind the other; or that there are none."""
    found = [load(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    tables = [render(of) for of in found if of and all(result["versions"]["gpu"] is not None for result in of)]
    return "".join(tables) or UNMEASURED


def load(folder: Path) -> list[Result]:
    """The results in a folder that the automatic choice of backends gave, in the order in which tables list them.

    Raises FileNotFoundError if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of benchmark results")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    listed = [result for result in results if result.get("benchmark") in TABLES]
    chosen = [result for result in listed if set(result["config"]["backends"].values()) == {"auto"}]
    return sorted(chosen, key=_order)


def _order(result: Result) -> tuple[Any, ...]:
    config = result["config"]
    return (list(MODELS).index(config["model"]), config["input"], config["batch"], list(DTYPES).index(config["dtype"]))


def render(results: Sequence[Result]) -> str:
    """Markdown: a table for each benchmark that there are results of, and where they were taken."""
    parts = []
    for benchmark, table in TABLES.items():
        found = [result for result in results if result["benchmark"] == benchmark]
        if found:
            parts.append(table(found))
    machines = dict.fromkeys(_machine(result["versions"]) for result in results)
    parts.append("Taken on " + "; ".join(machines) + ".")
    return "\n" + "\n\n".join(parts) + "\n\n"


def _machine(versions: dict[str, Any]) -> str:
    device = versions["gpu"] or f"{versions['threads']} threads of {versions['cpu']} ({versions['cpu_capability']})"
    return f"{device}, torch {versions['torch'].partition('+')[0]}"


def _name(config: dict[str, Any]) -> str:
    name = f"{MODELS[config['model']]}, {config['input']} px, {DTYPES[config['dtype']]}"
    return name + (", an update per width" if config.get("step") == "per_width" else "")


def _steps(results: Iterable[Result]) -> str:
    """Whole steps: us3l's gain on every rival, and on the limit of direct convolution."""
    results = list(results)
    rivals = list(dict.fromkeys(rival for result in results for rival in result["ratios"]))
    rows = []
    for result in results:
        config, limit = result["config"], result["limit"]
        ratios = [result["ratios"].get(rival) for rival in rivals]
        floor = max(limit["compute_ms"], limit["memory_ms"]) / result["median_ms"]["us3l"]
        widths = " / ".join(f"{width:g}" for width in config["widths"])
        rows.append([_name(config), f"{config['batch']}", widths, *map(_times, [*ratios, floor])])
    return _table(["step", "images per view", "widths", *rivals, "limit of direct convolution"], rows)


def _operations(results: Iterable[Result]) -> str:
    """Single operations: geometric mean over layers and widths, and the least, for every kind and direction."""
    rows = []
    for result in results:
        means, least = result["geometric_mean_ratios"], result["minimum_ratios"]
        gains = {key: f"{_times(mean)} ({_times(least[key])})" for key, mean in means.items()}
        for kind in dict.fromkeys(key.rpartition(", ")[0] for key in means):
            backward = [gains.get(f"{kind}, {direction}", "") for direction in ("dX", "dW")]
            together = gains.get(f"{kind}, backward")
            rows.append(
                [_name(result["config"]), kind, gains[f"{kind}, forward"], *([together] * 2 if together else backward)]
            )
    return _table(["operation, gain on eager: mean (least)", "kind", "forward", "dX", "dW"], rows)


def _widths(results: Iterable[Result]) -> str:
    """Steps of random widths: their time in parts of that of fixed ones."""
    rows = [
        [_name(result["config"]), *(f"{result['ratios'][phase]:.2f}" for phase in ("cold", "warm"))]
        for result in results
    ]
    return _table(["random widths over fixed ones of equal operations, time", "first met", "met again"], rows)


def _memory(results: Iterable[Result]) -> str:
    """Peak memory of a step: us3l's in parts of every rival's, and its cache of weights beside."""
    results = list(results)
    rivals = list(dict.fromkeys(rival for result in results for rival in result["ratios"]))
    rows = []
    for result in results:
        config, ratios = result["config"], result["ratios"]
        parts = [f"{1 / ratios[rival]:.0%}" if rival in ratios else "" for rival in rivals]
        cache = result["readings"]["us3l"]["weight_cache_mb"]
        rows.append([_name(config), f"{config['batch']}", *parts, f"{cache:.0f} MB"])
    header = ["peak memory of a step", "images per view", *(f"of {rival}'s" for rival in rivals)]
    return _table([*header, "and cached weights"], rows)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "step": _steps, "ops": _operations, "widths": _widths, "memory": _memory
}  # fmt: skip
