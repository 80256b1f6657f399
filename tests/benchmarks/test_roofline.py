"""The model of a step on a GPU, against numbers computed by hand and the plan of the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import roofline
from benchmarks.roofline import (
    WAYS,
    Conv,
    Gelu,
    Join,
    Kernel,
    LayerNorm,
    Linear,
    Machine,
    Norm,
    Pool,
    Products,
    Sum,
)
from us3l.models import VisionTransformer
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


@pytest.mark.parametrize("slicing", ["input", "full"])
def test_layers_of_a_transformer(slicing):
    with torch.device("meta"):
        model = VisionTransformer(32, 1, 4, slicing=slicing, image_size=8, patch_size=4)
        found = roofline.layers(model, 8, 0.5)
    prefix = slicing == "input"
    c = 32 if prefix else 16  # of the residual stream
    assert found == [
        Conv(3, c, 3, 32, 16, 64, 4, depthwise=False, first=True),
        LayerNorm(c, 16, 5),
        Linear(16, 48, 32, 96, 5, prefix),
        Linear(16, c, 32, 32, 5, prefix),
        Products(16, 32, 5, prefix),
        LayerNorm(c, 16, 5),
        Linear(16, 64, 32, 128, 5, prefix),
        Linear(64, c, 128, 32, 5, prefix),
        Gelu(64, 128, 5, prefix),
        Sum(c, 5),
        Sum(c, 5),
        LayerNorm(c, c, 1),
    ]


def test_a_linear_layer_by_hand():
    # 2 images of 5 tokens: 10 rows of 16 read features of 32, and of 48 features of 96 where only those are needed
    layer = Linear(16, 48, 32, 96, 5, prefix=True)
    y, weights = 2 * 10 * 48, 16 * 48
    product, operations = 2 * 10 * 16 + y + 2 * weights, 2 * 10 * weights
    assert moved(layer, "F", trained=False) == [("product", product, operations, 1)]
    assert moved(layer, "F") == [
        ("product", product, operations, 1),
        ("product", product, operations, 1),
        ("product", product + 6 * weights, operations, 1),
        ("elementwise", y, 0, 1),
    ]
    y, weights = 2 * y, 2 * weights
    product, operations = 2 * 10 * 16 + y + 2 * weights, 2 * operations
    assert moved(layer, "B") == [
        ("weights", 6 * weights, 0, 1),
        ("casts", 6 * 10 * 16, 0, 1),
        ("product", product, operations, 1),
        ("product", product, operations, 1),
        ("product", product, operations, 1),
        ("elementwise", y, 0, 1),
        ("casts", 6 * 10 * 16, 0, 1),
        ("casts", 4 * 10 * 32 + 8 * 10 * 16, 0, 2),
        ("gradients", 6 * weights, 0, 1),
        ("gradients", 4 * 2 * weights + 8 * weights, 0, 2),
        ("gradients", 12 * 2 * weights, 0, 1),
        ("gradients", roofline.FINALISE, 0, 2),
    ]


def test_the_rest_of_a_transformer_by_hand():
    rows = 2 * 5
    norm, products, gelu = LayerNorm(32, 16, 5), Products(16, 32, 5, prefix=True), Gelu(16, 32, 5, prefix=True)
    assert moved(norm, "B") == [("norm", 8 * rows * 32, 0, 1), ("norm", 16 * rows * 32, 0, 2)]
    assert moved(norm, "I") == [("norm", 2 * rows * 48, 0, 1), ("norm", 2 * rows * (3 * 32 + 16), 0, 1)]
    for way, c in (("B", 32), ("F", 16)):
        t, product = 2 * rows * c, 2 * 2 * 5 * 5 * c  # of two images
        assert moved(products, way) == [("attention", 4 * t, 2 * product, 1), ("attention", 8 * t, 5 * product, 3)]
        assert moved(gelu, way) == [("elementwise", 2 * t, 0, 1), ("elementwise", 3 * t, 0, 1)]
    assert moved(gelu, "X") == []
    assert [size for _, size, _, _ in moved(Sum(32, 5), "B")] == [10 * rows * 32, 12 * rows * 32]
    assert [size for _, size, _, _ in moved(Sum(32, 5), "F")] == [6 * rows * 32, 6 * rows * 32]


def test_a_kernel_takes_the_longest_of_its_costs():
    machine = Machine(tflops=1.0, tbps=1.0, kernel_us=2.0)
    assert Kernel("", 3e6, 1e6).microseconds(machine) == 3.0
    assert Kernel("", 3e6, 4e6).microseconds(machine) == 4.0
    assert Kernel("", 3e6, 4e6, launches=3).microseconds(machine) == 6.0


# Wall ms of the plan of the GPU kernels by model, stem, pixels and images per view; widths 1.0 / 0.625 / 0.25. It
# counted two tensors of a classifier that is not there, and norms' gradients in the teacher; of the ViT it left out the
# gradient of the patches' filters and the last norm, and its heads were half as large.
PLAN = {
    ("resnet18", "cifar", 32, 128): {"A": 59.5, "B": 26.1, "C": 12.8, "I": 6.9, "F": 5.3, "D": 4.55, "X": 3.3},
    ("resnet18", "cifar", 32, 512): {"A": 59.5, "B": 27.3, "C": 30, "I": 21.2, "F": 18.7, "D": 16.0, "X": 11.8},
    ("resnet50", "imagenet", 224, 128): {"A": 156, "B": 104, "C": 112, "I": 80.3, "F": 71.6, "D": 58.9, "X": 40.6},
    ("mobilenet_v2", "imagenet", 224, 128): {"A": 149, "B": 64, "I": 44.7, "F": 38.1, "D": 35.1, "X": 17.9},
    ("vit_small", "imagenet", 224, 128): {"A": 130, "B": 95, "I": 59.8, "F": 46.6, "X": 39.5},
}


@pytest.mark.parametrize("network", PLAN)
def test_the_plan_of_the_kernels(network):
    model, stem, size, batch = network
    result = roofline.measure(
        model, stem=stem, size=size, batch=batch, widths=(1.0, 0.625, 0.25), machine=Machine()
    )
    wall = {name: result["rows"][name]["wall_ms"] for name in PLAN[network]}
    assert ("D" in result["rows"]) == ("D" in PLAN[network])
    assert wall == pytest.approx(PLAN[network], rel=0.02)
    if (model, batch) == ("resnet18", 128):
        assert result["rows"]["D"]["kernels"] == 407
        assert result["rows"]["B"]["kernels"] == 2898
    for name, row in result["rows"].items():
        assert sum(result["parts"][name].values()) == pytest.approx(row["gpu_ms"])
