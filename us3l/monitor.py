"""What a run tells people while it trains: a progress display, scalars for TensorBoard and Weights & Biases, and a word
when it collapses.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from us3l.errors import ConfigError
from us3l.files import write_text

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter

# Two kinds of collapse. To a point: spread^2 = 1 - (mean cosine similarity of two images' embeddings), as long as the
# dimensions vary alike, so that at 0.5 two arbitrary images have a similarity of 0.75. To a line: an effective rank
# below 2, however large the spread. Healthy runs stay far from both: on 14x14 images, US3L ends at 0.97 and 7.
COLLAPSED_SPREAD, COLLAPSED_RANK = 0.5, 2.0


def say(console: Console, message: str, *, warning: bool = False) -> None:
    """Print a message as it is (above the progress display, if there is one)."""
    prefix = "[bold yellow]Warning:[/] " if warning else ""
    console.print(prefix + escape(message), soft_wrap=True, highlight=False)


def peak_memory(device: torch.device) -> float:
    """GB that the run has needed at most: of the GPU, allocated by torch; on a CPU, resident in this process."""
    if device.type == "cuda":
        import torch  # slow to import

        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def open_wandb(project: str, folder: Path | None, config: dict[str, Any]) -> Any:
    """A run of Weights & Biases; the one that this folder began, where it is resumed.

    Raises ConfigError if wandb is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"train.wandb={project} needs the package wandb ({error}): pip install us3l[wandb], or train.wandb=null"
        ) from error
    identity = None if folder is None else folder / "wandb-id"
    known = identity.read_text(encoding="utf-8") if identity is not None and identity.is_file() else None
    run = wandb.init(
        project=project,
        name=None if folder is None else folder.name,
        dir=None if folder is None else str(folder),
        config=config,
        id=known,
        resume="allow",
    )
    if identity is not None:
        write_text(identity, run.id)
    return run


@dataclass(frozen=True)
class WidthReading:
    """One width in one step."""

    width: float
    loss: float
    spread: float  # std * sqrt(d) of the normalised embeddings: 1 fills the sphere, 0 is one point
    effective_rank: float

    @property
    def collapsed(self) -> bool:
        """Whether the embeddings hardly tell one image from another any more."""
        return self.spread < COLLAPSED_SPREAD or self.effective_rank < COLLAPSED_RANK


class Monitor:
    """Context manager around a run; only the main process has one.

    Args:
        console: where the display and the messages go.
        directory: folder for TensorBoard files, or None.
        epochs, batches: length of the run, and of an epoch in steps.
        step: steps already done (a resumed run).
        device: whose memory is shown.
        wandb: a run of Weights & Biases that takes the same numbers as TensorBoard; it ends with the context.
    """

    def __init__(
        self,
        console: Console,
        directory: Path | None,
        epochs: int,
        batches: int,
        step: int,
        device: torch.device,
        wandb: Any = None,
    ) -> None:
        self.console = console
        self._device = device
        self._wandb = wandb
        self._directory = directory
        self._epochs, self._batches, self._start = epochs, batches, step
        self._writer: SummaryWriter | None = None
        self._collapsed: set[str] = set()
        self._readings: Sequence[WidthReading] = []
        self._images, self._speed = 0, ""
        self._skipped = 0
        self._since = time.monotonic()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            # A narrow terminal cuts the losses, not the bar.
            TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=epochs * batches, completed=step, epoch=f"{step // batches + 1}/{epochs}", status=""
        )

    def __enter__(self) -> Monitor:
        if self._directory is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # What a killed run recorded behind its last checkpoint is about to be recorded again.
            self._writer = SummaryWriter(str(self._directory), purge_step=self._start + 1)
        self._since = time.monotonic()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)
        if self._writer is not None:
            with self._recording():
                self._writer.close()

    def step(self, step: int, images: int) -> None:
        """`step` steps are done; the last one took `images` images (all processes together, views not counted)."""
        self._images += images
        epoch = f"{min((step - 1) // self._batches + 1, self._epochs)}/{self._epochs}"
        self._progress.update(self._task, completed=step, epoch=epoch)

    def read(self, step: int, readings: Sequence[WidthReading], lr: float) -> None:
        """Show and record the losses, and the state of the embeddings, of step `step` (1 is the first)."""
        self._readings = readings
        now = time.monotonic()
        rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        memory = peak_memory(self._device)
        self._speed = f"{rate:.0f} images/s  {memory:.2g} GB"
        status = f"{self._speed}  loss " + "  ".join(f"{r.width:.2f}: {r.loss:.3f}" for r in readings)
        self._progress.update(self._task, status=status)
        self.scalars(step, {"lr": lr, "images_per_second": rate, "memory_gb": memory})
        for reading in readings:
            # Random widths get one curve per eighth: a curve each would have one point.
            name = f"{round(8 * reading.width) / 8:g}"
            values = {"loss": reading.loss, "spread": reading.spread, "effective_rank": reading.effective_rank}
            self.scalars(step, {f"{key}/width_{name}": value for key, value in values.items()})
            # Before the first epoch is over, embeddings lie close together because nothing has been learnt yet.
            if reading.collapsed and step > self._batches and name not in self._collapsed:
                self._collapsed.add(name)
                say(
                    self.console,
                    f"the embeddings of width {reading.width:.3g} have collapsed (step {step}): their spread is "
                    f"{reading.spread:.2f} (1 fills the sphere), their effective rank {reading.effective_rank:.1f}. "
                    "Images look alike to this sub-network; see GUIDELINES in us3l.methods",
                    warning=True,
                )

    def skipped(self, step: int, updates: int) -> None:
        """Updates of step `step` were left out."""
        self._skipped += updates
        self.scalars(step, {"skipped_updates": self._skipped})
        what = f"the gradient is not finite; the weights stay as they are ({self._skipped} updates skipped so far)"
        say(self.console, f"step {step}: {what}", warning=True)

    def epoch_done(self, epoch: int) -> None:
        """One lasting line per epoch (`epoch` of them are done), the record where there is no terminal."""
        if self._readings:  # none: the run was resumed behind the epoch's last batch
            losses = "  ".join(f"{r.width:.2f}: {r.loss:.3f}" for r in self._readings)
            spread = min(r.spread for r in self._readings)
            about = f"loss {losses}  smallest spread {spread:.2f}  {self._speed}"
            say(self.console, f"epoch {epoch}/{self._epochs}  {about}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers for TensorBoard and Weights & Biases."""
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._writer is not None:
            with self._recording():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """A disk that is full of TensorBoard's files is no reason to stop; checkpoints have errors of their own."""
        try:
            yield
        except OSError as error:
            self._writer = None
            message = f"TensorBoard's files cannot be written ({error.strerror}): no more is recorded in this run"
            say(self.console, message, warning=True)
