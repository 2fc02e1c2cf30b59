"""Implicit methods forward: convergence, stiff problems, both linear solvers, precision, what goes wrong."""

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from rampde import odeint
from rampde.implicit_tableau import IMPLICIT_METHODS, ImplicitTableau
from rampde.linear import Derivative, gmres

F64 = torch.float64
L_STABLE = ("implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2")
SOLVERS = ("dense", "krylov")
NOT_CONVERGED = "Functional iteration did not converge. Solution may be incorrect."

Func = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])


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


def net_and_state(dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    """The same in every dtype."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(dtype)
    return net, torch.randn(16, 4).to(dtype).requires_grad_()


@pytest.mark.parametrize("method", IMPLICIT_METHODS)
def test_dense_and_krylov_agree(method: str) -> None:
    t = torch.linspace(0, 1, 5, dtype=F64)
    results = []
    for linear_solver in SOLVERS:
        net, y0 = net_and_state(F64)
        options = {"linear_solver": linear_solver}
        y = odeint(lambda t, y, net=net: 3 * torch.sin(net(y)) * (1 + t), y0, t, method=method, options=options)
        results.append([y, *torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])])
    for dense, krylov in zip(*results, strict=True):
        # the part of the default rtol that Newton's method and GMRES may leave, over a few steps
        assert (dense - krylov).abs().max() <= 1e-7 * dense.abs().max()


def test_a_large_state_never_forms_a_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Derivative) -> Tensor:
        raise AssertionError("a Jacobian of 40,000 columns")

    monkeypatch.setattr(Derivative, "matrix", refuse)
    y0 = torch.rand(100, 400, requires_grad=True)
    y = odeint(lambda t, y: torch.cos(y) * t, y0, torch.linspace(0, 1, 5), method="radauIIA5")
    y[-1].sum().backward()
    double = y0.detach().double().requires_grad_()
    exact = odeint(lambda t, y: torch.cos(y) * t, double, torch.linspace(0, 1, 81, dtype=F64), method="rk4")[-1]
    exact.sum().backward()
    assert y0.grad is not None
    assert double.grad is not None
    # the discretisation error of four steps
    assert (y[-1] - exact).abs().max() < 1e-5
    assert (y0.grad - double.grad).abs().max() < 1e-4


def test_the_matrix_is_formed_where_gmres_is_slow() -> None:
    """The heat equation in steps that are large for its stiffness, which only a preconditioner could make easy."""
    size = 160
    ones = torch.ones(size, dtype=F64)
    laplacian = 0.1 * (size + 1) ** 2 * (torch.diag(-2 * ones) + torch.diag(ones[1:], 1) + torch.diag(ones[1:], -1))
    # so that all frequencies are there
    y0 = (torch.linspace(0, 1, size, dtype=F64) > 0.5).to(F64)
    t = torch.linspace(0, 1, 6, dtype=F64)
    with no_warnings():
        y = odeint(lambda t, y: y @ laplacian, y0, t, method="radauIIA5")
    assert (y[-1] - torch.linalg.matrix_exp(laplacian) @ y0).abs().max() < 1e-3
    with pytest.warns(UserWarning, match=NOT_CONVERGED):
        odeint(lambda t, y: y @ laplacian, y0, t, method="radauIIA5", options={"linear_solver": "krylov"})


def test_gmres() -> None:
    matrix = torch.eye(60, dtype=F64) + 0.3 * torch.randn(60, 60, dtype=F64) / math.sqrt(60)
    r = torch.randn(60, dtype=F64)
    u, residual, products = gmres(lambda v: matrix @ v, r, 1e-12, 300)
    assert residual <= 1e-12
    assert products < 40
    assert (u - torch.linalg.solve(matrix, r)).norm() < 1e-11 * u.norm()
    # more products than it keeps vectors: restarted
    harder = torch.diag(torch.linspace(1, 100, 60, dtype=F64))
    u, residual, products = gmres(lambda v: harder @ v, r, 1e-10, 500)
    assert products > 30
    assert (harder @ u - r).norm() <= 2e-10 * r.norm()
    zero = torch.zeros(3, dtype=F64)
    assert torch.equal(gmres(lambda v: v, zero, 1e-10, 10)[0], zero)


class OnceDifferentiable(torch.autograd.Function):
    """An operation without a second derivative, a forward mode and a batching rule."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


@pytest.mark.parametrize("linear_solver", SOLVERS)
def test_operations_that_can_be_differentiated_only_once(linear_solver: str) -> None:
    weight = torch.randn(3, 3, dtype=F64, requires_grad=True)
    t = torch.linspace(0, 1, 4, dtype=F64)
    results = []
    for activation in (torch.tanh, OnceDifferentiable.apply):
        y0 = torch.ones(2, 3, dtype=F64, requires_grad=True)
        y = odeint(
            lambda t, y, g=activation: g(y @ weight) - y, y0, t, method="gl4", options={"linear_solver": linear_solver}
        )
        results.append([y, *torch.autograd.grad(y.sum(), [y0, weight])])
    for expected, found in zip(*results, strict=True):
        assert (expected - found).abs().max() < 1e-8


@pytest.mark.parametrize(
    ("method", "linear_solver"),
    [*((method, "dense") for method in IMPLICIT_METHODS), ("gl6", "krylov"), ("trbdf2", "krylov")],
)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_sixteen_bit_velocities(precision: torch.dtype, linear_solver: str, method: str) -> None:
    """State and gradients are off by the rounding of the velocities, at 8 steps and at 32, and the iterations end."""
    roundoff = torch.finfo(precision).eps / 2
    for steps in (8, 32):
        results = []
        for dtype in (F64, torch.float32):
            net, y0 = net_and_state(dtype)
            evaluations = 0

            def f(t: Tensor, y: Tensor, net: torch.nn.Module = net) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                return net(y)

            t = torch.linspace(0, 1, steps + 1, dtype=dtype)
            with no_warnings(), torch.autocast("cpu", precision, enabled=dtype == torch.float32):
                y = odeint(f, y0, t, method=method, options={"linear_solver": linear_solver})[-1]
            assert y.dtype == dtype
            spent = evaluations
            # as small as a loss in 16 bits would lose without the scale
            gradients = torch.autograd.grad((1e-6 * y.square()).sum(), [y0, *net.parameters()])
            results.append([y, *gradients])
        stages = IMPLICIT_METHODS[method].stages
        assert spent <= 6 * stages * steps
        for exact, found in zip(*results, strict=True):
            assert (found - exact).norm() < 4 * roundoff * exact.norm()


@pytest.mark.parametrize("method", L_STABLE)
def test_sixteen_bit_velocities_of_a_stiff_problem(method: str) -> None:
    """What is rounded is the input of f; its error is not multiplied by the stiffness, 1e4."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -1e4 * (y.float() - torch.cos(t)).to(y.dtype)

    t = torch.linspace(0, 2, 21)
    y0 = torch.ones(3)
    with no_warnings():
        y = odeint(f, y0, t, method=method, velocity_dtype=torch.bfloat16)
    assert (y[:, 0] - torch.cos(t)).abs().max() < 4 * torch.finfo(torch.bfloat16).eps


def test_mixed_leaves_and_what_f_sees() -> None:
    """A dict of a float32, a complex128 and an empty tensor; f gets each as y0 has it."""
    y0 = {"a": torch.ones(3), "z": torch.tensor([1.0 + 0j], dtype=torch.complex128), "none": torch.zeros(0, 2)}

    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        assert t.dim() == 0
        assert {name: value.dtype for name, value in y.items()} == {name: value.dtype for name, value in y0.items()}
        return {"a": -y["a"], "z": 1j * y["z"], "none": y["none"]}

    y = odeint(f, y0, torch.linspace(0, 1, 6, dtype=F64), method="gl4")
    assert {name: (value.dtype, value.shape) for name, value in y.items()} == {
        name: (value.dtype, (6, *value.shape)) for name, value in y0.items()
    }
    assert (y["a"][-1] - math.exp(-1)).abs().max() < 1e-6
    assert abs(complex(y["z"][-1, 0]) - complex(math.cos(1), math.sin(1))) < 1e-5


def test_a_velocity_that_does_not_depend_on_the_state() -> None:
    y0 = torch.zeros(2, dtype=F64, requires_grad=True)
    for linear_solver in SOLVERS:
        options = {"linear_solver": linear_solver}
        y = odeint(
            lambda t, y: t.expand(2), y0, torch.tensor([0.0, 1.0], dtype=F64), method="radauIIA3", options=options
        )
        assert (y[-1] - 0.5).abs().max() < 1e-15
        assert torch.equal(torch.autograd.grad(y[-1].sum(), y0)[0], torch.ones(2, dtype=F64))


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


def test_an_iteration_that_does_not_converge_warns_once() -> None:
    t = torch.linspace(0, 2000, 11, dtype=F64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odeint(van_der_pol, torch.tensor([2.0, 0.0], dtype=F64), t, method="gl4", options={"max_iters": 2})
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    message = str(caught[0].message)
    assert message.startswith(NOT_CONVERGED)
    assert "of 10 steps" in message
    assert "t = 0 to 200" in message
    assert "max_iters" in message
    assert caught[0].filename == __file__


def test_equations_without_a_solution() -> None:
    """y' = y by implicit Euler with step 1: y_next = 1 + y_next."""
    y0 = torch.ones(1, requires_grad=True)
    with pytest.warns(UserWarning, match="singular"):
        y = odeint(lambda t, y: y, y0, torch.tensor([0.0, 1.0]), method="implicit_euler")
    with pytest.raises(RuntimeError, match="t = 0 to 1 are singular"):
        y.sum().backward()


def test_a_guess_where_f_is_not_finite() -> None:
    """The square root of what the extrapolated velocities lead to is NaN in the last steps."""
    t = torch.linspace(0, 1.9, 6, dtype=F64)
    with no_warnings():
        y = odeint(lambda t, y: -y.sqrt(), torch.ones(2, dtype=F64), t, method="radauIIA5")
    assert (y[-1] - 0.05**2).abs().max() < 1e-6


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


def test_tighter_tolerances_give_smaller_residuals() -> None:
    """The invariant of a rotation is kept by Gauss methods, up to what Newton's method leaves."""
    y0 = torch.tensor([1.0, 0.0], dtype=F64)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[1], y[0]]) * (1 + y.square().sum())

    t = torch.linspace(0, 4, 21, dtype=F64)
    drifts = []
    for rtol in (1e-3, 1e-12):
        y = odeint(f, y0, t, method="gl4", rtol=rtol, atol=rtol)
        drifts.append(float((y.square().sum(1) - 1).abs().max()))
    assert drifts[1] < 1e-13
    assert drifts[0] < 1e-4


@pytest.mark.parametrize("linear_solver", SOLVERS)
def test_random_numbers_are_those_of_the_stage(linear_solver: str) -> None:
    """Every evaluation of a stage draws the same mask, so that its equations have a solution; so does the gradient."""
    weight = torch.randn(3, 3, dtype=F64)
    direction = torch.randn(2, 3, dtype=F64)
    state = torch.get_rng_state()

    def solve(y0: Tensor) -> Tensor:
        torch.set_rng_state(state)
        options = {"linear_solver": linear_solver}
        t = torch.linspace(0, 1, 4, dtype=F64)
        drop = torch.nn.Dropout(0.5)
        with no_warnings():
            y: Tensor = odeint(
                lambda t, y: torch.tanh(drop(y) @ weight), y0, t, method="trbdf2", options=options, rtol=1e-11
            )
        return y[-1].sum()

    y0 = torch.ones(2, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(solve(y0), y0)
    step = 1e-6
    with torch.no_grad():
        difference = (solve(y0 + step * direction) - solve(y0 - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-6)
