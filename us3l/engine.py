"""THE training loop: a run of pre-training; one iteration of it is `us3l.step.TrainStep`."""

from __future__ import annotations

import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from us3l import checkpoint as checkpoints
from us3l.allocator import keep_freed_memory
from us3l.config import Config, differences, to_dict, to_yaml, validate
from us3l.data import make_data
from us3l.data.seeding import iteration_seed
from us3l.distributed import SINGLE, World
from us3l.errors import CheckpointError, ConfigError, DataError
from us3l.evaluation import effective_rank, evaluate, spread
from us3l.evaluation.protocol import Probe
from us3l.files import write_text
from us3l.methods import GUIDELINES, build_method
from us3l.monitor import Monitor, WidthReading, open_wandb, say
from us3l.sampling import largest_width, make_sampler
from us3l.schedule import group_alpha, learning_rate, teacher_momentum
from us3l.signals import catch_signals
from us3l.step import TrainStep

# Keys that may differ between a checkpoint's configuration and that of the run which goes on from it: they decide
# where a run happens and what it reports, not what it computes (threads and device: see check_environment).
NOT_COMPUTED = (
    "checkpoint.", "data.root", "data.workers", "data.download", "train.device", "train.threads", "train.log_every",
    "train.knn_every", "train.graphs", "train.max_skipped", "train.wandb",
)  # fmt: skip


class Trainer:
    """A pre-training run: data, method, schedule, checkpoints and reports around :class:`TrainStep`.

    Args:
        config: what to do (us3l.config.load).
        world: the processes of this run (us3l.distributed.launched); this one alone by default.
        console: where progress is shown; `Console(quiet=True)` for silence.
        on_epoch: called after every epoch with the number of epochs done.

    Attributes:
        method: being trained; `method.encoder_q` is the backbone to evaluate.
        data: as us3l.data.make_data gives it.
        epoch, batch: position of the next batch, both from 0.
    """

    def __init__(
        self,
        config: Config,
        *,
        world: World = SINGLE,
        console: Console | None = None,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        validate(config)
        self.config = config
        self.world = world
        self.on_epoch = on_epoch
        self.console = (console or Console()) if world.is_main else Console(quiet=True)
        self.device = resolve_device(config.train.device, world.local_rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        random.seed(config.train.seed)

        self.data = make_data(
            config.data, config.train.seed, rank=world.rank, world_size=world.size, device=self.device
        )
        if len(self.data.train) == 0:
            raise DataError(
                f"an epoch has {len(self.data.train_labels)} training images, less than one batch: data.batch_size="
                f"{config.data.batch_size} on {world.size} process(es) takes {config.data.batch_size * world.size}. "
                "Use a smaller batch."
            )
        if self.data.in_channels != config.model.in_channels:
            raise ConfigError(
                f"model.in_channels: expected {self.data.in_channels}, the channels of data.name={config.data.name}, "
                f"got {config.model.in_channels}"
            )
        if config.method.name == "supervised" and self.data.num_classes != config.model.num_classes:
            raise ConfigError(
                f"model.num_classes: expected {self.data.num_classes}, the classes of data.name={config.data.name}, "
                f"got {config.model.num_classes}"
            )
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.method = build_method(config).to(self.device).to(memory_format=self.memory_format)
        world.broadcast_(self.method)
        self.sampler = make_sampler(config.sampler, config.train.epochs, config.train.seed)
        self.step = TrainStep(config, self.method, world)
        self.teacher = self.step.teacher

        self.epoch = self.batch = 0
        self.best: float | None = None  # online kNN accuracy, %
        folder = config.checkpoint.dir
        self.folder = checkpoints.CheckpointFolder(folder, config.checkpoint.keep) if folder is not None else None
        self._resumed = False
        self._saved_at = time.monotonic()

    @property
    def steps_done(self) -> int:
        """Iterations since the start of the run."""
        return self.epoch * len(self.data.train) + self.batch

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            TrainingError: losses or gradients are not finite any more.
            DataError: an image or a shard cannot be read.
            CheckpointError: the folder holds another run's checkpoints (and `resume` was not called).
            KeyboardInterrupt, SystemExit: after SIGINT and SIGTERM, when the state has been saved.
        """
        config = self.config
        self._prepare_folder()
        self._warn_of_violated_guidelines()
        self.method.train()
        self._saved_at = time.monotonic()
        with ExitStack() as stack:
            stopped_by = stack.enter_context(catch_signals())
            folder = self.folder.path if self.folder is not None and self.world.is_main else None
            monitor = stack.enter_context(
                Monitor(
                    self.console,
                    folder,
                    config.train.epochs,
                    len(self.data.train),
                    self.steps_done,
                    self.device,
                    open_wandb(config.train.wandb, folder, to_dict(config))
                    if config.train.wandb is not None and self.world.is_main
                    else None,
                )
            )
            while self.epoch < config.train.epochs:
                self._train_epoch(monitor, stopped_by)
                self.epoch, self.batch = self.epoch + 1, 0
                if config.train.knn_every and self.epoch % config.train.knn_every == 0:
                    self._evaluate(monitor)
                self.save()
                if self.on_epoch is not None:
                    self.on_epoch(self.epoch)

    def _train_epoch(self, monitor: Monitor, stopped_by: list[signal.Signals]) -> None:
        """From the current batch to the end of the epoch."""
        config = self.config
        batches = len(self.data.train)
        alpha = group_alpha(self.epoch, config.train.epochs, config.regulariser.warmup_epochs, config.regulariser.alpha)
        for images, labels in self._batches():
            widths = self.sampler.draw(self.epoch)
            lr = learning_rate(config.optimizer, self.steps_done, batches, config.train.epochs)
            if self.teacher is not None:
                steps = batches * config.train.epochs
                self.teacher.momentum = teacher_momentum(config.method, self.steps_done, steps)
            images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
            # Nothing of ours draws in here, but a method of somebody's own may. Such numbers go on after a resume, too.
            torch.manual_seed(iteration_seed(config.train.seed, self.steps_done, self.world.rank))
            random.seed(iteration_seed(config.train.seed, self.steps_done, self.world.rank))
            losses, projections, skipped = self.step(images, widths, lr=lr, alpha=alpha, labels=labels)

            self.batch += 1
            if skipped:
                monitor.skipped(self.steps_done, skipped)
            monitor.step(self.steps_done, config.data.batch_size * self.world.size)
            reading_due = self.steps_done % config.train.log_every == 0 or self.batch == batches
            if reading_due:
                readings = [
                    WidthReading(width, loss, spread(z), effective_rank(z))
                    for width, loss, z in zip(widths, losses.tolist(), projections, strict=True)
                ]
                monitor.read(self.steps_done, readings, lr)
            if self._save_due():
                self.save()
            # Processes must stop after the same step, or the others would wait for them in the next all-reduce.
            if (self.world.size == 1 or reading_due) and self.world.any(bool(stopped_by), self.device):
                self._stop(stopped_by)
        monitor.epoch_done(self.epoch + 1)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images and, if the method learns from them, labels, from the current batch to the end of the epoch."""
        if self.method.labelled:
            yield from self.data.labelled.epoch(self.epoch, start_batch=self.batch)
        else:
            for images in self.data.train.epoch(self.epoch, start_batch=self.batch):
                yield images, None

    def _evaluate(self, monitor: Monitor) -> None:
        """Evaluate the largest and the smallest width, and keep the weights with the best mean of the two."""
        if not self.world.is_main:
            return
        sampler = self.config.sampler
        smallest = min(sampler.widths) if sampler.kind == "fixed" else sampler.min_width
        widths = sorted({largest_width(sampler), smallest}, reverse=True)
        probe: Probe = "classifier" if self.method.labelled else "knn"
        rows = evaluate(self.method.encoder_q, self.data, widths, probe)
        self.method.train()
        monitor.scalars(self.steps_done, {f"{probe}/width_{row['width']:g}": row["accuracy"] for row in rows})
        accuracies = "  ".join(f"{row['width']:g}: {row['accuracy']:.1f} %" for row in rows)
        name = "test accuracy" if self.method.labelled else "online kNN"
        say(self.console, f"epoch {self.epoch}/{self.config.train.epochs}  {name} {accuracies}")
        mean = sum(row["accuracy"] for row in rows) / len(rows)
        if self.best is None or mean > self.best:
            self.best = mean
            if self.folder is not None:
                self.folder.save_best(self.state())

    def _warn_of_violated_guidelines(self) -> None:
        violated = self.method.violates_guidelines()
        if self.world.is_main and len(violated) == len(GUIDELINES):
            reasons = "; ".join(f"{name}: {GUIDELINES[name]}" for name in violated)
            warnings.warn(
                "this run violates all three guidelines for slimmable self-supervision and will probably collapse. "
                f"One of them would be enough ({reasons})",
                stacklevel=3,
            )

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint (the main process, and if there is a folder)."""
        self._saved_at = time.monotonic()
        if self.folder is not None and self.world.is_main:
            self.folder.save(self.state(), self.steps_done)

    def state(self) -> checkpoints.Checkpoint:
        """Everything that a run needs to go on, as us3l.checkpoint describes it."""
        return {
            "format": checkpoints.FORMAT,
            "config": to_dict(self.config),
            "method": self.method.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "sampler": self.sampler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "best": self.best,
            "statistics": None,
            "environment": checkpoints.environment(self.device, self.world.size),
        }

    def resume(self, path: str | Path) -> bool:
        """Go on from a checkpoint: a path, or "auto" for the newest readable one of the run's folder.

        Returns whether there was one ("auto" alone may find none). The number of CPU threads becomes that of the saved
        run, unless `train.threads` says another.

        Raises:
            CheckpointError: it cannot be read, its run had another configuration, or the environment has changed
                so that the result would not be bit-identical (see checkpoint.bit_identical), or the number of
                processes has in the middle of an epoch.
        """
        if path == "auto":
            if self.folder is None:
                raise CheckpointError("--resume auto looks into checkpoint.dir, which is null")
            found = self.folder.newest(lambda message: say(self.console, message, warning=True))
            if found is None:
                say(self.console, f"No checkpoint in {self.folder.path} yet: starting from the beginning.")
                return False
            path, state = found
        else:
            state = checkpoints.load(path)
        self._check_same_run(Path(path), state)

        self.method.load_state_dict(state["method"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.sampler.load_state_dict(state["sampler"])
        self.epoch, self.batch, self.best = state["epoch"], state["batch"], state["best"]
        self._resumed = True
        self.world.barrier()  # process 0 may move files about (fit) once all have read theirs
        say(self.console, f"Resuming from {path}: {self.epoch} epochs and {self.batch} batches are done.")
        return True

    def _check_same_run(self, path: Path, state: checkpoints.Checkpoint) -> None:
        changes = [
            f"{key}: {old!r} then, {new!r} now"
            for key, old, new in differences(state["config"], to_dict(self.config))
            if not key.startswith(NOT_COMPUTED) or (key == "data.workers" and self.config.data.name == "shards")
        ]
        if changes:
            raise CheckpointError(
                f"{path} belongs to a run with another configuration ({'; '.join(changes)}). Go on with the same "
                "settings, or start another run in a checkpoint.dir of its own"
            )
        processes = state["environment"]["processes"]
        if processes != self.world.size and state["batch"] > 0:
            raise CheckpointError(
                f"{path} was saved by {processes} processes after {state['batch']} batches of an epoch, which are "
                f"other images for {self.world.size}. Resume at the end of an epoch, or with {processes} processes"
            )
        if self.config.checkpoint.bit_identical:
            if self.config.train.threads is None:
                torch.set_num_threads(state["environment"]["threads"])
            now = checkpoints.environment(self.device, self.world.size)
            checkpoints.check_environment(state["environment"], now)

    def _save_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        minutes = (time.monotonic() - self._saved_at) / 60
        return (every is not None and self.steps_done % every == 0) or minutes >= self.config.checkpoint.every_minutes

    def _prepare_folder(self) -> None:
        if self.folder is None or not self.world.is_main:
            return
        if not self._resumed and any(self.folder):
            raise CheckpointError(
                f"{self.folder.path} holds the checkpoints of a run already. Go on with it (--resume auto), choose "
                "another folder (checkpoint.dir=...), or remove it"
            )
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.clear_leftovers()
        write_text(self.folder.path / "config.yaml", to_yaml(self.config))
        if self._resumed and (abandoned := self.folder.abandoned(self.steps_done, self.best)):
            # Later checkpoints are of another timeline (or torn): they must not pass for the newest of this one. The
            # state to go on from is written first, because the folder may hold it under no name that "auto" finds.
            self.save()
            aside = self.folder.set_aside(abandoned)
            names = ", ".join(path.name for path in abandoned)
            say(self.console, f"This run leaves later checkpoints behind: moved {names} to {aside}.", warning=True)

    def _stop(self, stopped_by: list[signal.Signals]) -> None:
        self.save()
        if self.folder is not None:
            say(self.console, f"Stopped and saved to {self.folder.path}; go on with --resume auto.")
        if signal.SIGTERM in stopped_by:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of `train.device`; "auto" is this process's GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ConfigError(f"train.device: cannot use {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device
