"""Plain autograd through the operators: double backward, forward mode, and the oracle of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rampde.autocast import switched_off
from rampde.control import Attempt
from rampde.grid import stage_times
from rampde.ops import rk_stage, rk_update
from rampde.precision import accumulation_dtype
from rampde.problem import Problem, Stage


def tape_is_needed() -> bool:
    """Whether forward mode or a transform of ``torch.func`` is active, which see through the tape alone."""
    in_forward_mode: bool = forward_ad._current_level >= 0
    return in_forward_mode or torch._C._are_functorch_transforms_active()


class Combination(torch.autograd.Function):
    """``round(y + h sum_j a_j k_j)`` by the fused operators, differentiable to any order.

    ``compensation``, where given, carries the rounding error of the sum; it is updated, not differentiated.
    """

    @staticmethod
    def forward(
        y: Tensor, h: Tensor, dtype: torch.dtype, a: list[float], compensation: Tensor | None, *k: Tensor
    ) -> Tensor:
        if compensation is None:
            result: Tensor = rk_stage(y, list(k), h, a, dtype)
            return result
        result = torch.empty_like(y)
        rk_update(y, list(k), h, a, result, None, compensation)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, h, dtype, a, _, *k = inputs
        ctx.save_for_backward(h, *k)
        ctx.save_for_forward(h, *k)
        ctx.y_dtype, ctx.dtype, ctx.a = y.dtype, dtype, a

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        y, h, dtype, a, compensation, *k = inputs
        y_dim, h_dim, _, _, compensation_dim, *k_dims = in_dims
        if h_dim is not None or (compensation is not None and compensation_dim is None):
            raise RuntimeError("step sizes and compensated sums cannot be batched by torch.func.vmap")

        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        # elementwise: a further dimension changes nothing
        terms = [batched(value, dim) for value, dim in zip(k, k_dims, strict=True)]
        compensation = None if compensation is None else compensation.movedim(compensation_dim, 0)
        return Combination.apply(batched(y, y_dim).contiguous(), h, dtype, a, compensation, *terms), 0  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        h, *k = ctx.saved_tensors
        grad = grad_outputs[0].to(accumulation_dtype(ctx.y_dtype))
        scaled = h.to(grad.dtype) * grad
        grad_h = None
        if ctx.needs_input_grad[1]:
            products = [a * (grad * value.to(grad.dtype)).sum() for a, value in zip(ctx.a, k, strict=True)]
            grad_h = sum(products, start=grad.new_zeros(())).to(h.dtype)
        grad_k = [(a * scaled).to(value.dtype) for a, value in zip(ctx.a, k, strict=True)]
        return grad.to(ctx.y_dtype), grad_h, None, None, None, *grad_k

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        y_dot, h_dot, _, _, _, *k_dot = tangents
        h, *k = ctx.saved_tensors
        dtype = accumulation_dtype(ctx.y_dtype)
        total = torch.zeros_like(k[0], dtype=dtype) if y_dot is None else y_dot.to(dtype)
        for a, value, value_dot in zip(ctx.a, k, k_dot, strict=True):
            if value_dot is not None:
                total = total + (a * h).to(dtype) * value_dot.to(dtype)
            if h_dot is not None:
                total = total + (a * h_dot).to(dtype) * value.to(dtype)
        return total.to(ctx.dtype)


class Gate:
    """The identity on tensors, which holds gradients back while it is closed.

    A product with respect to a tensor and to another one it was computed from would run through the computation
    between the two; behind a gate it does not, and later derivatives pass.
    """

    def __init__(self) -> None:
        self.closed = False

    def __call__(self, tensor: Tensor) -> Tensor:
        result: Tensor = _Gated.apply(self, tensor)  # type: ignore[no-untyped-call]
        return result

    def gradients(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        gated: Sequence[Tensor],
        others: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Gradients, with their own graph, of ``outputs`` with respect to ``gated`` and ``others``."""
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        inputs = [*gated, *others]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if not pairs or not wanted:
            return [None] * len(inputs)
        self.closed = True
        try:
            found = iter(
                torch.autograd.grad(
                    [output for output, _ in pairs],
                    wanted,
                    [cotangent for _, cotangent in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
        finally:
            self.closed = False
        return [next(found) if tensor.requires_grad else None for tensor in inputs]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Gate, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        return None, None if ctx.gate.closed else grads[0]


def integrate_taped(problem: Problem, y0: Sequence[Tensor], points: Tensor, first: Stage | None = None) -> list[Tensor]:
    """As :func:`rampde.forward.integrate`, every operation recorded by autograd.

    ``first``: the first stage, where it has been evaluated from ``y0`` on the tape already.
    """
    velocity, tableau, update = problem.velocity, problem.tableau, problem.tableau.update
    h_all, times_all = stage_times(points, tableau.nodes, velocity.spec.time_dtype, problem.perturb)
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, velocity.spec.leaves, strict=True)]
    compensation = [torch.zeros_like(leaf) if problem.compensated else None for leaf in y]
    kept = set(problem.kept)
    results = [y] if 0 in kept else []
    # a repetition, which evaluates its first stage by itself, is no business of those who listen
    observer = None if first is None else problem.observer
    for step in range(h_all.shape[0]):
        h, times = h_all[step], times_all[step]
        start, end = problem.grid.times[step : step + 2]
        attempt = Attempt(start, end, end - start)
        if observer is not None:
            observer.step(attempt, y)
        velocities: list[list[Tensor]] = []
        for i, inputs in enumerate(tableau.stage_inputs):
            if step == 0 and i == 0 and first is not None:
                velocities.append(first.k)
                continue
            x = [
                combine(leaf, h, dtype, inputs.weights, None, [velocities[j][n] for j in inputs.stages])
                for n, (leaf, dtype) in enumerate(zip(y, velocity.dtypes, strict=True))
            ]
            velocities.append(velocity.evaluate(times[i], x))
        before = y
        y = [
            combine(leaf, h, leaf.dtype, update.weights, compensation[n], [velocities[i][n] for i in update.stages])
            for n, leaf in enumerate(y)
        ]
        if observer is not None:
            observer.accepted(attempt, before, 0.0)
        if step + 1 in kept:
            results.append(y)
    with switched_off(points.device):
        return [torch.stack([state[n] for state in results]).to(dtype) for n, dtype in enumerate(problem.output_dtypes)]


def combine(
    y: Tensor, h: Tensor, dtype: torch.dtype, a: list[float], compensation: Tensor | None, k: list[Tensor]
) -> Tensor:
    if not k:
        return y.to(dtype)
    result: Tensor = Combination.apply(y, h, dtype, a, compensation, *k)  # type: ignore[no-untyped-call]
    return result
