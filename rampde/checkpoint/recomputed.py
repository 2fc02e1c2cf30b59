"""How the stages of a step come back for its sweep, with their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.stages import evaluate_stages, evaluate_tensor_stages, stage_input
from rampde.velocity import root


class Stages(Protocol):
    """The stages of one step, taken in reverse order, each once."""

    def take(self, i: int) -> Stage:
        """Stage ``i`` with its graph, which nothing else holds then."""


def for_products(problem: Problem, stage: Stage) -> Stage:
    """The stage as the sweep needs it: the values of the velocity only where times have a gradient."""
    x = stage.x if problem.velocity.origin is None else [root(leaf) for leaf in stage.x]
    k = stage.k if problem.time_needs_grad else [root(value) for value in stage.k]
    return Stage(stage.time, x, k)


class StageList:
    """Stages whose graphs are all there."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages: list[Stage | None] = [*stages]

    def take(self, i: int) -> Stage:
        stage, self._stages[i] = self._stages[i], None
        assert stage is not None
        return stage


class SingleStages:
    """Stages whose inputs are known: the graph of each is made when it is taken, and goes before the next one's."""

    def __init__(
        self,
        problem: Problem,
        times: Sequence[Tensor],
        inputs: list[list[Tensor]],
        random: Sequence[RandomState | None],
    ) -> None:
        """``inputs``: leaves of each stage; ``random``: state of the generators before each evaluation."""
        self._problem, self._times, self._random = problem, times, random
        self._inputs: list[list[Tensor] | None] = [*inputs]

    def take(self, i: int) -> Stage:
        problem, x, random = self._problem, self._inputs[i], self._random[i]
        self._inputs[i] = None
        assert x is not None
        if random is not None:
            random.restore()
        # an alias: becoming a leaf of the graph must not show on the checkpoint
        x = [leaf.detach() for leaf in x]
        time = self._times[i]
        if problem.time_needs_grad:
            time = time.detach().requires_grad_()
        return for_products(problem, Stage(time, x, problem.velocity.evaluate_with_graph(time, x)))


def stages_of_step(
    problem: Problem, y: list[Tensor], random: Sequence[RandomState], h: Tensor, times: Sequence[Tensor]
) -> Stages:
    """The stages of the step from the rounded state ``y``, as ``problem.checkpoint.stages`` says.

    ``times`` are those of the stages, the first ones or all; ``random`` the states of the generators before the first
    evaluation and, where that was made at the end of the step before, before the second one.
    """
    if problem.checkpoint.stages == "lean":
        return _lean(problem, y, random, h, times)
    if problem.time_needs_grad:
        times = [time.detach().requires_grad_() for time in times]
    # an alias: becoming a leaf of the graph must not show on the checkpoint
    x = [leaf.detach() for leaf in y]
    stages: list[Stage] = []
    first = first_stage(problem, x, random, times[0], with_graph=True)
    if problem.velocity.is_plain:
        evaluate_tensor_stages(problem, y[0], x[0], h, times, first, stages, with_graph=True)
    else:
        evaluate_stages(problem, y, x, h, times, first, stages, with_graph=True)
    return StageList([for_products(problem, stage) for stage in stages])


def first_stage(
    problem: Problem, x: list[Tensor], random: Sequence[RandomState], time: Tensor, with_graph: bool
) -> Stage | None:
    """Sets the generators as they were. Where they moved between the first evaluation and the second one: the first
    stage, made with the numbers it had; else None."""
    if not random:
        return None
    random[0].restore()
    if len(random) == 1:
        return None
    velocity = problem.velocity
    evaluate = velocity.evaluate_with_graph if with_graph else velocity.evaluate_without_graph
    first = Stage(time, x, evaluate(time, x))
    random[1].restore()
    return first


def _lean(
    problem: Problem, y: list[Tensor], random: Sequence[RandomState], h: Tensor, times: Sequence[Tensor]
) -> Stages:
    """All evaluations but the last one are made without graphs first, to find where the stages are."""
    last = len(times) - 1
    stages: list[Stage] = []
    inputs = [y]
    if last > 0:
        first = first_stage(problem, y, random, times[0], with_graph=False)
        velocities = evaluate_stages(problem, y, y, h, times[:last], first, stages)
        inputs += [stage.x for stage in stages[1:]]
        inputs.append(stage_input(problem, y, velocities, h, last))
    before: list[RandomState | None] = [random[0] if random else None, *(stage.random for stage in stages[1:])]
    if last > 0:
        before.append(RandomState.current(problem.velocity.spec.device) if random else None)
    return SingleStages(problem, times, inputs, before)
