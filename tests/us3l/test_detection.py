"""Detection: COCO's files, the pyramid on a sub-network, training that goes on where it was, metrics, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typer.testing import CliRunner

from us3l import checkpoint as checkpoints
from us3l import cli
from us3l.distributed import World
from us3l.errors import CheckpointError, ConfigError, DataError, TrainingError
from us3l.evaluation.detection import (
    METRICS,
    CocoImages,
    Detection,
    DetectionProtocol,
    Pyramid,
    ResidualSyncBatchNorm,
    coco_metrics,
    detector,
)
from us3l.evaluation.finetune import headless
from us3l.models import Backbone, build_model
from us3l_kernels.nn import calibrating
from us3l_kernels.width import use_width

pytest.importorskip("pycocotools")

HEIGHT, WIDTH = 40, 56
TINY = DetectionProtocol("segmentation", "sync", 3, 2, lr=0.01, warmup=2, min_size=(40, 48), max_size=64)


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("us3l.evaluation.detection.PYRAMID_CHANNELS", 16)  # the heads are most of the work
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def write_coco(root: Path, split: str, images: int, *, seed: int) -> None:
    """Bright rectangles (category 7) and dark ones (category 3) on noise; the last image is empty."""
    draw = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    listed: list[dict[str, Any]] = []
    for i in range(images):
        pixels = draw.integers(100, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for category in (3, 7) if i < images - 1 else ():
            w, h = (int(n) for n in draw.integers(10, 20, 2))
            x, y = int(draw.integers(0, WIDTH // 2 - w)), int(draw.integers(0, HEIGHT - h))
            x += WIDTH // 2 * (category == 7)  # bright ones on the right
            pixels[y : y + h, x : x + w] = 250 if category == 7 else 5
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            about = {"id": len(listed) + 1, "image_id": 10 + i, "category_id": category, "iscrowd": 0}
            listed.append({**about, "bbox": [x, y, w, h], "area": w * h, "segmentation": [outline]})
        Image.fromarray(pixels).save(root / split / f"{i}.png")
    content = {
        "info": {},
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": 7, "name": "bright"}, {"id": 3, "name": "dark"}],
        "annotations": listed,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train2017", 5, seed=0)
    write_coco(root, "val2017", 3, seed=1)
    return root


def network(name: str = "resnet_tiny", **options: Any) -> Backbone:
    torch.manual_seed(0)
    small = {"stem": "small", "divisor": 4, "base_channels": 8} if name == "resnet_tiny" else {}
    model = build_model(name, **{**small, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad(), use_width(model, 0.5), calibrating(model):
        model(torch.rand(4, 3, 64, 64))
    return model


def plain(model: Backbone) -> nn.Module:
    return headless(model, 0.5, (3, 64, 64))


# ---------------------------------------------------------------------------------------------- data


def test_images_and_targets(coco: Path) -> None:
    train = CocoImages(coco, "train2017", channels=3, masks=True, seed=0)
    test = CocoImages(coco, "val2017", channels=1, masks=False)
    assert len(train) == 4 and train.categories == [3, 7]  # without the empty image
    assert len(test) == 3 and test[0, 2][1]["boxes"].shape == (0, 4) and test[0, 0][0].shape == (1, HEIGHT, WIDTH)
    flips = 0
    for epoch in range(6):
        image, target = train[epoch, 1]
        assert image.shape == (3, HEIGHT, WIDTH) and int(target["image_id"]) == 11
        for box, label, mask in zip(target["boxes"].int(), target["labels"], target["masks"], strict=True):
            x1, y1, x2, y2 = box.tolist()
            inside = image[:, y1:y2, x1:x2].mean()  # label 1 is category 3, dark
            assert (inside < 0.4) if label == 1 else (inside > 0.6)
            assert mask[y1:y2, x1:x2].float().mean() > 0.8 and mask.sum() < 1.3 * (x2 - x1) * (y2 - y1)
        flips += not torch.equal(image, CocoImages(coco, "train2017", channels=3, masks=True)[0, 1][0])
        assert torch.equal(image, train[epoch, 1][0])
    assert 0 < flips < 6


def test_crowds_and_specks_are_not_trained_on(coco: Path, tmp_path: Path) -> None:
    content = json.loads((coco / "annotations/instances_train2017.json").read_text(encoding="utf-8"))
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["bbox"][2] = 0.5
    content["annotations"][2]["bbox"][3] = 0
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "train2017").symlink_to(coco / "train2017")
    train = CocoImages(tmp_path, "train2017", channels=3, masks=True, seed=0)
    assert len(train) == 3 and len(train[0, 0][1]["labels"]) == 1


def test_missing_and_broken_files_are_named(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train2017 is missing: expected .*/train2017/\*\.jpg and .*cocodataset"):
        CocoImages(tmp_path, "train2017", channels=3, masks=True)
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/instances_train2017.json"
    for text in ("{", "[]", '{"images": []}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"instances_train2017\.json (is no file of COCO|has 0 categories)"):
            CocoImages(tmp_path, "train2017", channels=3, masks=True)


# ---------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("resnet_tiny", [2, 4, 8, 16], [4, 8, 16]),
        ("resnet18", [4, 8, 16, 32, 64], [32, 64, 128, 256]),
        pytest.param("resnet50", [4, 8, 16, 32, 64], [128, 256, 512, 1024], marks=pytest.mark.slow),
        ("mobilenet_v2", [4, 8, 16, 32, 64], [16, 16, 48, 160]),
    ],
)
def test_the_pyramid_reads_the_stages_of_the_sub_network(name: str, strides: list[int], channels: list[int]) -> None:
    model = network(name)
    stages = list(model.stages)[-4:]
    pyramid = Pyramid(plain(model), stages, 3, norm="sync", synchronise=False).eval()
    x, expected = torch.rand(1, 3, 64, 96), []
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(lambda module, args, output: expected.append(output))
    with torch.no_grad():
        with use_width(model.eval(), 0.5):
            model.forward_features(x)
        maps = list(pyramid.maps(x).values())
        levels = pyramid(x)
    assert pyramid.strides == strides and [y.shape[1] for y in maps] == channels
    for got, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert [64 // y.shape[2] for y in levels.values()] == strides
    assert len(list(pyramid.body.parameters())) < len(list(model.parameters())) + 1


@pytest.mark.parametrize("norm", ["sync", "frozen"])
def test_norms_are_trained_or_left_alone(norm: str) -> None:
    pyramid = Pyramid(plain(network()), list(network().stages), 3, norm=norm, synchronise=False).train()
    norms = [module for module in pyramid.body.modules() if isinstance(module, _BatchNorm)]
    before = [module.running_mean.clone() for module in norms]
    sum(y.square().mean() for y in pyramid(torch.rand(2, 3, 32, 32)).values()).backward()
    frozen = norm == "frozen"
    for module, mean in zip(norms, before, strict=True):
        assert torch.equal(module.running_mean, mean) == frozen
        assert (module.weight.grad is None) == frozen and module.training == (not frozen)
    assert any(isinstance(module, _BatchNorm) for module in pyramid.fpn.modules()) == (not frozen)
    assert all(p.grad is not None for p in pyramid.body.parameters() if p.requires_grad)


def test_synchronised_norms_keep_sums_and_activations() -> None:
    stages, x = list(network().stages), torch.rand(2, 3, 32, 32)
    ordinary, synchronised = (
        Pyramid(plain(network()), stages, 3, norm="sync", synchronise=each).eval() for each in (False, True)
    )
    kinds = {type(module) for module in synchronised.body.modules() if isinstance(module, _BatchNorm)}
    assert kinds == {nn.SyncBatchNorm, ResidualSyncBatchNorm}
    for a, b in zip(ordinary.maps(x).values(), synchronised.maps(x).values(), strict=True):
        assert a.equal(b) and a.min() == 0


def test_the_detector_is_torchvisions() -> None:
    resnet = network("resnet18")
    model = detector(plain(resnet), list(resnet.stages), 80, TINY, mean=[0.5] * 3, std=[1.0] * 3)
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.roi_heads.box_predictor.cls_score.out_features == 81
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 81
    boxes_only = replace(TINY, task="detection")
    model = detector(plain(network()), list(network().stages), 2, boxes_only, mean=[0.5] * 3, std=[1.0] * 3)
    assert not model.roi_heads.has_mask() and model.transform.image_mean == [0.5] * 3


# ---------------------------------------------------------------------------------------------- training


def test_the_schedule() -> None:
    rates = [DetectionProtocol().learning_rate(i) for i in (0, 500, 1000, 59_999, 60_000, 79_999, 80_000)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.002, 0.0002])


def test_metrics_are_pycocotools(coco: Path) -> None:
    truth = CocoImages(coco, "val2017", channels=3, masks=True).coco
    found = [
        {**{key: each[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        | {"segmentation": truth.annToRLE(each)}
        for each in truth.loadAnns(truth.getAnnIds())
    ]
    for kind in ("bbox", "segm"):
        metrics = coco_metrics(truth, found, kind)
        assert list(metrics) == list(METRICS)
        assert metrics["AP"] == metrics["APs"] == pytest.approx(100) and metrics["APl"] is None
        assert coco_metrics(truth, found[:2], kind)["AP"] == pytest.approx(50.495, abs=0.1)  # recall 1/2, 101 points
        assert coco_metrics(truth, [], kind)["AP"] == 0


def run_of(coco: Path, folder: Path, *, protocol: DetectionProtocol = TINY, **options: Any) -> Detection:
    torch.manual_seed(0)
    model = detector(plain(network()), list(network().stages), 2, protocol, mean=[0.45] * 3, std=[0.2] * 3)
    model.roi_heads.fg_bg_sampler.batch_size_per_image, model.roi_heads.detections_per_img = 8, 4
    masks = protocol.task == "segmentation"
    train = CocoImages(coco, "train2017", channels=3, masks=masks, seed=0)
    test = CocoImages(coco, "val2017", channels=3, masks=masks)
    return Detection(model, train, test, protocol, folder, subject={}, **options)


def test_a_stopped_run_ends_as_an_undisturbed_one(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_of(coco, tmp_path / "whole")
    whole.fit()
    stopped = run_of(coco, tmp_path / "stopped", every_minutes=0)  # a state after every iteration
    step = stopped._step

    def kill(*args: Any) -> float:
        if stopped.iteration == 2:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(stopped, "_step", kill)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    torch.rand(3)
    goes_on = run_of(coco, tmp_path / "stopped")
    assert goes_on.iteration == 2
    goes_on.fit()
    states = [checkpoints.read(tmp_path / name / "last.pt")["model"] for name in ("whole", "stopped")]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())

    metrics = goes_on.evaluate()
    assert list(metrics) == ["box", "mask"] and metrics == run_of(coco, tmp_path / "whole").evaluate()
    with pytest.raises(CheckpointError, match="state of another run"):
        run_of(coco, tmp_path / "whole", seed=1)


def test_what_cannot_be_trained_is_said(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a batch of 9 images on 1 process.* at most the 4 training images"):
        run_of(coco, tmp_path, protocol=replace(TINY, batch_size=9))
    with pytest.raises(ConfigError, match="norm=sync on several processes needs GPUs"):
        run_of(coco, tmp_path, world=World(0, 2))
    run = run_of(coco, tmp_path, protocol=replace(TINY, task="detection", lr=1e30, warmup=0))
    with pytest.raises(TrainingError, match="not finite in iteration .*loss_objectness.*lower --lr"):
        run.fit()


# ---------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny = [
        "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
        "data.train_samples=32", "data.test_samples=32", "data.batch_size=32", "method.hidden_dim=16", "method.dim=8",
        "train.epochs=1", "train.device=cpu", "train.threads=1",
    ]  # fmt: skip
    command("pretrain", *tiny, f"checkpoint.dir={folder}")
    return folder


def command(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command(trained: Path, coco: Path) -> None:
    small = ["--iterations", 2, "--batch-size", 2, "--min-size", "40", "--max-size", 64]
    output = command("detect", trained, "--coco-root", coco, "--task", "detection", "--norm", "frozen", *small)
    assert "AP50" in output and "box" in output and "mask" not in output
    folder = trained / "detect" / "detection-width-0.5"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["box"].keys() == set(METRICS) and results["protocol"]["lr"] == 0.0025
    assert checkpoints.read(folder / "last.pt")["iteration"] == 2


def test_errors_of_the_command(trained: Path, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train2017 is missing"):
        command("detect", trained, "--coco-root", tmp_path)
    with pytest.raises(ConfigError, match="--min-size: expected positive numbers up to --max-size=1333, got '9,x'"):
        command("detect", trained, "--coco-root", coco, "--min-size", "9,x")
    vit = ["model.name=vit_mini", "model.patch_size=7", "method.hidden_dim=16", "method.dim=8", "train.epochs=1"]
    few = ["data.train_samples=8", "data.batch_size=8", "train.device=cpu", "train.threads=1"]
    command("pretrain", *vit, *few, f"checkpoint.dir={tmp_path}")
    with pytest.raises(ConfigError, match="vit_mini has none"):
        command("detect", tmp_path, "--coco-root", coco)


@pytest.mark.slow
def test_a_detector_learns(tmp_path: Path) -> None:
    """The command of docs/evaluation.md, on a backbone that has hardly been trained: AP 11, AP50 25 after 0, 0."""
    script = Path(__file__).parents[2] / "scripts" / "make_fashion_coco.py"
    subprocess.run([sys.executable, script, tmp_path / "coco"], check=True)
    command("pretrain", "--config", "mini_us3l", "train.epochs=1", f"checkpoint.dir={tmp_path / 'run'}")
    box: dict[int, dict[str, float]] = {}
    for iterations in (1, 120):
        options = ["--iterations", iterations, "--batch-size", 2, "--lr", 0.02, "--min-size", "96", "--max-size", 96]
        out, coco = tmp_path / str(iterations), tmp_path / "coco"
        command("detect", tmp_path / "run", "--coco-root", coco, "--task", "detection", *options, "--out", out)
        box[iterations] = json.loads((out / "results.json").read_text(encoding="utf-8"))["metrics"]["box"]
    assert box[1]["AP50"] < 1 and box[120]["AP"] > 4 and box[120]["AP50"] > 12


@pytest.mark.slow
def test_two_processes(trained: Path, coco: Path, tmp_path: Path) -> None:
    small = ["--iterations", "2", "--batch-size", "2", "--min-size", "40", "--max-size", "64", "--task", "detection"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "us3l"]
    options = ["detect", str(trained), "--coco-root", str(coco), *small, "--out", str(tmp_path)]
    done = subprocess.run([*launch, *options, "--norm", "frozen"], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP50") == 1
    state = checkpoints.read(tmp_path / "last.pt")
    assert state["iteration"] == 2 and len(state["rng"]) == 2 and state["subject"]["processes"] == 2
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["metrics"]["box"]["AP"] is not None
