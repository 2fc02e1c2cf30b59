"""Adaptive methods: the steps of torchdiffeq, options, tolerances, errors that end a solve."""

import math
import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from steps import equal_steps
from torch import Tensor

import rampde
from rampde import odeint
from rampde.methods import ADAPTIVE
from rampde.options import CONTROLLERS

F64 = torch.float64


class Counted:
    """A func that counts its evaluations and notes the steps that were accepted and rejected."""

    def __init__(self, func: Callable[[Tensor, Any], Any]) -> None:
        self.func = func
        self.calls = 0
        self.times: list[float] = []
        self.accepted: list[tuple[float, float]] = []
        self.rejected: list[tuple[float, float]] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        self.times.append(float(t))
        return self.func(t, y)

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.accepted.append((float(t0), float(dt)))

    def callback_reject_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.rejected.append((float(t0), float(dt)))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def linear(t: Tensor, y: Tensor) -> Tensor:
    matrix = torch.tensor([[-0.3, 1.1], [-0.9, 0.2]], dtype=y.dtype)
    return (1 + t * t) * y @ matrix + torch.sin(3 * t)


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    prey, predators = y
    return torch.stack([1.5 * prey - prey * predators, prey * predators - 3 * predators])


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -9.81 * torch.sin(y[0]) - 0.1 * y[1]])


def arenstorf(t: Tensor, y: Tensor) -> Tensor:
    """A satellite around the Earth and the Moon (Hairer, Norsett, Wanner I, II.0, eq. 0.1)."""
    moon = 0.012277471
    x1, x2, v1, v2 = y
    d1 = ((x1 + moon) ** 2 + x2**2) ** 1.5
    d2 = ((x1 - 1 + moon) ** 2 + x2**2) ** 1.5
    a1 = x1 + 2 * v2 - (1 - moon) * (x1 + moon) / d1 - moon * (x1 - 1 + moon) / d2
    a2 = x2 - 2 * v1 - (1 - moon) * x2 / d1 - moon * x2 / d2
    return torch.stack([v1, v2, a1, a2])


def van_der_pol(mu: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


PROBLEMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "linear": (linear, torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=F64), torch.linspace(0, 2, 7, dtype=F64)),
    "lotka-volterra": (lotka_volterra, tensor(1.0, 1.0), torch.linspace(0, 8, 20, dtype=F64)),
    "pendulum": (pendulum, tensor(3.0, 0.0), torch.linspace(0, 5, 11, dtype=F64)),
    "reverse": (pendulum, tensor(1.0, -0.3), torch.linspace(2, -1, 5, dtype=F64)),
    # before the close approach to the Moon at the end of the period, which magnifies every rounding
    "arenstorf": (arenstorf, tensor(0.994, 0.0, 0.0, -2.00158510637908252240537862224), tensor(0.0, 5.0, 10.0)),
}


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_takes_the_steps_of_torchdiffeq(problem: str, method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    func, y0, t = PROBLEMS[problem]
    ours, theirs = Counted(func), Counted(func)
    tolerance: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8, "method": method}
    if method == "dopri8":
        # the step that is chosen for the start is so small that the estimate of its error is nothing but rounding
        tolerance["options"] = {"first_step": 5e-3 if problem == "arenstorf" else 0.5}
    elif method == "bosh3":
        # between the ends of steps ours is of order 3 and theirs of order 1
        tolerance["options"] = {"step_t": t[1:]}
    y = odeint(ours, y0, t, **tolerance)
    expected = torchdiffeq.odeint(theirs, y0, t, **tolerance)
    assert (y - expected).abs().max() < 1e-10
    assert len(ours.accepted) == len(theirs.accepted) >= 3
    assert len(ours.rejected) == len(theirs.rejected)
    # torchdiffeq tells callbacks the negated time where time is reversed
    sign = -1.0 if t[-1] < t[0] else 1.0
    span = float((t[-1] - t[0]).abs())
    for (start, size), (their_start, their_size) in zip(ours.accepted, theirs.accepted, strict=True):
        # an error of 1e-8 is estimated from velocities up to 1e4 times as large as the state, whose rounding (1e-16)
        # shows in the fourth digit of the estimate at worst
        assert min(abs(start - their_start), abs(start - sign * their_start)) <= 1e-5 * span
        assert abs(size - their_size) <= 1e-4 * their_size
    assert ours.calls <= theirs.calls


OPTIONS: list[dict[str, Any]] = [
    {"first_step": 0.013},
    {"safety": 0.7},
    {"ifactor": 1.5},
    {"dfactor": 0.6, "first_step": 1.0},
    {"max_step": 0.05},
    {"min_step": 0.2},
    {"step_t": tensor(0.7, 0.31)},
    {"jump_t": tensor(0.5, 1.1)},
    {"step_t": tensor(0.3), "jump_t": tensor(0.5)},
    {"norm": lambda y: y.abs().max()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("reverse", [False, True])
def test_options_mean_what_they_mean_in_torchdiffeq(options: dict[str, Any], reverse: bool) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    func, y0, t = PROBLEMS["linear"]
    t = t.flip(0) if reverse else t
    ours, theirs = Counted(func), Counted(func)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7, "options": options}
    y = odeint(ours, y0, t, **tolerance)
    expected = torchdiffeq.odeint(theirs, y0, t, **tolerance)
    assert len(ours.accepted) == len(theirs.accepted)
    assert len(ours.rejected) == len(theirs.rejected)
    for (_, size), (_, their_size) in zip(ours.accepted, theirs.accepted, strict=True):
        assert abs(size - their_size) <= 1e-6 * their_size
    assert (y - expected).abs().max() < 1e-10
    assert odeint(func, y0, t, rtol=1e-5, atol=1e-7).sub(y).abs().max() > 1e-13  # the option is not idle


def test_options_are_not_changed() -> None:
    func, y0, t = PROBLEMS["linear"]
    options = {"first_step": 0.1, "step_t": tensor(0.3, 0.1)}
    odeint(func, y0, t, options=options)
    assert set(options) == {"first_step", "step_t"}
    assert torch.equal(torch.as_tensor(options["step_t"]), tensor(0.3, 0.1))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_first_step_and_bounds_of_the_step(method: str) -> None:
    func, y0, t = PROBLEMS["pendulum"]
    counted = Counted(func)
    odeint(counted, y0, t, method=method, rtol=1e-4, atol=1e-4, options={"first_step": 1e-3, "max_step": 0.02})
    assert counted.accepted[0] == (0.0, 1e-3)
    assert max(size for _, size in counted.accepted) <= 0.02
    counted = Counted(func)
    odeint(counted, y0, t, method=method, rtol=1e-12, atol=1e-12, options={"min_step": 0.01, "first_step": 0.1})
    sizes = [size for _, size in counted.accepted]
    assert min(sizes) >= 0.01
    # a step of min_step stands, whatever its error
    assert sizes.count(0.01) > len(sizes) // 2 or method == "dopri8"


@pytest.mark.parametrize("name", ["ifactor", "dfactor"])
def test_step_sizes_change_by_no_more_than_the_factors(name: str) -> None:
    func, y0, t = PROBLEMS["pendulum"]
    counted = Counted(func)
    factor = {"ifactor": 1.1, "dfactor": 0.9}[name]
    first_step = {"ifactor": 1e-4, "dfactor": 2.0}[name]
    odeint(counted, y0, t, rtol=1e-6, atol=1e-6, options={name: factor, "first_step": first_step})
    if name == "ifactor":
        sizes = [size for _, size in counted.accepted]
        pairs = pairwise(sizes)
        ratios = [after / before for before, after in pairs]
        assert max(ratios) <= 1.1 * (1 + 1e-9)
        assert sum(ratio > 1.1 * (1 - 1e-9) for ratio in ratios) > 20
    else:
        sizes = [size for _, size in counted.rejected]
        assert len(sizes) > 10
        assert all(after >= 0.9 * before * (1 - 1e-9) for before, after in pairwise(sizes))


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_end_at_step_t(reverse: bool) -> None:
    func, y0, t = PROBLEMS["linear"]
    t = t.flip(0) if reverse else t
    # unsorted, some outside of the interval
    step_t = [1.7, 0.11, 0.9, 5.0, -3.0]
    counted = Counted(func)
    y = odeint(counted, y0, t, rtol=1e-6, atol=1e-6, options={"step_t": step_t})
    starts = {start for start, _ in counted.accepted}
    assert {1.7, 0.11, 0.9} <= starts
    assert (y - odeint(func, y0, t, rtol=1e-10, atol=1e-10)).abs().max() < 1e-4


def test_output_times_do_not_change_the_steps() -> None:
    func, y0, _ = PROBLEMS["pendulum"]
    few, many = Counted(func), Counted(func)
    ends = odeint(few, y0, tensor(0, 5), rtol=1e-6, atol=1e-6)
    y = odeint(many, y0, torch.linspace(0, 5, 60, dtype=F64), rtol=1e-6, atol=1e-6)
    assert few.accepted == many.accepted
    assert few.calls == many.calls
    assert torch.equal(y[-1], ends[-1])


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("reverse", [False, True])
def test_jump(method: str, reverse: bool) -> None:
    """f is evaluated on the right side of a jump: the solve equals two solves of smooth problems."""
    jump = 0.6180339

    def before(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y) + t

    def after(t: Tensor, y: Tensor) -> Tensor:
        return -3 * y + torch.cos(t)

    first, second = (after, before) if reverse else (before, after)

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert float(t) != jump
        return before(t, y) if t < jump else after(t, y)

    start, end = (1.5, 0.0) if reverse else (0.0, 1.5)
    y0 = tensor(0.3, -1.0)
    tight: dict[str, Any] = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    counted = Counted(func)
    y = odeint(counted, y0, tensor(start, jump, end), options={"jump_t": [jump]}, **tight)
    # times are rounded to float64 next to the jump: the neighbours on both sides were asked for
    below, above = math.nextafter(jump, 0.0), math.nextafter(jump, 2.0)
    assert below in counted.times
    assert above in counted.times
    to_jump = odeint(first, y0, tensor(start, jump), options={"step_t": [jump]}, **tight)[-1]
    assert (y[1] - to_jump).abs().max() <= 1e-14
    # the solve goes on with the step size that it had, from a time that is one unit in the last place away
    size = dict(counted.accepted)[jump]
    from_jump = odeint(second, y[1], tensor(jump, end), options={"first_step": size}, **tight)[-1]
    assert (y[2] - from_jump).abs().max() <= 1e-12 * from_jump.abs().max()
    # without knowing of the jump the controller must find it by rejections
    unaware = Counted(lambda t, y: before(t, y) if t < jump else after(t, y))
    odeint(unaware, y0, tensor(start, end), **tight)
    assert len(counted.rejected) < len(unaware.rejected)


@pytest.mark.parametrize("policy", ["step", "none", "tape"])
def test_jump_is_seen_by_the_gradient(policy: str) -> None:
    """The sweep evaluates f on the same side as the solve did: two linear problems have the product of factors."""
    jump, rates = 0.37, torch.tensor([0.7, -1.9], dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.3], dtype=F64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (rates[0] if t < jump else rates[1]) * y

    y = odeint(func, y0, tensor(0, 1), rtol=1e-11, atol=1e-11, options={"jump_t": [jump]}, checkpoint=policy)[-1]
    exact = y0 * torch.exp(rates[0] * jump + rates[1] * (1 - jump))
    found = torch.autograd.grad(y.sum(), [y0, rates])
    expected = torch.autograd.grad(exact.sum(), [y0, rates])
    assert all((a - b).abs().max() <= 100 * 1e-11 for a, b in zip(found, expected, strict=True))


def test_norm_is_called_with_the_structure_of_the_state() -> None:
    y0 = {"a": tensor(1.0, 2.0), "b": [torch.ones(2, 3, dtype=F64)]}
    seen = []

    def norm(y: Any) -> Tensor:
        assert set(y) == {"a", "b"}
        assert y["a"].shape == (2,)
        assert y["b"][0].shape == (2, 3)
        seen.append(y)
        return y["a"].abs().max()

    counted = Counted(lambda t, y: {"a": -y["a"], "b": [100 * torch.cos(50 * t) * y["b"][0]]})
    odeint(counted, y0, tensor(0, 1), rtol=1e-3, atol=1e-3, options={"norm": norm})
    assert len(seen) >= len(counted.accepted) + len(counted.rejected)
    # what the norm does not look at does not hold the steps back
    plain = Counted(counted.func)
    odeint(plain, y0, tensor(0, 1), rtol=1e-3, atol=1e-3)
    assert len(plain.accepted) > 4 * len(counted.accepted)


def test_norm_of_a_tuple_is_that_of_its_worst_piece() -> None:
    """A passive piece, however large, does not dilute the error of another one."""
    func, y0, t = PROBLEMS["pendulum"]
    alone, together = Counted(func), Counted(lambda t, y: (func(t, y[0]), torch.zeros_like(y[1])))
    y = odeint(alone, y0, t, rtol=1e-6, atol=1e-8)
    first, _ = odeint(together, (y0, torch.zeros(1000, dtype=F64)), t, rtol=1e-6, atol=1e-8)
    # the first step looks at the largest piece of each norm: the same
    assert alone.accepted == together.accepted
    assert torch.equal(y, first)


def test_tolerances_per_element_and_per_leaf() -> None:
    """One number, a tensor of the same numbers and one for each leaf mean the same; a loose element is not watched."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], 30 * torch.cos(30 * t)])

    y0, t = tensor(1.0, 0.0), tensor(0, 1)

    def steps(rtol: Any, atol: Any) -> tuple[Tensor, list[tuple[float, float]]]:
        counted = Counted(func)
        return odeint(counted, y0, t, rtol=rtol, atol=atol)[-1], counted.accepted

    y, expected = steps(1e-5, 1e-6)
    for rtol, atol in ((1e-5, torch.full((2,), 1e-6)), (torch.full((2,), 1e-5, dtype=F64), [1e-6, 1e-6])):
        found, accepted = steps(rtol, atol)
        assert len(accepted) == len(expected)
        # one is the fused operator, the other is plain arithmetic
        assert (found - y).abs().max() <= 1e-9
    _, loose = steps(1e-5, tensor(1e-6, 1e3))
    assert len(loose) < len(expected) / 3

    def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -state[0], 30 * torch.cos(30 * t) + 0 * state[1]

    def steps_of_pair(rtol: Any, atol: Any) -> int:
        counted = Counted(pair)
        odeint(counted, (y0[0], y0[1]), t, rtol=rtol, atol=atol)
        return len(counted.accepted)

    assert steps_of_pair((1e-5, 1e-5), [1e-6, 1e-6]) == steps_of_pair(1e-5, 1e-6)
    assert steps_of_pair(1e-5, (1e-6, 1e3)) < steps_of_pair(1e-5, 1e-6) / 3
    assert steps_of_pair(1e-5, (1e-6, torch.tensor(1e3))) == steps_of_pair(1e-5, (1e-6, 1e3))


def test_dtype_of_time() -> None:
    func, y0, t = PROBLEMS["pendulum"]
    wide, narrow = Counted(func), Counted(func)
    odeint(wide, y0, t, rtol=1e-6, atol=1e-6)
    odeint(narrow, y0, t, rtol=1e-6, atol=1e-6, options={"dtype": torch.float32})
    starts = [start for start, _ in narrow.accepted]
    assert all(float(torch.tensor(start, dtype=torch.float32)) == start for start in starts)
    assert not all(float(torch.tensor(start, dtype=torch.float32)) == start for start, _ in wide.accepted)


# the estimate of fehlberg2 is the error of a first-order method, made small by design: it does not bound its own
@pytest.mark.parametrize("method", [name for name in ADAPTIVE if name != "fehlberg2"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_reach_the_tolerance(controller: str, method: str) -> None:
    func, y0, t = PROBLEMS["linear"]
    exact = odeint(func, y0, t, method="dopri8", rtol=1e-12, atol=1e-12)
    y = odeint(func, y0, t, method=method, rtol=1e-4, atol=1e-4, options={"controller": controller})
    assert (y - exact).abs().max() <= 100 * 1e-4 * exact.abs().max()


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_choose_the_next_step_by_their_formula(controller: str) -> None:
    """``h_next = safety h r_n^-(p+i+d)/k r_{n-1}^(p+2d)/k r_{n-2}^-d/k`` after accepted steps."""
    func, y0, t = PROBLEMS["lotka-volterra"]
    # coefficients of the controller by its name, and the same ones by themselves
    named: dict[str, Any] = {"controller": controller}
    given = dict(zip(("pcoeff", "icoeff", "dcoeff"), CONTROLLERS[controller], strict=True))
    free = {"ifactor": 1e3, "dfactor": 1e-3, "first_step": 1e-2}
    with rampde.stats() as stats:
        by_name = odeint(func, y0, t, rtol=1e-5, atol=1e-5, options=named | free)
        by_number = odeint(func, y0, t, rtol=1e-5, atol=1e-5, options=given | free)
    assert torch.equal(by_name, by_number)
    solve = stats.solves[0]
    sizes, ratios = solve.step_sizes, [1.0, 1.0, *solve.error_ratios]
    p, i, d = CONTROLLERS[controller]
    rejected = set(solve.rejected_starts)
    checked = 0
    for n in range(len(sizes) - 1):
        if solve.starts[n + 1] in rejected:
            continue
        current, last, one_before = ratios[n + 2], ratios[n + 1], ratios[n]
        k = 5
        factor = 0.9 * current ** (-(p + i + d) / k) * last ** ((p + 2 * d) / k) * one_before ** (-d / k)
        if controller == "I":
            factor = max(factor, 1.0)
        assert sizes[n + 1] == pytest.approx(sizes[n] * factor, rel=1e-12)
        checked += 1
    assert checked > 20


def test_pi_controller_rejects_less_where_stability_limits_the_step() -> None:
    """The elementary controller oscillates around the limit of stability (Hairer, Wanner II, IV.2); a PI does not."""
    y0, t = tensor(1.0, 0.0), tensor(0, 10)

    def rejected(controller: str) -> int:
        counted = Counted(lambda t, y: torch.stack([-50 * (y[0] - torch.cos(t)), y[0] - y[1]]))
        odeint(counted, y0, t, rtol=1e-4, atol=1e-4, options={"controller": controller})
        return len(counted.rejected)

    assert rejected("PI") < rejected("I") / 2


def test_too_many_steps() -> None:
    func, y0, _ = PROBLEMS["pendulum"]
    counted = Counted(func)
    with pytest.raises(RuntimeError, match=r"max_num_steps exceeded \(7 >= 7\)") as caught:
        odeint(counted, y0, tensor(0, 5), options={"max_num_steps": 7})
    message = str(caught.value)
    assert len(counted.accepted) + len(counted.rejected) == 7
    reached = float(re.search(r"at t = (\S+)", message).group(1))  # type: ignore[union-attr]
    start, size = counted.accepted[-1]
    assert reached == pytest.approx(start + size, rel=1e-5)
    assert "stiff here" not in message
    assert "max_num_steps" in message.split(":", 1)[1]


def test_max_num_steps_counts_between_outputs() -> None:
    func, y0, _ = PROBLEMS["pendulum"]
    counted = Counted(func)
    y = odeint(counted, y0, torch.linspace(0, 5, 50, dtype=F64), rtol=1e-8, atol=1e-8, options={"max_num_steps": 12})
    assert len(counted.accepted) > 12
    assert torch.isfinite(y).all()


def test_number_of_steps_is_bounded_by_default() -> None:
    from rampde.options import MAX_NUM_STEPS, AdaptiveOptions

    assert AdaptiveOptions.read({}).max_num_steps == MAX_NUM_STEPS <= 10**6


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_a_stiff_problem_is_called_stiff(method: str) -> None:
    with pytest.raises(RuntimeError, match="stiff here") as caught:
        odeint(
            van_der_pol(1000.0),
            tensor(2.0, 0.0),
            tensor(0, 100),
            method=method,
            rtol=1e-4,
            atol=1e-6,
            options={"max_num_steps": 2000},
        )
    assert re.search(r'implicit method, such as "radauIIA5"', str(caught.value))
    # the method that is named solves it
    assert "radauIIA5" in rampde.METHODS


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_func_that_is_not_finite(method: str, poison: float) -> None:
    """From t = 0.5 on: a clear error after a bounded number of evaluations, at the place."""
    counted = Counted(lambda t, y: torch.where(t < 0.5, -y, poison))
    with pytest.raises(RuntimeError, match="not finite") as caught:
        odeint(counted, tensor(1.0), tensor(0, 1), method=method, rtol=1e-3, atol=1e-3)
    assert float(re.search(r"t = (\d\S*?)[,;: ]", str(caught.value)).group(1)) == pytest.approx(0.5)  # type: ignore[union-attr]
    # a few dozen halvings of a step, each time that one was accepted on the way
    assert len(counted.accepted) + len(counted.rejected) < 200
    with pytest.raises(RuntimeError, match=r"not finite.* t = 0"):
        odeint(lambda t, y: y * poison, tensor(1.0), tensor(0, 1), method=method)


@pytest.mark.parametrize("policy", ["step", "none", "tape"])
def test_min_step_does_not_accept_a_state_that_is_not_finite(policy: str) -> None:
    y0 = tensor(1.0).requires_grad_()
    with pytest.raises(RuntimeError, match=r"non-finite values in the state at t = 0\.\d+.*min_step"):
        odeint(
            lambda t, y: torch.where(t < 0.5, -y, math.nan),
            y0,
            tensor(0, 1),
            options={"min_step": 0.01},
            checkpoint=policy,
        )


def test_underflow_of_the_step() -> None:
    """A singularity at t = 1: y = 1 / (1 - t)."""
    counted = Counted(lambda t, y: y * y)
    with pytest.raises(RuntimeError, match=r"underflow in the step size.* t = 1[,. ]"):
        odeint(counted, tensor(1.0), tensor(0, 2), rtol=1e-6, atol=1e-6)
    assert counted.calls < 10_000


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_single_time_gives_the_initial_state(method: str) -> None:
    counted = Counted(linear)
    y0 = torch.ones(2, 2, dtype=F64, requires_grad=True)
    y = odeint(counted, y0, tensor(0.3), method=method)
    assert torch.equal(y, y0[None])
    assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.ones_like(y0))
    assert counted.calls == 0


@pytest.mark.parametrize("method", ADAPTIVE)
def test_evaluations_per_step(method: str) -> None:
    """One for the first step, one at the start, and the new stages of every attempt."""
    tableau = ADAPTIVE[method]
    func, y0, _ = PROBLEMS["pendulum"]
    counted = Counted(func)
    odeint(counted, y0, tensor(0, 1), method=method, rtol=1e-5, atol=1e-5, options={"step_t": [1.0]})
    accepted, rejected = len(counted.accepted), len(counted.rejected)
    closed = tableau.closed
    new = closed.attempted - 1
    # where the error does not need the velocity at the end, a rejected step never evaluates it, nor does the last one
    later = closed.stages - closed.attempted
    assert counted.calls == 2 + (accepted + rejected) * new + later * (accepted - 1)
    given = Counted(func)
    odeint(given, y0, tensor(0, 1), method=method, options={"first_step": 0.1} | equal_steps(0.125))
    assert given.calls == 1 + 8 * new + later * 7


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_compensated_sums_leave_the_steps_alone(method: str, compensated: bool) -> None:
    func, y0, t = PROBLEMS["pendulum"]
    expected = odeint(func, y0, t, method=method, rtol=1e-5, atol=1e-5)
    y = odeint(func, y0, t, method=method, rtol=1e-5, atol=1e-5, compensated=compensated)
    assert (y - expected).abs().max() <= 1e-11


def test_zero_velocity() -> None:
    """Nothing to estimate: the largest growth from step to step, and the exact answer."""
    counted = Counted(lambda t, y: torch.zeros_like(y))
    y = odeint(counted, tensor(1.0, 2.0), tensor(0, 1e6))
    assert torch.equal(y[1], tensor(1.0, 2.0))
    assert len(counted.accepted) < 30


def test_empty_state() -> None:
    y = odeint(lambda t, y: y, torch.ones(0, 3, dtype=F64), tensor(0, 1, 2))
    assert y.shape == (3, 0, 3)


def test_nothing_warns_on_the_common_roads() -> None:
    y0 = torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ADAPTIVE:
            for dtype in (None, torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    y = odeint(lambda t, y: torch.sin(y) - t, y0, torch.tensor([0.0, 0.4, 1.0]), rtol=1e-2, atol=1e-2)
                torch.autograd.grad(y.sum(), y0)
            assert method in ADAPTIVE


BAD_OPTIONS: list[tuple[str, object, str]] = [
    ("first_step", 0.0, "0.0"),
    ("first_step", -1, "-1"),
    ("first_step", "0.1", "'0.1'"),
    ("first_step", math.inf, "inf"),
    ("first_step", math.nan, "nan"),
    ("first_step", torch.ones(2), "[2]"),
    ("max_step", 0, "0"),
    ("max_step", math.nan, "nan"),
    ("min_step", -0.1, "-0.1"),
    ("min_step", math.inf, "inf"),
    ("min_step", math.nan, "nan"),
    ("safety", 0, "0"),
    ("safety", None, "None"),
    ("ifactor", 0.5, "0.5"),
    ("dfactor", 1.5, "1.5"),
    ("dfactor", 0, "0"),
    ("max_num_steps", 0, "0"),
    ("max_num_steps", 1.5, "1.5"),
    ("max_num_steps", True, "True"),
    ("step_t", 0.5, "0.5"),
    ("step_t", [0.5, 0.5], "0.5"),
    ("step_t", [math.nan], "nan"),
    ("step_t", "ab", "'ab'"),
    ("step_t", torch.ones(1, requires_grad=True), "requires_grad"),
    ("jump_t", [math.inf], "inf"),
    ("jump_t", [0.1, 0.2, 0.1], "0.1"),
    ("norm", 2, "2"),
    ("dtype", "float64", "'float64'"),
    ("dtype", torch.int64, "int64"),
    ("controller", "P", "'P'"),
    ("pcoeff", "a", "'a'"),
    ("icoeff", None, "None"),
    ("dcoeff", [1], "[1]"),
    ("batch_axis", 1, "1"),
    ("batch_tile", 0, "0"),
]


@pytest.mark.parametrize(("name", "value", "given"), BAD_OPTIONS)
def test_bad_options(name: str, value: object, given: str) -> None:
    counted = Counted(linear)
    with pytest.raises((ValueError, TypeError)) as caught:
        odeint(counted, torch.ones(2, 2, dtype=F64), tensor(0, 1), options={name: value})
    message = str(caught.value)
    assert name in message
    assert given in message
    assert "expected" in message or "must" in message or "cannot" in message
    assert len(message) < 500
    assert counted.calls == 0


def test_bounds_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"min_step is 0\.2 and max_step 0\.1"):
        odeint(linear, torch.ones(2, 2, dtype=F64), tensor(0, 1), options={"min_step": 0.2, "max_step": 0.1})
    with pytest.raises(ValueError, match=r"step_t and jump_t"):
        odeint(linear, torch.ones(2, 2, dtype=F64), tensor(0, 1), options={"step_t": [0.2], "jump_t": [0.2]})


def test_options_of_another_family_warn() -> None:
    with pytest.warns(UserWarning, match=r"dopri5: Unexpected arguments \{'step_size': 0\.1\}"):
        odeint(linear, torch.ones(2, 2, dtype=F64), tensor(0, 1), options={"step_size": 0.1})


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
def test_grad_mode_does_not_change_the_solution(checkpoint: str) -> None:
    func, y0, t = PROBLEMS["lotka-volterra"]
    with torch.no_grad():
        expected = odeint(func, y0, t, rtol=1e-5, atol=1e-5)
    y = odeint(func, y0.clone().requires_grad_(), t, rtol=1e-5, atol=1e-5, checkpoint=checkpoint)
    # the tape measures the error by other operations, the same to rounding
    assert (y - expected).abs().max() <= (0.0 if checkpoint != "tape" else 1e-9)
