"""The emulation of a CUDA graph: what other tests take for granted of it."""

from collections.abc import Callable

import pytest
import torch
from emulated_graph import EmulatedGraph, HostRead

from rampde.ops import rk_stage, rk_update


def test_a_replay_repeats_the_work_on_what_its_tensors_hold_now() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, result = torch.randn(5, 3), torch.zeros(5, 3)
    totals = [torch.zeros_like(parameter) for parameter in net.parameters()]
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        leaf = torch.empty(5, 3).copy_(x).requires_grad_()
        gradients = torch.autograd.grad(net(leaf)[1:].square().sum(), [leaf, *net.parameters()])
        result.copy_(gradients[0])
        for total, gradient in zip(totals, gradients[1:], strict=True):
            total += gradient

    graph = EmulatedGraph()
    replay = graph.record(work)
    # recording leaves nothing behind
    assert not any(bool(tensor.any()) for tensor in (result, *totals))
    for count in range(1, 4):
        x.copy_(torch.randn(5, 3))
        for total in totals:
            total.zero_()
        replay()
        found = [tensor.clone() for tensor in (result, *totals)]
        for total in totals:
            total.zero_()
        work()
        assert all(torch.equal(*pair) for pair in zip(found, (result, *totals), strict=True))
        assert (calls, graph.replays) == (count + 1, count)


def test_operators_of_the_solver_are_recorded() -> None:
    y, h = torch.randn(7), torch.tensor(0.5, dtype=torch.float64)

    def work() -> None:
        x = rk_stage(y, [y], h, [1.0], torch.float32)
        rk_update(y, [x], h, [1.0], y)

    graph = EmulatedGraph()
    replay = graph.record(work)
    assert graph.operators == ["rampde::rk_stage", "rampde::rk_update"]
    expected = y.clone()
    for _ in range(2):
        replay()
        expected = expected + 0.5 * (1.5 * expected)
    assert torch.allclose(y, expected)


def test_what_a_replay_writes_shows_in_no_version() -> None:
    x = torch.ones(3)
    replay = EmulatedGraph().record(lambda: x.mul_(2))
    version = x._version
    replay()
    assert x.tolist() == [2.0] * 3
    assert x._version == version


def test_unwritten_memory_is_nan() -> None:
    x = torch.zeros(3)
    replay = EmulatedGraph().record(lambda: x.copy_(torch.empty(3).fill_(1.0) * torch.empty(3)))
    replay()
    assert bool(x.isnan().all())


X = torch.ones(3)


@pytest.mark.parametrize(
    "work",
    [
        lambda: X.sum().item(),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.numpy(),
        lambda: bool(X.sum() > 0),
        lambda: float(X.sum()),
        lambda: torch.equal(X, X),
        lambda: X.nonzero(),
        lambda: X[X > 0],
        lambda: torch.tensor(1.0),
    ],
)
def test_what_waits_for_the_device_raises(work: Callable[[], object]) -> None:
    with pytest.raises(HostRead):
        EmulatedGraph().record(lambda: [work(), None][1])
