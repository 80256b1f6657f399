"""ImageFolder trees: transforms, seeding across workers, and every way such a tree is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from us3l.config import DataConfig
from us3l.data import Data, make_data
from us3l.data.folder import evaluation_transform, subset, view_transform
from us3l.errors import DataError

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for c, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (40 + 4 * i, 48, 3), np.uint8)
                pixels[..., c] += 150  # red, green or blue
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    return tmp_path


def open_folder(root: Path | str | None, seed: int = 0, **options: object) -> Data:
    settings = {"batch_size": 4, "size": 24, **options}
    rank, world_size = settings.pop("rank", 0), settings.pop("world_size", 1)
    cfg = DataConfig(name="image_folder", root=None if root is None else str(root), **settings)  # type: ignore[arg-type]
    return make_data(cfg, seed, rank=rank, world_size=world_size)  # type: ignore[arg-type]


def rows(data: Data, epoch: int = 0) -> torch.Tensor:
    return torch.cat([batch.unflatten(0, (2, -1)) for batch in data.train.epoch(epoch)], dim=1)


def test_shapes_and_labels(tree: Path) -> None:
    data = open_folder(tree)
    assert (data.size, data.in_channels, data.num_classes, len(data.train)) == (24, 3, 3, 3)
    batches = list(data.train.epoch(0))
    assert [b.shape for b in batches] == [(8, 3, 24, 24)] * 3 and batches[0].dtype == torch.float32
    images, labels = next(iter(data.test))
    assert len(data.test) == 1 and images.shape == (6, 3, 24, 24)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and labels.dtype == torch.int64
    assert images.mean((2, 3)).argmax(1).tolist() == labels.tolist()  # the dominant colour is the class
    assert open_folder(tree, size=None).size == 224


def test_evaluation_is_resize_centre_crop_normalise(tree: Path) -> None:
    images, _ = next(iter(open_folder(tree, size=224).test))
    with Image.open(tree / "val" / "cat" / "0.jpg") as image:  # 48 x 40
        plain = image.convert("RGB").resize((307, 256), Image.Resampling.BILINEAR).crop((42, 16, 266, 240))
    pixels = torch.from_numpy(np.array(plain)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[0], (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_results_do_not_depend_on_workers(tree: Path) -> None:
    data, forked = open_folder(tree), open_folder(tree, workers=2)
    assert torch.equal(rows(data), rows(forked))
    for loader, other in ((data.test, forked.test), (data.linear_train(3, 5), forked.linear_train(3, 5))):
        for (images, labels), (others, other_labels) in zip(loader, other, strict=True):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_results_do_not_depend_on_batches_ranks_or_position(tree: Path) -> None:
    whole = rows(open_folder(tree), epoch=2)
    assert torch.equal(rows(open_folder(tree, batch_size=2), epoch=2), whole)
    shares = [rows(open_folder(tree, batch_size=2, rank=r, world_size=2), epoch=2) for r in range(2)]
    together = torch.cat([share.unflatten(1, (-1, 2)) for share in shares], dim=2).flatten(1, 2)
    assert torch.equal(together, whole)
    rest = list(open_folder(tree).train.epoch(2, start_batch=1))
    assert torch.equal(torch.cat([b.unflatten(0, (2, -1)) for b in rest], dim=1), whole[:, 4:])


def test_seed_epoch_and_view_matter_and_the_generator_of_the_run_is_left_alone(tree: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = rows(open_folder(tree))
    list(open_folder(tree).test), list(open_folder(tree).linear_train(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(rows(open_folder(tree)), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(rows(open_folder(tree), epoch=1), first)
    assert not torch.equal(rows(open_folder(tree, seed=1)), first)


def test_grey_flip_and_blur_happen_as_often_as_published() -> None:
    torch.manual_seed(0)
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, :16] = (255, 60, 0)
    transform = view_transform(32, (1.0, 1.0))
    views = torch.stack([transform(Image.fromarray(halves)) for _ in range(300)])
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    pixels = views * std.view(3, 1, 1) + mean.view(3, 1, 1)
    grey = (pixels - pixels[:, :1]).abs().amax((1, 2, 3)) < 1 / 255
    assert grey.float().mean() == pytest.approx(0.2, abs=0.08)
    mirrored = pixels[:, :, :, 0].amax((1, 2)) < pixels[:, :, :, -1].amax((1, 2))
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.1)
    # Colour operations leave two colours with a sharp edge between; only a blur makes others.
    blurred = (pixels[:, :, :, 15] - pixels[:, :, :, 0]).abs().amax((1, 2)) > 0.5 / 255
    assert blurred.float().mean() == pytest.approx(0.48, abs=0.1)


def test_grey_and_transparent_files_become_rgb(tree: Path) -> None:
    Image.new("L", (30, 30), 128).save(tree / "val" / "cat" / "grey.png")
    Image.new("RGBA", (30, 30), (10, 20, 30, 40)).save(tree / "val" / "dog" / "alpha.png")
    images, labels = next(iter(open_folder(tree).test))
    assert images.shape[:2] == (8, 3) and len(labels) == 8


def test_linear_batches(tree: Path) -> None:
    batches = list(open_folder(tree).linear_train(0, batch_size=5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert sorted(labels.tolist()) == sorted([0, 1, 2] * 4)
    assert images.mean((2, 3)).argmax(1).tolist() == labels.tolist()


def test_fewer_samples_are_spread_over_the_classes(tree: Path) -> None:
    data = open_folder(tree, train_samples=6, test_samples=3)
    assert len(data.train) == 1
    assert torch.cat([labels for _, labels in data.train_eval]).tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.cat([labels for _, labels in data.test]).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"data.train_samples=13.*12 images"):
        open_folder(tree, train_samples=13)
    samples = [(str(i), i) for i in range(10)]
    assert subset(samples, None, "key") == subset(samples, 10, "key") == samples


def test_without_root() -> None:
    with pytest.raises(DataError, match=r"image_folder needs data.root.*train/CLASS.*nothing is downloaded"):
        open_folder(None)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(tree: Path, split: str) -> None:
    (tree / split).rename(tree / "elsewhere")
    with pytest.raises(DataError, match=rf"{split} is not a folder: data.root must hold"):
        open_folder(tree)


def test_split_without_classes(tree: Path) -> None:
    for name in CLASSES:
        for file in (tree / "val" / name).iterdir():
            file.unlink()
        (tree / "val" / name).rmdir()
    with pytest.raises(DataError, match=r"val: Couldn't find any class folder.*Expected .*CLASS"):
        open_folder(tree)


def test_empty_class_folder(tree: Path) -> None:
    (tree / "train" / "rat").mkdir()
    with pytest.raises(DataError, match=r"train: .*rat.*an image at least in each class"):
        open_folder(tree)


def test_other_classes_in_val(tree: Path) -> None:
    (tree / "val" / "owl").rename(tree / "val" / "rat")
    with pytest.raises(
        DataError, match=r"same class folders.*only in train/: \['owl'\], only in val/: \['rat'\]"
    ):
        open_folder(tree)


def test_fewer_classes_in_val(tree: Path) -> None:
    (tree / "val" / "owl").rename(tree / "owl")
    with pytest.raises(DataError, match=r"same class folders, got 3 and 2; only in train/: \['owl'\]"):
        open_folder(tree)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("harm", ["truncated", "text", "empty"])
def test_corrupt_image_is_named(tree: Path, workers: int, harm: str) -> None:
    path = tree / "train" / "dog" / "2.jpg"
    data = {"truncated": path.read_bytes()[:-400], "text": b"<html></html>", "empty": b""}[harm]
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(open_folder(tree, workers=workers).train.epoch(0))
    assert str(caught.value).startswith(f"{path} cannot be decoded (")
    assert str(caught.value).endswith("replace or remove the file")


def test_evaluation_of_a_smaller_size() -> None:
    assert evaluation_transform(32)(Image.new("RGB", (64, 80))).shape == (3, 32, 32)
