"""Adams methods: torchdiffeq's numbers on equal grids, their orders on any, gradients by ``gradcheck``."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import rampde
from rampde import odeint

METHODS = ["explicit_adams", "implicit_adams"]
POLICIES = ["step", "none", "tape"]

EQUAL = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
UNEQUAL = (0.0, 0.1, 0.25, 0.3, 0.42, 0.5, 0.61)
# with steps of rk4 among those of the formulas
ROUGH = (0.0, 0.3, 0.301, 0.31, 0.6, 0.7, 0.9, 0.91, 0.912)

# a corrector that converges to roundoff
CONVERGED: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-15}
OPTIONS: dict[str, Any] = {"max_iters": 60}


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def times(values: tuple[float, ...] = UNEQUAL) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def linear(t: Tensor, y: Tensor) -> Tensor:
    matrix = torch.tensor([[-0.3, 1.1], [-0.9, 0.2]], dtype=y.dtype)
    return (1 + t * t) * y @ matrix - 0.1 * y**3 + torch.sin(3 * t)


Y0 = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64)


class TestTorchdiffeq:
    @pytest.mark.parametrize("method", [*METHODS, "fixed_adams"])
    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 11, 20])
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    @pytest.mark.parametrize("max_order", [12, 6, 4])
    @pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
    def test_equal_steps(self, method: str, steps: int, reverse: bool, max_order: int, tolerance: float) -> None:
        """Wherever torchdiffeq's corrector converges; where it does not, it forgets a velocity."""
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        t = t.flip(0) if reverse else t
        options = {"max_order": max_order, "max_iters": 60}
        ours, theirs = (
            solver(linear, Y0, t, method=method, options=options, rtol=tolerance, atol=tolerance)
            for solver in (odeint, torchdiffeq.odeint)
        )
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_step_size(self, method: str, interp: str) -> None:
        t = torch.tensor([0.0, 0.13, 0.5, 1.0], dtype=torch.float64)
        options = {"step_size": 0.05, "interp": interp, "max_order": 6, "max_iters": 60}
        ours, theirs = (
            solver(linear, Y0, t, method=method, options=options) for solver in (odeint, torchdiffeq.odeint)
        )
        assert (ours - theirs).abs().max() <= 1e-12

    @pytest.mark.parametrize("method", METHODS)
    def test_perturb(self, method: str) -> None:
        def switched(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t < 0.5, 1.0, -2.0) * y + torch.where(t < 0.75, 0.0, 1.0)

        options = {"perturb": True, "max_iters": 60, "max_order": 5}
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        ours, theirs = (
            solver(switched, Y0, t, method=method, options=options) for solver in (odeint, torchdiffeq.odeint)
        )
        assert (ours - theirs).abs().max() <= 1e-12

    def test_both_warn_where_the_corrector_does_not_converge(self) -> None:
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        sentence = "Functional iteration did not converge. Solution may be incorrect."
        for solver in (odeint, torchdiffeq.odeint):
            with pytest.warns(UserWarning, match=sentence):
                solver(lambda t, y: -9 * y, Y0, t, method="implicit_adams")

    def test_max_order_below_four_is_rk4(self) -> None:
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        for method in METHODS:
            with pytest.warns(UserWarning, match="max_order is below 4, so the solver reduces to `rk4`"):
                y = odeint(linear, Y0, t, method=method, options={"max_order": 3})
            assert torch.equal(y, odeint(linear, Y0, t, method="rk4"))

    def test_unequal_steps_are_of_higher_order_than_torchdiffeq(self) -> None:
        """torchdiffeq takes the weights of equal steps on any grid, which leaves order 1 or 2."""

        def error(solver: Any, steps: int) -> float:
            t = 1.5 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2
            y = solver(lambda t, y: -y * torch.cos(t), torch.ones(1).double(), t, method="implicit_adams")
            return float((y[-1] - math.exp(-math.sin(1.5))).abs())

        assert math.log2(error(torchdiffeq.odeint, 80) / error(torchdiffeq.odeint, 160)) < 2.2
        assert math.log2(error(odeint, 20) / error(odeint, 40)) > 5


def test_the_error_names_step_and_time() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="step 2 of 8, between t = 0.25 and t = 0.375, after max_iters = 4"):
        odeint(lambda t, y: -9 * y, Y0, t, method="implicit_adams")


def test_the_explicit_default_is_stable() -> None:
    """With all the velocities that it may use, as torchdiffeq does by default, the explicit method explodes here."""
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    reference = odeint(linear, Y0, t, method="rk4")
    assert (odeint(linear, Y0, t, method="explicit_adams") - reference).abs().max() < 1e-4
    exploded = odeint(linear, Y0, t, method="explicit_adams", options={"max_order": 12})
    assert (exploded - reference).abs().max() > 1


def autonomous(a: Tensor) -> Any:
    return lambda t, y: torch.stack([y[1] * (1 + 0.1 * y[0]), -a * y[0]])


def driven(a: Tensor) -> Any:
    return lambda t, y: torch.stack([y[1] + torch.cos(2 * t), -a * y[0] * (1 + 0.5 * torch.sin(t))])


@cache
def solution_and_gradients(problem: Any, steps: int, method: str, max_order: int) -> tuple[Tensor, Tensor]:
    a = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    options = {"max_order": max_order, **OPTIONS}
    y = odeint(problem(a), y0, t, method=method, options=options, **CONVERGED)[-1]
    gradients = torch.autograd.grad((y * torch.tensor([1.0, -2.0])).sum(), [y0, a])
    return y.detach(), torch.cat([gradients[0], gradients[1][None]])


@pytest.mark.parametrize("problem", [autonomous, driven])
@pytest.mark.parametrize(
    ("method", "max_order", "order"),
    [
        ("explicit_adams", 4, 3),
        ("explicit_adams", 5, 4),
        ("explicit_adams", 6, 4),
        ("implicit_adams", 4, 4),
        ("implicit_adams", 5, 5),
        ("implicit_adams", 12, 5),
    ],
)
def test_order_of_solution_and_gradients(problem: Any, method: str, max_order: int, order: int) -> None:
    def errors(steps: int) -> list[float]:
        exact = solution_and_gradients(problem, 640, "implicit_adams", 8)
        found = solution_and_gradients(problem, steps, method, max_order)
        return [float((value - limit).norm()) for value, limit in zip(found, exact, strict=True)]

    assert rampde.METHODS[method].order_with(max_order) == order
    for coarse, fine in zip(errors(80), errors(160), strict=True):
        assert abs(math.log2(coarse / fine) - order) <= 0.1


@pytest.mark.parametrize("method", METHODS)
def test_random_grids_are_of_order_four(method: str) -> None:
    """Steps of rk4 stand in where the grid is too rough for the formulas."""

    def error(steps: int) -> float:
        gaps = torch.rand(steps, dtype=torch.float64) + 1e-3
        t = torch.cat([gaps.new_zeros(1), 1.5 * gaps.cumsum(0) / gaps.sum()])
        options = {"max_order": 5 if method == "explicit_adams" else 12, "max_iters": 60}
        y = odeint(lambda t, y: -y * torch.cos(t), torch.ones(1).double(), t, method=method, options=options)
        return float((y[-1] - math.exp(-math.sin(1.5))).abs())

    assert error(400) < 3e-9
    assert error(50) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_evaluations(method: str) -> None:
    """As torchdiffeq: four for each of the first two steps, then one, and one for each iteration of the corrector."""
    counts = []
    for solver in (odeint, torchdiffeq.odeint):
        calls = 0

        def f(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return -y * t

        solver(f, Y0, torch.linspace(0, 1, 11, dtype=torch.float64), method=method)
        counts.append(calls)
    assert counts[0] == counts[1]
    if method == "explicit_adams":
        assert counts[0] == 16


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


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.layers(y)
        return y * torch.cos(t).to(y.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [8, 64])
@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float16, 1.0), (torch.float16, 1e-7), (torch.float16, 1e6), (torch.bfloat16, 1.0)],
)
@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
def test_sixteen_bits_lose_no_more_than_in_rk4(
    method: str, steps: int, checkpoint: str, dtype: torch.dtype, factor: float
) -> None:
    """The state, the gradients of y0 and of the parameters, at any size of the loss."""
    start = torch.randn(128, 16, generator=torch.Generator().manual_seed(2))

    def results(method: str, wide: torch.dtype) -> list[Tensor]:
        network, y0 = Network(wide), start.to(wide, copy=True).requires_grad_()
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        options = {} if method == "rk4" else {"max_order": 5}
        with torch.autocast("cpu", dtype, enabled=wide == torch.float32):
            y = odeint(network, y0, t, method=method, options=options, checkpoint=checkpoint)[-1]
        (y.square().mean() * factor).backward()
        assert y0.grad is not None
        gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        return [value.detach().double() for value in (y, y0.grad / factor, gradients / factor)]

    def errors(method: str) -> list[float]:
        pairs = zip(results(method, torch.float32), results(method, torch.float64), strict=True)
        return [float((low - exact).norm() / exact.norm()) for low, exact in pairs]

    for error, bar in zip(errors(method), errors("rk4"), strict=True):
        assert error <= 2 * bar


class Steep(torch.autograd.Function):
    """The identity, whose products leave float16 unless their cotangent is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1000


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_lowers_the_scale(method: str, checkpoint: str) -> None:
    """The first sweep overflows; one with a smaller scale gives the gradient, and nothing of the first is in it."""
    weight = torch.tensor(1e-4, requires_grad=True)
    scaler = rampde.DynamicScaler(torch.float16)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return Steep.apply((y.float() * weight).half()).float()  # type: ignore[no-any-return]

    y0 = torch.ones(2, 3, requires_grad=True)
    t = torch.linspace(0, 1, 9)
    y = odeint(f, y0, t, method=method, checkpoint=checkpoint, velocity_dtype=torch.float16, loss_scaler=scaler)
    y[-1].sum().backward()
    kinds = [kind for kind, _ in scaler.scale_history]
    assert kinds[0] == "init"
    assert "overflow" in kinds
    assert scaler.headroom < 1
    # d/dy0 of y0 exp(1000 weight t), as the products pretend, and of what it is to the weight
    assert y0.grad is not None
    assert weight.grad is not None
    assert (y0.grad - math.exp(0.1)).abs().max() < 2e-3
    assert float(weight.grad) == pytest.approx(6 * 1000 * math.expm1(0.1) / 0.1, rel=2e-3)


def test_infinite_losses_give_infinite_gradients() -> None:
    y0 = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 9), method="explicit_adams")
    (y.sum() * math.inf).backward()
    assert y0.grad is not None
    assert y0.grad.isinf().all()


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


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bits(method: str) -> None:
    results = []
    for _ in range(2):
        network, y0 = Network(torch.float32), torch.ones(4, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = odeint(network, y0, torch.linspace(0, 1, 9), method=method)
        y.sum().backward()
        results.append([y.detach(), y0.grad, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_events(method: str) -> None:
    event_time, y = rampde.odeint_event(
        lambda t, y: torch.stack([y[1], -torch.ones_like(y[0])]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor(0.0, dtype=torch.float64),
        event_fn=lambda t, y: y[0],
        method=method,
        options={"step_size": 0.05, "interp": "cubic"},
    )
    assert float(event_time) == pytest.approx(math.sqrt(2), abs=1e-6)
    assert float(y[-1, 0]) == pytest.approx(0, abs=1e-6)
