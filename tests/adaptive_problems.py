"""Problems for adaptive methods, and a func that notes the steps that are taken through it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64


class Counted:
    """A func that counts its evaluations and notes the steps that were accepted and rejected."""

    def __init__(self, func: Callable[[Tensor, Any], Any]) -> None:
        self.func = func
        self.calls = 0
        self.times: list[float] = []
        self.accepted: list[tuple[float, float]] = []
        self.rejected: list[tuple[float, float]] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        self.times.append(float(t))
        return self.func(t, y)

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.accepted.append((float(t0), float(dt)))

    def callback_reject_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.rejected.append((float(t0), float(dt)))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def linear(t: Tensor, y: Tensor) -> Tensor:
    matrix = torch.tensor([[-0.3, 1.1], [-0.9, 0.2]], dtype=y.dtype)
    return (1 + t * t) * y @ matrix + torch.sin(3 * t)


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    prey, predators = y
    return torch.stack([1.5 * prey - prey * predators, prey * predators - 3 * predators])


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -9.81 * torch.sin(y[0]) - 0.1 * y[1]])


def arenstorf(t: Tensor, y: Tensor) -> Tensor:
    """A satellite around the Earth and the Moon (Hairer, Norsett, Wanner I, II.0, eq. 0.1)."""
    moon = 0.012277471
    x1, x2, v1, v2 = y
    d1 = ((x1 + moon) ** 2 + x2**2) ** 1.5
    d2 = ((x1 - 1 + moon) ** 2 + x2**2) ** 1.5
    a1 = x1 + 2 * v2 - (1 - moon) * (x1 + moon) / d1 - moon * (x1 - 1 + moon) / d2
    a2 = x2 - 2 * v1 - (1 - moon) * x2 / d1 - moon * x2 / d2
    return torch.stack([v1, v2, a1, a2])


PROBLEMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "linear": (linear, torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=F64), torch.linspace(0, 2, 7, dtype=F64)),
    "lotka-volterra": (lotka_volterra, tensor(1.0, 1.0), torch.linspace(0, 8, 20, dtype=F64)),
    "pendulum": (pendulum, tensor(3.0, 0.0), torch.linspace(0, 5, 11, dtype=F64)),
    "reverse": (pendulum, tensor(1.0, -0.3), torch.linspace(2, -1, 5, dtype=F64)),
    # before the close approach to the Moon at the end of the period, which magnifies every rounding
    "arenstorf": (arenstorf, tensor(0.994, 0.0, 0.0, -2.00158510637908252240537862224), tensor(0.0, 5.0, 10.0)),
}
