"""``odeint`` by itself: convergence, structures, what func sees, kinds of func, grad modes."""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from steps import equal_steps, options_of
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from rampde import odeint
from rampde.methods import ADAPTIVE, FIXED

F64 = torch.float64
POLICIES = ["step", "none", "tape"]


def logistic(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: theta * y * (1 - y)


def logistic_solution(theta: Tensor, y0: Tensor) -> Tensor:
    return 1 / (1 + (1 / y0 - 1) * torch.exp(-theta))


def riccati(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: -theta * (1 + t) * y**2


def riccati_solution(theta: Tensor, y0: Tensor) -> Tensor:
    return 1 / (1 / y0 + 1.5 * theta)


PROBLEMS = {"autonomous": (logistic, logistic_solution), "non-autonomous": (riccati, riccati_solution)}


@pytest.mark.parametrize("method", FIXED)
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
        y = odeint(velocity(theta), y0, t, method=method)[-1]
        gradients = torch.autograd.grad(y.sum(), [y0, theta])
        return [
            float((y - exact).detach().abs().max()),
            float((gradients[0] - exact_y0).abs().max()),
            float((gradients[1] - exact_theta).abs()),
        ]

    # fine enough for the leading term, coarse enough that rounding (1e-15) is below a thousandth of the error
    steps = 80 if FIXED[method].order < 4 else 40
    for coarse, fine in zip(errors(steps), errors(2 * steps), strict=True):
        assert fine > 1e-12
        assert abs(math.log2(coarse / fine) - FIXED[method].order) < 0.1


def test_classical_rule_is_the_one_of_the_textbook() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(t) * y**2 + t

    y0, t, h = torch.tensor([0.5, -1.0], dtype=F64), 0.3, 0.1
    time = torch.tensor(t, dtype=F64)
    k1 = func(time, y0)
    k2 = func(time + h / 2, y0 + h / 2 * k1)
    k3 = func(time + h / 2, y0 + h / 2 * k2)
    k4 = func(time + h, y0 + h * k3)
    by_hand = y0 + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    y = odeint(func, y0, torch.tensor([t, t + h], dtype=F64), method="rk4_classic")
    # a handful of roundings of numbers near 1
    assert (y[1] - by_hand).abs().max() <= 8 * torch.finfo(F64).eps
    assert (odeint(func, y0, torch.tensor([t, t + h], dtype=F64), method="rk4")[1] - by_hand).abs().max() > 1e-9


# time-dependent rotations at the rate of the squared radius, and a linear problem, each with its solution at t = 1
def rotation(rate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]:
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    return lambda theta: lambda t, y: theta * rate(t) * y.square().sum(1, keepdim=True) * (y @ quarter)


def rotation_solution(theta: Tensor, y0: Tensor) -> Tensor:
    angle = theta * y0.square().sum(1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos * y0[:, 0] - sin * y0[:, 1], sin * y0[:, 0] + cos * y0[:, 1]], dim=1)


SMOOTH = {
    "autonomous": (rotation(torch.ones_like), rotation_solution),
    "non-autonomous": (rotation(lambda t: (1 + t) / 1.5), rotation_solution),
    "linear": (
        lambda theta: lambda t, y: 1.5 * theta * (1 + 2 * t) * y,
        lambda theta, y0: y0 * torch.exp(3 * theta),
    ),
}


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("problem", SMOOTH)
def test_convergence_order_of_adaptive_methods_on_equal_steps(method: str, problem: str) -> None:
    """The slope lies within 0.1 of the claimed order, or above it where the leading term was made small.

    That of the fifth-order pairs was minimised for nonlinear problems, whose error falls faster than h^5 until rounding
    hides it; the linear problem shows the order itself.
    """
    velocity, solution = SMOOTH[problem]
    theta = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.3], [0.2, -0.9], [1.2, 0.4]], dtype=F64, requires_grad=True)
    exact = solution(theta, y0)
    exact_y0, exact_theta = torch.autograd.grad(exact.sum(), [y0, theta])

    def errors(steps: int) -> list[float]:
        t = torch.tensor([0.0, 1.0], dtype=F64)
        y = odeint(velocity(theta), y0, t, method=method, options=equal_steps(1 / steps))[-1]
        gradients = torch.autograd.grad(y.sum(), [y0, theta])
        return [
            float((y - exact).detach().abs().max()),
            float((gradients[0] - exact_y0).abs().max()),
            float((gradients[1] - exact_theta).abs()),
        ]

    order = ADAPTIVE[method].order
    # the step that halves exactly ends exactly at t = 1
    steps = {8: 8 if problem == "linear" else 4, 5: 128 if problem == "linear" else 32}.get(order, 128)
    for coarse, fine in zip(errors(steps), errors(2 * steps), strict=True):
        assert fine > 1e-14 * float(exact_y0.abs().max())
        slope = math.log2(coarse / fine)
        assert slope > order - 0.1
        assert slope < order + 0.1 or (order >= 5 and problem != "linear")


@pytest.mark.parametrize("method", ADAPTIVE)
def test_convergence_order_of_the_interpolant(method: str) -> None:
    """Cubic without a value in the middle: of order 3 in the step size; quartic, of order 4, at most the method's."""
    theta, y0 = torch.tensor(1.0, dtype=F64), torch.tensor([[1.0, 0.3], [0.2, -0.9]], dtype=F64)
    velocity, solution = SMOOTH["autonomous"]

    def error(steps: int) -> float:
        # a third of the way into every step
        h = 1 / steps
        t = torch.cat([torch.zeros(1, dtype=F64), torch.arange(steps, dtype=F64) * h + h / 3])
        y = odeint(velocity(theta), y0, t, method=method, options=equal_steps(h))
        exact = torch.stack([solution(theta * time, y0) for time in t])
        return float((y - exact).abs().max())

    tableau = ADAPTIVE[method]
    # the local error of the interpolant is of one order more
    expected = min(tableau.order, 4 if tableau.middle is None else 5)
    steps = 16 if tableau.order == 8 else 64
    slope = math.log2(error(steps) / error(2 * steps))
    assert slope > expected - 0.15


class Phase(NamedTuple):
    position: Tensor
    momentum: Tensor


LEAF, ROW = torch.tensor([1.0, 2.0], dtype=F64), torch.ones(2, 3, dtype=F64)
STRUCTURES: list[Any] = [
    (LEAF,),
    (LEAF, ROW),
    [LEAF, ROW],
    {"a": LEAF, "b": ROW},
    {"a": {"c": (LEAF, [ROW])}, "b": ROW},
    OrderedDict(z=LEAF, a=ROW),
    Phase(LEAF, ROW),
    (Phase(LEAF, ROW), {"x": torch.tensor(3.0, dtype=F64)}),
    ((), LEAF),
    (LEAF, torch.ones(0, 4, dtype=F64)),
    (LEAF, ROW * (1 + 2j)),
]


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("index", range(len(STRUCTURES)))
def test_structure_of_the_state(index: int, checkpoint: str) -> None:
    """The result has the structure of y0, func sees it, and every leaf is as when solved alone."""
    y0 = tree_map(lambda leaf: leaf.clone().requires_grad_(), STRUCTURES[index])
    leaves, tree = tree_flatten(y0)
    t = torch.linspace(0, 1, 4, dtype=F64)

    def func(time: Tensor, y: Any) -> Any:
        assert tree_flatten(y)[1] == tree
        assert type(y) is type(y0)
        return tree_map(lambda leaf: -leaf * (1 + time), y)

    y = odeint(func, y0, t, method="rk4", checkpoint=checkpoint)
    assert type(y) is type(y0)
    results, result_tree = tree_flatten(y)
    assert result_tree == tree
    gradients = torch.autograd.grad(sum(leaf.abs().sum() for leaf in results), leaves)
    for leaf, result, gradient in zip(leaves, results, gradients, strict=True):
        alone = odeint(lambda time, x: -x * (1 + time), leaf, t, method="rk4", checkpoint=checkpoint)
        assert torch.equal(result, alone)
        assert result.dtype == leaf.dtype
        assert torch.equal(gradient, torch.autograd.grad(alone.abs().sum(), leaf)[0])


def test_func_may_return_a_list_for_a_tuple() -> None:
    y0, t = (LEAF, ROW), torch.linspace(0, 1, 4, dtype=F64)
    expected = odeint(lambda t, y: (-y[0], -y[1]), y0, t, method="rk4")
    found = odeint(lambda t, y: [-y[0], -y[1]], y0, t, method="rk4")
    assert isinstance(found, tuple)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_channels_last_is_kept_for_func_and_result(autocast: bool, checkpoint: str) -> None:
    y0 = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    convolution = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    seen = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(y.is_contiguous(memory_format=torch.channels_last))
        return torch.tanh(convolution(y))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = odeint(func, y0, torch.linspace(0, 1, 4), method="rk4", checkpoint=checkpoint)
    torch.autograd.grad(y.sum(), y0)
    assert len(seen) >= 12
    assert all(seen)
    assert all(state.is_contiguous(memory_format=torch.channels_last) for state in y)


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed", "reversed", "offset"])
@pytest.mark.parametrize("checkpoint", POLICIES)
def test_strides_of_the_initial_state_do_not_matter(layout: str, checkpoint: str) -> None:
    base = torch.randn(6, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    y0 = {
        "sliced": base[::2, 1::3],
        "expanded": base[:, :1].expand(6, 5),
        "transposed": base.t(),
        "reversed": base.flip(0)[1:],
        "offset": base[1:3],
    }[layout]
    t = torch.linspace(0, 1, 4, dtype=F64)

    def func(time: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y + time)

    def solution_and_gradient(start: Tensor) -> tuple[Tensor, Tensor]:
        leaf = start.detach().requires_grad_()
        y = odeint(func, leaf, t, method="rk4", checkpoint=checkpoint)
        return y, torch.autograd.grad(y.square().sum(), leaf)[0]

    dense = solution_and_gradient(y0.contiguous())
    found = solution_and_gradient(y0)
    # vectorised and scalar loops may round differently: a few units of numbers of order ten
    assert all((a - b).abs().max() <= 64 * torch.finfo(F64).eps * 10 for a, b in zip(dense, found, strict=True))


REALS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("velocity_dtype", [None, *REALS], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_dtypes_that_func_sees(dtype: Any, autocast: Any, velocity_dtype: Any, checkpoint: str) -> None:
    """y in velocity_dtype, else the autocast dtype, else y0's; t 0-dim in y0's; the result in y0's."""
    y0 = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    promised = velocity_dtype or autocast or dtype
    states = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert (t.dtype, t.shape) == (dtype, ())
        assert (y.dtype, y.shape, y.device) == (promised, y0.shape, y0.device)
        states.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return -y

    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = odeint(
            func,
            y0,
            torch.linspace(0, 1, 3),
            method="rk4",
            velocity_dtype=velocity_dtype,
            checkpoint=checkpoint,
        )
    gradient = torch.autograd.grad(y.sum(), y0)[0]
    assert (y.dtype, y.shape) == (dtype, (3, 2, 3))
    assert gradient.dtype == dtype
    # the recomputation, outside of the caller's autocast, runs under it all the same
    assert len(states) == (16 if checkpoint == "step" else 8)
    assert all(enabled == (autocast is not None) for enabled, _ in states)
    assert autocast is None or all(seen == autocast for _, seen in states)


def test_dtypes_of_a_mixed_state() -> None:
    y0 = (torch.ones(2, dtype=torch.bfloat16), torch.ones(3), torch.ones(2, dtype=torch.complex64))

    def func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert t.dtype == torch.float32
        assert [leaf.dtype for leaf in y] == [torch.bfloat16, torch.float32, torch.complex64]
        return tuple(-leaf for leaf in y)

    y = odeint(func, y0, torch.linspace(0, 1, 3), method="rk4")
    assert [leaf.dtype for leaf in y] == [leaf.dtype for leaf in y0]


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_complex_state_agrees_with_the_real_formulation(method: str, checkpoint: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.complex128, generator=generator).requires_grad_()
    z0 = torch.randn(3, dtype=torch.complex128, generator=generator).requires_grad_()
    parts = [part.detach().clone().requires_grad_() for part in (matrix.real, matrix.imag)]
    x0 = torch.view_as_real(z0.detach()).clone().requires_grad_()
    t = torch.linspace(0, 1, 5, dtype=F64)

    def real(time: Tensor, x: Tensor) -> Tensor:
        re, im = x.unbind(-1)
        a, b = parts
        product = torch.stack([a @ re - b @ im, a @ im + b @ re], dim=-1)
        return product * torch.cos(time) - x * x.square().sum(-1, keepdim=True)

    def complex_(time: Tensor, z: Tensor) -> Tensor:
        return matrix @ z * torch.cos(time) - z * z.abs().square()

    # the error of a complex number is measured by its modulus: on the same steps only the numbers agree
    options = options_of(method, 0.1)
    z = odeint(complex_, z0, t, method=method, checkpoint=checkpoint, options=options)
    x = odeint(real, x0, t, method=method, checkpoint=checkpoint, options=options)
    assert z.dtype == torch.complex128
    assert (torch.view_as_real(z) - x).abs().max() <= 1e-13
    dz, dmatrix = torch.autograd.grad((torch.view_as_real(z) * x.detach()).sum(), [z0, matrix])
    dx, da, db = torch.autograd.grad((x * x.detach()).sum(), [x0, *parts])
    assert (torch.view_as_real(dz) - dx).abs().max() <= 1e-12 * dx.abs().max()
    assert (dmatrix - torch.complex(da, db)).abs().max() <= 1e-12 * dmatrix.abs().max()


class Net(nn.Module):
    """``tanh(W y + t)`` in every form that a func can have."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=F64, generator=generator))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight + t)

    def method(self, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y)

    def swapped(self, y: Tensor, scale: float, t: Tensor) -> Tensor:
        return self(t, y) * scale


class Callable_:
    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y)


KINDS: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net,
    "function": lambda net: lambda t, y: torch.tanh(y @ net.weight + t),
    "partial": lambda net: functools.partial(lambda weight, t, y: torch.tanh(y @ weight + t), net.weight),
    "partial-keyword": lambda net: functools.partial(
        lambda t, y, weight: torch.tanh(y @ weight + t), weight=net.weight
    ),
    "method": lambda net: net.method,
    "object": Callable_,
    "sequential-method": lambda net: Callable_(net).__call__,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled-function": lambda net: torch.compile(lambda t, y: torch.tanh(y @ net.weight + t), backend="eager"),
}


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_func(kind: str, checkpoint: str) -> None:
    def solution_and_gradients(make: Callable[[Net], Any]) -> list[Tensor]:
        net = Net()
        y0 = torch.linspace(-1, 1, 6, dtype=F64).view(2, 3).requires_grad_()
        t = torch.linspace(0, 1, 5, dtype=F64)
        y = odeint(make(net), y0, t, method="rk4", checkpoint=checkpoint)
        return [y, *torch.autograd.grad(y.square().sum(), [y0, net.weight])]

    expected = solution_and_gradients(KINDS["module"])
    found = solution_and_gradients(KINDS[kind])
    # compilation may fuse: a few units in the last place of numbers of order ten
    assert all((a - b).abs().max() <= 1e-14 * 10 for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_grad_modes(checkpoint: str) -> None:
    net, y0 = Net(), torch.linspace(-1, 1, 6, dtype=F64).view(2, 3).requires_grad_()
    t = torch.linspace(0, 1, 5, dtype=F64)

    def func(time: Tensor, y: Tensor) -> Tensor:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return net(time, y)

    for options in (None, {"step_size": 0.15, "interp": "cubic"}):
        modes: list[tuple[bool, bool]] = []
        expected = odeint(func, y0, t, method="rk4", checkpoint=checkpoint, options=options)
        assert expected.requires_grad
        with torch.no_grad():
            modes = []
            y = odeint(func, y0, t, method="rk4", checkpoint=checkpoint, options=options)
            assert set(modes) == {(False, False)}
        assert not y.requires_grad
        assert torch.equal(y, expected)
        with torch.inference_mode():
            modes = []
            y = odeint(func, y0.detach(), t.clone(), method="rk4", checkpoint=checkpoint, options=options)
            assert set(modes) == {(False, True)}
            assert y.is_inference()
            assert torch.equal(y, expected)


def test_nothing_requires_grad() -> None:
    y = odeint(lambda t, y: -y, torch.ones(3), torch.linspace(0, 1, 3), method="rk4")
    assert not y.requires_grad


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_same_input_same_bits(checkpoint: str) -> None:
    def run() -> list[Tensor]:
        net = Net().to(torch.bfloat16)
        y0 = torch.linspace(-1, 1, 3000).view(1000, 3).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = odeint(net, y0, torch.linspace(0, 1, 9), method="rk4", checkpoint=checkpoint)
        return [y, *torch.autograd.grad(y.sum(), [y0, net.weight])]

    first = run()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, run(), strict=True))
