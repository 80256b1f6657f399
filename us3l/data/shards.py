"""WebDataset shards, root/train/*.tar and root/val/*.tar: large data sets that are read from one end to the other.

A sample is an image file and its label, KEY.jpg (or .jpeg, .png, .webp) and KEY.cls, a decimal number. Each folder has
an index.json with the size and the labels of every shard, written by `us3l shards`: an epoch's length must be
known, and a shard that is missing or cut off is to be noticed before a week of training.

An epoch shuffles the shards, gives them to processes and their workers in turn, and shuffles samples in a buffer. It is
a function of (seed, epoch, processes, workers); the augmentation of a sample is one of (seed, epoch, its key, view)
alone. The library webdataset reads and writes the files.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from us3l.data.base import Data, EpochOrder, Labelled, Part
from us3l.data.folder import (
    EVALUATION_BATCH,
    Transform,
    crop_transform,
    decode_image,
    errors_of_workers,
    evaluation_transform,
    find_images,
    finish_views,
    linear_transform,
    seeded,
    view_transform,
)
from us3l.data.seeding import IndexArray, Stream, keys, permutation
from us3l.errors import DataError
from us3l.files import write_text

if TYPE_CHECKING:
    from us3l.config import DataConfig

INDEX = "index.json"
BUFFER = 2000  # samples of the shuffle, still encoded
SUFFIXES = ("jpg", "jpeg", "png", "webp")

Sample = dict[str, Any]  # of webdataset: "__key__", "__url__" and bytes by suffix


def webdataset() -> Any:
    """The library; DataError if it is not installed."""
    try:
        import webdataset
    except ImportError as error:
        raise DataError(f"shards need the package webdataset ({error}): pip install us3l[shards]") from error
    return webdataset


# Files


def write_shards(
    source: Path, root: Path, images: int, progress: Callable[[str], None] = lambda text: None
) -> None:
    """Copy an image folder, source/train/CLASS/* and source/val/CLASS/*, into shards of `images` samples.

    The order is random, as neighbours in a shard will often meet in a batch. Files are copied as they are.
    """
    train, val, _ = find_images(str(source))
    for split, samples in (("train", train), ("val", val)):
        folder = root / split
        if any(folder.glob("*.tar")):
            raise DataError(f"{folder} holds shards already: choose another folder, or remove them")
        folder.mkdir(parents=True, exist_ok=True)
        with webdataset().ShardWriter(f"{folder}/%06d.tar", maxcount=images, maxsize=2**40, verbose=0) as writer:
            for count, i in enumerate(permutation(0, 0, len(samples), Stream.SHARD_ORDER)):
                path, label = Path(samples[i][0]), samples[i][1]
                suffix = path.suffix[1:].lower()
                if suffix not in SUFFIXES:
                    raise DataError(f"{path}: expected an image named *.{', *.'.join(SUFFIXES)}")
                writer.write({"__key__": f"{i:09d}", suffix: path.read_bytes(), "cls": str(label).encode()})
                progress(f"{split}: {count + 1} of {len(samples)} images")


def index_shards(folder: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Read all shards of a folder, and write its index.json. Every image must have a label; images are not decoded."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"there are no shards in {folder}: expected {folder}/*.tar")
    shards = []
    for path in paths:
        progress(str(path))
        labels = [_image_and_label(sample)[1] for sample in read_samples([path])]
        shards.append({"file": path.name, "bytes": path.stat().st_size, "labels": labels})
    index = {"shards": shards}
    write_text(folder / INDEX, json.dumps(index) + "\n")
    return index


def read_index(folder: Path) -> tuple[list[Path], list[list[int]]]:
    """Paths of the shards, and the labels of the images in each; DataError if a shard is not as it was indexed."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = [(folder / Path(s["file"]).name, int(s["bytes"]), list(s["labels"])) for s in index["shards"]]
    except FileNotFoundError:
        raise DataError(f"{folder / INDEX} does not exist: `us3l shards {folder.parent}` writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        message = f"{folder / INDEX} is not an index of shards ({error!r}): write it with `us3l shards {folder.parent}`"
        raise DataError(message) from None
    for path, size, _ in shards:
        if not path.is_file():
            raise DataError(f"the shard {path} is missing: put it back, or index the others with `us3l shards`")
        if path.stat().st_size != size:
            raise DataError(
                f"the shard {path} is damaged: {path.stat().st_size} bytes, and {size} when it was indexed. Get it "
                "again, or index it with `us3l shards` if it was changed on purpose"
            )
    return [path for path, _, _ in shards], [labels for _, _, labels in shards]


def read_samples(paths: Sequence[Path], buffer: int = 0, seed: int = 0) -> Iterator[Sample]:
    """The samples of shards, one behind the other, shuffled in a buffer; DataError for what cannot be read."""
    wds = webdataset()
    stages = [wds.SimpleShardList([str(path) for path in paths]), wds.tarfile_to_samples()]
    if buffer:
        stages.append(wds.shuffle(buffer, initial=buffer, rng=random.Random(seed)))
    try:
        yield from wds.DataPipeline(*stages)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        # webdataset adds the shard to the arguments of whatever went wrong.
        raise DataError(f"the shard {error.args[-1]} cannot be read ({error.args[0]}): get it again") from error


def _image_and_label(sample: Sample) -> tuple[bytes, int]:
    suffix = next((suffix for suffix in SUFFIXES if suffix in sample), None)
    name = f"{sample['__key__']} in the shard {sample['__url__']}"
    if suffix is None:
        raise DataError(f"{name} has no image: expected {sample['__key__']}.{' or .'.join(SUFFIXES)}")
    try:
        return sample[suffix], int(sample["cls"])
    except (KeyError, ValueError):
        raise DataError(f"{name} has no label: expected a number in {sample['__key__']}.cls") from None


# Loaders


class ShardBatches(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """View-major images [V * B, ...], labels [B] and the samples' numbers for their randomness [B].

    Of `batches` batches, from `start` on, or (None) of every sample once. Worker w of n makes batches w, w + n, ...,
    from shards of its own; where these hold too little for it, it reads them again.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        transform: Transform,
        streams: Sequence[Stream],
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        buffer: int = 0,
        batches: int | None = None,
        start: int = 0,
    ) -> None:
        self.paths, self.transform, self.streams, self.batch_size = paths, transform, streams, batch_size
        self.seed, self.epoch, self.buffer = seed, epoch, buffer
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        # The loader asks worker 0 first: it must be the one that makes batch `start`.
        worker = (self.start + (0 if info is None else info.id)) % workers
        samples = self._samples(self.paths[worker::workers], worker)
        for batch in itertools.count(worker, workers):
            if self.batches is not None and batch >= self.batches:
                return
            chosen = list(itertools.islice(samples, self.batch_size))
            if not chosen:
                return
            if batch >= self.start:  # those before are read, not decoded
                yield self._batch(chosen)

    def _samples(self, paths: Sequence[Path], worker: int) -> Iterator[Sample]:
        for turn in itertools.count() if self.batches is not None else range(1):
            number = np.array([turn * 4096 + worker])
            yield from read_samples(paths, self.buffer, int(keys(self.seed, self.epoch, number, Stream.SHARD_ORDER)[0]))

    def _batch(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        views: list[list[Tensor]] = [[] for _ in self.streams]
        labels, numbers = [], []
        for sample in samples:
            data, label = _image_and_label(sample)
            name = f"{sample['__key__']} in the shard {sample['__url__']}"
            image = decode_image(io.BytesIO(data), name)
            number = _number(sample["__key__"])
            for view, stream in zip(views, self.streams, strict=True):
                with seeded(int(keys(self.seed, self.epoch, np.array([number]), stream)[0])):
                    view.append(self.transform(image))
            labels.append(label)
            numbers.append(number)
        images = torch.cat([torch.stack(view) for view in views])
        return images, torch.tensor(labels), torch.tensor(numbers)


def _number(key: str) -> int:
    """A sample's index among all possible keys, [0, 2^63)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


class Shards:
    """The shards of one split, and how this process reads them."""

    def __init__(self, folder: Path, workers: int, device: torch.device) -> None:
        self.paths, labels = read_index(folder)
        self.images = [len(of_shard) for of_shard in labels]
        self.labels = torch.tensor(list(itertools.chain.from_iterable(labels)))
        self.workers, self.device = workers, device

    def load(self, dataset: ShardBatches) -> Iterator[tuple[Tensor, Tensor, IndexArray]]:
        """Run a dataset over this process's workers, at most one for each shard."""
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=min(self.workers, len(dataset.paths)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws a seed for its workers: not from the run's
        )
        with errors_of_workers():
            for views, labels, numbers in loader:
                yield (
                    views.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                    numbers.numpy(),
                )


class ShardTraining:
    """This process's share of the training batches; what TwoViewLoader and LabelledLoader have in common."""

    def __init__(self, shards: Shards, order: EpochOrder, transform: Transform, streams: Sequence[Stream]) -> None:
        self.shards, self.order, self.transform, self.streams = shards, order, transform, streams

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, IndexArray]]:
        order = self.order
        shuffled = permutation(order.seed, epoch, len(self.shards.paths), Stream.SHARD_ORDER)
        mine = [self.shards.paths[i] for i in shuffled[order.rank :: order.world_size]]
        return self.shards.load(
            ShardBatches(
                mine, self.transform, self.streams, order.batch_size,
                seed=order.seed, epoch=epoch, buffer=BUFFER, batches=len(order), start=start,
            )
        )  # fmt: skip


class ShardTwoViews(ShardTraining):
    """Two views of every image. A :class:`TwoViewLoader`."""

    def __init__(self, shards: Shards, order: EpochOrder, size: int, crop_scale: Sequence[float], on: str) -> None:
        transform = (view_transform if on == "workers" else crop_transform)(size, crop_scale)
        super().__init__(shards, order, transform, (Stream.VIEW_1, Stream.VIEW_2))
        self.augment_on = on

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        for images, _, numbers in self.batches(epoch, start_batch):
            finished = self.augment_on == "workers"
            yield images if finished else finish_views(images, self.order.seed, epoch, numbers)


class ShardLabelled(ShardTraining):
    """One view of every image, random resized crop and flip, and its label. A :class:`LabelledLoader`."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Labelled]:
        return ((images, labels) for images, labels, _ in self.batches(epoch, start_batch))


class ShardLinear:
    """Augmented and labelled batches of the linear protocol, every image once. A :class:`LinearLoader`."""

    def __init__(self, shards: Shards, transform: Transform, seed: int) -> None:
        self.shards, self.transform, self.seed = shards, transform, seed

    def __call__(self, epoch: int, batch_size: int = 512) -> Iterator[Labelled]:
        order = permutation(self.seed, epoch, len(self.shards.paths), Stream.LINEAR_ORDER)
        dataset = ShardBatches(
            [self.shards.paths[i] for i in order], self.transform, (Stream.LINEAR_VIEW,), batch_size,
            seed=self.seed, epoch=epoch, buffer=BUFFER,
        )  # fmt: skip
        return ((images, labels) for images, labels, _ in self.shards.load(dataset))


class ShardEvaluation:
    """A split in a fixed order, without randomness. An :class:`EvaluationLoader`."""

    def __init__(self, shards: Shards, size: int) -> None:
        self.shards, self.transform = shards, evaluation_transform(size)

    def __len__(self) -> int:
        workers = max(1, min(self.shards.workers, len(self.shards.paths)))
        return sum(-(-sum(self.shards.images[worker::workers]) // EVALUATION_BATCH) for worker in range(workers))

    def __iter__(self) -> Iterator[Labelled]:
        dataset = ShardBatches(self.shards.paths, self.transform, (Stream.VIEW_1,), EVALUATION_BATCH)
        return ((images, labels) for images, labels, _ in self.shards.load(dataset))


def shard_data(cfg: DataConfig, size: int, seed: int, rank: int, world_size: int, device: torch.device) -> Data:
    """The loaders of data.name=shards."""
    if cfg.root is None:
        raise DataError("data.name=shards needs data.root, a folder with train/*.tar and val/*.tar (see `us3l shards`)")
    if cfg.train_samples is not None or cfg.test_samples is not None:
        raise DataError("data.train_samples and data.test_samples are not for shards, which are read whole: give null")
    train, val = (Shards(Path(cfg.root) / split, cfg.workers, device) for split in ("train", "val"))
    readers = world_size * max(1, cfg.workers)
    if len(train.paths) < readers:
        raise DataError(
            f"{cfg.root}/train has {len(train.paths)} shards: expected at least one for each of {world_size} processes "
            f"x {max(1, cfg.workers)} data.workers. Use fewer workers, or smaller shards"
        )

    def part(indices: IndexArray, crop_scale: Sequence[float]) -> Part:
        raise DataError("a part of the images is for data.name=image_folder: shards are read from one end to the other")

    order = EpochOrder(sum(train.images), cfg.batch_size, seed, rank, world_size)
    return Data(
        train=ShardTwoViews(train, order, size, cfg.crop_scale, cfg.augment_on),
        labelled=ShardLabelled(train, order, linear_transform(size, cfg.crop_scale), (Stream.VIEW_1,)),
        train_eval=ShardEvaluation(train, size),
        test=ShardEvaluation(val, size),
        linear_train=ShardLinear(train, linear_transform(size), seed),
        num_classes=int(max(train.labels.max(), val.labels.max())) + 1,
        in_channels=3,
        size=size,
        train_labels=train.labels,
        train_names=None,
        part=part,
    )
