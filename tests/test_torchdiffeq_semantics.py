"""What programs written for torchdiffeq rely on, beyond the numbers that test_drop_in.py compares."""

from typing import Any

import numpy
import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.autograd import forward_ad

import rampde
from rampde import METHODS, odeint, odeint_adjoint

F64 = torch.float64
Y = torch.tensor([1.0, -0.5, 2.0], dtype=F64)
V = torch.tensor([0.3, -1.0, 2.0], dtype=F64)
T = torch.linspace(0, 1, 5, dtype=F64)
RATES = torch.tensor([1.0, 0.5, 2.0], dtype=F64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -RATES * y * torch.cos(y) * (1 + t)


class TestNumbersOfNumPy:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("first_step", numpy.float32(0.125)),
            ("safety", numpy.float64(0.5)),
            ("min_step", numpy.float32(0.0625)),
            ("max_step", numpy.int64(1)),
            ("max_num_steps", numpy.int64(50)),
            ("max_num_steps", 50.0),
            ("max_num_steps", torch.tensor(50)),
        ],
    )
    def test_options_of_adaptive_methods(self, name: str, value: Any) -> None:
        expected = odeint(decay, Y, T, options={name: float(value)})
        assert odeint(decay, Y, T, options={name: value}).equal(expected)

    def test_step_size(self) -> None:
        expected = odeint(decay, Y, T, method="rk4", options={"step_size": 0.125})
        assert odeint(decay, Y, T, method="rk4", options={"step_size": numpy.float32(0.125)}).equal(expected)

    def test_tolerances(self) -> None:
        expected = odeint(decay, Y, T, rtol=0.125, atol=2.0**-10)
        assert odeint(decay, Y, T, rtol=numpy.float32(0.125), atol=numpy.float64(2.0**-10)).equal(expected)
        assert odeint(decay, Y, T, rtol=0.125, atol=[numpy.float32(2.0**-10)]).equal(expected)

    @pytest.mark.parametrize("value", [numpy.bool_(True), numpy.complex64(1), numpy.array([0.1, 0.2]), "1"])
    def test_others_are_errors(self, value: object) -> None:
        with pytest.raises((TypeError, ValueError), match="first_step"):
            odeint(decay, Y, T, options={"first_step": value})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"method": "euler"},
        {"method": "rk4", "options": {"step_size": 0.3, "interp": "cubic"}},
        {"method": "rk4", "compensated": True},
        {"method": "rk4", "checkpoint": "none"},
        {"method": "explicit_adams", "options": {"step_size": 0.125}},
        {"method": "dopri5", "rtol": 1e-6},
    ],
    ids=lambda kwargs: "-".join([kwargs["method"], *list(kwargs)[1:]]),
)
class TestTransforms:
    """Forward mode and ``torch.func`` see through a solve as if it were written in plain operations."""

    @staticmethod
    def end(y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        end: Tensor = odeint(decay, y, T, **kwargs)[-1]
        return end

    def jacobian(self, kwargs: dict[str, Any], y: Tensor = Y, create_graph: bool = False) -> Tensor:
        jacobian: Tensor = torch.autograd.functional.jacobian(lambda y: self.end(y, kwargs), y, create_graph)
        return jacobian

    def test_forward_mode(self, kwargs: dict[str, Any]) -> None:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(self.end(forward_ad.make_dual(Y, V), kwargs)).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, self.jacobian(kwargs) @ V, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
    def test_jacobians(self, kwargs: dict[str, Any], transform: Any) -> None:
        given = transform(lambda y: self.end(y, kwargs))(Y)
        torch.testing.assert_close(given, self.jacobian(kwargs), rtol=1e-12, atol=1e-12)

    def test_hessian(self, kwargs: dict[str, Any]) -> None:
        given = torch.func.hessian(lambda y: self.end(y, kwargs))(Y)
        expected = torch.autograd.functional.jacobian(lambda y: self.jacobian(kwargs, y, create_graph=True), Y)
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["implicit_midpoint", "scipy_solver"])
def test_methods_without_forward_mode_say_so(method: str) -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode"):
        odeint(decay, forward_ad.make_dual(Y, V), T, method=method)


@pytest.mark.parametrize("names", ["abcd", "dcba", "adcb", "bcd", "bd"])
def test_adjoint_params_that_were_computed_from_each_other(names: str) -> None:
    """As where the coefficients of a control path and its times are both named: no path is counted twice."""
    a, b = (torch.tensor(value, dtype=F64, requires_grad=True) for value in ([0.3, 0.5], [1.0, -0.4]))
    y0 = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    c = a * torch.sin(b) if "a" in names else torch.sin(b)
    d = c**2 + b
    parts = {"a": a, "b": b, "c": c, "d": d}
    used = {name: parts[name] if name in names else parts[name].detach() for name in parts}

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y * used["c"] + used["d"] * torch.cos(used["a"] * t) * used["b"]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        leaves = [y0, *(leaf for leaf, name in ((a, "a"), (b, "b")) if name in names)]
        return torch.autograd.grad((y[1:] ** 2).sum(), leaves, retain_graph=True)

    params = tuple(parts[name] for name in names)
    given = gradients(odeint_adjoint(func, y0, T, rtol=1e-10, atol=1e-11, adjoint_params=params))
    expected = gradients(odeint(func, y0, T, rtol=1e-10, atol=1e-11, checkpoint="tape"))
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_every_method_of_torchdiffeq_has_its_name() -> None:
    with pytest.raises(ValueError, match="Must be one of") as caught:
        torchdiffeq.odeint(decay, Y, T, method="none of them")
    names = str(caught.value).split("{")[1].split("}")[0].replace('"', "").split(", ")
    assert len(names) > 10
    assert set(names) <= set(METHODS)


class Flow(nn.Module):
    """A continuous normalizing flow: the divergence by autograd within f, and the kinetic energy."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=F64))
        self.evaluations = 0

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.evaluations += 1
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            velocity = torch.tanh(z @ self.weight) * torch.cos(t)
            divergence = torch.zeros_like(state[1])
            for i in range(2):
                (row,) = torch.autograd.grad(velocity[:, i].sum(), z, create_graph=True)
                divergence = divergence + row[:, i : i + 1]
        return velocity, -divergence, (velocity**2).sum(1)


def flow(library: Any, solver: str, **kwargs: Any) -> list[Tensor]:
    net = Flow()
    points = torch.linspace(-1, 1, 10, dtype=F64).reshape(5, 2).requires_grad_()
    state = (points, torch.zeros(5, 1, dtype=F64), torch.zeros(5, dtype=F64))
    # torchdiffeq's adjoint solve has the gradient of t among its errors whether or not that is wanted
    t = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    z, logp, energy = getattr(library, solver)(net, state, t, **kwargs)
    forward = net.evaluations
    loss = (z[-1] ** 2).mean() - logp[-1].mean() + 0.1 * energy[-1].mean()
    gradients = torch.autograd.grad(loss, [points, net.weight])
    return [z, logp, energy, loss, *gradients, torch.tensor(forward)]


@pytest.mark.parametrize(
    ("solver", "kwargs"),
    [
        ("odeint", {"method": "dopri5", "options": {"first_step": 0.1}}),
        ("odeint", {"method": "rk4", "options": {"step_size": 0.3}}),
        ("odeint_adjoint", {"method": "dopri5"}),
        ("odeint_adjoint", {"method": "dopri5", "adjoint_options": {"norm": "seminorm"}}),
        ("odeint_adjoint", {"method": "midpoint", "options": {"step_size": 0.1}}),
    ],
)
def test_flow(solver: str, kwargs: dict[str, Any]) -> None:
    kwargs = {"atol": 1e-6, "rtol": 1e-6, **kwargs}
    for ours, theirs in zip(flow(rampde, solver, **kwargs), flow(torchdiffeq, solver, **kwargs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_sampler() -> None:
    """As samplers of diffusion models call it: tolerances in lists, times expanded to the batch, no gradients."""

    def velocity(t: Tensor, y: Tensor) -> Tensor:
        times = torch.ones(y.size(0)) * t
        return torch.sin(y) * times[:, None]

    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            library.odeint(velocity, noise, torch.linspace(0, 1, 50), method="dopri5", atol=[1e-6], rtol=[1e-3])
            for library in (rampde, torchdiffeq)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_list_for_a_tuple() -> None:
    y0 = (Y, Y.sum())
    expected = odeint(lambda t, y: (-y[0], y[0].sum() * t), y0, T)
    for given, wanted in zip(odeint(lambda t, y: [-y[0], y[0].sum() * t], y0, T), expected, strict=True):
        assert given.equal(wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_default_method_in_16_bits(dtype: torch.dtype) -> None:
    """Where torchdiffeq's step size vanishes."""
    y = odeint(lambda t, y: -y, torch.ones(3, dtype=dtype), T, rtol=1e-3)
    assert y.dtype == dtype
    error = (y.double() - (-T).exp()[:, None]).abs().max()
    assert error < 2 * torch.finfo(dtype).eps


def test_tolerances_that_are_integers() -> None:
    torch.testing.assert_close(
        odeint(decay, Y, T, rtol=1, atol=1), torchdiffeq.odeint(decay, Y, T, rtol=1, atol=1), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_bouncing_ball(interface: str) -> None:
    """Events in a loop, each from the state of the one before; times and gradients against the closed form."""
    height, gravity = (torch.tensor([value], dtype=F64, requires_grad=True) for value in (10.0, 9.8))

    class Ball(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gravity = gravity

        def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1], -self.gravity

    params: dict[str, Any] = {"adjoint_params": (gravity,)} if interface == "odeint_adjoint" else {}
    t, state = torch.zeros(1, dtype=F64), (height, torch.zeros(1, dtype=F64))
    for _ in range(3):
        t, solution = rampde.odeint_event(
            Ball(),
            state,
            t,
            event_fn=lambda t, y: y[0],
            odeint_interface=getattr(rampde, interface),
            atol=1e-10,
            rtol=1e-10,
            **params,
        )
        # just above the ground, so that the next solve does not begin at an event
        state = (solution[0][-1] + 1e-9, -0.8 * solution[1][-1])
    fall = torch.sqrt(2 * height / gravity)
    exact = (fall * (1 + 2 * 0.8 + 2 * 0.64)).sum()
    torch.testing.assert_close(t, exact, rtol=1e-7, atol=0.0)
    given = torch.autograd.grad(t, [height, gravity])
    torch.testing.assert_close(given, torch.autograd.grad(exact, [height, gravity]), rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_compiled_program(method: str) -> None:
    """A compiled function may contain a solve."""
    torch.compiler.reset()
    weight = RATES.clone().requires_grad_()

    def program(y: Tensor) -> Tensor:
        doubled: Tensor = 2 * odeint(lambda t, y: -weight * y * (1 + t), y, T, method=method)
        return doubled

    compiled = torch.compile(program, backend="eager")
    for ours, expected in zip(
        *((y, torch.autograd.grad(y.sum(), weight)[0]) for y in (compiled(Y), program(Y))), strict=True
    ):
        # float64; the compiler sums in an order of its own
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)
