"""The machine code of the Triton kernels, compiled without a GPU: see benchmarks/static.py for what is gated.

Registers are held against the table of this version of Triton in benchmarks/results/static/, where there is one.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import static
from us3l_kernels.triton import KERNEL_FILES

triton = pytest.importorskip("triton")

TYPICAL = (
    "forward 3x3 bf16 128x128x64",
    "dX 3x3/2 bf16 128x128x64",
    "dW 3x3 bf16 128x128x64",
    "batch norm sums +relu6 +residual bf16 64x64",
    "depthwise forward 3x3 bf16",
)
OF_H100 = (
    "TMA forward 1x1 +bias bf16 128x128x64",
    "dX 3x3 +added +sums by y, relu6, any width bf16 128x128x64",
    "dW 3x3, any width bf16 128x128x64",
)
MORE_REGISTERS = 8  # than were recorded for this version of Triton
TABLES = sorted(static.RESULTS.glob("*.json"))


@cache
def table(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def most_registers(binary: static.Binary, capability: int) -> int:
    """By the table of this version of Triton; 255, the most that there are, if it has none for these GPUs."""
    file = static.path(static.RESULTS, triton.__version__)
    rows = [row for row in table(file)["rows"] if row["capability"] == capability] if file.exists() else []
    return {row["name"]: row["registers"] for row in rows}[binary.name] + MORE_REGISTERS if rows else 255


def check(binary: static.Binary, capability: int) -> None:
    code = static.compile_binary(binary, capability)
    assert static.problems(code, binary) == [], binary.name
    assert code.registers <= most_registers(binary, capability), binary.name


@pytest.mark.parametrize(
    "name,capability",
    [*((name, capability) for capability in (80, 90) for name in TYPICAL), *((name, 90) for name in OF_H100)],
)
def test_typical_binaries(name, capability):
    check(next(b for b in static.binaries(capability) if b.name == name), capability)


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_tables_are_of_the_binaries_that_are_shipped(file):
    """`us3l bench static` makes a table anew: kernels that are gone, new ones, and what is not well have no place."""
    rows = table(file)["rows"]
    for capability in {row["capability"] for row in rows}:
        names = {row["name"] for row in rows if row["capability"] == capability}
        assert names == {binary.name for binary in static.binaries(capability)}
    assert [row["name"] for row in rows if row["problems"]] == []
    assert file.with_suffix(".md").read_text(encoding="utf-8") == static.markdown(table(file))


@pytest.mark.slow
@pytest.mark.parametrize("capability", static.CAPABILITIES)
def test_every_binary(capability):
    for binary in static.binaries(capability):
        check(binary, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", static.CAPABILITIES)
def test_every_binary_of_steps(capability):
    more = static.binaries_of_steps(capability)
    assert len(more) > 100
    for binary in more:
        assert static.problems(static.compile_binary(binary, capability), binary) == [], binary.name


def test_names_tell_binaries_apart():
    for capability in static.CAPABILITIES:
        names = Counter(binary.name for binary in static.binaries(capability))
        assert max(names.values()) == 1, names.most_common(3)


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_one_binary_serves_every_width(file):
    """No argument's value makes Triton compile anew: not a 1, not a multiple of 16."""
    kernels = {binary.kernel for binary in import_module(f"us3l_kernels.triton.{file}").binaries(90)}
    assert kernels
    for kernel in kernels:
        for p in kernel.params:
            assert p.is_constexpr or p.name.endswith("_ptr") or p.do_not_specialize, f"{kernel.__name__}: {p.name}"


@pytest.mark.parametrize(
    "instruction,kind",
    [
        ("HGMMA.64x128x16.F32.BF16", "HGMMA"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "load 16"),
        ("LDG.E.U16.CONSTANT", "load 2"),
        ("LDG.E", "load 4"),
        ("STG.E.64", "store 8"),
        ("STL.64", "spill"),
        ("REDG.E.ADD.F32", "atomic 4"),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomic 4"),
        ("ATOMG.E.EXCH.STRONG.GPU", None),
        ("UTMALDG.2D", "load tma"),
        ("FADD", None),
    ],
)
def test_instructions_are_told_apart(instruction, kind):
    assert static._kind(instruction) == kind


def test_what_is_wrong_is_said():
    binary = next(b for b in static.binaries(90) if b.name == TYPICAL[0])
    well = static.Code(binary.name, 90, 128, 0, 1 << 17, {"HGMMA": 4, "load 16": 8, "store 16": 8})
    assert static.problems(well, binary) == []
    for change, word in (
        ({"stack": 8}, "stack"),
        ({"shared": 228 << 10}, "shared memory"),
        ({"instructions": {"HMMA": 4}}, "HGMMA"),
        ({"instructions": {"HGMMA": 4, "HMMA": 1}}, "HGMMA alone"),
        ({"instructions": {"HGMMA": 4, "load 2": 1}}, "less than 16 bytes"),
        ({"instructions": {"HGMMA": 4, "atomic 4": 1}}, "order"),
    ):
        found = static.problems(static.Code(**{**vars(well), **change}), binary)
        assert len(found) == 1 and word in found[0], (change, found)
