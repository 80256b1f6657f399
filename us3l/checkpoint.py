"""Checkpoints that survive a crash at any moment, and from which a run goes on bit by bit (on a CPU).

A checkpoint is one file, a dict written by `torch.save` and read with `weights_only=True`:

    format       1
    config       nested dicts (us3l.config)
    method       state_dict: student, heads and the momentum teacher
    optimizer, scaler, sampler    their state_dicts
    epoch, batch the position: the next batch of the run is `batch` of `epoch`, both from 0
    best         best online kNN accuracy so far (%), or None
    statistics   calibrated statistics {width: {module: (mean, variance)}}, or None (see `us3l calibrate`)
    environment  what the result depends on besides: versions, threads, instruction set, backends
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from us3l.config import from_dict, to_dict
from us3l.errors import CheckpointError
from us3l.methods import Method, build_method
from us3l_kernels.nn.calibration import load_statistics
from us3l_kernels.version import __version__

FORMAT = 1
_KEYS = {
    "format", "config", "method", "optimizer", "scaler", "sampler", "epoch", "batch", "best", "statistics",
    "environment",
}  # fmt: skip

Checkpoint = dict[str, Any]


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` so that `path` holds either the old file or the whole new one, whatever happens.

    Raises:
        CheckpointError: it cannot be written, because the disk is full, for example. Nothing is left of it then.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Checkpoints that were there before are whole: make room (or "
            "choose another checkpoint.dir), and go on with --resume auto"
        ) from error
    # The new name is safe against a power failure only once the folder is on the disk as well.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: str | Path) -> Any:
    """What :func:`save` wrote, whatever it is; tensors come on the CPU.

    Raises:
        CheckpointError: no such file, or a torn, corrupt or foreign one.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        # torch.load reads flipped bits without complaint: the archive's checksums are for us to verify.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make the readers raise all kinds of exceptions
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} is not a readable checkpoint: it is torn, corrupt or foreign, or holds other things than tensors "
            f"and plain values, which are never unpickled. {reason}"
        ) from error


def load(path: str | Path) -> Checkpoint:
    """Read and check a run's checkpoint.

    Raises:
        CheckpointError: as :func:`read`; or it is of another format, or not whole.
    """
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of us3l: expected a dict with the key 'format'")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {checkpoint['format']}, this version of us3l ({__version__}) reads {FORMAT}"
        )
    if missing := _KEYS - checkpoint.keys():
        raise CheckpointError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    # Keys of the configuration that are newer than the file have their defaults.
    checkpoint["config"] = to_dict(from_dict(checkpoint["config"]))
    return checkpoint


class CheckpointFolder:
    """The checkpoints of one run: the `keep` newest, `step-000001234.pt`, and `best.pt`."""

    def __init__(self, path: str | Path, keep: int) -> None:
        self.path = Path(path)
        self.keep = keep

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Paths of the numbered checkpoints, newest first."""
        return iter(sorted(self.path.glob("step-*.pt"), reverse=True))

    def save(self, checkpoint: Checkpoint, step: int) -> Path:
        """Write the checkpoint of iteration `step` and keep that many files up to it.

        Files of later iterations are left alone: they are of another timeline (see `abandoned`).
        """
        path = self.path / f"step-{step:09d}.pt"
        save(path, checkpoint)
        for old in [each for each in self if each <= path][self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def save_best(self, checkpoint: Checkpoint) -> Path:
        """Write `best.pt`."""
        path = self.path / "best.pt"
        save(path, checkpoint)
        return path

    def newest(self, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
        """The newest checkpoint that can be read; None if there is none at all.

        Every file that had to be passed over is reported through `say`.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read.
        """
        paths = list(self)
        for path in paths:
            try:
                return path, load(path)
            except CheckpointError as error:
                say(f"{error}\nGoing back to the checkpoint before it.")
        if paths:
            raise CheckpointError(f"none of the {len(paths)} checkpoints in {self.path} can be read")
        return None

    def abandoned(self, step: int, best: float | None) -> list[Path]:
        """The checkpoints that a run which goes on from iteration `step`, with this `best`, leaves behind it."""
        paths = [path for path in self if int(path.stem.removeprefix("step-")) > step]
        best_path = self.path / "best.pt"
        if best_path.is_file():
            try:
                stale = load(best_path)["best"] != best
            except CheckpointError:  # torn: not worth refusing to train
                stale = True
            if stale:
                paths.append(best_path)
        return paths

    def set_aside(self, paths: list[Path]) -> Path:
        """Move checkpoints of this folder to a new `abandoned-N/` in it, where nothing looks for them; gives its path.

        N counts from 1: what was set aside before may have the same names.
        """
        aside = next(path for n in itertools.count(1) if not (path := self.path / f"abandoned-{n}").exists())
        aside.mkdir()
        for path in paths:
            path.replace(aside / path.name)
        return aside

    def clear_leftovers(self) -> None:
        """Remove what a process that was killed while writing left behind."""
        for path in self.path.glob("*.pt.tmp"):
            path.unlink(missing_ok=True)


def restore(checkpoint: Checkpoint) -> Method:
    """The trained method of a checkpoint, in evaluation mode on the CPU, with its calibrated statistics."""
    method = build_method(from_dict(checkpoint["config"]))
    method.load_state_dict(checkpoint["method"])
    if checkpoint["statistics"] is not None:
        load_statistics(method.encoder_q, checkpoint["statistics"])
    return method.eval()


def rng_state() -> dict[str, Any]:
    """States of the global random generators of Python and torch."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo of :func:`rng_state`; states of GPUs that are not here are left out."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What the numbers of a run depend on, besides its configuration."""
    from us3l_kernels.backends import BACKENDS, measured, requested

    return {
        "processes": processes,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cpu": measured.cpu_name(),  # matrix products are cut to its caches, which decides the order of their sums
        "isa": torch.backends.cpu.get_cpu_capability(),
        "backends": [name for name, backend in BACKENDS.items() if backend.unavailable() is None],
        "requested": requested() | {"US3L_ISA": os.environ.get("US3L_ISA", "auto")},
        "tuned": measured.table(device.type).fingerprint(),
        "torch": str(torch.__version__),
        "us3l": __version__,
        "python": platform.python_version(),
    }


def check_environment(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError, naming every difference, where a run saved there would go on to another result here.

    On a CPU the same environment gives the same bits. On a GPU it does not in any case, so that there only a change of
    the kind of device or of the number of processes (and so of the global batch) counts.
    """
    keys = ["processes", "device"]
    if now["device"] == "cpu":
        keys += ["threads", "cpu", "isa", "backends", "requested", "tuned", "torch", "us3l"]
    changes = [f"{key}: {saved[key]} then, {now[key]} now" for key in keys if saved[key] != now[key]]
    if changes:
        raise CheckpointError(
            "the run would not go on bit by bit, because its environment has changed ("
            + "; ".join(changes)
            + "). Restore it, or accept another result with checkpoint.bit_identical=false"
        )
