"""Data sets and views: `make_data` turns a :class:`~us3l.config.DataConfig` into loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from us3l.config import SIZES
from us3l.data import arrays
from us3l.data.base import Data, EpochOrder, EvaluationLoader, Labelled, LinearLoader, TwoViewLoader
from us3l.data.folder import IMAGENET_MEAN, IMAGENET_STD, find_images, folder_data, subset
from us3l.data.recognition import RECOGNITION, download, recognition_images
from us3l.data.shards import shard_data
from us3l.data.tensors import tensor_data
from us3l.errors import DataError

if TYPE_CHECKING:
    from us3l.config import DataConfig

__all__ = [
    "Data", "EvaluationLoader", "Labelled", "LinearLoader", "TwoViewLoader", "image_size", "make_data", "normalisation"
]  # fmt: skip

_RANDOM_TRAIN, _RANDOM_TEST = 512, 256


def make_data(
    cfg: DataConfig, seed: int, *, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
) -> Data:
    """Open a data set.

    Args:
        cfg: which one, where, and how much of it; `batch_size` is in images per process.
        seed: of the order of the training images and of their augmentation, which depend on nothing else than
            it, the epoch and the sample's index.
        rank, world_size: this process's share of each training batch. Evaluation loaders give every process
            all.
        device: where batches are delivered. Data sets in memory are kept and augmented there.

    Raises:
        DataError: missing, damaged or too little data, or a size that the data set does not have.
    """
    device = torch.device(device)
    if cfg.download:
        if world_size > 1:
            raise DataError("data.download: several processes would write the same files; download with one before")
        download(cfg.name, cfg.root)
    if cfg.name == "image_folder" or cfg.name in RECOGNITION:
        train, test, num_classes = (
            find_images(cfg.root) if cfg.name == "image_folder" else recognition_images(cfg.name, cfg.root)
        )
        train = subset(train, cfg.train_samples, "data.train_samples")
        test = subset(test, cfg.test_samples, "data.test_samples")
        order = EpochOrder(len(train), cfg.batch_size, seed, rank, world_size)
        size = image_size(cfg)
        return folder_data(
            train, test, num_classes, order, size, cfg.crop_scale, cfg.workers, device, cfg.augment_on
        )
    if cfg.name == "shards":
        return shard_data(cfg, image_size(cfg), seed, rank, world_size, device)
    size = image_size(cfg)
    data = _read(cfg, size)
    data = replace(
        data,
        train=data.train.first(cfg.train_samples, "data.train_samples"),
        test=data.test.first(cfg.test_samples, "data.test_samples"),
    )
    order = EpochOrder(len(data.train.labels), cfg.batch_size, seed, rank, world_size)
    return tensor_data(data, order, size, cfg.crop_scale, device)


def image_size(cfg: DataConfig) -> int:
    """Side of the images the networks see; larger than the files' is resized, smaller is refused."""
    native = SIZES.get(cfg.name)
    if native is None:
        raise DataError(f"unknown data.name={cfg.name}: expected one of {', '.join(SIZES)}")
    if cfg.name in ("random", "image_folder", "shards", *RECOGNITION):
        return cfg.size or native
    size = cfg.size or native
    if cfg.name == "fashion_mini" and size not in (14, 28):
        raise DataError(f"data.size={size}: fashion_mini has 14 (the default) and 28")
    if size < native:
        raise DataError(
            f"data.size={size}: the images of {cfg.name} are {native}x{native}; give {native} or more"
        )
    return size


def normalisation(name: str, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation, per channel, that pixels in [0, 1] of the data set `name` are normalised by."""
    if name in ("image_folder", "shards") or name in RECOGNITION:
        return IMAGENET_MEAN, IMAGENET_STD
    in_memory = {
        "cifar10": (arrays.CIFAR10_MEAN, arrays.CIFAR10_STD),
        "cifar100": (arrays.CIFAR100_MEAN, arrays.CIFAR100_STD),
    }
    return in_memory.get(name, ([0.0] * channels, [1.0] * channels))


def _read(cfg: DataConfig, size: int) -> arrays.ImageArrays:
    if cfg.name == "fashion_mini":
        return arrays.fashion_mini(size)
    if cfg.name == "random":
        return arrays.random_images(
            size, cfg.train_samples or _RANDOM_TRAIN, cfg.test_samples or _RANDOM_TEST
        )
    readers = {"fashion_mnist": arrays.fashion_mnist, "cifar10": arrays.cifar10, "cifar100": arrays.cifar100}
    return readers[cfg.name](cfg.root)
