"""Policies "step", "lean" and "stage": something small of every step, from which its stages are evaluated again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.checkpoint.recomputed import SingleStages, Stages, stages_of_step
from rampde.checkpoint.stored import StoredSteps
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState


class EveryStep(StoredSteps, Checkpoints):
    """The rounded state at the start of each step."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.checkpoint)
        self.problem = problem
        self._random: list[tuple[RandomState, ...]] = []

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        self.append(start.x)
        self._random.append(start.random)

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        return stages_of_step(self.problem, self.loaded(step), self._random[step], h, times)


class EveryStage(StoredSteps, Checkpoints):
    """The rounded inputs of all stages: where f was evaluated."""

    needs_stages = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.checkpoint)
        self.problem = problem
        self._random: list[list[RandomState | None]] = []
        self._latest: tuple[list[Tensor], list[Any]] = [], []

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        assert stages is not None
        # stage by stage, the leaves of each together; where the last stage of a step is the first one of the next,
        # its input is stored once
        step: list[Any] = []
        for stage in stages:
            if stage.x is not self._latest[0]:
                self._latest = stage.x, [self.policy.store(leaf) for leaf in stage.x]
            step += self._latest[1]
        self._steps.append(step)
        self._random.append([start.random[0] if start.random else None, *(stage.random for stage in stages[1:])])

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        leaves = len(self.problem.leaves)
        inputs = self.loaded(step)
        of_stages = [inputs[at : at + leaves] for at in range(0, len(times) * leaves, leaves)]
        return SingleStages(self.problem, times, of_stages, self._random[step])

    def tensors(self) -> list[Tensor]:
        self._latest = [], []
        return super().tensors()
