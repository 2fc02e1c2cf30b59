"""Solves that are recorded by an emulated graph on the CPU, and what they are compared by."""

from __future__ import annotations

import torch
from emulated_graph import EmulatedGraph
from torch import Tensor, nn

import rampde

GRID = torch.linspace(0, 1, 5)


class Emulated(EmulatedGraph):
    """A recorder of :mod:`rampde.capture` on the CPU."""

    instances: list[Emulated]

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.warm_ups = 0
        Emulated.instances.append(self)

    def warm_up(self, work) -> None:
        self.warm_ups += 1
        work()


def replays() -> int:
    return sum(recorder.replays for recorder in Emulated.instances)


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(y))) * (1 + t)


def losses(solution: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, solution.numel(), dtype=solution.dtype).view_as(solution)
    return (solution * weights).sum()


def gradients(net: nn.Module, y0: Tensor, t: Tensor, precision: torch.dtype | None = None, **options) -> list[Tensor]:
    """The solution, and the gradients of y0, t where it has one, and the parameters."""
    y0 = y0.clone().requires_grad_()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        solution = rampde.odeint(net, y0, t, **{"method": "rk4", **options})
    inputs = [y0, *([t] if t.requires_grad else []), *net.parameters()]
    return [solution.detach(), *torch.autograd.grad(losses(solution), inputs)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)
