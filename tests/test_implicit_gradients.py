"""Gradients of implicit methods by the implicit function theorem: ``gradcheck``, second derivatives, what they cost."""

import functools
import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import rampde
from rampde.implicit_tableau import IMPLICIT_METHODS

SOLVERS = ("dense", "krylov")
POLICIES = ("step", "none", "tape")

# a difference quotient with step 1e-6 magnifies what Newton's method leaves by a million
odeint = functools.partial(rampde.odeint, rtol=1e-12, atol=1e-12)


def double(*shape, requires_grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def times(values=(0.0, 0.3, 0.4, 1.0)):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("method", IMPLICIT_METHODS)
def test_y0_parameters_closures_and_times(method, linear_solver):
    """A time-dependent f with parameters used linearly and not, a bias outside, and every output in the loss."""

    def run(y0, t, weight, bias):
        def f(t, y):
            return torch.tanh(y @ weight) * torch.cos(3 * t) + bias * t

        return odeint(f, y0, t, method=method, options={"linear_solver": linear_solver})

    assert gradcheck(run, (double(2, 3), times(), double(3, 3), double(3)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("method", ["gl4", "radauIIA5", "trbdf2"])
def test_second_derivatives(method, linear_solver, checkpoint):
    def run(y0, t, weight):
        options = {"linear_solver": linear_solver}
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t, y0, t, method=method, options=options, checkpoint=checkpoint
        )

    assert gradgradcheck(run, (double(1, 2), times((0.1, 0.6)), double(2, 2)))
    assert gradcheck(run, (double(1, 2), times((0.1, 0.6)), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_third_derivatives_are_refused(checkpoint):
    y0 = double(2)
    y = odeint(lambda t, y: torch.sin(y), y0, times((0.0, 1.0)).detach(), method="gl4", checkpoint=checkpoint)
    (first,) = torch.autograd.grad(y[-1].sum(), y0, create_graph=True)
    torch.autograd.grad(first.sum(), y0, retain_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(first.sum(), y0, create_graph=True)


def test_reverse_time():
    def run(y0, t, weight):
        return odeint(lambda t, y: torch.sin(y @ weight) * t, y0, t, method="radauIIA3")

    assert gradcheck(run, (double(2, 2), times((1.0, 0.5, -0.2)), double(2, 2)))


@pytest.mark.parametrize("linear_solver", SOLVERS)
def test_tuple_states(linear_solver):
    """Pieces of other shapes, one of which f ignores and one that nothing depends on."""

    def run(y0, log_density, passive, t, weight):
        def f(t, state):
            y = state[0]
            k = torch.tanh(y @ weight)
            return k * t, -(k * k).sum(1, keepdim=True), torch.ones_like(passive)

        options = {"linear_solver": linear_solver}
        y, density, _ = odeint(f, (y0, log_density, passive), t, method="trbdf2", options=options)
        return y, density

    assert gradcheck(run, (double(2, 3), double(2, 1), double(4), times(), double(3, 3)))


@pytest.mark.parametrize("linear_solver", SOLVERS)
def test_complex_states_and_parameters(linear_solver):
    """The complex piece begins at an odd place of the state's vector."""

    def complex_double(*shape):
        return torch.randn(*shape, dtype=torch.complex128, requires_grad=True)

    def run(real, y0, t, weight):
        def f(t, state):
            r, y = state
            return (y.conj() * y).real.sum(0), (y @ weight) * torch.exp(1j * t) + r

        return odeint(f, (real, y0), t, method="gl4", options={"linear_solver": linear_solver})

    assert gradcheck(run, (double(3), complex_double(2, 3), times((0.0, 0.5)), complex_double(3, 3)))


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_outputs_between_steps(interp):
    def run(y0, t, weight):
        options = {"step_size": 0.3, "interp": interp}
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * torch.cos(t), y0, t, method="implicit_midpoint", options=options
        )

    assert gradcheck(run, (double(2, 2), times((0.0, 0.13, 0.47, 0.5, 1.0)), double(2, 2)))


@pytest.mark.parametrize("compensated", [False, True])
def test_perturbed_times_and_compensated_sums(compensated):
    def run(y0, t):
        return odeint(
            lambda t, y: torch.sin(y) * t,
            y0,
            t,
            method="trapezoid",
            compensated=compensated,
            options={"perturb": True},
        )

    assert gradcheck(run, (double(3), times()))


def test_second_derivatives_where_all_is_computed_from_one_tensor():
    """y0 and t computed from what f uses: no path is counted twice."""

    def run(weight):
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t,
            weight[:1].sin(),
            weight.square().sum().sigmoid() * torch.linspace(0, 1, 4, dtype=torch.float64),
            method="gl4",
        )

    weight = double(2, 2)
    assert gradcheck(run, (weight,))
    assert gradgradcheck(run, (weight,))
    plain, with_graph = (
        torch.autograd.grad(run(weight).square().sum(), weight, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    assert (with_graph - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_a_tensor_and_another_one_computed_from_it_go_to_the_tape():
    def run(base, y0):
        computed = base.sin()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="func uses both")
            return odeint(lambda t, y: torch.tanh(y @ computed) + y @ base, y0, times().detach(), method="radauIIA3")

    base = double(2, 2)
    computed = base.sin()
    with pytest.warns(UserWarning, match="falls back to checkpoint"):
        odeint(lambda t, y: torch.tanh(y @ computed) + y @ base, double(2, 2), times().detach(), method="gl4")
    assert gradcheck(run, (double(2, 2), double(2, 2)))


class Counted(torch.nn.Module):
    """Counts its evaluations, and those of its backward pass."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        return torch.tanh(self.linear(y)) * t


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("method", IMPLICIT_METHODS)
def test_the_sweep_evaluates_each_stage_once(method, checkpoint, linear_solver):
    net, steps = Counted(), 6
    y = rampde.odeint(
        net,
        torch.randn(3, 4, requires_grad=True),
        torch.linspace(0, 1, steps + 1),
        method=method,
        checkpoint=checkpoint,
        options={"linear_solver": linear_solver},
    )
    net.evaluations = 0
    y.sum().backward()
    assert net.evaluations == steps * IMPLICIT_METHODS[method].stages


def test_an_explicit_first_stage_costs_one_evaluation():
    """A linear f with the Jacobian at hand: one evaluation finds the stage, one more sees that it is found."""
    net = Counted()
    t = torch.linspace(0, 1, 11)
    for method, stages in (("trapezoid", 2), ("implicit_euler", 1)):
        net.evaluations = 0
        rampde.odeint(lambda t, y: net(t, y) * 0 - y, torch.ones(4), t, method=method)
        assert net.evaluations <= 10 * (stages + 1) + 1


def test_saved_tensors_hooks_see_the_inputs_of_all_stages():
    shapes = []

    def pack(tensor):
        shapes.append((tensor.shape, tensor.dtype))
        return tensor

    y0 = torch.randn(5, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rampde.odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 5), method="gl6", velocity_dtype=torch.bfloat16)
    assert shapes.count((torch.Size([5, 3]), torch.bfloat16)) >= 4 * 3
    y.sum().backward()


def test_hooks_see_whole_gradients():
    weight = double(3, 3)
    seen = []
    weight.register_hook(seen.append)
    y = odeint(lambda t, y: torch.tanh(y @ weight), double(2, 3), times().detach(), method="gl4")
    y.sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


def test_a_change_in_place_between_the_passes_is_found():
    weight = double(3, 3)
    y = odeint(lambda t, y: torch.tanh(y @ weight), double(2, 3), times().detach(), method="gl4")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice():
    y0 = double(3)
    y = odeint(lambda t, y: torch.sin(y), y0, times().detach(), method="radauIIA5")
    first = torch.autograd.grad(y.sum(), y0, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), y0)[0])


def test_float16_is_scaled():
    """A loss of 1e-9, which float16 would round to zero, has the gradient of a loss of 1, up to the power of ten."""
    net = torch.nn.Linear(4, 4)
    y0 = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for factor in (1.0, 1e-9):
        with torch.autocast("cpu", torch.float16):
            y = rampde.odeint(lambda t, y: torch.tanh(net(y)), y0, torch.linspace(0, 1, 9), method="radauIIA3")
        loss = factor * y[-1].square().sum()
        gradients.append([g / factor for g in torch.autograd.grad(loss, [y0, net.weight, net.bias])])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 4 * torch.finfo(torch.float16).eps * one.norm()


@pytest.mark.parametrize("method", ["implicit_euler", "sdirk2", "radauIIA5"])
def test_a_stiff_adjoint_in_sixteen_bits(method):
    """The stiffness multiplies neither the rounding of the products nor what GMRES leaves."""
    rates = torch.tensor([1.0, 1e2, 1e4])

    def gradient(dtype, **options):
        y0 = torch.ones(3, dtype=dtype, requires_grad=True)
        scale = torch.ones(3, dtype=dtype, requires_grad=True)

        def f(t, y):
            return ((1.0 - y.to(dtype)) * rates.to(dtype) * scale).to(y.dtype)

        y = rampde.odeint(f, y0, torch.linspace(0, 1, 9, dtype=dtype), method=method, **options)
        return [*torch.autograd.grad(y[-1].sum(), [y0, scale])]

    exact = gradient(torch.float64)
    for linear_solver in SOLVERS:
        rounded = gradient(torch.float32, velocity_dtype=torch.bfloat16, options={"linear_solver": linear_solver})
        for one, other in zip(rounded, exact, strict=True):
            assert (one - other).abs().max() < 8 * torch.finfo(torch.bfloat16).eps


def test_gradients_of_the_discrete_solution_through_a_stiff_transient():
    """The gradient is that of the discrete solution however stiff: here of (1 + h)^-n, for which it is known."""
    rate = torch.tensor(1e6, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    y = odeint(lambda t, y: -rate * y, y0, torch.linspace(0, 1e-5, 6, dtype=torch.float64), method="implicit_euler")
    found = torch.autograd.grad(y[-1].sum(), [y0, rate])
    h = 2e-6
    exact = (1 + 1e6 * h) ** -5, -5 * h * (1 + 1e6 * h) ** -6
    for value, expected in zip(found, exact, strict=True):
        assert math.isclose(float(value), expected, rel_tol=1e-10)
