"""A number of states whatever the number of steps: binomial checkpointing, and its form for steps not known before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

from rampde.checkpoint.policy import Checkpoint


class Binomial(Checkpoint):
    """Keeps ``states`` states of a solve, in full precision; the steps between them are taken again, as few as can be.

    On a grid that is known before, the placement is that of Griewank and Walther (Algorithm 799: revolve, ACM Trans.
    Math. Softw. 26, 2000): :func:`recomputed_steps` steps are taken again in all, and no schedule with as many states
    takes fewer. Where steps are decided on the way, the states at multiples of a distance are kept, which doubles
    whenever they become too many; the gaps are then swept by the binomial schedule.

    Gradients are those of "step" or "lean" to the bit: states that are reached again have the bits they had.
    """

    def __init__(self, states: int, stages: str = "step") -> None:
        """
        Args:
            states: how many states are kept, at least 1, the initial one included.
            stages: "step" or "lean": how the stages of a step come back from its state.

        Raises:
            TypeError, ValueError: an argument that is not as described.
        """
        if isinstance(states, bool) or not isinstance(states, int):
            raise TypeError(f"states is {states!r}, expected a positive integer")
        if states < 1:
            raise ValueError(f"states is {states}, expected a positive integer")
        if stages not in ("step", "lean"):
            raise ValueError(f'stages is {stages!r}, expected "step" or "lean"')
        super().__init__(stages)
        self.states = states

    @property
    def name(self) -> str:
        return str(self.states) if self.stages == "step" else f"{self.states} {self.stages}"

    @property
    def cheaper(self) -> str:
        if self.stages == "step":
            return f'rampde.Binomial({self.states}, "lean")'
        return super().cheaper if self.states > 1 else f"rampde.Offload({self!r})"

    def __repr__(self) -> str:
        return f"Binomial({self.states}, {self.stages!r})"

    def schedule(self, step: int, end: int | None, kept: Sequence[int]) -> Sequence[int]:
        if end is None:
            return self._thinned(step, kept)
        free = self.states - len(kept)
        if not kept:
            return (step,)
        if free < 1 or step != kept[-1] + split(end - kept[-1] + 1, free + 1):
            return kept
        return (*kept, step)

    def _thinned(self, step: int, kept: Sequence[int]) -> Sequence[int]:
        distance = kept[1] - kept[0] if len(kept) > 1 else 1
        if step % distance:
            return kept
        kept = (*kept, step)
        while len(kept) > self.states:
            distance *= 2
            kept = tuple(point for point in kept if point % distance == 0)
        return kept


def recomputed_steps(steps: int, states: int) -> int:
    """How many steps a sweep over ``steps`` steps takes again at least with ``states`` states kept, the first included.

    ``t(l, c) = r l - C(c + r, c + 1)`` with the smallest ``r`` for which ``C(c + r, c) >= l`` is what the reversal of
    ``l`` steps costs, the first way out included (Griewank, Optim. Methods Softw. 1, 1992, eq. 11). Here the way out
    ends at the loss, one step further, and is taken anyway: ``t(steps + 1, states) - steps`` is left.
    """
    length = steps + 1
    repeats = _repeats(length, states)
    return repeats * length - comb(states + repeats, states + 1) - steps


@lru_cache(maxsize=4096)
def split(length: int, states: int) -> int:
    """After how many of ``length`` steps the next state is to be kept, the one before them being one of ``states``.

    The optimum of ``m + t(m, states) + t(length - m, states - 1)``: both parts need as many repetitions as they would
    with any other optimal ``m``, which is the smallest of these. ``length`` itself where none is worth keeping.
    """
    if states == 1 or length < 2:
        return length
    repeats = _repeats(length, states)
    # both parts must stay within their bounds; the larger one keeps the states that are left busy
    return max(_reach(states, repeats - 2), length - _reach(states - 1, repeats), 1)


def _repeats(length: int, states: int) -> int:
    """How often a step is taken at most."""
    repeats = 0
    while _reach(states, repeats) < length:
        repeats += 1
    return repeats


def _reach(states: int, repeats: int) -> int:
    """How many steps can be reversed with ``states`` states, none of them taken more than ``repeats`` times."""
    return comb(states + repeats, states) if repeats >= 0 else 0
