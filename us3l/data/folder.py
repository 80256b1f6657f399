"""ImageNet-like folders, root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, read by worker processes.

The transforms are torchvision's, on PIL images, as in the published code of SimCLR's successors. Before each
of them the generator they draw from is seeded with the key of (seed, epoch, sample index, view), so that
results depend neither on the number of workers nor on the position in an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from us3l.data import augment
from us3l.data.augment import BRIGHTNESS, CONTRAST, GREY_PROBABILITY, HUE, JITTER_PROBABILITY, SATURATION
from us3l.data.base import Data, EpochOrder, Labelled, Part
from us3l.data.seeding import IndexArray, Stream, keys, permutation, uniforms
from us3l.errors import DataError

EVALUATION_BATCH = 256
ZOOM = 256 / 224
LINEAR_CROP = (0.08, 1.0)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Image.Image], Tensor]
Sample = tuple[str, int]  # path, label


class GaussianBlur:
    """Blur with a radius uniform in [0.1, 2.0] pixels (MoCo v2); PIL's, as its result ignores threads."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2.0).item()))


def _to_normalised_tensor() -> list[Callable[..., Tensor]]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def view_transform(size: int, crop_scale: Sequence[float]) -> Transform:
    """The augmentation of MoCo v2: crop, jitter p .8, grey p .2, blur p .5, flip, normalise."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=tuple(crop_scale)),
            v2.RandomApply([v2.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)], p=JITTER_PROBABILITY),
            v2.RandomGrayscale(GREY_PROBABILITY),
            v2.RandomApply([GaussianBlur()], p=0.5),
            v2.RandomHorizontalFlip(),
            *_to_normalised_tensor(),
        ]
    )


def crop_transform(size: int, crop_scale: Sequence[float]) -> Transform:
    """The part of `view_transform` that an image's size matters to: crop and flip, uint8. `finish_views` follows."""
    return v2.Compose(
        [v2.RandomResizedCrop(size, scale=tuple(crop_scale)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def finish_views(views: Tensor, seed: int, epoch: int, indices: IndexArray) -> Tensor:
    """Jitter, grey, blur and normalise two stacked views on their device, each image with numbers of its own.

    views: uint8 [2B, 3, H, W] of `crop_transform`; indices: of the B images -> float32 [2B, 3, H, W].
    """
    streams = (Stream.VIEW_1, Stream.VIEW_2)
    u = np.concatenate([uniforms(seed, epoch, indices, stream, len(augment.Draw)) for stream in streams])
    images = augment.blur(augment.jitter(views.float().div_(255), u), u)
    return v2.functional.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD), inplace=True)


def linear_transform(size: int, crop_scale: Sequence[float] = LINEAR_CROP) -> Transform:
    """Random resized crop and flip."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=tuple(crop_scale)),
            v2.RandomHorizontalFlip(),
            *_to_normalised_tensor(),
        ]
    )


def evaluation_transform(size: int) -> Transform:
    """Shorter side to size * 256 / 224, centre crop."""
    return v2.Compose([v2.Resize(round(size * ZOOM)), v2.CenterCrop(size), *_to_normalised_tensor()])


class Images(Dataset[tuple[list[Tensor], int]]):
    """Item i: one transformed view per stream of image i, each float32 [3, size, size], and its label."""

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        seed: int,
        epoch: int,
        streams: Sequence[Stream],
    ) -> None:
        self.samples, self.transform, self.streams = samples, transform, streams
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        path, label = self.samples[index]
        image = read_image(path)
        views = []
        for stream in self.streams:
            with seeded(int(keys(self.seed, self.epoch, np.array([index]), stream)[0])):
                views.append(self.transform(image))
        return views, label


@dataclass
class FolderTwoViews:
    """Two views of every image. A :class:`TwoViewLoader`."""

    samples: Sequence[Sample]
    order: EpochOrder
    transform: Transform
    workers: int
    device: torch.device
    augment_on: str = "workers"

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        views = Images(self.samples, self.transform, self.order.seed, epoch, (Stream.VIEW_1, Stream.VIEW_2))
        batches = self.order.batches(epoch, start_batch)
        for (images, _), indices in zip(_load(views, batches, self.workers, self.device), batches, strict=True):
            finished = self.augment_on == "workers"
            yield images if finished else finish_views(images, self.order.seed, epoch, indices)


@dataclass
class FolderLabelled:
    """One view of every image, random resized crop and flip, and its label. A :class:`LabelledLoader`."""

    samples: Sequence[Sample]
    order: EpochOrder
    transform: Transform
    workers: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Labelled]:
        views = Images(self.samples, self.transform, self.order.seed, epoch, (Stream.VIEW_1,))
        return _load(views, self.order.batches(epoch, start_batch), self.workers, self.device)


class FolderLinear:
    """Augmented and labelled batches of the linear protocol. A :class:`LinearLoader`."""

    def __init__(
        self, samples: Sequence[Sample], transform: Transform, seed: int, workers: int, device: torch.device
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self.workers, self.device = workers, device

    def __call__(self, epoch: int, batch_size: int = 512) -> Iterator[Labelled]:
        views = Images(self.samples, self.transform, self.seed, epoch, (Stream.LINEAR_VIEW,))
        order = permutation(self.seed, epoch, len(self.samples), Stream.LINEAR_ORDER)
        return _load(views, _chunks(order, batch_size), self.workers, self.device)


class FolderEvaluation:
    """A split in its own order, without randomness. An :class:`EvaluationLoader`."""

    def __init__(
        self, samples: Sequence[Sample], transform: Transform, workers: int, device: torch.device
    ) -> None:
        self.images = Images(samples, transform, seed=0, epoch=0, streams=(Stream.VIEW_1,))
        self.batches = _chunks(np.arange(len(samples)), EVALUATION_BATCH)
        self.workers, self.device = workers, device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Labelled]:
        return _load(self.images, self.batches, self.workers, self.device)


def read_image(path: str) -> Image.Image:
    """Decode an image file as RGB; DataError with its path if it is broken."""
    try:
        with open(path, "rb") as file:
            return decode_image(file, path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): put it back, or restart without it") from error


def decode_image(file: BinaryIO, name: str) -> Image.Image:
    """Decode an image as RGB; DataError with its name if it is broken."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL's ways to say broken, SyntaxError for PNG
        raise DataError(f"{name} cannot be decoded ({error}): replace or remove the file") from error


def find_images(root: str | None) -> tuple[list[Sample], list[Sample], int]:
    """The samples of root/train and root/val, and the number of classes."""
    if root is None:
        raise DataError(
            "data.name=image_folder needs data.root, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg; "
            "nothing is downloaded"
        )
    train, val = (_image_folder(Path(root) / split) for split in ("train", "val"))
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise DataError(
            f"{root}: train/ and val/ must have the same class folders, got {len(train.classes)} and "
            f"{len(val.classes)}; only in train/: {only_train[:5]}, only in val/: {only_val[:5]}"
        )
    return train.samples, val.samples, len(train.classes)


def subset(samples: list[Sample], n: int | None, key: str) -> list[Sample]:
    """n samples spread evenly over all; all for None. (They are sorted by class: the first n are of few.)"""
    if n is None:
        return samples
    if n > len(samples):
        raise DataError(f"{key}={n}, but the data set has {len(samples)} images there")
    return [samples[i * len(samples) // n] for i in range(n)]


def folder_data(
    train: list[Sample],
    test: list[Sample],
    num_classes: int,
    order: EpochOrder,
    size: int,
    crop_scale: Sequence[float],
    workers: int,
    device: torch.device,
    augment_on: str = "workers",
) -> Data:
    """The loaders of the given samples."""
    evaluation = evaluation_transform(size)
    views = (view_transform if augment_on == "workers" else crop_transform)(size, crop_scale)

    def part(indices: IndexArray, crop_scale: Sequence[float]) -> Part:
        chosen = [train[index] for index in indices]
        return Part(
            FolderLinear(chosen, linear_transform(size, crop_scale), order.seed, workers, device),
            FolderEvaluation(chosen, evaluation, workers, device),
        )

    return Data(
        train=FolderTwoViews(train, order, views, workers, device, augment_on),
        labelled=FolderLabelled(train, order, linear_transform(size, crop_scale), workers, device),
        train_eval=FolderEvaluation(train, evaluation, workers, device),
        test=FolderEvaluation(test, evaluation, workers, device),
        linear_train=FolderLinear(train, linear_transform(size), order.seed, workers, device),
        num_classes=num_classes,
        in_channels=3,
        size=size,
        train_labels=torch.tensor([label for _, label in train]),
        train_names=[path for path, _ in train],
        part=part,
    )


def _image_folder(path: Path) -> ImageFolder:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder: data.root must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:  # no class folder, or one without an image; torchvision names it
        raise DataError(
            f"{path}: {error} Expected {path}/CLASS/*.jpg, an image at least in each class."
        ) from error


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed torch's CPU generator, the one torchvision's transforms draw from, and put it back afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(key)
    try:
        yield
    finally:
        generator.set_state(state)


def _chunks(order: IndexArray, batch_size: int) -> list[IndexArray]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _view_major(items: list[tuple[list[Tensor], int]]) -> Labelled:
    views, labels = zip(*items, strict=True)
    return torch.cat([torch.stack(view) for view in zip(*views, strict=True)]), torch.tensor(labels)


def _load(
    images: Images, batches: list[IndexArray], workers: int, device: torch.device
) -> Iterator[Labelled]:
    """Yield view-major images [V * B, 3, size, size] and labels [B] of each batch of indices."""
    loader = DataLoader(
        images,
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=_view_major,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # it draws a seed for its workers: not from the run's
    )
    with errors_of_workers():
        for views, labels in loader:
            yield views.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """A DataError of a worker comes with its traceback in the message: keep the message."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
