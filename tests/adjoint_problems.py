"""Networks for the continuous adjoint, and what its gradients are compared with."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampde import odeint_adjoint

F64 = torch.float64
LOW = [torch.float16, torch.bfloat16]
# of values of order one after some hundred float64 operations
BOUND = 1e-12
# divides the intervals: outputs within a step would be interpolated
RK4 = {"method": "rk4", "options": {"step_size": 2.0**-7}}


class Net(nn.Module):
    """A tanh network that depends on time, with a frozen and an unused parameter; it counts and notes what it sees."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))
        self.v = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(4, generator=generator).to(dtype))
        self.frozen = nn.Parameter(torch.randn(4, generator=generator).to(dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5, dtype=dtype))
        self.evaluations = 0
        self.seen: set[tuple[torch.dtype, ...]] = set()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        inner = torch.tanh(nn.functional.linear(y, self.w.t(), self.b))
        k = nn.functional.linear(inner, self.v.t()) * (1 + t) + self.frozen.to(y.dtype)
        self.seen.add((t.dtype, y.dtype, inner.dtype))
        return k

    @property
    def wanted(self) -> list[nn.Parameter]:
        return [self.w, self.v, self.b]


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).to(dtype).requires_grad_()


def reference(func: Callable[[Tensor, Any], Any], y0: Tensor, t: Tensor, steps: int = 64) -> Tensor:
    """The exact solution and gradients, to 1e-8: fine steps in plain PyTorch and plain autograd."""
    states = [y0]
    for begin, end in itertools.pairwise(t):
        y, h = states[-1], (end - begin) / steps
        for n in range(steps):
            time = begin + n * h
            k1 = func(time, y)
            k2 = func(time + h / 2, y + h / 2 * k1)
            k3 = func(time + h / 2, y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + func(time + h, y + h * k3))
        states.append(y)
    return torch.stack(states)


def relative(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    assert found.shape == exact.shape
    return float((found.to(exact.dtype) - exact).norm() / exact.norm())


def weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=y.real.dtype).cos().view(y.shape)


def check(func: Any, wanted: list[Tensor], bound: float = 1e-6, t: Tensor | None = None, **arguments: Any) -> None:
    """Gradients with respect to y0 and ``wanted`` are those of plain autograd through a fine solve."""
    t = EVEN if t is None else t
    y0 = start()
    inputs = [y0, *wanted]
    exact = reference(func, y0, t)
    expected = torch.autograd.grad((exact * weights(exact)).sum(), inputs, retain_graph=True)
    y = odeint_adjoint(func, y0, t, **{**RK4, **arguments})
    assert relative(y.detach(), exact.detach()) < bound
    for ours, theirs in zip(torch.autograd.grad((y * weights(y)).sum(), inputs), expected, strict=True):
        assert relative(ours, theirs) < bound


EVEN = torch.linspace(0, 1, 5, dtype=F64)
UNEVEN = torch.tensor([1.3, 0.9, 0.41, 0.4, -0.2], dtype=F64)


def compare(func: Any, y0: Any, t: Tensor, time_gradient: bool = True, **arguments: Any) -> None:
    """Solution, gradients and numbers of evaluations are torchdiffeq's."""
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def solve(solver: Any) -> tuple[list[Tensor], list[int]]:
        net = copy.deepcopy(func)
        single = isinstance(y0, Tensor)
        leaves = [leaf.clone().requires_grad_() for leaf in ((y0,) if single else y0)]
        times = t.clone().requires_grad_(time_gradient)
        y = solver(net, leaves[0] if single else tuple(leaves), times, **arguments)
        counts = [net.evaluations]
        y = [y] if single else list(y)
        sum((leaf * weights(leaf)).sum() for leaf in y).backward()
        counts.append(net.evaluations)
        tensors = [*leaves, *([times] if time_gradient else []), *net.parameters()]
        gradients = [tensor.grad for tensor in tensors if tensor.requires_grad]
        return [*(leaf.detach() for leaf in y), *gradients], counts  # type: ignore[list-item]

    (ours, our_counts), (theirs, their_counts) = solve(odeint_adjoint), solve(torchdiffeq.odeint_adjoint)
    assert our_counts == their_counts
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= BOUND * max(1.0, float(expected.abs().max()))


class Pair(nn.Module):
    """A system of two tensors of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.unused = nn.Parameter(torch.ones(3, dtype=F64))
        self.evaluations = 0

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        position, velocity = y
        return self.a * velocity.sum(-1) * torch.cos(t), -position[:, None] * torch.ones_like(velocity) / (2 + t)


PAIR = (torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([[0.5, 2.0, 1.0], [0.0, 1.0, 3.0]], dtype=F64))
