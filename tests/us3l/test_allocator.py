"""Memory of freed tensors stays in the process, unless the user has settings of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")

COUNT = """
import resource, torch
from us3l.allocator import keep_freed_memory
print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
before = faults()
for _ in range(5):
    torch.ones(16 << 20)
print(faults() - before)
"""


def run(**environment: str) -> tuple[bool, int]:
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", COUNT], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_the_next_tensor_takes_the_memory_of_the_last() -> None:
    kept, faults = run()
    assert kept and faults < 100  # 64 MB are 16384 pages, or 32 huge ones


def test_settings_of_the_user_are_left_alone() -> None:
    kept, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept and faults > 100
