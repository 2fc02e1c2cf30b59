"""Steps for each sample of a batch by itself: every sample is solved as if it were alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

import rampde
from rampde import odeint
from rampde.methods import ADAPTIVE

OWN_STEPS = {"batch_axis": 0}
# steps of one size, so that finite differences see the same discretisation
EQUAL_STEPS = {"batch_axis": 0, "first_step": 0.11, "max_step": 0.11}


class Network:
    """A field whose rate differs from sample to sample: the last element of its state."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = (0.7 * torch.randn(2, 2, generator=generator, dtype=torch.float64)).requires_grad_()
        self.calls = self.rows = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(y)
        rate = y[:, 2:]
        field = rate * torch.tanh(y[:, :2] @ self.weight.to(y.dtype)) * torch.cos(t) - 0.1 * rate * y[:, :2]
        return torch.cat([field, torch.zeros_like(rate)], dim=1)


def batch(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    return torch.cat([state, torch.linspace(0.2, 6, samples, dtype=torch.float64)[:, None]], dim=1)


def gradients(func: Network, y0: Tensor, t: Tensor, **arguments: Any) -> list[Tensor]:
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
    y = odeint(func, y0, t, **arguments)
    cotangent = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), [y0, t, func.weight])]


def times_of_each(samples: int, reverse: bool = False) -> Tensor:
    t = torch.linspace(0, 2, 5, dtype=torch.float64) * torch.linspace(0.3, 1, samples, dtype=torch.float64)[:, None]
    return t.flip(1) if reverse else t


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("reverse", [False, True])
def test_each_sample_is_solved_as_if_it_were_alone(method: str, reverse: bool) -> None:
    func, y0, t = Network(), batch(9), times_of_each(9, reverse)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    together = odeint(func, y0, t, method=method, options=OWN_STEPS, **tolerance)
    for sample in range(9):
        alone = odeint(func, y0[sample : sample + 1], t[sample], method=method, **tolerance)
        # the same steps but for what rounding does to the error estimates, which in the small first steps of dopri8 are
        # nothing but rounding: there the solutions agree as far as the tolerance says
        bound = 1e-4 if method == "dopri8" else 1e-9
        torch.testing.assert_close(together[:, sample], alone[:, 0], rtol=bound, atol=bound)


def test_times_may_be_shared() -> None:
    func, y0, t = Network(), batch(5), torch.linspace(0, 1, 4, dtype=torch.float64)
    shared = gradients(func, y0, t, options=OWN_STEPS)
    own = gradients(func, y0, t.expand(5, -1), options=OWN_STEPS)
    own[2] = own[2].sum(0)
    for one, other in zip(shared, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpoint", ["step", "tape"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradcheck(method: str, checkpoint: str) -> None:
    func = Network()
    y0 = batch(3).requires_grad_()
    t = (torch.tensor([0.0, 0.3, 0.5]) * torch.tensor([[1.0], [0.8], [1.2]])).double().requires_grad_()

    def solve(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        func.weight = weight
        return odeint(func, y0, t, method=method, rtol=10.0, atol=10.0, checkpoint=checkpoint, options=EQUAL_STEPS)

    assert torch.autograd.gradcheck(solve, (y0, t, func.weight.detach().requires_grad_()))


def test_second_derivatives_of_the_tape() -> None:
    func = Network()
    y0 = batch(2).requires_grad_()
    t = torch.tensor([0.0, 0.2], dtype=torch.float64)

    def solve(y0: Tensor) -> Tensor:
        return odeint(func, y0, t, rtol=10.0, atol=10.0, checkpoint="tape", options=EQUAL_STEPS)

    assert torch.autograd.gradgradcheck(solve, (y0,))
    y = odeint(func, y0, t, options=OWN_STEPS)
    with pytest.raises(RuntimeError, match=r'second derivatives .* checkpoint="tape"'):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


def test_samples_that_are_done_cost_no_evaluations() -> None:
    y0 = torch.cat([batch(64), batch(64, seed=1)])
    t = torch.linspace(0, 2, 3, dtype=torch.float64).expand(128, -1).clone()
    t[:64] *= 0.05
    kept, dropped = Network(), Network()
    whole = gradients(kept, y0, t, options={**OWN_STEPS, "batch_tile": None})
    tiles = gradients(dropped, y0, t, options={**OWN_STEPS, "batch_tile": 64})
    assert dropped.rows < 0.7 * kept.rows
    assert dropped.calls == kept.calls
    for one, other in zip(whole, tiles, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_stiff_sample_does_not_slow_the_others() -> None:
    with rampde.stats() as stats:
        odeint(Network(), batch(20), torch.tensor([0.0, 3.0]), rtol=1e-4, atol=1e-5, options=OWN_STEPS)
    (solve,) = stats.solves
    assert len(solve.accepted_of_sample) == 20
    assert solve.accepted_of_sample[0] < solve.accepted_of_sample[-1] / 3
    assert stats.accepted == sum(solve.accepted_of_sample)


def test_states_of_any_structure() -> None:
    def pair(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        assert t.shape == (4, 1, 1)
        spin = torch.polar(torch.ones(4, dtype=torch.float64), t.flatten().double())
        return {"a": -y["a"] * (1 + t), "b": 1j * spin * y["b"], "c": y["a"].sum((1, 2))}

    generator = torch.Generator().manual_seed(3)
    y0 = {
        "a": torch.randn(4, 3, 2, generator=generator, dtype=torch.float64),
        "b": torch.randn(4, generator=generator, dtype=torch.complex128),
        "c": torch.zeros(4, dtype=torch.float64),
    }
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    y = odeint(pair, y0, t, options=OWN_STEPS)
    decay = torch.exp(-(t + t**2 / 2))
    torch.testing.assert_close(y["a"], decay[:, None, None, None] * y0["a"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        y["b"], torch.exp(torch.polar(torch.ones_like(t), t) - 1)[:, None] * y0["b"], rtol=1e-6, atol=1e-6
    )
    assert y["c"].shape == (3, 4)


def test_tolerances_of_each_element() -> None:
    func, y0 = Network(), batch(4)
    loose = torch.tensor([1e-1, 1e-1, 1e-1, 1e-8], dtype=torch.float64)[:, None].expand(4, 3)
    with rampde.stats() as stats:
        y = odeint(func, y0, torch.tensor([0.0, 1.0]), rtol=loose, atol=loose, options=OWN_STEPS)
    exact = odeint(func, y0, torch.tensor([0.0, 1.0]), rtol=1e-11, atol=1e-11)
    assert stats.solves[0].accepted_of_sample[3] > 3 * max(stats.solves[0].accepted_of_sample[:3])
    torch.testing.assert_close(y[1, 3], exact[1, 3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1e-7])
def test_16_bit_velocities(dtype: torch.dtype, factor: float) -> None:
    func, exact = Network(), Network()
    y0, t = batch(16).float(), torch.linspace(0, 1, 3)
    cotangent = torch.sin(torch.arange(3 * 16 * 3).float()).reshape(3, 16, 3)

    def solve(func: Network, **arguments: Any) -> list[Tensor]:
        start = y0.clone().requires_grad_()
        y = odeint(func, start, t, rtol=1.0, atol=1.0, options=EQUAL_STEPS, **arguments)
        found = torch.autograd.grad((y * cotangent * factor).sum(), [start, func.weight])
        return [y.detach(), *(gradient / factor for gradient in found)]

    allowed = 10 * torch.finfo(dtype).eps / 2
    for one, other in zip(solve(func, velocity_dtype=dtype), solve(exact), strict=True):
        assert (one - other).norm() <= allowed * other.norm()


def test_unreachable_tolerances_end_and_say_so() -> None:
    y0 = batch(4).float()
    with pytest.warns(UserWarning, match="cannot be reached with velocities in torch.bfloat16"):
        y = odeint(Network(), y0, torch.tensor([0.0, 1.0]), velocity_dtype=torch.bfloat16, options=OWN_STEPS)
    assert torch.isfinite(y).all()


def test_what_f_holds_for_every_sample_needs_all_of_them() -> None:
    y0 = batch(128)
    own = torch.randn(128, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 2, dtype=torch.float64) * torch.linspace(0.01, 1, 128, dtype=torch.float64)[:, None]

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(own * y)

    with pytest.raises(RuntimeError, match="batch_tile"):
        odeint(func, y0, t, options=OWN_STEPS)
    assert odeint(func, y0, t, options={**OWN_STEPS, "batch_tile": None}).shape == (2, 128, 3)


def test_an_endless_solve_names_the_sample() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tensor([[-1.0], [-1e9]]) * y

    with pytest.raises(RuntimeError, match=r"max_num_steps exceeded \(50\) for sample 1 at t = "):
        odeint(func, torch.ones(2, 1), torch.tensor([0.0, 1.0]), options={**OWN_STEPS, "max_num_steps": 50})


@pytest.mark.parametrize(
    ("y0", "t", "arguments", "message"),
    [
        (torch.ones(()), torch.tensor([0.0, 1.0]), {}, "expected the same first dimension"),
        ((torch.ones(2), torch.ones(3)), torch.tensor([0.0, 1.0]), {}, "expected the same first dimension"),
        (torch.ones(2), torch.zeros(3, 2), {}, r"expected \(T,\) or \(2, T\)"),
        (torch.ones(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), {}, "same direction"),
        (torch.ones(2), torch.tensor([[0.0, 1.0], [1.0, 1.0]]), {}, "strictly increasing or decreasing"),
        (torch.ones(2), torch.tensor([0.0, 1.0]), {"checkpoint": "none"}, "one without the other"),
        (torch.ones(2), torch.tensor([0.0, 1.0]), {"event_fn": lambda t, y: y.sum()}, "one without the other"),
        (torch.ones(2), torch.tensor([0.0, 1.0]), {"options": {"batch_axis": 1}}, "batch_axis is 1, expected 0"),
        (torch.ones(2), torch.tensor([0.0, 1.0]), {"options": {"batch_axis": 0, "batch_tile": 0}}, "batch_tile is 0"),
        (torch.ones(2), torch.tensor([0.0, 1.0]), {"options": {"batch_axis": 0, "norm": torch.norm}}, "norm"),
    ],
)
def test_arguments(y0: Any, t: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odeint(lambda t, y: y, y0, t, **{"options": OWN_STEPS, **arguments})


def test_random_numbers_are_refused_where_they_cannot_be_replayed() -> None:
    y0 = torch.ones(3, 2, requires_grad=True)
    t = torch.tensor([0.0, 0.1])

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * (1 + 0 * torch.rand(()))

    with pytest.raises(RuntimeError, match=r'draws random numbers.*checkpoint="tape"'):
        odeint(func, y0, t, options=OWN_STEPS)
    odeint(func, y0, t, options=OWN_STEPS, checkpoint="tape").sum().backward()
    assert y0.grad is not None
