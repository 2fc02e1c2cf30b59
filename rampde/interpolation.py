"""Outputs between the steps of a fixed grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rampde.autocast import switched_off
from rampde.captures import hooks_muted
from rampde.grid import time_dtype
from rampde.precision import accumulation_dtype
from rampde.problem import Problem, Stage
from rampde.scaling import power_of_two_below
from rampde.tape import Gate
from rampde.velocity import vector_jacobian_product

METHODS = ("linear", "cubic")


def interpolate(problem: Problem, states: list[Tensor], t: Tensor, method: str) -> list[Tensor]:
    """The result at the output times ``t``, leaf by leaf, from the states at the grid points ``problem.kept``.

    Outputs at grid points are the states themselves. "linear" joins the ends of a step by a line; "cubic" is
    Hermite interpolation with the velocities at both ends (Hairer, Norsett, Wanner I, II.6, eq. 6.7).
    """
    outputs = problem.grid.outputs
    if not any(output.inside for output in outputs):
        return states
    t = t.to(states[0].device, time_dtype(states[0].device))
    points = problem.grid.points
    row = {point: index for index, point in enumerate(problem.grid.kept)}
    velocities: dict[int, list[Tensor]] = {}

    def velocity_at(point: int) -> list[Tensor]:
        if point not in velocities:
            time = points[point].to(problem.velocity.spec.time_dtype)
            velocities[point] = _velocity(problem, time, [state[row[point]] for state in states])
        return velocities[point]

    results: list[list[Tensor]] = []
    for output, time in zip(outputs, t.unbind(0), strict=True):
        end = output.step + 1
        if not output.inside:
            results.append([state[row[end]] for state in states])
            continue
        start = output.step
        h = points[end] - points[start]
        theta = (time - points[start]) / h
        pairs = [(state[row[start]], state[row[end]]) for state in states]
        if method == "linear":
            results.append([y0 + theta.to(y0.dtype) * (y1 - y0) for y0, y1 in pairs])
            continue
        k0, k1 = velocity_at(start), velocity_at(end)
        results.append([_hermite(theta, h, y0, y1, k0[leaf], k1[leaf]) for leaf, (y0, y1) in enumerate(pairs)])
    dtypes = [leaf.real_dtype for leaf in problem.velocity.spec.leaves]
    with switched_off(points.device):
        return [torch.stack([result[leaf] for result in results]).to(dtype) for leaf, dtype in enumerate(dtypes)]


def _hermite(theta: Tensor, h: Tensor, y0: Tensor, y1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    dtype = y0.dtype
    rest = 1 - theta
    bump = theta * rest
    line = y0 + theta.to(dtype) * (y1 - y0)
    # the cubic as a correction of the line: exact at both ends
    chord = (bump * (1 - 2 * theta)).to(dtype) * (y0 - y1)
    slopes = (h * bump * rest).to(dtype) * k0.to(dtype) - (h * bump * theta).to(dtype) * k1.to(dtype)
    return line + chord + slopes


def _velocity(problem: Problem, time: Tensor, y: list[Tensor]) -> list[Tensor]:
    """f at a grid point, in the state's dtype."""
    if problem.checkpoint.is_tape or not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        x = [leaf.to(dtype) for leaf, dtype in zip(y, problem.velocity.dtypes, strict=True)]
        return problem.velocity.evaluate(time, x)
    return list(_Evaluation.apply(problem, time, len(y), *y, *problem.captures))  # type: ignore[no-untyped-call]


def _unscaled(product: Tensor, scale: Tensor) -> Tensor:
    # 16 bits would not hold what the scale kept in range; complex dtypes are wide enough
    return (product if product.is_complex() else product.to(accumulation_dtype(product.dtype))) / scale


class _Evaluation(torch.autograd.Function):
    """One evaluation of f whose cotangent is scaled into the range of 16 bits, as the sweep's are."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, time: Tensor, leaves: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        velocity = problem.velocity
        y, ctx.captures = tensors[:leaves], tensors[leaves:]
        ctx.save_for_backward(time, *y)
        x = [leaf.detach().to(dtype) for leaf, dtype in zip(y, velocity.dtypes, strict=True)]
        time = time.detach().requires_grad_()
        ctx.problem, ctx.stage = problem, Stage(time, x, velocity.evaluate_with_graph(time, x))
        ctx.y_dtypes = [leaf.dtype for leaf in y]
        return tuple(k.detach().to(leaf.dtype) for k, leaf in zip(ctx.stage.k, y, strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        problem, stage = ctx.problem, ctx.stage
        if torch.is_grad_enabled():
            return _Evaluation._differentiable_backward(ctx, cotangents)
        scale = cotangents[0].new_ones(())
        if problem.scaler is not None:
            largest = torch.stack([cotangent.abs().amax() for cotangent in cotangents]).amax()
            scale = power_of_two_below(problem.scaler.target / largest)
        scaled = [
            (scale * cotangent).to(k.dtype) if k.requires_grad else None
            for cotangent, k in zip(cotangents, stage.k, strict=True)
        ]
        with problem.velocity.autocast.entered(), hooks_muted(ctx.captures):
            products = vector_jacobian_product(
                stage.k, [*stage.x, stage.time, *ctx.captures], scaled, retain_graph=True
            )
        gradients = [
            None if product is None else _unscaled(product, scale).to(dtype)
            for product, dtype in zip(
                products,
                [*ctx.y_dtypes, stage.time.dtype, *(capture.dtype for capture in ctx.captures)],
                strict=True,
            )
        ]
        leaves = len(stage.x)
        return (None, gradients[leaves], None, *gradients[:leaves], *gradients[leaves + 1 :])

    @staticmethod
    def _differentiable_backward(ctx: Any, cotangents: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The gradients with their own graph: the evaluation is repeated as autograd would record it."""
        velocity = ctx.problem.velocity
        gate = Gate()
        time, *y = (gate(tensor) for tensor in ctx.saved_tensors)
        with velocity.autocast.entered():
            x = [leaf.to(dtype) for leaf, dtype in zip(y, velocity.dtypes, strict=True)]
            k = [value.to(leaf.dtype) for value, leaf in zip(velocity.evaluate(time, x), y, strict=True)]
            gradients = gate.gradients(k, cotangents, [time, *y], ctx.captures)
        return (None, gradients[0], None, *gradients[1:])
