"""Every tensor that func uses and that requires grad gets its gradient, however func reaches it."""

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn.utils import parametrizations

from rampde import odeint

F64 = torch.float64
POLICIES = ["step", "none", "tape"]
T = torch.linspace(0, 1, 5, dtype=F64)
# of gradients of order one after a few dozen float64 operations in another order
BOUND = 1e-12


def rk4_step(func: Callable[[Tensor, Tensor], Tensor], t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """The 3/8 rule in plain PyTorch."""
    k1 = func(t, y)
    k2 = func(t + h / 3, y + h * k1 / 3)
    k3 = func(t + 2 * h / 3, y + h * (k2 - k1 / 3))
    k4 = func(t + h, y + h * (k1 - k2 + k3))
    return y + h / 8 * (k1 + 3 * (k2 + k3) + k4)


def reference(func: Callable[[Tensor, Tensor], Tensor], y0: Tensor, t: Tensor) -> Tensor:
    """The whole solve in plain PyTorch: autograd finds everything by itself."""
    states = [y0]
    for start, end in itertools.pairwise(t):
        states.append(rk4_step(func, start, end - start, states[-1]))
    return torch.stack(states)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def check(func: Callable[[Tensor, Tensor], Tensor], wanted: list[Tensor], checkpoint: str) -> None:
    """Gradients with respect to y0 and ``wanted`` are those of plain autograd, by grad and by backward."""
    y0 = tensor(2, 3, seed=9).requires_grad_()
    weights = tensor(5, 2, 3, seed=8)
    inputs = [y0, *wanted]
    loss = (reference(func, y0, T) * weights).sum()
    expected = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    assert all(gradient is not None and gradient.abs().max() > 1e-6 for gradient in expected)
    y = odeint(func, y0, T, method="rk4", checkpoint=checkpoint)
    found = torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs is not None
        assert (ours - theirs).abs().max() <= BOUND * max(1.0, float(theirs.abs().max()))

    leaves = [leaf for leaf in inputs if leaf.is_leaf]
    for leaf in leaves:
        leaf.grad = None
    y = odeint(func, y0, T, method="rk4", checkpoint=checkpoint)
    (y * weights).sum().backward(retain_graph=True)
    for leaf, gradient in zip(inputs, expected, strict=True):
        if leaf.is_leaf:
            assert gradient is not None
            assert leaf.grad is not None
            assert (leaf.grad - gradient).abs().max() <= BOUND * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize("checkpoint", POLICIES)
class TestFound:
    def test_parameters(self, checkpoint: str) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        check(lambda t, y: net(y) * (1 + t), list(net.parameters()), checkpoint)

    def test_closure_leaf(self, checkpoint: str) -> None:
        w, b = tensor(3, 3).requires_grad_(), tensor(3, seed=1).requires_grad_()
        check(lambda t, y: torch.tanh(y @ w + b * t), [w, b], checkpoint)

    def test_closure_non_leaf(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()
        derived = torch.exp(-w @ w.t())
        check(lambda t, y: torch.tanh(y @ derived), [w, derived], checkpoint)

    def test_several_outputs_of_one_node(self, checkpoint: str) -> None:
        # two tensors with the same grad_fn and different output numbers
        w = tensor(6, 3).requires_grad_()
        left, right = w.sin().split(3)
        check(lambda t, y: torch.tanh(y @ left) - t * y @ right, [w], checkpoint)

    def test_views_of_a_parameter(self, checkpoint: str) -> None:
        flat = tensor(12).requires_grad_()
        check(lambda t, y: torch.tanh(y @ flat[:9].view(3, 3) + flat[9:]), [flat], checkpoint)

    def test_views_made_outside(self, checkpoint: str) -> None:
        flat = tensor(12).requires_grad_()
        w, b = flat[:9].view(3, 3), flat[9:]
        check(lambda t, y: torch.tanh(y @ w + b), [flat], checkpoint)

    def test_default_argument(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()

        def func(t: Tensor, y: Tensor, w: Tensor = w, *, scale: Tensor = w[0]) -> Tensor:
            return torch.tanh(y @ w) * scale

        check(func, [w], checkpoint)

    def test_global(self, checkpoint: str) -> None:
        check(uses_global, [GLOBAL], checkpoint)

    def test_partial(self, checkpoint: str) -> None:
        w, b = tensor(3, 3).requires_grad_(), tensor(3, seed=1).requires_grad_()

        def func(w: Tensor, t: Tensor, y: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(y @ w + b)

        check(functools.partial(func, w, b=b), [w, b], checkpoint)

    def test_attributes_of_a_bound_object(self, checkpoint: str) -> None:
        class Physics:
            def __init__(self) -> None:
                self.w = tensor(3, 3).requires_grad_()
                self.nested = SimpleNamespace(tensors={"b": [tensor(3, seed=1).requires_grad_()]})

            def velocity(self, t: Tensor, y: Tensor) -> Tensor:
                return torch.tanh(y @ self.w + self.nested.tensors["b"][0])

        physics = Physics()
        check(physics.velocity, [physics.w, physics.nested.tensors["b"][0]], checkpoint)

    def test_object_with_slots(self, checkpoint: str) -> None:
        class Slotted:
            __slots__ = ("w",)

            def __init__(self) -> None:
                self.w = tensor(3, 3).requires_grad_()

            def __call__(self, t: Tensor, y: Tensor) -> Tensor:
                return torch.tanh(y @ self.w)

        slotted = Slotted()
        check(slotted, [slotted.w], checkpoint)

    def test_weight_norm(self, checkpoint: str) -> None:
        layer = parametrizations.weight_norm(nn.Linear(3, 3).double())
        check(lambda t, y: torch.tanh(layer(y)), list(layer.parameters()), checkpoint)

    def test_spectral_norm_without_updates(self, checkpoint: str) -> None:
        layer = parametrizations.spectral_norm(nn.Linear(3, 3).double()).eval()
        check(lambda t, y: torch.tanh(layer(y)), list(layer.parameters()), checkpoint)

    def test_hypernetwork(self, checkpoint: str) -> None:
        hyper = nn.Linear(2, 12).double()
        generated = hyper(tensor(2, seed=3))
        w, b = generated[:9].view(3, 3), generated[9:]
        check(lambda t, y: torch.tanh(y @ w + b), list(hyper.parameters()), checkpoint)

    def test_functional_call(self, checkpoint: str) -> None:
        net = nn.Linear(3, 3).double()
        scaled = {name: 0.5 * value for name, value in net.named_parameters()}
        check(lambda t, y: torch.tanh(functional_call(net, scaled, (y,))), list(net.parameters()), checkpoint)

    def test_func_that_calls_autograd(self, checkpoint: str) -> None:
        # the trace of the Jacobian by products, as continuous normalising flows take it
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        noise = tensor(2, 3, seed=4)

        def func(t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                y = y if y.requires_grad else y.detach().requires_grad_()
                velocity = net(y)
                product = torch.autograd.grad(velocity, y, noise, create_graph=True)[0]
            return velocity - (product * noise).sum(-1, keepdim=True)

        check(func, [net[0].weight, net[0].bias, net[2].weight], checkpoint)

    def test_vmap_and_jacrev_inside(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()

        def func(t: Tensor, y: Tensor) -> Tensor:
            jacobians = vmap(jacrev(lambda x: torch.tanh(x @ w)))(y)
            return torch.tanh(y @ w) - torch.diagonal(jacobians, dim1=1, dim2=2).sum(-1, keepdim=True)

        check(func, [w], checkpoint)

    def test_jvp_inside(self, checkpoint: str) -> None:
        w, direction = tensor(3, 3).requires_grad_(), tensor(2, 3, seed=5).requires_grad_()

        def func(t: Tensor, y: Tensor) -> Tensor:
            value, derivative = jvp(lambda x: torch.tanh(x @ w), (y,), (direction,))
            return value + t * derivative

        check(func, [w, direction], checkpoint)

    def test_inner_checkpoint(self, checkpoint: str) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        inner = functools.partial(torch.utils.checkpoint.checkpoint, net, use_reentrant=False)
        check(lambda t, y: inner(y), [net[0].weight, net[2].weight], checkpoint)

    def test_custom_function_inside(self, checkpoint: str) -> None:
        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor, w: Tensor) -> Tensor:
                ctx.save_for_backward(y, w)
                return y @ w

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
                y, w = ctx.saved_tensors
                return grads[0] @ w.t(), y.t() @ grads[0]

        w = tensor(3, 3).requires_grad_()
        derived = w.sin()
        check(lambda t, y: torch.tanh(Product.apply(y, derived)), [w], checkpoint)

    def test_parameters_chosen_by_time(self, checkpoint: str) -> None:
        # the first evaluation sees only the first of them
        bank = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)).double()
        func = Indexed(bank)
        check(func, list(bank.parameters()), checkpoint)

    def test_non_leaf_tensors_chosen_by_time(self, checkpoint: str) -> None:
        w = tensor(4, 3, 3).requires_grad_()
        bank = [part.exp() for part in w.unbind()]
        check(lambda t, y: torch.tanh(y @ bank[min(int(4 * t), 3)]), [w], checkpoint)

    def test_shared_parameters(self, checkpoint: str) -> None:
        first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        second.weight = first.weight
        check(lambda t, y: second(torch.tanh(first(y))), [first.weight, first.bias, second.bias], checkpoint)

    def test_result_is_a_captured_tensor_itself(self, checkpoint: str) -> None:
        w = tensor(2, 3).requires_grad_()
        y0 = tensor(2, 3).requires_grad_()
        gradients = torch.autograd.grad(
            odeint(lambda t, y: w, y0, T, method="rk4", checkpoint=checkpoint)[-1].sum(), [y0, w]
        )
        assert all((gradient - 1).abs().max() <= BOUND for gradient in gradients)

    def test_derived_result_that_ignores_the_state(self, checkpoint: str) -> None:
        w = tensor(2, 3).requires_grad_()
        derived = w.exp()
        gradient = torch.autograd.grad(
            odeint(lambda t, y: derived * t, w.detach(), T, method="rk4", checkpoint=checkpoint)[-1].sum(), w
        )[0]
        assert (gradient - w.exp() / 2).abs().max() <= BOUND

    def test_captured_tensor_is_the_initial_state(self, checkpoint: str) -> None:
        y0 = tensor(2, 3).requires_grad_()
        expected = torch.autograd.grad(reference(lambda t, y: y0 * y, y0, T).sum(), y0)[0]
        y = odeint(lambda t, y: y0 * y, y0, T, method="rk4", checkpoint=checkpoint)
        assert (torch.autograd.grad(y.sum(), y0)[0] - expected).abs().max() <= BOUND * expected.abs().max()


GLOBAL = tensor(3, 3).requires_grad_()


def uses_global(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ GLOBAL)


class Indexed(nn.Module):
    """One layer for each quarter of the time."""

    def __init__(self, bank: nn.ModuleList) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.bank[min(int(len(self.bank) * t), len(self.bank) - 1)](y))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_frozen_and_unused_parameters_keep_none(checkpoint: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(tensor(3, 3))
            self.frozen = nn.Parameter(tensor(3, seed=1), requires_grad=False)
            self.unused = nn.Parameter(tensor(3, seed=2))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ self.used + self.frozen)

    net, y0 = Net(), tensor(2, 3, seed=3)
    y = odeint(net, y0, T, method="rk4", checkpoint=checkpoint)
    y.sum().backward()
    assert net.used.grad is not None
    assert net.frozen.grad is None
    assert net.unused.grad is None
    expected = torch.autograd.grad(reference(net, y0, T).sum(), net.used)[0]
    assert (net.used.grad - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("leaf", [True, False])
def test_captured_tensor_changed_in_place_raises(leaf: bool, checkpoint: str) -> None:
    """A gradient at values that the forward solve did not see would be wrong without a word."""
    w = tensor(3, 3).requires_grad_()
    used = w if leaf else w * 1
    y = odeint(
        lambda t, y: torch.tanh(y @ used),
        tensor(2, 3).requires_grad_(),
        T,
        method="rk4",
        checkpoint=checkpoint,
    )
    with torch.no_grad():
        used.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("checkpoint", ["none", "tape"])
def test_buffer_changed_in_place_raises(checkpoint: str) -> None:
    # the kept graph read the buffer; with "step" the recomputation reads the new values, as every
    # checkpointing does: buffers such as running statistics change during the solve itself
    w, buffer = tensor(3, 3).requires_grad_(), tensor(3, seed=1)
    y = odeint(lambda t, y: torch.tanh(y @ w) * buffer, tensor(2, 3), T, method="rk4", checkpoint=checkpoint)
    buffer.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_unused_tensor_changed_in_place_does_not_raise(checkpoint: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(tensor(3, 3))
            self.unused = nn.Parameter(tensor(3, 3))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ self.used)

    net = Holder()
    y = odeint(net, tensor(2, 3), T, method="rk4", checkpoint=checkpoint)
    with torch.no_grad():
        net.unused.mul_(2)
    y.sum().backward()
    assert net.used.grad is not None
