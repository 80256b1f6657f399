from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    lines = done.stdout.splitlines()
    losses = [line.split()[-1] for line in lines if "step 1 " in line]
    norms = [line.split()[-1] for line in lines if "norm" in line]
    assert len(losses) == len(norms) == 2
    assert losses[0] != losses[1] and norms[0] == norms[1]
