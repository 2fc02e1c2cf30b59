"""Three densities in the plane, drawn without end from a seed.

They are those of the experiments of FFJORD (Grathwohl et al., arXiv 1810.01367), which the published continuous
normalizing flows are trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor


def checkerboard(n: int, generator: Generator) -> Tensor:
    """Every other square, of side 2, of a board on [-4, 4]^2."""
    across = 4 * torch.rand(n, generator=generator) - 2
    up = torch.rand(n, generator=generator) - 2 * torch.randint(2, (n,), generator=generator)
    return 2 * torch.stack([across, up + across.floor() % 2], dim=1)


def eight_gaussians(n: int, generator: Generator) -> Tensor:
    """Eight Gaussians of width 0.5 on a circle of radius 4, all divided by sqrt(2)."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre = 4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return (centre + 0.5 * torch.randn(n, 2, generator=generator)) / math.sqrt(2)


def two_spirals(n: int, generator: Generator) -> Tensor:
    """Two arms of one and a half turns, of radius pi, opposite each other and blurred."""
    angle = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
    arm = torch.stack([-angle.cos(), angle.sin()], dim=1) * angle.unsqueeze(1)
    arm = arm + 0.5 * torch.rand(n, 2, generator=generator)
    side = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    return side * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


DENSITIES: dict[str, Callable[[int, Generator], Tensor]] = {
    "checkerboard": checkerboard,
    "8gaussians": eight_gaussians,
    "2spirals": two_spirals,
}


class Samples:
    """Batches of new points of a density, without end; a checkpoint holds where the generator is."""

    def __init__(self, density: str, batch: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            density: its name in DENSITIES.
            batch: points in a batch.
            seed: of the generator, which is the CPU's, so that all devices see the same points.
            device, dtype: of the points.

        Raises:
            ValueError: no such density, or an empty batch.
        """
        if density not in DENSITIES:
            raise ValueError(f"density is {density!r}, expected one of {', '.join(DENSITIES)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        self._draw, self._batch = DENSITIES[density], batch
        self._generator = Generator().manual_seed(seed)
        self._device, self._dtype = device, dtype

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self._draw(self._batch, self._generator).to(self._device, self._dtype)

    def state_dict(self) -> dict[str, Any]:
        """Where the generator is."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self._generator.set_state(state["generator"])
