"""Adaptive methods: the steps of torchdiffeq, controllers, what a solve evaluates."""

import warnings
from typing import Any

import pytest
import torch
from adaptive_problems import PROBLEMS, Counted, linear, tensor
from steps import equal_steps

import rampde
from rampde import odeint
from rampde.methods import ADAPTIVE
from rampde.options import CONTROLLERS

F64 = torch.float64


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_takes_the_steps_of_torchdiffeq(problem: str, method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    func, y0, t = PROBLEMS[problem]
    ours, theirs = Counted(func), Counted(func)
    tolerance: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8, "method": method}
    if method == "dopri8":
        # the step that is chosen for the start is so small that the estimate of its error is nothing but rounding
        tolerance["options"] = {"first_step": 5e-3 if problem == "arenstorf" else 0.5}
    elif method == "bosh3":
        # between the ends of steps ours is of order 3 and theirs of order 1
        tolerance["options"] = {"step_t": t[1:]}
    y = odeint(ours, y0, t, **tolerance)
    expected = torchdiffeq.odeint(theirs, y0, t, **tolerance)
    assert (y - expected).abs().max() < 1e-10
    assert len(ours.accepted) == len(theirs.accepted) >= 3
    assert len(ours.rejected) == len(theirs.rejected)
    # torchdiffeq tells callbacks the negated time where time is reversed
    sign = -1.0 if t[-1] < t[0] else 1.0
    span = float((t[-1] - t[0]).abs())
    for (start, size), (their_start, their_size) in zip(ours.accepted, theirs.accepted, strict=True):
        # an error of 1e-8 is estimated from velocities up to 1e4 times as large as the state, whose rounding (1e-16)
        # shows in the fourth digit of the estimate at worst
        assert min(abs(start - their_start), abs(start - sign * their_start)) <= 1e-5 * span
        assert abs(size - their_size) <= 1e-4 * their_size
    assert ours.calls <= theirs.calls


def test_output_times_do_not_change_the_steps() -> None:
    func, y0, _ = PROBLEMS["pendulum"]
    few, many = Counted(func), Counted(func)
    ends = odeint(few, y0, tensor(0, 5), rtol=1e-6, atol=1e-6)
    y = odeint(many, y0, torch.linspace(0, 5, 60, dtype=F64), rtol=1e-6, atol=1e-6)
    assert few.accepted == many.accepted
    assert few.calls == many.calls
    assert torch.equal(y[-1], ends[-1])


# the estimate of fehlberg2 is the error of a first-order method, made small by design: it does not bound its own
@pytest.mark.parametrize("method", [name for name in ADAPTIVE if name != "fehlberg2"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_reach_the_tolerance(controller: str, method: str) -> None:
    func, y0, t = PROBLEMS["linear"]
    exact = odeint(func, y0, t, method="dopri8", rtol=1e-12, atol=1e-12)
    y = odeint(func, y0, t, method=method, rtol=1e-4, atol=1e-4, options={"controller": controller})
    assert (y - exact).abs().max() <= 100 * 1e-4 * exact.abs().max()


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_choose_the_next_step_by_their_formula(controller: str) -> None:
    """``h_next = safety h r_n^-(p+i+d)/k r_{n-1}^(p+2d)/k r_{n-2}^-d/k`` after accepted steps."""
    func, y0, t = PROBLEMS["lotka-volterra"]
    # coefficients of the controller by its name, and the same ones by themselves
    named: dict[str, Any] = {"controller": controller}
    given = dict(zip(("pcoeff", "icoeff", "dcoeff"), CONTROLLERS[controller], strict=True))
    free = {"ifactor": 1e3, "dfactor": 1e-3, "first_step": 1e-2}
    with rampde.stats() as stats:
        by_name = odeint(func, y0, t, rtol=1e-5, atol=1e-5, options=named | free)
        by_number = odeint(func, y0, t, rtol=1e-5, atol=1e-5, options=given | free)
    assert torch.equal(by_name, by_number)
    solve = stats.solves[0]
    sizes, ratios = solve.step_sizes, [1.0, 1.0, *solve.error_ratios]
    p, i, d = CONTROLLERS[controller]
    rejected = set(solve.rejected_starts)
    checked = 0
    for n in range(len(sizes) - 1):
        if solve.starts[n + 1] in rejected:
            continue
        current, last, one_before = ratios[n + 2], ratios[n + 1], ratios[n]
        k = 5
        factor = 0.9 * current ** (-(p + i + d) / k) * last ** ((p + 2 * d) / k) * one_before ** (-d / k)
        if controller == "I":
            factor = max(factor, 1.0)
        assert sizes[n + 1] == pytest.approx(sizes[n] * factor, rel=1e-12)
        checked += 1
    assert checked > 20


def test_pi_controller_rejects_less_where_stability_limits_the_step() -> None:
    """The elementary controller oscillates around the limit of stability (Hairer, Wanner II, IV.2); a PI does not."""
    y0, t = tensor(1.0, 0.0), tensor(0, 10)

    def rejected(controller: str) -> int:
        counted = Counted(lambda t, y: torch.stack([-50 * (y[0] - torch.cos(t)), y[0] - y[1]]))
        odeint(counted, y0, t, rtol=1e-4, atol=1e-4, options={"controller": controller})
        return len(counted.rejected)

    assert rejected("PI") < rejected("I") / 2


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_single_time_gives_the_initial_state(method: str) -> None:
    counted = Counted(linear)
    y0 = torch.ones(2, 2, dtype=F64, requires_grad=True)
    y = odeint(counted, y0, tensor(0.3), method=method)
    assert torch.equal(y, y0[None])
    assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.ones_like(y0))
    assert counted.calls == 0


@pytest.mark.parametrize("method", ADAPTIVE)
def test_evaluations_per_step(method: str) -> None:
    """One for the first step, one at the start, and the new stages of every attempt."""
    tableau = ADAPTIVE[method]
    func, y0, _ = PROBLEMS["pendulum"]
    counted = Counted(func)
    odeint(counted, y0, tensor(0, 1), method=method, rtol=1e-5, atol=1e-5, options={"step_t": [1.0]})
    accepted, rejected = len(counted.accepted), len(counted.rejected)
    closed = tableau.closed
    new = closed.attempted - 1
    # where the error does not need the velocity at the end, a rejected step never evaluates it, nor does the last one
    later = closed.stages - closed.attempted
    assert counted.calls == 2 + (accepted + rejected) * new + later * (accepted - 1)
    given = Counted(func)
    odeint(given, y0, tensor(0, 1), method=method, options={"first_step": 0.1} | equal_steps(0.125))
    assert given.calls == 1 + 8 * new + later * 7


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_compensated_sums_leave_the_steps_alone(method: str, compensated: bool) -> None:
    func, y0, t = PROBLEMS["pendulum"]
    expected = odeint(func, y0, t, method=method, rtol=1e-5, atol=1e-5)
    y = odeint(func, y0, t, method=method, rtol=1e-5, atol=1e-5, compensated=compensated)
    assert (y - expected).abs().max() <= 1e-11


def test_zero_velocity() -> None:
    """Nothing to estimate: the largest growth from step to step, and the exact answer."""
    counted = Counted(lambda t, y: torch.zeros_like(y))
    y = odeint(counted, tensor(1.0, 2.0), tensor(0, 1e6))
    assert torch.equal(y[1], tensor(1.0, 2.0))
    assert len(counted.accepted) < 30


def test_empty_state() -> None:
    y = odeint(lambda t, y: y, torch.ones(0, 3, dtype=F64), tensor(0, 1, 2))
    assert y.shape == (3, 0, 3)


def test_nothing_warns_on_the_common_roads() -> None:
    y0 = torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ADAPTIVE:
            for dtype in (None, torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    y = odeint(lambda t, y: torch.sin(y) - t, y0, torch.tensor([0.0, 0.4, 1.0]), rtol=1e-2, atol=1e-2)
                torch.autograd.grad(y.sum(), y0)
            assert method in ADAPTIVE


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
def test_grad_mode_does_not_change_the_solution(checkpoint: str) -> None:
    func, y0, t = PROBLEMS["lotka-volterra"]
    with torch.no_grad():
        expected = odeint(func, y0, t, rtol=1e-5, atol=1e-5)
    y = odeint(func, y0.clone().requires_grad_(), t, rtol=1e-5, atol=1e-5, checkpoint=checkpoint)
    # the tape measures the error by other operations, the same to rounding
    assert (y - expected).abs().max() <= (0.0 if checkpoint != "tape" else 1e-9)
