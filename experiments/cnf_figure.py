"""The picture of a flow in the plane: data, learned density and samples."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments.cnf_model import log_density, sample
from experiments.options import Precision

# the picture shows the square [-EXTENT, EXTENT]^2
EXTENT = 4.5
PIXELS = 120


@torch.no_grad()
def draw_density(precision: Precision, model: nn.Module, data: Tensor, steps: int, path: Path, title: str) -> None:
    """Draws a histogram of ``data`` (n, 2), the learned density, and a histogram of as many samples.

    Args:
        precision: with whose solver and arithmetic density and samples are computed.
        model: the field.
        data: (n, 2) points of the density to learn.
        steps: of rk4.
        path: of the picture.
        title: above it.
    """
    extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axis = (torch.arange(PIXELS, device=data.device, dtype=data.dtype) + 0.5) * (2 * EXTENT / PIXELS) - EXTENT
    learned = log_density(precision, model, torch.cartesian_prod(axis, axis), steps).exp().view(PIXELS, PIXELS)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).to(data)
    panels = {"data": _histogram(data), "density": learned.float().cpu()}
    panels["samples"] = _histogram(sample(precision, model, noise, steps))
    # one scale for all, that of the data; a single bright pixel does not set it
    top = panels["data"].quantile(0.99).item()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
    for plot, (name, image) in zip(axes, panels.items(), strict=True):
        plot.imshow(image.T.numpy(), "magma", origin="lower", extent=extent, vmin=0, vmax=top)
        plot.set(title=name, xticks=[], yticks=[])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _histogram(points: Tensor) -> Tensor:
    bins = PIXELS // 2
    sides = [-EXTENT, EXTENT, -EXTENT, EXTENT]
    counts, _ = torch.histogramdd(points.float().cpu(), [bins, bins], range=sides)
    return counts / (len(points) * (2 * EXTENT / bins) ** 2)
