"""Binomial checkpointing: never more recomputation than the optimum, never more states than asked for."""

from itertools import pairwise
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rampde.checkpoint import Binomial
from rampde.checkpoint.binomial import recomputed_steps, split


def way_out(policy: Binomial, steps: int, known: bool) -> list[int]:
    """Points that are kept when a solve has taken its steps."""
    kept: tuple[int, ...] = ()
    for step in range(steps):
        kept = tuple(policy.schedule(step, steps if known else None, kept))
        assert len(kept) <= policy.states
        assert kept[0] == 0
        assert list(kept) == sorted(set(kept))
    return list(kept)


def way_back(policy: Binomial, kept: list[int], steps: int) -> int:
    """How many steps are taken again to sweep all of them, as the solver does it."""
    again = 0
    for step in reversed(range(steps)):
        kept = [point for point in kept if point <= step]
        at = kept[-1]
        while at < step:
            if at not in kept:
                kept = list(policy.schedule(at, step, tuple(kept)))
            assert len(kept) <= policy.states
            again += 1
            at += 1
        if step in kept and step > 0:
            kept.remove(step)
    return again


@pytest.mark.parametrize("states", range(1, 21))
def test_no_more_than_the_closed_form(states):
    """For all numbers of steps up to 200: exactly the optimum."""
    for steps in range(1, 201):
        policy = Binomial(states)
        assert way_back(policy, way_out(policy, steps, known=True), steps) == recomputed_steps(steps, states)


def test_closed_form_is_that_of_the_optimal_recursion():
    """The least cost of the reversal by trying every place of the next state."""
    least: dict[tuple[int, int], int] = {}
    for states in range(1, 11):
        for length in range(1, 82):
            if length == 1:
                cost = 0
            elif states == 1:
                cost = length * (length - 1) // 2
            else:
                cost = min(m + least[m, states] + least[length - m, states - 1] for m in range(1, length))
            least[length, states] = cost
    for (length, states), cost in least.items():
        if length > 1:
            assert recomputed_steps(length - 1, states) == cost - (length - 1)


def test_closed_form_in_known_cases():
    assert recomputed_steps(10, 10) == 0
    assert recomputed_steps(10, 100) == 0
    assert recomputed_steps(10, 9) == 1
    assert recomputed_steps(10, 1) == 45
    # with C(c + r, c) - 1 steps, none is taken more than r times: 34 steps, 3 states, r = 4
    assert recomputed_steps(34, 3) == 4 * 35 - comb(7, 4) - 34


@given(st.integers(2, 500), st.integers(2, 30))
@settings(deadline=None)
def test_split_leaves_something_on_both_sides(length, states):
    assert 0 < split(length, states) < length


@given(st.integers(1, 300), st.integers(1, 20))
@settings(deadline=None)
def test_online_schedule(steps, states):
    """Where the number of steps is not known, states lie at equal distances, at most twice as far as they must."""
    policy = Binomial(states)
    kept = way_out(policy, steps, known=False)
    distances = {later - earlier for earlier, later in pairwise(kept)}
    assert len(distances) <= 1
    distance = distances.pop() if distances else None
    if distance is not None:
        assert distance & (distance - 1) == 0
        assert distance * (2 * states) >= steps
    way_back(policy, kept, steps)


@pytest.mark.parametrize(
    ("states", "stages", "error", "message"),
    [
        (0, "step", ValueError, "states is 0, expected a positive integer"),
        (True, "step", TypeError, "states is True, expected a positive integer"),
        (2.5, "step", TypeError, "states is 2.5, expected a positive integer"),
        (3, "stage", ValueError, 'stages is \'stage\', expected "step" or "lean"'),
        (3, "none", ValueError, 'stages is \'none\', expected "step" or "lean"'),
    ],
)
def test_bad_arguments(states, stages, error, message):
    with pytest.raises(error, match=message):
        Binomial(states, stages)
