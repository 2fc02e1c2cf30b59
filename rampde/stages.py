"""The stages of one Runge-Kutta step: where a solve evaluates f."""

from __future__ import annotations

from torch import Tensor

from rampde.ops import rk_stage
from rampde.problem import Problem, Stage


def evaluate_stages(
    problem: Problem,
    y: list[Tensor],
    x: list[Tensor],
    h: Tensor,
    times: list[Tensor],
    with_graph: bool,
    first: Stage | None = None,
) -> list[Stage]:
    """Stages of the step from state ``y``, whose rounded form is ``x``, at the given ``times``.

    ``with_graph`` records the graph of every stage by itself, from its input ``x`` to its velocity. ``first`` is
    the first stage where it is known already.
    """
    velocity = problem.velocity
    evaluate = velocity.evaluate_with_graph if with_graph else velocity.evaluate
    dtypes = velocity.dtypes
    stages = [Stage(times[0], x, evaluate(times[0], x)) if first is None else first]
    for i in range(1, len(times)):
        inputs = problem.tableau.stage_inputs[i]
        x = [
            rk_stage(state, [stages[j].k[leaf] for j in inputs.stages], h, inputs.weights, dtypes[leaf])
            for leaf, state in enumerate(y)
        ]
        k = evaluate(times[i], x)
        stages.append(Stage(times[i], x if with_graph else [], k))
    return stages
