"""Batched augmentation against torchvision's operations, one image at a time, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from us3l.data import augment
from us3l.data.augment import Draw
from us3l.data.seeding import Stream, uniforms

IDENTITY_BOX = np.array([[0.0, 0.0, 1.0, 1.0]])


def colour_images(n: int = 6, size: int = 16) -> torch.Tensor:
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[0] = 0.5  # grey: no hue
    images[1, 1:] = 0  # pure red: largest saturation
    images[2, :, :4] = 1
    images[2, :, 4:8] = 0
    return images


def draws(n: int) -> np.ndarray:
    return uniforms(0, 0, np.arange(n), Stream.VIEW_1, len(Draw))


@pytest.mark.parametrize("size", [14, 28, 32, 33])
def test_identity_box_returns_the_image(size: int) -> None:
    images = torch.rand(3, 1, size, size)
    torch.testing.assert_close(
        augment.crop(images, np.repeat(IDENTITY_BOX, 3, 0), size), images, rtol=0, atol=5e-6
    )


def test_mirrored_box_returns_the_mirrored_image() -> None:
    images = torch.rand(2, 3, 32, 32)
    boxes = np.repeat([[0.0, 0.0, -1.0, 1.0]], 2, 0)
    torch.testing.assert_close(augment.crop(images, boxes, 32), images.flip(-1), rtol=0, atol=5e-6)


def test_crop_is_affine_grid_and_grid_sample() -> None:
    images, boxes = torch.rand(20, 3, 14, 14), augment.crop_boxes(draws(20), (0.2, 1.0))
    theta = torch.zeros(20, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.from_numpy(boxes[:, 2]), torch.from_numpy(boxes[:, 3])
    theta[:, 0, 2], theta[:, 1, 2] = torch.from_numpy(boxes[:, 0]), torch.from_numpy(boxes[:, 1])
    grid = F.affine_grid(theta, [20, 3, 14, 14], align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(augment.crop(images, boxes, 14), expected, rtol=0, atol=1e-5)


def test_crop_shows_the_box_asked_for() -> None:
    ramp = torch.linspace(-1, 1, 101)[None, None, None, :].expand(1, 1, 101, 101)  # value = horizontal place
    inner = augment.crop(ramp, np.array([[0.25, 0.0, 0.5, 0.5]]), 64)
    assert inner[..., 0].mean() == pytest.approx(-0.25, abs=0.02)
    assert inner[..., -1].mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.8, 1.0), (0.08, 0.5)])
def test_crop_statistics(scale: tuple[float, float]) -> None:
    x, y, half_width, half_height = augment.crop_boxes(draws(40_000), scale).T
    width, height = np.abs(half_width), half_height
    assert (np.abs(x) + width <= 1 + 1e-12).all() and (np.abs(y) + height <= 1 + 1e-12).all()
    area, ratio = width * height, width / height
    assert ratio.min() >= 3 / 4 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    assert area.max() <= scale[1] + 1e-9
    whole = (width < 1) & (height < 1)  # not cut at the border: area and ratio are as drawn
    assert area[whole].min() >= scale[0] - 1e-9
    if scale[1] == 0.5:  # never cut: both distributions are exactly those of the documentation
        assert whole.all()
        assert area.mean() == pytest.approx(sum(scale) / 2, abs=0.003)
        assert area.std() == pytest.approx((scale[1] - scale[0]) / 12**0.5, abs=0.003)
        assert np.log(ratio).mean() == pytest.approx(0, abs=0.005)
        assert np.log(ratio).std() == pytest.approx(np.log(4 / 3) / 3**0.5, abs=0.003)
    place = x[width < 1] / (1 - width[width < 1])
    assert place.mean() == pytest.approx(0, abs=0.02) and place.std() == pytest.approx(3**-0.5, abs=0.01)
    assert (half_width < 0).mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(half_width < 0, area)[0, 1]) < 0.02


@pytest.mark.parametrize("factor", [0.6, 0.93, 1.0, 1.4])
def test_brightness_contrast_saturation_equal_torchvision(factor: float) -> None:
    images = colour_images()
    factors = torch.full((len(images), 1, 1, 1), factor)
    for ours, theirs in (
        (augment.adjust_brightness, TF.adjust_brightness),
        (augment.adjust_contrast, TF.adjust_contrast),
        (augment.adjust_saturation, TF.adjust_saturation),
    ):
        torch.testing.assert_close(ours(images, factors), theirs(images, factor), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.1, 0.5])
def test_hue_equals_torchvision(shift: float) -> None:
    images = colour_images()
    shifts = torch.full((len(images), 1, 1, 1), shift)
    torch.testing.assert_close(
        augment.adjust_hue(images, shifts), TF.adjust_hue(images, shift), rtol=0, atol=1e-5
    )


def test_grey_equals_torchvision() -> None:
    images = colour_images()
    torch.testing.assert_close(augment.to_grey(images), TF.rgb_to_grayscale(images), rtol=0, atol=1e-6)


def test_factors_differ_per_image() -> None:
    images = colour_images()
    factors = torch.linspace(0.6, 1.4, len(images)).view(-1, 1, 1, 1)
    expected = torch.stack([TF.adjust_contrast(i, f.item()) for i, f in zip(images, factors, strict=True)])
    torch.testing.assert_close(augment.adjust_contrast(images, factors), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_leaves_one_image_in_five_alone(channels: int) -> None:
    n = 4000
    images = torch.rand(n, channels, 4, 4)
    u = draws(n)
    out = augment.jitter(images, u)
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
    off = u[:, Draw.JITTER] >= augment.JITTER_PROBABILITY
    if channels == 3:
        grey = u[:, Draw.GREY] < augment.GREY_PROBABILITY
        assert grey.mean() == pytest.approx(0.2, abs=0.02)
        flat = (out - out[:, :1]).abs().amax(dim=(1, 2, 3)) == 0
        assert np.array_equal(flat.numpy(), grey)
        off &= ~grey
    unchanged = (out - images).abs().amax(dim=(1, 2, 3)).numpy() < 5e-6
    assert np.array_equal(unchanged, off)
    assert off.mean() == pytest.approx(0.2 if channels == 1 else 0.16, abs=0.02)


def test_colour_jitter_is_the_documented_sequence() -> None:
    images = colour_images()
    u = draws(len(images))
    u[:, Draw.JITTER], u[:, Draw.GREY] = 0, 1
    expected = []
    for image, row in zip(images, u, strict=True):
        image = TF.adjust_brightness(image, 1 + 0.4 * (2 * row[Draw.BRIGHTNESS] - 1))
        image = TF.adjust_contrast(image, 1 + 0.4 * (2 * row[Draw.CONTRAST] - 1))
        image = TF.adjust_saturation(image, 1 + 0.4 * (2 * row[Draw.SATURATION] - 1))
        expected.append(TF.adjust_hue(image, 0.1 * (2 * row[Draw.HUE] - 1)))
    torch.testing.assert_close(augment.jitter(images, u), torch.stack(expected), rtol=0, atol=1e-5)


def test_grey_jitter_is_the_documented_sequence() -> None:
    images, u = torch.rand(5, 1, 14, 14), draws(5)
    u[:, Draw.JITTER] = 0
    brightness = torch.from_numpy(1 + 0.4 * (2 * u[:, Draw.BRIGHTNESS] - 1)).float().view(-1, 1, 1, 1)
    contrast = torch.from_numpy(1 + 0.4 * (2 * u[:, Draw.CONTRAST] - 1)).float().view(-1, 1, 1, 1)
    bright = images * brightness
    mean = bright.mean((1, 2, 3), keepdim=True)
    expected = ((bright - mean) * contrast + mean).clamp(0, 1)
    torch.testing.assert_close(augment.jitter(images, u), expected, rtol=0, atol=2e-6)
