"""Training steps with packed weights and graphs (a recording of operations stands for them) are those without."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from us3l import engine
from us3l.config import Config, load
from us3l.errors import ConfigError
from us3l.methods import Method, SimCLR, build_method
from us3l.step import TrainStep, use_graphs
from us3l_kernels import backend, nn
from us3l_kernels.plans import Plans

TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
    "data.name=random", "data.size=8", "data.batch_size=8", "method.hidden_dim=16", "method.dim=8",
    "train.device=cpu", "checkpoint.dir=null", "train.amp=bf16",
]  # fmt: skip
ITERATIONS = [[1.0, 0.6, 0.25], [1.0, 0.62, 0.25], [1.0, 0.3, 0.25], [1.0, 0.6, 0.6]]
METHODS = {
    "simclr": [],
    "per_width": ["train.step=per_width"],
    "live": ["method.name=simsiam", "method.target=live", "method.base_loss=cosine"],
    "byol": ["method.name=byol"],
    "moco_v2": ["method.name=moco_v2", "method.queue_size=32"],
    "moco_v3": ["method.name=moco_v3"],
    "dino": ["method.name=dino", "method.base_loss=kl", "method.distillation=kl"],
    "alone": ["method.distillation=none"],
    "supervised": ["method.name=supervised", "method.target=live", "method.base_loss=cross_entropy",
                   "method.distillation=kl", "method.aux_head=false"],
    "switchable": ["sampler.kind=fixed", "model.norm=switchable", "sampler.widths=[1.0,0.6,0.25]"],
    "fp16": ["train.amp=fp16"],
    "no regulariser": ["regulariser.kind=none", "optimizer.name=adamw", "optimizer.clip_norm=1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tape() -> ModuleType:
    """The tests of us3l_kernels.plans, for their stand-in of a graph."""
    path = Path(__file__).parents[1] / "kernels" / "test_plans.py"
    spec = importlib.util.spec_from_file_location("_plans_for_steps", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _on_aten() -> Iterator[None]:
    with backend("aten"):  # as on a GPU
        yield


def tiny(*overrides: str) -> Config:
    return load(None, [*TINY, *overrides])


def train(config: Config, capture: Any) -> tuple[list[torch.Tensor], TrainStep]:
    torch.manual_seed(0)
    method = build_method(config).train().to(memory_format=torch.channels_last)
    step = TrainStep(config, method)
    if step.scaler.is_enabled():
        step.scaler = torch.amp.GradScaler("cpu", init_scale=64)
    if capture is not None:
        step.plans = Plans(step.gradients, capture=capture)
    generator = torch.Generator().manual_seed(1)
    results = []
    for widths in ITERATIONS:
        if config.model.norm == "switchable":
            widths = config.sampler.widths
        images = torch.randn(8 if method.labelled else 16, 3, 8, 8, generator=generator)
        labels = torch.randint(10, (8,), generator=generator) if method.labelled else None
        images = images.to(memory_format=torch.channels_last)
        losses, projections, _ = step(images, widths, lr=0.1, alpha=0.05, labels=labels)
        results += [losses, *projections, *[value.clone() for value in method.state_dict().values()]]
    return results, step


FAST = ("simclr", "per_width", "moco_v2", "supervised")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_steps_are_those_without_plans_bit_by_bit(name: str, tape: ModuleType) -> None:
    config = tiny(*METHODS[name])
    expected, _ = train(config, None)
    given, step = train(config, tape.Tape.capture)
    assert len(given) == len(expected) and all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert step.plans is not None and step.plans.graphs >= 3


def test_calibrated_statistics_do_not_outlive_a_replayed_step(tape: ModuleType) -> None:
    _, step = train(tiny(), tape.Tape.capture)
    encoder = step.method.encoder_q
    with nn.calibrating(encoder), torch.no_grad():
        encoder(torch.randn(4, 3, 8, 8))
    assert nn.statistics(encoder)
    step(torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last), ITERATIONS[0], lr=0.1, alpha=0.0)
    assert not any(norm.calibrated for norm in encoder.modules() if isinstance(norm, nn.SlicedBatchNorm2d))


def test_evaluation_mode_is_a_plan_of_its_own(tape: ModuleType) -> None:
    _, step = train(tiny(), tape.Tape.capture)
    assert step.plans is not None
    plans = len(step.plans)
    step.method.encoder_q.fc.eval()
    with pytest.raises(RuntimeError, match="no statistics"):  # and not the replay of another mode
        step(torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last), ITERATIONS[0], lr=0.1, alpha=0.0)
    assert len(step.plans) > plans


class Own(SimCLR):
    """A method of somebody's own."""


def build(kind: type[Method], *overrides: str) -> tuple[Config, Method]:
    config = tiny(*overrides)
    method = build_method(config)
    if kind is not Method:
        method.__class__ = kind
    return config, method


def test_where_graphs_are_used(caplog: pytest.LogCaptureFixture) -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    ours, own = build(Method), build(Own)
    features = build(Method, "method.feature_weight=0.1")
    assert use_graphs(*ours, cuda)
    assert not caplog.records
    assert not use_graphs(*ours, cpu)
    assert not caplog.records  # nobody expects them there
    assert not use_graphs(*own, cuda)
    assert "no CUDA graphs: a graph repeats the kernels of a method" in caplog.text
    assert not use_graphs(*features, cuda)
    assert "method.feature_weight" in caplog.text
    for config, method in (ours, own):
        config.train.graphs = "false"
        assert not use_graphs(config, method, cuda)
        config.train.graphs = "true"
        assert use_graphs(config, method, cuda)
    with pytest.raises(ConfigError, match="train.graphs=true: CUDA graphs are for GPUs, train.device is cpu"):
        TrainStep(*ours)
    features[0].train.graphs = "true"
    with pytest.raises(ConfigError, match="train.graphs=true: the features"):
        use_graphs(*features, cuda)


@pytest.mark.parametrize(
    ("text", "value"), [("true", "true"), ("false", "false"), ("auto", "auto"), ("one", "one"), ("True", "true")]
)
def test_yaml_words(text: str, value: str) -> None:
    assert tiny(f"train.graphs={text}").train.graphs == value
    with pytest.raises(ConfigError, match="train.graphs: expected one of auto, true, false, one, got 'maybe'"):
        tiny("train.graphs=maybe")


def test_graphs_do_not_change_what_a_run_computes() -> None:
    assert "train.graphs" in engine.NOT_COMPUTED
