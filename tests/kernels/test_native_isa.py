"""The native operations with the instruction sets that this CPU would not choose: the library reads US3L_ISA once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from us3l_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "portable": [],
    "avx2": ["avx2", "fma"],
    "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"],
}
# Every tail of the channels, and drawn shapes of every operation.
SELECTED = "tail or any_shapes or (safety and any_shape)"
RUN = """
import sys, pytest
from us3l_kernels import _native
isa, *arguments = sys.argv[1:]
assert _native.isa() == isa
sys.exit(pytest.main(arguments))
"""


@pytest.mark.skipif(_native.isa() is None, reason=f"no native library that tells its instruction set: {_native.why}")
@pytest.mark.parametrize("isa", NEEDED)
def test_every_instruction_set(isa: str) -> None:
    if isa == _native.isa():
        pytest.skip("what the other tests run with")
    if not all(_native.cpu_features().get(feature) for feature in NEEDED[isa]):
        pytest.skip(f"this CPU has no {isa}")
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_native_*.py") if path != Path(__file__))
    done = subprocess.run(
        [sys.executable, "-c", RUN, isa, "-q", "-p", "no:cacheprovider", "-k", SELECTED, *files],
        cwd=ROOT,
        env={**os.environ, "US3L_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
