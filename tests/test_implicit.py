"""Implicit methods forward: convergence, stiff problems, options, what they leave behind."""

import gc
import math
import weakref
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from implicit_problems import L_STABLE, SOLVERS, no_warnings, van_der_pol
from scipy.integrate import solve_ivp
from torch import Tensor

from rampde import odeint
from rampde.implicit_tableau import IMPLICIT_METHODS, ImplicitTableau

F64 = torch.float64

Func = Callable[[Tensor, Tensor], Tensor]


def logistic(theta: Tensor) -> Func:
    return lambda t, y: theta * y * (1 - y)


def logistic_solution(theta: Tensor, y0: Tensor) -> Tensor:
    return 1 / (1 + (1 / y0 - 1) * torch.exp(-theta))


def riccati(theta: Tensor) -> Func:
    return lambda t, y: -theta * (1 + t) * y**2


def riccati_solution(theta: Tensor, y0: Tensor) -> Tensor:
    return 1 / (1 / y0 + 1.5 * theta)


PROBLEMS = {"autonomous": (logistic, logistic_solution), "non-autonomous": (riccati, riccati_solution)}


@pytest.mark.parametrize("method", IMPLICIT_METHODS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_convergence_order_of_solution_and_gradient(method: str, problem: str) -> None:
    """Halving the step divides the errors at t = 1 by 2^p: the slope lies within 0.1 of the claimed order."""
    velocity, solution = PROBLEMS[problem]
    theta = torch.tensor(1.3, dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.2, 0.45, 1.4], dtype=F64, requires_grad=True)
    exact = solution(theta, y0)
    exact_y0, exact_theta = torch.autograd.grad(exact.sum(), [y0, theta])

    def errors(steps: int) -> list[float]:
        t = torch.linspace(0, 1, steps + 1, dtype=F64)
        y = odeint(velocity(theta), y0, t, method=method, rtol=1e-12, atol=1e-13)[-1]
        gradients = torch.autograd.grad(y.sum(), [y0, theta])
        return [
            float((y - exact).detach().abs().max()),
            float((gradients[0] - exact_y0).abs().max()),
            float((gradients[1] - exact_theta).abs()),
        ]

    order = IMPLICIT_METHODS[method].order
    # fine enough for the leading term, coarse enough that rounding is below a hundredth of the error
    steps = {1: 80, 2: 40, 3: 40, 4: 16, 5: 10, 6: 8}[order]
    with no_warnings():
        for coarse, fine in zip(errors(steps), errors(2 * steps), strict=True):
            assert fine > 1e-13
            assert abs(math.log2(coarse / fine) - order) < 0.1


def test_gauss_is_exact_on_the_polynomials_that_its_nodes_integrate() -> None:
    """With two equal nodes gl4 would not integrate t, and be of order one."""
    t = torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    for method, degree in (("gl4", 3), ("gl6", 5), ("radauIIA3", 2), ("radauIIA5", 4)):
        y = odeint(
            lambda t, y, n=degree: (n + 1) * t**n * torch.ones_like(y), torch.zeros(1, dtype=F64), t, method=method
        )
        exact = t[:, None] ** (degree + 1)
        assert (y - exact).abs().max() <= 8 * torch.finfo(F64).eps * exact.max()


@pytest.mark.parametrize("method", IMPLICIT_METHODS)
@pytest.mark.parametrize("linear_solver", SOLVERS)
def test_a_stiff_linear_problem_does_not_bound_the_step(method: str, linear_solver: str) -> None:
    """Prothero and Robinson: decay at 1e6 towards cos t, in steps of a tenth."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -1e6 * (y - torch.cos(t)) - torch.sin(t)

    t = torch.linspace(0, 10, 101, dtype=F64)
    with no_warnings():
        y = odeint(f, torch.tensor([1.0], dtype=F64), t, method=method, options={"linear_solver": linear_solver})
    # how far the stage order lets a method fall behind; an unstable method is off by 1e6^100
    assert (y[:, 0] - torch.cos(t)).abs().max() < 2e-2
    if method in L_STABLE:
        away = odeint(f, torch.tensor([2.0], dtype=F64), t, method=method)
        assert (away[2:, 0] - torch.cos(t[2:])).abs().max() < 1e-3


def robertson(t: Tensor, y: Tensor) -> Tensor:
    slow, fast, square = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return torch.stack([fast - slow, slow - fast - square, square])


@lru_cache
def by_scipy(f: Func, y0: tuple[float, ...], end: float, rtol: float, atol: float) -> tuple[Tensor, Tensor]:
    """The steps of SciPy's Radau, and the solution at the end."""
    solution = solve_ivp(
        lambda t, y: f(torch.tensor(t), torch.from_numpy(y)).numpy(), (0, end), y0, "Radau", rtol=rtol, atol=atol
    )
    return torch.from_numpy(solution.t), torch.from_numpy(np.ascontiguousarray(solution.y[:, -1]))


@pytest.mark.parametrize(("method", "bound"), [("gl4", 5e-3), ("gl6", 1e-4), ("radauIIA5", 1e-6)])
def test_van_der_pol_with_mu_1000(method: str, bound: float) -> None:
    """Through both turns, on a grid graded as a rough adaptive solve was."""
    y0 = (2.0, 0.0)
    _, exact = by_scipy(van_der_pol, y0, 2000.0, 1e-10, 1e-12)
    rough, _ = by_scipy(van_der_pol, y0, 2000.0, 1e-4, 1e-6)
    t = torch.cat([rough, (rough[1:] + rough[:-1]) / 2]).sort().values
    evaluations = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return van_der_pol(t, y)

    with no_warnings():
        y = odeint(f, torch.tensor(y0, dtype=F64), t, method=method)
    assert ((y[-1] - exact) / exact).abs().max() < bound
    # Newton's method takes five evaluations of the stages a step, mostly with a Jacobian of an earlier one
    assert evaluations < 6 * IMPLICIT_METHODS[method].stages * (len(t) - 1)


@pytest.mark.parametrize(
    ("method", "bound"), [("radauIIA3", 2e-3), ("radauIIA5", 1e-6), ("gl6", 1e-5), ("trbdf2", 2e-2)]
)
def test_robertson(method: str, bound: float) -> None:
    """Eleven decades of time, the grid logarithmic."""
    t = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-6, 5, 121, dtype=F64)])
    _, exact = by_scipy(robertson, (1.0, 0.0, 0.0), 1e5, 1e-10, 1e-14)
    with no_warnings():
        y = odeint(robertson, torch.tensor([1.0, 0.0, 0.0], dtype=F64), t, method=method)
    assert ((y[-1] - exact) / exact).abs().max() < bound
    # a linear invariant, which Runge-Kutta methods keep up to what Newton's method leaves
    assert (y.sum(1) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("method", ["trapezoid", "trbdf2", "radauIIA5"])
def test_perturb_evaluates_just_inside_the_steps(method: str) -> None:
    """f jumps at a grid point: with perturb each step sees its own side."""
    times: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t))
        return torch.where(t < 1, 1.0, -1.0) * torch.ones_like(y)

    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    y = odeint(f, torch.zeros(1, dtype=F64), t, method=method, options={"perturb": True})
    assert y[:, 0].tolist() == pytest.approx([0, 1, 0], abs=1e-14)
    assert 1.0 not in times


@pytest.mark.parametrize("grad", [True, False])
def test_what_needs_no_gradient_keeps_nothing(grad: bool) -> None:
    y0 = torch.ones(3)
    with torch.set_grad_enabled(grad):
        y = odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 3), method="gl6")
    assert not y.requires_grad
    assert not y0.requires_grad
    with torch.inference_mode():
        same = odeint(lambda t, y: -y, torch.ones(3), torch.linspace(0, 1, 3), method="gl6")
    assert torch.equal(y, same)


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("grad", [True, False])
def test_graphs_are_freed_without_a_garbage_collection(grad: bool, linear_solver: str) -> None:
    results: list[weakref.ref[Tensor]] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        k = torch.sin(y)
        results.append(weakref.ref(k))
        return k

    y0 = torch.ones(3, requires_grad=grad)
    gc.disable()
    try:
        y = odeint(f, y0, torch.linspace(0, 1, 5), method="gl4", options={"linear_solver": linear_solver})
        assert not any(k() is not None for k in results)
        if grad:
            y.sum().backward()
            assert not any(k() is not None for k in results)
    finally:
        gc.enable()


def test_an_exception_in_f_leaves_everything_as_it_was() -> None:
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise ZeroDivisionError("the ninth")
        return -y

    y0 = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError):
        odeint(f, y0, torch.linspace(0, 1, 9), method="gl4")
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert y0.requires_grad
    assert y0.is_leaf


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_iters": 0}, ValueError, "max_iters is 0, expected a positive integer"),
        ({"max_iters": 2.5}, TypeError, "max_iters is 2.5"),
        ({"linear_solver": "lu"}, ValueError, 'linear_solver is \'lu\', expected one of "auto", "dense"'),
        ({"newton_tolerance": 2}, ValueError, "newton_tolerance is 2, expected a positive number up to 1"),
        ({"newton_tolerance": "1"}, TypeError, "newton_tolerance is '1'"),
    ],
)
def test_options_are_checked(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeint(lambda t, y: -y, torch.ones(1), torch.linspace(0, 1, 3), method="gl4", options=options)


def test_a_tableau_of_the_user() -> None:
    """Lobatto IIIC of order 2, whose stages are coupled, with weights given as floats."""
    tableau = ImplicitTableau(a=[[0.5, -0.5], [0.5, 0.5]], b=[0.5, 0.5])
    assert tableau.order == 2
    y0 = torch.ones(2, dtype=F64)
    coarse, fine = (
        float(
            (
                odeint(lambda t, y: -y * t, y0, torch.linspace(0, 1, n + 1, dtype=F64), method=tableau)[-1]
                - math.exp(-0.5)
            )
            .abs()
            .max()
        )
        for n in (40, 80)
    )
    assert abs(math.log2(coarse / fine) - 2) < 0.1
