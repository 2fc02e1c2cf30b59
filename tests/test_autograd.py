"""A solve is a good citizen of autograd: threads, dropout, second derivatives, forward mode, retained graphs."""

import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from steps import options_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from rampde import odeint
from rampde.methods import ADAPTIVE, FIXED

F64 = torch.float64
POLICIES = ["step", "none", "tape"]
T = torch.linspace(0, 1, 5, dtype=F64)
BOUND = 1e-12


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = F64, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 3, dtype=dtype, generator=generator))
        self.b = nn.Parameter(torch.randn(3, dtype=dtype, generator=generator))
        self.dropout = nn.Dropout(dropout)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.dropout(torch.tanh(y @ self.w + self.b * t))


def start(dtype: torch.dtype = F64, rows: int = 2) -> Tensor:
    return torch.linspace(-1, 1, 3 * rows, dtype=dtype).view(rows, 3).requires_grad_()


def close(left: Any, right: Any, bound: float = BOUND) -> bool:
    pairs = [(a.detach(), b.detach()) for a, b in zip(left, right, strict=True)]
    return all((a - b).abs().max() <= bound * max(1.0, float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_two_threads_solve_with_one_module(autocast: bool, checkpoint: str) -> None:
    """Each thread gets the solution and the gradients that it gets alone."""
    net = Net(torch.float32)
    t = torch.linspace(0, 1, 9)

    def solve(rows: int) -> list[Tensor]:
        y0 = start(torch.float32, rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = odeint(net, y0, t, method="rk4", checkpoint=checkpoint)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [y0, net.w, net.b])]

    alone = {rows: solve(rows) for rows in (7, 11)}
    found: dict[int, list[list[Tensor]]] = {7: [], 11: []}
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(rows: int) -> None:
        try:
            barrier.wait()
            found[rows] = [solve(rows) for _ in range(8)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for rows, results in found.items():
        assert len(results) == 8
        for result in results:
            assert torch.equal(result[0], alone[rows][0])
            # autocast shares its copies of the parameters among threads, and autograd sums gradients in the
            # copies' 16 bits, in whichever copy they meet: 8 steps of 4 stages, one rounding each
            bound = 8 * 4 * torch.finfo(torch.bfloat16).eps if autocast and checkpoint == "tape" else 0.0
            assert close(result[1:], alone[rows][1:], bound)


def test_dropout_is_replayed_in_the_recomputation() -> None:
    """With one seed "step" sees the masks of its forward: its gradients are those of "none" and of "tape"."""

    def gradients(checkpoint: str) -> list[Tensor]:
        net, y0 = Net(dropout=0.4), start()
        torch.manual_seed(0)
        y = odeint(net, y0, T, method="rk4", checkpoint=checkpoint)
        # numbers drawn in between must not matter, nor be disturbed
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        result = [y.detach(), *torch.autograd.grad(y.square().sum(), [y0, net.w, net.b])]
        assert torch.equal(torch.rand(3), expected)
        return result

    step, none, tape = (gradients(checkpoint) for checkpoint in POLICIES)
    assert torch.equal(step[0], none[0])
    assert torch.equal(step[0], tape[0])
    assert close(step, none)
    assert close(step, tape)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_dropout_gradient_against_finite_differences(checkpoint: str) -> None:
    net = Net(dropout=0.4)

    def solve(y0: Tensor, w: Tensor) -> Tensor:
        torch.manual_seed(0)
        return odeint(lambda t, y: net.dropout(torch.tanh(y @ w + t)), y0, T, method="rk4", checkpoint=checkpoint)

    assert gradcheck(solve, (start(), net.w))


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_second_derivatives_of_the_tape(method: str) -> None:
    w = Net().w.detach().clone().requires_grad_()
    options = options_of(method, 0.3)

    def solve(y0: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return odeint(lambda t, y: torch.tanh(y @ w + t), y0, t, method=method, checkpoint="tape", options=options)

    inputs = (start(rows=1), w, T[:3].clone().requires_grad_())
    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs)


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("options", [None, {"step_size": 0.15}, {"step_size": 0.15, "interp": "cubic"}], ids=str)
def test_second_derivatives_of_the_other_policies(checkpoint: str, options: Any) -> None:
    """create_graph=True repeats the solve on the tape: first and second derivatives are the tape's."""

    def derivatives(policy: str) -> list[Tensor]:
        net, y0 = Net(), start()
        t = T.clone().requires_grad_()
        y = odeint(net, y0, t, method="rk4", checkpoint=policy, options=options)
        first = torch.autograd.grad(y.square().sum(), [y0, t, net.w, net.b], create_graph=True)
        penalty = sum((gradient.square().sum() for gradient in first), start=torch.zeros((), dtype=F64))
        return [*first, *torch.autograd.grad(penalty, [y0, t, net.w, net.b])]

    found, expected = derivatives(checkpoint), derivatives("tape")
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)
    assert close(found, expected)


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_gradgradcheck_of_the_other_policies(checkpoint: str) -> None:
    w = Net().w.detach().clone().requires_grad_()

    def solve(y0: Tensor, w: Tensor) -> Tensor:
        return odeint(lambda t, y: torch.tanh(y @ w + t), y0, T[:3], method="rk4", checkpoint=checkpoint)

    assert gradgradcheck(solve, (start(rows=1), w))


def test_forward_mode_of_the_tape() -> None:
    """Tangents with respect to y0, a captured tensor and t, against central differences of the solve."""
    generator = torch.Generator().manual_seed(1)
    primals = [start().detach(), Net().w.detach(), T.clone()]
    tangents = [torch.randn(primal.shape, dtype=F64, generator=generator) for primal in primals]
    tangents[2] = tangents[2] * 0.01

    def solve(y0: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return odeint(lambda s, y: torch.tanh(y @ w + s), y0, t, method="rk4", checkpoint="tape")

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)]
        primal, tangent = forward_ad.unpack_dual(solve(*duals))
    assert torch.equal(primal, solve(*primals))
    assert tangent is not None
    eps = 1e-6
    ends = [solve(*(p + sign * eps * v for p, v in zip(primals, tangents, strict=True))) for sign in (1, -1)]
    # central differences: eps^2 of truncation and 1e-16 / eps of rounding, both below 1e-9
    assert (tangent - (ends[0] - ends[1]) / (2 * eps)).abs().max() <= 1e-8


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_retained_graph_gives_the_same_gradients_twice(checkpoint: str) -> None:
    net, y0 = Net(dropout=0.3), start()
    y = odeint(net, y0, T, method="rk4", checkpoint=checkpoint)
    loss = y.square().sum()
    first = torch.autograd.grad(loss, [y0, net.w], retain_graph=True)
    second = torch.autograd.grad(loss, [y0, net.w], retain_graph=True)
    other = torch.autograd.grad(2 * y.square().sum(), [y0, net.w])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert close([2 * gradient for gradient in first], other)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_second_backward_without_retaining_raises(checkpoint: str) -> None:
    net, y0 = Net(), start()
    y = odeint(net, y0, T, method="rk4", checkpoint=checkpoint)
    y.sum().backward()
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        y.sum().backward()


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_graph_is_freed_by_the_backward(checkpoint: str) -> None:
    # the result alone must not keep the graphs of the stages alive
    net, y0 = Net(), start()
    alive: list[weakref.ref[Tensor]] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        k = net(t, y)
        alive.append(weakref.ref(k))
        return k

    y = odeint(func, y0, T, method="rk4", checkpoint=checkpoint)
    y.sum().backward()
    assert [ref for ref in alive if ref() is not None] == []


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_unused_outputs(checkpoint: str) -> None:
    """Losses that see only some outputs, or one piece of a tuple, or none of what a tensor affects."""
    net, y0, z0 = Net(), start(), start()

    def func(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return net(t, state[0]), -state[1]

    y, _ = odeint(func, (y0, z0), T, method="rk4", checkpoint=checkpoint)
    expected = torch.autograd.grad(odeint(net, y0, T, method="rk4")[2].sum(), [y0, net.w])
    found = torch.autograd.grad(y[2].sum(), [y0, net.w], retain_graph=True)
    assert close(found, expected)
    unused = torch.autograd.grad(y[2].sum(), [y0, z0], allow_unused=True, retain_graph=True)[1]
    assert unused is None or not unused.any()
    # the initial state is an output too, which f does not affect
    initial = torch.autograd.grad(y[0].sum(), [y0, net.w], allow_unused=True)
    assert torch.equal(initial[0], torch.ones_like(y0))
    assert initial[1] is None or not initial[1].any()


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_expanded_gradient_and_incoming_gradient_is_not_modified(dtype: torch.dtype, checkpoint: str) -> None:
    """sum() hands down a stride-0 gradient; a given one belongs to the caller, as do gradients that come back."""
    net, y0 = Net(dtype), start(dtype)
    y = odeint(net, y0, T.to(dtype), method="rk4", checkpoint=checkpoint)
    dense = torch.ones_like(y)
    version = dense._version
    by_dense = torch.autograd.grad(y, [y0, net.w], dense, retain_graph=True)
    assert torch.equal(dense, torch.ones_like(y))
    assert dense._version == version
    by_expanded = torch.autograd.grad(y, [y0, net.w], dense.new_ones(()).expand(y.shape), retain_graph=True)
    by_sum = torch.autograd.grad(y.sum(), [y0, net.w])
    for found in (by_expanded, by_sum):
        assert all(torch.equal(a, b) for a, b in zip(found, by_dense, strict=True))
    # no gradient shares memory with the gradient that came in or with another one
    pointers = {dense.data_ptr(), y.data_ptr(), *(gradient.data_ptr() for gradient in by_dense)}
    assert len(pointers) == 2 + len(by_dense)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_gradients_accumulate_over_solves(checkpoint: str) -> None:
    net, y0 = Net(), start()
    for _ in range(2):
        odeint(net, y0, T, method="rk4", checkpoint=checkpoint).sum().backward()
    once = torch.autograd.grad(odeint(net, y0, T, method="rk4", checkpoint=checkpoint).sum(), [y0, net.w])
    assert y0.grad is not None
    assert net.w.grad is not None
    assert close([y0.grad, net.w.grad], [2 * gradient for gradient in once])


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_hooks_fire_once(checkpoint: str) -> None:
    """Hooks on parameters and y0, as DistributedDataParallel sets them, see one complete gradient."""
    net, y0 = Net(), start()
    seen: dict[str, list[Tensor]] = {"w": [], "y0": [], "accumulated": []}
    net.w.register_hook(lambda gradient: seen["w"].append(gradient.clone()))
    y0.register_hook(lambda gradient: seen["y0"].append(gradient.clone()))
    net.w.register_post_accumulate_grad_hook(lambda w: seen["accumulated"].append(w.grad.clone()))
    odeint(net, y0, T, method="rk4", checkpoint=checkpoint).sum().backward()
    assert [len(seen[name]) for name in ("y0", "w", "accumulated")] == [1, 1, 1]
    assert net.w.grad is not None
    assert torch.equal(seen["accumulated"][0], net.w.grad)
    assert torch.equal(seen["w"][0], net.w.grad)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_hook_that_changes_a_gradient_acts_on_the_whole_gradient(checkpoint: str) -> None:
    net, y0 = Net(), start()
    plain = torch.autograd.grad(odeint(net, y0, T, method="rk4", checkpoint=checkpoint).sum(), [net.w])[0]
    limit = float(plain.abs().median()) / 2
    net.w.register_hook(lambda gradient: (0.5 * gradient).clamp(-limit, limit))
    odeint(net, y0, T, method="rk4", checkpoint=checkpoint).sum().backward()
    assert net.w.grad is not None
    assert close([net.w.grad], [(0.5 * plain).clamp(-limit, limit)])


def test_nothing_warns_on_the_common_roads() -> None:
    net, y0 = Net(torch.float32), start(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for checkpoint in POLICIES:
            for dtype in (None, torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    for _ in range(2):
                        odeint(net, y0, T.float(), method="rk4", checkpoint=checkpoint).sum().backward()
