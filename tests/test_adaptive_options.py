"""Options and tolerances of adaptive methods: what they do to the steps, and what is refused."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from adaptive_problems import PROBLEMS, Counted, linear, tensor
from torch import Tensor

from rampde import odeint
from rampde.methods import ADAPTIVE

F64 = torch.float64

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
