"""Fashion-MNIST and CIFAR from files: tiny trees of the same form, whole and broken."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from us3l.config import DataConfig
from us3l.data import Data, make_data
from us3l.errors import DataError

TRAIN, TEST = 20, 12


def open_data(name: str, root: Path | None, **options: object) -> Data:
    cfg = DataConfig(name=name, root=None if root is None else str(root), batch_size=4, **options)  # type: ignore[arg-type]
    return make_data(cfg, seed=0)


def everything(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, *, compressed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (TRAIN, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, TRAIN, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (TEST, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, TEST, np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def write_cifar(root: Path, name: str, protocol: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Python batches as published; returns the test images [n, 3, 32, 32] and labels."""
    rng = np.random.default_rng(0)
    if name == "cifar10":
        folder, classes, key = root / "cifar-10-batches-py", 10, "labels"
        sizes = {f"data_batch_{i}": TRAIN // 5 for i in range(1, 6)} | {"test_batch": TEST}
    else:
        folder, classes, key = root / "cifar-100-python", 100, "fine_labels"
        sizes = {"train": TRAIN, "test": TEST}
    folder.mkdir(parents=True)
    for file, n in sizes.items():
        batch = {
            "data": rng.integers(0, 256, (n, 3072), np.uint8),
            key: rng.integers(0, classes, n).tolist(),
            "filenames": [f"{i}.png" for i in range(n)],
            "batch_label": file,
        }
        (folder / file).write_bytes(pickle.dumps(batch, protocol))
    return batch["data"].reshape(-1, 3, 32, 32), np.array(batch[key])


# ---------------------------------------------------------------- Fashion-MNIST


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("inside", ["FashionMNIST/raw", "."])
def test_fashion_mnist(tmp_path: Path, inside: str, compressed: bool) -> None:
    arrays = write_fashion(tmp_path / inside, compressed=compressed)
    data = open_data("fashion_mnist", tmp_path)
    assert (data.size, data.in_channels, data.num_classes, len(data.train)) == (28, 1, 10, TRAIN // 4)
    images, labels = everything(data.test)
    assert torch.equal(images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).float() / 255)
    assert np.array_equal(labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert next(data.train.epoch(0)).shape == (8, 1, 28, 28)


def test_fashion_mnist_larger_and_fewer(tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path, compressed=False)
    data = open_data("fashion_mnist", tmp_path, size=56, train_samples=8, test_samples=5)
    images, _ = everything(data.test)
    original = torch.from_numpy(arrays["t10k-images-idx3-ubyte"][:5, None]).float() / 255
    torch.testing.assert_close(images, F.interpolate(original, (56, 56), mode="bilinear"))
    assert next(data.train.epoch(0)).shape == (8, 1, 56, 56) and len(data.train) == 2


def test_fashion_mnist_smaller_than_its_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.size=14.*28x28"):
        open_data("fashion_mnist", tmp_path, size=14)


def test_fashion_mnist_without_root() -> None:
    with pytest.raises(DataError, match=r"data.root.*fashion_mini.*nothing is downloaded"):
        open_data("fashion_mnist", None)


def test_fashion_mnist_root_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_data("fashion_mnist", tmp_path / "nowhere")


def test_fashion_mnist_missing_file(tmp_path: Path) -> None:
    write_fashion(tmp_path, compressed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"t10k-labels-idx1-ubyte\[.gz\] is neither in .*raw nor in .*put the"
    ):
        open_data("fashion_mnist", tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_truncated_file(tmp_path: Path, compressed: bool) -> None:
    write_fashion(tmp_path, compressed=compressed)
    file = tmp_path / ("train-images-idx3-ubyte" + (".gz" if compressed else ""))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*(damaged).*get it again"):
        open_data("fashion_mnist", tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"<html>not found</html>", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"]
)
def test_fashion_mnist_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    write_fashion(tmp_path, compressed=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="train-images-idx3-ubyte is not an idx file"):
        open_data("fashion_mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("train-labels-idx1-ubyte", np.zeros(TRAIN - 1, np.uint8)),
        ("train-labels-idx1-ubyte", np.full(TRAIN, 10, np.uint8)),
        ("train-images-idx3-ubyte", np.zeros((TRAIN, 32, 32), np.uint8)),
    ],
    ids=["fewer labels", "an eleventh class", "other image size"],
)
def test_fashion_mnist_that_is_something_else(tmp_path: Path, file: str, array: np.ndarray) -> None:
    write_fashion(tmp_path, compressed=False)
    (tmp_path / file).write_bytes(idx(array))
    with pytest.raises(DataError, match=r"train-images.*is this Fashion-MNIST\?"):
        open_data("fashion_mnist", tmp_path)


# ---------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path: Path, name: str, classes: int, protocol: int) -> None:
    test_images, test_labels = write_cifar(tmp_path, name, protocol)
    data = open_data(name, tmp_path)
    assert (data.size, data.in_channels, data.num_classes) == (32, 3, classes)
    assert len(data.train) == TRAIN // 4 and next(data.train.epoch(0)).shape == (8, 3, 32, 32)
    assert len(everything(data.train_eval)[1]) == TRAIN
    images, labels = everything(data.test)
    assert np.array_equal(labels.numpy(), test_labels)
    # The evaluation protocol: to 36x36, the 32x32 in the middle, normalised.
    resized = F.interpolate(torch.from_numpy(test_images).float() / 255, (36, 36), mode="bilinear")
    statistics = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "cifar100": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    }[name]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    torch.testing.assert_close(images, (resized[..., 2:34, 2:34] - mean) / std)


def test_cifar_views_are_normalised(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    views = torch.cat(list(open_data("cifar10", tmp_path).train.epoch(0)))
    assert views.min() >= -0.5 / 0.24 - 0.1 and views.min() < -0.5 and views.max() > 0.5


def test_cifar_linear_batches_are_normalised(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    white = {"data": np.full((TRAIN, 3072), 255, np.uint8), "fine_labels": list(range(TRAIN))}
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(white))
    images, labels = everything(open_data("cifar100", tmp_path).linear_train(0, batch_size=8))
    expected = (1 - torch.tensor([0.5071, 0.4867, 0.4408])) / torch.tensor([0.2675, 0.2565, 0.2761])
    torch.testing.assert_close(images, expected.view(1, 3, 1, 1).expand_as(images), rtol=0, atol=1e-5)
    assert sorted(labels.tolist()) == list(range(TRAIN))


def test_cifar_without_root() -> None:
    with pytest.raises(
        DataError, match=r"cifar10 needs data.root.*cifar-10-batches-py.*nothing is downloaded"
    ):
        open_data("cifar10", None)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_missing_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} was looked for in .*which does not exist: unpack .*tar.gz"):
        open_data(name, tmp_path)


def _unlink(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not a pickle")


def _list(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2]))


def _no_labels(path: Path) -> None:
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}))


def _short_rows(path: Path) -> None:
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 784), np.uint8), "labels": [0, 1]}))


def _more_labels(path: Path) -> None:
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1, 2]}))


def _other_classes(path: Path) -> None:
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_unlink, "is missing: unpack"),
        (_truncate, "is damaged.*unpack"),
        (_empty, "is damaged.*unpack"),
        (_text, "is damaged.*unpack"),
        (_list, "is not a CIFAR batch"),
        (_no_labels, "is not a CIFAR batch.*'labels'"),
        (_short_rows, r"expected uint8 'data' \[n, 3072\].*got uint8 \[2, 784\]"),
        (_more_labels, r"got uint8 \[2, 3072\] and \[3\]"),
        (_other_classes, r"expected labels in 0..9, got 0..10"),
    ],
)
def test_broken_cifar_batch(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    write_cifar(tmp_path, "cifar10")
    harm(tmp_path / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(DataError, match="data_batch_3.*" + message):
        open_data("cifar10", tmp_path)


class _Harmful:
    def __reduce__(self):
        return shutil.rmtree, ("/nonexistent",)


def test_cifar_batch_that_would_run_code(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": _Harmful()}))
    with pytest.raises(DataError, match=r"test_batch is damaged \(it refers to shutil.rmtree"):
        open_data("cifar10", tmp_path)
