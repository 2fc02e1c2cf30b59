"""Policy "none": the graph of every stage; and graphs as long as they fit, which "auto" keeps where the number of steps
is not known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rampde.checkpoint.every_step import EveryStep
from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.checkpoint.recomputed import StageList, Stages, for_products
from rampde.problem import Problem, Stage


class KeptGraphs(Checkpoints):
    """The graphs that the road out made; nothing is evaluated again."""

    keeps_graphs = True
    needs_graph = True
    needs_stages = True

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._steps: list[list[Stage]] = []

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        assert stages is not None
        self._steps.append([for_products(self._problem, stage) for stage in stages])

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        return StageList(self._steps[step])

    def release(self, step: int) -> None:
        self._steps[step] = []

    def clear(self) -> None:
        self._steps.clear()


class GraphsWhileTheyFit(Checkpoints):
    """The graphs of the first steps, up to a number of bytes; of the steps after them the states."""

    keeps_graphs = True
    needs_stages = True

    def __init__(self, problem: Problem, budget: int, bytes_of_stage: int) -> None:
        self._graphs, self._states = KeptGraphs(problem), EveryStep(problem)
        self._budget, self._bytes_of_stage = budget, max(bytes_of_stage, 1)
        self._with_graph = 0
        self.needs_graph = True
        self._stats = problem.stats

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        if not self.needs_graph:
            # an alias: the last stage of the step before may have made a leaf of its graph of it
            start.x = [leaf.detach() for leaf in start.x]
            self._states.store(start, None)
            return
        assert stages is not None
        self._graphs.store(start, stages)
        self._with_graph += 1
        self._budget -= self._bytes_of_stage * len(stages)
        # the last stage of a step may be the first one of the next
        self.needs_graph = self._budget >= self._bytes_of_stage * len(stages)
        if not self.needs_graph and self._stats is not None:
            self._stats.checkpoint = f"none for {self._with_graph} steps, then step"

    def tensors(self) -> list[Tensor]:
        return self._states.tensors()

    def restore(self, tensors: Sequence[Tensor]) -> None:
        self._states.restore(tensors)

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        if step < self._with_graph:
            return self._graphs.load(step, h, times)
        return self._states.load(step - self._with_graph, h, times)

    def release(self, step: int) -> None:
        if step < self._with_graph:
            self._graphs.release(step)

    def rest(self) -> None:
        self._states.rest()

    def clear(self) -> None:
        self._graphs.clear()
        self._states.clear()
