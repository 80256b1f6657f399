"""Training steps whose passes read their width from memory, interpreted: one recorded pass serves every width."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import us3l_kernels
from us3l import step as steps
from us3l.config import Config, load
from us3l.errors import ConfigError
from us3l.methods import METHODS, build_method
from us3l.models.backbone import Backbone
from us3l.models.layers import Layers
from us3l.step import TrainStep, one_for_all_widths
from us3l_kernels.nn import conv_norm
from us3l_kernels.plans import Plans

TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "data.name=random", "data.size=8",
    "data.batch_size=4", "method.hidden_dim=16", "method.dim=8", "train.device=cpu", "checkpoint.dir=null",
]  # fmt: skip
ITERATIONS = [[1.0, 0.5], [1.0, 0.3], [1.0, 0.7]]  # the first is a warm-up, the second recorded, the third replayed


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # memory that is not initialised is NaN
    with us3l_kernels.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


class OneLayer(Backbone):
    feature_dim = 16

    def __init__(self) -> None:
        super().__init__()
        layers = Layers()
        self.conv1 = layers.conv(3, 16, 3, 2)
        self.bn1 = layers.norm(16, "relu")
        self.maxpool = nn.MaxPool2d(2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.maxpool(conv_norm(x, self.conv1, self.bn1)).mean((2, 3))


def recall(work: Callable[[], None]) -> Callable[[], None]:
    """A `plans.Capture`: it calls the recorded pass as it was, with the width of then."""
    return work


def train(config: Config, small: bool, in_one: bool) -> tuple[list[Tensor], TrainStep]:
    torch.manual_seed(0)
    method = METHODS[config.method.name](OneLayer(), config.method) if small else build_method(config)
    step = TrainStep(config, method.train().to(memory_format=torch.channels_last))
    if in_one:
        step.plans = Plans(step.gradients, capture=recall)
        step.any_width = one_for_all_widths(method)
    generator = torch.Generator().manual_seed(1)
    results = []
    for widths in ITERATIONS:
        images = torch.randn(8, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        losses, projections, skipped = step(images, widths, lr=0.1, alpha=0.05)
        assert not skipped
        results += [losses, *projections, *[value.clone() for value in method.state_dict().values()]]
    return results, step


@pytest.mark.parametrize(
    "overrides,small",
    [
        ([], True),
        *(
            pytest.param(overrides, small, marks=pytest.mark.slow)
            for overrides, small in (
                (["model.stem=cifar"], False),
                (["method.distillation=none"], True),
                (["train.step=per_width", "method.name=byol"], True),
                (["method.name=simsiam", "method.target=live", "method.base_loss=cosine"], True),
            )
        ),
    ],
    ids=str,
)
def test_steps_are_those_of_passes_for_each_width(overrides: list[str], small: bool) -> None:
    config = load(None, [*TINY, *overrides])
    with us3l_kernels.backend("triton" if overrides else "aten"):  # of few samples other roundings grow
        expected, _ = train(config, small, in_one=False)
    given, step = train(config, small, in_one=True)
    for a, b in zip(given, expected, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm()
    has_teacher = step.method.config.target != "live"
    assert step.plans is not None and step.plans.graphs == len(step.plans) == 2 + has_teacher
    # What was replayed did not know of the last width.
    assert step.method.encoder_q.conv1.active_width == 0.3  # type: ignore[union-attr]


def test_networks_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(None, [*TINY, "train.graphs=one"])
    with pytest.raises(ConfigError, match="train.graphs=one: CUDA graphs are for GPUs, train.device is cpu"):
        TrainStep(config, build_method(config))
    monkeypatch.setattr(steps, "use_graphs", lambda *_: False)
    assert TrainStep(config, build_method(config)).any_width is not None
    config = load(None, [*TINY, "train.graphs=one", "sampler.kind=fixed", "model.norm=switchable",
                         "sampler.widths=[1.0,0.5]"])  # fmt: skip
    with pytest.raises(ConfigError, match="train.graphs=one: any width: 'encoder_q.bn1' cannot read its channels"):
        TrainStep(config, build_method(config))
