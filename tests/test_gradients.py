"""``gradcheck`` in float64 for everything a solve is differentiable in, with every method and policy."""

from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from rampde import METHODS, ButcherTableau, odeint

BUILT_IN = ("euler", "midpoint", "heun2", "heun3", "ralston", "rk4", "rk4_classic")
POLICIES = ("step", "none", "tape")

# seven stages of which the last is used by nothing, and a weight of zero
DOPRI5 = ButcherTableau(
    a=[
        [],
        [Fraction(1, 5)],
        [Fraction(3, 40), Fraction(9, 40)],
        [Fraction(44, 45), Fraction(-56, 15), Fraction(32, 9)],
        [Fraction(19372, 6561), Fraction(-25360, 2187), Fraction(64448, 6561), Fraction(-212, 729)],
        [
            Fraction(9017, 3168),
            Fraction(-355, 33),
            Fraction(46732, 5247),
            Fraction(49, 176),
            Fraction(-5103, 18656),
        ],
        [Fraction(35, 384), 0, Fraction(500, 1113), Fraction(125, 192), Fraction(-2187, 6784), Fraction(11, 84)],
    ],
    b=[Fraction(35, 384), 0, Fraction(500, 1113), Fraction(125, 192), Fraction(-2187, 6784), Fraction(11, 84), 0],
)


def double(*shape, requires_grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def times(values=(0.0, 0.3, 0.4, 1.0)):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_every_built_in_method_is_listed():
    assert set(BUILT_IN) <= set(METHODS)


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", [*BUILT_IN, DOPRI5], ids=[*BUILT_IN, "tableau"])
def test_y0_parameters_closures_and_times(method, checkpoint):
    """A time-dependent f with parameters used linearly and not, a bias outside, and every output in the loss."""

    def run(y0, t, weight, bias):
        def f(t, y):
            return torch.tanh(y @ weight) * torch.cos(3 * t) + bias * t

        return odeint(f, y0, t, method=method, checkpoint=checkpoint)

    assert gradcheck(run, (double(2, 3), times(), double(3, 3), double(3)))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_reverse_time(checkpoint):
    def run(y0, t, weight):
        return odeint(lambda t, y: torch.sin(y @ weight) * t, y0, t, method="rk4", checkpoint=checkpoint)

    assert gradcheck(run, (double(2, 2), times((1.0, 0.5, -0.2)), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_tuple_states(checkpoint):
    """Pieces of other shapes, one of which f ignores and one that nothing depends on."""

    def run(y0, log_density, passive, t, weight):
        def f(t, state):
            y = state[0]
            k = torch.tanh(y @ weight)
            return k * t, -(k * k).sum(1, keepdim=True), torch.ones_like(passive)

        y, density, _ = odeint(f, (y0, log_density, passive), t, method="rk4", checkpoint=checkpoint)
        return y, density

    assert gradcheck(run, (double(2, 3), double(2, 1), double(4), times(), double(3, 3)))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_nested_states(checkpoint):
    def run(a, b, t):
        def f(t, state):
            return {"a": state["b"][0] * t, "b": [torch.sin(state["a"])]}

        result = odeint(f, {"a": a, "b": [b]}, t, method="heun3", checkpoint=checkpoint)
        return result["a"], result["b"][0]

    assert gradcheck(run, (double(3), double(3), times()))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_complex_states_and_parameters(checkpoint):
    def complex_double(*shape):
        return torch.randn(*shape, dtype=torch.complex128, requires_grad=True)

    def run(y0, real, t, weight):
        def f(t, state):
            y, r = state
            return (y @ weight) * torch.exp(1j * t) + r, (y.conj() * y).real.sum(0)

        return odeint(f, (y0, real), t, method="rk4", checkpoint=checkpoint)

    assert gradcheck(run, (complex_double(2, 2), double(2), times((0.0, 0.5)), complex_double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_outputs_between_steps(interp, checkpoint):
    """Times strictly inside steps; the grid ends move with the ends of t."""

    def run(y0, t, weight):
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * torch.cos(t),
            y0,
            t,
            method="midpoint",
            checkpoint=checkpoint,
            options={"step_size": 0.3, "interp": interp},
        )

    assert gradcheck(run, (double(2, 2), times((0.0, 0.13, 0.47, 0.5, 1.0)), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_a_grid_that_depends_on_t(checkpoint):
    def constructor(func, y0, t):
        middle = 0.3 * t[0] + 0.7 * t[-1]
        return torch.stack([t[0], middle, t[-1]])

    def run(y0, t):
        options = {"grid_constructor": constructor}
        return odeint(lambda t, y: torch.sin(y) * t, y0, t, method="rk4", options=options, checkpoint=checkpoint)

    assert gradcheck(run, (double(3), times((0.2, 1.0))))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_compensated_sums(checkpoint):
    def run(y0, t):
        return odeint(lambda t, y: torch.sin(y) * t, y0, t, method="rk4", compensated=True, checkpoint=checkpoint)

    assert gradcheck(run, (double(3), times()))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_second_derivatives(checkpoint):
    def run(y0, t, weight):
        return odeint(lambda t, y: torch.tanh(y @ weight) * t, y0, t, method="rk4", checkpoint=checkpoint)

    assert gradgradcheck(run, (double(1, 2), times((0.1, 0.6)), double(2, 2)))


def test_forward_mode_on_the_tape():
    def run(y0, t, weight):
        return odeint(lambda t, y: torch.tanh(y @ weight) * t, y0, t, method="rk4", checkpoint="tape")

    assert gradcheck(run, (double(1, 2), times(), double(2, 2)), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_a_loss_on_some_outputs_only(checkpoint):
    def run(y0, t, weight):
        y = odeint(lambda t, y: torch.tanh(y @ weight), y0, t, method="rk4", checkpoint=checkpoint)
        return y[1], y[2, 0]

    assert gradcheck(run, (double(2, 2), times(), double(2, 2)))


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_a_scaled_sweep_in_float64(checkpoint):
    from rampde import DynamicScaler

    def run(y0, t, weight):
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t,
            y0,
            t,
            method="rk4",
            checkpoint=checkpoint,
            loss_scaler=DynamicScaler(torch.float64),
        )

    assert gradcheck(run, (double(2, 2), times(), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_second_derivatives_where_all_is_computed_from_one_tensor(interp, checkpoint):
    """y0 and t computed from what f uses: no path is counted twice."""

    def run(weight):
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t,
            weight[:1].sin(),
            weight.square().sum().sigmoid() * torch.linspace(0, 1, 4, dtype=torch.float64),
            method="midpoint",
            checkpoint=checkpoint,
            options={"step_size": 0.1, "interp": interp},
        )

    weight = double(2, 2)
    assert gradcheck(run, (weight,))
    assert gradgradcheck(run, (weight,))
    # gradgradcheck would accept a first derivative that is wrong only where it has a graph
    plain, with_graph = (
        torch.autograd.grad(run(weight).square().sum(), weight, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    assert (with_graph - plain).abs().max() <= 1e-12 * plain.abs().max()


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_complex_parameters_between_steps(checkpoint):
    """The velocities of the cubic interpolant have complex gradients too."""
    y0, weight = (torch.randn(2, 2, dtype=torch.complex128, requires_grad=True) for _ in range(2))

    def run(y0, weight):
        return odeint(
            lambda t, y: torch.sin(y @ weight),
            y0,
            torch.tensor([0.0, 0.13, 0.5], dtype=torch.float64),
            method="midpoint",
            checkpoint=checkpoint,
            options={"step_size": 0.2, "interp": "cubic"},
        )

    assert gradcheck(run, (y0, weight))
