"""Implicit Runge-Kutta methods: their roads, and the road out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.autocast import switched_off
from rampde.control import Attempt
from rampde.grid import StepTimes, stage_times
from rampde.implicit_adjoint import ImplicitSweep, StageStates
from rampde.implicit_tableau import ImplicitTableau
from rampde.implicit_tape import integrate_implicit_taped
from rampde.newton import StageSolver, read_options, start_time
from rampde.ops import rk_update
from rampde.problem import Problem, Stage
from rampde.roads import Roads, travel


def solve_implicit(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """As :func:`rampde.roads.travel`, by an :class:`ImplicitTableau`, with the options of
    :class:`rampde.newton.NewtonOptions`. The policies "step" and "none" keep the inputs of all stages.

    Raises:
        TypeError, ValueError: an option that is not as expected.

    Warns:
        UserWarning: steps whose equations could not be solved.
    """
    read_options(problem.options)
    if torch.is_inference_mode_enabled():
        # Newton's method needs the derivative of f, for which inference mode has no graph
        with torch.inference_mode(False), torch.no_grad():
            return solve_implicit(problem, [leaf.clone() for leaf in y0])
    return travel(ImplicitRoads(), problem, y0)


class ImplicitRoads(Roads[StageStates]):
    """Newton's method on the road out, the implicit function theorem on the road back."""

    iterates = True

    def prepare(self, problem: Problem) -> Tensor:
        velocity = problem.velocity
        h, times = stage_times(problem.grid.points, _tableau(problem).nodes, velocity.spec.time_dtype, problem.perturb)
        problem.step_times = StepTimes(h, times)
        # of an explicit stage, or to begin the iteration with
        return start_time(problem, 0)

    def first_stage(self, problem: Problem, time: Tensor, x: list[Tensor]) -> Stage:
        with torch.enable_grad():
            x = [leaf.requires_grad_() for leaf in x]
            return Stage(time, x, problem.velocity.evaluate_first(time, x))

    def keep(self, problem: Problem) -> StageStates:
        return StageStates(problem, _tableau(problem).stages)

    def out(self, problem: Problem, y0: list[Tensor], kept: StageStates | None) -> list[Tensor]:
        return integrate_implicit(problem, y0, kept)

    def back(
        self,
        problem: Problem,
        points: Tensor,
        kept: StageStates,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> ImplicitSweep:
        # the graphs are made anew: none of them has to outlive its products
        return ImplicitSweep(problem, points, kept, captures, cotangents, retain_graph=False)

    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        return integrate_implicit_taped(problem, y0, points)

    def check_random(self, problem: Problem, wanted: bool, later: bool) -> None:
        if later:
            raise RuntimeError(
                "func drew random numbers, though none in its first evaluation: the evaluations of a stage saw"
                " different ones, so its equations have no solution; draw them always, or use an explicit method"
            )


def _tableau(problem: Problem) -> ImplicitTableau:
    assert isinstance(problem.method, ImplicitTableau)
    return problem.method


def integrate_implicit(problem: Problem, y0: Sequence[Tensor], checkpoints: StageStates | None) -> list[Tensor]:
    """States at the grid points ``problem.kept``: for each leaf (len(kept), *shape) in its output dtype.

    ``checkpoints``: where gradients are wanted, keeps the inputs of all stages. Called where no graph is recorded.
    """
    assert problem.step_times is not None
    solver = StageSolver(problem)
    layout, tableau, observer = solver.layout, solver.tableau, problem.observer
    times_of_grid, state_dtypes = problem.grid.times, [leaf.state_dtype for leaf in problem.velocity.spec.leaves]
    kept = set(problem.kept)
    with switched_off(layout.device):
        y = layout.pack([leaf.detach() for leaf in y0])
        compensation = torch.zeros_like(y) if problem.compensated else None
        states = [y] if 0 in kept else []
        for step in range(len(problem.step_times)):
            h, times = problem.step_times[step]
            if observer is not None:
                start, end = times_of_grid[step : step + 2]
                attempt = Attempt(start, end, end - start)
                observer.step(attempt, layout.unpack(y, state_dtypes))
            velocities = solver.solve(step, y, h, times)
            if checkpoints is not None:
                inputs = [solver.stage_input(i, y, h, velocities) for i in range(tableau.stages)]
                x = [leaf for i in inputs for leaf in layout.unpack(i, problem.velocity.dtypes)]
                checkpoints.keep(x, solver.random)
            y_next = torch.empty_like(y)
            update = tableau.update
            rk_update(y, update.pick(velocities), h, update.weights, y_next, None, compensation)
            y = y_next
            if step + 1 in kept:
                states.append(y)
            if observer is not None:
                observer.accepted(attempt, layout.unpack(y, state_dtypes), 0.0)
        results = layout.stack(states, problem.output_dtypes)
    if checkpoints is not None:
        checkpoints.dense = solver.dense
    solver.warn()
    return results
