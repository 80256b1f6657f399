"""Loaders of data sets held in memory: a batch is one gather, one resampling and a few colour operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from us3l.data import augment
from us3l.data.arrays import ImageArrays, Split
from us3l.data.base import Data, EpochOrder, Labelled, Part
from us3l.data.seeding import FloatArray, IndexArray, Stream, permutation, uniforms

EVALUATION_BATCH = 500
LINEAR_CROP = (0.8, 1.0)


class Normalise:
    """(images - mean) / std per channel; the identity where the data set has no constants."""

    def __init__(self, arrays: ImageArrays, device: torch.device) -> None:
        self.mean, self.std = (
            None if values is None else torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (arrays.mean, arrays.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        return images if self.mean is None or self.std is None else (images - self.mean) / self.std


class TensorTwoViews:
    """Two views of every image: random resized crop and flip, colour jitter. A :class:`TwoViewLoader`."""

    def __init__(
        self, images: Tensor, order: EpochOrder, normalise: Normalise, size: int, crop_scale: Sequence[float]
    ) -> None:
        self.images, self.order, self.normalise, self.size = images, order, normalise, size
        self.crop_scale = crop_scale

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        for indices in self.order.batches(epoch, start_batch):
            yield torch.cat([self._view(epoch, indices, stream) for stream in (Stream.VIEW_1, Stream.VIEW_2)])

    def _view(self, epoch: int, indices: IndexArray, stream: Stream) -> Tensor:
        u = uniforms(self.order.seed, epoch, indices, stream, len(augment.Draw))
        images = _resized_crop(self.images, indices, u, self.crop_scale, self.size)
        return self.normalise(augment.jitter(images, u))


class TensorLabelled:
    """One view of every image, random resized crop and flip, and its label. A :class:`LabelledLoader`."""

    def __init__(
        self, split: Split, order: EpochOrder, normalise: Normalise, size: int, crop_scale: Sequence[float]
    ) -> None:
        self.split, self.order, self.normalise, self.size = split, order, normalise, size
        self.crop_scale = crop_scale

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Labelled]:
        for indices in self.order.batches(epoch, start_batch):
            u = uniforms(self.order.seed, epoch, indices, Stream.VIEW_1, len(augment.Draw))
            images = _resized_crop(self.split.images, indices, u, self.crop_scale, self.size)
            yield self.normalise(images), self.split.labels[torch.from_numpy(indices)]


class TensorLinear:
    """Augmented and labelled batches of the linear protocol. A :class:`LinearLoader`."""

    def __init__(
        self, split: Split, normalise: Normalise, size: int, seed: int, crop_scale: Sequence[float] = LINEAR_CROP
    ) -> None:
        self.split, self.normalise, self.size, self.seed = split, normalise, size, seed
        self.crop_scale = crop_scale

    def __call__(self, epoch: int, batch_size: int = 512) -> Iterator[Labelled]:
        order = permutation(self.seed, epoch, len(self.split.labels), Stream.LINEAR_ORDER)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            u = uniforms(self.seed, epoch, indices, Stream.LINEAR_VIEW, len(augment.Draw))
            images = _resized_crop(self.split.images, indices, u, self.crop_scale, self.size)
            yield self.normalise(images), self.split.labels[torch.from_numpy(indices)]


class TensorEvaluation:
    """A split in its own order, resized by `zoom` and cut at the centre. An :class:`EvaluationLoader`."""

    def __init__(self, split: Split, normalise: Normalise, size: int, zoom: float) -> None:
        self.split, self.normalise, self.size, self.zoom = split, normalise, size, zoom

    def __len__(self) -> int:
        return -(-len(self.split.labels) // EVALUATION_BATCH)

    def __iter__(self) -> Iterator[Labelled]:
        resized = round(self.zoom * self.size)
        margin = (resized - self.size) // 2
        inside = slice(margin, margin + self.size)
        batches = zip(
            self.split.images.split(EVALUATION_BATCH), self.split.labels.split(EVALUATION_BATCH), strict=True
        )
        for images, labels in batches:
            images = _to_float(images)
            if images.shape[-1] != resized:
                images = F.interpolate(images, (resized, resized), mode="bilinear", align_corners=False)
            yield self.normalise(images[..., inside, inside]), labels


def tensor_data(
    arrays: ImageArrays, order: EpochOrder, size: int, crop_scale: Sequence[float], device: torch.device
) -> Data:
    """The loaders of `arrays`, kept (as they are, usually uint8) and augmented on `device`."""
    train, test = (Split(s.images.to(device), s.labels.to(device)) for s in (arrays.train, arrays.test))
    normalise = Normalise(arrays, device)

    def part(indices: IndexArray, crop_scale: Sequence[float]) -> Part:
        chosen = train.at(indices)
        return Part(
            TensorLinear(chosen, normalise, size, order.seed, crop_scale),
            TensorEvaluation(chosen, normalise, size, arrays.zoom),
        )

    return Data(
        train=TensorTwoViews(train.images, order, normalise, size, crop_scale),
        labelled=TensorLabelled(train, order, normalise, size, crop_scale),
        train_eval=TensorEvaluation(train, normalise, size, arrays.zoom),
        test=TensorEvaluation(test, normalise, size, arrays.zoom),
        linear_train=TensorLinear(train, normalise, size, order.seed),
        num_classes=arrays.num_classes,
        in_channels=train.images.shape[1],
        size=size,
        train_labels=arrays.train.labels,
        train_names=None,
        part=part,
    )


def _resized_crop(
    images: Tensor, indices: IndexArray, u: FloatArray, scale: Sequence[float], size: int
) -> Tensor:
    chosen = _to_float(images[torch.from_numpy(indices).to(images.device)])
    return augment.crop(chosen, augment.crop_boxes(u, scale), size)


def _to_float(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images
