"""Measured tables: which backend was the fastest for a call on this machine. `us3l_kernels.tune` makes them.

They lie in one JSON file: $US3L_TUNE_CACHE, else us3l/tune.json in the user's cache folder. A table is for one machine
and one build (`machine`), and is used where these are the same; the file may hold those of others beside it. It is read
once per process, at the first choice. Without an entry for a call the backends' own heuristics decide.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from us3l_kernels import _native
from us3l_kernels.errors import SettingError
from us3l_kernels.version import __version__

log = logging.getLogger("us3l_kernels")

FORMAT = 2
MARGIN = 0.03  # a later backend in the order of `auto` must be faster by more than this: noise decides nothing

Call = tuple[Any, ...]
"""Everything that decides what a call costs, and so the choice: (op, device type, x, weight, arguments), x and weight
as (dtype, shape, strides) or None, arguments as (name, value) pairs. Only tuples, strings, numbers and None."""


def describe(op: str, x: Tensor, weight: Tensor | None, arguments: dict[str, Any]) -> Call:
    """The Call of an operation with these arguments (those of `Backend.why_not`)."""
    return (
        op,
        x.device.type,
        (str(x.dtype), x.shape, x.stride()),
        None if weight is None else (str(weight.dtype), weight.shape, weight.stride()),
        tuple([(name, tuple(v) if isinstance(v, list) else v) for name, v in arguments.items()]),
    )


def is_static(call: Call) -> bool:
    """Whether every size is a number: torch.compile with dynamic shapes has none, and must not be made to guard."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    _, _, x, weight, arguments = call
    sizes = [*x[1], *(() if weight is None else weight[1]), *[v for _, v in arguments if isinstance(v, int)]]
    return all([has_static_value(size) for size in sizes])


class Choice(NamedTuple):
    """backend: the one to take. reason: for the log."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Measurement:
    """Seconds of a call by backend, in the order of `auto`: forward alone, and (training) with the backward behind it,
    None where no gradient was asked for."""

    call: Call
    threads: int
    forward: dict[str, float]
    training: dict[str, float] | None

    def seconds(self, gradients: bool) -> dict[str, float] | None:
        """By backend; with the backward if gradients are needed, None if that was not measured."""
        return self.training if gradients else self.forward

    def choice(self, gradients: bool) -> Choice | None:
        """The fastest backend, the earliest of those that are equal but for noise."""
        seconds = self.seconds(gradients)
        if seconds is None:
            return None
        best = next(iter(seconds))
        for name, time in seconds.items():
            if time < (1 - MARGIN) * seconds[best]:
                best = name
        others = [f"{name} takes {time / seconds[best]:.2f}x as long" for name, time in seconds.items() if name != best]
        return Choice(best, f"measured: {', '.join(others)}")


def path() -> Path | None:
    """The file of the tables; None if US3L_TUNE_CACHE is empty: then there are none."""
    named = os.environ.get("US3L_TUNE_CACHE")
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "us3l" / "tune.json"


def cpu_name() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@cache
def machine(device: str) -> dict[str, str | None]:
    """What a table is for: the processor or GPU, the instruction set, the versions, and these very kernels."""
    compiled_later = {}
    if device == "cuda":
        library, hardware = _native.load_cuda(), torch.cuda.get_device_name()
        compiled_later = {"triton": _triton()}
    else:
        library = _native.load()
        hardware = f"{cpu_name()}, {_native.isa()}, {torch.backends.cpu.get_cpu_capability()} in torch"
    return {
        "hardware": hardware,
        "torch": str(torch.__version__),
        **compiled_later,
        "us3l": __version__,
        "build": _digest(Path(library.__file__).read_bytes()) if library is not None and library.__file__ else None,
    }


def _triton() -> str | None:
    """Version and sources of the Triton kernels, which are compiled at run time; None without Triton."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    files = sorted(Path(__file__).parents[1].joinpath("triton").glob("*.py"))
    return f"{version}, {_digest(b''.join(file.read_bytes() for file in files))}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


class Table:
    """The measurements of one machine, by call and threads."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.measurements = {(m.call, m.threads): m for m in measurements}
        self._choices = {
            (call, threads, gradients): m.choice(gradients)
            for (call, threads), m in self.measurements.items()
            for gradients in (False, True)
        }

    def choice(self, call: Call, threads: int, gradients: bool) -> Choice | None:
        """What was the fastest; None for a call that was not measured."""
        try:
            return self._choices.get((call, threads, gradients))
        except TypeError:  # sizes of a traced call may be symbols, which have no hash
            return None

    def fingerprint(self) -> str | None:
        """Tables with the same one choose alike; None for an empty one."""
        chosen = sorted(repr((key, choice.backend)) for key, choice in self._choices.items() if choice is not None)
        return _digest("".join(chosen).encode()) if chosen else None


def _read() -> list[dict[str, Any]]:
    """The tables of the file as they are there; none, and a line in the log, if it is not one of ours."""
    file = path()
    if file is None or not file.exists():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return [{"machine": dict(t["machine"]), "calls": list(t["calls"])} for t in content["tables"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("measured choices in %s are ignored: %s: %s", file, type(error).__name__, error)
        return []


def _tuples(value: Any) -> Any:
    return tuple([_tuples(v) for v in value]) if isinstance(value, list) else value


def _measurement(entry: dict[str, Any]) -> Measurement:
    """Of its JSON form; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
    from us3l_kernels.backends import BACKENDS

    forward, training = entry["forward"], entry["training"]
    if not forward or not forward.keys() <= BACKENDS.keys() or (training and training.keys() != forward.keys()):
        raise ValueError(f"times of {list(forward)} and {list(training or ())}, expected some of {list(BACKENDS)}")
    return Measurement(_tuples(entry["call"]), entry["threads"], forward, training)


def load(device: str) -> Table:
    """This machine's table out of the file; an empty one if there is none."""
    tables = _read()
    for table in tables:
        if table["machine"] == machine(device):
            try:
                return Table([_measurement(entry) for entry in table["calls"]])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                log.warning("measured choices in %s are ignored: %s: %s", path(), type(error).__name__, error)
                return Table([])
    if tables:
        log.info("%s has no measured choices for this machine and this build: `us3l tune` makes them", path())
    return Table([])


def save(device: str, measurements: Iterable[Measurement]) -> Path:
    """Add to this machine's table in the file, and use it from now on. The file is replaced as a whole or not at all.

    Raises SettingError if US3L_TUNE_CACHE is empty, OSError if the file cannot be written.
    """
    file = path()
    if file is None:
        raise SettingError("US3L_TUNE_CACHE: expected a file to write to, got ''")
    merged = load(device).measurements | {(m.call, m.threads): m for m in measurements}
    tables = [table for table in _read() if table["machine"] != machine(device)]
    tables.append({"machine": machine(device), "calls": [asdict(m) for m in merged.values()]})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"format": FORMAT, "tables": tables}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    _tables[device] = load(device)
    return file


_tables: dict[str, Table] = {}


def table(device: str) -> Table:
    """The table in use in this process; read at its first use, no matter what becomes of the file."""
    if device not in _tables:
        _tables[device] = load(device) if device in ("cpu", "cuda") else Table([])
    return _tables[device]


Observer = Callable[[Call, int, bool, bool], None]
_observer: Observer | None = None


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, `observer(call, threads, x_gradient, weight_gradient)` is told of every look-up."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def is_observed() -> bool:
    """Whether someone wants to see every operation: then none may be a part of another."""
    return _observer is not None


@torch.compiler.assume_constant_result
def in_use(device: str) -> bool:
    """Whether a look-up can find something or is observed. If not, a small layer's call need not be described."""
    return _observer is not None or bool(table(device).measurements)


@torch.compiler.assume_constant_result
def look_up(call: Call, x_gradient: bool, weight_gradient: bool) -> tuple[str, str] | None:
    """The Choice for a call, and for which of its inputs gradients are needed; None if it was not measured."""
    device = call[1]
    threads = torch.get_num_threads() if device == "cpu" else 0
    if _observer is not None:
        _observer(call, threads, x_gradient, weight_gradient)
    choice = table(device).choice(call, threads, x_gradient or weight_gradient)
    return None if choice is None else (choice.backend, choice.reason)  # no named tuple: torch 2.11 compiles none
