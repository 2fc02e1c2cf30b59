"""Adams methods in 16 bits: as accurate as rk4; scales, overflow, losses that are not finite."""

import math
from typing import Any

import pytest
import torch
from multistep_problems import METHODS
from torch import Tensor, nn

import rampde
from rampde import odeint


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.layers(y)
        return y * torch.cos(t).to(y.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [8, 64])
@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float16, 1.0), (torch.float16, 1e-7), (torch.float16, 1e6), (torch.bfloat16, 1.0)],
)
@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
def test_sixteen_bits_lose_no_more_than_in_rk4(
    method: str, steps: int, checkpoint: str, dtype: torch.dtype, factor: float
) -> None:
    """The state, the gradients of y0 and of the parameters, at any size of the loss."""
    start = torch.randn(128, 16, generator=torch.Generator().manual_seed(2))

    def results(method: str, wide: torch.dtype) -> list[Tensor]:
        network, y0 = Network(wide), start.to(wide, copy=True).requires_grad_()
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        options = {} if method == "rk4" else {"max_order": 5}
        with torch.autocast("cpu", dtype, enabled=wide == torch.float32):
            y = odeint(network, y0, t, method=method, options=options, checkpoint=checkpoint)[-1]
        (y.square().mean() * factor).backward()
        assert y0.grad is not None
        gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        return [value.detach().double() for value in (y, y0.grad / factor, gradients / factor)]

    def errors(method: str) -> list[float]:
        pairs = zip(results(method, torch.float32), results(method, torch.float64), strict=True)
        return [float((low - exact).norm() / exact.norm()) for low, exact in pairs]

    for error, bar in zip(errors(method), errors("rk4"), strict=True):
        assert error <= 2 * bar


class Steep(torch.autograd.Function):
    """The identity, whose products leave float16 unless their cotangent is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1000


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_lowers_the_scale(method: str, checkpoint: str) -> None:
    """The first sweep overflows; one with a smaller scale gives the gradient, and nothing of the first is in it."""
    weight = torch.tensor(1e-4, requires_grad=True)
    scaler = rampde.DynamicScaler(torch.float16)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return Steep.apply((y.float() * weight).half()).float()  # type: ignore[no-any-return]

    y0 = torch.ones(2, 3, requires_grad=True)
    t = torch.linspace(0, 1, 9)
    y = odeint(f, y0, t, method=method, checkpoint=checkpoint, velocity_dtype=torch.float16, loss_scaler=scaler)
    y[-1].sum().backward()
    kinds = [kind for kind, _ in scaler.scale_history]
    assert kinds[0] == "init"
    assert "overflow" in kinds
    assert scaler.headroom < 1
    # d/dy0 of y0 exp(1000 weight t), as the products pretend, and of what it is to the weight
    assert y0.grad is not None
    assert weight.grad is not None
    assert (y0.grad - math.exp(0.1)).abs().max() < 2e-3
    assert float(weight.grad) == pytest.approx(6 * 1000 * math.expm1(0.1) / 0.1, rel=2e-3)


def test_infinite_losses_give_infinite_gradients() -> None:
    y0 = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 9), method="explicit_adams")
    (y.sum() * math.inf).backward()
    assert y0.grad is not None
    assert y0.grad.isinf().all()


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bits(method: str) -> None:
    results = []
    for _ in range(2):
        network, y0 = Network(torch.float32), torch.ones(4, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = odeint(network, y0, torch.linspace(0, 1, 9), method=method)
        y.sum().backward()
        results.append([y.detach(), y0.grad, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
