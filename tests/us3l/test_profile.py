"""The cost of a width: the published table, and counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from us3l.models import build_model
from us3l.profile import _count, profile

WIDTHS = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    ("name", "stem", "size", "classes", "params", "macs"),
    [
        ("resnet18", "imagenet", 224, 1000, "11.69 6.68 3.06 0.83", "1814 1043 483 136"),
        ("resnet50", "imagenet", 224, 1000, "25.56 14.77 6.92 1.99", "4089 2323 1052 278"),
        ("mobilenet_v2", "imagenet", 224, 1000, "3.50 2.64 1.97 1.52", "301 209 97 37"),
        ("resnet18", "cifar", 32, 100, "11.22 6.32 2.82 0.71", "555 313 139 35"),
        ("resnet50", "cifar", 32, 100, "23.71 13.38 5.99 1.53", "1298 731 325 81"),
    ],
)
def test_published_table(name: str, stem: str, size: int, classes: int, params: str, macs: str) -> None:
    """Millions of parameters and of MACs at the widths 1.0, 0.75, 0.5, 0.25."""
    rows = profile(build_model(name, stem=stem, num_classes=classes), (3, size, size), WIDTHS)
    assert [row.width for row in rows] == list(WIDTHS)
    assert " ".join(f"{row.params / 1e6:.2f}" for row in rows) == params
    assert " ".join(f"{row.macs / 1e6:.0f}" for row in rows) == macs


def test_full_width_counts_every_parameter() -> None:
    model = build_model("mobilenet_v2", num_classes=10)
    (row,) = profile(model, (3, 64, 64), [1.0])
    assert row.params == sum(p.numel() for p in model.parameters())


def test_switchable_norms_count_those_in_use() -> None:
    options = {"stem": "small", "base_channels": 16, "num_classes": 10}
    sliced = build_model("resnet_tiny", **options)
    switchable = build_model("resnet_tiny", norm="switchable", widths=[1.0, 0.5], **options)
    assert profile(sliced, (3, 16, 16), [1.0, 0.5]) == profile(switchable, (3, 16, 16), [1.0, 0.5])


def test_layers_by_hand() -> None:
    """Ordinary torch.nn layers; groups and biases; a layer that runs twice has its parameters once."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.norm = nn.BatchNorm2d(4, affine=False)
            self.fc = nn.Linear(4, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(self.conv(self.conv(x))).mean((2, 3)))

    params, macs = _count(Net().to("meta"), torch.empty(2, 4, 6, 6, device="meta"))
    assert params == (4 * 2 * 9 + 4) + 4 * 5
    assert macs == 2 * 4 * 2 * 9 * 36 + 4 * 5


def test_the_model_is_left_alone() -> None:
    model = build_model("resnet_tiny", stem="small").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = profile(model, (3, 16, 16), [0.5])
    assert not model.training and model.conv1.active_width == 1.0
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert profile(model, (3, 16, 16), [{"": 0.5}])[0].macs == first[0].macs


def test_bad_input_is_named() -> None:
    model = build_model("resnet_tiny")
    with pytest.raises(ValueError, match=r"input_shape must be \(C, H, W\), got \(2, 3, 8, 8\)"):
        profile(model, (2, 3, 8, 8), [1.0])
    model.fc = nn.PReLU()
    with pytest.raises(TypeError, match="PReLU"):
        profile(model, (3, 16, 16), [1.0])
