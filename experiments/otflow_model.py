"""OT-Flow: a flow along the gradient of a potential, whose gradient and Laplacian are formulas.

After Onken, Wu Fung, Li, Ruthotto, "OT-Flow: Fast and Accurate Continuous Normalizing Flows via Optimal Transport"
(arXiv 2006.00104), equations (11) to (15). With s = (x, t) in R^(d+1) the potential is

    Phi(s) = w . u_L(s) + s . A^T A s / 2 + b . s + c,
    u_0 = sigma(K_0 s + b_0),    u_i = u_(i-1) + h sigma(K_i u_(i-1) + b_i),    i = 1 .. L - 1,

sigma being the antiderivative log(exp x + exp -x) of tanh, and h = 1 / (L - 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.options import Precision, solve

State = tuple[Tensor, Tensor, Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least: sums and differences of products are formed there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def antiderivative_of_tanh(x: Tensor) -> Tensor:
    """log(exp x + exp -x), elementwise and without overflow: |x| + log(1 + exp(-2 |x|))."""
    size = x.abs()
    return size + torch.log1p(torch.exp(-2 * size))


class Potential(nn.Module):
    """Phi, with its gradient and its Laplacian in x.

    Products of matrices run in the precision of autocast, all else in float32 at least.
    """

    def __init__(self, d: int, width: int, layers: int = 2, rank: int = 10) -> None:
        """
        Args:
            d: dimension of x.
            width: of the residual network, m.
            layers: of it, L, of which the first opens it; at least 2.
            rank: of A, at most; A has no more than d + 1 rows.

        Raises:
            ValueError: fewer than 2 layers, or another size below 1.
        """
        super().__init__()
        if layers < 2 or min(d, width, rank) < 1:
            raise ValueError(
                f"d, width, layers, rank are {d}, {width}, {layers}, {rank}: expected at least 1, and 2 layers"
            )
        self.d, self.step = d, 1 / (layers - 1)
        self.opening = nn.Linear(d + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.w = nn.Parameter(torch.ones(width))
        self.factor = nn.Parameter(torch.empty(min(rank, d + 1), d + 1))
        nn.init.xavier_uniform_(self.factor)
        self.linear = nn.Linear(d + 1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, s: Tensor) -> Tensor:
        """Phi (n,) at s (n, d + 1)."""
        u = antiderivative_of_tanh(wide(self.opening(s)))
        for layer in self.hidden:
            u = u + self.step * antiderivative_of_tanh(wide(layer(u)))
        quadratic = wide(s @ self.factor.T).square().sum(1) / 2
        return u @ self.w + quadratic + wide(self.linear(s)).squeeze(1)

    def derivatives(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (n, d + 1) of Phi with respect to s (n, d + 1), and its Laplacian (n,) with respect to x."""
        slopes, jacobians = [], []
        before = wide(self.opening(s))
        u, slope = antiderivative_of_tanh(before), before.tanh()
        # of u with respect to x, transposed: (n, d, width)
        jacobian = slope.unsqueeze(1) * self.opening.weight[:, : self.d].T
        slopes.append(slope)
        for index, layer in enumerate(self.hidden):
            before = wide(layer(u))
            slope = before.tanh()
            pushed = wide(nn.functional.linear(jacobian, layer.weight))
            slopes.append(slope)
            jacobians.append(pushed)
            if index + 1 < len(self.hidden):
                u = u + self.step * antiderivative_of_tanh(before)
                jacobian = jacobian + self.step * slope.unsqueeze(1) * pushed
        # z is the gradient of w . u_L with respect to u_i, from the last layer down
        z = self.w.expand(len(s), -1)
        laplacian = s.new_zeros(len(s), dtype=wide(s).dtype)
        for layer, slope, pushed in zip(reversed(self.hidden), reversed(slopes[1:]), reversed(jacobians), strict=True):
            # sigma'' = 1 - tanh^2
            bend = (1 - slope.square()) * z
            laplacian = laplacian + self.step * (bend * pushed.square().sum(1)).sum(1)
            z = z + self.step * wide(nn.functional.linear(slope * z, layer.weight.T))
        first = (1 - slopes[0].square()) * z
        laplacian = laplacian + (first * wide(self.opening.weight[:, : self.d]).square().sum(1)).sum(1)
        laplacian = laplacian + wide(self.factor[:, : self.d]).square().sum()
        gradient = wide((slopes[0] * z) @ self.opening.weight)
        gradient = gradient + wide((s @ self.factor.T) @ self.factor) + self.linear.weight
        return gradient, laplacian


class OTFlow(nn.Module):
    """Velocity of the state (x, l, L, H): points, log-determinant, transport cost, and how far Phi is from solving the
    Hamilton-Jacobi-Bellman equation.

        dx = -grad_x Phi / alpha,  dl = -Laplacian Phi / alpha,  dL = |dx|^2 / 2,  dH = |d_t Phi - alpha dL|
    """

    def __init__(self, potential: Potential, alpha: float) -> None:
        """
        Args:
            potential: Phi.
            alpha: weight of the transport cost, positive.

        Raises:
            ValueError: ``alpha`` is not positive.
        """
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}, expected a positive weight of the transport cost")
        self.potential, self.alpha = potential, alpha

    def forward(self, t: Tensor, state: State) -> State:
        """Rates (n, d), (n, 1), (n, 1), (n, 1) at x = ``state[0]`` (n, d)."""
        x = state[0]
        s = torch.cat([x, t.to(x.dtype).expand(len(x), 1)], dim=1)
        gradient, laplacian = self.potential.derivatives(s)
        velocity = -gradient[:, :-1] / self.alpha
        cost = velocity.square().sum(1, keepdim=True) / 2
        return velocity, -laplacian.unsqueeze(1) / self.alpha, cost, (gradient[:, -1:] - self.alpha * cost).abs()


@dataclass(frozen=True)
class Terms:
    """The loss of a flow and what it is made of; 0-dim tensors.

    Attributes:
        loss: the weighted sum.
        likelihood: -mean log p of the points, in nats.
        transport: mean transport cost.
        hjb: mean violation of the Hamilton-Jacobi-Bellman equation.
    """

    loss: Tensor
    likelihood: Tensor
    transport: Tensor
    hjb: Tensor


def terms(
    precision: Precision, flow: OTFlow, x: Tensor, steps: int, weights: tuple[float, float], variance: float = 0.1
) -> Terms:
    """The loss of points: weighted likelihood, transport cost and violation of the HJB equation.

    Args:
        precision: of the run.
        flow: whose ``alpha`` is the weight of the transport cost.
        x: (n, d) points.
        steps: of rk4 from t = 0 to t = 1.
        weights: of the violation and of the likelihood.
        variance: of each component of the Gaussian at t = 1.
    """
    t = torch.linspace(0, 1, steps + 1, device=x.device, dtype=x.dtype)
    nothing = x.new_zeros(len(x), 1)
    ends, volumes, costs, violations = (states[-1] for states in solve(precision, flow, (x, *3 * (nothing,)), t))
    normal = -ends.square().sum(1) / (2 * variance) - x.shape[1] / 2 * math.log(2 * math.pi * variance)
    likelihood = -(normal + volumes.squeeze(1)).mean()
    transport, hjb = costs.mean(), violations.mean()
    return Terms(weights[1] * likelihood + flow.alpha * transport + weights[0] * hjb, likelihood, transport, hjb)
