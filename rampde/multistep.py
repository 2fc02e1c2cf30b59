"""Adams methods: their roads, and the road out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from rampde.adams import LEAST_HISTORY, LOWEST_ORDER, AdamsMethod, Formula, read_options
from rampde.checkpoint import Checkpoint
from rampde.checkpoint.auto import choose
from rampde.checkpoint.costs import Sizes
from rampde.control import Attempt
from rampde.explicit import solve_explicit
from rampde.forward import Outputs, warn_of_overflow
from rampde.grid import StepTimes, stage_times
from rampde.multistep_adjoint import MultistepSweep
from rampde.multistep_stages import RK4, Iteration, Points, PointStages, evaluate_single, formulas_of, weighted_sum
from rampde.multistep_tape import integrate_multistep_taped
from rampde.ops import rk_stage, rk_update
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.roads import Roads, travel
from rampde.stages import evaluate_stages


def solve_multistep(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """As :func:`rampde.roads.travel`, by an :class:`AdamsMethod`, with the options of :class:`AdamsOptions`.

    The corrector has converged where two iterates of the increment of a step differ by at most
    ``atol + rtol * |increment|`` in every element; to ask so, it waits for the device after every evaluation.

    Raises:
        TypeError, ValueError: an option that is not as expected.
        RuntimeError: f draws random numbers, which the iterations of the corrector or the recomputation cannot.

    Warns:
        UserWarning: the corrector did not converge; ``max_order`` is too low to have an effect.
    """
    if not _uses_formulas(problem):
        return _solve_one_step(problem, y0)
    return travel(MultistepRoads(), problem, y0)


class MultistepRoads(Roads[Points]):
    """Evaluations at the grid points, and what later steps make of them."""

    def prepare(self, problem: Problem) -> Tensor:
        velocity = problem.velocity
        h, times = stage_times(problem.grid.points, RK4.nodes, velocity.spec.time_dtype, problem.perturb)
        problem.step_times = StepTimes(h, times)
        return problem.step_times[0][1][0]

    def keep(self, problem: Problem) -> Points:
        return Points(problem.checkpoint)

    def out(self, problem: Problem, y0: list[Tensor], kept: Points | None) -> list[Tensor]:
        return integrate_multistep(problem, y0, kept)

    def back(
        self,
        problem: Problem,
        points: Tensor,
        kept: Points,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> MultistepSweep:
        return MultistepSweep(problem, points, PointStages(problem, kept), captures, cotangents, retain_graph)

    def choose(self, problem: Problem, sizes: Sizes, budget: int) -> Checkpoint:
        return choose(sizes, budget, map(Checkpoint, ("none", "step")))

    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        return integrate_multistep_taped(problem, y0, points)

    def check_random(self, problem: Problem, wanted: bool, later: bool) -> None:
        drew = wanted and (later or problem.random is not None)
        if drew and cast(AdamsMethod, problem.method).implicit and not problem.checkpoint.is_tape:
            raise RuntimeError(
                "func draws random numbers: the iterations of an implicit method then converge to no solution whose"
                " gradient could be taken; use an explicit method, or torch.no_grad()"
            )
        if drew and later and problem.checkpoint.stages not in ("none", "tape"):
            raise RuntimeError(
                "func drew random numbers, though none in its first evaluation, so they cannot be replayed in the"
                ' backward pass; use checkpoint="none"'
            )


def _uses_formulas(problem: Problem) -> bool:
    """Whether any step is not one of rk4."""
    max_order = read_options(problem.options).order_of(cast(AdamsMethod, problem.method))
    if max_order < LOWEST_ORDER:
        warnings.warn(
            f"max_order is below {LOWEST_ORDER}, so the solver reduces to `rk4`; it is {max_order}", stacklevel=4
        )
        return False
    return problem.grid.steps >= LEAST_HISTORY


def _solve_one_step(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """The solve where all steps are those of rk4."""
    one_step = replace(problem, method=RK4)
    result = solve_explicit(one_step, y0)
    # what outputs between the steps are computed from
    problem.captures, problem.scaler = one_step.captures, one_step.scaler
    return result


def integrate_multistep(problem: Problem, y0: list[Tensor], kept: Points | None) -> list[Tensor]:
    """As :func:`rampde.forward.integrate`, by an :class:`AdamsMethod`.

    Where gradients are wanted, ``kept`` takes of every grid point what the sweep will need.
    """
    return _Integration(problem, y0, kept).run()


class _Integration:
    """The loop over the steps, and what it carries: the state and the velocities of the latest grid points."""

    def __init__(self, problem: Problem, y0: list[Tensor], kept: Points | None) -> None:
        assert problem.step_times is not None
        assert problem.first is not None
        velocity, grid = problem.velocity, problem.grid
        self.problem, self.velocity, self.kept = problem, velocity, kept
        self.method = cast(AdamsMethod, problem.method)
        self.formulas = formulas_of(problem)
        self.one_step = replace(problem, method=RK4)
        state_dtypes = [leaf.state_dtype for leaf in velocity.spec.leaves]
        # the rounded state is a tensor of its own where it differs from the state, or must outlive the step
        self.rounded = [
            kept is not None or dtype != state for dtype, state in zip(velocity.dtypes, state_dtypes, strict=True)
        ]
        self.y = [leaf.to(dtype) for leaf, dtype in zip(y0, state_dtypes, strict=True)]
        self.x = problem.first.x
        self.outputs = Outputs(problem, self.y)
        self.history: list[list[Tensor]] = [[] for _ in self.y]
        self.zeros = [torch.zeros_like(leaf) for leaf in self.y]
        self.one = grid.points.detach().new_ones(())
        self.compensation = [torch.zeros_like(leaf) if problem.compensated else None for leaf in self.y]
        device = velocity.spec.device
        self.overflow_step = torch.full((), grid.steps, dtype=torch.int64, device=device) if velocity.half else None
        self.iteration = Iteration(problem)

    def run(self) -> list[Tensor]:
        problem = self.problem
        assert problem.step_times is not None
        observer, grid_times = problem.observer, problem.grid.times
        for step in range(problem.grid.steps):
            h, times = problem.step_times[step]
            start = self.y
            if observer is not None:
                attempt = Attempt(grid_times[step], grid_times[step + 1], grid_times[step + 1] - grid_times[step])
                observer.step(attempt, start)
            formula = self.formulas[step]
            velocities = self._evaluate(step, h, times, single=formula is not None)
            for past, of_leaf in zip(self.history, velocities, strict=True):
                past.insert(0, of_leaf[0])
                del past[self.formulas.history :]
            if formula is None:
                self._update(step, velocities, h, RK4.update.weights)
            elif formula.corrector is None and formula.predictor.equal:
                self._update(step, self.history, h, formula.predictor.values)
            else:
                increments = self._increments(step, h, times[-1], formula)
                self._update(step, [[increment] for increment in increments], self.one, [1.0])
            if observer is not None:
                observer.accepted(attempt, start, 0.0)
        if self.kept is not None and self.method.implicit:
            # the velocity at the end of the last step entered that step
            h, times = problem.step_times[problem.grid.steps - 1]
            self._evaluate(problem.grid.steps, h, times[-1:], single=True)
        if self.overflow_step is not None:
            warn_of_overflow(problem, int(self.overflow_step.item()))
        self.iteration.warn()
        return self.outputs.leaves

    def _evaluate(self, point: int, h: Tensor, times: Any, single: bool) -> list[list[Tensor]]:
        """Velocities from the grid point, ``[leaf][stage]``: all stages of rk4, or the first where ``single``."""
        problem, kept = self.problem, self.kept
        first = problem.first if point == 0 else None
        graphs: list[Stage] | None = None
        random = problem.random
        if kept is not None:
            if random is not None and point > 0:
                random = RandomState.current(self.velocity.spec.device)
            if kept.needs_graph:
                graphs = []
                if problem.time_needs_grad:
                    times = [time.detach().requires_grad_() for time in times]
        if kept is not None and not kept.needs_graph and point == problem.grid.steps:
            velocities: list[list[Tensor]] = []  # the sweep evaluates it
        elif single:
            velocities = [[value] for value in evaluate_single(problem, self.x, times[0], graphs)]
        else:
            with_graph = graphs is not None
            velocities = evaluate_stages(self.one_step, self.y, self.x, h, times, first, graphs, with_graph)
        if kept is not None:
            kept.store(self.x, graphs, random)
        return velocities

    def _update(self, step: int, k: list[list[Tensor]], h: Tensor, weights: list[float]) -> None:
        """The state at the end of ``step``: ``y + h * sum_j weights_j k_j``."""
        y_next = self.outputs.next_state(step + 1, self.y)
        self.x = [
            torch.empty_like(state, dtype=dtype) if separate else state
            for state, dtype, separate in zip(y_next, self.velocity.dtypes, self.rounded, strict=True)
        ]
        for leaf, state in enumerate(self.y):
            checkpoint = self.x[leaf] if self.rounded[leaf] else None
            compensation = self.compensation[leaf]
            rk_update(state, k[leaf], h, weights, y_next[leaf], checkpoint, compensation, self.overflow_step, step)
        self.y = y_next
        self.outputs.keep(self.y)

    def _increments(self, step: int, h: Tensor, end: Tensor, formula: Formula) -> list[Tensor]:
        """``y_{n+1} - y_n``, leaf by leaf, predicted and, in the implicit method, corrected until it stands still."""
        increments = [
            weighted_sum(zero, past, h, formula.predictor) for zero, past in zip(self.zeros, self.history, strict=True)
        ]
        corrector = formula.corrector
        if corrector is None:
            return increments
        known = [
            weighted_sum(zero, past, h, corrector, skip=1) for zero, past in zip(self.zeros, self.history, strict=True)
        ]
        weight = h * corrector.scalars[0]
        for _ in range(self.iteration.max_iters):
            x = [
                rk_stage(state, [increment], self.one, [1.0], dtype)
                for state, increment, dtype in zip(self.y, increments, self.velocity.dtypes, strict=True)
            ]
            k = self.velocity.evaluate(end, x)
            previous = increments
            increments = [
                rk_stage(base, [value], weight, [1.0], base.dtype) for base, value in zip(known, k, strict=True)
            ]
            if self.iteration.agree(previous, increments):
                return increments
        self.iteration.note_failure(step)
        return increments
