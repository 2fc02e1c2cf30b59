"""Solves by SciPy: its solvers and options, the user's structures and dtypes, and no gradient that goes missing."""

import math
import sys
import warnings
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import rampde
from rampde import odeint

pytest.importorskip("scipy")

SOLVERS = ["LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF"]
T = torch.linspace(0, 1, 5, dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y * t + torch.sin(3 * t)


def y0(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.1]], dtype=dtype)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", SOLVERS)
def test_torchdiffeq(solver: str, dtype: torch.dtype, reverse: bool) -> None:
    t = T.flip(0) if reverse else T
    options = {"solver": solver, "max_step": 0.2}
    ours = odeint(decay, y0(dtype), t, method="scipy_solver", options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it passes min_step to solvers that have none
        theirs = torchdiffeq.odeint(decay, y0(dtype), t, method="scipy_solver", options=options)
    assert ours.dtype == theirs.dtype == dtype
    assert ours.shape == theirs.shape
    # LSODA sees the time in float32 there
    bound = 2e-6 if dtype == torch.float32 or solver == "LSODA" else 1e-12
    assert (ours - theirs).abs().max() <= bound


def test_the_default_is_lsoda() -> None:
    assert torch.equal(
        odeint(decay, y0(), T, method="scipy_solver"),
        odeint(decay, y0(), T, method="scipy_solver", options={"solver": "LSODA", "min_step": 0.0}),
    )


def test_a_class_of_solvers_and_a_single_time() -> None:
    import scipy.integrate

    y = odeint(decay, y0(), T, method="scipy_solver", options={"solver": scipy.integrate.RK45})
    assert torch.equal(y, odeint(decay, y0(), T, method="scipy_solver", options={"solver": "RK45"}))
    assert torch.equal(odeint(decay, y0(), T[:1], method="scipy_solver"), y0()[None])


def test_structures() -> None:
    start = {"a": torch.ones(2, dtype=torch.float64), "b": [torch.zeros((), dtype=torch.float32)]}
    y = odeint(lambda t, s: {"a": -s["a"], "b": [s["a"].sum()]}, start, T, method="scipy_solver", rtol=[1e-6, 1e-5])
    assert y["a"].shape == (5, 2)
    assert y["b"][0].dtype == torch.float32
    assert (y["a"][-1] - math.exp(-1)).abs().max() < 1e-5
    assert abs(float(y["b"][0][-1]) - 2 * (1 - math.exp(-1))) < 1e-5


def test_complex_states_and_tolerances_for_each_element() -> None:
    start = torch.tensor([1.0, 1j, 0.5], dtype=torch.complex128)
    atol = torch.tensor([1e-9, 1e-8, 1e-7])
    y = odeint(lambda t, y: 1j * y, start, T, method="scipy_solver", atol=atol, options={"solver": "DOP853"})
    assert (y[-1] - start * torch.exp(torch.tensor(1j))).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_for_func_alone(dtype: torch.dtype) -> None:
    seen = set()

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.add((t.dtype, y.dtype))
        return -y

    y = odeint(f, torch.ones(3), T, method="scipy_solver", rtol=1e-2, atol=1e-2, velocity_dtype=dtype)
    assert seen == {(torch.float32, dtype)}
    assert (y[-1] - math.exp(-1)).abs().max() < 2e-2


def test_func_is_not_called_more_often_than_scipy_does() -> None:
    with rampde.stats() as stats:
        odeint(decay, y0(), T, method="scipy_solver", options={"solver": "RK45"})
    with torch.no_grad():
        calls = []
        torchdiffeq.odeint(
            lambda t, y: calls.append(1) or decay(t, y), y0(), T, method="scipy_solver", options={"solver": "RK45"}
        )
    assert stats.evaluations_forward == len(calls)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y))


class TestGradients:
    """Never a gradient that is silently missing: the result requires one, and taking it is an error."""

    def check(self, solve: Any, wanted: Tensor) -> None:
        with pytest.warns(UserWarning, match="requires a gradient, but method .scipy_solver. has no gradient"):
            y = solve()
        assert y.requires_grad
        y.mul_(2.0)  # as of any result
        for allow_unused in (False, True):
            with pytest.raises(RuntimeError, match="has no gradient; use odeint_adjoint"):
                torch.autograd.grad(y.sum(), wanted, allow_unused=allow_unused, retain_graph=True)

    def test_parameters(self) -> None:
        network = Network()
        self.check(lambda: odeint(network, y0(), T, method="scipy_solver"), network.layer.weight)

    def test_initial_state(self) -> None:
        start = y0().requires_grad_()
        self.check(lambda: odeint(decay, start, T, method="scipy_solver"), start)

    def test_times(self) -> None:
        t = T.clone().requires_grad_()
        self.check(lambda: odeint(decay, y0(), t, method="scipy_solver"), t)

    def test_closures(self) -> None:
        factor = torch.ones(2, dtype=torch.float64, requires_grad=True)
        outside = factor * 2
        self.check(lambda: odeint(lambda t, y: outside * y, y0(), T, method="scipy_solver"), factor)

    def test_without_gradients_there_is_no_warning(self) -> None:
        network = Network()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.no_grad():
                y = odeint(network, y0(), T, method="scipy_solver")
            assert not y.requires_grad
            assert not odeint(decay, y0(), T, method="scipy_solver").requires_grad

    def test_odeint_adjoint(self) -> None:
        network = Network()
        results = []
        for method in ("scipy_solver", "dopri5"):
            start = y0().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                y = rampde.odeint_adjoint(
                    network, start, T, method=method, adjoint_method="dopri5", rtol=1e-9, atol=1e-9, adjoint_options={}
                )
            results.append(torch.autograd.grad(y.sum(), [start, network.layer.weight]))
        for ours, expected in zip(*results, strict=True):
            assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_failure_names_the_time() -> None:
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"solver RK45 of SciPy failed near t = 1 .*: Required step size is less"):
        odeint(lambda t, y: y * y, torch.ones(1).double(), t, method="scipy_solver", options={"solver": "RK45"})


def test_velocities_that_are_not_finite() -> None:
    with pytest.raises(RuntimeError, match="func returned values that are not finite at t = 0"):
        odeint(lambda t, y: y / 0, y0(), T, method="scipy_solver", options={"solver": "RK45"})


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_exception_in_func_comes_through(solver: str) -> None:
    class Fault(Exception):
        pass

    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Fault
        return -y

    with pytest.raises(Fault):
        odeint(f, y0(), T, method="scipy_solver", options={"solver": solver})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "rk4"}, ValueError, 'solver is "rk4", expected one of "RK45", "RK23"'),
        ({"solver": 3}, TypeError, "solver is 3, expected a name or a class"),
        ({"min_step": -1.0}, ValueError, "min_step is -1.0, expected a number that is not negative"),
        ({"max_step": 0}, ValueError, "max_step is 0, expected a positive number"),
        ({"max_step": "1"}, TypeError, "max_step is '1', expected a number"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeint(decay, y0(), T, method="scipy_solver", options=options)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match="needs SciPy: pip install scipy"):
        odeint(decay, y0(), T, method="scipy_solver")


def test_autocast_of_the_caller_keeps_its_gradients() -> None:
    """Casts of parameters made in the solve, without a graph, are not those of the region around it."""
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            odeint(lambda t, y: layer(y), torch.ones(3, 2), T, method="scipy_solver", rtol=1e-2, atol=1e-2)
        layer(torch.ones(3, 2)).sum().backward()
    assert layer.weight.grad is not None
