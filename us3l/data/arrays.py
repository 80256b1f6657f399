"""Data sets that fit into memory: where their files are looked for, how they are read, what is wrong with
them.

Nothing is downloaded. Every reader raises :class:`DataError` with the path and what to do.
"""

from __future__ import annotations

import codecs
import gzip
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from us3l.errors import DataError

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """images [n, C, H, W], uint8 or float32 in [0, 1]; labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def first(self, n: int | None, key: str) -> Split:
        """The first n images; all for None. `key` is the configuration key to name in an error."""
        if n is not None and n > len(self.labels):
            raise DataError(f"{key}={n}, but the data set has {len(self.labels)} images there")
        return Split(self.images[:n], self.labels[:n])

    def at(self, indices: npt.NDArray[np.int64]) -> Split:
        """The images of these indices, copied."""
        chosen = torch.from_numpy(indices).to(self.labels.device)
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageArrays:
    """A data set in memory.

    Attributes:
        zoom: evaluation images are resized to `zoom` times the training size, and the centre is cut out.
        mean, std: per-channel constants of the normalisation; None: images stay in [0, 1].
    """

    train: Split
    test: Split
    num_classes: int
    zoom: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


# ---------------------------------------------------------------- Fashion-MNIST

FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: Path) -> UInt8Array:
    """Read an idx file of bytes (MNIST's format), plain or .gz: dimensions in the header, then the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): the file is damaged, get it again") from error
    dimensions = data[3] if len(data) > 3 else 0
    header = 4 + 4 * dimensions
    if data[:3] != b"\0\0\x08" or len(data) < header:
        raise DataError(f"{path} is not an idx file of unsigned bytes: get it again")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + int(np.prod(shape))
    if len(data) != expected:
        raise DataError(
            f"{path} is damaged: {len(data)} bytes where its header promises {expected}; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_fashion_folder(root: Path) -> list[UInt8Array]:
    """The arrays of FASHION_FILES, plain or .gz, from root/FashionMNIST/raw (as torchvision) or root."""
    _require_folder(root)
    folders = (root / "FashionMNIST" / "raw", root)
    arrays = []
    for name in FASHION_FILES:
        candidates = [folder / file for folder in folders for file in (name, name + ".gz")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise DataError(
                f"Fashion-MNIST's {name}[.gz] is neither in {folders[0]} nor in {root}: put the four idx "
                "files there (github.com/zalandoresearch/fashion-mnist), or use data.name=fashion_mini"
            )
        arrays.append(read_idx(path))
    for file, images, labels in zip(FASHION_FILES[::2], arrays[::2], arrays[1::2], strict=True):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise DataError(
                f"{file} in {root}: expected images [n, 28, 28] and n labels in 0..9, "
                f"got {list(images.shape)} and {list(labels.shape)}; is this Fashion-MNIST?"
            )
    return arrays


def fashion_mnist(root: str | None) -> ImageArrays:
    """Fashion-MNIST in full, 28x28: 60,000 + 10,000 images from `root`."""
    return _fashion(
        read_fashion_folder(require_root(root, "fashion_mnist", "or use data.name=fashion_mini"))
    )


def fashion_mini(size: int) -> ImageArrays:
    """The embedded subset: first 3000 training and 4000 test images, 28x28, or mean-pooled to 14x14."""
    resource = resources.files("us3l.data") / "fashion_subset.npz"
    try:
        with resource.open("rb") as file, np.load(file) as subset:
            arrays = [subset[key] for key in ("train_images", "train_labels", "test_images", "test_labels")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"the embedded {resource} is missing or damaged ({error}): install us3l again"
        ) from error
    data = _fashion(arrays)
    return data if size == 28 else ImageArrays(_pooled(data.train), _pooled(data.test), num_classes=10)


def _fashion(arrays: list[UInt8Array]) -> ImageArrays:
    train_images, train_labels, test_images, test_labels = arrays
    return ImageArrays(
        _split(train_images[:, None], train_labels), _split(test_images[:, None], test_labels), num_classes=10
    )


def _pooled(split: Split) -> Split:
    return Split(F.avg_pool2d(split.images.float().div_(255), 2), split.labels)


# ---------------------------------------------------------------- CIFAR

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def cifar10(root: str | None) -> ImageArrays:
    """CIFAR-10 (python version) from root/cifar-10-batches-py."""
    folder = _require_cifar(root, "cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz")
    train = [_read_cifar(folder / f"data_batch_{i}", "labels", 10) for i in range(1, 6)]
    return ImageArrays(
        Split(torch.cat([s.images for s in train]), torch.cat([s.labels for s in train])),
        _read_cifar(folder / "test_batch", "labels", 10),
        num_classes=10,
        zoom=36 / 32,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def cifar100(root: str | None) -> ImageArrays:
    """CIFAR-100 (python version), its 100 fine classes, from root/cifar-100-python."""
    folder = _require_cifar(root, "cifar100", "cifar-100-python", "cifar-100-python.tar.gz")
    return ImageArrays(
        _read_cifar(folder / "train", "fine_labels", 100),
        _read_cifar(folder / "test", "fine_labels", 100),
        num_classes=100,
        zoom=36 / 32,
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
    )


def _require_cifar(root: str | None, name: str, folder: str, archive: str) -> Path:
    path = require_root(root, name, f"which holds {folder}") / folder
    if not path.is_dir():
        raise DataError(
            f"{name} was looked for in {path}, which does not exist: unpack {archive} "
            f"(www.cs.toronto.edu/~kriz/cifar.html) in {path.parent}, or pass data.root=FOLDER or data.download=true"
        )
    return path


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers, all a CIFAR batch has: a pickle may ask to run anything."""

    _ALLOWED = {
        "_reconstruct": np.empty(0).__reduce_ex__(4)[0],
        "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return self._ALLOWED[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file does")


def _read_cifar(path: Path, label_key: str, num_classes: int) -> Split:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: unpack the archive of the data set again") from error
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, IndexError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): unpack the archive of the data set again") from error
    if not isinstance(batch, dict) or not {"data", label_key} <= batch.keys():
        raise DataError(f"{path} is not a CIFAR batch: expected a dictionary with 'data' and '{label_key}'")
    images, labels = np.asarray(batch["data"]), np.asarray(batch[label_key])
    if (
        images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != 3072
        or labels.shape != images.shape[:1]
    ):
        raise DataError(
            f"{path}: expected uint8 'data' [n, 3072] and n '{label_key}', "
            f"got {images.dtype} {list(images.shape)} and {list(labels.shape)}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(
            f"{path}: expected labels in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}"
        )
    return _split(images.reshape(-1, 3, 32, 32), labels)


# ---------------------------------------------------------------- synthetic; shared


def random_images(size: int, train_samples: int, test_samples: int) -> ImageArrays:
    """RGB noise in 10 classes that mean nothing: for smoke tests, and for benchmarks of everything else."""

    def split(n: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(n) % 10)

    return ImageArrays(split(train_samples, seed=0), split(test_samples, seed=1), num_classes=10)


def _split(images: UInt8Array, labels: npt.NDArray[Any]) -> Split:
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def require_root(root: str | None, name: str, hint: str) -> Path:
    """`root` as a path; DataError, with the `hint` at what it should hold, if there is none."""
    if root is None:
        raise DataError(
            f"data.name={name} needs data.root, the folder of the data set ({hint}); nothing is downloaded without "
            "data.download=true"
        )
    return Path(root)


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"data.root={path} is not a folder")
