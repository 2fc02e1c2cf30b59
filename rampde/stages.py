"""The stages of one Runge-Kutta step: where a solve evaluates f, for any state and for a single tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rampde.ops import rk_stage
from rampde.problem import Problem, Stage


def evaluate_stages(
    problem: Problem,
    y: list[Tensor],
    x: list[Tensor],
    h: Tensor,
    times: Sequence[Tensor],
    first: Stage | None = None,
    graphs: list[Stage] | None = None,
) -> list[list[Tensor]]:
    """Velocities of the step from state ``y``, whose rounded form is ``x``, as ``[leaf][stage]``.

    ``times`` are those of the stages, the first ones or all, and ``first`` is the first stage, where it is known
    already. With ``graphs``, the graph of every stage is recorded by itself, from its input to its velocity, and the
    stages appended there.
    """
    velocity = problem.velocity
    evaluate = velocity.evaluate if graphs is None else velocity.evaluate_with_graph
    k = evaluate(times[0], x) if first is None else first.k
    if graphs is not None:
        graphs.append(Stage(times[0], x, k) if first is None else first)
    velocities = [[value] for value in k]
    for i, inputs in problem.later_stages[: len(times) - 1]:
        x = [
            # at stage i the list of velocities is that of the stages before it
            rk_stage(state, terms if inputs.dense else inputs.pick(terms), h, inputs.weights, dtype)
            for state, terms, dtype in zip(y, velocities, velocity.dtypes, strict=True)
        ]
        k = evaluate(times[i], x)
        for of_leaf, value in zip(velocities, k, strict=True):
            of_leaf.append(value)
        if graphs is not None:
            graphs.append(Stage(times[i], x, k))
    return velocities


def evaluate_tensor_stages(
    problem: Problem,
    y: Tensor,
    x: Tensor,
    h: Tensor,
    times: Sequence[Tensor],
    first: Stage | None = None,
    graphs: list[Stage] | None = None,
) -> list[Tensor]:
    """As :func:`evaluate_stages` for a state of one real tensor, the usual case.

    With as little Python as can be between two evaluations of f: around a small f, which evicts it from the caches at
    every call, this is what a solve costs.
    """
    velocity = problem.velocity
    call: Callable[[Tensor, Tensor], Any] = velocity.func if graphs is None else velocity.call_with_graph
    dtype = velocity.dtypes[0]
    # f was seen to return a tensor at its first evaluation
    k: list[Any] = [call(times[0], x)] if first is None else list(first.k)
    if graphs is not None:
        graphs.append(Stage(times[0], [x], [k[0]]) if first is None else first)
    for i, inputs in problem.later_stages[: len(times) - 1]:
        # at stage i the list of velocities is that of the stages before it
        x = rk_stage(y, k if inputs.dense else inputs.pick(k), h, inputs.weights, dtype)
        time = times[i]
        value = call(time, x)
        k.append(value)
        if graphs is not None:
            graphs.append(Stage(time, [x], [value]))
    return k
