"""What goes wrong elsewhere, verified there by running it, and must not go wrong here."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampde import DynamicScaler, odeint

F64 = torch.float64
POLICIES = ["step", "none", "tape"]
LOW = [torch.float16, torch.bfloat16]
T = torch.linspace(0, 1, 9)


class Net(nn.Module):
    """A tanh layer with a parameter that is not used."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(4, generator=generator).to(dtype))
        self.unused = nn.Parameter(torch.ones(4, dtype=dtype))
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.tanh(nn.functional.linear(y, self.w.t(), self.b))


# what eight steps of h = 1/8 of any fourth-order rule with four stages multiply y by when y' = -y
DECAY = (1 - 1 / 8 + 1 / 8**2 / 2 - 1 / 8**3 / 6 + 1 / 8**4 / 24) ** 8


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).to(dtype).requires_grad_()


def reference(net: Net, y0: Tensor, t: Tensor) -> Tensor:
    """Classical fourth order in float64, plain PyTorch, on the parameters as they are."""
    w, b, y = net.w.double(), net.b.double(), y0.double()

    def func(y: Tensor) -> Tensor:
        return torch.tanh(y @ w + b)

    states = [y]
    for h in t.double().diff():
        k1 = func(y)
        k2 = func(y + h / 2 * k1)
        k3 = func(y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + func(y + h * k3))
        states.append(y)
    return torch.stack(states)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_functions_have_no_parameters_to_ask_for(dtype: torch.dtype) -> None:
    """rampde 0.1.0, 1: ``func.parameters()`` is called; a function raises AttributeError."""
    y = odeint(lambda t, y: -y, start(dtype), T, method="rk4_classic")
    y.sum().backward()
    assert relative(y[-1].detach(), start().detach() * DECAY) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("checkpoint", POLICIES)
def test_sum_backward(checkpoint: str, dtype: torch.dtype) -> None:
    """rampde 0.1.0, 2: ``odeint(..).sum().backward()`` raises, as the expanded gradient is added to in place."""
    net, y0 = Net(dtype), start(dtype)
    odeint(net, y0, T, method="rk4_classic", checkpoint=checkpoint).sum().backward()
    expected = torch.autograd.grad(reference(net, y0, T).sum(), y0)[0]
    assert y0.grad is not None
    # rounding of the cotangents and of the products, each one unit of the dtype, in eight steps
    assert relative(y0.grad, expected) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("loss_scaler", [None, False, DynamicScaler()], ids=["automatic", "off", "scaler"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("checkpoint", POLICIES)
def test_incoming_gradient_is_not_changed(checkpoint: str, dtype: torch.dtype, loss_scaler: Any) -> None:
    """rampde 0.1.0, 3: the adjoint is accumulated in the memory of the incoming gradient."""
    y = odeint(Net(dtype), start(dtype), T, method="rk4_classic", checkpoint=checkpoint, loss_scaler=loss_scaler)
    gradient = torch.rand(y.shape, dtype=dtype)
    before = gradient.clone()
    y.backward(gradient)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_frozen_parameter(checkpoint: str) -> None:
    """rampde 0.1.0, 4: a parameter that does not require grad raises in the backward."""
    net = Net()
    net.b.requires_grad_(False)
    odeint(net, start(), T, method="rk4_classic", checkpoint=checkpoint).sum().backward()
    assert net.b.grad is None
    assert net.w.grad is not None


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_gradient_of_the_times_with_a_batch(checkpoint: str) -> None:
    """rampde 0.1.0, 5: ``t.requires_grad`` with a batched state raises a broadcast error."""
    net, y0, t = Net(F64), start(F64), T.double().requires_grad_()
    y = odeint(net, y0, t, method="rk4_classic", checkpoint=checkpoint)
    found = torch.autograd.grad(y.square().sum(), t)[0]
    expected = torch.autograd.grad(reference(net, y0, t).square().sum(), t)[0]
    assert relative(found, expected) < 1e-13


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_closure_tensor(checkpoint: str) -> None:
    """rampde 0.1.0, 6: a tensor that is no parameter of func silently gets no gradient."""
    net, y0 = Net(F64), start(F64)
    w = net.w.detach().clone().requires_grad_()
    y = odeint(lambda t, y: torch.tanh(y @ w + net.b), y0, T, method="rk4_classic", checkpoint=checkpoint)
    found = torch.autograd.grad(y.sum(), w)[0]
    assert relative(found, torch.autograd.grad(reference(net, y0, T).sum(), net.w)[0]) < 1e-13


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_second_derivative(checkpoint: str) -> None:
    """rampde 0.1.0, 7: a second derivative is silently that of a constant."""
    net, y0 = Net(F64), start(F64)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), [y0, net.w], create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [y0, net.w, net.b])

    found = second(odeint(net, y0, T, method="rk4_classic", checkpoint=checkpoint))
    expected = second(reference(net, y0, T))
    assert all(relative(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("checkpoint", POLICIES)
def test_autocast_on_the_cpu_is_honoured(checkpoint: str, dtype: torch.dtype) -> None:
    """rampde 0.1.0, 8: only autocast("cuda") is looked at; on the CPU func runs in float32."""
    net, seen = Net(), []

    def func(t: Tensor, y: Tensor) -> Tensor:
        k = net(t, y)
        seen.append((y.dtype, k.dtype))
        return k

    with torch.autocast("cpu", dtype):
        y = odeint(func, start(), T, method="rk4_classic", checkpoint=checkpoint)
    y.sum().backward()
    assert set(seen) == {(dtype, dtype)}
    assert y.dtype == torch.float32
    assert net.w.grad is not None
    assert net.w.grad.dtype == torch.float32


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("index", [0, 1, 4])
def test_loss_on_earlier_points_only(index: int, checkpoint: str) -> None:
    """rampde 0.1.0, 9: a zero gradient at t[-1] raises "failed to find finite scale after 20 steps"."""
    net, y0 = Net(torch.float16), start(torch.float16)
    y = odeint(net, y0, T, method="rk4_classic", checkpoint=checkpoint, loss_scaler=DynamicScaler())
    found = torch.autograd.grad(y[index].sum(), y0)[0]
    expected = torch.autograd.grad(reference(net, y0, T)[index].sum(), y0)[0]
    assert relative(found, expected) < 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_zero_loss_gradient(checkpoint: str) -> None:
    """rampde 0.1.0, 9, in full: no scale makes zero large, and none is needed."""
    net, y0 = Net(torch.float16), start(torch.float16)
    y = odeint(net, y0, T, method="rk4_classic", checkpoint=checkpoint, loss_scaler=DynamicScaler())
    (0 * y).sum().backward()
    assert y0.grad is not None
    assert not y0.grad.any()
    assert net.w.grad is not None
    assert not net.w.grad.any()


@pytest.mark.parametrize("steps", [16, 128])
def test_scale_does_not_run_into_overflows_of_its_own_making(steps: int) -> None:
    """rampde 0.1.0, 10: S doubles after nearly every step until one overflows and is done again, 1.25 to 1.5 times
    the ideal number of evaluations in the backward."""
    net, y0, scaler = Net(torch.float16), start(torch.float16), DynamicScaler()
    t = torch.linspace(0, 1, steps + 1)
    y = odeint(net, y0, t, method="rk4_classic", loss_scaler=scaler, checkpoint="step")
    forward = net.evaluations
    y[-1].sum().backward()
    assert forward == 4 * steps
    assert net.evaluations - forward == 4 * steps
    assert [kind for kind, _ in scaler.scale_history] == ["init"]


class Overflowing(torch.autograd.Function):
    """The identity, with a gradient that no scale makes finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * math.inf


def test_parameters_after_a_backward_that_fails() -> None:
    """rampde 0.1.0, 11: when the scaled backward raises, the parameters stay cast to float16."""
    net = Net()
    with torch.autocast("cpu", torch.float16):
        y = odeint(
            lambda t, y: Overflowing.apply(net(t, y)), start(), T, method="rk4_classic", loss_scaler=DynamicScaler()
        )
    parameters = {name: (id(p), p.data_ptr(), p.dtype) for name, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match="attempts"):
        y.sum().backward()
    assert parameters == {name: (id(p), p.data_ptr(), p.dtype) for name, p in net.named_parameters()}


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_parameters_are_not_cloned(checkpoint: str) -> None:
    """rampde 0.1.0, 12: every backward clones all parameters, used or not."""
    net = Net(torch.float16)
    net.unused = nn.Parameter(torch.ones(997, 1009, dtype=torch.float16))
    y = odeint(net, start(torch.float16), T, method="rk4_classic", checkpoint=checkpoint)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, Tensor):
                    self.largest = max(self.largest, value.numel())
            return result

    with Sizes() as sizes:
        y.sum().backward()
    assert 0 < sizes.largest < net.unused.numel()


@pytest.mark.parametrize("t", [[0.0, 0.5, 0.2], [0.0, 0.0], [1.0, 0.5, 0.7]], ids=str)
def test_times_that_are_not_monotone(t: list[float]) -> None:
    """rampde 0.1.0, 13: accepted without a word."""
    with pytest.raises(ValueError, match="strictly increasing or decreasing"):
        odeint(lambda t, y: -y, start(), torch.tensor(t), method="rk4_classic")


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pieces_of_a_state_have_any_shape(dtype: torch.dtype, checkpoint: str) -> None:
    """rampde 0.1.0, 14: pieces with different batch raise, a scalar piece is an IndexError, a list an
    AttributeError."""
    pieces = [torch.ones(3, 4), torch.ones(2), torch.tensor(2.0)]
    y0 = [piece.to(dtype).requires_grad_() for piece in pieces]
    for state in (tuple(y0), y0):
        y = odeint(lambda t, y: type(y)(-leaf for leaf in y), state, T, method="rk4_classic", checkpoint=checkpoint)
        assert type(y) is type(state)
        gradients = torch.autograd.grad(sum(leaf[-1].sum() for leaf in y), y0)
        assert all(relative(g, torch.full_like(g, DECAY)) < 8 * torch.finfo(dtype).eps for g in gradients)


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unused_parameter_keeps_none(dtype: torch.dtype, checkpoint: str) -> None:
    """rampde 0.1.0, 15: it gets zeros, and an optimizer with weight decay then moves it."""
    net = Net(dtype)
    odeint(net, start(dtype), T, method="rk4_classic", checkpoint=checkpoint).sum().backward()
    assert net.unused.grad is None
    assert net.w.grad is not None


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("checkpoint", POLICIES)
def test_solution_keeps_the_dtype_and_the_precision_of_the_state(checkpoint: str, dtype: torch.dtype) -> None:
    """rampde 0.1.0, 16: the returned states are rounded to the autocast dtype."""
    y0 = start()
    with torch.autocast("cpu", dtype):
        y = odeint(Net(), y0, T, method="rk4_classic", checkpoint=checkpoint)
    assert y.dtype == torch.float32
    # the initial state comes back to the bit, and the others hold more than 16 bits
    assert torch.equal(y[0], y0)
    assert not torch.equal(y[1:], y[1:].to(dtype).float())


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "rk4_classic"])
@pytest.mark.parametrize("checkpoint", POLICIES)
def test_times_are_added_in_float64_and_rounded_once(checkpoint: str, method: str, y_dtype: torch.dtype) -> None:
    """torchdiffeq: t is cast to the dtype of y before the time arithmetic; near t = 1 bfloat16 has 128 times a
    unit, so that most of 1000 steps have length zero."""
    nodes = {"euler": (0,), "midpoint": (0, 1 / 2), "rk4": (0, 1 / 3, 2 / 3, 1), "rk4_classic": (0, 0.5, 0.5, 1)}
    t = torch.linspace(0, 3, 1001, dtype=F64)
    seen: list[Tensor] = []

    def func(time: Tensor, y: Tensor) -> Tensor:
        seen.append(time.detach().clone())
        return torch.ones_like(y)

    y = odeint(func, torch.zeros(3, dtype=y_dtype), t, method=method, checkpoint=checkpoint)
    expected = torch.stack([t[:-1] + node * t.diff() for node in nodes[method]], dim=1).flatten()
    # an end of a step is the point of the grid itself
    if nodes[method][-1] == 1:
        expected[len(nodes[method]) - 1 :: len(nodes[method])] = t[1:]
    times = torch.stack(seen)
    assert times.dtype == y_dtype
    exact = expected.to(y_dtype)
    # float64 sums in another order differ in their last bit, which may fall on the tie of the one rounding
    ties = (times != exact) & ((expected - expected.abs() * 2**-52).to(y_dtype) != times)
    ties &= (expected + expected.abs() * 2**-52).to(y_dtype) != times
    assert not ties.any()
    # the solution is t itself: steps sum to 3 although func's times repeat
    assert (y.double() - t[:, None]).abs().max() <= 3 * max(torch.finfo(y_dtype).eps, 1000 * 2.0**-24)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("method", ["euler", "rk4", "rk4_classic"])
@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("state", [torch.float32, None], ids=["float32-state", "pure"])
def test_small_increments_are_not_lost(state: Any, checkpoint: str, method: str, dtype: torch.dtype) -> None:
    """rampde 0.1.0 and torchdiffeq: f = 1e-5 in float16 over 1000 steps of 1e-3 gives exactly 0, as h f
    underflows in 16 bits; true is 1e-5."""
    y0 = torch.zeros(3, dtype=state or dtype)
    t = torch.linspace(0, 1, 1001, dtype=F64)
    y = odeint(lambda t, y: torch.full_like(y, 1e-5, dtype=dtype), y0, t, method=method, checkpoint=checkpoint)
    # f itself is 1e-5 rounded to 16 bits (subnormal in float16: spacing 2^-24), and in the end y once more
    spacing = 2.0**-24 if dtype == torch.float16 else 1e-5 * torch.finfo(dtype).eps
    assert (y[-1].double() - 1e-5).abs().max() <= spacing * (1 if state is None else 0.5) + 1000 * 2.0**-24 * 1e-5


# plain autograd has no scale of its own: that is what GradScaler is for
@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_small_gradients_are_not_lost(checkpoint: str) -> None:
    """The same loss in the backward: cotangents of 1e-9 underflow in float16 where nothing scales them."""
    net, y0 = Net(), start()

    def gradients(factor: float) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16):
            y = odeint(net, y0, T, method="rk4_classic", checkpoint=checkpoint)
        return torch.autograd.grad(factor * y[-1].sum(), [y0, net.w, net.b])

    # the factor is no power of two: each of the eight steps may round differently by a unit of float16
    pairs = zip(gradients(1e-9), gradients(1.0), strict=True)
    assert all(relative(1e9 * small, one) < 8 * torch.finfo(torch.float16).eps for small, one in pairs)


@pytest.mark.parametrize("method", ["rk4", "rk4_classic"])
def test_nodes_of_fourth_order_for_a_velocity_that_depends_on_time(method: str) -> None:
    """torchdyn: rk4 evaluates func at wrong times, which makes it of first order when func depends on t."""
    errors = []
    for steps in (16, 32):
        t = torch.linspace(0, 1, steps + 1, dtype=F64)
        y = odeint(lambda t, y: 2 * t * y, torch.ones((), dtype=F64), t, method=method)
        errors.append(float((y[-1] - math.e).abs()))
    assert math.log2(errors[0] / errors[1]) > 3.5
