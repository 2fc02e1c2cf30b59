"""Implicit Runge-Kutta methods: the road out, and the ``autograd.Function`` that joins it to the road back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rampde.autocast import switched_off
from rampde.captures import Captures, hooks_muted, record
from rampde.control import Attempt
from rampde.grid import StepTimes, stage_times
from rampde.implicit_adjoint import ImplicitSweep, StageStates
from rampde.implicit_tableau import ImplicitTableau
from rampde.implicit_tape import integrate_implicit_taped
from rampde.newton import StageSolver, read_options
from rampde.ops import rk_update
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState, preserved
from rampde.solve import _cast, _note_precision
from rampde.tape import Gate


def solve_implicit(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """States at the grid points ``problem.kept``, leaf by leaf, differentiable in every tensor that f uses.

    ``y0``: real, dense leaves; ``problem.method``: an :class:`ImplicitTableau`; ``problem.options``: see
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
    velocity, points = problem.velocity, problem.grid.points
    if problem.grid.steps == 0:
        return [leaf[None].to(dtype) for leaf, dtype in zip(y0, problem.output_dtypes, strict=True)]
    with torch.no_grad():
        h, times = stage_times(points, _tableau(problem).nodes, velocity.spec.time_dtype, problem.perturb)
        problem.step_times = StepTimes(h, times)
        x = [leaf.detach().to(dtype) for leaf, dtype in zip(y0, velocity.dtypes, strict=True)]
    wanted = torch.is_grad_enabled()
    problem.time_needs_grad = wanted and points.requires_grad
    before = RandomState.current(velocity.spec.device)
    first, captures = _record_first(problem, problem.step_times[0][1][0], x)
    after = RandomState.current(velocity.spec.device)
    # all evaluations of a stage must see the same random numbers, whether gradients are wanted or not
    problem.random = None if before.equals(after) else before
    problem.first, problem.captures, problem.opaque = first, captures.tensors, captures.opaque
    _note_precision(problem, first)
    wanted = wanted and (
        bool(captures.tensors or captures.problem) or problem.time_needs_grad or any(leaf.requires_grad for leaf in y0)
    )
    if not wanted:
        with torch.no_grad():
            outputs = integrate_implicit(problem, y0, None)
    elif captures.problem or problem.checkpoint == "tape":
        if captures.problem and problem.checkpoint != "tape":
            warnings.warn(
                f'func {captures.problem}; the solve falls back to checkpoint="tape": more memory, 16-bit gradients'
                " are summed in 16 bits, and float16 is not scaled",
                UserWarning,
                stacklevel=3,
            )
        problem.checkpoint = "tape"
        outputs = integrate_implicit_taped(problem, y0, points)
    else:
        outputs = list(
            _ImplicitSolve.apply(  # type: ignore[no-untyped-call]
                problem, captures.observed, points, *y0, *captures.tensors
            )
        )
    if problem.random is None and not after.equals(RandomState.current(velocity.spec.device)):
        raise RuntimeError(
            "func drew random numbers, though none in its first evaluation: the evaluations of a stage saw different"
            " ones, so its equations have no solution; draw them always, or use an explicit method"
        )
    return outputs


def _tableau(problem: Problem) -> ImplicitTableau:
    assert isinstance(problem.method, ImplicitTableau)
    return problem.method


def _record_first(problem: Problem, time: Tensor, x: list[Tensor]) -> tuple[Stage, Captures]:
    """The first stage with its graph, and what f captures where gradients are wanted."""
    velocity = problem.velocity
    x = [leaf.requires_grad_() for leaf in x]
    if torch.is_grad_enabled():
        if problem.time_needs_grad:
            time = time.detach().requires_grad_()
        k, captures = record(velocity.original, velocity.evaluate_first, time, x)
        return Stage(time, x, k), captures
    with torch.enable_grad():
        return Stage(time, x, velocity.evaluate_first(time, x)), Captures()


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


class _ImplicitSolve(torch.autograd.Function):
    """The forward solve, and the sweep as its backward."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, observed: int, points: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = len(problem.leaves)
        y0, captures = tensors[:leaves], tensors[leaves:]
        checkpoints = StageStates(problem, _tableau(problem).stages)
        outputs = integrate_implicit(problem, y0, checkpoints)
        problem.first = None
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.checkpoints, ctx.observed = problem, checkpoints, observed
        # only what f was seen to use is checked for changes in place: the rest may be no business of the solve
        ctx.unobserved = captures[observed:]
        ctx.save_for_backward(points, *y0, *captures[:observed], *checkpoints.tensors())
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        leaves = len(problem.leaves)
        points, *saved = ctx.saved_tensors
        y0, saved = saved[:leaves], saved[leaves:]
        captures = [*saved[: ctx.observed], *ctx.unobserved]
        unused = (None, None)
        if all(cotangent is None for cotangent in cotangents):
            return (*unused, None, *[None] * (leaves + len(captures)))
        with ExitStack() as stack:
            if problem.stats is not None:
                stack.enter_context(problem.stats.backward())
            stack.enter_context(problem.velocity.autocast.entered())
            stack.enter_context(preserved(problem.velocity.spec.device, problem.random is not None))
            if torch.is_grad_enabled():
                return (*unused, *_differentiable_backward(problem, points, y0, captures, cotangents))
            stack.enter_context(hooks_muted(captures))
            ctx.checkpoints.restore(saved[ctx.observed :])
            # the graphs are made anew: none of them has to outlive its products
            sweep = ImplicitSweep(problem, points, ctx.checkpoints, captures, cotangents, retain_graph=False)
            try:
                gradients, points_gradient, totals = sweep.run(y0)
            finally:
                ctx.checkpoints.restore([])
        return (
            *unused,
            points_gradient,
            *(_cast(gradient, leaf) for gradient, leaf in zip(gradients, y0, strict=True)),
            *(_cast(total, capture) for total, capture in zip(totals, captures, strict=True)),
        )


def _differentiable_backward(
    problem: Problem,
    points: Tensor,
    y0: Sequence[Tensor],
    captures: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """The gradients with their own graph (``create_graph=True``): the solve is repeated on the tape."""
    if problem.random is not None:
        problem.random.restore()
    gate = Gate()
    points, y0 = gate(points), [gate(leaf) for leaf in y0]
    outputs = integrate_implicit_taped(problem, y0, points)
    return gate.gradients(outputs, cotangents, [points, *y0], captures)
