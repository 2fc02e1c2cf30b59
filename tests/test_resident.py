"""Solves whose steps are decided on the device: those of the loop of the host, with one look in some attempts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from emulated_graph import EmulatedGraph, HostRead
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rampde
from rampde import explicit, odeint
from rampde.error_norm import ErrorNorm
from rampde.problem import Problem
from rampde.resident import ATTEMPTS_A_POLL, Resident, integrate_resident, plainly

METHODS = ("dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun")
FEW = torch.tensor([0.0, 0.7, 3.0], dtype=torch.float64)
# many of them in every step, one at the very end of none but the last
MANY = torch.linspace(1.0, -1.5, 60, dtype=torch.float64)
TIMES = {"few": FEW, "many, in reverse": MANY}


class Net(torch.nn.Module):
    """A velocity that changes so fast now and then that steps are rejected."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 16, dtype=dtype), torch.nn.Tanh(), torch.nn.Linear(16, 3, dtype=dtype)
        )
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return self.layers(y) * (1 + 3 * torch.exp(-20 * (t - 0.4) ** 2))


@dataclass
class Loops:
    """Which loop solves, with what: nothing for that of the host."""

    resident: bool = False
    attempts: int = ATTEMPTS_A_POLL
    record: Callable[..., Any] = plainly
    integrate: Callable[..., list[Tensor]] = integrate_resident
    problems: list[Problem] = field(default_factory=list)
    served: int = 0


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loops]:
    """Decides the steps on the device where ``resident`` is set and the solve is served."""
    found = Loops()
    out = explicit.SteppingRoads.out

    def integrate(self: Any, problem: Problem, y0: list[Tensor], kept: Any) -> list[Tensor]:
        found.problems.append(problem)
        if not (found.resident and Resident.serves(problem, kept)):
            return out(self, problem, y0, kept)
        found.served += 1
        return found.integrate(problem, y0, kept, record=found.record, attempts=found.attempts)

    monkeypatch.setattr(explicit.SteppingRoads, "out", integrate)
    return found


@dataclass
class Solution:
    values: list[Tensor]
    gradients: list[Tensor]
    steps: list[Any]
    outputs: list[Any]


def tensors(y: Any) -> list[Tensor]:
    return list(y) if isinstance(y, tuple) else [y]


def solve(
    loops: Loops, net: Net, y0: Any, t: Tensor, f: Any = None, resident: bool = True, **arguments: Any
) -> Solution:
    """A solve, and the gradient of what depends on all of its outputs."""
    loops.resident = resident
    leaves = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in tensors(y0)]
    state: Any = tuple(leaves) if isinstance(y0, tuple) else leaves[0]
    arguments = {"rtol": 1e-4, "atol": 1e-5, "checkpoint": "step"} | arguments
    before = loops.served
    y = tensors(odeint(net if f is None else f, state, t, **arguments))
    assert loops.served - before == resident
    weights = torch.linspace(0.5, 1.0, len(t))
    loss = sum((torch.sin(leaf.double()).flatten(1).sum(1) * weights).sum() for leaf in y)
    gradients = torch.autograd.grad(loss, [*leaves, *net.parameters()])
    problem = loops.problems[-1]
    return Solution([leaf.detach() for leaf in y], list(gradients), problem.step_times.attempts, problem.grid.outputs)


def assert_close(found: Solution, expected: Solution, dtype: torch.dtype) -> None:
    """The same steps, and results that differ by the roundings of ``dtype`` in as many steps."""
    assert len(found.steps) == len(expected.steps)
    for mine, theirs in zip(found.steps, expected.steps, strict=True):
        # a step size follows from those before it
        allowed = 1e4 * torch.finfo(torch.float64).eps if dtype == torch.float64 else torch.finfo(dtype).eps
        assert math.isclose(mine.h, theirs.h, rel_tol=allowed * len(found.steps))
        assert mine.end == mine.start + mine.h
    assert [(o.step, o.inside) for o in found.outputs] == [(o.step, o.inside) for o in expected.outputs]
    roundoff = 4 * torch.finfo(dtype).eps * len(found.steps)
    pairs = zip((*found.values, *found.gradients), (*expected.values, *expected.gradients), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        scale = float(theirs.abs().sum() / max(theirs.numel(), 1))
        assert bool(((mine - theirs).abs() <= roundoff * (scale + theirs.abs())).all())


def assert_same(found: Solution, expected: Solution) -> None:
    """The same in all bits."""
    assert found.steps == expected.steps
    assert found.outputs == expected.outputs
    pairs = zip((*found.values, *found.gradients), (*expected.values, *expected.gradients), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of the host does not measure the rounding of f again when a step fails."""
    measure = ErrorNorm.measure
    monkeypatch.setattr(ErrorNorm, "measure", lambda self, *at: self._judged() if self._parts else measure(self, *at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("method", METHODS)
def test_solves_as_the_host_does(loops: Loops, method: str, times: str, dtype: torch.dtype) -> None:
    net, y0 = Net(dtype), torch.randn(5, 3, dtype=dtype)
    arguments: dict[str, Any] = {"method": method, "options": {"first_step": 0.5}}
    expected = solve(loops, net, y0, TIMES[times], resident=False, **arguments)
    found = solve(loops, net, y0, TIMES[times], **arguments)
    assert_close(found, expected, dtype)
    assert any(output.inside for output in found.outputs)
    for loops.attempts in (1, 3):
        assert_same(solve(loops, net, y0, TIMES[times], **arguments), found)


@pytest.mark.parametrize("checkpoint", ["step", "lean"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
@pytest.mark.usefixtures("measured_once")
def test_solves_in_16_bits_as_the_host_does(loops: Loops, method: str, precision: torch.dtype, checkpoint: str) -> None:
    net, y0 = Net(), torch.randn(5, 3)
    arguments: dict[str, Any] = {"method": method, "rtol": 1e-2, "atol": 1e-3, "checkpoint": checkpoint}
    with torch.autocast("cpu", precision):
        expected = solve(loops, net, y0, FEW, resident=False, **arguments)
        found = solve(loops, net, y0, FEW, **arguments)
        loops.record = EmulatedGraph().record
        assert_same(solve(loops, net, y0, FEW, **arguments), found)
    assert_close(found, expected, precision)


@pytest.mark.parametrize("controller", ["PI", "PID"])
@pytest.mark.parametrize("bounds", [{}, {"min_step": 0.05, "max_step": 0.2}], ids=str)
def test_follows_the_options(loops: Loops, controller: str, bounds: dict[str, float]) -> None:
    net, y0 = Net(torch.float64), torch.randn(5, 3, dtype=torch.float64)
    options = {"controller": controller, **bounds}
    expected = solve(loops, net, y0, FEW, resident=False, options=options)
    assert_close(solve(loops, net, y0, FEW, options=options), expected, torch.float64)


@pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
@pytest.mark.usefixtures("measured_once")
def test_several_leaves(loops: Loops, method: str) -> None:
    """Of dtypes of their own, one of them without elements; tolerances may differ, too."""
    net = Net()
    y0 = (torch.randn(5, 3), torch.randn(4, dtype=torch.float64), torch.randn(2).bfloat16(), torch.randn(0, 3))

    def f(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shift = y[0].sum().double()
        return net(t, y[0]), torch.cos(t) * y[1] + 0.1 * shift, -y[2] * (1 + t).to(y[2].dtype), y[3]

    arguments: dict[str, Any] = {"f": f, "method": method, "rtol": (1e-4, 1e-5, 1e-2, 1e-4), "atol": 1e-4}
    expected = solve(loops, net, y0, FEW, resident=False, **arguments)
    found = solve(loops, net, y0, FEW, **arguments)
    assert_close(found, expected, torch.float32)
    loops.record, loops.attempts = EmulatedGraph().record, 3
    assert_same(solve(loops, net, y0, FEW, **arguments), found)


def test_any_memory_format(loops: Loops) -> None:
    net = Net()
    y0 = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return net(t, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    expected = solve(loops, net, y0, MANY, f, resident=False)
    found = solve(loops, net, y0, MANY, f)
    assert_close(found, expected, torch.float32)
    assert found.values[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_a_graph_of_the_attempts_solves_alike(loops: Loops, method: str, times: str) -> None:
    net, y0 = Net(), torch.randn(5, 3)
    arguments: dict[str, Any] = {"method": method, "options": {"first_step": 0.5}}
    expected = solve(loops, net, y0, TIMES[times], **arguments)
    graph = EmulatedGraph()
    loops.record = graph.record
    found = solve(loops, net, y0, TIMES[times], **arguments)
    assert_same(found, expected)
    attempts = graph.replays * ATTEMPTS_A_POLL
    assert len(found.steps) < attempts
    assert attempts - len(found.steps) > ATTEMPTS_A_POLL or len(found.steps) < ATTEMPTS_A_POLL


def test_recording_may_run_the_work(loops: Loops) -> None:
    net, y0 = Net(), torch.randn(5, 3)
    expected = solve(loops, net, y0, MANY)

    def warmed_up(work: Callable[[], None]) -> Callable[[], None]:
        for _ in range(3):
            work()
        return EmulatedGraph().record(work)

    loops.record = warmed_up
    assert_same(solve(loops, net, y0, MANY), expected)


def test_the_graph_is_recorded_once_and_evaluates_f_no_more(loops: Loops) -> None:
    net, y0 = Net(), torch.randn(5, 3)
    loops.record = EmulatedGraph().record
    counts = []
    for t in (torch.tensor([0.0, 0.5]), torch.tensor([0.0, 8.0])):
        net.evaluations = 0
        loops.resident = True
        with torch.no_grad():
            odeint(net, y0, t, rtol=1e-6, atol=1e-6)
        counts.append(net.evaluations)
    # the first two for the first stage and the size of the first step
    assert counts == [2 + 6 * ATTEMPTS_A_POLL] * 2


class Count(TorchDispatchMode):
    """Names of the operators that are called, and how often tensors are read as lists, which calls none."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.lists = 0
        self._functions = _Lists(self)

    def __enter__(self) -> Count:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._functions.__exit__(*reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.lists += func in (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__)
        return func(*args, **(kwargs or {}))


def count(monkeypatch: pytest.MonkeyPatch, loops: Loops, t: Tensor, method: str, leaves: int) -> tuple[Any, Count]:
    """The graph of a solve, and what is called from its recording on."""
    graph, counted = EmulatedGraph(), Count()

    def integrate(problem: Problem, y0: list[Tensor], kept: Any, **options: Any) -> list[Tensor]:
        resident = Resident(problem, list(y0), kept)
        with counted:
            resident.run(graph.record)
        return resident.leaves

    loops.integrate, loops.resident = integrate, True
    a = [torch.full((3,), -0.3 * (n + 1), requires_grad=True) for n in range(leaves)]
    y0 = torch.ones(3) if leaves == 1 else tuple(torch.ones(3) for _ in range(leaves))

    def f(t: Tensor, y: Any) -> Any:
        found = tuple(rate * leaf for rate, leaf in zip(a, tensors(y), strict=True))
        return found[0] if leaves == 1 else found

    odeint(f, y0, t, method=method, rtol=1e-6, atol=1e-8, checkpoint="step")
    return graph, counted


@pytest.mark.parametrize("leaves", [1, 3])
@pytest.mark.parametrize(("method", "evaluations"), [("dopri5", 6), ("dopri8", 13), ("bosh3", 3), ("fehlberg2", 3)])
def test_launches_of_an_attempt(
    monkeypatch: pytest.MonkeyPatch, loops: Loops, method: str, evaluations: int, leaves: int
) -> None:
    few, many = torch.tensor([0.0, 2.0]), torch.linspace(0.0, 2.0, 300)
    graph, counted = count(monkeypatch, loops, few, method, leaves)
    launched = Counter(graph.operators)
    # inputs of the stages, error and decision of all leaves; of each leaf what the step leaves behind; and f itself
    own = {"mul": evaluations * leaves, "step_control": 1, "step_commit": leaves}
    of_all = {name: n for name, n in launched.items() if "rk_stage" in name or "rk_error" in name}
    rest = {name.split("::")[1]: n for name, n in launched.items() if name not in of_all}
    allocated = sum(rest.pop(name, 0) for name in ("empty_like", "cat"))
    assert rest == {name: n * ATTEMPTS_A_POLL for name, n in own.items()}
    stages = sum(n for name, n in of_all.items() if "rk_stage" in name)
    # a method whose error does not need the last stage has the state at the end from the operator of the error
    from_error = method in ("dopri8", "fehlberg2")
    each = 1 if "rampde::rk_stage_leaves" in launched else leaves
    assert stages == (evaluations - from_error) * each * ATTEMPTS_A_POLL
    assert sum(of_all.values()) - stages in (ATTEMPTS_A_POLL, leaves * ATTEMPTS_A_POLL)
    assert allocated <= (leaves + 1) * ATTEMPTS_A_POLL
    # as many with three hundred outputs
    again, _ = count(monkeypatch, loops, many, method, leaves)
    assert again.operators == graph.operators
    assert counted.operators["rampde::step_control"] > 0


def test_the_host_looks_once_a_poll(monkeypatch: pytest.MonkeyPatch, loops: Loops) -> None:
    for t in (torch.tensor([0.0, 2.0]), torch.linspace(0.0, 20.0, 300)):
        graph, counted = count(monkeypatch, loops, t, "dopri5", 1)
        assert counted.lists == graph.replays > 0
        for name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"):
            assert counted.operators[f"aten::{name}"] == 0
    assert graph.replays > 3


def test_a_func_that_reads_the_device_cannot_be_recorded(loops: Loops) -> None:
    loops.resident, loops.record = True, EmulatedGraph().record
    with pytest.raises(HostRead, match="reads a number"):
        odeint(lambda t, y: -y * float(y.sum()), torch.ones(3), FEW)


def errors(loops: Loops, f: Any, t: Tensor, **arguments: Any) -> list[str]:
    """What both loops say."""
    messages = []
    for loops.resident in (False, True):
        with pytest.raises(RuntimeError) as caught:
            odeint(f, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64), t, **arguments)
        messages.append(str(caught.value))
    assert loops.served == 1
    return messages


@pytest.mark.parametrize(
    ("f", "options", "message"),
    [
        (lambda t, y: y**2, {}, "underflow in the step size"),
        (lambda t, y: torch.where(t < 0.5, -y, torch.nan), {}, "underflow in the step size"),
        (lambda t, y: -y * torch.cos(5 * t), {"max_num_steps": 9}, r"max_num_steps exceeded \(9 >= 9\)"),
        (lambda t, y: torch.where(t < 0.5, -y, torch.nan), {"min_step": 0.01}, "non-finite values in the state"),
    ],
)
def test_raises_the_errors_of_the_host(loops: Loops, f: Any, options: dict[str, Any], message: str) -> None:
    host, device = errors(loops, f, FEW, options=options)
    assert host == device
    with pytest.raises(RuntimeError, match=message):
        odeint(f, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64), FEW, options=options)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0], 0 * y[2]])


def test_names_a_stiff_problem(loops: Loops) -> None:
    arguments: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6, "options": {"max_num_steps": 300}}
    messages = errors(loops, van_der_pol, torch.tensor([0.0, 100.0]), **arguments)
    assert all("The problem is stiff here" in message for message in messages), messages


def test_warns_of_rounding(loops: Loops) -> None:
    loops.resident = True
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="cannot be reached with velocities"):
        odeint(Net(), torch.randn(5, 3), FEW, rtol=1e-6, atol=1e-6)


def norm(error: Tensor) -> Tensor:
    return error.abs().max()


class Told(Net):
    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        pass


@pytest.mark.parametrize(
    "changed",
    [
        {"options": {"step_t": [0.3]}},
        {"options": {"jump_t": [0.3]}},
        {"options": {"norm": norm}},
        {"options": {"dtype": torch.float32}},
        {"options": {"batch_axis": 0}},
        {"atol": torch.tensor([1e-5, 1e-4, 1e-5])},
        {"compensated": True},
        {"t": FEW.clone().requires_grad_()},
        {"func": Told()},
        {"func": lambda t, y: torch.nn.functional.dropout(y, 0.1)},
        {"y0": torch.randn(5, 3, dtype=torch.complex64), "func": lambda t, y: 1j * y},
        {"checkpoint": "none"},
        {"checkpoint": "stage"},
        {"checkpoint": rampde.Fp8()},
        {"checkpoint": "tape"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_not_served_is_solved_by_the_host(loops: Loops, changed: dict[str, Any]) -> None:
    arguments = {"func": Net(), "y0": torch.randn(5, 3), "t": FEW, "rtol": 1e-3, "atol": 1e-3, "checkpoint": "step"}
    arguments |= changed
    arguments["y0"].requires_grad_()
    solutions = []
    for loops.resident in (False, True):
        torch.manual_seed(0)
        solutions.append(odeint(**arguments))
        solutions[-1].abs().sum().backward()
    assert loops.served == 0
    assert torch.equal(*solutions)


def test_statistics_and_events_are_left_to_the_host(loops: Loops) -> None:
    loops.resident = True
    with rampde.stats() as stats:
        odeint(Net(), torch.randn(5, 3), FEW)
    assert stats.accepted > 0
    rampde.odeint_event(
        lambda t, y: -y, torch.ones(3), torch.tensor(0.0), event_fn=lambda t, y: y[0] - 0.5, method="dopri5"
    )
    assert loops.served == 0


def test_without_gradients_nothing_is_kept(loops: Loops) -> None:
    net, y0 = Net(), torch.randn(5, 3)
    loops.resident = True
    with torch.no_grad():
        y = odeint(net, y0, MANY, rtol=1e-4, atol=1e-5)
    assert loops.served == 1
    assert not y.requires_grad
    assert torch.equal(y, solve(loops, net, y0, MANY).values[0])


def test_bytes_kept_for_the_backward_pass(loops: Loops) -> None:
    """The rounded state of each accepted step, and nothing of what the attempts share."""
    net, y0 = Net(), torch.randn(16, 3)
    loops.resident = True
    totals, steps = [], []
    for end in (1.0, 20.0):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            odeint(net, y0, torch.tensor([0.0, end]), rtol=1e-2, atol=1e-2, checkpoint="step")
        totals.append(sum(kept.values()))
        steps.append(len(loops.problems[-1].step_times))
    assert steps[1] > steps[0]
    assert totals[1] - totals[0] == (steps[1] - steps[0]) * y0.numel() * 2
