"""The equations of implicit stages: Newton's method, both linear solvers, where there is no solution."""

import math
import warnings

import pytest
import torch
from implicit_problems import SOLVERS, net_and_state, no_warnings, van_der_pol
from torch import Tensor

from rampde import odeint
from rampde.implicit_tableau import IMPLICIT_METHODS
from rampde.linear import Derivative, gmres

F64 = torch.float64
NOT_CONVERGED = "Functional iteration did not converge. Solution may be incorrect."


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


def test_a_velocity_that_does_not_depend_on_the_state() -> None:
    y0 = torch.zeros(2, dtype=F64, requires_grad=True)
    for linear_solver in SOLVERS:
        options = {"linear_solver": linear_solver}
        y = odeint(
            lambda t, y: t.expand(2), y0, torch.tensor([0.0, 1.0], dtype=F64), method="radauIIA3", options=options
        )
        assert (y[-1] - 0.5).abs().max() < 1e-15
        assert torch.equal(torch.autograd.grad(y[-1].sum(), y0)[0], torch.ones(2, dtype=F64))


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
