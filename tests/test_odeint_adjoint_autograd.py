"""The continuous adjoint as a part of autograd: graphs, hooks, memory, threads, exceptions, compiled modules."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from adjoint_problems import EVEN, RK4, Net, reference, relative, start
from torch import Tensor, nn

from rampde import odeint_adjoint

F64 = torch.float64


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
