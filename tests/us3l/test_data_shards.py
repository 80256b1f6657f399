"""WebDataset shards: what an epoch consists of, where it goes on, how shards are broken; device augmentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchvision.transforms.v2 import functional as v2
from typer.testing import CliRunner

from us3l.cli import app
from us3l.config import DataConfig, load
from us3l.data import Data, augment, make_data
from us3l.data.seeding import Stream, uniforms
from us3l.data.shards import index_shards, write_shards
from us3l.engine import Trainer
from us3l.errors import CheckpointError, DataError

TRAIN, SHARD = 36, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder; the colour of an image tells which it is."""
    root = tmp_path_factory.mktemp("folder")
    for split, n in (("train", TRAIN // 2), ("val", 4)):
        for c, name in enumerate(("cat", "dog")):
            path = root / split / name
            path.mkdir(parents=True)
            for i in range(n):
                pixels = np.full((20 + i, 24, 3), (5 * (c * n + i), 128 * c, 50), np.uint8)
                Image.fromarray(pixels).save(path / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    result = CliRunner().invoke(app, ["shards", str(root), "--source", str(folder), "--images", str(SHARD)])
    assert result.exit_code == 0, result.output
    assert f"{TRAIN // SHARD} shards, {TRAIN} images" in result.output and "2 shards, 8 images" in result.output
    return root


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for path in packed.rglob("*.*"):
        target = tmp_path / path.relative_to(packed)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def opened(root: Path, *, rank: int = 0, world_size: int = 1, name: str = "shards", **settings: object) -> Data:
    options = {"batch_size": 4, "size": 8, "workers": 0, **settings}
    cfg = DataConfig(name=name, root=str(root), **options)  # type: ignore[arg-type]
    return make_data(cfg, seed=0, rank=rank, world_size=world_size)


def which(images: Tensor) -> list[int]:
    """Which images these are, from their red."""
    mean, std = 0.485, 0.229
    return ((images[:, 0].mean((1, 2)) * std + mean) * 255 / 5).round().int().tolist()


def seen(data: Data, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [which(images) for images, _ in data.labelled.epoch(epoch, start)]


def test_an_epoch_is_a_shuffle_of_every_image(packed: Path) -> None:
    data = opened(packed)
    assert (len(data.train), data.num_classes, data.size) == (TRAIN // 4, 2, 8)
    epochs = [seen(data, epoch) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(TRAIN))
    assert epochs[0] != epochs[1] and epochs[0] == seen(opened(packed))
    assert sum(epochs[0], []) != list(range(TRAIN))
    for images, labels in data.labelled.epoch(0):
        assert labels.tolist() == [int(i >= TRAIN // 2) for i in which(images)]
    batch = next(iter(data.train.epoch(0)))
    assert batch.shape == (8, 3, 8, 8) and batch.dtype == torch.float32


def test_an_epoch_goes_on_where_it_was_left_with_any_number_of_workers(packed: Path) -> None:
    for workers in (0, 2):
        data = opened(packed, workers=workers)
        whole = list(data.train.epoch(1))
        rest = list(data.train.epoch(1, 3))
        assert len(whole) == len(data.train) and len(rest) == len(whole) - 3
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
        if workers == 0:
            alone = {tuple(which(images[:4])): images for images in whole}
    assert len(alone) == len(whole)


def test_processes_share_the_shards(packed: Path) -> None:
    parts = [sum(seen(opened(packed, rank=rank, world_size=2)), []) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 4 * (TRAIN // 8)
    assert not set(parts[0]) & set(parts[1])


def test_augmentation_is_a_function_of_the_sample(packed: Path) -> None:
    """The same views whatever the batch, for either place of augmentation."""
    for on in ("workers", "device"):
        views: list[dict[int, Tensor]] = []
        for batch_size in (4, 12):
            data = opened(packed, batch_size=batch_size, augment_on=on, crop_scale=[1.0, 1.0])
            labelled = opened(packed, batch_size=batch_size, augment_on=on)
            names = sum(seen(labelled), [])
            firsts = torch.cat([batch[:batch_size] for batch in data.train.epoch(0)])
            views.append(dict(zip(names, firsts, strict=True)))
        assert all(torch.equal(views[0][name], views[1][name]) for name in range(TRAIN))


def test_evaluation_and_linear_loaders_see_every_image_once(packed: Path) -> None:
    data = opened(packed)
    images, labels = next(iter(data.test))
    assert len(data.test) == 1 and labels.sum() == 4 and len(images) == 8
    assert which(images[:0]) == [] and len(torch.cat([x for x, _ in data.train_eval])) == TRAIN
    assert torch.equal(torch.cat([y for _, y in data.train_eval]), data.train_labels)
    with pytest.raises(DataError, match="image_folder"):
        data.part(np.arange(3), (1.0, 1.0))
    linear = list(data.linear_train(0, 10))
    assert sorted(sum((which(x) for x, _ in linear), [])) == list(range(TRAIN)) and len(linear[-1][0]) == TRAIN % 10


def test_training_goes_on_bit_for_bit(packed: Path, tmp_path: Path) -> None:
    def run(dir: Path, *more: str) -> Trainer:
        config = load(None, [
            "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "data.name=shards",
            f"data.root={packed}", "data.size=8", "data.batch_size=6", "method.hidden_dim=16", "method.dim=8",
            "train.epochs=2", "train.device=cpu", "train.threads=1", f"checkpoint.dir={dir}",
            "checkpoint.every_steps=2", "data.augment_on=device", *more,
        ])  # fmt: skip
        return Trainer(config, console=Console(quiet=True))

    undisturbed = run(tmp_path / "whole", "checkpoint.keep=9")
    undisturbed.fit()
    resumed = run(tmp_path / "whole")
    resumed.resume(tmp_path / "whole" / "step-000000008.pt")
    resumed.folder = None
    resumed.fit()
    for a, b in zip(undisturbed.method.parameters(), resumed.method.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="data.workers: 0 then, 2 now"):  # other workers, another order
        run(tmp_path / "whole", "data.workers=2").resume("auto")


# What can be wrong


def test_a_missing_shard(shards: Path) -> None:
    (shards / "train" / "000003.tar").unlink()
    with pytest.raises(DataError, match="000003.tar is missing: put it back"):
        opened(shards)


def test_a_truncated_shard_is_noticed_before_training(shards: Path) -> None:
    path = shards / "train" / "000003.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="000003.tar is damaged: 3000 bytes, and .* when it was indexed"):
        opened(shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_breaks_while_it_is_read(shards: Path, workers: int) -> None:
    data = opened(shards, workers=workers)
    path = shards / "train" / "000003.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1100])  # in the middle of a file
    with pytest.raises(DataError, match=r"^the shard .*000003.tar cannot be read \(.*\): get it again$"):
        list(data.train.epoch(0))
    if workers:
        return
    path.unlink()
    with pytest.raises(DataError, match=r"^the shard .*000003.tar cannot be read"):
        list(data.train.epoch(0))
    path.write_bytes(whole.replace(b"\x89PNG", b"\x00PNG", 1))
    with pytest.raises(DataError, match=r"^0000.* in the shard .*000003.tar cannot be decoded"):
        list(data.train.epoch(0))


def test_indices_and_settings_that_do_not_fit(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"6 shards: expected at least one for each of 4 processes x 2"):
        opened(shards, rank=0, world_size=4, workers=2, batch_size=2)
    with pytest.raises(DataError, match="train_samples.*read whole"):
        opened(shards, train_samples=4)
    with pytest.raises(DataError, match="holds shards already"):
        write_shards(folder, shards, 5)
    index = shards / "val" / "index.json"
    index.write_text(json.dumps({"shards": [{}]}))
    with pytest.raises(DataError, match="is not an index of shards"):
        opened(shards)
    index.unlink()
    with pytest.raises(DataError, match=r"index.json does not exist: `us3l shards .*` writes it"):
        opened(shards)
    with pytest.raises(DataError, match="there are no shards in"):
        index_shards(folder / "train")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match=r"need the package webdataset.*us3l\[shards\]"):
        index_shards(shards / "val")


# On the device


def test_blur_is_torchvisions() -> None:
    images = torch.rand(6, 3, 20, 17)
    u = uniforms(0, 0, np.arange(6), Stream.VIEW_1, len(augment.Draw))
    u[:, augment.Draw.BLUR] = [0.1, 0.1, 0.9, 0.1, 0.9, 0.1]
    blurred = augment.blur(images, u)
    for image, given, row in zip(images, blurred, u, strict=True):
        sigma = 0.1 + 1.9 * row[augment.Draw.SIGMA]
        expected = v2.gaussian_blur(image, [13, 13], [sigma, sigma]) if row[augment.Draw.BLUR] < 0.5 else image
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


def test_a_folder_augmented_on_the_device(folder: Path) -> None:
    """Crops, jitter, blur: as many colours and as much change as by the workers, in expectation."""
    batches = {on: next(iter(opened(folder, name="image_folder", batch_size=36, augment_on=on).train.epoch(0)))
               for on in ("workers", "device")}  # fmt: skip
    for images in batches.values():
        assert images.shape == (72, 3, 8, 8) and images.dtype == torch.float32 and torch.isfinite(images).all()
        assert not torch.equal(images[:36], images[36:])
    means = {on: images.mean((0, 2, 3)) for on, images in batches.items()}
    torch.testing.assert_close(means["device"], means["workers"], rtol=0, atol=0.25)
