from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples import elastic_stages, matformer
from us3l.checkpoint import load as load_checkpoint
from us3l.checkpoint import restore
from us3l.config import load
from us3l.engine import Trainer
from us3l.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_plain_loop_on_two_processes():
    """A stock optimizer and DistributedDataParallel: other images, other losses, and yet the same weights."""
    code = "import examples.plain_loop as example; example.main(steps=2)"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--no-python",
            sys.executable,
            "-c",
            code,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Two processes write here: one's line may begin before the other's has ended.
    losses = re.findall(r"step 1  loss at width 0.25: (\d+\.\d{3})", done.stdout)
    norms = re.findall(r"norm of the weights: (\d+\.\d+)", done.stdout)
    assert len(losses) == len(norms) == 2
    assert losses[0] != losses[1] and norms[0] == norms[1]


def test_matformer_gives_every_granularity_and_a_mixture():
    losses = matformer.main(steps=8)
    assert list(losses) == ["1", "0.5", "0.25", "0.125", "mixed"]
    assert len(set(losses.values())) == 5  # five networks
    assert all(loss < math.log(256) for loss in losses.values())  # better than guessing


def test_elastic_stages_trains_calibrates_and_takes_out_sub_networks():
    found = elastic_stages.main(steps=4)
    assert list(found) == ["full", "half", "smallest", "a random plan"]
    assert all(0 <= accuracy <= 100 for accuracy in found.values()) and max(found.values()) > 10  # guessing has 10


@pytest.mark.parametrize("options", [["method.target=live"], ["method.target=momentum", "method.distillation=none"]])
def test_a_method_of_ones_own_is_found_by_its_name(options, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    overrides = [
        "method.name=own_method:BarlowTwins", "method.options.off_diagonal=0.02", "method.hidden_dim=16",
        "method.dim=8", "model.base_channels=8", "model.divisor=4", "data.train_samples=64", "data.batch_size=32",
        "data.test_samples=100", "train.epochs=4", "train.device=cpu", f"checkpoint.dir={tmp_path}",
    ]  # fmt: skip
    trainer = Trainer(load(None, [*overrides, *options]), console=Console(quiet=True))
    p, t = torch.randn(2, 16, 8)
    c = p.T @ t / 16
    on, off = (c.diagonal() - 1).square().sum(), c.square().sum() - c.diagonal().square().sum()
    torch.testing.assert_close(trainer.method.base_loss(p, t), on + 0.02 * off)
    trainer.fit()
    restored = restore(load_checkpoint(tmp_path / "step-000000008.pt"))
    assert type(restored).__name__ == "BarlowTwins" and restored.off_diagonal == 0.02


@pytest.mark.parametrize(
    ("name", "message"),
    [("own_method:Missing", "cannot import"), ("missing_module:X", "PYTHONPATH"), ("json:JSONDecoder", "no subclass")],
)
def test_a_method_that_is_not_there_is_named(name, message, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(ConfigError, match=f"method.name.*{message}"):
        Trainer(load(None, [f"method.name={name}"]), console=Console(quiet=True))
