"""Fine-tuning: which images have labels, what is trained, resuming, the choice of a learning rate, the command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from us3l import checkpoint as checkpoints
from us3l import cli
from us3l.config import DataConfig
from us3l.data import Data, make_data
from us3l.errors import CheckpointError, ConfigError, DataError, TrainingError
from us3l.evaluation import FinetuneProtocol, balanced_subset, features, finetune
from us3l.evaluation.finetune import (
    SEMI_1_PROTOCOL,
    SEMI_10_PROTOCOL,
    TRANSFER_PROTOCOL,
    _accuracies,
    listed_subset,
    protocol_for,
    sub_network,
)
from us3l.models import Backbone, build_model

PROTOCOL = FinetuneProtocol(epochs=3, lr=0.05, batch_size=16, milestones=(2,), crop_scale=(0.8, 1.0))


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> Data:
    return make_data(DataConfig(name="fashion_mini", train_samples=80, test_samples=40, batch_size=16), seed=0)


@pytest.fixture
def model() -> Backbone:
    torch.manual_seed(0)
    model = build_model("resnet_tiny", stem="small", in_channels=1, divisor=4, base_channels=8)
    model.fc = nn.Linear(32, 7)  # a projector
    return model


def test_a_balanced_subset_has_as_many_images_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 2)[torch.randperm(102)]
    chosen = balanced_subset(labels, 0.1, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 2] and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, balanced_subset(labels, 0.1, seed=0))
    assert not np.array_equal(chosen, balanced_subset(labels, 0.1, seed=1))
    assert len(balanced_subset(labels, 1e-9, seed=0)) == 3 and set(chosen) <= set(balanced_subset(labels, 0.2, seed=0))
    with pytest.raises(ValueError, match="share"):
        balanced_subset(labels, 1.5, seed=0)


def test_a_listed_subset(tmp_path: Path) -> None:
    names, file = ["/data/train/b/2.jpg", "/data/train/a/1.jpg", "/data/train/a/3.jpg"], tmp_path / "list.txt"
    file.write_text("3.jpg\nb/2.jpg\n\n3.jpg\n", encoding="utf-8")
    assert listed_subset(names, file).tolist() == [0, 2]
    file.write_text("2\n0\n", encoding="utf-8")
    assert listed_subset(None, file).tolist() == [0, 2]
    with pytest.raises(DataError, match=r"2 of 2 images are no training images, e\.g\. 2"):
        listed_subset(names, file)
    file.write_text("a.jpg", encoding="utf-8")
    with pytest.raises(DataError, match="an index a line, got 'a.jpg'"):
        listed_subset(None, file)
    file.write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="lists no image"):
        listed_subset(names, file)
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        listed_subset(names, tmp_path / "none.txt")


def test_protocols() -> None:
    assert protocol_for("cifar100", None).lr == 0.01 and protocol_for("flowers102", None) is TRANSFER_PROTOCOL
    assert protocol_for("image_folder", 0.01) is SEMI_1_PROTOCOL and protocol_for("dtd", 0.1) is SEMI_10_PROTOCOL
    rates = [SEMI_10_PROTOCOL.learning_rate(epoch) for epoch in (11, 12, 16)]
    assert rates == pytest.approx([0.01, 0.002, 0.0004])
    assert TRANSFER_PROTOCOL.of(10).milestones == (6, 8) and TRANSFER_PROTOCOL.of(10).epochs == 10


def test_the_sub_network_has_the_features_of_its_width(model: Backbone, data: Data) -> None:
    network = sub_network(model, data, 0.5, seed=0)
    x = torch.cat([images for images, _ in data.test])
    expected, _ = features(model, data.test, 0.5)  # calibrated on the way
    with torch.no_grad():
        logits = network(x)
    torch.testing.assert_close(logits, network.fc(expected), rtol=1e-4, atol=1e-5)
    assert expected.shape[1] == 16 == network.fc.in_features and network.fc.out_features == 10
    assert isinstance(model.fc, nn.Linear) and model.fc.out_features == 7
    other = sub_network(model, data, 0.5, seed=1)
    assert not other.fc.weight.equal(network.fc.weight) and other.conv1.weight.equal(network.conv1.weight)


def test_all_of_the_network_is_trained_with_its_rates(model: Backbone, data: Data, tmp_path: Path) -> None:
    before = sub_network(model, data, 0.5, seed=0).state_dict()
    slow = replace(PROTOCOL, lr=1e-12, head_lr=0.1)
    finetune(model, data, [0.5], slow, tmp_path / "a")
    after = checkpoints.read(tmp_path / "a" / "width-0.5.pt")["network"]
    assert not after["fc.weight"].allclose(before["fc.weight"], atol=1e-4)
    torch.testing.assert_close(after["layer2.0.conv1.weight"], before["layer2.0.conv1.weight"])
    [row] = finetune(model, data, [0.5], replace(PROTOCOL, epochs=20, milestones=(15,)), tmp_path / "b")
    after = checkpoints.read(tmp_path / "b" / "width-0.5.pt")["network"]
    assert all(not after[name].equal(value) for name, value in before.items() if name.endswith(("weight", "bias")))
    assert row["accuracy"] > 30 and row["lr"] == 0.05 and row["validation"] == {} and row["width"] == 0.5


def test_a_killed_run_ends_as_an_undisturbed_one(model: Backbone, data: Data, tmp_path: Path) -> None:
    rows = finetune(model, data, [1.0, 0.25], PROTOCOL, tmp_path / "whole")

    class Killed(Exception): ...

    def kill(width: object, lr: float, epoch: int, loss: float) -> None:
        seen.append((width, epoch))
        if len(seen) == 5:
            raise Killed

    seen: list[tuple[object, int]] = []
    with pytest.raises(Killed):
        finetune(model, data, [1.0, 0.25], PROTOCOL, tmp_path / "killed", on_epoch=kill)
    assert finetune(model, data, [1.0, 0.25], PROTOCOL, tmp_path / "killed", on_epoch=kill) == rows
    assert seen == [(1.0, 1), (1.0, 2), (1.0, 3), (0.25, 1), (0.25, 2), (0.25, 3)]
    for width in ("1.0", "0.25"):
        states = [checkpoints.read(tmp_path / run / f"width-{width}.pt")["network"] for run in ("whole", "killed")]
        assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_results_of_something_else_are_refused(model: Backbone, data: Data, tmp_path: Path) -> None:
    one = replace(PROTOCOL, epochs=1)
    finetune(model, data, [0.25], one, tmp_path)
    with pytest.raises(CheckpointError, match=r"results of something else \(protocol\.epochs: 1 there, 3 here\)"):
        finetune(model, data, [0.25], PROTOCOL, tmp_path)
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"width-0\.25\.pt is not a state of this fine-tuning"):
        finetune(model, data, [0.25], one, tmp_path, seed=1)
    with pytest.raises(DataError, match="indices: expected some of the 80"):
        finetune(model, data, [0.25], one, tmp_path, indices=np.array([80]))


def test_each_width_takes_its_best_learning_rate(model: Backbone, data: Data, tmp_path: Path) -> None:
    rates, seen = (1e-12, 0.05, 1e30), []
    long = replace(PROTOCOL, epochs=12, milestones=(9,))
    [row] = finetune(
        model, data, [0.5], long, tmp_path, learning_rates=rates, on_epoch=lambda *args: seen.append(args[1])
    )
    validation = row["validation"]
    assert row["lr"] == 0.05 and validation["1e+30"] is None
    assert validation["0.05"] > validation["1e-12"]
    assert seen[:24] == [1e-12] * 12 + [0.05] * 12 and seen[-12:] == [0.05] * 12
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "width-0.5.pt"}
    with pytest.raises(TrainingError, match="not finite with any"):
        finetune(model, data, [0.5], PROTOCOL, tmp_path / "b", learning_rates=(1e30, 1e31))
    with pytest.raises(DataError, match="give one learning rate"):
        finetune(model, data, [0.5], PROTOCOL, tmp_path / "c", learning_rates=rates, indices=np.arange(4))
    with pytest.raises(TrainingError, match=r"width 0\.5: the loss is .* with learning rate 1e\+30"):
        finetune(model, data, [0.5], replace(PROTOCOL, lr=1e30), tmp_path / "d")


def test_a_choice_that_was_interrupted_goes_on(model: Backbone, data: Data, tmp_path: Path) -> None:
    seen: list[float] = []

    def stop(width: object, lr: float, epoch: int, loss: float) -> None:
        seen.append(lr)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, [0.5], PROTOCOL, tmp_path, learning_rates=(0.05, 0.1), on_epoch=stop)
    finetune(model, data, [0.5], PROTOCOL, tmp_path, learning_rates=(0.05, 0.1), on_epoch=stop)
    assert seen[:6] == [0.05] * 3 + [0.1] * 3 and len(seen) == 9


def test_accuracies_against_counting() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    logits = torch.eye(4)[torch.tensor([0, 0, 0, 1, 2, 2])].view(6, 4, 1, 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])  # all of class 0 right, a third of class 1
    assert _accuracies(Given(), [(logits, labels)]) == pytest.approx((400 / 6, 400 / 6))
    assert _accuracies(Given(), [(logits[:4], labels[:4]), (logits[4:5], labels[4:5])]) == pytest.approx((80, 75))


def test_bfloat16_trains(model: Backbone, data: Data, tmp_path: Path) -> None:
    [row] = finetune(model, data, [0.25], replace(PROTOCOL, epochs=1), tmp_path, amp="bf16")
    assert np.isfinite(row["accuracy"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny = [
        "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
        "data.train_samples=64", "data.test_samples=32", "data.batch_size=32", "method.hidden_dim=16", "method.dim=8",
        "train.epochs=1", "train.device=cpu", "train.threads=1",
    ]  # fmt: skip
    run("pretrain", *tiny, f"checkpoint.dir={folder}")
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command(trained: Path, tmp_path: Path) -> None:
    short: list[Any] = ["--epochs", 2, "--batch-size", 16]
    file = tmp_path / "rows.json"
    output = run("finetune", trained, "--widths", "1.0,0.5", "--labels", "25%", *short, "--json", file)
    assert re.search(r"fashion_mini, \d\d\.\d\d% of the labels", output)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["width"] for row in rows] == [1.0, 0.5] and {"accuracy", "per_class", "lr"} <= rows[0].keys()
    [folder] = (trained / "finetune").iterdir()
    assert folder.name.startswith("fashion_mini-") and folder.name.endswith("-labels-seed-0")
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "width-1.0.pt", "width-0.5.pt"}

    file = tmp_path / "list.txt"
    file.write_text("\n".join(map(str, range(20))), encoding="utf-8")
    out = tmp_path / "o"
    output = run("finetune", trained, "--widths", "0.5", "--labels", file, *short, "--lr", "0.1,0.01", "--out", out)
    assert "31.25% of the labels" in output and (out / "results.jsonl").is_file()
    output = run("finetune", trained, "data.size=28", "--widths", "0.5", *short, "--plot", tmp_path / "a.png")
    assert "taken with another" not in output and (trained / "finetune" / "fashion_mini" / "width-0.5.pt").is_file()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_images_may_be_fewer_than_a_batch_of_pre_training(trained: Path, tmp_path: Path) -> None:
    few = ["data.train_samples=20", "--widths", "0.5"]
    run("finetune", trained, *few, "--epochs", 1, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["width-0.5.pt"]
    assert "0.5" in run("evaluate", "knn", trained, *few)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "200%"], "--labels: expected a share such as 1%"),
        (["--labels", "0.01"], "the list of labelled images 0.01 cannot be read"),
        (["--lr", "0.1,fast"], "--lr: expected positive numbers"),
        (["--lr", "0"], "--lr: expected positive numbers"),
        (["data.name=flowers102", "data.root=/nowhere"], "put flowers-102/ with jpg/"),
        (["data.name=random"], "3 channels"),
    ],
)
def test_errors_of_the_command(trained: Path, options: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        run("finetune", trained, *options)
    assert message in str(caught.value)
