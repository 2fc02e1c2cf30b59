"""A multistep solve by plain autograd through the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.adams import Weights, step_weights
from rampde.autocast import switched_off
from rampde.grid import stage_times
from rampde.multistep_stages import RK4, Iteration, formulas_of
from rampde.problem import Problem
from rampde.tape import Combination


def integrate_multistep_taped(problem: Problem, y0: Sequence[Tensor], points: Tensor) -> list[Tensor]:
    """As :func:`rampde.multistep.integrate_multistep`, every operation recorded by autograd.

    The gradient of an implicit step is that of its iterations, as many as the road out takes.
    """
    velocity, formulas, iteration = problem.velocity, formulas_of(problem), Iteration(problem)
    h_all, times_all = stage_times(points, RK4.nodes, velocity.spec.time_dtype, problem.perturb)
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, velocity.spec.leaves, strict=True)]
    zeros = [torch.zeros_like(leaf) for leaf in y]
    compensation = [torch.zeros_like(leaf) if problem.compensated else None for leaf in y]
    one = points.detach().new_ones(())
    history: list[list[Tensor]] = [[] for _ in y]
    kept = set(problem.kept)
    results = [y] if 0 in kept else []

    def increments_of(step: int, weights: Weights, implicit: bool) -> list[Tensor]:
        """The part of the increments that comes from the history."""
        numbers = _differentiable(points, step, weights, implicit)[int(implicit) :]
        return [_sum(zero, past[: len(numbers)], numbers) for zero, past in zip(zeros, history, strict=True)]

    for step in range(h_all.shape[0]):
        h, times = h_all[step], times_all[step]
        evaluate = velocity.evaluate_first if step == 0 else velocity.evaluate
        k = evaluate(times[0], [leaf.to(dtype) for leaf, dtype in zip(y, velocity.dtypes, strict=True)])
        for past, value in zip(history, k, strict=True):
            past.insert(0, value)
            del past[formulas.history :]
        formula = formulas[step]
        if formula is None:
            velocities = [k]
            for i, inputs in list(enumerate(RK4.stage_inputs))[1:]:
                x = [
                    _combined(leaf, h, dtype, inputs.weights, None, [velocities[j][n] for j in inputs.stages])
                    for n, (leaf, dtype) in enumerate(zip(y, velocity.dtypes, strict=True))
                ]
                velocities.append(velocity.evaluate(times[i], x))
            y = [
                _combined(leaf, h, leaf.dtype, RK4.update.weights, compensation[n], [value[n] for value in velocities])
                for n, leaf in enumerate(y)
            ]
        else:
            increments = increments_of(step, formula.predictor, implicit=False)
            if formula.corrector is not None:
                known = increments_of(step, formula.corrector, implicit=True)
                weight = _differentiable(points, step, formula.corrector, True)[0]
                for _ in range(iteration.max_iters):
                    x = [
                        _combined(leaf, one, dtype, [1.0], None, [increment])
                        for leaf, increment, dtype in zip(y, increments, velocity.dtypes, strict=True)
                    ]
                    k = velocity.evaluate(times[-1], x)
                    previous = increments
                    increments = [_sum(base, [value], [weight]) for base, value in zip(known, k, strict=True)]
                    if iteration.agree(previous, increments):
                        break
                else:
                    iteration.note_failure(step)
            y = [
                _combined(leaf, one, leaf.dtype, [1.0], compensation[n], [increment])
                for n, (leaf, increment) in enumerate(zip(y, increments, strict=True))
            ]
        if step + 1 in kept:
            results.append(y)
    iteration.warn()
    with switched_off(points.device):
        return [torch.stack([state[n] for state in results]).to(dtype) for n, dtype in enumerate(problem.output_dtypes)]


def _differentiable(points: Tensor, step: int, weights: Weights, implicit: bool) -> Sequence[Tensor]:
    """The weights of a step times its size, as 0-dim tensors that know how they depend on the grid."""
    past = len(weights.values) - int(implicit)
    if points.requires_grad or _has_tangent(points):
        return step_weights(points[None, step + 1 - past : step + 2], implicit)[0].unbind(0)
    return ((points[step + 1] - points[step]) * weights.row).unbind(0)


def _has_tangent(points: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(points).tangent is not None


def _combined(
    y: Tensor, h: Tensor, dtype: torch.dtype, a: list[float], compensation: Tensor | None, k: list[Tensor]
) -> Tensor:
    result: Tensor = Combination.apply(y, h, dtype, a, compensation, *k)  # type: ignore[no-untyped-call]
    return result


def _sum(y: Tensor, k: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``y + sum_j weights_j k_j``, differentiable in all of them."""
    for value, weight in zip(k, weights, strict=True):
        y = _combined(y, weight, y.dtype, [1.0], None, [value])
    return y
