"""The velocity of the published flow in the plane: a hyper-network with an analytic divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.options import Precision, solve

# width of the hyper-network, as published
HIDDEN = 32


class HyperFlow(nn.Module):
    """Velocity f(t, z) = mean_i u_i tanh(w_i . z + b_i) of points in the plane.

    A tanh network turns t into all w_i, b_i and u_i, of which the last are gated: u_i = v_i sigmoid(g_i) elementwise.
    The divergence is a formula, mean_i (1 - tanh^2) u_i . w_i, and needs no second derivative. This is the field of
    FFJORD's example in torchdiffeq, as the published experiment takes it: with hidden 32 and width 128 it has 30,688
    parameters.
    """

    def __init__(self, hidden: int, width: int) -> None:
        """
        Args:
            hidden: width of the network's two hidden layers.
            width: how many tanh units f has.
        """
        super().__init__()
        self.width = width
        self.hyper = nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 7 * width)
        )

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocity (n, 2) of the points ``state[0]``, (n, 2), and rate (n, 1) of the log-density along their paths."""
        points, _ = state
        w, v, g, b = self.hyper(t.reshape(1, 1)).view(7, self.width).split([2, 2, 2, 1])
        u = v * g.sigmoid()
        units = torch.addmm(b, points, w).tanh()
        traces = (w * u).sum(0) / self.width
        return units @ u.T / self.width, -((1 - units.square()) * traces).sum(1, keepdim=True)


def log_density(precision: Precision, model: nn.Module, points: Tensor, steps: int) -> Tensor:
    """log p (n,) of points (n, 2): those at t = 1, followed to the Gaussian at t = 0."""
    t = torch.linspace(1, 0, steps + 1, device=points.device, dtype=points.dtype)
    ends, changes = solve(precision, model, (points, points.new_zeros(len(points), 1)), t)
    z = ends[-1]
    log_p: Tensor = -0.5 * z.square().sum(1) - math.log(2 * math.pi) - changes[-1, :, 0]
    return log_p


def negative_log_likelihood(precision: Precision, model: nn.Module, points: Tensor, steps: int) -> Tensor:
    """-log p of points (n, 2), on average; in nats."""
    return -log_density(precision, model, points, steps).mean()


def sample(precision: Precision, model: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """Points (n, 2) at t = 1 of the paths that start in Gaussian ``noise`` (n, 2) at t = 0."""
    t = torch.linspace(0, 1, steps + 1, device=noise.device, dtype=noise.dtype)
    points: Tensor = solve(precision, model, (noise, noise.new_zeros(len(noise), 1)), t)[0]
    return points[-1]
