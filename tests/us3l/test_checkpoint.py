"""us3l.checkpoint: files that are whole or not there, and runs that go on bit by bit after any death."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import us3l_kernels
from us3l import checkpoint as checkpoints
from us3l.checkpoint import CheckpointFolder
from us3l.config import load
from us3l.engine import Trainer
from us3l.errors import CheckpointError
from us3l.evaluation import calibrate
from us3l_kernels.nn.calibration import statistics

# Two epochs of 8 batches. The widths are random from the second epoch on, the momentum buffers fill, alpha ramps.
TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
    "data.name=random", "data.size=8", "data.train_samples=64", "data.test_samples=8", "data.batch_size=8",
    "method.hidden_dim=16", "method.dim=8", "train.epochs=2", "train.device=cpu", "train.threads=1",
    "train.log_every=3", "train.knn_every=1", "sampler.kind=sandwich",
]  # fmt: skip
STEPS = 16


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def trainer(folder: Path | str, *overrides: str, console: Console | None = None) -> Trainer:
    config = load(None, [*TINY, f"checkpoint.dir={folder}", *overrides])
    return Trainer(config, console=console or Console(quiet=True))


def state(run: Trainer) -> dict[str, Tensor]:
    """All that decides how a run would go on, as tensors."""
    saved = run.state()
    tensors = {f"method.{key}": value for key, value in saved["method"].items()}
    for index, slots in saved["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in slots.items()}
    tensors["sampler"] = saved["sampler"]["generator"]
    return {key: value.clone() for key, value in tensors.items()}


def assert_bit_identical(run: Trainer, expected: dict[str, Tensor]) -> None:
    given = state(run)
    assert given.keys() == expected.keys()
    assert [key for key in given if not torch.equal(given[key], expected[key])] == []


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    threads = torch.get_num_threads()
    run = trainer("null")
    run.fit()
    torch.set_num_threads(threads)
    return state(run)


def stop_after(run: Trainer, step: int, number: signal.Signals) -> None:
    """Send this process a signal in the middle of an iteration."""

    def send(*_: object) -> None:
        if run.steps_done == step:
            os.kill(os.getpid(), number)

    run.step.optimizer.register_step_pre_hook(send)


# Runs that die


def child(folder: Path, *overrides: str, before: str = "") -> subprocess.Popen[str]:
    """A training process that prints its number of steps; `before` is run when `run`, a Trainer, is ready."""
    program = f"""
import os, signal, sys
from rich.console import Console
from us3l import checkpoint as checkpoints
from us3l.config import load
from us3l.engine import Trainer

run = Trainer(load(None, sys.argv[1:]), console=Console(quiet=True))
run.step.optimizer.register_step_post_hook(lambda *_: print(run.steps_done + 1, flush=True))
{before}
run.fit()
"""
    command = [sys.executable, "-c", program, *TINY, f"checkpoint.dir={folder}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_at_a_random_moment(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    moment = random.SystemRandom().randint(1, STEPS - 1)
    process = child(tmp_path, "checkpoint.every_steps=1")
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == moment:
            break
    process.kill()
    process.wait()

    run = trainer(tmp_path)
    run.resume("auto")
    assert moment - 1 <= run.steps_done <= STEPS, f"killed after {moment} steps"
    run.fit()
    assert_bit_identical(run, uninterrupted)


def test_kill_while_a_checkpoint_is_written(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    """Half of the fourth checkpoint is on the disk when the process dies."""
    before = """
save = checkpoints.torch.save
def dying(checkpoint, file):
    save(checkpoint, file)
    if checkpoint["batch"] == 4:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.torch.save = dying
"""
    process = child(tmp_path, "checkpoint.every_steps=1", before=before)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    names = sorted(path.name for path in tmp_path.glob("*.pt*"))
    assert names == ["step-000000002.pt", "step-000000003.pt", "step-000000004.pt.tmp"]

    run = trainer(tmp_path)
    assert run.resume("auto") and run.steps_done == 3
    run.fit()
    assert_bit_identical(run, uninterrupted)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "error", "step"),
    [(signal.SIGTERM, SystemExit, 2), (signal.SIGINT, KeyboardInterrupt, 11)],  # in the first and the second epoch
)
def test_signals_save_and_stop(
    tmp_path: Path, uninterrupted: dict[str, Tensor], number: signal.Signals, error: type[BaseException], step: int
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path)
    stop_after(run, step, number)
    with pytest.raises(error) as caught:
        run.fit()
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers

    run = trainer(tmp_path)
    assert run.resume("auto") and run.steps_done == step + 1  # the iteration under way was finished
    run.fit()
    assert_bit_identical(run, uninterrupted)


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3", "dino", "seed", "supervised"])
def test_every_method_goes_on_bit_by_bit(tmp_path: Path, name: str) -> None:
    """Queues and centres too; a teacher's file is read again."""
    switches = {
        "moco_v2": ["method.queue_size=40"],
        "moco_v3": ["model.name=vit_mini", "model.patch_size=4"],
        "dino": ["method.base_loss=kl", "method.distillation=kl"],
        "seed": ["method.queue_size=40", "method.base_loss=relational", "method.target=frozen"],
        "supervised": ["method.base_loss=cross_entropy", "method.target=live", "method.distillation=none"],
    }[name]
    switches += [f"method.name={name}", "train.knn_every=0", "sampler.n=2", "train.epochs=1"]
    if name == "seed":
        trainer(tmp_path / "teacher").save()
        switches.append(f"method.teacher={tmp_path}/teacher/step-000000000.pt")
    undisturbed = trainer("null", *switches)
    undisturbed.fit()
    run = trainer(tmp_path / "run", *switches)
    stop_after(run, 5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.fit()
    run = trainer(tmp_path / "run", *switches)
    assert run.resume("auto") and run.steps_done == 6
    run.fit()
    assert_bit_identical(run, state(undisturbed))
    if name in ("moco_v2", "seed"):
        assert int(state(run)["method.queue.position"]) == STEPS // 2 * 16 % 40
        restored = checkpoints.restore(checkpoints.load(tmp_path / "run" / f"step-{STEPS // 2:09d}.pt"))
        assert torch.equal(restored.queue.keys, undisturbed.method.queue.keys)


def test_resume_keeps_the_scaler_and_the_best(tmp_path: Path) -> None:
    run = trainer(tmp_path, "train.amp=fp16", "train.epochs=1")
    run.fit()
    saved = checkpoints.load(tmp_path / "step-000000008.pt")
    assert saved["scaler"]["scale"] == run.step.scaler.get_scale() < 65536  # the first updates overflowed
    again = trainer(tmp_path, "train.amp=fp16", "train.epochs=1")
    again.resume("auto")
    assert again.step.scaler.state_dict() == run.step.scaler.state_dict()
    assert again.best == run.best is not None
    best = checkpoints.load(tmp_path / "best.pt")
    assert best["best"] == run.best and (best["epoch"], best["batch"]) == (1, 0)


# Which runs may go on


def refuse(run: Trainer, path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        run.resume(path)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a run that has not begun."""
    run = trainer(tmp_path)
    run.save()
    return tmp_path / "step-000000000.pt"


def change(path: Path, **changes: Any) -> None:
    saved = checkpoints.load(path)
    saved["environment"] = {**saved["environment"], **changes}
    checkpoints.save(path, saved)


def test_another_configuration_is_refused(saved: Path) -> None:
    text = refuse(trainer(saved.parent, "optimizer.lr=0.3", "sampler.n=4"), saved)
    assert "optimizer.lr: 0.1 then, 0.3 now" in text and "sampler.n: 3 then, 4 now" in text
    assert trainer(saved.parent, "train.log_every=7", "checkpoint.keep=9").resume(saved)  # says nothing else


def test_another_environment_is_refused(saved: Path) -> None:
    run, lenient = trainer(saved.parent), trainer(saved.parent, "checkpoint.bit_identical=false")
    original = checkpoints.load(saved)
    for key, value in (
        ("isa", "DEFAULT"),
        ("backends", ["reference"]),
        ("processes", 8),
        ("threads", 7),
        ("torch", "2.0.0"),
        ("us3l", "0.0.0"),
    ):
        checkpoints.save(saved, original)
        change(saved, **{key: value})
        text = refuse(run, saved)
        assert f"{key}: {value} then" in text and "checkpoint.bit_identical=false" in text
        assert lenient.resume(saved)


def test_another_backend_context_is_refused(saved: Path) -> None:
    with us3l_kernels.backend("linear=reference"):
        text = refuse(trainer(saved.parent), saved)
        assert "requested: {" in text and "'linear': 'reference'" in text
    assert trainer(saved.parent).resume(saved)


def test_another_number_of_processes_goes_on_between_epochs_only(saved: Path) -> None:
    change(saved, processes=2)
    assert trainer(saved.parent, "checkpoint.bit_identical=false").resume(saved)
    checkpoints.save(saved, {**checkpoints.load(saved), "epoch": 1, "batch": 3})
    text = refuse(trainer(saved.parent, "checkpoint.bit_identical=false"), saved)
    assert "by 2 processes after 3 batches" in text and "end of an epoch" in text


def test_threads_are_restored(saved: Path) -> None:
    change(saved, threads=2)
    run = trainer(saved.parent, "train.threads=null")
    run.resume(saved)
    assert torch.get_num_threads() == 2


def test_a_new_run_does_not_write_into_the_folder_of_another(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds the checkpoints of a run already.*--resume auto"):
        trainer(saved.parent).fit()


def test_resume_auto_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume("auto") is False
    assert "no checkpoint at" in refuse(trainer(tmp_path), tmp_path / "missing.pt")


# Files


def test_a_torn_newest_file_is_passed_over_aloud(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    run = trainer(tmp_path, "checkpoint.every_steps=5")
    stop_after(run, 10, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.fit()
    newest = tmp_path / "step-000000011.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "best.pt").write_bytes(b"")

    console = Console(record=True, file=io.StringIO(), width=400)
    run = trainer(tmp_path, console=console)
    assert run.resume("auto") and run.steps_done == 10
    text = console.export_text()
    assert "Warning" in text and str(newest) in text and "Going back" in text
    run.fit()
    assert (tmp_path / "abandoned-1" / newest.name).is_file() and (tmp_path / "abandoned-1" / "best.pt").is_file()
    assert_bit_identical(run, uninterrupted)


def test_nothing_readable_is_an_error(saved: Path) -> None:
    saved.write_bytes(b"")
    assert "none of the 1 checkpoints" in refuse(trainer(saved.parent), "auto")


def test_broken_and_foreign_files(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            checkpoints.load(saved)

    saved.write_bytes(whole)
    with zipfile.ZipFile(saved) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[weights.header_offset + 200] ^= 1  # a single bit of the weights, which torch.load does not notice
    saved.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoints.load(saved)

    for foreign, expected in (
        ([1, 2], "not a checkpoint of us3l"),
        ({"state_dict": {}}, "not a checkpoint of us3l"),
        ({"format": 99}, "has format 99"),
        ({"format": 1, "config": {}}, "lacks batch, best"),
        ({"format": Path("code")}, "not a readable checkpoint"),  # would run code: weights_only refuses it
    ):
        torch.save(foreign, saved)
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.load(saved)


def test_a_hostile_file_runs_nothing(saved: Path, tmp_path: Path) -> None:
    """Neither on the way through the checkpoint's format, nor as a bare pickle under its name."""
    touched = tmp_path / "touched"

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(touched),)

    whole = checkpoints.load(saved)
    for write in (
        lambda: torch.save({**whole, "best": Hostile()}, saved),
        lambda: saved.write_bytes(pickle.dumps({**whole, "method": Hostile()})),
    ):
        write()
        with pytest.raises(CheckpointError, match="not a readable checkpoint: .* never unpickled"):
            checkpoints.load(saved)
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
            trainer(saved.parent).resume("auto")
    assert not touched.exists()


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device.*--resume auto"):
        checkpoints.save(saved, {"format": 1})
    assert saved.read_bytes() == whole and list(saved.parent.glob("*.tmp")) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The system refuses to write: that is an error for a checkpoint, and a warning for TensorBoard's files."""
    console = Console(record=True, file=io.StringIO(), width=400)
    run = trainer(tmp_path, "checkpoint.every_steps=3", "train.log_every=1", console=console)

    def fill(*_: object) -> None:
        if run.steps_done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.step.optimizer.register_step_pre_hook(fill)
    try:
        with pytest.raises(CheckpointError, match="step-000000006.pt cannot be written: File too large.*--resume auto"):
            run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("*.pt*")] == ["step-000000003.pt"]
    assert "TensorBoard's files cannot be written" in console.export_text()
    assert trainer(tmp_path).resume("auto")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (3, 20, 100, 1000):
        folder.save({"format": 1}, step)
    folder.save_best({"format": 1})
    assert [path.name for path in folder] == ["step-000001000.pt", "step-000000100.pt"]
    assert (tmp_path / "best.pt").is_file()


def test_pruning_leaves_the_file_just_written(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (500, 400, 310, 320, 330):
        assert folder.save({"format": 1}, step).is_file()
    names = [f"step-{step:09d}.pt" for step in (500, 400, 330, 320)]
    assert [path.name for path in folder] == names


def test_resuming_from_an_older_checkpoint_abandons_the_later_ones(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    run = trainer(tmp_path, "checkpoint.every_steps=5", "checkpoint.keep=9")
    stop_after(run, 12, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.fit()
    assert [path.name for path in run.folder or ()] == [f"step-{step:09d}.pt" for step in (13, 10, 8, 5)]

    console = Console(record=True, file=io.StringIO(), width=400)
    run = trainer(tmp_path, console=console)
    run.resume((tmp_path / "step-000000005.pt").rename(tmp_path / "mine.pt"))
    run.step.optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # dies before it has saved anything
    with pytest.raises(ZeroDivisionError):
        run.fit()
    moved = ["best.pt", "step-000000008.pt", "step-000000010.pt", "step-000000013.pt"]
    assert sorted(path.name for path in (tmp_path / "abandoned-1").iterdir()) == moved
    text = console.export_text()
    assert "Warning" in text and all(name in text for name in moved) and str(tmp_path / "abandoned-1") in text

    run = trainer(tmp_path)
    assert run.resume("auto") and run.steps_done == 5
    run.fit()
    assert_bit_identical(run, uninterrupted)
    assert [path.name for path in run.folder or ()] == ["step-000000016.pt", "step-000000008.pt"]
    assert (tmp_path / "best.pt").is_file()


def test_restore_brings_back_weights_and_calibrated_statistics(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    calibrate(run.method.encoder_q, run.data.train_eval, 0.5)
    path = tmp_path / "calibrated.pt"
    checkpoints.save(path, {**run.state(), "statistics": statistics(run.method.encoder_q)})
    method = checkpoints.restore(checkpoints.load(path))
    assert not method.training
    for key, value in run.method.state_dict().items():
        assert torch.equal(value, method.state_dict()[key])
    table, again = statistics(run.method.encoder_q), statistics(method.encoder_q)
    assert list(again) == ["0.5"]
    for name, (mean, variance) in table["0.5"].items():
        assert torch.equal(mean, again["0.5"][name][0]) and torch.equal(variance, again["0.5"][name][1])


def test_what_is_set_aside_twice_is_kept_twice(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for timeline in ("first", "second"):
        path = tmp_path / "step-000000002.pt"
        path.write_text(timeline)
        folder.set_aside([path])
    kept = [(tmp_path / f"abandoned-{n}" / "step-000000002.pt").read_text() for n in (1, 2)]
    assert kept == ["first", "second"] and not list(folder)
