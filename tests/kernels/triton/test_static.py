"""The machine code of the Triton kernels, compiled without a GPU: see benchmarks/static.py for what is gated."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks import static

TYPICAL = ("forward 3x3 bf16 128x128x64", "dX 3x3 bf16 128x128x64", "dW 3x3 bf16 128x128x64")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", TYPICAL)
def test_typical_binaries(name, capability):
    binary = next(b for b in static.binaries(capability) if b.name == name)
    assert static.problems(static.compile_binary(binary, capability), binary) == []
