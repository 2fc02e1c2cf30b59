"""Policies that keep the states of some steps: the steps between them are taken again, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.checkpoint.recomputed import Stages, first_stage, stages_of_step
from rampde.ops import rk_stage, rk_update
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.stages import evaluate_stages
from rampde.tableau import ClosedTableau


class SomeSteps(Checkpoints):
    """States in full precision, so that a step taken again ends where it did.

    They are held here and not by autograd: that would not let go of a state that has done its service before the
    backward pass is over.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.policy = problem, problem.checkpoint
        self._kept: dict[int, list[Any]] = {}
        self._random: list[tuple[RandomState, ...]] = []
        self._count = 0
        # where the solve will arrive; not known where steps are decided on the way
        self._end = None if problem.closed is not None else problem.grid.steps

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        self._schedule(self._count, self._end, start)
        self._random.append(start.random)
        self._count += 1

    def _schedule(self, step: int, end: int | None, start: StepStart) -> None:
        before = sorted(self._kept)
        after = set(self.policy.schedule(step, end, tuple(before)))
        if not after.issubset((*before, step)) or 0 not in after:
            raise ValueError(
                f"the schedule of {self.policy!r} gave {sorted(after)} before step {step}, expected some of"
                f" {[*before, step]}, 0 among them"
            )
        for point in before:
            if point not in after:
                del self._kept[point]
        if step in after and step not in self._kept:
            held = [*start.y, *(leaf for leaf in start.compensation if leaf is not None)]
            if self.problem.end_is_a_stage:
                # what f sees does not follow from the state then
                held += start.x
            # copies: the state may lie in the result, which is the user's, and the compensation changes in place
            self._kept[step] = [self.policy.store(torch.empty_like(leaf).copy_(leaf)) for leaf in held]

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        for point in [point for point in self._kept if point > step]:
            del self._kept[point]
        at = max(self._kept)
        state = self._state(at)
        while at < step:
            if at not in self._kept:
                self._schedule(at, step, state)
            state = advanced(self.problem, state, at)
            at += 1
            state.random = self._random[at]
            if self.problem.stats is not None:
                self.problem.stats.steps_again += 1
        earlier = [point for point in self._kept if point < step]
        if at in self._kept and earlier:
            for stored in self._kept[max(earlier)]:
                self.policy.prefetch(stored)
        x = state.x
        del state  # in full precision it is not needed while the graphs are made
        return stages_of_step(self.problem, x, self._random[step], h, times)

    def release(self, step: int) -> None:
        # the first state brings back every other one
        if step > 0:
            self._kept.pop(step, None)

    def clear(self) -> None:
        self._kept.clear()

    def _state(self, point: int) -> StepStart:
        """The kept state at a grid point."""
        problem = self.problem
        held = [self.policy.load(stored) for stored in self._kept[point]]
        leaves = len(problem.leaves)
        y = held[:leaves]
        compensation: list[Tensor | None] = [*held[leaves : 2 * leaves]] or [None] * leaves
        x = held[2 * leaves :]
        if not x:
            x = [leaf.to(dtype) for leaf, dtype in zip(y, problem.velocity.dtypes, strict=True)]
        return StepStart(y, x, compensation, self._random[point])


def advanced(problem: Problem, start: StepStart, step: int) -> StepStart:
    """The state one step on, with the bits that it had on the road out."""
    assert problem.step_times is not None
    velocity, update = problem.velocity, problem.tableau.update
    h, times = problem.step_times[step]
    times = times[: update.stages[-1] + 1]
    # an alias, as f may make a leaf of its input
    x = [leaf.detach() for leaf in start.x]
    first = first_stage(problem, x, start.random, times[0], with_graph=False)
    velocities = evaluate_stages(problem, start.y, x, h, times, first)
    compensation = [None if leaf is None else leaf.clone() for leaf in start.compensation]
    y_next, x_next = [], []
    for leaf, state in enumerate(start.y):
        y = torch.empty_like(state)
        dtype = velocity.dtypes[leaf]
        x_leaf = None if dtype == state.dtype else torch.empty_like(state, dtype=dtype)
        rk_update(state, update.pick(velocities[leaf]), h, update.weights, y, x_leaf, compensation[leaf])
        if problem.end_is_a_stage:
            # the input of the last stage was formed without what the compensated sum adds
            tableau = problem.tableau
            assert isinstance(tableau, ClosedTableau)
            last = tableau.stage_inputs[-1]
            x_leaf = rk_stage(state, last.pick(velocities[leaf]), h, last.weights, dtype)
        y_next.append(y)
        x_next.append(y if x_leaf is None else x_leaf)
    return StepStart(y_next, x_next, compensation)
