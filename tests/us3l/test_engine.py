"""us3l.engine: one iteration against plain PyTorch, the schedule, guards, and two processes."""

from __future__ import annotations

import copy
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from us3l.config import Config, OptimizerConfig, load
from us3l.distributed import World, launched
from us3l.engine import Trainer, learning_rate, resolve_device
from us3l.errors import ConfigError, TrainingError
from us3l.evaluation import evaluate
from us3l.methods import Method, build_method
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


def test_infinite_loss_is_named(tmp_path: Path) -> None:
    trainer = Trainer(tiny(f"checkpoint.dir={tmp_path}/run", "sampler.kind=sandwich"), console=Console(quiet=True))
    calls = 0

    def poison(module: Method, arguments: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return (output[0] * float("nan") if calls == 3 + 3 else output[0], *output[1:])

    trainer.method.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"loss of width 0\.25 is nan in step 2 \(epoch 1\)"):
        trainer.fit()
    assert trainer.folder is not None and list(trainer.folder) == []


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
    monitor = Monitor(console, None, epochs=3, batches=10, step=0)
    read(monitor, 5, spread=0.1, rank=1.0)
    read(monitor, 11, spread=0.9, rank=6.0)
    assert console.export_text() == ""
    read(monitor, 12, spread=0.4, rank=6.0)
    read(monitor, 13, spread=0.3, rank=6.0)
    text = console.export_text()
    assert text.count("collapsed") == 1 and "width 0.5" in text and "0.40" in text
    read(monitor, 14, spread=0.95, rank=1.5, width=1.0)  # all on a line
    assert "width 1 " in console.export_text()


def test_model_and_data_must_agree_in_channels() -> None:
    with pytest.raises(ConfigError, match="model.in_channels: expected 3.*got 1"):
        Trainer(tiny("model.in_channels=1"), console=Console(quiet=True))


def test_devices_that_are_not_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("warp", "cuda:99"):
        with pytest.raises(ConfigError, match=f"train.device: cannot use '{name}'"):
            resolve_device(name)


WORKER = """
import sys, torch
from rich.console import Console
from us3l.config import load
from us3l.distributed import launched
from us3l.engine import Trainer

with launched("cpu") as world:
    torch.manual_seed(100 + world.rank)
    trainer = Trainer(load(None, sys.argv[2:]), world=world, console=Console(quiet=True))
    with torch.no_grad():  # process 0 alone decides where training starts: undo, then share again
        for parameter in trainer.method.parameters():
            parameter.add_(world.rank)
    world.broadcast_(trainer.method)
    widths, images = [], []
    draw, step = trainer.sampler.draw, trainer.step
    trainer.sampler.draw = lambda epoch: widths.append(draw(epoch)) or widths[-1]
    trainer.step = lambda x, *a, **k: images.append(x.clone()) or step(x, *a, **k)
    trainer.fit()
    weights = {k: v.clone() for k, v in trainer.method.state_dict().items()}
    torch.save({"weights": weights, "widths": widths, "images": images}, f"{sys.argv[1]}/{world.rank}.pt")
"""


def run_processes(folder: Path, size: int, overrides: Sequence[str], port: int) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, str(folder), *overrides]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "WORLD_SIZE": str(size)})
        for rank in range(size)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_others_wait_long_for_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with launched("cpu") as world:
        assert (world.rank, world.size) == (1, 2)
    assert given["timeout"] >= timedelta(hours=1)


class BesideAnother(World):
    """A world of two, the other of which has the given gradients."""

    def __init__(self, other: Tensor) -> None:
        object.__setattr__(self, "other", other)

    def average_(self, flat: Tensor) -> None:
        flat.add_(self.other).div_(2)


def test_two_processes_take_one_step_with_the_mean_gradient(tmp_path: Path) -> None:
    overrides = [*TINY, "train.epochs=1", "data.train_samples=16", "sampler.kind=sandwich"]
    first, second = run_processes(tmp_path, 2, overrides, free_port())
    assert first["widths"] == second["widths"] and len(first["widths"]) == 1
    assert not torch.equal(first["images"][0], second["images"][0])
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key

    config, widths = load(None, overrides), first["widths"][0]
    torch.manual_seed(config.train.seed)
    method = build_method(config).to(memory_format=torch.channels_last).train()
    other = TrainStep(config, copy.deepcopy(method))
    other(second["images"][0], widths, lr=0.0, alpha=0.0)
    both = TrainStep(config, method, BesideAnother(other.gradients.flat))
    both(first["images"][0], widths, lr=config.optimizer.lr, alpha=config.regulariser.alpha)
    for key, value in method.state_dict().items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_queue_takes_in_the_targets_of_all_processes(tmp_path: Path) -> None:
    overrides = [
        *TINY, "train.epochs=1", "data.train_samples=32", "sampler.kind=sandwich",
        "method.name=moco_v2", "method.queue_size=48",
    ]  # fmt: skip
    first, second = run_processes(tmp_path, 2, overrides, free_port())
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert int(first["weights"]["queue.position"]) == 2 * 2 * 2 * 8 % 48  # steps, processes, views, batch


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
