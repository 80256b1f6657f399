"""The Triton kernels on the CPU, by Triton's interpreter, in a process of their own: Triton reads TRITON_INTERPRET when
it is imported, and once interpreting, a process cannot compile.

What runs there are the tests of `interpreted/` (files named test_triton_*), and those of the operations, test_ops.py,
which are the same for every backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


pytestmark = pytest.mark.skipif(
    version(triton) < (3, 9) and version(numpy) >= (2, 4),
    reason="the interpreter of Triton before 3.9 makes an int of an array, which numpy refuses since 2.4",
)


def run_interpreted(*arguments: str) -> None:
    """pytest in a process that interprets; fails with its output, and if it ran nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels():
    some = "test_triton or (triton and (linear or writes_only or opcheck))"
    run_interpreted(str(HERE / "interpreted"), str(HERE.parent / "test_ops.py"), "-k", some)


@pytest.mark.slow
def test_slow_kernels():
    run_interpreted(str(HERE / "interpreted"), "-m", "slow")


@pytest.mark.slow
def test_operations():
    run_interpreted(str(HERE.parent / "test_ops.py"), "-k", "triton", "-m", "")
