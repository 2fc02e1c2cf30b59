"""Solves outside of the compiler of an f that ``torch.compile`` returned: whole steps are compiled."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._pytree import tree_leaves

import rampde
from rampde import odeint

F64 = torch.float64
# of values of order one after a few dozen float64 operations in another order
BOUND = 1e-12
STEPS = torch.linspace(0, 1, 5, dtype=F64)
POLICIES = ("auto", "none", "step")


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    torch.compiler.reset()


class Net(nn.Module):
    """A small network that depends on time."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, 5, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y) * torch.cos(t)

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y)


class Backend:
    """Compiles as ``name`` does, and counts graphs and calls of them."""

    def __init__(self, name: str = "aot_eager") -> None:
        self.name, self.graphs, self.calls = name, 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        compiled = lookup_backend(self.name)(graph, inputs)

        def call(*arguments: Any) -> Any:
            self.calls += 1
            return compiled(*arguments)

        return call


def state(batch: int = 3, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(batch, 5, dtype=dtype, requires_grad=True)


def results(func: Any, y0: Any, inputs: list[Tensor], t: Tensor = STEPS, **options: Any) -> list[Tensor]:
    """States, and gradients of a sum of them in which no two elements count alike."""
    states = tree_leaves(odeint(func, y0, t, **{"method": "rk4", **options}))
    loss = sum((leaf * torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view_as(leaf)).sum() for leaf in states)
    return [*(leaf.detach() for leaf in states), *torch.autograd.grad(loss, inputs)]


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float = BOUND) -> None:
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max()))


def function(net: Net) -> Callable[..., Tensor]:
    return lambda t, y: net(t, y)


KINDS: dict[str, Callable[[Net, Any], Any]] = {
    "module": lambda net, backend: torch.compile(net, backend=backend),
    "function": lambda net, backend: torch.compile(function(net), backend=backend),
    "bound method": lambda net, backend: torch.compile(net.velocity, backend=backend),
    "compiled in place": lambda net, backend: (net.compile(backend=backend), net)[1],
    "method of a compiled module": lambda net, backend: torch.compile(net, backend=backend).velocity,
}


class TestResults:
    @pytest.mark.parametrize("checkpoint", POLICIES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_f_is(self, kind, checkpoint):
        net, y0 = Net(), state()
        inputs = [y0, *net.parameters()]
        expected = results(net, y0, inputs, checkpoint=checkpoint)
        assert_close(results(KINDS[kind](net, "aot_eager"), y0, inputs, checkpoint=checkpoint), expected)

    @pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_backends(self, backend):
        net, y0 = Net(), state()
        inputs = [y0, *net.parameters()]
        assert_close(results(torch.compile(net, backend=backend), y0, inputs), results(net, y0, inputs))

    OPTIONS = (
        {"method": "euler"},
        {"method": "rk4", "options": {"perturb": True}},
        {"method": "midpoint", "options": {"step_size": 0.3}},
        {"method": "midpoint", "options": {"step_size": 0.3, "interp": "cubic"}},
        {"method": "midpoint", "t": STEPS.flip(0)},
        {"method": "midpoint", "t": STEPS[[0, -1]]},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_options(self, options):
        net, y0 = Net(), state()
        inputs = [y0, *net.parameters()]
        assert_close(
            results(torch.compile(net, backend="eager"), y0, inputs, **options), results(net, y0, inputs, **options)
        )

    @pytest.mark.parametrize("checkpoint", POLICIES)
    def test_structures(self, checkpoint):
        net = Net()

        def func(t, y):
            return {"x": net(t, y["x"][0]) * y["z"].mean(), "z": y["x"][0].sum(1)}

        def wrapped(t, y):
            return {"x": [func(t, y)["x"]], "z": func(t, y)["z"]}

        y0 = {"x": [state()], "z": torch.randn(3, dtype=F64, requires_grad=True)}
        inputs = [*tree_leaves(y0), *net.parameters()]
        compiled = torch.compile(wrapped, backend="aot_eager")
        options = {"method": "midpoint", "checkpoint": checkpoint}
        assert_close(results(compiled, y0, inputs, **options), results(wrapped, y0, inputs, **options))

    @pytest.mark.parametrize("checkpoint", ["none", "step"])
    def test_tensors_in_closures(self, checkpoint):
        leaf, constant = (torch.randn(5, dtype=F64) for _ in range(2))
        leaf.requires_grad_()
        other = torch.randn(5, dtype=F64, requires_grad=True)
        computed = other.exp()

        def func(t, y):
            return torch.sin(y * leaf + constant) - computed * t

        y0 = state()
        inputs = [y0, leaf, other]

        def found(f):
            states = odeint(f, y0, STEPS, method="rk4", checkpoint=checkpoint)
            return torch.autograd.grad((states**2).sum(), inputs, retain_graph=True)

        assert_close(list(found(torch.compile(func, backend="aot_eager"))), list(found(func)))

    def test_float64_is_the_limit_of_float32(self):
        net, y0 = Net(torch.float32), state(16, torch.float32)
        inputs = [y0, *net.parameters()]
        wide, wide_y0 = copy.deepcopy(net).double(), y0.detach().double().requires_grad_()
        exact = results(wide, wide_y0, [wide_y0, *wide.parameters()])
        plain, found = results(net, y0, inputs, STEPS.float()), results(torch.compile(net), y0, inputs, STEPS.float())
        for ours, theirs, right in zip(found, plain, exact, strict=True):
            assert ours.dtype == torch.float32
            roundoff = torch.finfo(torch.float32).eps * right.abs().max()
            assert (ours - right).abs().max() <= 2 * ((theirs - right).abs().max() + roundoff)

    @pytest.mark.parametrize("checkpoint", ["none", "step"])
    def test_autocast(self, checkpoint):
        net, y0, t = Net(torch.float32), state(32, torch.float32), torch.linspace(0, 1, 17)
        wide, wide_y0 = copy.deepcopy(net).double(), y0.detach().double().requires_grad_()
        exact = results(wide, wide_y0, [wide_y0, *wide.parameters()], t.double())
        inputs, compiled = [y0, *net.parameters()], torch.compile(net, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            plain = results(net, y0, inputs, t, checkpoint=checkpoint)
            found = results(compiled, y0, inputs, t, checkpoint=checkpoint)
        for ours, theirs, right in zip(found, plain, exact, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - right).norm() <= 2 * (theirs - right).norm()

    def test_without_gradients(self):
        net, y0, backend = Net(), state(), Backend()
        compiled = torch.compile(net, backend=backend)
        with torch.no_grad():
            states = odeint(compiled, y0, STEPS, method="rk4")
            assert not states.requires_grad
            assert_close([states], [odeint(net, y0, STEPS, method="rk4")])
        assert (backend.graphs, backend.calls) == (1, len(STEPS) - 1)

    @pytest.mark.parametrize("checkpoint", POLICIES)
    def test_empty_states(self, checkpoint):
        net, y0 = Net(), state(0)
        states = odeint(torch.compile(net, backend="eager"), y0, STEPS, method="rk4", checkpoint=checkpoint)
        assert states.shape == (5, 0, 5)
        gradients = torch.autograd.grad(states.sum(), [y0, *net.parameters()])
        assert not any(gradient.any() for gradient in gradients)


class TestCounts:
    @pytest.mark.parametrize("steps", [3, 9])
    @pytest.mark.parametrize(("checkpoint", "factor"), [("none", 1), ("step", 2)])
    def test_a_call_for_each_step(self, checkpoint, factor, steps):
        net, backend = Net(), Backend()
        compiled, t = torch.compile(net, backend=backend), torch.linspace(0, 1, steps + 1, dtype=F64)
        for call in range(5):
            y0 = state()
            inputs = [y0, *net.parameters()]
            before = backend.calls
            with torch._dynamo.config.patch(error_on_recompile=call > 0):
                found = results(compiled, y0, inputs, t, checkpoint=checkpoint)
            # the first step is evaluated with its graph to see what f captures
            assert backend.calls - before == factor * steps
            assert_close(found, results(net, y0, inputs, t, checkpoint=checkpoint))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.9)
        # with graphs, and without
        assert backend.graphs <= factor

    def test_states_of_steps_are_what_is_kept(self):
        class Packed:
            def __init__(self, tensor):
                self.tensor = tensor

        net, y0, packed = Net(), state(), weakref.WeakSet()

        def pack(tensor):
            holder = Packed(tensor)
            packed.add(holder)
            return holder

        compiled = torch.compile(net, backend="aot_eager")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            states = odeint(compiled, y0, STEPS, method="rk4", checkpoint="step")
        gc.collect()
        kept = [holder.tensor.shape for holder in packed]
        # those before each step, and y0 itself
        assert kept.count(y0.shape) == len(STEPS) - 1 + 1
        # and beside them t and what f was seen to use
        assert len(kept) == len(STEPS) + 1 + len(list(net.parameters()))
        assert torch.isfinite(torch.autograd.grad(states.sum(), y0)[0]).all()

    def test_other_batches(self):
        net, backend = Net(), Backend()
        compiled = torch.compile(net, backend=backend)
        for batch in (3, 8, 5, 21):
            y0 = state(batch)
            inputs = [y0, *net.parameters()]
            assert_close(results(compiled, y0, inputs), results(net, y0, inputs))
        # one shape, then any
        assert backend.graphs == 2

    def test_f_is_not_kept_alive(self):
        net, y0 = Net(), state()
        compiled = torch.compile(net, backend="aot_eager")
        odeint(compiled, y0, STEPS, method="rk4").sum().backward()
        of_net, of_parameter = weakref.ref(net), weakref.ref(net.layers[0].weight)
        del net, compiled
        gc.collect()
        assert of_net() is None
        assert of_parameter() is None

    def test_settings_of_f(self):
        """Its backend compiles the steps; without it they are not compiled."""
        backend, y0 = Backend("eager"), state()
        odeint(torch.compile(Net(), backend=backend, dynamic=True), y0, STEPS, method="rk4")
        assert backend.graphs > 0
        with torch.compiler.set_stance("force_eager"):
            calls = backend.calls
            odeint(torch.compile(Net(), backend=backend, dynamic=True), y0, STEPS, method="rk4")
            assert backend.calls == calls


class TestBackward:
    @pytest.mark.parametrize("checkpoint", ["none", "step"])
    def test_twice(self, checkpoint):
        net, y0 = Net(), state()
        inputs = [y0, *net.parameters()]
        loss = odeint(torch.compile(net, backend="aot_eager"), y0, STEPS, method="rk4", checkpoint=checkpoint).sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match=r"freed by an earlier backward pass|second time"):
            torch.autograd.grad(loss, inputs)

    def test_second_derivatives(self):
        net, y0 = Net(), state()

        def second(func):
            states = odeint(func, y0, STEPS, method="midpoint")
            (gradient,) = torch.autograd.grad((states**3).sum(), y0, create_graph=True)
            return torch.autograd.grad((gradient**2).sum(), [y0, *list(net.parameters())[:2]])

        assert_close(list(second(torch.compile(net, backend="eager"))), list(second(net)))

    def test_hooks_run_once(self):
        net, y0, seen = Net(), state(), []
        net.layers[0].weight.register_hook(seen.append)
        odeint(torch.compile(net, backend="aot_eager"), y0, STEPS, method="rk4").sum().backward()
        assert len(seen) == 1
        assert torch.equal(seen[0], net.layers[0].weight.grad)

    def test_parts_that_need_no_gradient(self):
        net, y0 = Net(), state().detach()
        net.layers[2].requires_grad_(False)
        inputs = list(net.layers[0].parameters())
        assert_close(results(torch.compile(net, backend="aot_eager"), y0, inputs), results(net, y0, inputs))

    def test_unused_outputs(self):
        net, y0 = Net(), state()
        for index in (0, 2):
            found, expected = (
                torch.autograd.grad(odeint(func, y0, STEPS, method="rk4")[index].square().sum(), y0)[0]
                for func in (torch.compile(net, backend="aot_eager"), net)
            )
            assert_close([found], [expected])


class TestErrors:
    BAD = (
        (lambda t, y: y[:1], r"func returned shape \[1, 5\], expected that of y0, \[3, 5\]"),
        (lambda t, y: (y,), "func returned a tuple, expected a tensor"),
        (lambda t, y: 1.0, "func returned a float, expected a tensor"),
        (lambda t, y: y.long(), "func returned dtype torch.int64, expected a floating point dtype"),
    )

    @pytest.mark.parametrize("fullgraph", [False, True])
    @pytest.mark.parametrize(("func", "message"), BAD, ids=[message for _, message in BAD])
    def test_what_f_returns(self, func, message, fullgraph):
        with pytest.raises((TypeError, ValueError), match=message):
            odeint(torch.compile(func, backend="eager", fullgraph=fullgraph), state(), STEPS, method="rk4")

    def test_errors_of_f_itself(self):
        def func(t, y):
            raise KeyError("of f")

        with pytest.raises(KeyError, match="of f"):
            odeint(torch.compile(func, backend="eager"), state(), STEPS, method="rk4")


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(5, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * nn.functional.dropout(torch.ones_like(y), 0.5)


class TestRandomNumbers:
    def test_graphs_hold_what_was_drawn(self):
        func, y0 = Dropped(), state()
        states = odeint(torch.compile(func, backend="aot_eager"), y0, STEPS, method="euler", checkpoint="none")
        # linear in the rate, whose part in the last state is what was drawn
        (gradient,) = torch.autograd.grad(states[-1].sum(), func.rate)
        torch.testing.assert_close(gradient, (states[-1] - y0).sum(0).detach())

    def test_steps_cannot_draw_it_again(self):
        compiled = torch.compile(Dropped(), backend="aot_eager")
        with pytest.raises(RuntimeError, match=r'func draws random numbers.* checkpoint="none"'):
            odeint(compiled, state(), STEPS, method="euler", checkpoint="step")
        with torch.no_grad():
            odeint(compiled, state(), STEPS, method="euler", checkpoint="step")


class TestGraphBreaksInF:
    @pytest.mark.parametrize("checkpoint", ["none", "step"])
    def test_what_breaks_the_graph_is_still_right(self, checkpoint):
        net, y0, sizes = Net(), state(), []

        def func(t, y):
            k = net(t, y)
            sizes.append(k.detach().abs().max().item())
            return k * (2.0 if sizes[-1] > 1e9 else 1.0)

        inputs = [y0, *net.parameters()]
        expected = results(func, y0, inputs, checkpoint=checkpoint)
        count = len(sizes)
        assert_close(results(torch.compile(func, backend="aot_eager"), y0, inputs, checkpoint=checkpoint), expected)
        assert len(sizes) == 2 * count


class TestPlainRoad:
    """What is not for whole steps works as it does with any f."""

    def check(self, func, y0, inputs, t=STEPS, compiled=None, **options):
        compiled = compiled if compiled is not None else torch.compile(func, backend="aot_eager")
        assert_close(results(compiled, y0, inputs, t, **options), results(func, y0, inputs, t, **options))

    @pytest.mark.parametrize(
        "options",
        [{"compensated": True}, {"checkpoint": "stage"}, {"checkpoint": 2}, {"loss_scaler": rampde.DynamicScaler()}],
        ids=" ".join,
    )
    def test_arguments(self, options):
        net, y0 = Net(), state()
        self.check(net, y0, [y0, *net.parameters()], **options)

    def test_times_that_require_gradients(self):
        net, y0, t = Net(), state(), STEPS.clone().requires_grad_()
        self.check(net, y0, [y0, t, *net.parameters()], t)

    def test_statistics(self):
        net, y0 = Net(), state()
        with rampde.stats() as stats:
            self.check(net, y0, [y0, *net.parameters()])
        compiled, plain = stats.solves
        assert compiled.evaluations_forward == plain.evaluations_forward == 4 * (len(STEPS) - 1)

    def test_float16(self):
        net, y0 = Net(torch.float32), state(dtype=torch.float32)

        def func(t, y):
            return net(t, y).half()

        inputs, t = [y0, *net.parameters()], STEPS.float()
        for fullgraph in (False, True):
            compiled = torch.compile(func, backend="eager", fullgraph=fullgraph)
            found, expected = results(compiled, y0, inputs, t), results(func, y0, inputs, t)
            assert_close(found, expected, 2 * torch.finfo(torch.float16).eps)

    def test_large_modules(self):
        """One evaluation is compiled at a time, as a step of it would take long."""

        class Deep(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.unused = Net(), nn.ModuleList(nn.Identity() for _ in range(100))

            def forward(self, t, y):
                return self.net(t, y)

        net, y0, backend = Deep(), state(), Backend()
        self.check(net, y0, [y0, *net.net.parameters()], compiled=torch.compile(net, backend=backend))
        assert backend.calls == 4 * (len(STEPS) - 1)
