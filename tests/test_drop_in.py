"""What torchdiffeq computes, rampde computes: the same numbers in float64, options included."""

import warnings
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

from rampde import odeint

SHARED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
BOUND = 1e-12


def linear(t: Tensor, y: Tensor) -> Tensor:
    """A rotation with a time-dependent rate, damped nonlinearly; any number of leading dimensions."""
    matrix = torch.tensor([[-0.3, 1.1], [-0.9, 0.2]], dtype=y.dtype)
    return (1 + t * t) * y @ matrix - 0.1 * y**3 + torch.sin(3 * t)


def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    position, velocity = y
    return velocity.sum(-1) * torch.cos(t), -position[:, None] * torch.ones_like(velocity) / (1 + t)


def switched(t: Tensor, y: Tensor) -> Tensor:
    # jumps at the grid points: what a step sees there is decided by perturb
    return torch.where(t < 0.5, 1.0, -2.0) * y + torch.where(t < 0.75, 0.0, 1.0)


Y0 = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64)
EVEN = torch.linspace(0, 1, 6, dtype=torch.float64)
UNEVEN = torch.tensor([0.0, 0.013, 0.4, 0.41, 0.9, 1.3], dtype=torch.float64)


def compare(func: Any, y0: Any, t: Tensor, method: str, options: dict[str, Any] | None = None) -> None:
    """Solutions and gradients with respect to y0 and t agree to ``BOUND``."""

    def both(solver: Any) -> list[Tensor]:
        single = isinstance(y0, Tensor)
        start = [leaf.clone().requires_grad_() for leaf in ((y0,) if single else y0)]
        times = t.clone().requires_grad_()
        y = solver(func, start[0] if single else tuple(start), times, method=method, options=options)
        y = (y,) if single else y
        generator = torch.Generator().manual_seed(0)
        loss = sum((leaf * torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() for leaf in y)
        assert isinstance(loss, Tensor)
        # the times do not enter a solve without steps
        gradients = torch.autograd.grad(loss, [*start, times], materialize_grads=True, allow_unused=True)
        return [*(leaf.detach() for leaf in y), *gradients]

    for ours, theirs in zip(both(odeint), both(torchdiffeq.odeint), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= BOUND * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("t", [EVEN, UNEVEN, EVEN.flip(0), UNEVEN.flip(0), EVEN - 3], ids=str)
def test_steps_on_the_output_times(method: str, t: Tensor) -> None:
    compare(linear, Y0, t, method)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("step_size", [0.2, 0.1, 0.3, 0.07, 1.0, 5.0])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_step_size(method: str, interp: str, step_size: float, reverse: bool) -> None:
    # dividing the interval, not dividing it, coarser than the outputs, longer than the interval
    t = UNEVEN.flip(0) if reverse else EVEN
    compare(linear, Y0, t, method, {"step_size": step_size, "interp": interp})


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_grid_constructor(method: str, interp: str) -> None:
    def constructor(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        fractions = torch.tensor([0.0, 0.1, 0.15, 0.4, 0.8, 1.0], dtype=t.dtype)
        return t[0] + fractions * (t[-1] - t[0])

    compare(linear, Y0, EVEN, method, {"grid_constructor": constructor, "interp": interp})


def test_grid_constructor_sees_the_arguments_of_the_solve() -> None:
    seen: list[Any] = []

    def constructor(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        seen.append((func, y0, t))
        return t

    odeint(linear, Y0, EVEN, method="rk4", options={"grid_constructor": constructor})
    ((func, y0, t),) = seen
    assert torch.equal(func(t[0], Y0), linear(t[0], Y0))
    assert torch.equal(y0, Y0)
    assert torch.equal(t, EVEN)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("perturb", [False, True])
def test_perturb(method: str, perturb: bool) -> None:
    compare(switched, Y0, torch.linspace(0, 1, 5, dtype=torch.float64), method, {"perturb": perturb})


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("t", [EVEN, UNEVEN.flip(0)], ids=["forward", "reverse"])
def test_tuple(method: str, t: Tensor) -> None:
    y0 = (
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([[0.5, 2.0, 1.0], [0.0, 1.0, 3.0]]).double(),
    )
    compare(pair, y0, t, method)
    compare(pair, y0, t, method, {"step_size": 0.17, "interp": "cubic"})


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize(
    "y0", [torch.tensor(1.5).double(), Y0[:0], Y0[:, :1], Y0.expand(2, 3, 2)], ids=lambda y: str(y.shape)
)
def test_shapes(method: str, y0: Tensor) -> None:
    if y0.numel() == 0:
        y = odeint(lambda t, y: -y * t, y0, EVEN, method=method)
        assert y.shape == torchdiffeq.odeint(lambda t, y: -y * t, y0, EVEN, method=method).shape
        return
    compare(lambda t, y: torch.sin(y) * (1 + t), y0, EVEN, method)


@pytest.mark.parametrize("method", SHARED)
def test_single_time_gives_the_initial_state(method: str) -> None:
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return y

    y0 = Y0.clone().requires_grad_()
    for options in (None, {"step_size": 0.1}):
        y = odeint(func, y0, EVEN[:1], method=method, options=options)
        assert torch.equal(y, Y0[None])
        assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.ones_like(Y0))
    assert calls == 0


@pytest.mark.parametrize("method", SHARED)
def test_complex(method: str) -> None:
    matrix = torch.tensor([[0.1 + 1j, 0.5], [0.3j, -0.2 - 0.7j]], dtype=torch.complex128)
    y0 = torch.tensor([1.0 + 0.5j, -0.3 + 2j], dtype=torch.complex128)
    ours = odeint(lambda t, y: matrix @ y * t, y0, EVEN, method=method)
    theirs = torchdiffeq.odeint(lambda t, y: matrix @ y * t, y0, EVEN, method=method)
    assert (ours - theirs).abs().max() <= BOUND


def test_unknown_option_warns_and_changes_nothing() -> None:
    expected = odeint(linear, Y0, EVEN, method="rk4")
    options = {"foo": 1, "first_step": 0.1}
    with pytest.warns(UserWarning, match=r"Unexpected arguments \{'foo': 1, 'first_step': 0.1\}"):
        y = odeint(linear, Y0, EVEN, method="rk4", options=options)
    assert torch.equal(y, expected)
    assert options == {"foo": 1, "first_step": 0.1}


def test_known_options_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options: dict[str, Any] = {"step_size": 0.1, "interp": "cubic", "perturb": True, "norm": torch.norm}
        odeint(linear, Y0, EVEN, method="rk4", options=options)
        options = {"step_size": None, "grid_constructor": None}
        y = odeint(linear, Y0, EVEN, method="rk4", options=options)
    assert torch.equal(y, odeint(linear, Y0, EVEN, method="rk4"))


def test_tolerances_are_accepted_as_torchdiffeq_takes_them() -> None:
    expected = odeint(linear, Y0, EVEN, method="rk4")
    for tolerance in (0, 1e-3, torch.tensor(1e-3), [1e-3], (1e-3,)):
        assert torch.equal(odeint(linear, Y0, EVEN, method="rk4", rtol=tolerance, atol=tolerance), expected)
    y0 = (Y0[:, 0], Y0)
    odeint(pair, y0, EVEN, method="rk4", rtol=[1e-3, 1e-4], atol=iter((1e-6, 1e-7)))


@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_t_of_another_dtype(t_dtype: torch.dtype) -> None:
    # these times are exact in 8 bits, so that the dtype of t must make no difference at all
    t = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5], dtype=torch.float64)
    expected = odeint(linear, Y0, t, method="rk4", options={"step_size": 0.1})
    assert torch.equal(odeint(linear, Y0, t.to(t_dtype), method="rk4", options={"step_size": 0.1}), expected)
