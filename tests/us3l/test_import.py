"""us3l.imports: the authors' checkpoints and the weights of torchvision and timm, with a report of what matched."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from us3l import checkpoint as checkpoints
from us3l import cli
from us3l.config import Config, load
from us3l.errors import CheckpointError
from us3l.imports import import_checkpoint, load_weights, read_weights
from us3l.methods import build_method
from us3l_kernels import use_width

SMALL = ["method.hidden_dim=16", "method.dim=8", "train.device=cpu", "data.name=random"]
TINY = [*SMALL, "model.name=resnet_tiny", "model.stem=small", "model.divisor=4"]


def config(*overrides: str) -> Config:
    return load(None, [*SMALL, *overrides])


def randomised(model: nn.Module) -> nn.Module:
    """`model` in evaluation mode, with affine pairs and running statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def _leave_the_generator_as_it_was() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet18", torchvision.models.resnet18),
        ("resnet50", lambda: timm.create_model("resnet50")),
        ("mobilenet_v2", torchvision.models.mobilenet_v2),
        ("mobilenet_v2", lambda: timm.create_model("mobilenetv2_100")),
    ],
    ids=["torchvision-resnet", "timm-resnet", "torchvision-mobilenet", "timm-mobilenet"],
)
def test_weights_of_a_backbone_compute_what_they_did(name: str, make: Any) -> None:
    theirs = randomised(make())
    method = build_method(config(f"model.name={name}", "model.stem=imagenet"))
    imported = load_weights(method, theirs.state_dict())
    assert imported.statistics and imported.copied
    assert all(".fc." in each or each.startswith("aux_predictor.") for each in imported.initial)
    assert all(each.startswith(("fc.", "classifier.")) for each in imported.unused) and len(imported.unused) == 2

    classifier = "fc" if hasattr(theirs, "fc") else "classifier"
    setattr(theirs, classifier, nn.Identity())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), use_width(method.encoder_q, 1.0):
        y = method.eval().encoder_q.forward_features(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    for own, teacher in zip(method.encoder_q.parameters(), method.encoder_k.parameters(), strict=True):
        assert own.shape != teacher.shape or ".fc." in imported.initial[0] or torch.equal(own, teacher)


def test_weights_of_a_vision_transformer_compute_what_they_did() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    method = build_method(
        config("model.name=vit_tiny", "model.image_size=32", "method.name=moco_v3", "regulariser.kind=none")
    )
    imported = load_weights(method, theirs.state_dict())
    assert imported.copied and not imported.statistics  # it has no batch norms
    assert sorted(imported.unused) == ["head.bias", "head.weight"]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), use_width(method.encoder_q, 1.0):
        y = method.eval().encoder_q.forward_features(x)
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def published(method: nn.Module, name: str) -> dict[str, Tensor]:
    """The state_dict of the authors' code: their names, other numbers than `method` has."""
    heads = {"simclr": {"aux_predictor.": "predictor."}, "byol": {"aux_predictor.": "predictor_new."}}[name]
    state = {}
    for key, value in method.state_dict().items():
        for ours, theirs in heads.items():
            key = key.replace(ours, theirs)
        state[f"module.{key}"] = value + 1
    return state


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_checkpoint_of_the_authors(tmp_path: Path, name: str) -> None:
    settings = config(*TINY, f"method.name={name}")
    method = build_method(settings)
    state = published(method, name)
    torch.save({"epoch": 400, "arch": "resnet_tiny", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "a")
    own = {key: value.clone() for key, value in method.state_dict().items()}
    imported = load_weights(method, read_weights(tmp_path / "a"))
    assert imported.matched == list(own) and not (imported.initial or imported.unused or imported.copied)
    assert not imported.statistics
    assert all(torch.equal(value, own[key] + 1) for key, value in method.state_dict().items())


@pytest.mark.parametrize(
    ("name", "model", "renamed"),
    [
        ("moco_v2", "resnet_tiny", {"queue.keys": "queue", "queue.position": "queue_ptr"}),
        ("moco_v3", "resnet_tiny", {"encoder_q.": "base_encoder.", "encoder_k.": "momentum_encoder."}),
        (
            "moco_v3",
            "vit_mini",
            {"encoder_q.fc.": "base_encoder.head.", "encoder_k.fc.": "momentum_encoder.head."}
            | {"encoder_q.": "base_encoder.", "encoder_k.": "momentum_encoder."},
        ),
        ("seed", "resnet_tiny", {"encoder_q.": "student.", "queue.keys": "queue", "queue.position": "queue_ptr"}),
    ],
)
def test_checkpoints_of_moco_and_seed(name: str, model: str, renamed: dict[str, str]) -> None:
    seed = ["method.target=frozen", "method.teacher=unread.pt", "method.base_loss=relational"]
    switches = seed if name == "seed" else []
    model_of = ["model.patch_size=16"] if model == "vit_mini" else ["model.stem=small"]
    settings = config(
        f"model.name={model}", *model_of, f"method.name={name}", "method.queue_size=12", *switches
    )
    method = build_method(settings)
    own = {key: value.clone() for key, value in method.state_dict().items()}
    state = {}
    for key, value in own.items():
        if key.startswith("aux_predictor."):
            continue  # of US3L
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        state[key] = value + 1
    if "queue" in state:  # as published: a column for each key, and the position in a tensor of one element
        state |= {"queue": state["queue"].T.contiguous(), "queue_ptr": state["queue_ptr"].view(1)}
    if name == "seed":
        state |= {f"teacher.layer{i}.weight": torch.zeros(3) for i in range(9)}
    imported = load_weights(method, state)
    assert all(key.startswith("aux_predictor.") for key in imported.initial) and not imported.copied
    assert all(key.startswith("teacher.") for key in imported.unused)
    for key, value in method.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith("aux_predictor.") else own[key] + 1)
    if "queue" in state:
        with pytest.raises(CheckpointError, match=r"queue.keys: \(9, 8\) in the file, \(12, 8\) here.*queue_size"):
            load_weights(method, state | {"queue": torch.zeros(8, 9)})


def test_mixed_running_statistics_are_left_out(tmp_path: Path) -> None:
    method = build_method(config(*TINY))
    state = published(method, "simclr") | {
        f"module.encoder_q.{name}.running_{which}": torch.ones(module.num_features)
        for name, module in method.encoder_q.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for which in ("mean", "var")
    }
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    imported = load_weights(method, read_weights(tmp_path / "a.pth.tar"))
    assert not imported.statistics and len(imported.unused) == 0


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    method = build_method(config(*TINY))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    state = {name: value + 1 for name, value in method.encoder_q.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"conv1.weight: \(16, 3, 7, 7\) in the file, \(16, 3, 3, 3\) here.*stem"):
        load_weights(method, state | {"conv1.weight": torch.zeros(16, 3, 7, 7)})
    del state["layer2.0.conv1.weight"]
    with pytest.raises(CheckpointError, match="1 of the .* of the backbone are not in the file .*layer2.0.conv1"):
        load_weights(method, state)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


class Hostile:
    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file at"):
        read_weights(tmp_path / "missing.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 half")
    (tmp_path / "torn.safetensors").write_bytes(b"half")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "objects.pth")
    for name in ("torn.pth", "torn.safetensors", "hostile.pth", "objects.pth"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: .* never unpickled"):
            read_weights(tmp_path / name)
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="has no weights"):
        read_weights(tmp_path / "empty.pth")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_command_and_what_comes_after(tmp_path: Path) -> None:
    few = ["data.train_samples=32", "data.test_samples=16", "data.batch_size=16", "train.epochs=1", "train.threads=1"]
    method = build_method(config(*TINY))
    backbone = {name: value + 0.01 for name, value in method.encoder_q.state_dict().items() if ".fc" not in name}
    backbone = {name: value for name, value in backbone.items() if not name.startswith("fc.")}
    save_file(backbone | {"head.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    out = tmp_path / "run" / "start.pt"
    few.append(f"checkpoint.dir={out.parent}")
    output = run("import", tmp_path / "weights.safetensors", "--out", out, *TINY, *few)
    assert f"{len(backbone)} tensors" in output and "teacher is a copy" in output
    assert "as in a new run: projector, aux_predictor" in output and "not used: head.weight" in output
    saved = checkpoints.load(out)["method"]
    assert all(torch.equal(saved[f"encoder_{x}.{name}"], value) for name, value in backbone.items() for x in "qk")
    assert "0.5" in run("evaluate", "knn", out, "--widths", "1.0,0.5")
    assert "Resuming from" in run("pretrain", "--resume", out)


def test_running_statistics_come_with_the_checkpoint(tmp_path: Path) -> None:
    theirs = randomised(torchvision.models.resnet18())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    settings = config("model.name=resnet18", "model.stem=imagenet")
    import_checkpoint(settings, tmp_path / "theirs.pth", tmp_path / "ours.pt")
    encoder = checkpoints.restore(checkpoints.load(tmp_path / "ours.pt")).encoder_q
    assert torch.equal(encoder.bn1.calibrated["1.0"][1], theirs.bn1.running_var)
