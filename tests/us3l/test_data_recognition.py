"""The recognition data sets in the folders that torchvision expects, and parts of a training set."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from us3l.config import CLASSES, DataConfig
from us3l.data import arrays, make_data
from us3l.data.recognition import RECOGNITION, recognition_images
from us3l.errors import DataError


def write_image(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, colour, 12).astype(np.uint8)  # so that crops differ
    Image.fromarray(np.stack([np.tile(ramp, (10, 1))] * 3, axis=2)).save(path, quality=95)


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    for i in range(1, 9):
        write_image(folder / "jpg" / f"image_{i:05d}.jpg", 20 * i)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 9) % 3 + 1})
    savemat(folder / "setid.mat", {"trnid": [5, 1, 2], "valid": [3, 4], "tstid": [6, 7, 8]})


def oxford_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split, numbers in (("trainval", (1, 2, 3)), ("test", (4, 5))):
        names = [f"Some_Breed_{i}" for i in numbers]
        for i, name in zip(numbers, names, strict=True):
            write_image(folder / "images" / f"{name}.jpg", 20 * i)
        write_lines(folder / "annotations" / f"{split}.txt", *(f"{name} {i} 1 1" for i, name in enumerate(names, 1)))


def dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    for i, split in enumerate(("train", "val", "test")):
        names = [f"{kind}/{kind}_{i}.jpg" for kind in ("banded", "woven")]
        for name in names:
            write_image(folder / "images" / name, 60 * i + 10 * len(name))
        write_lines(folder / "labels" / f"{split}1.txt", *names)


def fgvc_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    write_lines(folder / "variants.txt", "707-320", "A330 200")
    for split, numbers in (("trainval", (10, 11, 12)), ("test", (13,))):
        for i in numbers:
            write_image(folder / "images" / f"{i}.jpg", 15 * i)
        lines = [f"{i} {'A330 200' if i % 2 else '707-320'}" for i in numbers]
        write_lines(folder / f"images_variant_{split}.txt", *lines)


def food101(root: Path) -> None:
    folder = root / "food-101"
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        listed = {kind: [f"{kind}/{i}" for i in numbers] for kind in ("apple_pie", "waffles")}
        for names in listed.values():
            for i, name in enumerate(names):
                write_image(folder / "images" / f"{name}.jpg", 30 * i + len(name))
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed), encoding="utf-8")


WRITERS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (flowers102, oxford_pets, dtd, fgvc_aircraft, food101)
}


@pytest.fixture(autouse=True)
def _own_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: Path(path).is_file())


@pytest.mark.parametrize("name", WRITERS)
def test_samples_are_those_of_torchvision(name: str, tmp_path: Path) -> None:
    assert set(WRITERS) == set(RECOGNITION)
    WRITERS[name](tmp_path)
    train, test, num_classes = recognition_images(name, str(tmp_path))
    for samples, splits in ((train, RECOGNITION[name].train), (test, ("test",))):
        public = [item for split in splits for item in RECOGNITION[name].dataset(str(tmp_path), split=split)]
        assert [label for _, label in samples] == [label for _, label in public] and samples
        for (path, _), (image, _) in zip(samples, public, strict=True):
            assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(image))
    assert num_classes == CLASSES[name] and not {path for path, _ in train} & {path for path, _ in test}

    data = make_data(DataConfig(name=name, root=str(tmp_path), size=8, batch_size=2), seed=0)
    assert (data.num_classes, data.in_channels, data.size) == (num_classes, 3, 8)
    assert data.train_labels.tolist() == [label for _, label in train]
    assert sum(len(labels) for _, labels in data.test) == len(test)


def test_the_script_writes_files_that_are_read(tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_fashion_dtd.py"))
    source, root = arrays.fashion_mini(28), tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    for split, images in (("train", source.train), ("val", source.train), ("test", source.test)):
        script["write_split"](root, split, images, range(2))
    data = make_data(DataConfig(name="dtd", root=str(tmp_path), size=28), seed=0)
    assert data.train_labels.tolist() == 2 * [label for label in range(10) for _ in range(2)]
    assert sum(len(labels) for _, labels in data.test) == 20


@pytest.mark.parametrize("name", WRITERS)
def test_missing_data_say_what_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read from {tmp_path} .*put .*/.* there, or .*download=true"):
        recognition_images(name, str(tmp_path))
    with pytest.raises(DataError, match=f"{name} needs data.root.*which holds "):
        recognition_images(name, None)


def test_damaged_lists_and_missing_images_are_named(tmp_path: Path) -> None:
    food101(tmp_path)
    (tmp_path / "food-101/images/waffles/1.jpg").unlink()
    data = make_data(DataConfig(name="food101", root=str(tmp_path), size=8, batch_size=2), seed=0)
    with pytest.raises(DataError, match=r"waffles/1\.jpg"):
        list(data.train_eval)
    (tmp_path / "food-101/meta/train.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="food101 cannot be read .*JSONDecodeError"):
        recognition_images("food101", str(tmp_path))


def test_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "new"
    monkeypatch.setattr(datasets.Food101, "_download", lambda self: food101(Path(self.root)))
    config = DataConfig(name="food101", root=str(root), size=8, batch_size=2, download=True)
    assert len(make_data(config, seed=0).train_labels) == 4
    with pytest.raises(DataError, match="download with one before"):
        make_data(config, seed=0, world_size=2)
    with pytest.raises(DataError, match=r"data\.download: only cifar10.*food101 can be downloaded, not random"):
        make_data(DataConfig(name="random", download=True), seed=0)

    def unreachable(self: datasets.Food101) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.Food101, "_download", unreachable)
    with pytest.raises(DataError, match="food101 could not be downloaded to .*no route to host"):
        make_data(config, seed=0)


@pytest.mark.parametrize("name", ["fashion_mini", "food101"])
def test_a_part_of_the_training_images(name: str, tmp_path: Path) -> None:
    food101(tmp_path)
    sizes = {} if name == "food101" else {"train_samples": 40, "test_samples": 10}
    size = 8 if name == "food101" else 14
    data = make_data(DataConfig(name=name, root=str(tmp_path), size=size, batch_size=2, **sizes), seed=0)
    indices = np.array([1, 3])
    images, labels = (torch.cat(items) for items in zip(*data.train_eval, strict=True))
    part = data.part(indices, (1.0, 1.0))
    (some, some_labels) = (torch.cat(items) for items in zip(*part.plain, strict=True))
    assert some.equal(images[indices]) and some_labels.equal(labels[indices]) and labels.equal(data.train_labels)
    assert (data.train_names is None) == (name == "fashion_mini")

    batches = list(part.augmented(0, 1))
    assert [len(y) for _, y in batches] == [1, 1]
    assert sorted(int(y) for _, y in batches) == sorted(some_labels.tolist())
    again, later = list(data.part(indices, (1.0, 1.0)).augmented(0, 1)), list(part.augmented(1, 1))
    assert all(a[0].equal(b[0]) for a, b in zip(batches, again, strict=True))
    crops = [list(data.part(indices, scale).augmented(0, 2))[0][0] for scale in ((1.0, 1.0), (0.1, 0.2))]
    assert not crops[0].equal(crops[1]) and len(later) == 2
