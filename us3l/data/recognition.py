"""The recognition data sets of transfer experiments, through torchvision: where they are, their splits, downloading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import datasets

from us3l.config import CLASSES
from us3l.data.arrays import require_root
from us3l.data.folder import Sample
from us3l.errors import DataError


class Recognition(NamedTuple):
    """A data set of image files.

    dataset: torchvision's class.  train: its splits that are trained on (the field trains on train and validation).
    files: what it expects in the root, for people.
    """

    dataset: Callable[..., Any]
    train: tuple[str, ...]
    files: str


RECOGNITION = {
    "flowers102": Recognition(
        datasets.Flowers102,
        ("train", "val"),
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat (www.robots.ox.ac.uk/~vgg/data/flowers/102)",
    ),
    "oxford_pets": Recognition(
        datasets.OxfordIIITPet,
        ("trainval",),
        "oxford-iiit-pet/ with images/ and annotations/ (www.robots.ox.ac.uk/~vgg/data/pets)",
    ),
    "dtd": Recognition(
        datasets.DTD, ("train", "val"), "dtd/dtd/ with images/ and labels/ (www.robots.ox.ac.uk/~vgg/data/dtd)"
    ),
    "fgvc_aircraft": Recognition(
        datasets.FGVCAircraft,
        ("trainval",),
        "fgvc-aircraft-2013b/data/ (www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft)",
    ),
    "food101": Recognition(
        datasets.Food101,
        ("train",),
        "food-101/ with images/ and meta/ (data.vision.ee.ethz.ch/cvl/datasets_extra/food-101)",
    ),
}
_IN_MEMORY: dict[str, Callable[..., Any]] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "fashion_mnist": datasets.FashionMNIST,
}


def recognition_images(name: str, root: str | None) -> tuple[list[Sample], list[Sample], int]:
    """Training samples, test samples and the number of classes of the data set `name`.

    Raises:
        DataError: it is not in `root`, or its lists are damaged.
    """
    source = RECOGNITION[name]
    folder = require_root(root, name, f"which holds {source.files}")
    train = [sample for split in source.train for sample in _samples(name, folder, split)]
    return train, _samples(name, folder, "test"), CLASSES[name]


def _samples(name: str, root: Path, split: str) -> list[Sample]:
    source = RECOGNITION[name]
    try:
        dataset = source.dataset(str(root), split=split)
    except Exception as error:  # torchvision reads text, JSON and MATLAB files, which fail in as many ways
        raise DataError(
            f"{name} cannot be read from {root} ({type(error).__name__}: {error}): put {source.files} there, or let "
            "data.download=true fetch it"
        ) from error
    # By torchvision's public interface labels come with decoded images only: half an hour for Food-101.
    files = dataset._images if isinstance(dataset, datasets.OxfordIIITPet) else dataset._image_files
    return [(str(path), int(label)) for path, label in zip(files, dataset._labels, strict=True)]


def download(name: str, root: str | None) -> None:
    """Let torchvision fetch what is missing of a data set in `root`.

    Raises:
        DataError: torchvision does not have it, or it cannot be fetched.
    """
    known = _IN_MEMORY | {key: source.dataset for key, source in RECOGNITION.items()}
    if name not in known:
        raise DataError(f"data.download: only {', '.join(known)} can be downloaded, not {name}")
    folder = require_root(root, name, "to download it to")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        known[name](str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} could not be downloaded to {folder}: {error}") from error
