"""The ``autograd.Function`` that joins the road out and the road back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rampde.adaptive import integrate_adaptive
from rampde.adjoint import Sweep
from rampde.captures import Captures, hooks_muted, record
from rampde.checkpoint import Checkpoints, new_checkpoints
from rampde.forward import integrate
from rampde.grid import StepTimes, stage_times
from rampde.per_sample import integrate_per_sample
from rampde.per_sample_adjoint import PerSampleSweep
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState, preserved
from rampde.tape import Gate, integrate_taped
from rampde.tape_adaptive import integrate_adaptive_taped, repeat_adaptive_taped


def solve(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """The states that the solve returns, leaf by leaf, differentiable in every tensor that f uses.

    On a grid that is known before: the states at the grid points ``problem.kept``; else one for each output time.
    ``y0``: real, dense leaves. The first stage is evaluated here, checked, and searched for what f captures.
    """
    velocity, points = problem.velocity, problem.grid.points
    if problem.checkpoint == "tape":
        return _solve_taped(problem, y0, points)
    with torch.no_grad():
        if problem.closed is None:
            h, times = stage_times(points, problem.tableau.nodes, velocity.spec.time_dtype, problem.perturb)
            problem.step_times = StepTimes(h, times)
        x = [leaf.detach().to(dtype) for leaf, dtype in zip(y0, velocity.dtypes, strict=True)]
    if problem.is_empty:
        return [leaf[None].to(dtype) for leaf, dtype in zip(y0, problem.output_dtypes, strict=True)]
    time = problem.first_time().detach()
    if not torch.is_grad_enabled():
        problem.first = Stage(time, x, velocity.evaluate_first(time, x))
        return _integrate(problem, y0, None)

    problem.time_needs_grad = points.requires_grad
    before = RandomState.current(velocity.spec.device)
    first, captures = _record_first(problem, time, x)
    problem.first, problem.captures, problem.opaque = first, captures.tensors, captures.opaque
    if captures.problem:
        warnings.warn(
            f'func {captures.problem}; the solve falls back to checkpoint="tape": more memory, 16-bit gradients are'
            " summed in 16 bits, and float16 is not scaled",
            UserWarning,
            stacklevel=3,
        )
        return _solve_taped(problem, y0, points)
    _note_precision(problem, first)
    wanted = captures.tensors or problem.time_needs_grad or any(leaf.requires_grad for leaf in y0)
    if not wanted:
        with torch.no_grad():
            return _integrate(problem, y0, None)
    after = RandomState.current(velocity.spec.device)
    problem.random = None if before.equals(after) else before
    if problem.per_sample and problem.random is not None:
        raise RuntimeError(
            "func draws random numbers, which cannot be replayed with options['batch_axis']; use checkpoint=\"tape\""
        )
    outputs = _AdjointSolve.apply(  # type: ignore[no-untyped-call]
        problem, captures.observed, points, *y0, *captures.tensors
    )
    replayable = problem.checkpoint != "step" or problem.random is not None
    if not replayable and not after.equals(RandomState.current(velocity.spec.device)):
        raise RuntimeError(
            "func drew random numbers, though none in its first evaluation, so they cannot be replayed in the"
            ' backward pass; use checkpoint="none"'
        )
    return list(outputs)


def _integrate(problem: Problem, y0: Sequence[Tensor], checkpoints: Checkpoints | None) -> list[Tensor]:
    """The road out, on a grid or with steps that are decided on the way."""
    y0 = [leaf.detach() for leaf in y0]
    if problem.per_sample:
        return integrate_per_sample(problem, y0, checkpoints)
    if problem.closed is not None:
        return integrate_adaptive(problem, y0, checkpoints)
    assert isinstance(problem.step_times, StepTimes)
    return integrate(problem, y0, problem.step_times, checkpoints)


def _record_first(problem: Problem, time: Tensor, x: list[Tensor]) -> tuple[Stage, Captures]:
    """The first stage, with its graph where the policy keeps graphs, and what f captures."""
    velocity = problem.velocity
    if problem.time_needs_grad:
        time = time.detach().requires_grad_()
    for leaf in x:
        leaf.requires_grad_()
    k, captures = record(velocity.original, velocity.evaluate_first, time, x)
    if problem.checkpoint != "none":
        # plain aliases: the graph is not needed again, and a checkpoint is no leaf of a graph
        k, x = [value.detach() for value in k], [leaf.detach() for leaf in x]
    return Stage(time, x, k), captures


def _note_precision(problem: Problem, first: Stage) -> None:
    """Scaling is for float16 wherever it enters: in the input of f, under autocast, or in what f returns."""
    half = problem.velocity.half or any(value.dtype == torch.float16 for value in first.k)
    if not half:
        problem.poison = False
        if not problem.scaler_given:
            problem.scaler = None


def _solve_taped(problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
    problem.checkpoint = "tape"
    problem.time_needs_grad = points.requires_grad and torch.is_grad_enabled()
    if problem.is_empty:
        return [leaf[None].to(dtype) for leaf, dtype in zip(y0, problem.output_dtypes, strict=True)]
    velocity = problem.velocity
    if problem.closed is not None:
        time = problem.first_time()
    else:
        time = stage_times(points[:2], problem.tableau.nodes[:1], velocity.spec.time_dtype, problem.perturb)[1][0, 0]
    x = [leaf.to(dtype) for leaf, dtype in zip(y0, velocity.dtypes, strict=True)]
    first = Stage(time, x, velocity.evaluate_first(time, x))
    if problem.per_sample:
        problem.first = first
        return integrate_per_sample(problem, y0, None)
    if problem.closed is not None:
        problem.first = first
        return integrate_adaptive_taped(problem, y0)
    return integrate_taped(problem, y0, points, first)


class _AdjointSolve(torch.autograd.Function):
    """The forward solve, and the sweep as its backward."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, observed: int, points: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = len(problem.leaves)
        y0, captures = tensors[:leaves], tensors[leaves:]
        checkpoints = new_checkpoints(problem)
        outputs = _integrate(problem, y0, checkpoints)
        problem.first = None
        if problem.velocity.autocast.enabled and not checkpoints.needs_graph:
            # casts made above without a graph would detach these parameters in the rest of the caller's region
            torch.clear_autocast_cache()
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.checkpoints, ctx.observed = problem, checkpoints, observed
        # only what f was seen to use is checked for changes in place: the rest may be no business of the solve
        ctx.unobserved = captures[observed:]
        ctx.save_for_backward(points, *y0, *captures[:observed], *checkpoints.tensors())
        ctx.swept = False
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
            retain_graph = torch._C._autograd._get_current_graph_task_keep_graph()
            if problem.checkpoint == "none" and ctx.swept:
                raise RuntimeError(
                    "the graphs of this solve were freed by an earlier backward pass; give that one"
                    ' retain_graph=True, or solve with checkpoint="step"'
                )
            ctx.swept = problem.checkpoint == "none" and not retain_graph
            stack.enter_context(hooks_muted(captures))
            ctx.checkpoints.restore(saved[ctx.observed :])
            # a sweep that may have to resume needs its graphs twice
            keep = retain_graph or (problem.checkpoint == "none" and problem.scaler is not None)
            kind = PerSampleSweep if problem.per_sample else Sweep
            sweep = kind(problem, points, ctx.checkpoints, captures, cotangents, keep)
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


def _cast(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(tensor.dtype)


def _differentiable_backward(
    problem: Problem,
    points: Tensor,
    y0: Sequence[Tensor],
    captures: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """The gradients with their own graph (``create_graph=True``): the solve is repeated on the tape."""
    if problem.per_sample:
        raise RuntimeError("second derivatives of a solve with options['batch_axis'] need checkpoint=\"tape\"")
    if problem.random is not None:
        if problem.closed is not None:
            raise RuntimeError(
                "func draws random numbers, which the repetition of an adaptive solve cannot draw again, as second"
                ' derivatives need; use checkpoint="tape" or a method with fixed steps'
            )
        problem.random.restore()
    gate = Gate()
    points, y0 = gate(points), [gate(leaf) for leaf in y0]
    if problem.closed is not None:
        outputs = repeat_adaptive_taped(problem, y0, points)
    else:
        outputs = integrate_taped(problem, y0, points)
    return gate.gradients(outputs, cotangents, [points, *y0], captures)
