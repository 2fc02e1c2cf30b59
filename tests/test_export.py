"""A solve on a grid in ``torch.export``."""

import torch
from torch import nn

from rampde import odeint

F64 = torch.float64
STEPS = torch.linspace(0, 1, 4, dtype=F64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16, dtype=F64), nn.Tanh(), nn.Linear(16, 5, dtype=F64))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.layers(y) * torch.cos(t)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return odeint(self.net, y, t, method="rk4")[-1]


def test_a_solve_on_a_grid_is_exported() -> None:
    """For batches of any size, and other times."""
    torch.compiler.reset()
    model, batch = Model(), torch.export.Dim("batch")
    shapes = ({0: batch}, None)
    example = (torch.randn(4, 5, dtype=F64), STEPS)
    exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=True).module()
    for size, t in ((4, STEPS), (7, STEPS**2)):
        y0 = torch.randn(size, 5, dtype=F64)
        expected = model(y0, t)
        # rounding of values of order one
        assert (exported(y0, t) - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))
