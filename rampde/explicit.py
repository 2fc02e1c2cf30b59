"""Explicit Runge-Kutta methods: their roads on a grid, with steps decided on the way, and sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.adaptive import integrate_adaptive
from rampde.adjoint import Sweep
from rampde.checkpoint import Checkpoint
from rampde.checkpoint.auto import choose
from rampde.checkpoint.costs import Sizes
from rampde.checkpoint.keeper import Checkpoints
from rampde.checkpoint.keepers import new_checkpoints
from rampde.checkpoint.policy import NoneWhileItFits
from rampde.compiled_steps import NotServed, StepRoads
from rampde.forward import integrate
from rampde.graph_cache import solve_recorded
from rampde.grid import StepTimes, stage_times
from rampde.per_sample import integrate_per_sample
from rampde.per_sample_adjoint import PerSampleSweep
from rampde.problem import Problem, Stage
from rampde.recorded_attempts import integrate_recorded
from rampde.roads import Roads, travel
from rampde.tape import integrate_taped
from rampde.tape_adaptive import integrate_adaptive_taped, repeat_adaptive_taped
from rampde.traced import integrate_traced


def solve_explicit(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """As :func:`rampde.roads.travel`, by a method of :class:`rampde.tableau.ButcherTableau`."""
    if torch.compiler.is_dynamo_compiling():
        return integrate_traced(problem, y0)
    if StepRoads.serves(problem):
        whole_steps = StepRoads(problem)
        try:
            return travel(whole_steps, problem, y0)
        except NotServed:
            pass
        finally:
            whole_steps.leave(problem)
    if problem.cuda_graph and problem.closed is None:
        return solve_recorded(GridRoads, problem, y0)
    if problem.per_sample:
        return travel(SampleRoads(), problem, y0)
    return travel(GridRoads() if problem.closed is None else SteppingRoads(), problem, y0)


class _ExplicitRoads(Roads[Checkpoints]):
    def keep(self, problem: Problem) -> Checkpoints:
        return new_checkpoints(problem)

    def back(
        self,
        problem: Problem,
        points: Tensor,
        kept: Checkpoints,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> Sweep:
        return Sweep(problem, points, kept, captures, cotangents, retain_graph)

    def check_random(self, problem: Problem, wanted: bool, later: bool) -> None:
        if wanted and later and problem.checkpoint.stages not in ("none", "tape"):
            raise RuntimeError(
                "func drew random numbers, though none in its first evaluation, so they cannot be replayed in the"
                ' backward pass; use checkpoint="none"'
            )


class GridRoads(_ExplicitRoads):
    """On a grid that is known before."""

    def prepare(self, problem: Problem) -> Tensor:
        velocity = problem.velocity
        h, times = stage_times(problem.grid.points, problem.tableau.nodes, velocity.spec.time_dtype, problem.perturb)
        problem.step_times = StepTimes(h, times)
        return problem.step_times[0][1][0]

    def out(self, problem: Problem, y0: list[Tensor], kept: Checkpoints | None) -> list[Tensor]:
        assert isinstance(problem.step_times, StepTimes)
        return integrate(problem, y0, problem.step_times, kept)

    def choose(self, problem: Problem, sizes: Sizes, budget: int) -> Checkpoint:
        return choose(sizes, budget, sizes.policies(budget))

    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        nodes = problem.tableau.nodes[:1]
        time = stage_times(points[:2], nodes, problem.velocity.spec.time_dtype, problem.perturb)[1][0, 0]
        return integrate_taped(problem, y0, points, _first_taped(problem, time, y0))

    def repeated(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        return integrate_taped(problem, y0, points)


class SteppingRoads(_ExplicitRoads):
    """With steps that are decided on the way."""

    def prepare(self, problem: Problem) -> Tensor:
        return problem.first_time().detach()

    def out(self, problem: Problem, y0: list[Tensor], kept: Checkpoints | None) -> list[Tensor]:
        if problem.cuda_graph:
            return integrate_recorded(problem, y0, kept)
        return integrate_adaptive(problem, y0, kept)

    def choose(self, problem: Problem, sizes: Sizes, budget: int) -> Checkpoint:
        # steps that are decided on the device keep the starts of all
        if problem.cuda_graph or sizes.graph * sizes.stages > budget:
            return Checkpoint("step")
        return NoneWhileItFits(budget, sizes.graph)

    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        problem.first = _first_taped(problem, problem.first_time(), y0)
        return integrate_adaptive_taped(problem, y0)

    def repeated(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        if problem.random is not None:
            raise RuntimeError(
                "func draws random numbers, which the repetition of an adaptive solve cannot draw again, as second"
                ' derivatives need; use checkpoint="tape" or a method with fixed steps'
            )
        return repeat_adaptive_taped(problem, y0, points)


class SampleRoads(SteppingRoads):
    """With steps for each sample of the batch."""

    def choose(self, problem: Problem, sizes: Sizes, budget: int) -> Checkpoint:
        return Checkpoint("step")

    def out(self, problem: Problem, y0: list[Tensor], kept: Checkpoints | None) -> list[Tensor]:
        return integrate_per_sample(problem, y0, kept)

    def back(
        self,
        problem: Problem,
        points: Tensor,
        kept: Checkpoints,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> Sweep:
        return PerSampleSweep(problem, points, kept, captures, cotangents, retain_graph)

    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        problem.first = _first_taped(problem, problem.first_time(), y0)
        return integrate_per_sample(problem, y0, None)

    def repeated(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        raise RuntimeError("second derivatives of a solve with options['batch_axis'] need checkpoint=\"tape\"")

    def check_random(self, problem: Problem, wanted: bool, later: bool) -> None:
        if wanted and (later or problem.random is not None) and not problem.checkpoint.is_tape:
            raise RuntimeError(
                "func draws random numbers, which cannot be replayed with options['batch_axis']; use"
                ' checkpoint="tape"'
            )


def _first_taped(problem: Problem, time: Tensor, y0: Sequence[Tensor]) -> Stage:
    """The first stage, recorded by autograd from ``y0``."""
    x = [leaf.to(dtype) for leaf, dtype in zip(y0, problem.velocity.dtypes, strict=True)]
    return Stage(time, x, problem.velocity.evaluate_first(time, x))
