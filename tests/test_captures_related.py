"""Captured tensors that depend on each other, and tensors used only after the first evaluation."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rampde import odeint

F64 = torch.float64
POLICIES = ["step", "none", "tape"]
T = torch.linspace(0, 1, 5, dtype=F64)
# of gradients of order one after a few dozen float64 operations in another order
BOUND = 1e-12

Func = Callable[[Tensor, Tensor], Tensor]


def tensor(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def midpoint(func: Func, y0: Tensor) -> Tensor:
    """The whole solve in plain PyTorch: autograd finds everything by itself."""
    y, h = y0, T[1] - T[0]
    for t in T[:-1]:
        y = y + h * func(t + h / 2, y + h / 2 * func(t, y))
    return y


def check(func: Func, inputs: list[Tensor], checkpoint: str, y0: Tensor | None = None) -> None:
    y0 = tensor(2, 3, seed=9) if y0 is None else y0
    expected = torch.autograd.grad(midpoint(func, y0).square().sum(), inputs, retain_graph=True)
    y = odeint(func, y0, T, method="midpoint", checkpoint=checkpoint)[-1]
    found = torch.autograd.grad(y.square().sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-6
        assert (ours - theirs).abs().max() <= BOUND * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("checkpoint", POLICIES)
class TestDependent:
    """A product through a captured tensor must not be counted once in the sweep and once more outside."""

    def test_leaf_and_what_was_computed_from_it(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()
        derived = w.sin()
        check(lambda t, y: torch.tanh(y @ w) + t * (y @ derived), [w], checkpoint)

    def test_leaf_that_f_can_reach_but_uses_only_through_another(self, checkpoint: str) -> None:
        net = nn.Linear(3, 3).double()
        scaled = {name: 0.5 * value for name, value in net.named_parameters()}
        check(lambda t, y: torch.tanh(functional_call(net, scaled, (y,))), list(net.parameters()), checkpoint)

    def test_chain_of_three(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()
        first = w.sin()
        second = first @ first
        check(lambda t, y: torch.tanh(y @ w) + y @ first - t * (y @ second), [w], checkpoint)

    def test_two_that_share_an_origin(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()
        common = w.exp()
        left, right = common.sin(), common.cos()
        check(lambda t, y: torch.tanh(y @ left) - t * (y @ right), [w], checkpoint)

    def test_hypernetwork_and_module_of_it(self, checkpoint: str) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hyper = nn.Linear(2, 9).double()
                self.generated = self.hyper(tensor(2, seed=3)).view(3, 3)

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return torch.tanh(y @ self.generated)

        net = Net()
        check(net, list(net.hyper.parameters()), checkpoint)

    def test_computed_from_the_initial_state(self, checkpoint: str) -> None:
        # features of y0 condition the velocity, as an encoder in front of the solve makes them
        y0 = tensor(2, 3, seed=1).requires_grad_()
        features = y0.sin()
        check(lambda t, y: torch.tanh(y * features) + t * y0, [y0], checkpoint, y0=y0)

    def test_initial_state_computed_from_what_f_uses(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()
        y0 = w[:2].tanh()
        check(lambda t, y: torch.tanh(y @ w), [w], checkpoint, y0=y0)

    def test_result_of_another_solve(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()
        inner = odeint(lambda t, y: torch.tanh(y @ w), tensor(3, 3, seed=2), T, method="midpoint")[-1]
        check(lambda t, y: torch.tanh(y @ inner) + y @ w, [w], checkpoint)

    def test_solve_inside_of_f(self, checkpoint: str) -> None:
        w = tensor(3, 3).requires_grad_()

        def func(t: Tensor, y: Tensor) -> Tensor:
            return odeint(lambda s, z: torch.tanh(z @ w), y, T[:2], method="euler", checkpoint=checkpoint)[-1]

        def plain(t: Tensor, y: Tensor) -> Tensor:
            return y + T[1] * torch.tanh(y @ w)

        y0 = tensor(2, 3, seed=9)
        expected = torch.autograd.grad(midpoint(plain, y0).sum(), w)[0]
        y = odeint(func, y0, T, method="midpoint", checkpoint=checkpoint)[-1]
        found = torch.autograd.grad(y.sum(), w)[0]
        assert (found - expected).abs().max() <= BOUND * float(expected.abs().max())


class Slotted:
    """An object without ``__dict__``."""

    __slots__ = ("bank",)

    def __init__(self, bank: list[Tensor]) -> None:
        self.bank = bank

    def pick(self, t: Tensor) -> Tensor:
        return self.bank[int(t > 0.5)]


def in_slots(bank: list[Tensor]) -> Func:
    slotted = Slotted(bank)
    return lambda t, y: torch.tanh(y @ slotted.pick(t))


def in_deep_containers(bank: list[Tensor]) -> Func:
    deep: Any = {"a": [({"b": [[bank]]},)]}
    return lambda t, y: torch.tanh(y @ deep["a"][0][0]["b"][0][0][int(t > 0.5)])


def in_a_long_list(bank: list[Tensor]) -> Func:
    table = [bank[int(i > 1000)] for i in range(2001)]
    return lambda t, y: torch.tanh(y @ table[int(2000 * t)])


def in_an_imported_module(bank: list[Tensor]) -> Func:
    module = types.ModuleType("settings")
    module.__dict__["bank"] = bank
    return lambda t, y: torch.tanh(y @ module.bank[int(t > 0.5)])


def in_a_generator_of_tensors(bank: list[Tensor]) -> Func:
    class Lazy:
        def __getattr__(self, name: str) -> Tensor:
            return {"early": lambda: bank[0], "late": lambda: bank[1]}[name]()

    lazy = Lazy()
    return lambda t, y: torch.tanh(y @ (lazy.late if t > 0.5 else lazy.early))


GLOBALS: list[Tensor] = []


def in_a_function_inside(bank: list[Tensor]) -> Func:
    GLOBALS[:] = bank

    def func(t: Tensor, y: Tensor) -> Tensor:
        def weight() -> Tensor:
            return GLOBALS[int(t > 0.5)]

        return torch.tanh(y @ weight())

    return func


def made_at_the_time(bank: list[Tensor]) -> Func:
    # a tensor computed outside, handed over by a registry that only a call knows
    registry = {0: bank[0], 1: bank[1]}
    return lambda t, y: torch.tanh(y @ dict.get(registry, int(t > 0.5)))  # type: ignore[arg-type]


PLACES = [
    *(in_slots, in_deep_containers, in_a_long_list, in_an_imported_module),
    *(in_a_generator_of_tensors, in_a_function_inside, made_at_the_time),
]


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize("place", PLACES)
def test_tensor_used_only_later_is_never_silently_missing(
    place: Callable[[list[Tensor]], Func], leaf: bool, checkpoint: str
) -> None:
    """Wherever it hides: its gradient is right, or an error says that it was not found."""
    bank = [tensor(3, 3, seed=seed).requires_grad_() for seed in (1, 2)]
    func = place(bank if leaf else [w * 1 for w in bank])
    y0 = tensor(2, 3, seed=3).requires_grad_()
    expected = torch.autograd.grad(midpoint(func, y0).sum(), bank, retain_graph=True)
    try:
        y = odeint(func, y0, T, method="midpoint", checkpoint=checkpoint)[-1]
        found = torch.autograd.grad(y.sum(), bank, allow_unused=True)
    except RuntimeError:
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert (ours - theirs).abs().max() <= BOUND * max(1.0, float(theirs.abs().max()))
