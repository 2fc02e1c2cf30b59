"""Solves inside of functions that ``torch.compile`` compiles into one graph."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._pytree import tree_leaves

import rampde
from rampde import ButcherTableau, odeint

F64 = torch.float64
# of values of order one after a few dozen float64 operations in another order
BOUND = 1e-12
STEPS = torch.linspace(0, 1, 4, dtype=F64)
THIRD_ORDER = ButcherTableau([[], [0.5], [-1.0, 2.0]], [1 / 6, 2 / 3, 1 / 6])


class Net(nn.Module):
    """A small network that depends on time."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, size, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y) * torch.cos(t)


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    torch.compiler.reset()


def leaves_of(states: Any) -> list[Tensor]:
    """Real tensors of a nesting of tensors."""
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tree_leaves(states)]


def whole(func: Any, backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    """A solve in one graph."""

    def solve(y0: Any, t: Tensor) -> Any:
        return odeint(func, y0, t, **options)

    return torch.compile(solve, fullgraph=True, backend=backend)


def results(solve: Callable[..., Any], y0: Any, t: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The states that ``solve`` returns, and gradients of a sum of them in which no two elements count alike."""
    states = leaves_of(solve(y0, t))
    loss = sum((leaf * torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view_as(leaf)).sum() for leaf in states)
    return [*(leaf.detach() for leaf in states), *leaves_of(torch.autograd.grad(loss, inputs))]


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float = BOUND) -> None:
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(theirs).all()
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max()))


def check(func: nn.Module, y0: Any, t: Tensor, backend: Any = "aot_eager", **options: Any) -> None:
    """States and gradients are those of the solve outside of the compiler."""
    inputs = [leaf for leaf in (*tree_leaves(y0), t, *func.parameters()) if leaf.requires_grad]
    expected = results(lambda y0, t: odeint(func, y0, t, **options), y0, t, inputs)
    assert_close(results(whole(func, backend, **options), y0, t, inputs), expected)


def state(batch: int = 3, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(batch, 5, dtype=dtype, requires_grad=True)


def uneven(func: object, y0: object, t: Tensor) -> Tensor:
    """A grid that holds the output times of ``STEPS`` in between."""
    return torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0], dtype=t.dtype)


class TestInOneGraph:
    METHODS = ("euler", "rk4", "rk4_classic", THIRD_ORDER)

    @pytest.mark.parametrize("method", METHODS, ids=[*METHODS[:3], "third order"])
    def test_methods(self, method):
        check(Net(F64), state(), STEPS, method=method)

    OPTIONS = (
        {"step_size": 0.3},
        {"step_size": 0.3, "interp": "cubic"},
        {"grid_constructor": uneven},
        {"perturb": True},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
    def test_options(self, options):
        check(Net(F64), state(), STEPS, method="midpoint", options=options)

    @pytest.mark.parametrize("options", [None, {"step_size": 0.4}], ids=str)
    def test_reverse_time(self, options):
        check(Net(F64), state(), STEPS.flip(0), method="midpoint", options=options)

    @pytest.mark.parametrize("interp", [None, "linear", "cubic"])
    def test_times_get_their_gradient(self, interp):
        options = None if interp is None else {"step_size": 0.3, "interp": interp}
        check(Net(F64), state(), STEPS.clone().requires_grad_(), method="midpoint", options=options)

    def test_one_time(self):
        y0 = state()
        assert torch.equal(whole(Net(F64), method="rk4")(y0, STEPS[:1]), y0[None])

    def test_empty_batch(self):
        net, y0 = Net(F64), state(0)
        states = whole(net, method="rk4")(y0, STEPS)
        assert states.shape == (4, 0, 5)
        gradients = torch.autograd.grad(states.sum(), [y0, *net.parameters()])
        assert not any(gradient.any() for gradient in gradients)

    def test_compensated_sums_have_the_bits_of_the_operators(self):
        """Steps that move the state by less than half a unit in its last place: plain sums stand still."""
        steps = 16

        class Slow(nn.Module):
            def forward(self, t, y):
                return torch.full_like(y, 0.4 * steps * 100 * 2.0**-24)

        y0, t = 100 + torch.rand(2, 5), torch.linspace(0, 1, steps + 1)
        options = {"method": "euler", "compensated": True}
        found, expected = whole(Slow(), **options)(y0, t)[-1], odeint(Slow(), y0, t, **options)[-1]
        plain, exact = odeint(Slow(), y0, t, method="euler")[-1], y0.double() + 0.4 * steps * 100 * 2.0**-24
        assert torch.equal(found, expected)
        assert torch.equal(plain, y0)
        assert (found - exact).abs().max() < (plain - exact).abs().max() / 4

    def test_compensated_gradients(self):
        check(Net(F64), state(), STEPS, method="rk4", compensated=True)

    def test_structures(self):
        class Rotation(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.rate = Net(F64), nn.Parameter(torch.tensor(0.7, dtype=F64))

            def forward(self, t, y):
                return {"x": self.net(t, y["x"]) * y["z"].real.mean(), "z": 1j * self.rate * y["z"] + y["x"].sum()}

        y0 = {"x": state(), "z": torch.randn(2, dtype=torch.complex128, requires_grad=True)}
        check(Rotation(), y0, STEPS, method="midpoint")

    def test_a_pair(self):
        class Coupled(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = Net(F64)

            def forward(self, t, y):
                return [self.net(t, y[1]), -y[0]]

        check(Coupled(), (state(), state()), STEPS, method="midpoint")

    def test_without_gradients(self):
        net, y0 = Net(F64), state()
        solve = whole(net, method="rk4")
        with torch.no_grad():
            states = solve(y0, STEPS)
            assert not states.requires_grad
            assert_close([states], [odeint(net, y0, STEPS, method="rk4")])

    def test_a_module_with_two_solves(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Net(F64), Net(F64)

            def forward(self, y):
                y = odeint(self.first, y, STEPS, method="rk4")[-1]
                return odeint(self.second, torch.relu(y), STEPS.flip(0), method="midpoint")

        model, y0 = Model(), state()
        inputs = [y0, *model.parameters()]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = results(lambda y0, t: model(y0), y0, STEPS, inputs)
        assert_close(results(lambda y0, t: compiled(y0), y0, STEPS, inputs), expected)

    def test_dropout_is_drawn_once(self):
        """In a graph, random numbers are kept or drawn again as the compiler decides: gradients fit the states."""

        class Dropped(nn.Module):
            def __init__(self):
                super().__init__()
                self.rate = nn.Parameter(torch.ones(5, dtype=F64))

            def forward(self, t, y):
                return self.rate * nn.functional.dropout(torch.ones_like(y), 0.5)

        func, y0 = Dropped(), state()
        for checkpoint in ("none", "step"):
            states = whole(func, method="euler", checkpoint=checkpoint)(y0, STEPS)
            # linear in the rate, whose part in the last state is what was drawn
            (gradient,) = torch.autograd.grad(states[-1].sum(), func.rate)
            torch.testing.assert_close(gradient, (states[-1] - y0).sum(0).detach())

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"checkpoint": "step"}, {"options": {"step_size": 0.3}}], ids=str)
    def test_inductor(self, options):
        check(Net(F64), state(), STEPS, "inductor", method="midpoint", **options)


class TestWhatIsKept:
    def evaluations(self, checkpoint: str) -> tuple[int, int]:
        """Linear layers of f in the graphs of the two roads."""
        counts = [0, 0]

        def counting(road):
            def compiler(graph, inputs):
                layers = [node for node in graph.graph.nodes if node.target is torch.ops.aten.addmm.default]
                counts[road] += len(layers)
                return graph.forward

            return compiler

        torch.compiler.reset()
        backend = aot_autograd(
            fw_compiler=counting(0), bw_compiler=counting(1), partition_fn=min_cut_rematerialization_partition
        )
        net, y0 = Net(F64), state()
        solve = whole(net, backend, method="rk4", checkpoint=checkpoint)
        torch.autograd.grad(solve(y0, STEPS).sum(), [y0, *net.parameters()])
        return counts[0], counts[1]

    LAYERS, STAGES, STEPS = 2, 4, 3

    @pytest.mark.parametrize("checkpoint", ["auto", "none"])
    def test_nothing_is_evaluated_again(self, checkpoint):
        assert self.evaluations(checkpoint) == (self.LAYERS * self.STAGES * self.STEPS, 0)

    def test_steps_are_evaluated_again(self):
        forward, backward = self.evaluations("step")
        every = self.LAYERS * self.STAGES * self.STEPS
        assert forward == every
        # but for the last layer of a step, whose result no product needs
        assert every - self.STEPS <= backward <= every

    def test_gradients_of_steps_evaluated_again(self):
        check(Net(F64), state(), STEPS, method="rk4", checkpoint="step")


class TestPrecision:
    """Gradients against those of the solve in float64, in 16 bits."""

    def gradients(self, solve, net, y0, t, **autocast):
        with torch.autocast("cpu", **autocast):
            states = solve(net, y0, t)
        return torch.cat([g.flatten() for g in torch.autograd.grad(states.sum(), list(net.parameters()))]).double()

    def errors(self, dtype, steps):
        net, y0, t = Net(size=4), torch.randn(32, 4), torch.linspace(0, 1, steps + 1)

        def solve(func, y0, t):
            return odeint(func, y0, t, method="euler", loss_scaler=False)

        off, on = {"enabled": False}, {"dtype": dtype}
        wide = copy.deepcopy(net).double()
        exact = self.gradients(solve, wide, y0.double(), t.double(), **off)
        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
        peer = torchdiffeq.odeint
        found = {
            "compiled": self.gradients(compiled, net, y0, t, **on),
            "eager": self.gradients(solve, net, y0, t, **on),
            "16-bit sums": self.gradients(lambda *a: peer(*a, method="euler"), net, y0, t, **on),
        }
        return {name: float((value - exact).norm() / exact.norm()) for name, value in found.items()}

    @pytest.mark.parametrize(("steps", "worse"), [(64, 2), pytest.param(256, 4, marks=pytest.mark.slow)])
    def test_parameters_gradients_are_summed_in_32_bits(self, steps, worse):
        errors = self.errors(torch.bfloat16, steps)
        assert errors["compiled"] <= 2 * errors["eager"]
        # what it would be otherwise: a sum of products in 16 bits, which stands still when it is large
        assert errors["16-bit sums"] > worse * errors["compiled"]

    @pytest.mark.slow
    def test_float16(self):
        errors = self.errors(torch.float16, 64)
        assert errors["compiled"] <= 2 * errors["eager"]

    @pytest.mark.parametrize("inside", [False, True])
    def test_autocast_outside_and_inside(self, inside):
        net, y0, t = Net(), torch.randn(8, 5), torch.linspace(0, 1, 5)
        seen = []

        def solve(y0):
            with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
                return odeint(net, y0, t, method="rk4")

        def counting(graph, inputs):
            seen.extend(
                node.meta["val"].dtype
                for node in graph.graph.nodes
                if node.target in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            )
            return graph.forward

        compiled = torch.compile(solve, fullgraph=True, backend=aot_autograd(fw_compiler=counting))
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            found = compiled(y0)
            with torch.autocast("cpu", torch.bfloat16):
                expected = odeint(net, y0, t, method="rk4")
        assert set(seen) == {torch.bfloat16}
        assert found.dtype == torch.float32
        exact = odeint(net.double(), y0.double(), t.double(), method="rk4")
        assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()

    def test_the_state_is_summed_in_32_bits(self):
        """A state in bfloat16 that moves by less than its own roundoff in each step."""
        net = Net(torch.bfloat16)
        with torch.no_grad():
            net.layers[2].weight.zero_()
            net.layers[2].bias.fill_(0.5)
        y0, t = torch.full((2, 5), 8.0, dtype=torch.bfloat16), torch.linspace(0, 1, 33)
        found = whole(net, method="euler")(y0, t)[-1]
        exact = odeint(net.double(), y0.double(), t.double(), method="euler")[-1]
        assert found.dtype == torch.bfloat16
        # half a unit in the last place, and what the velocity is rounded by
        assert (found - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * (8 / 2 + 1)
        assert found.min() > 8


class TestAgain:
    """One compilation serves many calls."""

    def test_other_states_and_parameters(self):
        net = Net(F64)
        counter = CompileCounterWithBackend("aot_eager")
        solve = whole(net, counter, method="midpoint")
        for _ in range(3):
            y0 = state()
            inputs = [y0, *net.parameters()]
            expected = results(lambda y0, t: odeint(net, y0, t, method="midpoint"), y0, STEPS, inputs)
            assert_close(results(solve, y0, STEPS, inputs), expected)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.normal_()
        assert counter.frame_count == 1

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_other_batches(self, dynamic):
        net = Net(F64)

        def solve(y0, t):
            return odeint(net, y0, t, method="midpoint")

        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        # one shape and then any, or any from the start
        shapes = 1 if dynamic else 2
        for call, batch in enumerate((3, 8, 5, 21)):
            y0 = state(batch)
            inputs = [y0, *net.parameters()]
            with torch._dynamo.config.patch(error_on_recompile=call >= shapes):
                found = results(compiled, y0, STEPS, inputs)
            assert_close(found, results(solve, y0, STEPS, inputs))

    def test_a_batch_marked_dynamic(self):
        net = Net(F64)
        counter = CompileCounterWithBackend("aot_eager")
        solve = whole(net, counter, method="midpoint")
        for batch in (4, 9):
            y0 = torch.randn(batch, 5, dtype=F64)
            torch._dynamo.mark_dynamic(y0, 0)
            assert_close([solve(y0, STEPS).detach()], [odeint(net, y0, STEPS, method="midpoint").detach()])
        assert counter.frame_count == 1

    def test_other_times_on_a_grid_that_holds_every_step(self):
        net, y0 = Net(F64), state()
        counter = CompileCounterWithBackend("aot_eager")
        solve = whole(net, counter, method="midpoint")
        for t in (STEPS, STEPS**2, 3 - STEPS):
            assert_close([solve(y0, t).detach()], [odeint(net, y0, t, method="midpoint").detach()])
        assert counter.frame_count == 1

    @pytest.mark.parametrize("options", [{"step_size": 0.3}, {"grid_constructor": uneven}], ids=" ".join)
    def test_other_times_where_the_number_of_steps_follows_from_them(self, options):
        solve, y0 = whole(Net(F64), method="midpoint", options=options), state()
        solve(y0, STEPS)
        # equal numbers in another tensor
        solve(y0, STEPS.clone())
        with pytest.raises(RuntimeError, match="expected the same t, or a t that holds every step"):
            solve(y0, 2 * STEPS)


class TestErrors:
    BAD = (
        ({"options": {"step_size": -1.0}}, "step_size is -1.0, expected"),
        ({"options": {"step_size": 0.5, "interp": "spline"}}, "Unknown interpolation method"),
        ({"t": STEPS.long()}, "t has dtype torch.int64, expected a floating point dtype"),
        ({"y0": torch.ones(3, dtype=torch.long)}, "y0 has dtype torch.int64, expected a floating point"),
        ({"func": lambda t, y: y[:1]}, r"func returned shape \[1, 5\], expected that of y0, \[3, 5\]"),
    )

    @pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
    def test_bad_arguments(self, arguments, message):
        arguments = {"func": Net(F64), "y0": state(), "t": STEPS, "method": "rk4", **arguments}
        with pytest.raises((TypeError, ValueError)):
            odeint(**arguments)
        compiled = torch.compile(lambda: odeint(**arguments), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=message):
            compiled()

    @pytest.mark.parametrize("method", ["dopri5", "radauIIA5", "explicit_adams"])
    def test_the_reason_why_a_solve_cannot_be_held(self, method):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True away, or use an explicit method"):
            whole(Net(F64), method=method)(state(), STEPS)


class Solver(nn.Module):
    """A network around a solve, as people write it."""

    def __init__(self, solve: Callable[..., Any]) -> None:
        super().__init__()
        self.before, self.net, self.solve = nn.Linear(5, 5, dtype=F64), Net(F64), solve

    def forward(self, y: Tensor) -> Any:
        return self.solve(self.net, self.before(y))


def by(method: str, **arguments: Any) -> Callable[..., Any]:
    return lambda net, y: odeint(net, y, STEPS, method=method, rtol=1e-6, atol=1e-6, **arguments)


def until_event(net: nn.Module, y: Tensor) -> Any:
    def event(t: Tensor, y: Tensor) -> Tensor:
        return t - 0.7 + 0.01 * y.mean()

    return rampde.odeint_event(net, y, STEPS[0], event_fn=event, method="dopri5", rtol=1e-6, atol=1e-6)


def dense(net: nn.Module, y: Tensor) -> Any:
    return rampde.odeint_dense(net, y, 0.0, 1.0, method="dopri5", rtol=1e-6, atol=1e-6)(STEPS)


OUTSIDE = {
    "dopri5": (by("dopri5"), True),
    "tsit5": (by("tsit5"), True),
    "implicit": (by("radauIIA5"), False),
    "implicit_adams": (by("implicit_adams"), False),
    "explicit_adams": (by("explicit_adams"), True),
    "scipy_solver": (lambda net, y: odeint(net, y.detach(), STEPS, method="scipy_solver"), True),
    "continuous adjoint": (
        lambda net, y: rampde.odeint_adjoint(net, y, STEPS, method="dopri5", rtol=1e-6, atol=1e-6),
        True,
    ),
    "event": (until_event, True),
    "dense": (dense, True),
}
"""Solves that break the graph, and whether f is compiled for them."""


class TestGraphBreaks:
    @pytest.mark.parametrize("name", OUTSIDE)
    def test_results_and_compilations(self, name, monkeypatch):
        solve, compiles_func = OUTSIDE[name]
        model = Solver(solve)
        held = []

        def backend(graph, inputs):
            held.append(any(node.target is torch.cos for node in graph.graph.nodes))
            return lookup_backend("aot_eager")(graph, inputs)

        # f is compiled by defaults, which take long
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        compiled = torch.compile(model)
        for call in range(4):
            y0 = state()
            inputs = [y0, *model.parameters()]
            inputs = inputs if name != "scipy_solver" else []
            with torch._dynamo.config.patch(error_on_recompile=call > 0):
                found = self.results(compiled, y0, inputs)
            expected = self.results(model, y0, inputs)
            # steps are chosen by errors that differ by rounding; scipy and Newton iterations end at tolerances
            assert_close(found, expected, 1e-9)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        assert any(held) == compiles_func

    def results(self, model, y0, inputs):
        states = leaves_of(model(y0))
        if not inputs:
            return [leaf.detach() for leaf in states]
        loss = sum((leaf * torch.linspace(-1, 2, leaf.numel(), dtype=F64).view_as(leaf)).sum() for leaf in states)
        return [*(leaf.detach() for leaf in states), *torch.autograd.grad(loss, inputs)]
