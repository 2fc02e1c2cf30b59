"""Implicit methods on the tape of plain autograd: what second derivatives and ``checkpoint="tape"`` need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rampde.autocast import switched_off
from rampde.grid import stage_times
from rampde.implicit_tableau import Block
from rampde.linear import System
from rampde.newton import StageSolver
from rampde.problem import Problem
from rampde.tape import combine

# Newton's iteration with a matrix that is held constant, begun at the solution, gains one correct derivative a time
CORRECTIONS = 2


def integrate_implicit_taped(problem: Problem, y0: Sequence[Tensor], points: Tensor) -> list[Tensor]:
    """As :func:`rampde.implicit.integrate_implicit`, recorded by autograd; differentiable twice.

    Each step is solved without a graph. From the solution two iterations of Newton's method are recorded, with the
    derivative of the equations there as a constant: near the solution the error of an iterate is that of the one
    before times a small quantity of first order, so that after two of them the values and their first and second
    derivatives are those of the solution.

    Raises:
        RuntimeError: on the way back, where a third derivative is begun.
    """
    velocity = problem.velocity
    solver = StageSolver(problem, forcing=1e-10)
    tableau, layout = solver.tableau, solver.layout
    h_all, times_all = stage_times(points, tableau.nodes, velocity.spec.time_dtype, problem.perturb)
    kept = set(problem.kept)
    with switched_off(layout.device):
        y = layout.pack(list(y0))
        compensation = torch.zeros_like(y) if problem.compensated else None
        states = [y] if 0 in kept else []
        for step in range(h_all.shape[0]):
            h, times = h_all[step], times_all[step]
            with torch.no_grad():
                solution = solver.solve(step, y.detach(), h.detach(), times.detach().unbind(0))
            recorder = _Recorder(solver, y, h, times, solution)
            for block in tableau.blocks:
                recorder.solve(block)
            update = tableau.update
            y = combine(y, h, layout.dtype, update.weights, compensation, update.pick(recorder.velocities))
            if step + 1 in kept:
                states.append(y)
        problem.first = None
        solver.warn()
        return layout.stack(states, problem.output_dtypes)


class _Recorder:
    """Records the stages of one step."""

    def __init__(self, solver: StageSolver, y: Tensor, h: Tensor, times: Tensor, solution: Sequence[Tensor]) -> None:
        self.solver, self.y, self.h, self.times = solver, y, h, times
        self.solution = solution
        self.velocities = list(solution)

    def solve(self, block: Block) -> None:
        """The velocities of a block, on the tape."""
        if block.explicit:
            self.velocities[block.stages[0]] = self._evaluate(block)[0]
            return
        system = self._system(block)
        velocities = torch.stack([self.solution[i] for i in block.stages])
        for _ in range(CORRECTIONS):
            for i, row in zip(block.stages, velocities, strict=True):
                self.velocities[i] = row
            residual = self._evaluate(block) - velocities
            velocities = velocities + _Solution.apply(system, False, residual)  # type: ignore[no-untyped-call]
        for i, row in zip(block.stages, velocities, strict=True):
            self.velocities[i] = row

    def _system(self, block: Block) -> System:
        """Newton's equations at the solution, as a constant."""
        with torch.no_grad():
            solver, y, h = self.solver, self.y.detach(), self.h.detach()
            inputs = [solver.stage_input(i, y, h, self.solution) for i in block.stages]
            times = self.times.detach()
            stages = [solver.evaluate(i, times[i], x) for i, x in zip(block.stages, inputs, strict=True)]
            return solver.system(solver.linearize(stages), block, h, 0.0)

    def _evaluate(self, block: Block) -> Tensor:
        """(m, n) f at the stages of a block, on the tape."""
        solver = self.solver
        velocity, layout = solver.problem.velocity, solver.layout
        k = []
        for i in block.stages:
            inputs = solver.tableau.stage_inputs[i]
            x = combine(self.y, self.h, layout.dtype, inputs.weights, None, inputs.pick(self.velocities))
            if solver.random:
                solver.random[i].restore()
            with velocity.autocast.entered():
                leaves = velocity.evaluate(self.times[i], layout.unpack(x, velocity.dtypes))
            k.append(_Guard.apply(layout.pack(leaves)))  # type: ignore[no-untyped-call]
        return torch.stack(k)


class _Solution(torch.autograd.Function):
    """The solution of a constant system, or of its transpose; linear in the right-hand side, to any order."""

    @staticmethod
    def forward(ctx: Any, system: System, transposed: bool, r: Tensor) -> Tensor:
        ctx.system, ctx.transposed = system, transposed
        return system.solve_transposed(r) if transposed else system.solve(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        result: Tensor = _Solution.apply(ctx.system, not ctx.transposed, grads[0])  # type: ignore[no-untyped-call]
        return None, None, result


class _Guard(torch.autograd.Function):
    """The identity, which refuses third derivatives: they would be wrong."""

    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        return k.view_as(k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        result: Tensor = _GuardOfGradient.apply(grads[0])  # type: ignore[no-untyped-call]
        return result


class _GuardOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "third derivatives of a solve by an implicit method are not available: take second derivatives without"
                " create_graph=True"
            )
        return grads[0]
