"""The stages of one Runge-Kutta step: where a solve evaluates f, for any state and for a single tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rampde.ops import rk_stage, stage_inputs
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.tableau import Combination


def evaluate_stages(
    problem: Problem,
    y: list[Tensor],
    x: list[Tensor],
    h: Tensor,
    times: Sequence[Tensor],
    first: Stage | None = None,
    record: list[Stage] | None = None,
    with_graph: bool = False,
) -> list[list[Tensor]]:
    """Velocities of the step from state ``y``, whose rounded form is ``x``, as ``[leaf][stage]``.

    ``times`` are those of the stages, the first ones or all, and ``first`` is the first stage, where it is known
    already. The stages are appended to ``record``; ``with_graph``, the graph of each is recorded by itself, from its
    input to its velocity.
    """
    velocity = problem.velocity
    evaluate = velocity.evaluate_with_graph if with_graph else velocity.evaluate_without_graph
    k = evaluate(times[0], x) if first is None else first.k
    if record is not None:
        record.append(Stage(times[0], x, k) if first is None else first)
    velocities = [[value] for value in k]
    random: RandomState | None = None
    for i, inputs in problem.later_stages[: len(times) - 1]:
        x = _input(problem, y, velocities, h, inputs)
        if record is not None and problem.random is not None and not with_graph:
            random = RandomState.current(velocity.spec.device)
        k = evaluate(times[i], x)
        for of_leaf, value in zip(velocities, k, strict=True):
            of_leaf.append(value)
        if record is not None:
            record.append(Stage(times[i], x, k, random))
    return velocities


def stage_input(problem: Problem, y: list[Tensor], velocities: list[list[Tensor]], h: Tensor, i: int) -> list[Tensor]:
    """Where f is evaluated at stage ``i``, after the first: ``velocities`` are those of the stages before it."""
    return _input(problem, y, velocities, h, problem.later_stages[i - 1][1])


def _input(
    problem: Problem, y: list[Tensor], velocities: list[list[Tensor]], h: Tensor, inputs: Combination
) -> list[Tensor]:
    # the lists of velocities are those of the stages before this one
    terms = velocities if inputs.dense else [inputs.pick(of_leaf) for of_leaf in velocities]
    return stage_inputs(y, terms, h, inputs.weights, problem.velocity.dtypes)


def evaluate_tensor_stages(
    problem: Problem,
    y: Tensor,
    x: Tensor,
    h: Tensor,
    times: Sequence[Tensor],
    first: Stage | None = None,
    record: list[Stage] | None = None,
    with_graph: bool = False,
) -> list[Tensor]:
    """As :func:`evaluate_stages` for a state of one real tensor, the usual case; f draws no random numbers, or its
    stages are evaluated with their graphs.

    With as little Python as can be between two evaluations of f: around a small f, which evicts it from the caches at
    every call, this is what a solve costs.
    """
    velocity = problem.velocity
    call: Callable[[Tensor, Tensor], Any] = velocity.call_with_graph if with_graph else velocity.func
    dtype = velocity.dtypes[0]
    # f was seen to return a tensor at its first evaluation
    k: list[Any] = [call(times[0], x)] if first is None else list(first.k)
    if not with_graph and k[0].requires_grad:
        k[0] = k[0].detach()
    if record is not None:
        record.append(Stage(times[0], [x], [k[0]]) if first is None else first)
    for i, inputs in problem.later_stages[: len(times) - 1]:
        # at stage i the list of velocities is that of the stages before it
        x = rk_stage(y, k if inputs.dense else inputs.pick(k), h, inputs.weights, dtype)
        time = times[i]
        value = call(time, x)
        if not with_graph and value.requires_grad:
            # f recorded a graph for itself, as a flow does for its divergence
            value = value.detach()
        k.append(value)
        if record is not None:
            record.append(Stage(time, [x], [value]))
    return k
