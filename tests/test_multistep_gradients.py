"""Gradients of Adams methods: ``gradcheck`` in every policy, evaluations, random numbers, exceptions."""

from typing import Any

import pytest
import torch
from multistep_problems import CONVERGED, EQUAL, METHODS, OPTIONS, Y0
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import rampde
from rampde import odeint

POLICIES = ["step", "none", "tape"]

UNEQUAL = (0.0, 0.1, 0.25, 0.3, 0.42, 0.5, 0.61)
# with steps of rk4 among those of the formulas
ROUGH = (0.0, 0.3, 0.301, 0.31, 0.6, 0.7, 0.9, 0.91, 0.912)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def times(values: tuple[float, ...] = UNEQUAL) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_evaluations_for_a_gradient(checkpoint: str) -> None:
    with rampde.stats() as stats:
        y = odeint(lambda t, y: -y, double(3), times(EQUAL).detach(), method="explicit_adams", checkpoint=checkpoint)
        y.sum().backward()
    assert stats.evaluations_forward == 12
    assert stats.evaluations_backward == (12 if checkpoint == "step" else 0)
    assert stats.accepted == 6


@pytest.mark.parametrize("grid", [EQUAL, UNEQUAL, ROUGH], ids=["equal", "unequal", "rough"])
@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("max_order", [12, 4])
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str, max_order: int, checkpoint: str, grid: tuple[float, ...]) -> None:
    """y0, every time, parameters used linearly and not; every output in the loss."""

    def run(y0: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Any:
        def f(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ weight) * torch.cos(3 * t) + bias * t

        options = {"max_order": max_order, **OPTIONS}
        return odeint(f, y0, t, method=method, checkpoint=checkpoint, options=options, **CONVERGED)

    assert gradcheck(run, (double(1, 2), times(grid), double(2, 2), double(2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", METHODS)
class TestGradients:
    def test_tuple(self, method: str, checkpoint: str) -> None:
        def run(y0: Tensor, log_density: Tensor, passive: Tensor, t: Tensor, weight: Tensor) -> Any:
            def f(t: Tensor, state: Any) -> Any:
                k = torch.tanh(state[0] @ weight)
                return k * t, -(k * k).sum(1, keepdim=True), torch.ones_like(passive)

            state = (y0, log_density, passive)
            return odeint(f, state, t, method=method, checkpoint=checkpoint, options=OPTIONS, **CONVERGED)[:2]

        assert gradcheck(run, (double(1, 2), double(1, 1), double(2), times(), double(2, 2)))

    def test_complex(self, method: str, checkpoint: str) -> None:
        def run(y0: Tensor, real: Tensor, t: Tensor, weight: Tensor) -> Any:
            def f(t: Tensor, state: Any) -> Any:
                y, r = state
                return (y @ weight) * torch.exp(1j * t) + r, (y.conj() * y).real.sum(0)

            return odeint(f, (y0, real), t, method=method, checkpoint=checkpoint, options=OPTIONS, **CONVERGED)

        y0, weight = (torch.randn(n, 2, dtype=torch.complex128, requires_grad=True) for n in (1, 2))
        assert gradcheck(run, (y0, double(2), times((0.0, 0.1, 0.2, 0.3, 0.35)), weight))

    def test_outputs_between_steps(self, method: str, checkpoint: str) -> None:
        def run(y0: Tensor, t: Tensor, weight: Tensor) -> Any:
            options = {"step_size": 0.1, "interp": "cubic", **OPTIONS}
            f = lambda t, y: torch.sin(y @ weight) * t  # noqa: E731
            return odeint(f, y0, t, method=method, checkpoint=checkpoint, options=options, **CONVERGED)

        assert gradcheck(run, (double(2, 2), times((0.0, 0.13, 0.47, 0.5, 0.62)), double(2, 2)))

    def test_reverse_perturbed_and_compensated(self, method: str, checkpoint: str) -> None:
        def run(y0: Tensor, t: Tensor) -> Any:
            return odeint(
                lambda t, y: torch.sin(y) * t,
                y0,
                t,
                method=method,
                checkpoint=checkpoint,
                options={"perturb": True, **OPTIONS},
                compensated=True,
                **CONVERGED,
            )

        assert gradcheck(run, (double(), times((1.0, 0.8, 0.7, 0.6, 0.55, 0.4))))

    def test_second_derivatives(self, method: str, checkpoint: str) -> None:
        def run(y0: Tensor, t: Tensor, weight: Tensor) -> Any:
            f = lambda t, y: torch.tanh(y @ weight) * t  # noqa: E731
            return odeint(f, y0, t, method=method, checkpoint=checkpoint, options=OPTIONS, **CONVERGED)

        assert gradgradcheck(run, (double(1, 2), times(UNEQUAL[:5]), double(2, 2)))

    def test_all_from_one_tensor(self, method: str, checkpoint: str) -> None:
        """No path is counted twice, with and without a graph of the gradient."""

        def run(weight: Tensor) -> Any:
            t = weight.square().sum().sigmoid() * torch.linspace(0, 1, 6, dtype=torch.float64)
            f = lambda t, y: torch.tanh(y @ weight) * t  # noqa: E731
            y0 = weight[:1].sin()
            return odeint(f, y0, t, method=method, checkpoint=checkpoint, options=OPTIONS, **CONVERGED)

        weight = double(2, 2)
        assert gradcheck(run, (weight,))
        plain, with_graph = (
            torch.autograd.grad(run(weight).square().sum(), weight, create_graph=create_graph)[0]
            for create_graph in (False, True)
        )
        assert (with_graph - plain).abs().max() <= 1e-12 * plain.abs().max()

    def test_shapes(self, method: str, checkpoint: str) -> None:
        y0 = torch.zeros(0, 3, requires_grad=True)
        y = odeint(lambda t, y: y * t, y0, times(EQUAL), method=method, checkpoint=checkpoint)
        assert y.shape == (7, 0, 3)
        y.sum().backward()
        assert odeint(lambda t, y: y, Y0, times(EQUAL[:1]), method=method, checkpoint=checkpoint).shape == (1, 3, 2)

    def test_hooks_and_repeated_backward(self, method: str, checkpoint: str) -> None:
        weight, seen = double(2, 2), []
        weight.register_hook(seen.append)
        y = odeint(lambda t, y: torch.tanh(y @ weight), Y0, times(EQUAL).detach(), method=method, checkpoint=checkpoint)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        assert len(seen) == 2
        assert torch.equal(seen[0], seen[1])


def test_a_scaled_sweep_in_float64() -> None:
    for method in METHODS:
        for checkpoint in ("step", "none"):

            def run(y0: Tensor, t: Tensor, weight: Tensor, method: str = method, checkpoint: str = checkpoint) -> Any:
                return odeint(
                    lambda t, y: torch.tanh(y @ weight) * t,
                    y0,
                    t,
                    method=method,
                    checkpoint=checkpoint,
                    options=OPTIONS,
                    loss_scaler=rampde.DynamicScaler(torch.float64),
                    **CONVERGED,
                )

            assert gradcheck(run, (double(1, 2), times(), double(2, 2)))


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_random_numbers_are_replayed(checkpoint: str) -> None:
    weight, dropout = torch.randn(3, 3, requires_grad=True), nn.Dropout(0.3)

    def gradient(checkpoint: str) -> Tensor:
        torch.manual_seed(5)
        f = lambda t, y: torch.tanh(dropout(y) @ weight)  # noqa: E731
        y = odeint(f, torch.ones(2, 3), torch.linspace(0, 1, 9), method="explicit_adams", checkpoint=checkpoint)
        state = torch.get_rng_state()
        gradient = torch.autograd.grad(y.sum(), weight)[0]
        assert torch.equal(state, torch.get_rng_state())
        return gradient

    assert (gradient(checkpoint) - gradient("tape")).abs().max() < 1e-5


def test_random_numbers_in_an_implicit_step_are_an_error() -> None:
    weight, dropout = torch.randn(3, 3, requires_grad=True), nn.Dropout(0.3)
    with pytest.raises(RuntimeError, match="draws random numbers"):
        odeint(
            lambda t, y: torch.tanh(dropout(y) @ weight),
            torch.ones(2, 3),
            torch.linspace(0, 1, 9),
            method="implicit_adams",
        )


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_leaves_nothing_behind(method: str, checkpoint: str) -> None:
    class Fault(Exception):
        pass

    weight, fuse = double(2, 2), [0]
    weight.grad = torch.ones_like(weight)

    def f(t: Tensor, y: Tensor) -> Tensor:
        fuse[0] -= 1
        if fuse[0] == 0:
            raise Fault
        return torch.tanh(y @ weight)

    def solve() -> Any:
        return odeint(f, Y0, times(EQUAL).detach(), method=method, checkpoint=checkpoint)

    for evaluation in (1, 6, 11):
        fuse[0] = evaluation
        with pytest.raises(Fault):
            solve()
    y = solve()
    if checkpoint == "step":
        fuse[0] = 5
        with pytest.raises(Fault):
            y.sum().backward(retain_graph=True)
        assert torch.equal(weight.grad, torch.ones_like(weight))
        assert weight._backward_hooks is None or len(weight._backward_hooks) == 0
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(gradient, torch.autograd.grad(solve().sum(), weight)[0])
