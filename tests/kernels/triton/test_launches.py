"""What a GPU would be asked to compile and launch, by Triton's own launcher: see benchmarks/launches.py."""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import launches, static
from benchmarks.launches import Launch, Step
from us3l_kernels import triton
from us3l_kernels.triton import conv2d

WIDTHS = (*launches.WIDTHS, 0.9, 0.75, 0.5, 0.35, 0.3)
SMALL = ("resnet18", 32, 128), ("mobilenet_v2", 224, 128)


@cache
def recorded(step: Step) -> list[list[Launch]]:
    return step.record(90, WIDTHS)


def launches_of(step: Step) -> list[Launch]:
    return [launch for of_width in recorded(step) for launch in of_width]


steps = pytest.mark.parametrize(
    "step",
    [Step(*network, any_width=any_width) for network in SMALL for any_width in (False, True)],
    ids=lambda step: f"{step.model}{', any width' * step.any_width}",
)


@steps
def test_another_width_asks_for_no_other_binaries(step):
    of_widths = [{launch.binary.name for launch in of_width} for of_width in recorded(step)]
    known = set().union(*of_widths[: len(launches.WIDTHS)])
    assert len(known) > 20
    assert [names - known for names in of_widths] == [set()] * len(WIDTHS)


@steps
def test_any_width_launches_the_same_at_every_width(step):
    """One CUDA graph then serves all of them. An ordinary step does not: its grids are those of the width."""
    launched = [[(launch.binary.name, launch.grid) for launch in of_width] for of_width in recorded(step)]
    assert all(each == launched[0] for each in launched) == step.any_width


@steps
def test_what_is_asked_for_is_what_the_gates_compile(step):
    """Whole numbers are of 32 bits whatever their values, and pointers are aligned, as in `static.compile_binary`."""
    for launch in launches_of(step):
        binary = launch.binary
        pointers = {name for name, kind in binary.types.items() if kind.startswith("*")}
        assert launch.aligned == pointers, binary.name
        assert {kind for name, kind in binary.types.items() if name not in pointers} <= {"fp32"}, binary.name
        constants = {parameter.name for parameter in binary.kernel.params if parameter.is_constexpr}
        absent = binary.constants.keys() - constants
        assert all(name.endswith("_ptr") and binary.constants[name] is None for name in absent), binary.name


@steps
def test_grids_are_within_limits(step):
    for launch in launches_of(step):
        first, *others = launch.grid
        assert 1 <= first < 2**31 and all(1 <= n < 2**16 for n in others), (launch.binary.name, launch.grid)


def test_lists_and_steps_know_the_same_binaries():
    listed = {static.identity(binary) for binary in static.binaries(90)}
    asked = {static.identity(launch.binary) for launch in launches_of(Step(*SMALL[0]))}
    assert len(listed & asked) > 10


def test_nothing_is_left_of_a_record():
    recorded(Step(*SMALL[0]))
    assert triton.DEVICE == "cuda"
    assert triton.gpu_of(torch.empty(0)).multiprocessors == 4  # the interpreter's


@pytest.mark.parametrize("blocks,pieces", [(1, 132), (9, 29), (66, 2), (132, 1), (133, 2), (144, 2), (300, 1)])
def test_pieces_of_dw_fill_132_multiprocessors(blocks, pieces):
    assert conv2d._pieces(blocks, 132) == pieces
