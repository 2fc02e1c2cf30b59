"""Errors that end an adaptive solve: too many steps, values that are not finite, steps that vanish."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from adaptive_problems import PROBLEMS, Counted, tensor
from torch import Tensor

import rampde
from rampde import odeint
from rampde.methods import ADAPTIVE

F64 = torch.float64


def van_der_pol(mu: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def test_too_many_steps() -> None:
    func, y0, _ = PROBLEMS["pendulum"]
    counted = Counted(func)
    with pytest.raises(RuntimeError, match=r"max_num_steps exceeded \(7 >= 7\)") as caught:
        odeint(counted, y0, tensor(0, 5), options={"max_num_steps": 7})
    message = str(caught.value)
    assert len(counted.accepted) + len(counted.rejected) == 7
    reached = float(re.search(r"at t = (\S+)", message).group(1))  # type: ignore[union-attr]
    start, size = counted.accepted[-1]
    assert reached == pytest.approx(start + size, rel=1e-5)
    assert "stiff here" not in message
    assert "max_num_steps" in message.split(":", 1)[1]


def test_max_num_steps_counts_between_outputs() -> None:
    func, y0, _ = PROBLEMS["pendulum"]
    counted = Counted(func)
    y = odeint(counted, y0, torch.linspace(0, 5, 50, dtype=F64), rtol=1e-8, atol=1e-8, options={"max_num_steps": 12})
    assert len(counted.accepted) > 12
    assert torch.isfinite(y).all()


def test_number_of_steps_is_bounded_by_default() -> None:
    from rampde.options import MAX_NUM_STEPS, AdaptiveOptions

    assert AdaptiveOptions.read({}).max_num_steps == MAX_NUM_STEPS <= 10**6


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_a_stiff_problem_is_called_stiff(method: str) -> None:
    with pytest.raises(RuntimeError, match="stiff here") as caught:
        odeint(
            van_der_pol(1000.0),
            tensor(2.0, 0.0),
            tensor(0, 100),
            method=method,
            rtol=1e-4,
            atol=1e-6,
            options={"max_num_steps": 2000},
        )
    assert re.search(r'implicit method, such as "radauIIA5"', str(caught.value))
    # the method that is named solves it
    assert "radauIIA5" in rampde.METHODS


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_func_that_is_not_finite(method: str, poison: float) -> None:
    """From t = 0.5 on: a clear error after a bounded number of evaluations, at the place."""
    counted = Counted(lambda t, y: torch.where(t < 0.5, -y, poison))
    with pytest.raises(RuntimeError, match="not finite") as caught:
        odeint(counted, tensor(1.0), tensor(0, 1), method=method, rtol=1e-3, atol=1e-3)
    assert float(re.search(r"t = (\d\S*?)[,;: ]", str(caught.value)).group(1)) == pytest.approx(0.5)  # type: ignore[union-attr]
    # a few dozen halvings of a step, each time that one was accepted on the way
    assert len(counted.accepted) + len(counted.rejected) < 200
    with pytest.raises(RuntimeError, match=r"not finite.* t = 0"):
        odeint(lambda t, y: y * poison, tensor(1.0), tensor(0, 1), method=method)


@pytest.mark.parametrize("policy", ["step", "none", "tape"])
def test_min_step_does_not_accept_a_state_that_is_not_finite(policy: str) -> None:
    y0 = tensor(1.0).requires_grad_()
    with pytest.raises(RuntimeError, match=r"non-finite values in the state at t = 0\.\d+.*min_step"):
        odeint(
            lambda t, y: torch.where(t < 0.5, -y, math.nan),
            y0,
            tensor(0, 1),
            options={"min_step": 0.01},
            checkpoint=policy,
        )


def test_underflow_of_the_step() -> None:
    """A singularity at t = 1: y = 1 / (1 - t)."""
    counted = Counted(lambda t, y: y * y)
    with pytest.raises(RuntimeError, match=r"underflow in the step size.* t = 1[,. ]"):
        odeint(counted, tensor(1.0), tensor(0, 2), rtol=1e-6, atol=1e-6)
    assert counted.calls < 10_000
