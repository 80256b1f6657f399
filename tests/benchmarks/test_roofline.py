"""The model of a step on a GPU, against numbers computed by hand and the plan of the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import roofline
from benchmarks.roofline import WAYS, Conv, Join, Kernel, Machine, Norm, Pool
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d


class Residual(nn.Module):
    """A stem, and a block with a shortcut of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SlicedConv2d(3, 16, 3, padding=1, bias=False)
        self.norm = SlicedBatchNorm2d(16, activation="relu")
        self.conv = SlicedConv2d(16, 32, 3, 2, 1, bias=False)
        self.last = SlicedBatchNorm2d(32, activation="relu")
        self.down = SlicedConv2d(16, 32, 1, 2, bias=False)
        self.shortcut = SlicedBatchNorm2d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        return self.last(self.conv(x), self.shortcut(self.down(x)))


def test_layers_of_a_block_with_a_shortcut():
    with torch.device("meta"):
        found = roofline.layers(Residual(), 4, 0.5)
    assert found == [
        Conv(3, 8, 3, 16, 9, 16, 16, depthwise=False, first=True),
        Norm(8, 16, 16, activation=True, residual=False),
        Conv(8, 16, 16, 32, 9, 16, 4, depthwise=False, first=False),
        Join(8, 16),
        Conv(8, 16, 16, 32, 1, 16, 4, depthwise=False, first=False),
        Norm(16, 32, 4, activation=False, residual=False, shortcut=True),
        Norm(16, 32, 4, activation=True, residual=True),
    ]


def moved(layer: roofline.Layer, way: str, trained: bool = True) -> list[tuple[str, float, float, int]]:
    return [
        (kernel.part, kernel.size, kernel.operations, kernel.launches)
        for kernel in roofline.kernels(layer, 2, WAYS[way], trained=trained)
    ]


def test_a_convolution_by_hand():
    # 2 images: x 2 * 8 * 16 elements of 2 bytes, y 2 * 16 * 4, 8 x 16 filters of 9 taps
    layer = Conv(8, 16, 16, 32, 9, 16, 4, depthwise=False, first=False)
    x, y, weights, operations = 512, 256, 1152, 2 * 2 * 4 * 1152
    rows, full = 16 * 16 * 9, 32 * 16 * 9
    assert moved(layer, "B", trained=False) == [
        ("weights", 6 * weights, 0, 1),
        ("convolution", x + y + 2 * weights, operations, 1),
    ]
    assert moved(layer, "B")[2:] == [
        ("convolution", y + x + 2 * weights, operations, 1),
        ("convolution", y + x + 2 * weights, operations, 1),
        ("gradients", 6 * weights, 0, 1),
        ("gradients", 4 * rows + 8 * weights, 0, 2),
        ("gradients", 4 * full + 8 * rows, 0, 2),
        ("gradients", 12 * full, 0, 1),
    ]
    assert moved(layer, "F") == [
        ("convolution", x + y + 2 * weights, operations, 1),
        ("convolution", y + x + 2 * weights, operations, 1),
        ("convolution", y + x + 8 * weights, operations, 1),
    ]


def test_norms_joins_and_pools_by_hand():
    t = 2 * 2 * 8 * 16
    plain, last = Norm(8, 16, 16, activation=True, residual=False), Norm(8, 16, 16, activation=True, residual=True)
    sizes = [size for part, size, _, _ in moved(plain, "B") if part in ("norm", "elementwise")]
    assert sizes == [t, roofline.FINALISE, 2 * t, 2 * t, 3 * t, 2 * t, 3 * t]
    assert [size for _, size, _, _ in moved(last, "F")] == [roofline.FINALISE, 3 * t, 3 * t, 5 * t]
    assert [(size, launches) for _, size, _, launches in moved(last, "D")][2:] == [(t, 0), (4 * t, 1)]
    assert moved(Join(8, 16), "F") == [("elementwise", 3 * t, 0, 1)]
    assert moved(Join(8, 16), "D") == moved(Join(8, 16), "F", trained=False) == []
    assert moved(Pool(8, 16, 4), "B") == [("elementwise", t + t / 4 + 4 * 2 * 8 * 4, 0, 1)] * 2


def test_a_kernel_takes_the_longest_of_its_costs():
    machine = Machine(tflops=1.0, tbps=1.0, kernel_us=2.0)
    assert Kernel("", 3e6, 1e6).microseconds(machine) == 3.0
    assert Kernel("", 3e6, 4e6).microseconds(machine) == 4.0
    assert Kernel("", 3e6, 4e6, launches=3).microseconds(machine) == 6.0


# Wall ms of the plan of the GPU kernels, widths 1.0 / 0.625 / 0.25, 128 images per view. It counted two tensors of a
# classifier that is not there, and norms' gradients in the teacher.
PLAN = {
    ("resnet18", "cifar", 32): {"A": 59.5, "B": 26.1, "C": 12.8, "I": 6.9, "F": 5.3, "D": 4.55, "X": 3.3},
    ("resnet50", "imagenet", 224): {"A": 156, "B": 104, "C": 112, "I": 80.3, "F": 71.6, "D": 58.9, "X": 40.6},
    ("mobilenet_v2", "imagenet", 224): {"A": 149, "B": 64, "I": 44.7, "F": 38.1, "D": 35.1, "X": 17.9},
}


@pytest.mark.parametrize("network", PLAN)
def test_the_plan_of_the_kernels(network):
    model, stem, size = network
    result = roofline.measure(
        model, stem=stem, size=size, batch=128, widths=(1.0, 0.625, 0.25), machine=Machine()
    )
    wall = {name: result["rows"][name]["wall_ms"] for name in PLAN[network]}
    assert wall == pytest.approx(PLAN[network], rel=0.02)
    if model == "resnet18":
        assert result["rows"]["D"]["kernels"] == 407
        assert result["rows"]["B"]["kernels"] == 2898
    for name, row in result["rows"].items():
        assert sum(result["parts"][name].values()) == pytest.approx(row["gpu_ms"])
