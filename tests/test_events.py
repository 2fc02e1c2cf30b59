"""Events: found by every method, in both directions, with the gradients of their times."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck

import rampde
from rampde import METHODS, odeint, odeint_event
from rampde.families import family_of
from rampde.methods import ADAPTIVE, get_method

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def supports_events(name: str) -> bool:
    return not name.startswith("scipy")


WITH_EVENTS = [name for name in METHODS if supports_events(name)]


def options_of(method: str, step_size: float = 0.02) -> dict[str, Any] | None:
    return None if method in ADAPTIVE else {"step_size": step_size}


def accuracy_of(method: str) -> float:
    """What a step size of 0.02 or the default tolerances are worth, for events between steps too."""
    order = getattr(get_method(method), "order", 1)
    # adaptive methods are interpolated in order 3 or 4 over steps of up to a half
    return 1e-4 if method in ADAPTIVE else 0.02 ** min(order, 2)


def oscillator(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


@pytest.mark.parametrize("method", WITH_EVENTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_zero_of_a_cosine(method: str, reverse: bool) -> None:
    """cos(t) = 0 at pi / 2, in either direction; the event function sees the true time and state."""
    y0, sign = tensor(1.0, 0.0), -1.0 if reverse else 1.0
    times: list[float] = []

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == ()
        assert y.shape == (2,)
        times.append(float(t))
        return y[0]

    options = options_of(method) or {}
    if family_of(get_method(method)).options.known.count("interp"):
        options["interp"] = "cubic"
    time, y = odeint(oscillator, y0, tensor(0, sign), event_fn=event_fn, method=method, options=options or None)
    bound = accuracy_of(method)
    assert time.shape == ()
    assert time.dtype == F64
    assert abs(float(time) - sign * math.pi / 2) <= bound
    assert y.shape == (2, 2)
    assert torch.equal(y[0], y0)
    assert (y[1] - tensor(0.0, -sign)).abs().max() <= bound
    assert min(sign * t for t in times) >= 0.0


@pytest.mark.parametrize("atol", [1e-4, 1e-8, 1e-12])
def test_time_is_found_to_the_absolute_tolerance(atol: float) -> None:
    """On a line, where only the bisection errs."""
    time, y = odeint(
        lambda t, y: torch.ones_like(y),
        tensor(0.0),
        tensor(0, 1),
        event_fn=lambda t, y: y[0] - 0.7,
        rtol=1e-9,
        atol=atol,
    )
    assert abs(float(time) - 0.7) <= atol + 1e-14
    assert abs(float(y[1, 0]) - float(time)) <= 1e-13


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_of_several_events_the_first_one_wins(method: str) -> None:
    """Whatever their signs are at the start: y grows from 1 as exp(t)."""
    for targets, first in ((tensor(3.0, 2.0, 5.0), 2.0), (tensor(4.0, 1.5), 1.5)):
        for signs in (torch.ones_like(targets), torch.linspace(-1, 1, len(targets), dtype=F64)):
            signs = torch.where(signs == 0, 1.0, signs)
            time, _ = odeint(
                lambda t, y: y,
                tensor(1.0),
                tensor(0, 1),
                event_fn=lambda t, y, targets=targets, signs=signs: signs * (y - targets),
                method=method,
                options=options_of(method),
                rtol=1e-8,
                atol=1e-8,
            )
            assert float(time) == pytest.approx(math.log(first), abs=1e-4 if method == "rk4" else 1e-6)


def test_an_event_of_any_shape_and_of_a_structured_state() -> None:
    y0 = {"a": tensor(1.0, 2.0), "b": (torch.ones(2, 2, dtype=F64),)}
    time, y = odeint(
        lambda t, y: {"a": -y["a"], "b": (y["b"][0],)},
        y0,
        tensor(0, 1),
        event_fn=lambda t, y: torch.stack([y["b"][0] - 3.0, y["b"][0] - 5.0]),
    )
    assert float(time) == pytest.approx(math.log(3), abs=1e-6)
    assert y["a"].shape == (2, 2)
    assert y["b"][0].shape == (2, 2, 2)
    assert torch.allclose(y["a"][1], tensor(1 / 3, 2 / 3), atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "radauIIA5"])
def test_event_at_the_start(method: str) -> None:
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return y

    y0 = tensor(1.0, 2.0).requires_grad_()
    time, y = odeint(
        func, y0, tensor(0.5, 1), event_fn=lambda t, y: y[0] - 1.0, method=method, options=options_of(method)
    )
    assert float(time) == 0.5
    assert torch.equal(y, torch.stack([y0, y0]))
    assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], tensor(2.0, 2.0))
    assert calls <= 3


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_state_at_the_event_is_differentiable(method: str, checkpoint: str) -> None:
    """At the time of the event held fixed, the gradients are those of a solve to that time."""
    weight = torch.tensor(1.3, dtype=F64, requires_grad=True)
    y0 = tensor(1.0, -0.5).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return weight * torch.stack([y[1], -torch.sin(y[0])])

    options = options_of(method)
    tolerance: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8, "method": method, "checkpoint": checkpoint}
    if options:
        options["interp"] = "cubic"
    time, y = odeint(func, y0, tensor(0, 1), event_fn=lambda t, y: y[0], options=options, **tolerance)
    plain = odeint(func, y0, torch.stack([torch.zeros_like(time), time.detach()]), options=options, **tolerance)
    assert (y[1] - plain[1]).abs().max() <= 1e-6
    found, expected = (torch.autograd.grad(s[1].square().sum(), [y0, weight]) for s in (y, plain))
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_gradients_of_the_time_and_the_state(method: str, checkpoint: str) -> None:
    """With respect to y0, t0, parameters of f and of the event function, against finite differences."""

    def run(y0: Tensor, t0: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"first_step": 0.05, "max_step": 0.05, "min_step": 0.05}
        if method == "rk4":
            options = {"step_size": 0.05, "interp": "cubic"}
        return odeint_event(
            lambda t, y: torch.stack([y[1], -weight[0] * (1 + 0.1 * t) * y[0]]),
            y0,
            t0,
            event_fn=lambda t, y: y[0] - target[0] * torch.cos(t / 5),
            method=method,
            atol=1e-13,
            rtol=1e-9,
            options=options,
            checkpoint=checkpoint,
        )

    inputs = [tensor(1.0, 0.2), tensor(0.3), tensor(1.1), tensor(0.4)]
    # the event's time jumps between polynomials where it crosses the end of a step: not within 1e-6 of here; the
    # interpolant satisfies the differential equation to the third power of the step only
    assert gradcheck(run, [value.requires_grad_() for value in inputs], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_a_closed_form(reverse: bool) -> None:
    """exp(a t) = c / y0 at t = log(c / y0) / a: all derivatives are known."""
    a, c, y0, t0 = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (0.8, 3.0, 1.2, 0.5))
    if reverse:
        c = torch.tensor([0.4], dtype=F64, requires_grad=True)
    time, y = odeint_event(
        lambda t, y: a * y, y0, t0, event_fn=lambda t, y: y - c, reverse_time=reverse, rtol=1e-10, atol=1e-12
    )
    exact = t0 + torch.log(c / y0) / a
    assert time.shape == ()
    assert float((time - exact).detach().abs()) <= 1e-9
    found = torch.autograd.grad(time, [a, c, y0, t0], retain_graph=True)
    expected = torch.autograd.grad(exact, [a, c, y0, t0])
    assert all((x - z).abs().max() <= 1e-7 for x, z in zip(found, expected, strict=True))
    # the state at the event is c, whatever else changes
    found = torch.autograd.grad(y[1], [a, c, y0, t0], allow_unused=True)
    for gradient, value in zip(found, (0.0, 1.0, 0.0, 0.0), strict=True):
        assert gradient is not None
        assert abs(float(gradient) - value) <= 1e-7


def test_bouncing_ball() -> None:
    """Three bounces with a coefficient of restitution, in closed form."""
    gravity, restitution = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (9.8, 0.7))
    height = torch.tensor([1.5], dtype=F64, requires_grad=True)
    t = torch.zeros(1, dtype=F64)
    state = (height, torch.zeros(1, dtype=F64))
    for _ in range(3):
        time, (position, velocity) = odeint_event(
            lambda t, y: (y[1], -gravity),
            state,
            t,
            event_fn=lambda t, y: y[0],
            rtol=1e-9,
            atol=1e-11,
        )
        t = time.reshape(1)
        # a little above the ground, which the event must not find again
        state = (position[-1] + 1e-9, -restitution * velocity[-1])
    drop = torch.sqrt(2 * height / gravity)
    exact = drop * (1 + 2 * restitution + 2 * restitution**2)
    assert float((t - exact).detach().abs().max()) <= 1e-6
    found = torch.autograd.grad(t.sum(), [gravity, restitution, height])
    expected = torch.autograd.grad(exact.sum(), [gravity, restitution, height])
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found, expected, strict=True))


def test_module_as_event_function_gets_its_gradient() -> None:
    event_fn = nn.Linear(2, 1).double()
    with torch.no_grad():
        event_fn.weight.copy_(tensor(1.0, 0.3)[None])
        event_fn.bias.copy_(tensor(-0.2))
    time, _ = odeint_event(oscillator, tensor(1.0, 0.0), tensor(0.0), event_fn=lambda t, y: event_fn(y))
    time.backward()
    time = time.detach()
    assert event_fn.weight.grad is not None
    assert event_fn.bias.grad is not None
    # dt = -dc / (dc/dt): the state at the event is (cos t, -sin t)
    state = tensor(math.cos(float(time)), -math.sin(float(time)))
    slope = float(event_fn.weight.detach()[0] @ tensor(-math.sin(float(time)), -math.cos(float(time))))
    assert float(event_fn.bias.grad) == pytest.approx(-1 / slope, rel=1e-4)
    assert (event_fn.weight.grad[0] + state / slope).abs().max() <= 1e-4


def test_second_derivatives_of_the_time_are_refused() -> None:
    y0 = tensor(1.0, 0.0).requires_grad_()
    time, _ = odeint_event(oscillator, y0, tensor(0.0), event_fn=lambda t, y: y[0] - 0.3)
    gradient = torch.autograd.grad(time, y0, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives of the time of an event"):
        gradient.sum().backward()


@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_by_name_are_refused(linear: bool) -> None:
    """autograd runs only what leads to the inputs that are named; the refusal is on the way to each."""
    p = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y0 = tensor(0.0)
    time, _ = odeint_event(
        lambda t, y: (p if linear else p**2) * torch.ones_like(y), y0, tensor(0.0), event_fn=lambda t, y: y[0] - 0.3
    )
    (gradient,) = torch.autograd.grad(time, p, create_graph=True)
    assert float(gradient.detach()) == pytest.approx(-0.3 / 0.7**2 if linear else -2 * 0.3 / 0.7**3, rel=1e-6)
    with pytest.raises(RuntimeError, match="second derivatives of the time of an event"):
        torch.autograd.grad(gradient, p, allow_unused=True)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_event_under_autocast(precision: torch.dtype) -> None:
    y0 = torch.tensor([1.0, 0.0], requires_grad=True)
    matrix = nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    with torch.autocast("cpu", precision):
        time, y = odeint_event(
            lambda t, y: nn.functional.linear(y, matrix),
            y0,
            torch.tensor([0.0]),
            event_fn=lambda t, y: y[0],
            rtol=1e-2,
            atol=1e-2,
        )
    roundoff = torch.finfo(precision).eps
    assert y.dtype == torch.float32
    assert float(time.detach()) == pytest.approx(math.pi / 2, abs=0.05)
    by_y0, by_matrix = torch.autograd.grad(time, [y0, matrix])
    # sin(t) y0[1] + cos(t) y0[0] = 0
    assert float(by_y0[1]) == pytest.approx(1.0, abs=0.05 + 10 * roundoff)
    assert torch.isfinite(by_matrix).all()


@pytest.mark.parametrize("method", ["dopri5", "rk4", "radauIIA5"])
def test_no_event(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search ends, and says where."""
    from rampde import arguments, event_on_grid
    from rampde.options import EqualOptions

    # by default after a number of steps that a person can wait for, a test less so
    monkeypatch.setattr(event_on_grid, "MAX_NUM_STEPS", 40)
    monkeypatch.setattr(arguments, "EqualOptions", lambda size: EqualOptions(size, 40))
    options = {"max_num_steps": 40} if method == "dopri5" else {"step_size": 0.1}
    with pytest.raises(RuntimeError, match=r"no event in 40 steps|max_num_steps exceeded \(40 >= 40\)"):
        odeint(
            oscillator, tensor(1.0, 0.0), tensor(0, 1), event_fn=lambda t, y: y[0] + 5, method=method, options=options
        )


NONSENSE: list[tuple[Callable[[Tensor, Tensor], Any], str]] = [
    (lambda t, y: 3.0, "event_fn returned a float"),
    (lambda t, y: None, "event_fn returned a NoneType"),
    (lambda t, y: (y[0], y[1]), "event_fn returned a tuple"),
    (lambda t, y: y[:0], "event_fn returned an empty tensor"),
    (lambda t, y: y[0] * math.nan, "event_fn returned NaN"),
    (lambda t, y: torch.where(t > 0.1, math.nan, y[0]), "event_fn returned NaN at t ="),
]


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("case", range(len(NONSENSE)))
def test_event_function_that_returns_nonsense(case: int, method: str) -> None:
    event_fn, message = NONSENSE[case]
    with pytest.raises((TypeError, RuntimeError), match=message):
        odeint(oscillator, tensor(1.0, 0.0), tensor(0, 1), event_fn=event_fn, method=method, options=options_of(method))


def test_bad_arguments_of_odeint_event() -> None:
    y0 = tensor(1.0, 0.0)
    with pytest.raises(TypeError, match=r"t0 is a float, expected"):
        odeint_event(oscillator, y0, 0.0, event_fn=lambda t, y: y[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"t0 has shape \[2\], expected a single element"):
        odeint_event(oscillator, y0, tensor(0.0, 1.0), event_fn=lambda t, y: y[0])
    with pytest.raises(TypeError, match=r"event_fn is 3, expected a callable"):
        odeint_event(oscillator, y0, tensor(0.0), event_fn=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_size"):
        odeint_event(oscillator, y0, tensor(0.0), event_fn=lambda t, y: y[0], method="rk4")


def test_callbacks_up_to_the_event() -> None:
    class Func(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.starts: list[float] = []

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return oscillator(t, y)

        def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            self.starts.append(float(t0))

    func = Func()
    with rampde.stats() as stats:
        time, _ = odeint(func, tensor(1.0, 0.0), tensor(0, 1), event_fn=lambda t, y: y[0])
    assert func.starts == stats.solves[0].starts
    assert func.starts[-1] < float(time) <= func.starts[-1] + stats.solves[0].step_sizes[-1]


def test_agrees_with_torchdiffeq() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    outcomes = []
    for module in (rampde, torchdiffeq):
        y0 = tensor(1.0, 0.3).requires_grad_()
        t0 = tensor(0.2).requires_grad_()
        time, y = module.odeint_event(oscillator, y0, t0, event_fn=lambda t, y: y[0] - 0.1 * t, rtol=1e-9, atol=1e-11)
        # its time is given the gradient of the state alone, not of the event function's own dependence on t
        outcomes.append([time.detach(), y.detach(), torch.autograd.grad(y[1].sum() + time, y0)[0]])
    assert all((a - b).abs().max() <= 1e-7 for a, b in zip(*outcomes, strict=True))
