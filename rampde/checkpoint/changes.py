"""Policy "fp8": of every step its change of the state in eight bits, and the state at the start of the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.checkpoint.fp8 import Quantised
from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.checkpoint.recomputed import Stages, stages_of_step
from rampde.checkpoint.stored import StoredSteps
from rampde.ops import rk_update
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState


class Changes(StoredSteps, Checkpoints):
    """The sweep goes from the last state back, a step at a time: ``y_n = y_{n+1} + (y_n - y_{n+1})``, the difference in
    eight bits. A step changes the state by little, so that this is as good as the whole state in some more bits; the
    errors of the steps add up in the state, as independent ones do."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.checkpoint)
        self.problem = problem
        self.quantiser = problem.checkpoint.quantiser
        self._random: list[tuple[RandomState, ...]] = []
        # the state at the start of the last step, in full precision, and what f sees of it
        self._last: tuple[list[Tensor], list[Tensor]] | None = None
        # where the sweep is
        self._at: tuple[int, list[Tensor], list[Tensor]] | None = None

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        # the first state is reached from the last one, as all others are
        self.append(start.quantised or [])
        self._random.append(start.random)
        self._last = start.y, start.x

    def tensors(self) -> list[Tensor]:
        if self._last is not None:
            y, x = self._last
            # copies: the state may lie in the result, which is the user's
            self._steps.append([[torch.empty_like(leaf).copy_(leaf) for leaf in y], x])
            self._last = None
        return super().tensors()

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        if self._at is None or step > self._at[0]:
            # the beginning, or back to a later step
            y, x = self._steps[-1]
            self._at = len(self._random) - 1, y, x
        while self._at[0] > step:
            self._at = self._back(*self._at)
        return stages_of_step(self.problem, self._at[2], self._random[step], h, times)

    def _back(self, step: int, y: list[Tensor], x: list[Tensor]) -> tuple[int, list[Tensor], list[Tensor]]:
        """The state one step before that at the start of ``step``."""
        one = self.problem.grid.points.new_ones(())
        before, x_before = [], []
        for state, stored, dtype in zip(y, self._steps[step], self.problem.velocity.dtypes, strict=True):
            change: Quantised = self.policy.load(stored)  # type: ignore[assignment]  # as the kernel wrote it
            target = torch.empty_like(state)
            rounded = None if dtype == state.dtype else torch.empty_like(state, dtype=dtype)
            rk_update(change.codes, [state], one, [1.0], target, rounded, None, None, 0, None, change.scales)
            before.append(target)
            x_before.append(target if rounded is None else rounded)
        return step - 1, before, x_before

    def rest(self) -> None:
        super().rest()
        self._at = None

    def clear(self) -> None:
        super().clear()
        self._last = self._at = None
