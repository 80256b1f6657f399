"""us3l.config: types, choices, ranges, nearest keys, and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from us3l import config as configs
from us3l.config import Config, DataConfig, load
from us3l.data import make_data
from us3l.errors import ConfigError


def message(*overrides: str, name: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(name, overrides)
    return str(caught.value)


def test_defaults_are_valid_and_overrides_win() -> None:
    assert load() == Config()
    config = load(None, ["train.epochs=7", "optimizer.lr=1e-3", "sampler.widths=[1.0,0.5]", "data.root=null"])
    assert (config.train.epochs, config.optimizer.lr, config.sampler.widths) == (7, 1e-3, [1.0, 0.5])
    assert isinstance(config, Config) and config.data.root is None


def test_channels_are_those_of_the_data_if_not_given() -> None:
    assert load().model.in_channels == 1
    assert load(None, ["data.name=cifar10"]).model.in_channels == 3
    assert load("mini_us3l", ["model.in_channels=null", "data.name=random"]).model.in_channels == 3
    assert load(None, ["model.in_channels=2"]).model.in_channels == 2
    trained = configs.to_dict(load())
    assert configs.from_dict(trained, ["data.name=cifar10"]).model.in_channels == 1  # what was built stays
    for name in ("fashion_mini", "random"):
        assert make_data(DataConfig(name=name), 0).in_channels == configs.CHANNELS[name]


@pytest.mark.parametrize("name", configs.recipes())
def test_every_recipe_is_valid(name: str) -> None:
    assert load(name).checkpoint.dir == f"runs/{name}"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.epoch=3", "'train.epochs'"),
        ("method.tempreature=1", "'method.temperature'"),
        ("lr=3", "'optimizer.lr'"),  # the section was forgotten
        ("regularizer.alpha=0", "'regulariser"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    text = message(override)
    assert override in text and "unknown key" in text
    assert f"did you mean {nearest}" in text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs=many", ("train.epochs", "int", "'many'")),
        ("train.epochs=1.5", ("train.epochs", "int", "1.5")),
        ("train.epochs=null", ("train.epochs", "int", "None")),
        ("data.size=[1,2]", ("data.size", "int | None", "[1, 2]")),
        ("sampler.widths=[1,a]", ("sampler.widths", "list[float]", "'a'")),
        ("optimizer.lr=fast", ("optimizer.lr", "float", "'fast'")),
        ("method.aux_head=7", ("method.aux_head", "bool", "7")),
        ("train.epochs=true", ("train.epochs", "int", "True")),
        ("model=resnet18", ("model", "section", "'resnet18'")),
    ],
)
def test_ill_typed_value_names_key_type_and_value(override: str, parts: tuple[str, ...]) -> None:
    text = message(override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["method.name=simclrr"], ("method.name", "simclr, simsiam, byol", "did you mean 'simclr'")),
        (["sampler.min_width=0"], ("sampler.min_width", "> 0 and <= 1", "0.0")),
        (["sampler.min_width=1.1"], ("sampler.min_width", "> 0 and <= 1", "1.1")),
        (["optimizer.lr=nan"], ("optimizer.lr", "finite")),
        (["data.crop_scale=[0.5,0.2]"], ("data.crop_scale", "[0.5, 0.2]")),
        (["sampler.kind=fixed", "sampler.widths=[]"], ("sampler.widths", "(0, 1]")),
        (["sampler.widths=[0.5,0.5]"], ("sampler.widths", "different")),
        (["model.norm=switchable"], ("model.norm=switchable", "sampler.kind=fixed", "'dynamic'")),
        (["sampler.kind=fixed", "sampler.widths=[1.0]"], ("method.distillation", "one width")),
        (["sampler.kind=uniform", "sampler.n=1"], ("method.distillation", "one width")),
        (["sampler.kind=sandwich", "sampler.n=1", "method.distillation=none"], ("sampler.n >= 2",)),
        (["sampler.n=1", "method.distillation=none"], ("sampler.kind=dynamic", "sampler.n >= 2", "got 1")),
        (["optimizer.momentum=1"], ("optimizer.momentum", ">= 0 and < 1", "1.0")),
        (["model.name=mobilenet_v2", "model.stem=small"], ("model.stem", "cifar or imagenet", "mobilenet_v2")),
        (["train.epochs=0"], ("train.epochs", ">= 1", "0")),
        (["regulariser.alpha=0.2"], ("regulariser.alpha", "1 / (groups - 1) = 0.1429")),
        (["train.epochs=10", "regulariser.warmup_epochs=5"], ("regulariser.warmup_epochs", "< 5")),
        (["train.epochs=10", "optimizer.warmup_epochs=10"], ("optimizer.warmup_epochs", "10")),
        (["train.accumulate=3"], ("train.accumulate", "divisor of data.batch_size=128", "got 3")),
        (["train.accumulate=2", "method.feature_weight=1"], ("train.accumulate", "method.feature_weight")),
        (["method.gather_negatives=true", "method.base_loss=cosine"], ("method.gather_negatives", "infonce")),
        (["method.gather_negatives=true", "method.name=moco_v2"], ("method.gather_negatives", "queue")),
        (["method.target=frozen"], ("method.teacher", "checkpoint")),
        (["method.feature_weight=1", "method.distillation=none"], ("method.feature_weight", "method.distillation")),
        (["method.name=supervised", "data.name=image_folder"], ("model.num_classes", "image_folder")),
        (["model.name=vit_mini"], ("model.patch_size", "a divisor of model.image_size=14", "16")),
        (["model.name=vit_mini", "model.norm=switchable", "sampler.kind=fixed"], ("model.norm=switchable", "vit_mini")),
        (["train.epochs"], ("KEY=VALUE", "'train.epochs'")),
    ],
)
def test_values_out_of_range_and_contradictions(overrides: list[str], parts: tuple[str, ...]) -> None:
    text = message(*overrides)
    assert all(part in text for part in parts), text


def test_one_width_alone_is_an_individually_trained_network() -> None:
    config = load(None, ["sampler.kind=fixed", "sampler.widths=[0.25]", "method.distillation=none"])
    assert config.sampler.widths == [0.25]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load("mini_us3l", ["train.seed=5", "optimizer.clip_norm=0.3"])
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(config), encoding="utf-8")
    assert load(str(file)) == config
    assert configs.from_dict(configs.to_dict(config)) == config
    assert configs.from_dict(configs.to_dict(config), ["train.seed=6"]).train.seed == 6


def test_bad_files_and_names(tmp_path: Path) -> None:
    assert "did you mean 'mini_us3l'" in message(name="mini_usl")
    assert "cannot read" in message(name=str(tmp_path / "missing.yaml"))
    file = tmp_path / "broken.yaml"
    file.write_text("train: {epochs: 3", encoding="utf-8")
    assert "not valid YAML" in message(name=str(file))
    file.write_bytes(b"\xff")
    assert "is not a text file" in message(name=str(file))
    file.write_text("- train\n", encoding="utf-8")
    assert "expected sections" in message(name=str(file))
    file.write_text("train:\n  epocs: 3\n", encoding="utf-8")
    assert "did you mean 'train.epochs'" in message(name=str(file))


def test_differences() -> None:
    old, new = configs.to_dict(Config()), configs.to_dict(load(None, ["optimizer.lr=1.0", "train.epochs=3"]))
    assert configs.differences(old, new) == [("optimizer.lr", 0.1, 1.0), ("train.epochs", 100, 3)]
    assert configs.differences(old, old) == []
