"""Adams methods: torchdiffeq's numbers on equal grids, their orders on any, evaluations, events."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torchdiffeq
from multistep_problems import CONVERGED, METHODS, OPTIONS, Y0
from torch import Tensor

import rampde
from rampde import odeint


def linear(t: Tensor, y: Tensor) -> Tensor:
    matrix = torch.tensor([[-0.3, 1.1], [-0.9, 0.2]], dtype=y.dtype)
    return (1 + t * t) * y @ matrix - 0.1 * y**3 + torch.sin(3 * t)


class TestTorchdiffeq:
    @pytest.mark.parametrize("method", [*METHODS, "fixed_adams"])
    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 11, 20])
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    @pytest.mark.parametrize("max_order", [12, 6, 4])
    @pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
    def test_equal_steps(self, method: str, steps: int, reverse: bool, max_order: int, tolerance: float) -> None:
        """Wherever torchdiffeq's corrector converges; where it does not, it forgets a velocity."""
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        t = t.flip(0) if reverse else t
        options = {"max_order": max_order, "max_iters": 60}
        ours, theirs = (
            solver(linear, Y0, t, method=method, options=options, rtol=tolerance, atol=tolerance)
            for solver in (odeint, torchdiffeq.odeint)
        )
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_step_size(self, method: str, interp: str) -> None:
        t = torch.tensor([0.0, 0.13, 0.5, 1.0], dtype=torch.float64)
        options = {"step_size": 0.05, "interp": interp, "max_order": 6, "max_iters": 60}
        ours, theirs = (
            solver(linear, Y0, t, method=method, options=options) for solver in (odeint, torchdiffeq.odeint)
        )
        assert (ours - theirs).abs().max() <= 1e-12

    @pytest.mark.parametrize("method", METHODS)
    def test_perturb(self, method: str) -> None:
        def switched(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t < 0.5, 1.0, -2.0) * y + torch.where(t < 0.75, 0.0, 1.0)

        options = {"perturb": True, "max_iters": 60, "max_order": 5}
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        ours, theirs = (
            solver(switched, Y0, t, method=method, options=options) for solver in (odeint, torchdiffeq.odeint)
        )
        assert (ours - theirs).abs().max() <= 1e-12

    def test_both_warn_where_the_corrector_does_not_converge(self) -> None:
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        sentence = "Functional iteration did not converge. Solution may be incorrect."
        for solver in (odeint, torchdiffeq.odeint):
            with pytest.warns(UserWarning, match=sentence):
                solver(lambda t, y: -9 * y, Y0, t, method="implicit_adams")

    def test_max_order_below_four_is_rk4(self) -> None:
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        for method in METHODS:
            with pytest.warns(UserWarning, match="max_order is below 4, so the solver reduces to `rk4`"):
                y = odeint(linear, Y0, t, method=method, options={"max_order": 3})
            assert torch.equal(y, odeint(linear, Y0, t, method="rk4"))

    def test_unequal_steps_are_of_higher_order_than_torchdiffeq(self) -> None:
        """torchdiffeq takes the weights of equal steps on any grid, which leaves order 1 or 2."""

        def error(solver: Any, steps: int) -> float:
            t = 1.5 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2
            y = solver(lambda t, y: -y * torch.cos(t), torch.ones(1).double(), t, method="implicit_adams")
            return float((y[-1] - math.exp(-math.sin(1.5))).abs())

        assert math.log2(error(torchdiffeq.odeint, 80) / error(torchdiffeq.odeint, 160)) < 2.2
        assert math.log2(error(odeint, 20) / error(odeint, 40)) > 5


def test_the_error_names_step_and_time() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="step 2 of 8, between t = 0.25 and t = 0.375, after max_iters = 4"):
        odeint(lambda t, y: -9 * y, Y0, t, method="implicit_adams")


def test_the_explicit_default_is_stable() -> None:
    """With all the velocities that it may use, as torchdiffeq does by default, the explicit method explodes here."""
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    reference = odeint(linear, Y0, t, method="rk4")
    assert (odeint(linear, Y0, t, method="explicit_adams") - reference).abs().max() < 1e-4
    exploded = odeint(linear, Y0, t, method="explicit_adams", options={"max_order": 12})
    assert (exploded - reference).abs().max() > 1


def autonomous(a: Tensor) -> Any:
    return lambda t, y: torch.stack([y[1] * (1 + 0.1 * y[0]), -a * y[0]])


def driven(a: Tensor) -> Any:
    return lambda t, y: torch.stack([y[1] + torch.cos(2 * t), -a * y[0] * (1 + 0.5 * torch.sin(t))])


@cache
def solution_and_gradients(problem: Any, steps: int, method: str, max_order: int) -> tuple[Tensor, Tensor]:
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    options = {"max_order": max_order, **OPTIONS}
    y = odeint(problem(a), y0, t, method=method, options=options, **CONVERGED)[-1]
    gradients = torch.autograd.grad((y * torch.tensor([1.0, -2.0])).sum(), [y0, a])
    return y.detach(), torch.cat([gradients[0], gradients[1][None]])


@pytest.mark.parametrize("problem", [autonomous, driven])
@pytest.mark.parametrize(
    ("method", "max_order", "order"),
    [
        ("explicit_adams", 4, 3),
        ("explicit_adams", 5, 4),
        ("explicit_adams", 6, 4),
        ("implicit_adams", 4, 4),
        ("implicit_adams", 5, 5),
        ("implicit_adams", 12, 5),
    ],
)
def test_order_of_solution_and_gradients(problem: Any, method: str, max_order: int, order: int) -> None:
    def errors(steps: int) -> list[float]:
        exact = solution_and_gradients(problem, 640, "implicit_adams", 8)
        found = solution_and_gradients(problem, steps, method, max_order)
        return [float((value - limit).norm()) for value, limit in zip(found, exact, strict=True)]

    assert rampde.METHODS[method].order_with(max_order) == order
    for coarse, fine in zip(errors(80), errors(160), strict=True):
        assert abs(math.log2(coarse / fine) - order) <= 0.1


@pytest.mark.parametrize("method", METHODS)
def test_random_grids_are_of_order_four(method: str) -> None:
    """Steps of rk4 stand in where the grid is too rough for the formulas."""

    def error(steps: int) -> float:
        gaps = torch.rand(steps, dtype=torch.float64) + 1e-3
        t = torch.cat([gaps.new_zeros(1), 1.5 * gaps.cumsum(0) / gaps.sum()])
        options = {"max_order": 5 if method == "explicit_adams" else 12, "max_iters": 60}
        y = odeint(lambda t, y: -y * torch.cos(t), torch.ones(1).double(), t, method=method, options=options)
        return float((y[-1] - math.exp(-math.sin(1.5))).abs())

    assert error(400) < 3e-9
    assert error(50) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_evaluations(method: str) -> None:
    """As torchdiffeq: four for each of the first two steps, then one, and one for each iteration of the corrector."""
    counts = []
    for solver in (odeint, torchdiffeq.odeint):
        calls = 0

        def f(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return -y * t

        solver(f, Y0, torch.linspace(0, 1, 11, dtype=torch.float64), method=method)
        counts.append(calls)
    assert counts[0] == counts[1]
    if method == "explicit_adams":
        assert counts[0] == 16


@pytest.mark.parametrize("method", METHODS)
def test_events(method: str) -> None:
    event_time, y = rampde.odeint_event(
        lambda t, y: torch.stack([y[1], -torch.ones_like(y[0])]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor(0.0, dtype=torch.float64),
        event_fn=lambda t, y: y[0],
        method=method,
        options={"step_size": 0.05, "interp": "cubic"},
    )
    assert float(event_time) == pytest.approx(math.sqrt(2), abs=1e-6)
    assert float(y[-1, 0]) == pytest.approx(0, abs=1e-6)
