"""Plain autograd through a solve whose steps are decided on the way; the sizes of the steps are held fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.adaptive import Loop, Rows, new_norm, run_loop
from rampde.attempts import Arithmetic, AttemptedSteps, Trial
from rampde.autocast import switched_off
from rampde.control import Replay
from rampde.error_norm import ErrorNorm
from rampde.problem import Problem, Stage
from rampde.tableau import Combination
from rampde.tape import combine


def integrate_adaptive_taped(problem: Problem, y0: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`rampde.adaptive.integrate_adaptive`, every operation of the accepted steps recorded by autograd."""
    assert problem.first is not None
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)]
    norm = new_norm(problem, problem.first)
    rows = _TapedRows(problem)
    run_loop(problem, y, problem.first, TapedArithmetic(problem, problem.grid.points, norm), rows, norm)
    return rows.stacked()


def repeat_adaptive_taped(problem: Problem, y0: Sequence[Tensor], points: Tensor) -> list[Tensor]:
    """The steps that the solve took, taken again from ``y0`` and the output times ``points`` on the tape."""
    assert isinstance(problem.step_times, AttemptedSteps)
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)]
    x = [leaf.to(dtype) for leaf, dtype in zip(y0, problem.velocity.dtypes, strict=True)]
    arithmetic = TapedArithmetic(problem, points, None)
    first = arithmetic.evaluate(arithmetic.moved(problem.grid.times[0], problem.velocity.spec.time_dtype), x)
    rows = _TapedRows(problem)
    observer, problem.observer = problem.observer, None
    try:
        Loop(problem, Replay(problem.step_times.attempts), arithmetic, rows).run(y, first)
    finally:
        problem.observer = observer
    return rows.stacked()


class TapedArithmetic(Arithmetic):
    """The same steps, recorded by autograd."""

    def __init__(self, problem: Problem, points: Tensor, norm: ErrorNorm | None) -> None:
        """``points``: (T,) output times, which may require a gradient: all steps move with the first one."""
        super().__init__(problem, norm)
        self.points = points
        self.shift = points[0] - points[0].detach() if problem.time_needs_grad else None

    def moved(self, time: float, dtype: torch.dtype) -> Tensor:
        """A time as a tensor that moves with the first output time."""
        value = torch.tensor(time, dtype=self.points.dtype, device=self.points.device)
        return (value if self.shift is None else value + self.shift).to(dtype)

    def evaluate(self, time: Tensor, x: list[Tensor]) -> Stage:
        if self.shift is not None and not time.requires_grad:
            time = time + self.shift.to(time.dtype)
        return Stage(time, x, self.velocity.evaluate(time, x))

    def evaluate_again(self, time: Tensor, x: list[Tensor]) -> Stage:
        return self.evaluate(time, x)

    def stage_input(self, y: list[Tensor], k: list[list[Tensor]], h: Tensor, inputs: Combination) -> list[Tensor]:
        return [
            combine(state, h, dtype, inputs.weights, None, inputs.pick(of_leaf))
            for state, of_leaf, dtype in zip(y, k, self.velocity.dtypes, strict=True)
        ]

    def update(self, y: list[Tensor], trial: Trial) -> None:
        update, norm = self.tableau.update, self.norm
        if trial.compensation[0] is not None:
            trial.compensation = [c.clone() if c is not None else None for c in trial.compensation]
        trial.y_next = [
            combine(state, trial.h, state.dtype, update.weights, c, update.pick(of_leaf))
            for state, of_leaf, c in zip(y, trial.k, trial.compensation, strict=True)
        ]
        trial.x_next = [state.to(dtype) for state, dtype in zip(trial.y_next, self.velocity.dtypes, strict=True)]
        if self.tableau.attempted == self.tableau.stages:
            self.finish(trial)
        if norm is not None:
            with torch.no_grad():
                trial.ratio, trial.noise = norm.measured(y, trial.y_next, trial.k, trial.h)

    def output(
        self, y: list[Tensor], trial: Trial, theta: float, index: int, dtypes: Sequence[torch.dtype]
    ) -> list[Tensor]:
        where = torch.tensor(theta, dtype=trial.h.dtype, device=trial.h.device)
        if self.shift is not None:
            # the time of an event stays where it was found while the steps move
            moved = 0.0 if self.problem.event_at(index) else self.points[index] - self.points[index].detach()
            where = where + (moved - self.shift) / trial.h
        weights = [
            weight * trial.h if any(row) else None
            for weight, row in zip(self.tableau.weights_at(where), self.tableau.interpolant, strict=True)
        ]
        results = []
        for state, of_leaf, dtype in zip(y, trial.k, dtypes, strict=True):
            total = state
            for weight, value in zip(weights, of_leaf, strict=False):
                if weight is not None:
                    total = total + weight.to(total.dtype) * value.to(total.dtype)
            results.append(total.to(dtype))
        return results


class _TapedRows(Rows):
    """The result as a list of states, stacked at the end."""

    def __init__(self, problem: Problem) -> None:
        self.dtypes = problem.output_dtypes
        self.device = problem.velocity.spec.device
        self.rows: list[Sequence[Tensor]] = []

    def put(self, index: int, values: Sequence[Tensor]) -> None:
        self.rows.append([value.to(dtype) for value, dtype in zip(values, self.dtypes, strict=True)])

    def stacked(self) -> list[Tensor]:
        with switched_off(self.device):
            return [torch.stack([row[leaf] for row in self.rows]) for leaf in range(len(self.dtypes))]
