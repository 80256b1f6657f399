"""make_data on embedded and synthetic data: order, sharding, resuming, per-sample randomness, evaluation."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from us3l.config import DataConfig
from us3l.data import Data, make_data
from us3l.errors import DataError

SUBSET_SHA256 = "dc0c9123dde0c55dee4672387757e9ba95af0c70421eb8931efd81aa0a0eac65"


def mini(seed: int = 0, *, rank: int = 0, world_size: int = 1, **options: object) -> Data:
    options = {"batch_size": 8, "train_samples": 50, "test_samples": 30, **options}
    return make_data(DataConfig(**options), seed, rank=rank, world_size=world_size)  # type: ignore[arg-type]


def rows(data: Data, epoch: int = 0) -> torch.Tensor:
    """Both views of an epoch in its order, [2, n, C, H, W]."""
    batches = [batch.unflatten(0, (2, -1)) for batch in data.train.epoch(epoch)]
    return torch.cat(batches, dim=1)


def subset_arrays() -> list[np.ndarray]:
    with (resources.files("us3l.data") / "fashion_subset.npz").open("rb") as file, np.load(file) as subset:
        return [subset[key] for key in ("train_images", "train_labels", "test_images", "test_labels")]


def test_embedded_subset_is_the_one_that_was_made() -> None:
    arrays = subset_arrays()
    assert [a.shape for a in arrays] == [(3000, 28, 28), (3000,), (4000, 28, 28), (4000,)]
    assert hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest() == SUBSET_SHA256


def test_embedded_subset_has_its_licence_beside_it() -> None:
    text = (resources.files("us3l.data") / "fashion_subset.LICENSE").read_text()
    assert "MIT" in text and "Zalando" in text


@pytest.mark.parametrize("size", [None, 14, 28])
def test_fashion_mini(size: int | None) -> None:
    data = make_data(DataConfig(size=size), seed=0)
    assert (data.size, data.in_channels, data.num_classes, len(data.train)) == (size or 14, 1, 10, 23)
    train_images, train_labels, test_images, test_labels = subset_arrays()
    for loader, images, labels in (
        (data.train_eval, train_images, train_labels),
        (data.test, test_images, test_labels),
    ):
        batches = list(loader)
        assert len(loader) == len(batches)
        expected = torch.from_numpy(images)[:, None].float() / 255
        if size != 28:
            expected = F.avg_pool2d(expected, 2)
        got, classes = (torch.cat(part) for part in zip(*batches, strict=True))
        assert torch.equal(got, expected)
        assert classes.dtype == torch.int64 and np.array_equal(classes.numpy(), labels)


def test_training_batch() -> None:
    batch = next(mini().train.epoch(0))
    assert batch.shape == (16, 1, 14, 14) and batch.dtype == torch.float32
    assert batch.min() >= 0 and batch.max() <= 1
    assert len(mini().train) == len(list(mini().train.epoch(0))) == 50 // 8


def test_views_are_of_the_same_images_but_differ() -> None:
    # Mirroring and jitter are all that is left without crops: the mean brightness still tells images apart.
    first, second = rows(mini(crop_scale=[1.0, 1.0], train_samples=None, batch_size=500))
    assert not torch.equal(first, second)
    means = torch.stack([first.mean((1, 2, 3)), second.mean((1, 2, 3))])
    assert torch.corrcoef(means)[0, 1] > 0.7
    assert torch.corrcoef(torch.stack([means[0], means[1].roll(1)]))[0, 1] < 0.2


def test_same_seed_same_epoch() -> None:
    assert torch.equal(rows(mini(seed=3), 2), rows(mini(seed=3), 2))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_other_seed_or_epoch(seed: int, epoch: int) -> None:
    assert not torch.equal(rows(mini()), rows(mini(seed=seed), epoch))


def test_nothing_else_is_drawn_from_or_changes_the_result() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    once = rows(mini())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(rows(mini()), once)


@pytest.mark.parametrize("name", ["fashion_mini", "random"])
def test_augmentation_does_not_depend_on_the_batch(name: str) -> None:
    small, large = rows(mini(name=name, batch_size=4)), rows(mini(name=name, batch_size=16))
    assert torch.equal(small[:, :48], large)


def test_augmentation_does_not_depend_on_the_rest_of_the_data_set() -> None:
    few, many = mini(train_samples=16), mini(train_samples=48)
    by_sample = []
    for data in (few, many):
        order = np.concatenate(data.train.order.batches(0))  # type: ignore[attr-defined]
        by_sample.append(rows(data)[:, np.argsort(order)])
    assert torch.equal(by_sample[0], by_sample[1][:, :16])


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_start_batch_resumes_exactly(start: int) -> None:
    whole, rest = list(mini().train.epoch(5)), list(mini().train.epoch(5, start_batch=start))
    assert len(rest) == 6 - start
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("start", [-1, 7])
def test_start_batch_outside_the_epoch(start: int) -> None:
    with pytest.raises(ValueError, match=rf"start_batch .*\[0, 6\].*got {start}"):
        next(mini().train.epoch(0, start))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_batches_of_one_process(world_size: int) -> None:
    shares = [rows(mini(rank=r, world_size=world_size, batch_size=4)) for r in range(world_size)]
    together = torch.cat([share.unflatten(1, (-1, 4)) for share in shares], dim=2).flatten(1, 2)
    assert torch.equal(together, rows(mini(batch_size=4 * world_size)))


def test_every_image_at_most_once_per_epoch() -> None:
    order = np.concatenate(mini().train.order.batches(0))  # type: ignore[attr-defined]
    assert len(set(order)) == len(order) == 48


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1)])
def test_bad_rank(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        mini(rank=rank, world_size=world_size)


def test_epoch_smaller_than_a_batch() -> None:
    few = mini(batch_size=26, world_size=2)
    assert len(few.train) == 0 and list(few.train.epoch(0)) == []
    assert len(mini(batch_size=25, world_size=2).train) == 1


@pytest.mark.parametrize("key", ["train_samples", "test_samples"])
def test_more_samples_than_there_are(key: str) -> None:
    with pytest.raises(DataError, match=rf"data.{key}=5000.*has [34]000"):
        mini(**{key: 5000})


@pytest.mark.parametrize(("name", "size"), [("fashion_mini", 20), ("fashion_mini", 32)])
def test_sizes_that_are_not_there(name: str, size: int) -> None:
    with pytest.raises(DataError, match=rf"data.size={size}.*14.*28"):
        mini(name=name, size=size)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"data.name=imagenet.*fashion_mini.*image_folder"):
        mini(name="imagenet")


def test_linear_batches_hold_every_image_once_lightly_augmented() -> None:
    data = mini()
    batches = list(data.linear_train(0, batch_size=16))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    plain, classes = (torch.cat(part) for part in zip(*data.train_eval, strict=True))
    # Each augmented image is closest to its original, or to the mirrored one, and carries its label.
    both = torch.stack([plain, plain.flip(-1)]).flatten(2)
    nearest = torch.cdist(images.flatten(1), both).amin(0).argmin(1)
    assert (classes[nearest] == labels).float().mean() > 0.9
    assert sorted(labels.tolist()) == sorted(classes.tolist())
    assert not torch.equal(images, next(data.linear_train(1, batch_size=50))[0])
    assert torch.equal(images, next(data.linear_train(0, batch_size=50))[0])


def test_linear_augmentation_keeps_colours() -> None:
    data = mini(name="random")
    images = next(data.linear_train(0, batch_size=50))[0]
    assert images.mean() == pytest.approx(0.5, abs=0.01)
    assert ((images - images.mean((1, 2, 3), keepdim=True)).abs().amax((1, 2, 3)) > 0.3).all()


def test_random_data() -> None:
    data = make_data(DataConfig(name="random", size=20, batch_size=64), seed=0)
    assert (data.size, data.in_channels, data.num_classes, len(data.train)) == (20, 3, 10, 8)
    images, labels = next(iter(data.test))
    assert images.shape == (256, 3, 20, 20) and labels.unique().tolist() == list(range(10))
    assert next(data.train.epoch(0)).shape == (128, 3, 20, 20)
    larger = make_data(DataConfig(name="random", train_samples=600, batch_size=600), seed=0)
    assert len(larger.train) == 1 and larger.size == 32


def test_damaged_package_file(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("us3l.data.arrays.resources.files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"fashion_subset.npz is missing or damaged.*install us3l again"):
        mini()
    (tmp_path / "fashion_subset.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DataError, match="missing or damaged"):
        mini()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_made_on_the_device() -> None:
    cfg = DataConfig(name="random", batch_size=16, train_samples=32, test_samples=20)
    on_cpu, on_cuda = make_data(cfg, 0), make_data(cfg, 0, device="cuda")
    views = next(on_cuda.train.epoch(0))
    assert views.is_cuda
    torch.testing.assert_close(views.cpu(), next(on_cpu.train.epoch(0)), rtol=0, atol=1e-4)
    images, labels = next(iter(on_cuda.test))
    assert images.is_cuda and labels.is_cuda
    images, labels = next(on_cuda.linear_train(0))
    assert images.is_cuda and labels.is_cuda
