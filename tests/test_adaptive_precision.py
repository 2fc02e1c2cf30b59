"""Adaptive steps with 16-bit velocities: as accurate as rounding allows, in about the steps of float32."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rampde
from rampde import odeint
from rampde.statistics import SolveStats

LOW = [torch.bfloat16, torch.float16]
T = torch.tensor([0.0, 1.0])


class Flow(nn.Module):
    """A continuous normalising flow with the exact trace, in two dimensions, of width 32."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w1 = nn.Parameter(torch.randn(32, 2, generator=generator))
        self.b1 = nn.Parameter(torch.randn(32, generator=generator))
        self.time = nn.Parameter(torch.randn(32, generator=generator))
        self.w2 = nn.Parameter(torch.randn(2, 32, generator=generator) / 3)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        a = torch.tanh(nn.functional.linear(z, self.w1, self.b1) + (t * self.time).to(z.dtype))
        trace = ((1 - a * a) * (self.w1 * self.w2.t()).sum(1)).sum(1, keepdim=True)
        return nn.functional.linear(a, self.w2), -trace


def solve(
    seed: int, dtype: torch.dtype | None, by_autocast: bool = True, **keywords: Any
) -> tuple[list[Tensor], SolveStats]:
    """The state at t = 1 of a batch of 256; ``dtype`` is that of the velocity."""
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(seed))
    if dtype is not None and not by_autocast:
        keywords["velocity_dtype"] = dtype
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None and by_autocast)
    net = Flow(seed)
    if dtype is not None and not by_autocast:
        net = net.to(dtype)
    with torch.no_grad(), rampde.stats() as stats, autocast:
        y = odeint(net, (z, torch.zeros(256, 1)), T, **keywords)
    return [leaf[-1] for leaf in y], stats.solves[0]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of the pieces."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("by_autocast", [True, False], ids=["autocast", "velocity_dtype"])
@pytest.mark.parametrize("atol", [1e-3, 1e-4, 1e-5, 1e-6])
def test_as_accurate_as_float32_up_to_rounding(atol: float, by_autocast: bool, dtype: torch.dtype) -> None:
    """No further from the solution than twice the float32 solve, plus ten roundings; no tiny steps; no warning at
    tolerances within reach."""
    roundoff = torch.finfo(dtype).eps / 2
    for seed in range(3):
        exact, _ = solve(seed, None, rtol=1e-6, atol=1e-6)
        reference, of_reference = solve(seed, None, rtol=1e-3, atol=atol)
        with warnings.catch_warnings():
            # an absolute tolerance of 1e-6 is out of reach of bfloat16 where a state begins at zero
            warnings.simplefilter("error" if atol > 1e-6 else "ignore")
            found, stats = solve(seed, dtype, by_autocast, rtol=1e-3, atol=atol)
        assert distance(found, exact) <= 2 * distance(reference, exact) + 10 * roundoff
        # at the start the error is hidden by rounding: the search for the step goes by fours where float32 goes by
        # tens, and ends with steps that were too large
        start = math.log(max(of_reference.step_sizes) / of_reference.step_sizes[0], 4) / 2
        assert stats.accepted <= 1.3 * of_reference.accepted + start
        assert stats.rejected <= of_reference.rejected + 4
        assert min(stats.step_sizes[:-1]) >= 0.5 * min(of_reference.step_sizes[:-1])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("atol", [1e-3, 1e-4, 1e-5, 1e-6])
def test_takes_about_the_steps_of_float32(atol: float, dtype: torch.dtype) -> None:
    """From a first step of a sensible size at most 1.3 times as many, and the few attempts that end the search."""
    for seed in range(3):
        keywords: dict[str, Any] = {"rtol": 1e-3, "atol": atol, "options": {"first_step": 0.1}}
        _, reference = solve(seed, None, **keywords)
        _, stats = solve(seed, dtype, **keywords)
        assert stats.accepted <= 1.3 * reference.accepted + 1
        assert stats.rejected <= reference.rejected + 4


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
def test_unreachable_tolerances_are_named_once_with_reachable_ones(method: str, dtype: torch.dtype) -> None:
    roundoff = torch.finfo(dtype).eps / 2
    for seed in range(2):
        exact, _ = solve(seed, None, rtol=1e-6, atol=1e-6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, stats = solve(seed, dtype, rtol=1e-7, atol=1e-9, method=method)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == 1
        assert f"rtol=1e-07, atol=1e-09 cannot be reached with velocities in {dtype}" in messages[0]
        assert messages[0].endswith("evaluate func in float32")
        named = re.search(r"About rtol=(\S+), atol=(\S+) is reachable", messages[0])
        assert named is not None
        rtol, atol = map(float, named.groups())
        # they are those of the dtype, up to what the network makes of a rounding
        assert roundoff / 10 <= rtol <= 100 * roundoff
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solve(seed, dtype, rtol=rtol, atol=atol, method=method)
        # what was asked for in vain costs neither accuracy nor steps
        reference, of_reference = solve(seed, None, rtol=rtol, atol=atol, method=method)
        assert distance(found, exact) <= 2 * distance(reference, exact) + 10 * roundoff
        start = max(math.log2(max(stats.step_sizes) / stats.step_sizes[0]), 0.0)
        assert stats.accepted + stats.rejected <= 2 * (of_reference.accepted + of_reference.rejected) + start
        assert min(stats.step_sizes[:-1]) >= 0.5 * stats.step_sizes[0]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("state", ["scalar", "pair", "large"])
def test_steps_do_not_collapse(state: str, dtype: torch.dtype) -> None:
    """Whatever the size of the state: hidden errors must not shrink the step."""
    y0 = {"scalar": torch.tensor(1.0), "pair": torch.tensor([0.3, -2.0]), "large": torch.randn(3000)}[state]
    for rtol in (1e-2, 1e-3, 1e-5, 1e-7):
        with torch.autocast("cpu", dtype), warnings.catch_warnings(), rampde.stats() as stats:
            warnings.simplefilter("ignore")
            odeint(lambda t, y: torch.cos(3 * y) - y, y0, torch.tensor([0.0, 5.0]), rtol=rtol, atol=rtol)
        with rampde.stats() as wide:
            odeint(lambda t, y: torch.cos(3 * y) - y, y0, torch.tensor([0.0, 5.0]), rtol=rtol, atol=rtol)
        attempts = stats.accepted + stats.rejected
        assert attempts <= 2 * (wide.accepted + wide.rejected) + 10


def test_float32_is_not_touched() -> None:
    """No additional evaluation, no warning, the steps of torchdiffeq."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    calls: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t))
        return torch.cos(3 * y) - y

    y0 = torch.randn(20)
    odeint(func, y0, T, rtol=1e-3, atol=1e-3)
    ours = list(calls)
    calls.clear()
    torchdiffeq.odeint(func, y0, T, rtol=1e-3, atol=1e-3)
    assert len(ours) == len(calls)


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
def test_measuring_the_rounding_leaves_no_trace(checkpoint: str) -> None:
    """A func that draws random numbers is not taken for one that rounds, and its numbers are where they would be."""
    dropout = nn.Dropout(0.2)
    drawn: list[int] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        drawn.append(1)
        return dropout(-y)

    y0 = torch.ones(200, requires_grad=True)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = odeint(
                func, y0, T, rtol=1e-1, atol=1e-1, options={"min_step": 0.1, "first_step": 0.1}, checkpoint=checkpoint
            )
        results.append([y.detach(), torch.autograd.grad(y.sum(), y0)[0]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.isfinite(results[0][1]).all()


def test_parameters_used_only_later_keep_their_gradients_under_autocast() -> None:
    """Casts made while a step size is looked for, without a graph, must not replace those with one."""
    early, late = nn.Linear(3, 3), nn.Linear(3, 3)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return early(y) if t == 0 else late(y)

    y0 = torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = odeint(func, y0, T, rtol=1e-2, atol=1e-2, checkpoint="tape")
    gradients = torch.autograd.grad(y[-1].sum(), [early.weight, late.weight])
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
