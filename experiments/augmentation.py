"""Random changes of images: a window of them, their mirror image, their colours."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

# share of red, green and blue in what is seen as brightness (ITU-R BT.601)
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """Which random changes images go through; by default none.

    Attributes:
        area: least and largest area of the window of an image that is shown, as a share of the image's. Beyond the
            image's edge all is zero.
        ratio: largest width over height of the window, divided by the image's; the least is its inverse.
        shift: how far the window may move beyond what keeps it inside (or around) the image, in pixels.
        flip: whether half of the images are mirrored.
        jitter: how far brightness, contrast and saturation change, as a share of what they are.
        gray: share of the images that lose their colours.
    """

    area: tuple[float, float] = (1.0, 1.0)
    ratio: float = 1.0
    shift: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    gray: float = 0.0


def uniform(low: float, high: float, n: int, device: torch.device) -> Tensor:
    """n numbers between low and high on a device, from PyTorch's generator of the CPU: on any device the same."""
    return (low + (high - low) * torch.rand(n)).to(device)


def windows(images: Tensor, side: int, wanted: Augmentation) -> Tensor:
    """A random window of each image (n, colours, height, width), as (n, colours, side, side), bilinear."""
    n, device = len(images), images.device
    area = uniform(*wanted.area, n, device)
    stretch = uniform(-0.5 * log(wanted.ratio), 0.5 * log(wanted.ratio), n, device).exp()
    # in units in which the image reaches from -1 to 1
    size = torch.stack([area.sqrt() * stretch, area.sqrt() / stretch], dim=1)
    if wanted.area[1] <= 1:
        size = size.clamp(max=1)
    shift = 2 * wanted.shift / torch.tensor([images.shape[3], images.shape[2]], device=device)
    place = uniform(-1, 1, 2 * n, device).view(n, 2)
    centre = place * ((1 - size).abs() + shift)
    mirror = torch.where(uniform(0, 1, n, device) < 0.5 * wanted.flip, -1.0, 1.0)
    size = size * torch.stack([mirror, torch.ones_like(mirror)], dim=1)
    grid = F.affine_grid(
        torch.cat([torch.diag_embed(size), centre[..., None]], dim=2), [n, 1, side, side], align_corners=False
    )
    return F.grid_sample(images, grid, align_corners=False)


def recoloured(images: Tensor, wanted: Augmentation) -> Tensor:
    """Images (n, 3, height, width), values from 0 to 1, with other brightness, contrast and saturation."""
    n, device = len(images), images.device
    brightness, contrast, saturation = (
        uniform(1 - wanted.jitter, 1 + wanted.jitter, n, device).view(n, 1, 1, 1) for _ in range(3)
    )
    colourless = uniform(0, 1, n, device).view(n, 1, 1, 1) < wanted.gray
    images = (images * brightness).clamp(0, 1)
    luminance = _luminance(images)
    mean = luminance.mean((2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    luminance = _luminance(images)
    return (luminance + saturation.masked_fill(colourless, 0) * (images - luminance)).clamp(0, 1)


def _luminance(images: Tensor) -> Tensor:
    return (images * torch.tensor(LUMINANCE, device=images.device).view(3, 1, 1)).sum(1, keepdim=True)
