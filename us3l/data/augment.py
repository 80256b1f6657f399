"""Batched augmentation of images held in memory.

Random numbers come in as an array with a row per image (`seeding.uniforms`) and one column per draw, so that
the result for an image depends on its own row only. All functions are vectorised over the batch and run on
the images' device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from us3l.data.seeding import FloatArray

JITTER_PROBABILITY, GREY_PROBABILITY = 0.8, 0.2
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors in 1 +- 0.4
BLUR_PROBABILITY, BLUR_SIGMA = 0.5, (0.1, 2.0)  # pixels
HUE = 0.1  # shift in +- 0.1 of the circle
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision


class Draw(IntEnum):
    """Columns of the random numbers. The values are part of every run's randomness: never renumber."""

    AREA = 0
    RATIO = 1
    X = 2
    Y = 3
    FLIP = 4
    JITTER = 5
    BRIGHTNESS = 6
    CONTRAST = 7
    SATURATION = 8
    HUE = 9
    GREY = 10
    BLUR = 11
    SIGMA = 12


def crop_boxes(u: FloatArray, scale: Sequence[float]) -> FloatArray:
    """Boxes of random resized crops with flips, float64 [n, 4]: centre x, centre y, half width, half height.

    In units of half the image, origin at its centre, as `grid_sample` counts; a negative half width mirrors.
    The area is uniform in `scale`, the aspect ratio log-uniform in [3/4, 4/3]; a side that would exceed the
    image is cut to it (torchvision draws again instead), and the box lies uniformly inside the image.
    """
    area = scale[0] + (scale[1] - scale[0]) * u[:, Draw.AREA]
    ratio = (4 / 3) ** (2 * u[:, Draw.RATIO] - 1)
    half_width, half_height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    x = (2 * u[:, Draw.X] - 1) * (1 - half_width)
    y = (2 * u[:, Draw.Y] - 1) * (1 - half_height)
    mirror = np.where(u[:, Draw.FLIP] < 0.5, -1, 1)
    return np.stack([x, y, half_width * mirror, half_height], axis=1)


def crop(images: Tensor, boxes: FloatArray, size: int) -> Tensor:
    """Resample each image's box bilinearly: float32 [n, C, H, W] -> [n, C, size, size]."""
    box = torch.from_numpy(boxes.astype(np.float32)).to(images.device)
    centres = (2 * torch.arange(size, dtype=torch.float32, device=images.device) + 1) / size - 1
    # The box is axis-aligned, so two outer sums do what F.affine_grid does with a matrix product per image.
    x = box[:, 0, None] + box[:, 2, None] * centres
    y = box[:, 1, None] + box[:, 3, None] * centres
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def to_grey(images: Tensor) -> Tensor:
    """Luma of RGB images, [n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """images * factor in [0, 1]; factor float32 [n, 1, 1, 1] here and below."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend of RGB images with the mean of their luma."""
    mean = to_grey(images).mean(dim=(2, 3), keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend of RGB images with their luma."""
    return (images * factor + to_grey(images) * (1 - factor)).clamp(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by `shift` of the circle, in HSV."""
    value, brightest = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    red, green, blue = images.unbind(1)
    inverse = 1 / torch.where(chroma > 0, chroma, 1)  # grey has no hue: any value does, its chroma is 0
    sixth = torch.stack(
        [(green - blue) * inverse, (blue - red) * inverse + 2, (red - green) * inverse + 4], dim=1
    )
    hue = sixth.gather(1, brightest.unsqueeze(1)).squeeze(1) + 6 * shift.squeeze(1)
    # HSV to RGB without cases: V - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6, n = 5, 3, 1
    channels = []
    for n in (5, 3, 1):
        k = (hue + n) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def jitter(images: Tensor, u: FloatArray) -> Tensor:
    """Random colour changes; images float32 [n, C, H, W] in [0, 1], C = 3 or 1.

    RGB: brightness, contrast, saturation, hue as torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1) but in this
    fixed order, with probability 0.8; then to grey with probability 0.2 (SimCLR, MoCo v2, SimSiam). One
    channel: brightness and contrast with probability 0.8, clamped once at the end.
    """

    def column(values: FloatArray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(images.device).view(-1, 1, 1, 1)

    def factor(draw: Draw, strength: float) -> Tensor:
        return column(1 + on * strength * (2 * u[:, draw] - 1))

    on = u[:, Draw.JITTER] < JITTER_PROBABILITY
    brightness, contrast = factor(Draw.BRIGHTNESS, BRIGHTNESS), factor(Draw.CONTRAST, CONTRAST)
    if images.shape[1] == 1:
        images = images * brightness
        mean = images.mean(dim=(2, 3), keepdim=True)
        return (images * contrast + mean * (1 - contrast)).clamp(0, 1)
    images = adjust_brightness(images, brightness)
    images = adjust_contrast(images, contrast)
    images = adjust_saturation(images, factor(Draw.SATURATION, SATURATION))
    images = adjust_hue(images, column(on * HUE * (2 * u[:, Draw.HUE] - 1)))
    grey = torch.from_numpy(u[:, Draw.GREY] < GREY_PROBABILITY).to(images.device).view(-1, 1, 1, 1)
    return torch.where(grey, to_grey(images), images)


def blur(images: Tensor, u: FloatArray) -> Tensor:
    """Gaussian blur (MoCo v2), of an image with probability 0.5 and a sigma of its own, uniform in [0.1, 2.0] pixels.

    Two passes of one-dimensional filters, which are cut off at 3 times the largest sigma; borders are reflected.
    images: float32 [n, C, H, W] of more than 6 pixels a side.
    """
    n, channels, height, width = images.shape
    radius = math.ceil(3 * BLUR_SIGMA[1])
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[:, Draw.SIGMA]
    # So narrow a filter is the identity: images that are not blurred go through the same operations.
    sigma = np.where(u[:, Draw.BLUR] < BLUR_PROBABILITY, sigma, 1e-3)
    filters = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None]) ** 2)  # [n, 2 * radius + 1]
    filters /= filters.sum(axis=1, keepdims=True)
    weight = torch.from_numpy(filters.astype(np.float32)).to(images.device).repeat_interleave(channels, 0)
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    rows = F.conv2d(padded.flatten(0, 1)[None], weight[:, None, None, :], groups=n * channels)
    return F.conv2d(rows, weight[:, None, :, None], groups=n * channels).view(n, channels, height, width)
