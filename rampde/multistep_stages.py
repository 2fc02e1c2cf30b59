"""What the roads of a multistep solve share: its sums, its iteration, its evaluations of f and how they are kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rampde.adams import AdamsMethod, Formulas, Weights, read_options
from rampde.checkpoint import Checkpoint
from rampde.checkpoint.stored import StoredSteps
from rampde.methods import FIXED
from rampde.ops import rk_stage, rk_update
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.stages import evaluate_stages
from rampde.state import Leaf
from rampde.tolerance import Bound

RK4 = FIXED["rk4"]


def formulas_of(problem: Problem) -> Formulas:
    """The formulas of all steps."""
    grid, precision = problem.grid, problem.velocity.spec.time_dtype
    method = cast(AdamsMethod, problem.method)
    max_order = read_options(problem.options).order_of(method)
    return Formulas(method, max_order, grid.points.detach(), grid.times, precision)


def weighted_sum(y: Tensor, k: list[Tensor], h: Tensor, weights: Weights, skip: int = 0) -> Tensor:
    """``y + h * sum_j weights[skip + j] k_j``, a new tensor in the dtype of ``y``; ``k`` may hold more than enter."""
    if weights.equal:
        result: Tensor = rk_stage(y, k, h, weights.values[skip:], y.dtype)
        return result
    scaled = [h * weight for weight in weights.scalars[skip:]]
    return chained_sum(y, k[: len(scaled)], scaled)


def chained_sum(y: Tensor, k: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``y + sum_j weights_j k_j``, a new tensor in the dtype of ``y``, by an operator for each term.

    The weights are 0-dim tensors: constants of one operator for the sum would make a kernel for every step.
    """
    total = torch.empty_like(y)
    for value, weight in zip(k, weights, strict=True):
        rk_update(y, [value], weight, [1.0], total)
        y = total
    return total


class Iteration:
    """Decides when the iteration of an implicit step has converged, and remembers where it did not."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.max_iters = read_options(problem.options).max_iters
        self.failed: int | None = None
        spec, tolerance = problem.velocity.spec, problem.tolerance

        def of_leaf(bound: Bound, leaf: Leaf) -> Bound:
            if not isinstance(bound, Tensor):
                return bound
            return (bound[..., None] if leaf.dtype.is_complex else bound).to(spec.device, leaf.state_dtype)

        self.bounds = [
            (of_leaf(rtol, leaf), of_leaf(atol, leaf))
            for rtol, atol, leaf in zip(tolerance.rtol, tolerance.atol, spec.leaves, strict=True)
        ]

    def agree(self, previous: list[Tensor], increments: list[Tensor]) -> bool:
        """Whether two iterates of the increment are within the tolerance of each other, in every element."""
        within = [
            ((new - old).abs() <= atol + rtol * torch.maximum(new.abs(), old.abs())).all()
            for new, old, (rtol, atol) in zip(increments, previous, self.bounds, strict=True)
        ]
        return bool(within[0] if len(within) == 1 else torch.stack(within).all())

    def note_failure(self, step: int) -> None:
        self.failed = step if self.failed is None else self.failed

    def warn(self) -> None:
        """Tells of the first step that did not converge, if any."""
        if self.failed is None:
            return
        times, step = self.problem.grid.times, self.failed
        warnings.warn(
            f"Functional iteration did not converge. Solution may be incorrect. The first such step is step {step} of"
            f" {len(times) - 1}, between t = {times[step]:.6g} and t = {times[step + 1]:.6g}, after max_iters ="
            f" {self.max_iters} iterations; use smaller steps, more iterations or a larger rtol",
            UserWarning,
            stacklevel=2,
        )


class Points(StoredSteps):
    """What is kept of each grid point: the rounded state, or the stages evaluated from there, with their graphs."""

    def __init__(self, policy: Checkpoint) -> None:
        super().__init__(policy)
        self.keeps_graphs = self.needs_graph = policy.stages == "none"
        self.stages: list[list[Stage]] = []
        self.random: list[RandomState | None] = []

    def store(self, x: list[Tensor], graphs: list[Stage] | None, random: RandomState | None) -> None:
        if graphs is not None:
            self.stages.append(graphs)
        else:
            self.append(x)
            self.random.append(random)

    def clear(self) -> None:
        super().clear()
        self.stages.clear()


def evaluate_single(problem: Problem, x: list[Tensor], time: Tensor, graphs: list[Stage] | None) -> list[Tensor]:
    """The velocity at a grid point; with ``graphs``, its graph is recorded and the stage appended there."""
    if graphs is None:
        return problem.velocity.evaluate_without_graph(time, x)
    k = problem.velocity.evaluate_with_graph(time, x)
    graphs.append(Stage(time, x, k))
    return k


class PointStages:
    """The stages from each grid point, with their graphs: those kept, or evaluated again from the states."""

    def __init__(self, problem: Problem, points: Points) -> None:
        self.problem, self.points = problem, points
        self.one_step = replace(problem, method=RK4)

    def load(self, point: int, h: Tensor, times: Sequence[Tensor], single: bool) -> list[Stage]:
        """All stages of rk4 with step size ``h`` at ``times``, or the first where ``single``; at every call anew."""
        if self.points.needs_graph:
            return list(self.points.stages[point])
        random = self.points.random[point]
        if random is not None:
            random.restore()
        y = self.points.loaded(point)
        # an alias: becoming a leaf of the graph must not show on the checkpoint
        x = [leaf.detach() for leaf in y]
        if self.problem.time_needs_grad:
            times = [time.detach().requires_grad_() for time in times]
        stages: list[Stage] = []
        if single:
            evaluate_single(self.problem, x, times[0], stages)
        else:
            evaluate_stages(self.one_step, y, x, h, times, None, stages, with_graph=True)
        return stages

    def release(self, point: int) -> None:
        """Frees the graphs of a point that will not be loaded again."""
        if self.points.needs_graph:
            self.points.stages[point] = []
