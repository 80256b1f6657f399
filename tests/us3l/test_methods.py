"""The methods: which loss each width gets, from which target, through which head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from us3l import checkpoint as checkpoints
from us3l.config import Config, MethodConfig, ModelConfig, SamplerConfig, from_dict, to_dict
from us3l.errors import CheckpointError, ConfigError
from us3l.losses import (
    cross_view,
    in_batch_contrast,
    info_nce,
    info_nce_queue,
    kl_divergence,
    mean_squared_error,
    negative_cosine,
    queue_relations,
)
from us3l.methods import GUIDELINES, Method, build_method
from us3l.schedule import group_alpha, parameter_groups, set_group_regularisation
from us3l_kernels.nn import SlicedBatchNorm1d, SlicedConv2d
from us3l_kernels.optim import SGD
from us3l_kernels.width import active_channels, use_width

NT_XENT = partial(info_nce, temperature=0.5)

# The rows of the paper's Table 1 and the ablations, as switches.
INDIVIDUAL = {"target": "live", "distillation": "none", "widths": [0.5]}
SLIMMABLE = {"target": "live", "distillation": "none", "widths": [1.0, 0.5]}
DISTILLED = {"target": "live", "distillation": "cosine", "aux_head": False, "widths": [1.0, 0.5]}
US3L = {"target": "momentum", "distillation": "cosine", "aux_head": True}
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def _config(
    name: str, *, widths: list[float] | None = None, norm: str = "sliced", model: str = "resnet_tiny", **switches: Any
) -> Config:
    base_losses = {"simsiam": "cosine", "byol": "cosine", "seed": "relational", "supervised": "cross_entropy"}
    switches.setdefault("base_loss", base_losses.get(name, "infonce"))
    vit = {"patch_size": 4, "image_size": 12} if model == "vit_mini" else {}
    return Config(
        model=ModelConfig(model, stem="small", in_channels=1, divisor=4, norm=norm, base_channels=8, **vit),
        method=MethodConfig(name, hidden_dim=12, dim=6, predictor_hidden=10, queue_size=40, **switches),
        sampler=SamplerConfig(kind="fixed", widths=widths) if widths else SamplerConfig(),
    )


def _method(name: str, **options: Any) -> Method:
    torch.manual_seed(0)
    method = build_method(_config(name, **options)).double()
    if method.encoder_k is not None:  # as after some training: a teacher that is not the student
        with torch.no_grad():
            for parameter in method.encoder_k.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return method


def _images(n: int = 8) -> Tensor:
    return torch.randn(2 * n, 1, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _views_apart(images: Tensor, module: nn.Module, width: float, *heads: nn.Module | None) -> Tensor:
    """What the published code does: two forwards, one for each view."""
    outputs = []
    with use_width(module, width):
        for view in images.chunk(2):
            y = module(view)
            for head in heads:
                y = y if head is None else head(y)
            outputs.append(y)
    return torch.cat(outputs)


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["simsiam", "simclr", "byol"])
@pytest.mark.parametrize("distillation", ["cosine", "infonce"])
@pytest.mark.parametrize("aux_head", [True, False])
def test_us3l_iteration(name: str, distillation: str, aux_head: bool) -> None:
    """Base loss at full width, distillation elsewhere, both against the teacher at full width, views crossed."""
    method, images = _method(name, target="momentum", distillation=distillation, aux_head=aux_head), _images()
    teacher = _views_apart(images, method.encoder_k, 1.0)
    base = NT_XENT if name == "simclr" else negative_cosine
    distil = NT_XENT if distillation == "infonce" else negative_cosine

    targets = method.targets(images, width=1.0)
    _assert_same(targets, teacher)
    full = method(images, width=1.0, full=True, targets=targets)
    prediction = _views_apart(images, method.encoder_q, 1.0, method.predictor)
    _assert_same(full.loss, cross_view(base, prediction, teacher))

    narrow = method(images, width=0.5, full=False, targets=full.targets)
    head = method.aux_predictor if aux_head else method.predictor
    assert (head is None) == (name == "simclr" and not aux_head)
    prediction = _views_apart(images, method.encoder_q, 0.5, head)
    _assert_same(narrow.loss, cross_view(distil, prediction, teacher))
    _assert_same(narrow.targets, teacher)

    narrow.loss.backward()
    assert all(p.grad is None for p in method.encoder_k.parameters())
    if head is not None:
        assert all(p.grad is not None for p in head.parameters())
    if head is not method.predictor and method.predictor is not None:
        assert all(p.grad is None for p in method.predictor.parameters())


@pytest.mark.parametrize("name", ["simsiam", "simclr", "byol"])
def test_live_targets_come_from_the_full_network(name: str) -> None:
    method, images = _method(name, **DISTILLED), _images()
    assert method.targets(images, width=1.0) is None and method.ema() is None and method.encoder_k is None
    base = NT_XENT if name == "simclr" else negative_cosine
    full = method(images, width=1.0, full=True, targets=None)
    projections = _views_apart(images, method.encoder_q, 1.0)
    predictions = _views_apart(images, method.encoder_q, 1.0, method.predictor)
    _assert_same(full.loss, cross_view(base, predictions, projections))
    _assert_same(full.targets, projections)
    assert not full.targets.requires_grad

    narrow = method(images, width=0.5, full=False, targets=full.targets)
    predictions = _views_apart(images, method.encoder_q, 0.5, method.predictor)
    _assert_same(narrow.loss, cross_view(negative_cosine, predictions, projections))
    _assert_same(narrow.targets, projections)


@pytest.mark.parametrize("norm", ["sliced", "switchable"])
def test_slimmable_networks_have_the_base_loss_at_every_width(norm: str) -> None:
    method, images = _method("simsiam", norm=norm, **SLIMMABLE), _images()
    targets = None
    for i, width in enumerate((1.0, 0.5)):
        loss, _, targets = method(images, width=width, full=i == 0, targets=targets)
        projections = _views_apart(images, method.encoder_q, width)
        predictions = _views_apart(images, method.encoder_q, width, method.predictor)
        _assert_same(loss, cross_view(negative_cosine, predictions, projections.detach()))


@pytest.mark.parametrize("widths", [[0.5], [1.0, 0.5]])
def test_without_distillation_the_teacher_has_the_students_width(widths: list[float]) -> None:
    """An individually trained BYOL at half width never touches the other half, nor does its teacher."""
    method, images = _method("byol", target="momentum", distillation="none", widths=widths), _images()
    targets = method.targets(images, width=widths[0])
    for i, width in enumerate(widths):
        loss, _, targets = method(images, width=width, full=i == 0, targets=targets)
        predictions = _views_apart(images, method.encoder_q, width, method.predictor)
        teacher = _views_apart(images, method.encoder_k, width)
        _assert_same(loss, cross_view(negative_cosine, predictions, teacher))


def test_simclr_has_gradients_through_both_views_unless_it_distils() -> None:
    alone, distilling = (_method("simclr", **switches) for switches in (SLIMMABLE, DISTILLED))
    images = _images()
    for method in (alone, distilling):
        method(images, width=1.0, full=True, targets=None).loss.backward()
    z = _views_apart(images, alone.encoder_q, 1.0)
    parameters = list(alone.encoder_q.parameters())
    expected = torch.autograd.grad(NT_XENT(*z.chunk(2)), parameters)
    for parameter, constant, gradient in zip(parameters, distilling.encoder_q.parameters(), expected, strict=True):
        _assert_same(parameter.grad, gradient)
        _assert_same(constant.grad, gradient / 2)


def test_teacher_of_a_distillation_runs_at_the_largest_width_there_is() -> None:
    images = _images()
    method = _method("byol", target="momentum", widths=[0.75, 0.5])
    _assert_same(method.targets(images, width=0.5), _views_apart(images, method.encoder_k, 0.75))
    method = _method("byol", target="momentum")  # random widths: 1.0, whatever was drawn
    _assert_same(method.targets(images, width=0.6), _views_apart(images, method.encoder_k, 1.0))


def test_a_narrow_width_reads_nothing_beyond_its_channels() -> None:
    method, images = _method("byol", **US3L), _images()
    targets = method.targets(images, width=1.0)
    expected = method(images, width=0.5, full=False, targets=targets)
    with torch.no_grad():
        for name, module in method.encoder_q.named_modules():
            if isinstance(module, SlicedConv2d):
                module.weight[active_channels(module.out_channels, 0.5, divisor=4) :] = torch.nan
                if name != "conv1":
                    module.weight[:, active_channels(module.in_channels, 0.5, divisor=4) :] = torch.nan
        method.encoder_q.fc[0].weight[:, active_channels(32, 0.5, divisor=4) :] = torch.nan
    poisoned = method(images, width=0.5, full=False, targets=targets)
    torch.testing.assert_close(poisoned.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(poisoned.projection, expected.projection, rtol=0, atol=0)


def test_heads() -> None:
    def names(name: str) -> list[str]:
        return [key for key, _ in _method(name, **US3L).encoder_q.fc.named_parameters()]

    norms = ["1.weight", "1.bias", "4.weight", "4.bias"]
    for name in ("moco_v2", "moco_v3"):  # published: no norms; norms, and no biases
        expected = (
            ["0.weight", "0.bias", "2.weight", "2.bias"] if name == "moco_v2" else ["0.weight", *norms[:2], "3.weight"]
        )
        assert names(name) == expected
    assert names("simsiam") == ["0.weight", *norms[:2], "3.weight", *norms[2:], "6.weight"]
    assert names("simclr") == ["0.weight", "0.bias", *norms[:2], "3.weight", "3.bias", *norms[2:], "6.weight", "6.bias"]
    assert names("byol") == ["0.weight", "0.bias", *norms[:2], "3.weight", *norms[2:], "6.weight", "6.bias"]
    shapes = {key: tuple(p.shape) for key, p in _method("byol", **US3L).aux_predictor.named_parameters()}
    assert shapes == {"0.weight": (10, 6), "1.weight": (10,), "1.bias": (10,), "3.weight": (6, 10), "3.bias": (6,)}


def test_projection_is_before_simsiams_final_norm() -> None:
    method, images = _method("simsiam", **SLIMMABLE), _images()
    _, projection, _ = method(images, width=1.0, full=True, targets=None)
    final = method.encoder_q.fc.get_submodule("7")
    assert isinstance(final, SlicedBatchNorm1d) and not final.affine
    assert not projection.requires_grad
    normalised = torch.cat([final(view) for view in projection.chunk(2)])
    _assert_same(normalised, _views_apart(images, method.encoder_q, 1.0))


# The methods with a queue, or a form of InfoNCE, of their own


@pytest.mark.parametrize("distillation", ["cosine", "infonce", "mse"])
def test_moco_v2_iteration(distillation: str) -> None:
    """Negatives are the queue's, for the distillation too; the queue takes in the teacher's projections at the end."""
    method, images = _method("moco_v2", target="momentum", distillation=distillation), _images()
    queue = method.queue.keys.clone()
    teacher = _views_apart(images, method.encoder_k, 1.0)
    contrast = partial(info_nce_queue, queue=queue, temperature=0.5)
    targets = first = method.targets(images, width=1.0)
    loss, _, targets = method(images, width=1.0, full=True, targets=targets)
    _assert_same(loss, cross_view(contrast, _views_apart(images, method.encoder_q, 1.0), teacher))
    loss, _, targets = method(images, width=0.5, full=False, targets=targets)
    distil = {"cosine": negative_cosine, "infonce": contrast, "mse": mean_squared_error}[distillation]
    _assert_same(loss, cross_view(distil, _views_apart(images, method.encoder_q, 0.5, method.aux_predictor), teacher))
    loss.backward()
    assert torch.equal(method.queue.keys, queue)

    for _ in range(3):  # 16 targets each, and room for 40
        method.finish_iteration(first)
    keys = nn.functional.normalize(teacher, dim=1)
    _assert_same(method.queue.keys, torch.cat([keys[8:], keys[8:], keys, keys[:8]]))  # rows 0 to 7 a second time
    assert int(method.queue.position) == 8


def test_queue_smaller_than_an_iteration_is_named() -> None:
    method = _method("moco_v2", **US3L)
    with pytest.raises(ConfigError, match="method.queue_size: expected at least 41.*got 40"):
        method.finish_iteration(torch.randn(41, 6, dtype=torch.float64))


@pytest.mark.parametrize("model", ["resnet_tiny", "vit_mini"])
def test_moco_v3_iteration(model: str) -> None:
    method, images = _method("moco_v3", model=model, **US3L), _images()
    teacher = _views_apart(images, method.encoder_k, 1.0)
    loss, _, targets = method(images, width=1.0, full=True, targets=method.targets(images, width=1.0))
    prediction = _views_apart(images, method.encoder_q, 1.0, method.predictor)
    _assert_same(loss, cross_view(partial(in_batch_contrast, temperature=0.5), prediction, teacher))
    narrow = method(images, width=0.5, full=False, targets=targets).loss
    prediction = _views_apart(images, method.encoder_q, 0.5, method.aux_predictor)
    _assert_same(narrow, cross_view(negative_cosine, prediction, teacher))

    (loss + narrow).backward()
    vit = model == "vit_mini"
    frozen = {name for name, p in method.named_parameters() if p.grad is None and not name.startswith("encoder_k.")}
    assert frozen == ({f"encoder_q.patch_embed.proj.{kind}" for kind in ("weight", "bias")} if vit else set())
    trained = {id(p) for group in parameter_groups(method) for p in group["params"]}
    assert trained == {id(p) for p in method.parameters() if p.grad is not None}


@pytest.mark.parametrize(("model", "aux_head"), [("resnet_tiny", True), ("resnet_tiny", False), ("vit_mini", False)])
def test_dino_iteration(model: str, aux_head: bool) -> None:
    """Cross-entropy of assignments (eq. 2 of the paper), the teacher's at full width, centred and sharpened."""
    method = _method(
        "dino", model=model, target="momentum", base_loss="kl", distillation="kl", aux_head=aux_head, temperature=0.1,
        teacher_temperature=0.04,
    )  # fmt: skip
    with torch.no_grad():
        method.center.copy_(torch.linspace(-0.3, 0.3, 6))
    images, center = _images(), method.center.clone()

    def cosines(encoder: nn.Module, width: float) -> Tensor:
        head, unit, outputs = encoder.fc, nn.functional.normalize, []
        for view in images.chunk(2):
            with use_width(encoder, width):
                y = encoder.forward_features(view)
            for layer in head:
                if isinstance(layer, nn.Linear):
                    y = nn.functional.linear(y, layer.weight[:, : y.shape[1]], layer.bias)
                elif model == "vit_mini":
                    y = y.relu()
                else:
                    y = nn.functional.batch_norm(y, None, None, layer.weight, layer.bias, training=True).relu()
            outputs.append(y)
        assert len(head) == 5
        return unit(torch.cat(outputs), dim=1) @ unit(head.prototypes, dim=1).T

    def expected(prediction: Tensor) -> Tensor:
        log_p = (prediction / 0.1).log_softmax(1)
        return -(torch.cat([teacher[8:], teacher[:8]]) * log_p).sum(1).mean()

    scores = cosines(method.encoder_k, 1.0)
    teacher = ((scores - center) / 0.04).softmax(1)
    entropy = -(teacher * teacher.log()).sum(1).mean()
    targets = first = method.targets(images, width=1.0)
    _assert_same(first, scores)
    for i, width in enumerate((1.0, 0.5)):
        loss, projection, targets = method(images, width=width, full=i == 0, targets=targets)
        prediction = cosines(method.encoder_q, width)
        if aux_head and i == 1:
            prediction = torch.cat([method.aux_predictor(view) for view in prediction.chunk(2)])
        _assert_same(loss, expected(prediction) - entropy)
        weights = [method.encoder_q.fc.prototypes, next(method.encoder_q.parameters())]
        for ours, theirs in zip(
            torch.autograd.grad(loss, weights), torch.autograd.grad(expected(prediction), weights), strict=True
        ):
            _assert_same(ours, theirs)
        assert projection.shape == (16, 256)

    assert torch.equal(method.center, center)  # one centre for all widths of an iteration
    method.finish_iteration(first)
    _assert_same(method.center, 0.9 * center + 0.1 * scores.mean(0))


def test_prototypes_of_the_teacher_follow_the_student() -> None:
    method = _method("dino", **US3L | {"base_loss": "kl", "distillation": "kl"})
    before, student = (e.fc.prototypes.clone() for e in (method.encoder_k, method.encoder_q))
    method.ema().update()
    _assert_same(method.encoder_k.fc.prototypes, 0.99 * before + 0.01 * student)
    assert not method.encoder_k.fc.prototypes.requires_grad


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """A checkpoint of a BYOL network, at the widths up to 0.75."""
    config = _config("byol", widths=[0.75, 0.5], **US3L)
    torch.manual_seed(7)
    saved = dict.fromkeys(checkpoints._KEYS)
    saved |= {"format": 1, "config": to_dict(config), "method": build_method(config).state_dict()}
    checkpoints.save(tmp_path / "teacher.pt", saved)
    return tmp_path / "teacher.pt"


def test_seed_iteration(teacher_file: Path) -> None:
    """The frozen teacher at its largest width, views not crossed, similarities to the queue, at both temperatures."""
    method = _method("seed", target="frozen", teacher=str(teacher_file), teacher_temperature=0.1, distillation="cosine")
    images, queue = _images(), method.queue.keys.clone()
    frozen = checkpoints.restore(checkpoints.load(teacher_file)).encoder_q.double().train()
    teacher = _views_apart(images, frozen, 0.75)
    first = method.targets(images, width=1.0)
    _assert_same(first, teacher)
    loss, _, targets = method(images, width=1.0, full=True, targets=first)
    relations = partial(queue_relations, queue=queue, temperatures=(0.5, 0.1))
    _assert_same(loss, relations(_views_apart(images, method.encoder_q, 1.0), teacher))
    loss, _, targets = method(images, width=0.5, full=False, targets=targets)
    prediction = _views_apart(images, method.encoder_q, 0.5, method.aux_predictor)
    _assert_same(loss, negative_cosine(prediction, teacher))
    method.finish_iteration(first)
    _assert_same(method.queue.keys[:16], nn.functional.normalize(teacher, dim=1))
    assert method.ema() is None and not any("teacher" in name for name in method.state_dict())


def test_a_frozen_teacher_serves_every_width_and_every_method(teacher_file: Path) -> None:
    switches = {"target": "frozen", "teacher": str(teacher_file), "distillation": "none", "widths": [1.0, 0.5]}
    method, images = _method("simsiam", **switches), _images()
    targets = first = method.targets(images, width=1.0)
    for i, width in enumerate((1.0, 0.5)):
        loss, _, targets = method(images, width=width, full=i == 0, targets=targets)
        predictions = _views_apart(images, method.encoder_q, width, method.predictor)
        _assert_same(loss, cross_view(negative_cosine, predictions, first))


def test_teachers_that_do_not_fit(teacher_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at missing.pt"):
        _method("seed", target="frozen", teacher="missing.pt").targets(_images(), width=1.0)
    config = to_dict(_config("seed", target="frozen", teacher=str(teacher_file)))
    config["method"]["dim"] = 7
    with pytest.raises(ConfigError, match="method.dim: expected 6, as the projections of .*teacher.pt have, got 7"):
        build_method(from_dict(config)).double().targets(_images(), width=1.0)


# Supervised


@pytest.mark.parametrize("norm", ["sliced", "switchable"])
@pytest.mark.parametrize("distillation", ["kl", "none"])
def test_supervised_iteration(norm: str, distillation: str) -> None:
    """Labels at full width; sub-networks follow its logits, or the labels as well."""
    method = _method(
        "supervised", target="live", distillation=distillation, aux_head=False, norm=norm, widths=[1.0, 0.5]
    )
    images, targets, logits = _images(4), LABELS, []
    for i, width in enumerate((1.0, 0.5)):
        loss, projection, targets = method(images, width=width, full=i == 0, targets=targets)
        with use_width(method.encoder_q, width):
            logits.append(method.encoder_q(images))
        _assert_same(projection, logits[-1].detach())
        if i == 0 or distillation == "none":
            _assert_same(loss, nn.functional.cross_entropy(logits[-1], LABELS))
        else:
            _assert_same(loss, kl_divergence(logits[1], logits[0].detach(), (0.5, 0.5)))
    assert logits[0].shape == (8, 10)
    assert [group["name"] for group in parameter_groups(method)] == ["encoder"]


# Feature distillation


def _features(module: nn.Module, images: Tensor, width: float, views_apart: bool = True) -> list[Tensor]:
    """Outputs of the stages, from two forwards for two views."""
    parts = []
    for view in images.chunk(2) if views_apart else [images]:
        with use_width(module, width):
            x, outputs = module.maxpool(module.bn1(module.conv1(view))), []
            for stage in module.stages:
                x = module.get_submodule(stage)(x)
                outputs.append(x)
        parts.append(outputs)
    return [torch.cat(stage) for stage in zip(*parts, strict=True)]


def _feature_loss(method: Method, features: list[Tensor], targets: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for projection, x, t in zip(method.feature_distillation.projections, features, targets, strict=True):
        y = nn.functional.conv2d(x, projection.weight[:, : x.shape[1]])
        total = total + (y - t.detach()).square().mean()
    return total / len(features)


@pytest.mark.parametrize("target", ["momentum", "live"])
def test_feature_distillation(target: str) -> None:
    options = {"target": target, "distillation": "cosine", "widths": [1.0, 0.5]}
    method, images = _method("byol", feature_weight=0.3, **options), _images()
    plain = _method("byol", **options)
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if "feature" not in k})
    teacher = _features(method.encoder_k or method.encoder_q, images, 1.0)
    student = _features(method.encoder_q, images, 0.5)
    targets, expected = method.targets(images, width=1.0), plain.targets(images, width=1.0)
    losses = []
    for i, width in enumerate((1.0, 0.5)):
        output = method(images, width=width, full=i == 0, targets=targets)
        other = plain(images, width=width, full=i == 0, targets=expected)
        targets, expected = output.targets, other.targets
        losses.append((output.loss, other.loss))
    _assert_same(*losses[0])
    _assert_same(losses[1][0], losses[1][1] + 0.3 * _feature_loss(method, student, teacher))
    losses[1][0].backward()
    assert all(p.grad is not None for p in method.feature_distillation.parameters())
    groups = {group["name"]: group for group in parameter_groups(method)}
    assert set(groups["projection"]["params"]) == set(method.feature_distillation.parameters())
    optimizer = SGD(groups.values(), lr=1.0)
    set_group_regularisation(optimizer, weight_decay=0.1, alpha=0.0, predictors=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_feature_distillation_with_labels() -> None:
    method = _method(
        "supervised", target="live", distillation="kl", aux_head=False, feature_weight=2.0, widths=[1.0, 0.5]
    )
    images = _images(4)
    _, full, targets = method(images, width=1.0, full=True, targets=LABELS)
    loss, narrow, _ = method(images, width=0.5, full=False, targets=targets)
    features = [_features(method.encoder_q, images, width, views_apart=False) for width in (0.5, 1.0)]
    _assert_same(loss, kl_divergence(narrow, full, (0.5, 0.5)) + 2.0 * _feature_loss(method, *features))


def test_without_feature_distillation_no_features_are_kept() -> None:
    method, images = _method("byol", **US3L), _images()
    method(images, width=0.5, full=False, targets=method.targets(images, width=1.0))
    assert method._feature_targets == [] and method.feature_distillation is None
    with pytest.raises(ConfigError, match="method.feature_weight: expected 0 for VisionTransformer"):
        _method("moco_v3", model="vit_mini", feature_weight=1.0, **US3L)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        (name, switches)
        for name in ("simsiam", "simclr", "byol")
        for switches in (INDIVIDUAL, SLIMMABLE, DISTILLED, US3L)
    ]
    + [
        (name, switches | {"target": "momentum"})
        for name in ("moco_v2", "moco_v3")
        for switches in (INDIVIDUAL, SLIMMABLE, DISTILLED, US3L)
    ]
    + [("dino", US3L | {"base_loss": "kl", "distillation": "kl"})]
    + [("supervised", INDIVIDUAL), ("supervised", SLIMMABLE), ("supervised", DISTILLED | {"distillation": "kl"})],
)
def test_every_row_trains(name: str, switches: dict[str, Any]) -> None:
    """Some iterations of each row lower its loss, and every parameter it has takes part."""
    method, images = _method(name, **switches), _images(4 if name == "supervised" else 8)
    teacher = method.ema()
    optimizer = SGD(parameter_groups(method), 0.05, 0.9)
    widths = switches.get("widths", [1.0, 0.6, 0.25])
    totals = []
    for _ in range(6):
        if teacher is not None:
            teacher.update()
        targets = LABELS if method.labelled else method.targets(images, width=widths[0])
        total = 0.0
        optimizer.zero_grad()
        for i, width in enumerate(widths):
            loss, _, targets = method(images, width=width, full=i == 0, targets=targets)
            loss.backward()
            total += loss.item()
        optimizer.step()
        totals.append(total)  # against the same negatives: a queue would fill with harder ones
    assert totals[-1] < totals[0]
    assert all(p.grad is not None for p in method.student_parameters())


def test_teacher_follows_and_is_never_trained() -> None:
    method = _method("byol", **US3L)
    student, teacher = method.encoder_q.conv1.weight, method.encoder_k.conv1.weight
    expected = 0.99 * teacher + 0.01 * student
    method.ema().update()
    _assert_same(teacher, expected)
    assert not any(p.requires_grad for p in method.encoder_k.parameters())
    trained = {id(p) for p in method.student_parameters()}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}
    groups = parameter_groups(method)
    assert [group["name"] for group in groups] == ["encoder", "predictor"]
    assert {id(p) for group in groups for p in group["params"]} == trained
    assert [group["name"] for group in parameter_groups(_method("simclr", **SLIMMABLE))] == ["encoder"]


def test_losses_are_full_precision_under_autocast() -> None:
    method, images = _method("simclr", **US3L).float(), _images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = method.targets(images, width=1.0)
        loss, projection, _ = method(images, width=1.0, full=True, targets=targets)
    assert projection.dtype == torch.bfloat16 and loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "switches", "violated"),
    [
        ("simsiam", INDIVIDUAL, []),
        ("simsiam", SLIMMABLE, ["G1", "G2", "G3"]),
        ("simsiam", DISTILLED, ["G1", "G2", "G3"]),
        ("simsiam", DISTILLED | {"aux_head": True}, ["G1", "G2"]),
        ("simsiam", DISTILLED | {"distillation": "infonce"}, ["G1", "G3"]),
        ("simclr", DISTILLED, ["G2", "G3"]),
        ("simclr", SLIMMABLE, ["G3"]),
        ("simclr", US3L, []),
        ("simclr", US3L | {"target": "live"}, ["G2"]),
        ("byol", US3L | {"aux_head": False}, ["G3"]),
        ("byol", DISTILLED | {"distillation": "relational"}, ["G1", "G3"]),
        ("byol", DISTILLED | {"distillation": "kl"}, ["G1", "G2", "G3"]),
        ("simsiam", DISTILLED | {"base_loss": "mse"}, ["G1", "G2", "G3"]),
        ("simsiam", DISTILLED | {"target": "frozen", "teacher": "x.pt"}, ["G3"]),
        ("moco_v2", US3L, []),
        ("moco_v2", DISTILLED | {"target": "momentum"}, ["G3"]),
        ("moco_v3", US3L, []),
        ("dino", US3L | {"base_loss": "kl", "distillation": "kl"}, []),
        ("seed", US3L | {"target": "frozen", "teacher": "x.pt"}, []),
        ("seed", SLIMMABLE | {"target": "frozen", "teacher": "x.pt"}, ["G3"]),
        ("supervised", INDIVIDUAL, []),
        ("supervised", SLIMMABLE, ["G3"]),
        ("supervised", DISTILLED | {"distillation": "kl"}, ["G2", "G3"]),
    ],
)
def test_guidelines(name: str, switches: dict[str, Any], violated: list[str]) -> None:
    assert _method(name, **switches).violates_guidelines() == violated
    assert set(violated) <= GUIDELINES.keys()


def test_bad_use_is_named() -> None:
    images = _images()
    with pytest.raises(ValueError, match=r"targets: expected those of Method.targets\(\)"):
        _method("byol", **US3L)(images, width=1.0, full=True, targets=None)
    with pytest.raises(ValueError, match="targets"):
        _method("simsiam", **DISTILLED)(images, width=0.5, full=False, targets=None)
    with pytest.raises(ValueError, match="targets: expected the labels"):
        _method("supervised", **SLIMMABLE)(images, width=1.0, full=True, targets=None)
    with pytest.raises(ValueError, match="method.name must be one of simsiam, simclr, byol, .*, got 'moco'"):
        _method("moco")
    for name, switches, text in (
        ("byol", {"base_loss": "l2"}, "method.base_loss: byol has infonce or cosine .* or relational, got 'l2'"),
        ("moco_v2", {"target": "live"}, "method.target: moco_v2 has momentum, got 'live'"),
        ("moco_v2", {"base_loss": "cosine"}, "method.base_loss: moco_v2 has infonce, got 'cosine'"),
        ("moco_v3", {"base_loss": "mse"}, "method.base_loss: moco_v3 has infonce, got 'mse'"),
        ("dino", {}, "method.base_loss: dino has kl, got 'infonce'"),
        ("dino", {"base_loss": "kl", "target": "live"}, "method.target: dino has momentum, got 'live'"),
        ("seed", {"target": "momentum"}, "method.target: seed has frozen, got 'momentum'"),
        ("supervised", {"target": "momentum"}, "method.target: supervised has live, got 'momentum'"),
        ("supervised", {"base_loss": "cosine"}, "method.base_loss: supervised has cross_entropy, got 'cosine'"),
        ("supervised", DISTILLED | {"aux_head": True}, "method.aux_head: expected false for supervised"),
    ):
        with pytest.raises(ConfigError, match=text):
            _method(name, **switches)


def test_group_alpha_ramps_between_the_warm_up_and_half_of_the_run() -> None:
    alphas = [group_alpha(epoch, 20, 4, 0.06) for epoch in range(20)]
    assert alphas[:5] == [0.0] * 5
    assert alphas[5:10] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert alphas[10:] == [0.06] * 10
    assert [group_alpha(epoch, 3, 0, 0.05) for epoch in range(3)] == [0.0, 0.05, 0.05]
    assert group_alpha(0, 1, 0, 0.05) == 0.05
    assert [group_alpha(epoch, 10, 7, 0.05) for epoch in (6, 7)] == [0.0, 0.05]


def test_regularisation_reaches_the_heads_except_in_steps_of_full_width() -> None:
    """The decay is that of the loss form: its gradient 2 lambda_g p, on top of no other gradient here."""
    method = _method("byol", **US3L)
    optimizer = SGD(parameter_groups(method), lr=1.0, groups=2)
    conv, head = method.encoder_q.conv1.weight, method.aux_predictor.get_submodule("3").weight
    conv_before, head_before = conv.detach().clone(), head.detach().clone()
    set_group_regularisation(optimizer, weight_decay=0.1, alpha=0.5, predictors=False)
    optimizer.step()
    factors = torch.tensor([0.1] * 4 + [0.05] * 4, dtype=torch.float64).view(8, 1, 1, 1)  # halves of 8 channels
    _assert_same(conv, conv_before * (1 - factors))
    torch.testing.assert_close(head, head_before, rtol=0, atol=0)
    set_group_regularisation(optimizer, weight_decay=0.1, alpha=0.5, predictors=True)
    optimizer.step()
    _assert_same(head, head_before * 0.9)
