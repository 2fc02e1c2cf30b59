"""The continuous adjoint: what torchdiffeq's computes in float64, complete, and in 16 bits as accurate as odeint."""

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampde import DynamicScaler, odeint, odeint_adjoint, odeint_event, stats
from rampde.augmented import augmented_tolerance
from rampde.state import StateSpec

F64 = torch.float64
LOW = [torch.float16, torch.bfloat16]
# of values of order one after some hundred float64 operations
BOUND = 1e-12
# divides the intervals: outputs within a step would be interpolated
RK4 = {"method": "rk4", "options": {"step_size": 2.0**-7}}


class Net(nn.Module):
    """A tanh network that depends on time, with a frozen and an unused parameter; it counts and notes what it sees."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))
        self.v = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(4, generator=generator).to(dtype))
        self.frozen = nn.Parameter(torch.randn(4, generator=generator).to(dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5, dtype=dtype))
        self.evaluations = 0
        self.seen: set[tuple[torch.dtype, ...]] = set()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        inner = torch.tanh(nn.functional.linear(y, self.w.t(), self.b))
        k = nn.functional.linear(inner, self.v.t()) * (1 + t) + self.frozen.to(y.dtype)
        self.seen.add((t.dtype, y.dtype, inner.dtype))
        return k

    @property
    def wanted(self) -> list[nn.Parameter]:
        return [self.w, self.v, self.b]


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).to(dtype).requires_grad_()


def reference(func: Callable[[Tensor, Any], Any], y0: Tensor, t: Tensor, steps: int = 64) -> Tensor:
    """The exact solution and gradients, to 1e-8: fine steps in plain PyTorch and plain autograd."""
    states = [y0]
    for begin, end in itertools.pairwise(t):
        y, h = states[-1], (end - begin) / steps
        for n in range(steps):
            time = begin + n * h
            k1 = func(time, y)
            k2 = func(time + h / 2, y + h / 2 * k1)
            k3 = func(time + h / 2, y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + func(time + h, y + h * k3))
        states.append(y)
    return torch.stack(states)


def relative(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    assert found.shape == exact.shape
    return float((found.to(exact.dtype) - exact).norm() / exact.norm())


def weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=y.real.dtype).cos().view(y.shape)


def check(func: Any, wanted: list[Tensor], bound: float = 1e-6, t: Tensor | None = None, **arguments: Any) -> None:
    """Gradients with respect to y0 and ``wanted`` are those of plain autograd through a fine solve."""
    t = EVEN if t is None else t
    y0 = start()
    inputs = [y0, *wanted]
    exact = reference(func, y0, t)
    expected = torch.autograd.grad((exact * weights(exact)).sum(), inputs, retain_graph=True)
    y = odeint_adjoint(func, y0, t, **{**RK4, **arguments})
    assert relative(y.detach(), exact.detach()) < bound
    for ours, theirs in zip(torch.autograd.grad((y * weights(y)).sum(), inputs), expected, strict=True):
        assert relative(ours, theirs) < bound


EVEN = torch.linspace(0, 1, 5, dtype=F64)
UNEVEN = torch.tensor([1.3, 0.9, 0.41, 0.4, -0.2], dtype=F64)


def compare(func: Any, y0: Any, t: Tensor, time_gradient: bool = True, **arguments: Any) -> None:
    """Solution, gradients and numbers of evaluations are torchdiffeq's."""
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def solve(solver: Any) -> tuple[list[Tensor], list[int]]:
        net = copy.deepcopy(func)
        single = isinstance(y0, Tensor)
        leaves = [leaf.clone().requires_grad_() for leaf in ((y0,) if single else y0)]
        times = t.clone().requires_grad_(time_gradient)
        y = solver(net, leaves[0] if single else tuple(leaves), times, **arguments)
        counts = [net.evaluations]
        y = [y] if single else list(y)
        sum((leaf * weights(leaf)).sum() for leaf in y).backward()
        counts.append(net.evaluations)
        tensors = [*leaves, *([times] if time_gradient else []), *net.parameters()]
        gradients = [tensor.grad for tensor in tensors if tensor.requires_grad]
        return [*(leaf.detach() for leaf in y), *gradients], counts  # type: ignore[list-item]

    (ours, our_counts), (theirs, their_counts) = solve(odeint_adjoint), solve(torchdiffeq.odeint_adjoint)
    assert our_counts == their_counts
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= BOUND * max(1.0, float(expected.abs().max()))


class Pair(nn.Module):
    """A system of two tensors of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.unused = nn.Parameter(torch.ones(3, dtype=F64))
        self.evaluations = 0

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        position, velocity = y
        return self.a * velocity.sum(-1) * torch.cos(t), -position[:, None] * torch.ones_like(velocity) / (2 + t)


PAIR = (torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([[0.5, 2.0, 1.0], [0.0, 1.0, 3.0]], dtype=F64))


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


class TestAdaptive:
    @pytest.mark.parametrize("method", [None, "dopri5"])
    @pytest.mark.parametrize("t", [EVEN, UNEVEN], ids=["even", "reverse"])
    def test_as_torchdiffeq(self, method: str | None, t: Tensor) -> None:
        compare(Net(), start().detach(), t, method=method, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("method", ["dopri8", "tsit5", "fehlberg2", "adaptive_heun"])
    def test_methods(self, method: str) -> None:
        # local errors of 1e-6 add up over some hundred steps of the methods of low order
        net = Net()
        check(net, net.wanted, bound=1e-3, method=method, options=None, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"adjoint_options": {"norm": "seminorm"}},
            pytest.param(
                {"adjoint_options": {"norm": lambda pieces: max(piece.abs().max() for piece in pieces[:3])}},
                marks=pytest.mark.filterwarnings("ignore:An adjoint parameter"),
            ),
            {"options": {"norm": lambda y: y.abs().max()}},
            {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-4},
            {"options": {"first_step": 0.01, "max_step": 0.1}},
            {"options": {"jump_t": torch.tensor([0.3], dtype=F64)}},
        ],
        ids=["seminorm", "own norm", "forward norm", "adjoint", "steps", "jump"],
    )
    def test_options(self, arguments: dict[str, Any]) -> None:
        compare(Net(), start().detach(), EVEN, **{"rtol": 1e-6, "atol": 1e-7, **arguments})

    def test_forward_solve_with_steps_for_each_sample(self) -> None:
        """The adjoint solve does not inherit them: its state is no batch."""
        net = Net()
        check(
            net,
            net.wanted,
            bound=1e-5,
            method="dopri5",
            options={"batch_axis": 0, "batch_tile": 2},
            rtol=1e-7,
            atol=1e-8,
        )

    @pytest.mark.parametrize("norm", [None, "seminorm"])
    def test_tuple(self, norm: str | None) -> None:
        options = {} if norm is None else {"norm": norm}
        compare(Pair(), PAIR, UNEVEN, adjoint_options=options, rtol=1e-6, atol=1e-7)
        compare(Pair(), PAIR, EVEN, rtol=(1e-6, 1e-7), adjoint_rtol=1e-5, atol=1e-7)

    def test_seminorm_saves_evaluations(self) -> None:
        def evaluations(options: dict[str, Any]) -> int:
            net = Net()
            y = odeint_adjoint(net, start(), EVEN, adjoint_options=options)
            net.evaluations = 0
            y.sum().backward()
            return net.evaluations

        assert evaluations({"norm": "seminorm"}) < evaluations({})

    def test_tolerances_decide_the_error(self) -> None:
        exact, y0 = Net(), start()
        expected = torch.autograd.grad(reference(exact, y0, EVEN, 128).sum(), exact.w)[0]
        for tolerance in (1e-4, 1e-7, 1e-10):
            net = Net()
            odeint_adjoint(net, start(), EVEN, rtol=tolerance, atol=tolerance).sum().backward()
            assert relative(net.w.grad, expected) < max(100 * tolerance, 1e-9)

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.filterwarnings("ignore:.*cannot be reached")
    def test_16_bits_do_not_shrink_the_steps(self, dtype: torch.dtype) -> None:
        """f returns 32 bits that were computed in 16: the step control must know it in the adjoint solve too."""

        class Widened(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y).float()

        net, y0 = Widened(torch.float32), start(torch.float32)
        with torch.autocast("cpu", dtype):
            y = odeint_adjoint(net, y0, EVEN, rtol=1e-6, atol=1e-6)
        net.evaluations = 0
        (y * weights(y)).sum().backward()
        assert net.evaluations < 1000
        exact, exact_y0 = Net(), start()
        expected = reference(exact, exact_y0, EVEN)
        (expected * weights(expected)).sum().backward()
        for ours, theirs in zip([y0, *net.wanted], [exact_y0, *exact.wanted], strict=True):
            # the steps are as long as the rounding lets the control see: their error is of its size
            assert relative(ours.grad, theirs.grad) < 16 * torch.finfo(dtype).eps

    def test_overflow_lowers_the_scale(self) -> None:
        a = torch.tensor(1.0, dtype=torch.float16, requires_grad=True)
        scaler, y0 = DynamicScaler(), torch.ones(4096, 1, dtype=torch.float16, requires_grad=True)
        arguments: dict[str, Any] = {"adjoint_params": [a], "loss_scaler": scaler, "rtol": 1e-2, "atol": 1e-2}
        odeint_adjoint(lambda t, y: -a * y, y0, EVEN, **arguments)[-1].sum().mul(1 / 4096).backward()
        assert scaler.headroom < 1
        assert abs(float(a.grad) + torch.tensor(-1.0).exp()) < 1e-2

    @pytest.mark.parametrize("method", ["trapezoid", "implicit_midpoint", "gl6"])
    def test_implicit(self, method: str) -> None:
        """Newton's method differentiates the augmented system: a second derivative of f."""
        bound = 1e-6 if method == "gl6" else 4e-3
        steps = {"method": method, "options": {"step_size": 2.0**-5}}
        net = Net()
        check(net, net.wanted, bound=bound, rtol=1e-9, atol=1e-9, **steps)


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


class TestCaptures:
    def test_closure_of_a_module(self) -> None:
        outside = torch.randn(4, dtype=F64, requires_grad=True)
        box = [[[[[[outside]]]]]]  # deeper than objects are searched: seen in the graph only

        class Closure(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) * box[0][0][0][0][0][0]

        net = Closure()
        check(net, [outside, *net.wanted])

    def test_result_of_a_computation_outside(self) -> None:
        encoder = nn.Linear(4, 4).double()

        class Conditional(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) + self.context

        net = Conditional()
        net.context = encoder(torch.randn(3, 4, dtype=F64))
        check(net, [net.context, encoder.weight, *net.wanted])

    @pytest.mark.parametrize("both", [False, True])
    def test_result_of_a_computation_from_a_parameter(self, both: bool) -> None:
        """Whether or not f uses the parameter besides, no path is counted twice."""

        class Hyper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p = nn.Parameter(torch.randn(4, dtype=F64))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return torch.tanh(y * self.scale) + (self.p if both else 0.0)

        net = Hyper()
        net.scale = net.p.exp()
        check(net, [net.p])

    def test_a_stale_result_in_a_module(self) -> None:
        class Recording(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                self.last = super().forward(t, y)
                return self.last

        net = Recording()
        net.last = net.w.square().sum()
        check(net, [*net.wanted])
        assert net.last.requires_grad

    def test_used_late(self) -> None:
        class Late(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) if t < 0.5 else super().forward(t, y) * self.late

        net = Late()
        net.late = torch.randn(4, dtype=F64, requires_grad=True)
        # the jump costs an error of the order of a step
        check(net, [net.late, *net.wanted], bound=3e-2)

    def test_used_late_and_nowhere_to_be_found(self) -> None:
        late = torch.randn(4, dtype=F64, requires_grad=True)
        box = [[[[[[late]]]]]]

        class Late(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) if t < 0.5 else super().forward(t, y) * box[0][0][0][0][0][0]

        y = odeint_adjoint(Late(), start(), EVEN, **RK4)
        with pytest.raises(RuntimeError, match=r"tensor of shape \[4\] that requires a gradient at t = 1"):
            y.sum().backward()

    def test_y0_is_captured(self) -> None:
        class Relaxing(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) - (y - self.y0)

        net, t, y0 = Relaxing(), EVEN, start()
        net.y0 = y0
        exact = torch.autograd.grad(reference(net, y0, t).square().sum(), y0)[0]
        found = torch.autograd.grad(odeint_adjoint(net, y0, t, **RK4).square().sum(), y0)[0]
        assert relative(found, exact) < 1e-6

    def test_given_parameters_only(self) -> None:
        net = Net()
        y = odeint_adjoint(net, start(), EVEN, adjoint_params=(p for p in [net.w, net.frozen, net.w]), **RK4)
        y.sum().backward()
        assert net.v.grad is None
        exact = Net()
        reference(exact, start(), EVEN).sum().backward()
        assert relative(net.w.grad, exact.w.grad) < 1e-6

    def test_given_parameters_behind_a_computation(self) -> None:
        w = torch.randn(4, 4, dtype=F64, requires_grad=True)
        computed = w.exp() / 8
        check(lambda t, y: torch.tanh(y @ computed), [w], adjoint_params=[w])
        check(lambda t, y: torch.tanh(y @ computed), [w], adjoint_params=[computed])

    def test_replica(self) -> None:
        """torch.nn.DataParallel: a replica has plain tensors as attributes, and no parameters."""
        net, expected = Net(), Net()
        replica = copy.copy(net)
        replica._parameters = {}
        replica._is_replica = True
        for name, parameter in net.named_parameters():
            object.__setattr__(replica, name, parameter * 1)
        assert not list(replica.parameters())
        odeint_adjoint(replica, start(), EVEN, **RK4).sum().backward()
        odeint_adjoint(expected, start(), EVEN, **RK4).sum().backward()
        for ours, theirs in zip(net.wanted, expected.wanted, strict=True):
            assert relative(ours.grad, theirs.grad) < BOUND

    def test_nothing_is_evaluated_for_it(self) -> None:
        net = Net()
        odeint_adjoint(net, start(), EVEN, method="rk4")
        assert net.evaluations == 16


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


class TestPrecision:
    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_autocast(self, dtype: torch.dtype) -> None:
        """f runs under the caller's autocast on both roads; everything else is float32 and as accurate as odeint."""
        net, y0 = Net(torch.float32), start(torch.float32)
        with torch.autocast("cpu", dtype):
            y = odeint_adjoint(net, y0, EVEN, **RK4)
        assert y.dtype == torch.float32
        (y * weights(y)).sum().backward()
        assert net.seen == {(torch.float32, dtype, dtype)}
        exact, exact_y0 = Net(), start()
        expected = reference(exact, exact_y0, EVEN)
        (expected * weights(expected)).sum().backward()
        assert net.w.grad.dtype == torch.float32
        for ours, theirs in zip([y0, *net.wanted], [exact_y0, *exact.wanted], strict=True):
            assert relative(ours.grad, theirs.grad) < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_autocast_is_the_one_of_the_forward_call(self, dtype: torch.dtype) -> None:
        net = Net(torch.float32)
        y = odeint_adjoint(net, start(torch.float32), EVEN, **RK4)
        with torch.autocast("cpu", dtype):
            y.sum().backward()
        assert net.seen == {(torch.float32,) * 3}

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_casts_are_not_left_behind(self, dtype: torch.dtype) -> None:
        net = Net(torch.float32)
        with torch.autocast("cpu", dtype):
            y = odeint_adjoint(net, start(torch.float32), EVEN, **RK4)
            y.sum().backward()
            net.zero_grad()
            net(EVEN[0], start(torch.float32)).sum().backward()
        assert net.w.grad is not None

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.parametrize("steps", [8, 512])
    def test_pure_16_bit_model(self, dtype: torch.dtype, steps: int) -> None:
        """Errors do not grow with the number of steps: sums are in 32 bits."""
        net, y0 = Net(dtype), start(dtype)
        t = torch.linspace(0, 1, 3, dtype=F64)
        options = {"method": "rk4", "options": {"step_size": 2 / steps}}
        y = odeint_adjoint(net, y0, t, **options)
        assert y.dtype == dtype
        y[-1].sum().backward()
        # the numbers that the 16-bit tensors are, in float64
        exact, exact_y0 = Net(dtype).double(), start(dtype).detach().double().requires_grad_()
        reference(exact, exact_y0, t)[-1].sum().backward()
        assert net.seen == {(dtype,) * 3}
        for ours, theirs in zip([y0, *net.wanted], [exact_y0, *exact.wanted], strict=True):
            assert ours.grad.dtype == dtype
            assert relative(ours.grad.double(), theirs.grad) < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("factor", [1e-9, 1e6])
    def test_small_and_large_gradients_are_not_lost(self, factor: float) -> None:
        net, y0 = Net(torch.float32), start(torch.float32)

        def gradients(scale: float) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.float16):
                y = odeint_adjoint(net, y0, EVEN, **RK4)
            return torch.autograd.grad(scale * y[-1].sum(), [y0, *net.wanted])

        pairs = zip(gradients(factor), gradients(1.0), strict=True)
        assert all(relative(scaled / factor, one) < 8 * torch.finfo(torch.float16).eps for scaled, one in pairs)

    def test_without_scaling_they_are(self) -> None:
        net, y0 = Net(torch.float32), start(torch.float32)
        with torch.autocast("cpu", torch.float16):
            y = odeint_adjoint(net, y0, EVEN, loss_scaler=False, **RK4)
        found = torch.autograd.grad(1e-9 * y[-1].sum(), [net.w])
        assert torch.equal(found[0], torch.zeros_like(net.w))

    def test_velocity_dtype(self) -> None:
        net, y0 = Net(torch.float16), start(torch.float32)
        odeint_adjoint(net, y0, EVEN, velocity_dtype=torch.float16, **RK4).sum().backward()
        assert {dtypes[1] for dtypes in net.seen} == {torch.float16}
        assert y0.grad.dtype == torch.float32

    def test_overflow_lowers_the_scale(self) -> None:
        """A product that overflows float16 at the first scale: the interval is solved again with a smaller one."""

        class Steep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Parameter(torch.tensor(1.0, dtype=torch.float16))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                # the gradient of a sums 4096 times up to 1024 / sqrt(1)
                return -self.a * y

        net, scaler = Steep(), DynamicScaler()
        y0 = torch.ones(4096, 1, dtype=torch.float16, requires_grad=True)
        odeint_adjoint(net, y0, EVEN, loss_scaler=scaler, **RK4)[-1].sum().mul(1 / 4096).backward()
        kinds = [kind for kind, _ in scaler.scale_history]
        assert "overflow" in kinds
        assert "init" in kinds
        assert scaler.headroom < 1
        assert scaler.S is not None
        expected = -torch.tensor(-1.0).exp()
        assert abs(float(net.a.grad) - expected) < 8 * torch.finfo(torch.float16).eps

    @pytest.mark.parametrize("given", [True, False])
    def test_no_scale_helps(self, given: bool) -> None:
        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor) -> Tensor:
                return -y

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return grads[0] * torch.nan

        y0 = torch.ones(3, dtype=torch.float16, requires_grad=True)
        scaler = DynamicScaler(max_attempts=3) if given else None
        y = odeint_adjoint(lambda t, y: Broken.apply(y), y0, EVEN, adjoint_params=(), loss_scaler=scaler, **RK4)
        if given:
            with pytest.raises(RuntimeError, match="maximum number of 3 attempts"):
                y.sum().backward()
        else:
            with pytest.warns(RuntimeWarning, match="all gradients are set to inf"):
                y.sum().backward()
            assert torch.isinf(y0.grad).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_loss_that_is_not_finite(self, dtype: torch.dtype) -> None:
        net, y0 = Net(dtype), start(dtype)
        odeint_adjoint(net, y0, EVEN, **RK4).sum().mul(torch.inf).backward()
        assert all(not torch.isfinite(tensor.grad).any() for tensor in [y0, *net.wanted])

    def test_grad_scaler_of_the_caller(self) -> None:
        """One gradient that is not finite makes all so: torch.amp.GradScaler must skip the step."""
        net, y0 = Net(torch.float16), start(torch.float16)
        gradient = torch.zeros(5, 3, 4, dtype=torch.float16)
        gradient[-1, 0, 0] = 60000
        with torch.no_grad():
            net.w.mul_(16)
            net.v.mul_(16)
        y = odeint_adjoint(net, y0, EVEN, loss_scaler=object(), **RK4)
        y.backward(gradient)
        assert all(torch.isinf(tensor.grad).all() for tensor in [y0, net.w, net.v, net.b, net.unused])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_compensated(self, dtype: torch.dtype) -> None:
        net = Net(dtype)
        y = odeint_adjoint(net, start(dtype), EVEN, compensated=True, **RK4)
        y.sum().backward()
        assert relative(y.detach(), odeint(net, start(dtype), EVEN, compensated=True, **RK4).detach()) == 0


class TestNorms:
    PARAMS = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))

    @staticmethod
    def rms(tensor: Tensor) -> Tensor:
        return tensor.square().mean().sqrt()

    @pytest.mark.parametrize("norm", [None, "seminorm"])
    def test_of_a_tensor(self, norm: Any) -> None:
        options = {} if norm is None else {"norm": norm}
        y = odeint_adjoint(
            lambda t, y: y, torch.ones(2, 2), EVEN, adjoint_params=self.PARAMS, adjoint_options=options, **RK4
        )
        found = y.grad_fn.adjoint_options["norm"]
        for largest in range(5):
            pieces = [torch.rand(()), torch.rand(2, 2), torch.rand(2, 2), torch.rand(7), torch.rand(())]
            pieces[largest] = pieces[largest] + 10
            counted = pieces if norm is None else pieces[:3]
            expected = max(self.rms(piece) for piece in counted)
            assert torch.allclose(found(tuple(pieces)), expected)

    def test_of_a_tuple(self) -> None:
        y0 = torch.tensor(1.0), torch.ones(2, 2)
        y = odeint_adjoint(lambda t, y: y, y0, EVEN, adjoint_params=self.PARAMS, **RK4)
        # a piece, a slice of all, all: the norm is read where torchdiffeq's users read it
        found = y[0].grad_fn.next_functions[0][0].next_functions[0][0].adjoint_options["norm"]
        pieces = (torch.rand(()), torch.rand(5), torch.rand(5), *self.PARAMS)
        tensors = [pieces[0], pieces[1][0], pieces[1][1:], pieces[2][0], pieces[2][1:], *self.PARAMS]
        assert torch.allclose(found(pieces), max(self.rms(tensor) for tensor in tensors))

    def test_of_the_forward_solve(self) -> None:
        y = odeint_adjoint(
            lambda t, y: y,
            torch.ones(3, requires_grad=True),
            EVEN,
            adjoint_params=(),
            method="rk4",
            options={"norm": lambda y: y.abs().max()},
        )
        found = y.grad_fn.adjoint_options["norm"]
        pieces = (torch.tensor(0.1), torch.tensor([0.0, 3.0, -5.0]), torch.zeros(3))
        assert float(found(pieces)) == 5.0

    def test_own_of_a_tuple(self) -> None:
        seen: list[list[tuple[int, ...]]] = []

        def norm(pieces: tuple[Tensor, ...]) -> Tensor:
            assert isinstance(pieces, tuple)
            seen.append([tuple(piece.shape) for piece in pieces])
            return pieces[0].abs()

        y0 = torch.tensor(1.0), torch.ones(2, 2)
        options: dict[str, Any] = {"norm": norm}
        y = odeint_adjoint(lambda t, y: y, y0, EVEN, adjoint_params=self.PARAMS, adjoint_options=options, **RK4)
        function = y[0].grad_fn.next_functions[0][0].next_functions[0][0]
        function.adjoint_options["norm"]((torch.rand(()), torch.rand(5), torch.rand(5), *self.PARAMS))
        assert seen == [[(), (), (2, 2), (), (2, 2), (7,), ()]]
        assert options == {"norm": norm}

    def test_frozen_parameter_is_not_passed(self) -> None:
        with pytest.warns(UserWarning, match="does not require a gradient"):
            odeint_adjoint(Net(), start(), EVEN, adjoint_options={"norm": torch.norm}, **RK4)


class TestArguments:
    def test_function_without_parameters(self) -> None:
        with pytest.raises(ValueError, match="func is a function and adjoint_params is None"):
            odeint_adjoint(lambda t, y: y, start(), EVEN, **RK4)

    def test_options_of_another_method(self) -> None:
        with pytest.raises(ValueError, match="adjoint_method is 'euler' and method is 'rk4'"):
            odeint_adjoint(Net(), start(), EVEN, adjoint_method="euler", **RK4)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"adjoint_params": [1.0]}, TypeError, r"adjoint_params\[0\] is a float"),
            ({"adjoint_params": torch.ones(3)}, TypeError, "adjoint_params is a Tensor"),
            ({"adjoint_params": 3}, TypeError, "adjoint_params is a int"),
            ({"adjoint_options": 3}, TypeError, "adjoint_options is a int, expected a dict"),
            ({"options": [1]}, TypeError, "options is a list, expected a dict"),
            ({"adjoint_options": {"norm": "seminrom"}}, TypeError, "'seminrom', expected a callable or \"seminorm\""),
            ({"loss_scaler": True}, TypeError, "loss_scaler is True"),
            ({"velocity_dtype": torch.int8}, ValueError, "velocity_dtype is torch.int8"),
            ({"y0": 1.0}, TypeError, "y0 is a float"),
            ({"adjoint_method": "foo", "adjoint_options": {}}, ValueError, "foo"),
            ({"adjoint_rtol": -1.0}, ValueError, "rtol is -1.0"),
            ({"adjoint_atol": [1.0, 2.0]}, ValueError, r"atol has shape \[2\]"),
        ],
        ids=str,
    )
    def test_wrong(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        given = {"func": Net(), "y0": start(), "t": EVEN, **RK4, **arguments}
        with pytest.raises(error, match=message):
            odeint_adjoint(given.pop("func"), given.pop("y0"), given.pop("t"), **given)

    def test_options_are_not_changed(self) -> None:
        options, adjoint_options = {"step_size": 0.1, "norm": torch.norm}, {"step_size": 0.2}
        y = odeint_adjoint(Net(), start(), EVEN, method="rk4", options=options, adjoint_options=adjoint_options)
        y.sum().backward()
        assert options == {"step_size": 0.1, "norm": torch.norm}
        assert adjoint_options == {"step_size": 0.2}

    @pytest.mark.parametrize(
        "tolerances",
        [
            {"rtol": torch.tensor(1e-3), "atol": [1e-3]},
            {"rtol": iter([1e-3, 1e-4, 1e-5, 1e-6]), "atol": torch.full((3, 4), 1e-3)},
            {"adjoint_rtol": [1e-3] * 7, "adjoint_atol": torch.tensor([1e-3])},
        ],
        ids=["one", "by element", "by piece"],
    )
    def test_tolerances_of_a_tensor(self, tolerances: dict[str, Any]) -> None:
        odeint_adjoint(Net(), start(), EVEN, **RK4, **tolerances).sum().backward()

    def test_tolerances_of_a_tuple(self) -> None:
        tolerances = {"rtol": iter([1e-3, 1e-4]), "atol": (1e-3, torch.tensor(1e-4))}
        odeint_adjoint(Pair(), PAIR, EVEN, **RK4, **tolerances)[0].sum().backward()


def test_tolerance_of_the_augmented_state() -> None:
    parameters = [torch.zeros(2), torch.zeros(1, dtype=torch.complex64)]
    spec = StateSpec((torch.zeros(2), torch.zeros(3, dtype=torch.complex64)))

    def read(forward: Any, given: Any) -> list[Any]:
        return augmented_tolerance("rtol", forward, given, spec, parameters)

    assert read(1e-3, None) == [1e-3] * 6
    assert read([1e-3, 1e-4], None) == [1e-4, 1e-3, 1e-4, 1e-3, 1e-4, 1e-4]
    assert read([1e-3, 1e-4], 1e-5) == [1e-5] * 6
    *head, vector = read(1e-3, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert head == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert torch.equal(vector, torch.tensor([4.0, 4.0, 5.0, 5.0]))
    by_element = augmented_tolerance("rtol", [1e-3, torch.tensor([1.0, 2.0, 3.0])], None, spec, ())
    assert len(by_element) == 5
    assert by_element[2].shape == (3, 1)
    with pytest.raises(ValueError, match="atol is -1"):
        augmented_tolerance("atol", 1e-3, -1, spec, ())


class TestAutograd:
    def test_second_derivative_is_an_error(self) -> None:
        net, y0 = Net(), start()
        y = odeint_adjoint(net, y0, EVEN, **RK4)
        first = torch.autograd.grad(y.sum(), y0, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"Use rampde\.odeint"):
            (y.sum() + first.sum()).backward()
        # whoever only asks for the graph has the gradients as ever
        plain = torch.autograd.grad(odeint_adjoint(net, y0, EVEN, **RK4).sum(), y0)[0]
        assert torch.equal(first.detach(), plain)

    def test_twice_with_retained_graph(self) -> None:
        net, y0 = Net(), start()
        y = odeint_adjoint(net, y0, EVEN, **RK4)
        first = torch.autograd.grad(y.sum(), [y0, *net.wanted], retain_graph=True)
        second = torch.autograd.grad(y.sum(), [y0, *net.wanted])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()

    def test_hooks_see_the_whole_gradient_once(self) -> None:
        net, seen = Net(), []
        net.w.register_hook(lambda gradient: seen.append(gradient.clone()))
        odeint_adjoint(net, start(), EVEN, **RK4).sum().backward()
        assert len(seen) == 1
        assert torch.equal(seen[0], net.w.grad)

    def test_incoming_gradient_is_not_changed(self) -> None:
        y = odeint_adjoint(Net(), start(), EVEN, **RK4)
        gradient = torch.rand(y.shape, dtype=F64)
        before = gradient.clone()
        y.backward(gradient)
        assert torch.equal(gradient, before)

    @pytest.mark.parametrize("index", [0, 1, 4])
    def test_loss_on_one_point(self, index: int) -> None:
        net, y0 = Net(), start()
        exact = torch.autograd.grad(reference(net, y0, EVEN)[index].sum(), y0)[0]
        found = torch.autograd.grad(odeint_adjoint(net, y0, EVEN, **RK4)[index].sum(), y0)[0]
        assert relative(found, exact) < 1e-6

    @pytest.mark.parametrize("what", ["result", "parameter"])
    def test_change_in_place_is_seen(self, what: str) -> None:
        net = Net()
        y = odeint_adjoint(net, start(), EVEN, **RK4)
        loss = y.sum()
        with torch.no_grad():
            (y if what == "result" else net.w).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_only_the_outputs_are_kept(self) -> None:
        def kept(steps: int) -> int:
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
                odeint_adjoint(Net(), start(), EVEN, method="rk4", options={"step_size": 1 / steps})
            return sum(sizes)

        assert kept(3) == kept(300)

    def test_result_does_not_share_memory_with_y0(self) -> None:
        y0 = start()
        y = odeint_adjoint(Net(), y0, EVEN[:1], **RK4)
        before = y0.detach().clone()
        y.detach().zero_()
        assert torch.equal(y0, before)

    def test_gradients_do_not_share_memory(self) -> None:
        net = Net()
        odeint_adjoint(net, start(), EVEN, **RK4).sum().backward()
        for parameter in net.wanted:
            assert parameter.grad.untyped_storage().nbytes() == 8 * parameter.numel()

    def test_same_bits_on_every_run(self) -> None:
        def gradients() -> list[Tensor]:
            net, y0 = Net(torch.float32), start(torch.float32)
            odeint_adjoint(net, y0, EVEN, **RK4).square().sum().backward()
            return [y0.grad, *(parameter.grad for parameter in net.wanted)]

        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))

    def test_two_threads_with_one_module(self) -> None:
        net, results = Net(), {}

        def solve(name: int) -> None:
            y0 = (start().detach() * name).requires_grad_()
            results[name] = torch.autograd.grad(odeint_adjoint(net, y0, EVEN, **RK4).sum(), [y0, net.w])

        threads = [threading.Thread(target=solve, args=(name,)) for name in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in (1, 2):
            found = results[name]
            solve(name)
            assert all(torch.equal(a, b) for a, b in zip(found, results[name], strict=True))


class Fault(Exception):
    pass


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("fuse", [1, 5, 13, 20])
def test_exception_leaves_everything_as_it_was(fuse: int, autocast: torch.dtype | None) -> None:
    class Failing(Net):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            k = super().forward(t, y)
            if self.evaluations == fuse:
                raise Fault
            return k

    net, y0 = Failing(torch.float32), start(torch.float32)
    hook = net.w.register_hook(lambda gradient: gradient)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    hooks = dict(net.w._backward_hooks)

    def state() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
            torch._C._len_torch_function_stack(),
            torch.get_rng_state().tolist(),
        )

    state_before = state()
    with pytest.raises(Fault), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        odeint_adjoint(net, y0, EVEN, method="rk4").sum().backward()
    assert state() == state_before
    assert dict(net.w._backward_hooks) == hooks
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    # the next solve is as on a fresh module
    net.evaluations = 100
    odeint_adjoint(net, y0, EVEN, method="rk4").sum().backward()
    fresh = Net(torch.float32)
    odeint_adjoint(fresh, start(torch.float32), EVEN, method="rk4").sum().backward()
    assert torch.equal(net.w.grad, fresh.w.grad)


@pytest.mark.parametrize("given", [False, True])
def test_compiled_module(given: bool) -> None:
    net, expected, y0 = Net(torch.float32), Net(torch.float32), start(torch.float32)
    arguments = {"adjoint_params": tuple(net.parameters())} if given else {}
    odeint_adjoint(torch.compile(net, backend="aot_eager"), y0, EVEN, **RK4, **arguments).sum().backward()
    odeint_adjoint(expected, start(torch.float32), EVEN, **RK4).sum().backward()
    for ours, theirs in zip(net.wanted, expected.wanted, strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_module_compiled_by_inductor(given: bool) -> None:
    """Compiled code gives the memory of its graph away and refuses retain_graph=True."""
    net, y0 = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), start(torch.float32)

    class Field(nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            k: Tensor = self.net(y)
            return k

    found, expected = (
        torch.autograd.grad(
            odeint_adjoint(
                field, y0, EVEN, **RK4, **({"adjoint_params": tuple(net.parameters())} if given else {})
            ).sum(),
            [y0, *net.parameters()],
        )
        for field in (Field(torch.compile(net)), Field(net))
    )
    assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("event", [False, True])
def test_nothing_is_kept_alive(event: bool) -> None:
    """No cycle of references: what a solve held is freed at once, not when the garbage collector runs."""
    net = Net()
    net.callback_step_adjoint = lambda t, y, dt: None
    alive = weakref.ref(net)
    gc.collect()
    gc.disable()
    try:
        result = odeint_adjoint(net, start(), EVEN[[0, -1]], event_fn=(lambda t, y: t - 0.5) if event else None)
        (result[1] if event else result).sum().backward()
        del result, net
        assert alive() is None
    finally:
        gc.enable()
