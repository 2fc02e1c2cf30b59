"""Dense output: every method's solution as a function of time."""

from typing import Any

import pytest
import torch
from steps import equal_steps
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck

from rampde import METHODS, DenseSolution, odeint, odeint_dense
from rampde.methods import ADAPTIVE, FIXED

F64 = torch.float64
WITHOUT_SCIPY = [name for name in METHODS if not name.startswith("scipy")]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]]) * (1 + 0.2 * torch.sin(3 * t))


Y0 = tensor(1.0, 0.3)


def keywords(method: str) -> dict[str, Any]:
    if method in ADAPTIVE:
        # where two ways of estimating an error differ by its rounding, steps do too
        return {"method": method, "options": equal_steps(0.15)}
    return {"method": method, "options": {"step_size": 0.05, "interp": "cubic"}}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", WITHOUT_SCIPY)
def test_agrees_with_a_solve_that_was_asked_for_these_times(method: str, reverse: bool) -> None:
    """The same steps and the same interpolant: equal up to rounding."""
    start, end = (1.0, 0.0) if reverse else (0.0, 1.0)
    inner = torch.rand(5, dtype=F64).sort(descending=reverse).values
    t = torch.cat([tensor(start), inner, tensor(end)])
    expected = odeint(decay, Y0, t, **keywords(method))
    solution = odeint_dense(decay, Y0, start, end, **keywords(method))
    assert isinstance(solution, DenseSolution)
    found = solution(t)
    assert found.shape == (7, 2)
    assert found.dtype == F64
    # implicit methods solve their equations to a tolerance, from other starting values
    bound = 1e-12 if method in ADAPTIVE or method in FIXED else 1e-6
    assert (found - expected).abs().max() <= bound
    assert torch.equal(found[0], Y0)
    sign = -1.0 if reverse else 1.0
    steps = torch.tensor(solution.times, dtype=F64).diff()
    assert (sign * steps > 0).all()
    assert solution.times[0] == start
    assert sign * (solution.times[-1] - end) >= 0.0


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "euler", "radauIIA5"])
def test_shapes_of_times(method: str) -> None:
    solution = odeint_dense(decay, Y0, 0.0, 1.0, **keywords(method))
    t = torch.rand(3, 4, dtype=F64)
    found = solution(t)
    assert found.shape == (3, 4, 2)
    assert torch.equal(found[2, 1], solution(t[2, 1]))
    assert solution(0.5).shape == (2,)
    assert solution(t[:0]).shape == (0, 4, 2)
    # in any order, each by itself
    assert torch.equal(solution(t.flatten().flip(0)), found.view(12, 2).flip(0))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "midpoint", "gl4"])
def test_structured_and_complex_states(method: str) -> None:
    y0 = {"z": torch.randn(3, dtype=torch.complex128), "x": (torch.randn(2, 2, dtype=F64), torch.randn((), dtype=F64))}

    def func(t: Tensor, y: Any) -> Any:
        return {"z": 1j * (1 + t) * y["z"], "x": (-y["x"][0], torch.sin(y["x"][1]))}

    t = tensor(0.0, 0.21, 0.7, 1.0)
    expected = odeint(func, y0, t, **keywords(method))
    found = odeint_dense(func, y0, 0.0, 1.0, **keywords(method))(t)
    assert found["z"].dtype == torch.complex128
    for a, b in (
        (found["z"], expected["z"]),
        (found["x"][0], expected["x"][0]),
        (found["x"][1], expected["x"][1]),
    ):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= (1e-12 if method != "gl4" else 1e-6)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_gradients(method: str) -> None:
    """With respect to the times asked for, the ends, y0 and parameters."""

    def run(y0: Tensor, t0: Tensor, t1: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        options: dict[str, Any] = {"step_size": 0.3, "interp": "cubic"}
        if method in ADAPTIVE:
            options = {"first_step": 0.3, "max_step": 0.3, "min_step": 0.3}
        solution = odeint_dense(
            lambda t, y: torch.tanh(y @ weight) * torch.cos(t), y0, t0, t1, method=method, options=options
        )
        return solution(t)

    y0, weight = (torch.randn(2, 2, dtype=F64, requires_grad=True) for _ in range(2))
    t = tensor(0.11, 0.5, 0.93).requires_grad_()
    ends = [torch.tensor(value, dtype=F64) for value in (0.0, 1.0)]
    assert gradcheck(run, (y0, *ends, t, weight))


def test_slope_of_the_solution_is_the_velocity() -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=F64).requires_grad_()
    solution = odeint_dense(decay, Y0, 0.0, 1.0, rtol=1e-8, atol=1e-8)
    y = solution(t)
    for component in range(2):
        slope = torch.autograd.grad(y[:, component].sum(), t, retain_graph=True)[0]
        velocity = torch.stack([decay(time, state)[component] for time, state in zip(t, y.detach(), strict=True)])
        assert (slope - velocity).detach().abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_agree_with_those_of_odeint(method: str) -> None:
    net = nn.Linear(2, 2).double()
    y0 = Y0.clone().requires_grad_()
    t = tensor(0.0, 0.3, 0.77, 1.0)
    y = odeint(lambda t, y: torch.tanh(net(y)), y0, t, **keywords(method))
    dense = odeint_dense(lambda t, y: torch.tanh(net(y)), y0, 0.0, 1.0, **keywords(method))(t)
    found, expected = (torch.autograd.grad(s.square().sum(), [y0, *net.parameters()]) for s in (dense, y))
    assert all((a - b).abs().max() <= 1e-11 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("time", [-0.1, 1.0001, float("nan"), float("inf")])
def test_a_time_out_of_range(time: float) -> None:
    solution = odeint_dense(decay, Y0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"expected a time from 0\.0 to 1\.0"):
        solution(time)
    with pytest.raises(ValueError, match="expected a time"):
        solution(tensor(0.5, time))


def test_the_last_step_may_lead_beyond_the_end_but_not_the_solution() -> None:
    solution = odeint_dense(decay, Y0, 0.0, 1.0, rtol=1e-3, atol=1e-3)
    assert solution.times[-1] > 1.0
    solution(1.0)
    with pytest.raises(ValueError, match="expected a time"):
        solution((1.0 + solution.times[-1]) / 2)


def test_ends_in_single_precision() -> None:
    y0 = Y0.float()
    solution = odeint_dense(decay, y0, torch.tensor(0.1), torch.tensor([0.9]), method="rk4", options={"step_size": 0.2})
    assert solution(torch.tensor([0.1, 0.5, 0.9])).dtype == torch.float32
    # what float32 makes of 0.9 lies above it: the same number in double is no time out of range
    solution(torch.tensor(0.9, dtype=torch.float32).double())


def test_no_grad() -> None:
    net = nn.Linear(2, 2).double()
    with torch.no_grad():
        solution = odeint_dense(lambda t, y: net(y), Y0, 0.0, 1.0)
    assert not solution(0.5).requires_grad


def test_linear_interpolation_of_fixed_steps() -> None:
    solution = odeint_dense(decay, Y0, 0.0, 1.0, method="rk4", options={"step_size": 0.25, "interp": "linear"})
    a, b, middle = solution(0.25), solution(0.5), solution(0.375)
    assert (middle - (a + b) / 2).abs().max() <= 1e-15
    cubic = odeint_dense(decay, Y0, 0.0, 1.0, method="rk4", options={"step_size": 0.25})
    exact = odeint(decay, Y0, tensor(0, 0.375), rtol=1e-12, atol=1e-12)[-1]
    assert (cubic(0.375) - exact).abs().max() < (middle - exact).abs().max() / 10


@pytest.mark.parametrize(
    ("t0", "t1", "error", "message"),
    [
        (tensor(0.0, 1.0), 1.0, ValueError, r"t0 has shape \[2\], expected a single element"),
        (0.0, "1", TypeError, "t1 is '1', expected a number"),
        (0.0, None, TypeError, "t1 is None, expected a number"),
        (torch.tensor(0), 1.0, TypeError, r"t0 has dtype torch\.int64"),
        (0.0, 0.0, ValueError, r"t\[1\] is 0\.0"),
        (0.0, float("nan"), ValueError, "nan"),
    ],
)
def test_bad_ends(t0: Any, t1: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeint_dense(decay, Y0, t0, t1)


def test_agrees_with_torchdiffeq() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    if not hasattr(torchdiffeq, "odeint_dense"):
        pytest.skip("this version has no dense output")
    theirs = torchdiffeq.odeint_dense(decay, Y0, tensor(0.0)[0], tensor(1.0)[0], rtol=1e-6, atol=1e-8)
    ours = odeint_dense(decay, Y0, 0.0, 1.0, rtol=1e-6, atol=1e-8)
    t = tensor(0.0, 0.2, 0.55, 1.0)
    expected = torch.stack([theirs(time) for time in t])
    assert (ours(t) - expected).abs().max() <= 1e-10
