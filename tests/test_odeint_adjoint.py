"""The continuous adjoint: in float64 torchdiffeq's numbers and the exact ones, for states of every kind and events."""

from typing import Any

import pytest
import torch
from adjoint_problems import EVEN, PAIR, RK4, UNEVEN, Net, Pair, compare, reference, relative, start, weights
from torch import Tensor, nn

from rampde import odeint, odeint_adjoint, odeint_event, stats

F64 = torch.float64


class TestLikeTorchdiffeq:
    @pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
    @pytest.mark.parametrize("t", [EVEN, UNEVEN, EVEN[:1]], ids=["even", "reverse", "single"])
    @pytest.mark.parametrize("time_gradient", [False, True])
    @pytest.mark.parametrize("options", [None, {"step_size": 0.07}, {"step_size": 0.3, "perturb": True}], ids=str)
    def test_tensor(self, method: str, t: Tensor, time_gradient: bool, options: Any) -> None:
        compare(Net(), start().detach(), t, time_gradient, method=method, options=options)

    @pytest.mark.parametrize("t", [EVEN, UNEVEN, EVEN[:1]], ids=["even", "reverse", "single"])
    @pytest.mark.parametrize("time_gradient", [False, True])
    def test_tuple(self, t: Tensor, time_gradient: bool) -> None:
        compare(Pair(), PAIR, t, time_gradient, **RK4)

    def test_adjoint_method_and_options(self) -> None:
        compare(Net(), start().detach(), EVEN, method="midpoint", adjoint_method="rk4")
        options = {"method": "rk4", "options": {"step_size": 0.1}}
        compare(Net(), start().detach(), EVEN, **options, adjoint_options={"step_size": 0.05})
        compare(Net(), start().detach(), EVEN, **options, adjoint_method="euler", adjoint_options={})

    def test_grid_constructor(self) -> None:
        def constructor(func: Any, y0: Any, t: Tensor) -> Tensor:
            return torch.linspace(float(t[0]), float(t[-1]), 7, dtype=t.dtype)

        compare(Net(), start().detach(), EVEN, method="rk4", options={"grid_constructor": constructor})

    def test_zero_gradient_of_an_unused_parameter(self) -> None:
        net = Net()
        odeint_adjoint(net, start(), EVEN, **RK4).sum().backward()
        assert torch.equal(net.unused.grad, torch.zeros_like(net.unused))
        assert net.frozen.grad is None

    def test_output_without_gradient(self) -> None:
        net = Net().requires_grad_(False)
        assert not odeint_adjoint(net, start().detach(), EVEN, **RK4).requires_grad
        with torch.no_grad():
            assert not odeint_adjoint(Net(), start(), EVEN, **RK4).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_gradients_of_the_exact_solution(dtype: torch.dtype) -> None:
    net, exact_net, t = Net(dtype), Net(), EVEN.clone().requires_grad_()
    y0, exact_y0 = start(dtype), start()
    expected_y = reference(exact_net, exact_y0, t)
    expected = torch.autograd.grad((expected_y * weights(expected_y)).sum(), [exact_y0, t, *exact_net.wanted])
    y = odeint_adjoint(net, y0, t, **RK4)
    found = torch.autograd.grad((y * weights(y)).sum(), [y0, t, *net.wanted])
    bound = 4e-6 if dtype == F64 else 2e-5
    assert all(relative(ours, theirs) < bound for ours, theirs in zip(found, expected, strict=True))


def test_finite_differences() -> None:
    def solve(y0: Tensor, t: Tensor, w: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ w) * (1 + t)

        result: Tensor = odeint_adjoint(func, y0, t, adjoint_params=(w,), method="rk4", options={"step_size": 0.02})
        return result

    w = torch.randn(2, 2, dtype=F64, requires_grad=True)
    y0 = torch.randn(2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (y0, torch.tensor([0.1, 0.4, 1.0], dtype=F64, requires_grad=True), w))


class TestEvents:
    @staticmethod
    def solve(solver: Any, method: str, **arguments: Any) -> tuple[Tensor, Tensor, Net, Tensor, Tensor]:
        net, y0, t = Net(), start(), torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
        options = {"step_size": 2.0**-8, "interp": "cubic"} if method == "rk4" else {}

        def event_fn(t: Tensor, y: Tensor) -> Tensor:
            return y[0, 0] - 0.1

        time, y = solver(net, y0, t, event_fn=event_fn, method=method, options=options, **arguments)
        return time, y, net, y0, t

    @pytest.mark.parametrize("method", ["dopri5", "rk4"])
    def test_as_integrating_to_the_event(self, method: str) -> None:
        time, y, net, y0, t = self.solve(odeint_adjoint, method)
        assert y.shape == (2, 3, 4)
        assert abs(float(y[1, 0, 0].detach()) - 0.1) < 1e-6
        found = torch.autograd.grad(y.square().sum(), [y0, t, *net.wanted])
        exact, exact_y0 = Net(), start()
        times = torch.stack([torch.zeros((), dtype=F64), time.detach()]).requires_grad_()
        expected_y = reference(exact, exact_y0, times)
        expected = torch.autograd.grad(expected_y.square().sum(), [exact_y0, times, *exact.wanted])
        for ours, theirs in zip([found[0], *found[2:]], [expected[0], *expected[2:]], strict=True):
            assert relative(ours, theirs) < 1e-5
        assert relative(found[1][0], expected[1][0]) < 1e-5
        assert float(found[1][1]) == 0.0

    def test_as_torchdiffeq(self) -> None:
        torchdiffeq = pytest.importorskip("torchdiffeq")
        results = []
        for solver in (odeint_adjoint, torchdiffeq.odeint_adjoint):
            time, y, net, y0, t = self.solve(solver, "dopri5")
            results.append([time.detach(), y.detach(), *torch.autograd.grad(y.square().sum(), [y0, t, *net.wanted])])
        # the event is found to the absolute tolerance, 1e-9
        assert all((ours - theirs).abs().max() < 1e-6 for ours, theirs in zip(*results, strict=True))

    def test_backward_from_the_time(self) -> None:
        time, y, *_ = self.solve(odeint_adjoint, "dopri5")
        time.backward(retain_graph=True)
        y.sum().backward()

    def test_odeint_event(self) -> None:
        """The gradient of the event's time, with the continuous adjoint before it."""

        def solve(interface: Any) -> tuple[Tensor, ...]:
            net, y0 = Net(), start()
            time, y = odeint_event(
                net,
                y0,
                torch.tensor(0.0, dtype=F64),
                event_fn=lambda t, y: y[0, 0] - 0.1,
                odeint_interface=interface,
                method="dopri5",
            )
            found: tuple[Tensor, ...] = torch.autograd.grad(time + y[-1].sum(), [y0, *net.wanted])
            return found

        for ours, theirs in zip(solve(odeint_adjoint), solve(odeint), strict=True):
            assert relative(ours, theirs) < 1e-5


class TestCallbacks:
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_of_the_adjoint_solve(self, method: str) -> None:
        net, seen = Net(), []
        net.callback_step = lambda t, y, dt: seen.append(("forward", float(t), y.shape))
        net.callback_step_adjoint = lambda t, y, dt: seen.append(("adjoint", float(t), [p.shape for p in y]))
        if method == "dopri5":
            net.callback_accept_step_adjoint = lambda t, y, dt: seen.append(("accepted", float(t), float(dt)))
        odeint_adjoint(net, start(), EVEN, method=method).sum().backward()
        forward, adjoint = ([e for e in seen if e[0] == name] for name in ("forward", "adjoint"))
        assert [shape for _, _, shape in forward] == [(3, 4)] * len(forward)
        shapes = [(), (3, 4), (3, 4), (4, 4), (4, 4), (4,), (5,)]
        assert [shape for _, _, shape in adjoint] == [shapes] * len(adjoint)
        if method == "rk4":
            assert [time for _, time, _ in adjoint] == [1.0, 0.75, 0.5, 0.25]
        else:
            accepted = [e for e in seen if e[0] == "accepted"]
            assert abs(sum(dt for _, _, dt in accepted) - 1.0) < 0.5
            assert adjoint[0][1] == 1.0


def test_statistics() -> None:
    net = Net()
    with stats() as counted:
        y = odeint_adjoint(net, start(), EVEN)
    forward = net.evaluations
    assert counted.evaluations_forward == forward
    y.sum().backward()
    assert counted.evaluations_forward == forward
    assert counted.evaluations_backward == net.evaluations - forward
    adjoint = counted.solves[-1]
    assert adjoint.accepted > 0
    assert all(size < 0 for size in adjoint.step_sizes)


class TestStates:
    def test_dict(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()

            def forward(self, t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
                return {"z": [self.net(t, y["z"][0])], "log": -y["z"][0].sum(-1)}

        func, exact = Named(), Named()
        y0, t = {"z": [start()], "log": torch.zeros(3, dtype=F64, requires_grad=True)}, EVEN
        y = odeint_adjoint(func, y0, t, **RK4)
        expected = odeint(exact, y0, t, **RK4)
        assert torch.equal(y["z"][0], expected["z"][0])
        inputs, exact_inputs = [y0["z"][0], y0["log"], *func.net.wanted], [y0["z"][0], y0["log"], *exact.net.wanted]
        found = torch.autograd.grad(y["z"][0].square().sum() + y["log"].square().sum(), inputs)
        close = torch.autograd.grad(expected["z"][0].square().sum() + expected["log"].square().sum(), exact_inputs)
        assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(found, close, strict=True))

    def test_component_that_is_not_used(self) -> None:
        """f does not depend on the second tensor, nor the loss; the third has a constant slope."""
        w = torch.tensor(0.3, dtype=F64, requires_grad=True)

        def func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return w * y[0], y[0] * t, torch.ones_like(y[2])

        y0 = tuple(torch.ones(2, dtype=F64, requires_grad=True) for _ in range(3))
        y = odeint_adjoint(func, y0, EVEN, adjoint_params=(w,), **RK4)
        (y[0][-1].sum() + y[2][-1].sum()).backward()
        assert abs(float(y0[0].grad[0]) - torch.tensor(0.3, dtype=F64).exp()) < 1e-8
        assert torch.equal(y0[1].grad, torch.zeros(2, dtype=F64))
        assert torch.equal(y0[2].grad, torch.ones(2, dtype=F64))

    def test_constant_velocity(self) -> None:
        y0 = start()
        odeint_adjoint(lambda t, y: torch.ones_like(y), y0, EVEN, adjoint_params=(), **RK4).sum().backward()
        assert torch.equal(y0.grad, torch.full_like(y0, 5.0))

    @pytest.mark.parametrize("single", [True, False])
    def test_complex(self, single: bool) -> None:
        matrix = torch.tensor([[0.1 + 1j, 0.5], [0.3j, -0.2 - 0.7j]], dtype=torch.complex128, requires_grad=True)
        z0 = torch.tensor([1.0 + 0.5j, -0.3 + 2j], dtype=torch.complex128, requires_grad=True)
        r0 = torch.tensor([0.5, 0.2, 0.1], dtype=F64, requires_grad=True)
        t = EVEN.clone().requires_grad_()

        def func(t: Tensor, y: Any) -> Any:
            z = y if single else y[0]
            k = matrix @ z * torch.cos(t)
            return k if single else (k, -y[1] * (z.abs() ** 2).sum())

        def gradients(y: Any) -> tuple[Tensor, ...]:
            parts = [y] if single else y
            loss = sum((part * weights(part)).abs().square().sum() for part in parts)
            return torch.autograd.grad(loss, [z0, matrix, t if single else r0])  # type: ignore[arg-type]

        found = gradients(odeint_adjoint(func, z0 if single else (z0, r0), t, adjoint_params=(matrix,), **RK4))
        expected = gradients(reference(func, z0, t) if single else odeint(func, (z0, r0), t, **RK4))
        assert all(ours.dtype == theirs.dtype for ours, theirs in zip(found, expected, strict=True))
        assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(found, expected, strict=True))

    def test_mixed_dtypes(self) -> None:
        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1].float() * t, -y[0].double()

        y0 = (torch.ones(2, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True))
        y = odeint_adjoint(func, y0, EVEN, adjoint_params=(), **RK4)
        assert [leaf.dtype for leaf in y] == [torch.float32, F64]
        assert [leaf.shape for leaf in y] == [(5, 2), (5, 2)]
        (y[0].sum() + y[1].sum()).backward()
        assert [leaf.grad.dtype for leaf in y0] == [torch.float32, F64]

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 3)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        y0 = torch.ones(shape, dtype=F64, requires_grad=True)
        y = odeint_adjoint(lambda t, y: -y, y0, EVEN, adjoint_params=(), **RK4)
        y[-1].sum().backward()
        assert y.shape == (5, *shape)
        assert torch.allclose(y0.grad, torch.full(shape, -1.0, dtype=F64).exp(), rtol=1e-6)

    def test_layout_of_images(self) -> None:
        y0 = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        net = nn.Conv2d(3, 3, 3, padding=1)
        func = type("Field", (nn.Module,), {"forward": lambda self, t, y: torch.tanh(self.net(y))})()
        func.net = net
        y = odeint_adjoint(func, y0, EVEN, **RK4)
        found = torch.autograd.grad(y.square().sum(), [y0, net.weight])
        expected = torch.autograd.grad(odeint(func, y0, EVEN, **RK4).square().sum(), [y0, net.weight])
        assert all(relative(ours, theirs) < 1e-4 for ours, theirs in zip(found, expected, strict=True))
