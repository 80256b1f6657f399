"""us3l.engine: one iteration against plain PyTorch, the schedule, and guards."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from us3l.config import Config, OptimizerConfig, load
from us3l.distributed import World
from us3l.engine import Trainer, learning_rate, resolve_device
from us3l.errors import ConfigError, DataError, TrainingError
from us3l.evaluation import evaluate
from us3l.methods import Method, StepOutput, build_method
from us3l.monitor import Monitor, WidthReading
from us3l.step import TrainStep

TINY = [
    "model.name=resnet_tiny", "model.stem=small", "model.base_channels=8", "model.divisor=4",
    "data.name=random", "data.size=8", "data.train_samples=32", "data.test_samples=8", "data.batch_size=8",
    "method.hidden_dim=16", "method.dim=8", "train.epochs=2", "train.device=cpu", "train.threads=1",
    "train.log_every=2", "checkpoint.dir=null",
]  # fmt: skip
WIDTHS = [1.0, 0.6, 0.25]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(*overrides: str) -> Config:
    return load(None, [*TINY, *overrides])


def double_method(config: Config) -> Method:
    """In float64, and with a teacher that differs from its student."""
    torch.manual_seed(0)
    method = build_method(config).double().train()
    if method.encoder_k is not None:
        with torch.no_grad():
            for parameter in method.encoder_k.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def two_views(seed: int = 1) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_iteration(method: Method, config: Config, optimizer: torch.optim.Optimizer, images: Tensor) -> list[float]:
    """The iteration of the paper, written out with nothing but torch: ordinary gradients, stock optimizer."""
    if method.encoder_k is not None:
        m = config.method.momentum
        with torch.no_grad():
            for teacher, student in zip(method.encoder_k.parameters(), method.encoder_q.parameters(), strict=True):
                teacher.copy_(m * teacher + (1 - m) * student)
    targets = method.targets(images, width=1.0)
    losses = []
    optimizer.zero_grad()
    for width in WIDTHS:
        loss, _, targets = method(images, width=width, full=width == 1.0, targets=targets)
        loss.backward()
        losses.append(loss.item())
        if config.train.step == "per_width":
            optimizer.step()
            optimizer.zero_grad()
    if config.train.step == "joint":
        optimizer.step()
    return losses


@pytest.mark.parametrize("policy", ["joint", "per_width"])
@pytest.mark.parametrize("name", ["simclr", "byol", "simsiam"])
def test_iteration_equals_plain_torch(name: str, policy: str) -> None:
    overrides = [f"method.name={name}", f"train.step={policy}", "regulariser.kind=none", "optimizer.weight_decay=0.01"]
    if name == "simsiam":
        overrides += ["method.target=live", "method.base_loss=cosine"]
    config = tiny(*overrides)
    ours, plain = double_method(config), double_method(config)
    step = TrainStep(config, ours)
    optimizer = torch.optim.SGD(plain.student_parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for i in range(2):
        losses = step(two_views(i), WIDTHS, lr=0.1, alpha=0.0).losses.tolist()
        assert losses == pytest.approx(plain_iteration(plain, config, optimizer, two_views(i)), rel=1e-10, abs=1e-12)
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def test_teacher_is_averaged_once_from_the_weights_before_the_update() -> None:
    config = tiny("method.momentum=0.75", "train.step=per_width")
    method = double_method(config)
    teacher = copy.deepcopy(method.encoder_k)
    student = copy.deepcopy(method.encoder_q)
    assert teacher is not None and method.encoder_k is not None
    TrainStep(config, method)(two_views(), WIDTHS, lr=0.1, alpha=0.0)
    for now, before, other in zip(
        method.encoder_k.parameters(), teacher.parameters(), student.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("policy", ["joint", "per_width"])
def test_group_regularisation_of_prediction_heads(policy: str) -> None:
    """At width 1.0 the published steps leave the heads alone; a joint step regularises everything once."""
    config = tiny(f"train.step={policy}", "optimizer.weight_decay=0.5", "optimizer.momentum=0")
    method = double_method(config)
    assert method.aux_predictor is not None
    before = [p.detach().clone() for p in method.aux_predictor.parameters()]
    TrainStep(config, method)(two_views(), [1.0], lr=0.1, alpha=0.0)
    for parameter, old in zip(method.aux_predictor.parameters(), before, strict=True):
        expected = old if policy == "per_width" else old * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_clip_norm_bounds_the_update() -> None:
    config = tiny(
        "optimizer.clip_norm=0.01", "optimizer.momentum=0", "regulariser.kind=none", "optimizer.weight_decay=0"
    )
    method = double_method(config)
    before = [p.detach().clone() for p in method.student_parameters()]
    TrainStep(config, method)(two_views(), WIDTHS, lr=1.0, alpha=0.0)
    moved = torch.stack([(p - b).norm() for p, b in zip(method.student_parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_batch_in_parts_is_one_update() -> None:
    """Parts with statistics of their own: against an iteration that is written out."""
    config = tiny("train.accumulate=2", "regulariser.kind=none", "optimizer.weight_decay=0.01")
    ours, plain = double_method(config), double_method(config)
    images = two_views()
    step = TrainStep(config, ours)
    losses = step(images, WIDTHS, lr=0.1, alpha=0.0).losses
    optimizer = torch.optim.SGD(plain.student_parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    parts = [torch.cat([images[start : start + 4], images[8 + start : 8 + start + 4]]) for start in (0, 4)]
    m = config.method.momentum
    assert plain.encoder_k is not None
    with torch.no_grad():
        for teacher, student in zip(plain.encoder_k.parameters(), plain.encoder_q.parameters(), strict=True):
            teacher.copy_(m * teacher + (1 - m) * student)
    total = torch.zeros(3, dtype=torch.float64)
    for part in parts:
        targets = plain.targets(part, width=1.0)
        for i, width in enumerate(WIDTHS):
            loss, _, targets = plain(part, width=width, full=i == 0, targets=targets)
            (loss / 2).backward()
            total[i] += loss.detach() / 2
    optimizer.step()
    torch.testing.assert_close(losses, total, rtol=1e-10, atol=1e-12)
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def weights_of(method: Method) -> Tensor:
    return torch.cat([p.detach().flatten() for p in method.student_parameters()])


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_amp_differs_from_full_precision_by_rounding(amp: str, dtype: torch.dtype) -> None:
    losses, moves = {}, {}
    for precision in ("none", amp):
        config = tiny(f"train.amp={precision}")
        torch.manual_seed(0)
        method = build_method(config).train()
        step = TrainStep(config, method)
        if precision == "fp16":
            step.scaler = torch.amp.GradScaler("cpu", init_scale=64)
        start = weights_of(method)
        losses[precision] = step(two_views().float(), WIDTHS, lr=0.01, alpha=0.0).losses
        moves[precision] = weights_of(method) - start
    assert losses[amp].tolist() == pytest.approx(losses["none"].tolist(), abs=0.05)
    assert not torch.equal(losses[amp], losses["none"])
    error = (moves[amp] - moves["none"]).norm() / moves["none"].norm()
    # The batch norms over few samples amplify rounding some thirty times; a scale left in the gradients gives 63.
    assert 0 < error < 60 * torch.finfo(dtype).eps


def test_fp16_skips_an_update_that_overflows() -> None:
    config = tiny("train.amp=fp16")
    torch.manual_seed(0)
    method = build_method(config).train()
    step = TrainStep(config, method)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    start = weights_of(method)
    step(two_views().float(), WIDTHS, lr=0.01, alpha=0.0)
    assert torch.equal(weights_of(method), start) and step.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.9), ("cosine", 1 - 0.1 * 0.5 * (1 - 0.5**0.5))])
def test_the_momentum_of_the_teacher_follows_its_schedule(schedule: str, last: float) -> None:
    trainer = Trainer(
        tiny("method.momentum=0.9", f"method.momentum_schedule={schedule}", "train.epochs=1", "sampler.kind=sandwich"),
        console=Console(quiet=True),
    )
    momenta: list[float] = []
    teacher = trainer.teacher
    assert teacher is not None
    update = teacher.update
    teacher.update = lambda: (momenta.append(teacher.momentum), update())  # type: ignore[method-assign]
    trainer.fit()
    assert len(momenta) == 4 and momenta[0] == pytest.approx(0.9) and momenta == sorted(momenta)
    assert momenta[-1] == pytest.approx(last)  # a quarter of the run before its end, where it would be 1


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = OptimizerConfig(lr=0.4, warmup_epochs=1)
    rates = [learning_rate(config, step, batches=4, epochs=5) for step in range(20)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4) and rates[12] == pytest.approx(0.2)
    assert all(a > b > 0 for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(config, 20, 4, 5) == pytest.approx(0.0)
    assert learning_rate(OptimizerConfig(lr=0.4), 0, 4, 5) == pytest.approx(0.4)


def test_a_run_is_deterministic_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    states, epochs = [], []
    for seed in (0, 0, 1):
        trainer = Trainer(tiny(f"train.seed={seed}", "train.knn_every=2"), on_epoch=epochs.append)
        trainer.fit()
        states.append(torch.cat([p.detach().flatten() for p in trainer.method.parameters()]))
        assert (trainer.epoch, trainer.batch) == (2, 0) and trainer.best is not None
        assert all(torch.isfinite(p).all() for p in trainer.method.parameters())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert epochs == [1, 2] * 3
    output = capsys.readouterr().out
    assert "epoch 2/2" in output and "online kNN" in output


def test_adamw_trains() -> None:
    trainer = Trainer(tiny("optimizer.name=adamw", "optimizer.lr=1e-3", "train.epochs=1"), console=Console(quiet=True))
    before = [p.detach().clone() for p in trainer.method.student_parameters()]
    trainer.fit()
    assert all(not torch.equal(p, b) for p, b in zip(trainer.method.encoder_q.parameters(), before, strict=False))


def poison(method: Method, *calls: int) -> None:
    """Make the loss NaN in these forward passes, counted from 1."""
    count = 0

    def spoil(module: Method, arguments: object, output: StepOutput) -> StepOutput:
        nonlocal count
        count += 1
        return output._replace(loss=output.loss * float("nan")) if count in calls else output

    method.register_forward_hook(spoil)


@pytest.mark.parametrize("switch", ["train.step=joint", "train.step=per_width", "train.amp=fp16"])
def test_a_step_without_a_finite_gradient_changes_nothing(switch: str) -> None:
    config = tiny(switch, "method.name=moco_v2", "method.queue_size=40")
    torch.manual_seed(0)
    method = build_method(config).train()
    step = TrainStep(config, method)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=64, enabled=step.scaler.is_enabled())
    poison(method, 4, 5, 6)
    skipped = []
    for i in range(3):
        before = {key: value.clone() for key, value in method.state_dict().items()}
        result = step(two_views(i).float(), WIDTHS, lr=0.1, alpha=0.0)
        skipped.append(result.skipped)
        changed = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
        if i == 1:  # the teacher follows the student, whose last update was a good one
            assert all(key.startswith("encoder_k") for key in changed), changed
        else:
            assert "queue.keys" in changed and "encoder_q.conv1.weight" in changed
    assert skipped == [0, 3 if switch == "train.step=per_width" else 1, 0]
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_too_many_infinite_gradients_in_a_row_end_the_run(tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=400)
    trainer = Trainer(
        tiny(f"checkpoint.dir={tmp_path}/run", "sampler.kind=sandwich", "train.max_skipped=2"), console=console
    )
    poison(trainer.method, 2, *range(6 + 1, 99))
    with pytest.raises(TrainingError, match=r"not finite \(3 updates in a row; losses: nan of width 1, .* 0\.25"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.method.parameters())
    text = console.export_text()
    assert text.count("skipped so far") == 3 and "step 4: the gradient is not finite" in text
    assert trainer.folder is not None and [path.name for path in trainer.folder] == ["step-000000004.pt"]


def test_violating_all_guidelines_warns() -> None:
    live = ["method.target=live", "method.base_loss=cosine", "method.aux_head=false", "train.epochs=1"]
    with pytest.warns(UserWarning, match="all three guidelines.*G1.*G2.*G3"):
        Trainer(tiny(*live), console=Console(quiet=True)).fit()


@pytest.mark.filterwarnings("error")
def test_one_satisfied_guideline_is_enough() -> None:
    Trainer(tiny("method.target=live", "train.epochs=1"), console=Console(quiet=True)).fit()


def read(monitor: Monitor, step: int, spread: float, rank: float, width: float = 0.5) -> None:
    monitor.read(step, [WidthReading(width, 0.0, spread, rank)], lr=0.1)


def test_collapse_is_said_once_per_width_and_not_in_the_first_epoch() -> None:
    console = Console(record=True, file=io.StringIO(), width=300)
    monitor = Monitor(console, None, epochs=3, batches=10, step=0, device=torch.device("cpu"))
    read(monitor, 5, spread=0.1, rank=1.0)
    read(monitor, 11, spread=0.9, rank=6.0)
    assert console.export_text() == ""
    read(monitor, 12, spread=0.4, rank=6.0)
    read(monitor, 13, spread=0.3, rank=6.0)
    text = console.export_text()
    assert text.count("collapsed") == 1 and "width 0.5" in text and "0.40" in text
    read(monitor, 14, spread=0.95, rank=1.5, width=1.0)  # all on a line
    assert "width 1 " in console.export_text()


class FakeWandb:
    """What is used of the package wandb."""

    def __init__(self) -> None:
        self.settings: list[dict[str, object]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.exit_codes: list[int] = []
        self.id = "abc"

    def init(self, **settings: object) -> FakeWandb:
        self.settings.append(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.setdefault(step, {}).update(values)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def test_weights_and_biases_get_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(f"checkpoint.dir={tmp_path}/mine", "train.wandb=us3l", "train.epochs=1", "train.max_skipped=0")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train.wandb=us3l needs the package wandb.*us3l\[wandb\]"):
        Trainer(config, console=Console(quiet=True)).fit()

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    broken = Trainer(config, console=Console(quiet=True))
    poison(broken.method, 4)
    with pytest.raises(TrainingError):
        broken.fit()
    Trainer(config, console=Console(quiet=True)).fit()
    assert [settings["id"] for settings in wandb.settings] == [None, "abc"]  # the second goes on with the first's
    assert wandb.settings[0]["project"] == "us3l" and wandb.settings[0]["name"] == "mine"
    assert wandb.exit_codes == [1, 0]
    assert {"lr", "images_per_second", "memory_gb", "loss/width_1", "spread/width_1"} <= wandb.logged[4].keys()


def test_an_epoch_must_have_a_batch() -> None:
    with pytest.raises(DataError, match=r"32 training images.*batch_size=17 on 2 process.*takes 34"):
        Trainer(tiny("data.batch_size=17"), world=World(0, 2))


def test_model_and_data_must_agree_in_channels() -> None:
    with pytest.raises(ConfigError, match="model.in_channels: expected 3.*got 1"):
        Trainer(tiny("model.in_channels=1"), console=Console(quiet=True))


def test_devices_that_are_not_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("warp", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=f"train.device: cannot use '{name}'"):
            resolve_device(name)


SUPERVISED = [
    "method.name=supervised", "method.base_loss=cross_entropy", "method.target=live", "method.aux_head=false",
    "data.name=fashion_mini", "data.size=14", "data.train_samples=256", "data.test_samples=100", "data.batch_size=32",
]  # fmt: skip


@pytest.mark.parametrize("distillation", ["kl", "none"])
def test_supervised_learns_at_every_width(distillation: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        tiny(*SUPERVISED, f"method.distillation={distillation}", "method.temperature=1", "sampler.kind=sandwich",
             "optimizer.lr=0.3", "train.epochs=4", "train.knn_every=4")
    )  # fmt: skip
    trainer.fit()
    rows = evaluate(trainer.method.encoder_q, trainer.data, [1.0, 0.5, 0.25], "classifier")
    assert all(row["accuracy"] > 30 for row in rows), rows  # chance: 10
    assert "test accuracy 1: " in capsys.readouterr().out
    assert trainer.best == pytest.approx((rows[0]["accuracy"] + rows[2]["accuracy"]) / 2)


def test_supervised_reads_the_labels_of_its_images() -> None:
    config = tiny(*SUPERVISED, "method.distillation=none")
    trainer = Trainer(config, console=Console(quiet=True))
    seen: list[tuple[Tensor, Tensor]] = []
    step = trainer.step
    trainer.step = lambda x, *a, labels, **k: seen.append((x, labels)) or step(x, *a, labels=labels, **k)
    trainer.fit()
    assert len(seen) == 2 * 8 and all(labels.shape == images.shape[:1] == (32,) for images, labels in seen)
    assert not torch.equal(seen[0][0], seen[8][0])
    counts = torch.bincount(torch.cat([labels for _, labels in seen[:8]]), minlength=10)
    assert torch.equal(counts, torch.bincount(torch.cat([labels for _, labels in trainer.data.train_eval])))


def test_model_and_data_must_agree_in_classes() -> None:
    with pytest.raises(ConfigError, match="model.num_classes: expected 10.*got 7"):
        Trainer(tiny(*SUPERVISED, "method.distillation=none", "model.num_classes=7"), console=Console(quiet=True))


@pytest.mark.parametrize("slicing", ["full", "mlp", "input"])
def test_a_vision_transformer_trains_and_is_evaluated(slicing: str) -> None:
    config = tiny(
        "model.name=vit_mini", "model.patch_size=4", f"model.slicing={slicing}", "method.name=moco_v3",
        "optimizer.name=adamw", "optimizer.lr=1e-3", "regulariser.kind=none", "train.knn_every=2",
    )  # fmt: skip
    assert config.model.image_size == 8
    trainer = Trainer(config, console=Console(quiet=True))
    before = [p.detach().clone() for p in trainer.method.student_parameters()]
    trainer.fit()
    after = trainer.method.student_parameters()
    assert all(not torch.equal(p, b) for p, b in zip(after, before, strict=True)) and trainer.best is not None


def test_lars_trains() -> None:
    trainer = Trainer(tiny("optimizer.name=lars", "train.epochs=1"), console=Console(quiet=True))
    before = [p.detach().clone() for p in trainer.method.encoder_q.parameters()]
    trainer.fit()
    assert all(not torch.equal(p, b) for p, b in zip(trainer.method.encoder_q.parameters(), before, strict=True))
