"""us3l.export: models that run without this package and equal the sliced network, or no file at all."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from typer.testing import CliRunner

from us3l import cli
from us3l import export as exports
from us3l.evaluation import calibrate
from us3l.export import ExportError, export
from us3l.models import Backbone, build_model
from us3l_kernels import use_width
from us3l_kernels.width import Width

SHAPE = (3, 16, 16)
PLAN = {"": 0.5, "layer2": 0.25}


def backbone(name: str = "resnet_tiny", width: Width = 0.5, **options: Any) -> Backbone:
    """A calibrated backbone with affine pairs that are not the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(name, **{"stem": "cifar", "divisor": 4, **options})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        calibrate(model, [(torch.randn(4, *SHAPE), torch.zeros(4))], width)
    return model.eval()


def images(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def expected(model: Backbone, width: Width, x: Tensor) -> Tensor:
    with use_width(model, width):
        return model(x)


def run_alone(program: str, *arguments: object) -> None:
    """Run Python in another process, where this package cannot be imported."""
    block = "import sys; sys.modules['us3l'] = sys.modules['us3l_kernels'] = None\n"
    done = subprocess.run([sys.executable, "-c", block + program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("width", "fold"), [(0.5, True), (PLAN, False)], ids=["width-folded", "plan-norms"])
def test_program(tmp_path: Path, width: Width, fold: bool) -> None:
    model = backbone(width=width)
    written = export(model, width, tmp_path / "a.pt2", image_shape=SHAPE, fold=fold, about={"data": "random"})
    extra: dict[str, Any] = {"us3l.json": ""}
    program = torch.export.load(written.path, extra_files=extra)
    for n in (1, 2, 7):  # any batch size
        y = program.module()(images(n))
        torch.testing.assert_close(y, expected(model, width, images(n)), rtol=1e-4, atol=1e-5)
    about = json.loads(extra["us3l.json"])
    assert about["data"] == "random" and about["features"] == y.shape[1] == written.features and about["folded"] == fold
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("batch_norm" in target for target in targets) != fold
    assert not any("us3l" in target for target in targets)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


ALONE = """
import torch
sys.path.insert(0, sys.argv[1])
from model import load
images, expected = torch.load(sys.argv[2])
network = load()
assert not network.training
torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
"""


def test_safetensors_with_a_model_file_runs_without_this_package(tmp_path: Path) -> None:
    model = backbone(width=PLAN)
    written = export(model, PLAN, tmp_path / "small", image_shape=SHAPE, format="safetensors")
    source = (written.path / "model.py").read_text(encoding="utf-8")
    assert "class ResNet(nn.Module)" in source and "getattr" not in source and "None" not in source
    assert max(map(len, source.splitlines())) <= 120
    torch.save((images(3), expected(model, PLAN, images(3))), tmp_path / "pair.pt")
    run_alone(ALONE, written.path, tmp_path / "pair.pt")
    about = json.loads((written.path / "config.json").read_text(encoding="utf-8"))
    assert about["width"] == "layer2=0.25,*=0.5" and about["image_shape"] == list(SHAPE)
    assert about["macs"] == written.macs and about["params"] == written.params


def test_names_and_layers_are_those_of_torchvision(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = backbone("resnet18", 1.0, stem="imagenet")
    written = export(model, 1.0, tmp_path / "full", image_shape=SHAPE, format="safetensors")
    theirs = torchvision.models.resnet18(num_classes=1)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(load_file(written.path / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images(2)), expected(model, 1.0, images(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet_tiny", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_onnx(tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = backbone(name)
    written = export(model, 0.5, tmp_path / "a.onnx", image_shape=SHAPE, format="onnx", fold=name == "mobilenet_v2")
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    for n in (1, 4):
        (y,) = session.run(None, {"images": images(n).numpy()})
        torch.testing.assert_close(torch.from_numpy(y), expected(model, 0.5, images(n)), rtol=1e-3, atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["us3l.width"] == '"0.5"'


def test_a_classifier_stays_and_a_projector_goes(tmp_path: Path) -> None:
    model = backbone(num_classes=7)
    assert export(model, 0.5, tmp_path / "a", image_shape=SHAPE, format="safetensors").features == 7
    model.fc = nn.Sequential(nn.Linear(64, 8))
    assert export(model, 0.5, tmp_path / "b", image_shape=SHAPE, format="safetensors").features == 32
    assert isinstance(model.fc, nn.Sequential)


def test_switchable_norms(tmp_path: Path) -> None:
    model = backbone(norm="switchable", widths=[1.0, 0.5])
    written = export(model, 0.5, tmp_path / "a", image_shape=SHAPE, format="safetensors", fold=True)
    network = runpy.run_path(str(written.path / "model.py"))["load"]()
    torch.testing.assert_close(network(images(3)), expected(model, 0.5, images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slicing", ["input", "full"])
def test_vision_transformer(tmp_path: Path, slicing: str) -> None:
    model = build_model("vit_mini", slicing=slicing, image_size=16, patch_size=8).eval()
    export(model, 0.5, tmp_path / "a.pt2", image_shape=SHAPE)
    program = torch.export.load(tmp_path / "a.pt2").module()
    written = export(model, 0.5, tmp_path / "a", image_shape=SHAPE, format="safetensors")
    network = runpy.run_path(str(written.path / "model.py"))["load"]()
    for y in (program(images(3)), network(images(3))):
        torch.testing.assert_close(y, expected(model, 0.5, images(3)), rtol=1e-4, atol=1e-5)
    assert written.features == (32 if slicing == "full" else 64)


def test_nothing_is_written_where_the_results_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone()

    def wrong(network: nn.Module, width: Width, example: Tensor) -> nn.Module:
        dense = standalone(network, width, example)
        with torch.no_grad():
            dense.bn1.bias[0] += 1e-6
        return dense

    standalone = exports.standalone
    with monkeypatch.context() as patched:
        patched.setattr(exports, "standalone", wrong)
        with pytest.raises(ExportError, match="the plain network differs from the sub-network by .* Nothing was"):
            export(model, 0.5, tmp_path / "a.pt2", image_shape=SHAPE)

    def torn(plain: nn.Module, x: Tensor, path: Path, metadata: dict[str, Any]) -> exports.Run:
        path.write_bytes(b"half")
        return lambda x: torch.full((len(x), 32), torch.nan)

    monkeypatch.setitem(exports.FORMATS, "torch", torn)
    with pytest.raises(ExportError, match="the written model .torch. differs"):
        export(model, 0.5, tmp_path / "a.pt2", image_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone()
    with pytest.raises(ValueError, match="format: expected one of torch, safetensors, onnx, got 'tflite'"):
        export(model, 0.5, tmp_path / "a", image_shape=SHAPE, format="tflite")
    with pytest.raises(RuntimeError, match="no statistics"):
        export(model, 0.75, tmp_path / "a", image_shape=SHAPE)
    with pytest.raises(ExportError, match="exists already"):
        export(model, 0.5, tmp_path, image_shape=SHAPE, format="safetensors")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="pip install us3l.onnx."):
        export(model, 0.5, tmp_path / "a.onnx", image_shape=SHAPE, format="onnx")

    class Choosy(type(model)):  # type: ignore[misc]
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x if x.sum() > 0 else -x)

    model.__class__ = Choosy
    with pytest.raises(ExportError, match="Choosy cannot be traced by torch.fx"):
        exports.plain_graph(model, images(2))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the command

TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
    "data.train_samples=64", "data.test_samples=32", "data.batch_size=32", "method.hidden_dim=16", "method.dim=8",
    "train.epochs=1", "train.device=cpu",
]  # fmt: skip


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        run("pretrain", *TINY, f"checkpoint.dir={folder}")
    return folder


def test_command(trained: Path, tmp_path: Path) -> None:
    output = run("export", trained, "--width", "0.5,layer3=0.25", "--format", "safetensors")
    folder = trained / "export" / "resnet_tiny_0.5,layer3=0.25"
    assert str(folder) in output and "8 features" in output
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert about["checkpoint"] == "step-000000002.pt" and about["data"] == "fashion_mini"
    assert run("export", trained, "--out", tmp_path / "a.pt2", "--fold")
    assert torch.export.load(tmp_path / "a.pt2").module()(torch.zeros(2, 1, 14, 14)).shape == (2, 16)


def test_a_calibrated_checkpoint_needs_no_data(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-000000002.pt").write_bytes((trained / "step-000000002.pt").read_bytes())
    run("calibrate", tmp_path, "--widths", "0.5")
    monkeypatch.setattr("us3l.data.make_data", None)
    run("export", tmp_path, "--format", "safetensors")



