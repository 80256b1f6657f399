from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_plain_loop_on_two_processes():
    """A stock optimizer and DistributedDataParallel: both processes end every step with the same loss of their own."""
    code = "import examples.plain_loop as example; example.main(steps=1)"
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
    losses = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("step 0")]
    assert len(losses) == 2 and losses[0] == losses[1]
