"""What a data set offers to the engine and to the evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from us3l.data.seeding import IndexArray, Stream, permutation

Labelled = tuple[Tensor, Tensor]  # images float32 [n, C, H, W], labels int64 [n]


class TwoViewLoader(Protocol):
    """Training batches: two random views of every image, without labels."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        """Yield float32 [2B, C, H, W], view-major: image i of the batch is in rows i and B + i.

        `start_batch` continues an interrupted epoch: the batches from there on are those of the whole epoch.
        """


class LabelledLoader(Protocol):
    """Training batches of a supervised network: one random view (crop, flip) and labels; else as `TwoViewLoader`."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Labelled]: ...


class EvaluationLoader(Protocol):
    """All images of a split once, in a fixed order, without random augmentation."""

    def __len__(self) -> int:
        """Number of batches."""

    def __iter__(self) -> Iterator[Labelled]: ...


class LinearLoader(Protocol):
    """Training batches of the linear protocol: one view (random resized crop, flip) and labels."""

    def __call__(self, epoch: int, batch_size: int = 512) -> Iterator[Labelled]: ...


@dataclass(frozen=True)
class Part:
    """Some of the training images, with labels.

    augmented: `augmented(epoch, batch_size)` yields each once, in random order, cropped and flipped.
    plain: the same images without augmentation.
    """

    augmented: LinearLoader
    plain: EvaluationLoader


class Parts(Protocol):
    """Makes the :class:`Part` of given training images."""

    def __call__(self, indices: IndexArray, crop_scale: Sequence[float]) -> Part:
        """`indices` [n] of training images, and the range of the areas of the random crops (fractions)."""


@dataclass(frozen=True)
class Data:
    """A data set, ready for pre-training and evaluation.

    Attributes:
        train: two augmented views of the training images, this process's share.
        labelled: one view of the same images in the same batches, with labels.
        train_eval: the training images without augmentation, all of them in every process.
        test: the test images, likewise.
        linear_train: `linear_train(epoch, batch_size)` yields every training image once, in random order,
            through the augmentation of the linear protocol; all of them in every process, the last batch may
            be smaller.
        num_classes, in_channels: of the labels, of the images.
        train_labels: of the training images, int64 [n], in their order; on the CPU.
        train_names: their file names, where they are files.
        part: `part(indices, crop_scale)` are some of the training images, to fine-tune on.
        size: side of the square images, pixels.
    """

    train: TwoViewLoader
    labelled: LabelledLoader
    train_eval: EvaluationLoader
    test: EvaluationLoader
    linear_train: LinearLoader
    num_classes: int
    in_channels: int
    size: int
    train_labels: Tensor
    train_names: Sequence[str] | None
    part: Parts


class EpochOrder:
    """The order of the training images: one permutation per epoch, cut into batches, sharded over processes.

    Batch i of the W processes, put one behind the other in rank order, is batch i of a single process with
    batch size W * B. What does not fill the last batch is dropped: with fewer images than a batch there is none.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.samples // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start_batch: int = 0) -> list[IndexArray]:
        """The sample indices of this process's batches, int64 [B] each, from `start_batch` to the end."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(
                f"start_batch must be in [0, {len(self)}], the batches of an epoch, got {start_batch}"
            )
        order = permutation(self.seed, epoch, self.samples, Stream.TRAIN_ORDER)
        order = order[: len(self) * self.batch_size * self.world_size]
        return list(order.reshape(len(self), self.world_size, self.batch_size)[start_batch:, self.rank])
