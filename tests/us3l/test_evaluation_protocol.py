"""Calibration, features, and the evaluation of all widths of a small backbone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from us3l.evaluation import SGDProtocol, calibrate, evaluate, features, knn_accuracy, linear_probe
from us3l.models import build_model
from us3l.profile import profile
from us3l_kernels.nn.calibration import statistics
from us3l_kernels.width import use_width


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet_tiny", stem="small", in_channels=1, divisor=4, base_channels=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # weights of one would hide a norm that forgets them
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.fc = nn.Linear(32, 7)  # a head that evaluation must not touch
    return model


def loader(n: int, seed: int, *batches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = 0.3 * torch.randn(n, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    return list(zip(images.split(batches), labels.split(batches), strict=True))


@pytest.fixture
def data() -> SimpleNamespace:
    train, test = loader(96, 0, 40, 40, 16), loader(50, 1, 32, 18)
    return SimpleNamespace(
        train_eval=train,
        test=test,
        linear_train=lambda epoch, batch_size: iter(train),
        num_classes=3,
        in_channels=1,
        size=8,
    )


def test_statistics_of_the_first_norm_are_those_of_all_its_inputs() -> None:
    model, batches = tiny(), loader(96, 0, 40, 40, 16)
    for width in (0.5, 1.0):
        calibrate(model, batches, width)
        with use_width(model, width), torch.no_grad():
            x = torch.cat([model.conv1(images) for images, _ in batches])
        mean, var = model.bn1.calibrated[str(width)]
        torch.testing.assert_close(mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
    assert set(statistics(model)) == {"0.5", "1.0"}


def test_calibration_on_one_batch_reproduces_batch_statistics() -> None:
    model, [(images, labels)] = tiny(), loader(64, 2, 64)
    calibrate(model, [(images, labels)], 0.5)
    with use_width(model, 0.5), torch.no_grad():
        expected = model.train().forward_features(images)
    calibrate(model, [(images, labels)], 0.5)
    got, got_labels = features(model, [(images, labels)], 0.5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.shape == (64, 16) and got_labels.equal(labels)


def test_features_keep_order_mode_and_width() -> None:
    model = tiny().train()
    calibrate(model, loader(96, 0, 96), 0.25)
    whole, labels = features(model, loader(50, 1, 50), 0.25)
    parts, part_labels = features(model, loader(50, 1, 7, 43), 0.25)
    torch.testing.assert_close(parts, whole)
    assert part_labels.equal(labels)
    assert model.training and model.conv1.active_width == 1.0
    assert not whole.requires_grad


def test_uncalibrated_width_raises() -> None:
    model = tiny()
    calibrate(model, loader(96, 0, 96), 0.5)
    with pytest.raises(RuntimeError, match="no statistics"):
        features(model, loader(50, 1, 50), 0.75)


def test_training_makes_statistics_stale() -> None:
    model = tiny()
    calibrate(model, loader(96, 0, 96), 0.5)
    with use_width(model.train(), 0.5):
        model.forward_features(torch.randn(8, 1, 8, 8))
    with pytest.raises(RuntimeError, match="no statistics"):
        features(model, loader(50, 1, 50), 0.5)


def test_fewer_training_images_than_neighbours_all_vote(data: SimpleNamespace) -> None:
    data.train_eval = loader(12, 0, 12)
    model = tiny()
    [row] = evaluate(model, data, [0.5], "knn")
    train, test = features(model, data.train_eval, 0.5), features(model, data.test, 0.5)
    assert row["accuracy"] == knn_accuracy(*train, *test, k=12)


def test_empty_loaders_and_wrong_models_are_named() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(tiny(), [], 0.5)
    with pytest.raises(TypeError, match="forward_features"):
        calibrate(nn.Linear(2, 2), loader(4, 0, 4), 0.5)


def test_evaluate_is_its_parts(data: SimpleNamespace) -> None:
    model, widths = tiny(), (1.0, 0.25)
    seen: list[dict[str, object]] = []
    rows = evaluate(model, data, widths, "linear", on_width=seen.append)
    assert rows == seen and [row["width"] for row in rows] == list(widths)

    classifier = build_model("resnet_tiny", stem="small", in_channels=1, divisor=4, base_channels=8, num_classes=3)
    for row, cost in zip(rows, profile(classifier, (1, 8, 8), widths), strict=True):
        assert (row["macs"], row["params"]) == (cost.macs, cost.params)
        train, test = (features(model, part, row["width"]) for part in (data.train_eval, data.test))
        assert row["accuracy"] == linear_probe(*train, *test)
    knn = evaluate(model, data, widths, "knn")
    for row in knn:
        train, test = (features(model, part, row["width"]) for part in (data.train_eval, data.test))
        assert row["accuracy"] == knn_accuracy(*train, *test)
    assert isinstance(model.fc, nn.Linear) and model.fc.out_features == 7


def test_evaluate_uses_given_statistics(data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    calibrate(model, data.train_eval, 0.5)
    data.train_eval = loader(96, 0, 96)  # other batches: other statistics, if they were taken again
    before = {name: mean.clone() for name, (mean, _) in statistics(model)["0.5"].items()}
    evaluate(model, data, [0.5], "knn")
    assert all(mean.equal(before[name]) for name, (mean, _) in statistics(model)["0.5"].items())


def test_evaluate_takes_plans_and_the_sgd_protocol(data: SimpleNamespace) -> None:
    protocol = SGDProtocol(epochs=6, lr=0.5, batch_size=32, milestones=(4,))
    [row] = evaluate(tiny(), data, [{"": 0.5, "layer3": 0.25}], "linear", protocol=protocol)
    assert isinstance(row["width"], str) and "layer3" in row["width"]
    assert row["accuracy"] > 50  # of three classes that differ in brightness


def test_evaluate_names_bad_arguments(data: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="widths"):
        evaluate(tiny(), data, [])
    with pytest.raises(ValueError, match="probe: expected 'linear', 'knn' or 'classifier', got 'svm'"):
        evaluate(tiny(), data, [1.0], "svm")  # type: ignore[arg-type]
    model = tiny()
    model.fc = nn.Identity()
    with pytest.raises(ValueError, match="'classifier' is for networks trained with labels; .* is a Identity"):
        evaluate(model, data, [1.0], probe="classifier")
