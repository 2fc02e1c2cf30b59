"""The road out with steps that are decided on the way: adaptive steps, and equal steps until an event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rampde.attempts import STIFF, Arithmetic, AttemptedSteps, TensorArithmetic, Trial, stiffness_of
from rampde.checkpoint.fp8 import Quantised
from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.control import AdaptiveSteps, Attempt, Control, EqualSteps, TooManySteps, not_finite
from rampde.error_norm import ErrorNorm, unit_of_rounding
from rampde.events import EventSearch
from rampde.grid import Output, TimeGrid
from rampde.options import AdaptiveOptions, EqualOptions
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.tableau import EmbeddedTableau


class Rows:
    """The result: a row for each output."""

    def __init__(self, y: Sequence[Tensor], count: int, dtypes: Sequence[torch.dtype]) -> None:
        self.dtypes = dtypes
        self.leaves = [
            torch.empty_strided((count, *leaf.shape), (leaf.numel(), *leaf.stride()), dtype=dtype, device=leaf.device)
            for leaf, dtype in zip(y, dtypes, strict=True)
        ]

    def step(self, arithmetic: Arithmetic, y: list[Tensor], trial: Trial) -> None:
        """A step from ``y`` was accepted."""

    def put(self, index: int, values: Sequence[Tensor]) -> None:
        """The output ``index``."""
        for leaf, value in zip(self.leaves, values, strict=True):
            leaf[index] = value


@dataclass
class Course:
    """How a solve whose steps are decided on the way went.

    ``outputs``: where each output lies among the accepted steps; ``event_time``: where the event is, once found.
    """

    steps: AttemptedSteps
    outputs: list[Output] = field(default_factory=lambda: [Output(-1, inside=False)])
    event_time: float | None = None


class Loop:
    """Takes steps until every output is written, or until the event.

    Args:
        problem: the solve.
        control: proposes steps and judges them.
        arithmetic: takes them.
        rows: receives the outputs.
        checkpoints: where gradients are wanted, keeps of every accepted step what the sweep will need.
        search: looks for an event, whose state is then the only output after the first.
    """

    def __init__(
        self,
        problem: Problem,
        control: Control,
        arithmetic: Arithmetic,
        rows: Rows,
        checkpoints: Checkpoints | None = None,
        search: EventSearch | None = None,
    ) -> None:
        self.problem, self.control, self.arithmetic, self.rows = problem, control, arithmetic, rows
        self.checkpoints, self.search = checkpoints, search
        self.course = Course(arithmetic.steps)
        self.times, self.sign = problem.output_times, problem.sign
        self.due = 1
        self.latest: tuple[list[Tensor], Trial] | None = None

    def run(self, y: list[Tensor], first: Stage) -> Course:
        """Integrates from ``y``, the leaves of y0 in the state's dtype, where f has the stage ``first``."""
        problem, control, arithmetic, observer = self.problem, self.control, self.arithmetic, self.problem.observer
        compensation: list[Tensor | None] = [torch.zeros_like(leaf) if problem.compensated else None for leaf in y]
        random: tuple[RandomState, ...] = () if problem.random is None else (problem.random,)
        quantised: list[Quantised] | None = None
        self.rows.put(0, y)
        if self._ended(y):
            return self.course
        measured_at: Stage | None = first  # before the loop, where it is measured at all
        trial: Trial | None
        while True:
            attempt = self._propose()
            # the velocities of the step before go before those of the next one are made
            self.latest = trial = None
            if observer is not None:
                observer.step(attempt, y)
            trial = arithmetic.attempt(y, first, compensation, attempt)
            self.latest = y, trial
            if 1.0 < trial.ratio < math.inf and arithmetic.norm is not None and arithmetic.norm.measurable:
                # before the step is given up: is it the rounding of f here?
                if measured_at is not first:
                    trial.ratio, trial.noise = arithmetic.norm.measure(y, first)
                measured_at = first
            if not control.judge(attempt, trial.ratio, trial.noise):
                if observer is not None:
                    observer.rejected(attempt, y, trial.ratio)
                continue
            if observer is not None:
                observer.accepted(attempt, y, trial.ratio)
            if not math.isfinite(trial.ratio):
                raise not_finite(attempt.end, abs(attempt.h))
            self.rows.step(arithmetic, y, trial)
            ended = self._write_event(y, trial) if self.search is not None else self._write_outputs(y, trial)
            if self.checkpoints is not None:
                start = StepStart(y, first.x, compensation, (*random, *trial.random[:1]), quantised)
                self.checkpoints.store(start, trial.stages)
            arithmetic.steps.attempts.append(attempt)
            if ended:
                return self.course
            y, compensation, quantised = trial.y_next, trial.compensation, trial.quantised
            first, random = self._next_first(trial)

    def _ended(self, y: list[Tensor]) -> bool:
        """Whether there is nothing to do: no other output, or an event at the start."""
        if self.search is None:
            return len(self.times) == 1
        if not self.search.begins_at_event(self.times[0], y):
            return False
        self.rows.put(1, y)
        self.course.outputs.append(Output(-1, inside=False))
        self.course.event_time = self.times[0]
        return True

    def _next_first(self, trial: Trial) -> tuple[Stage, tuple[RandomState, ...]]:
        """The first stage of the next step: the last one, unless f jumps in between."""
        arithmetic = self.arithmetic
        if not trial.attempt.before_jump:
            arithmetic.finish(trial)
            assert trial.last is not None
            return trial.last, trial.random[1:]
        end, sign = trial.attempt.end, self.sign
        _, times = arithmetic.steps.tensors(Attempt(end, end + sign, sign, after_jump=True))
        random = arithmetic.random()
        return arithmetic.evaluate_again(times[0], trial.x_next), random

    def _write_outputs(self, y: list[Tensor], trial: Trial) -> bool:
        """Writes the outputs that lie in the step; says whether they were the last ones."""
        start, end = trial.attempt.start, trial.attempt.end
        while self.due < len(self.times) and self.sign * (end - self.times[self.due]) >= 0:
            time = self.times[self.due]
            if time == end and not self.problem.time_needs_grad:
                self._put(trial.y_next, Output(len(self.arithmetic.steps), inside=False))
            else:
                self._interpolate(y, trial, 1.0 if time == end else (time - start) / (end - start))
            self.due += 1
            self.control.new_interval()
        return self.due == len(self.times)

    def _write_event(self, y: list[Tensor], trial: Trial) -> bool:
        """Writes the state at the event, where it lies in the step."""
        assert self.search is not None
        start, end = trial.attempt.start, trial.attempt.end
        if not self.search.crossed(end, trial.y_next):
            return False
        self.arithmetic.finish(trial)

        def state_at(time: float) -> list[Tensor]:
            theta = (time - start) / (end - start)
            return self.arithmetic.output(y, trial, theta, 1, [leaf.dtype for leaf in y])

        with torch.no_grad():
            time = self.search.locate(state_at, start, end)
        self.course.event_time = time
        self._interpolate(y, trial, (time - start) / (end - start))
        return True

    def _interpolate(self, y: list[Tensor], trial: Trial, theta: float) -> None:
        self.arithmetic.finish(trial)
        place = Output(len(self.arithmetic.steps), inside=True, theta=theta)
        self._put(self.arithmetic.output(y, trial, theta, self.due, self.rows.dtypes), place)

    def _put(self, values: list[Tensor], place: Output) -> None:
        self.rows.put(len(self.course.outputs), values)
        self.course.outputs.append(place)

    def _propose(self) -> Attempt:
        try:
            return self.control.propose()
        except TooManySteps as error:
            stiffness = 0.0 if self.latest is None else stiffness_of(self.arithmetic.tableau, *self.latest)
            raise RuntimeError(f"{error}{advice(stiffness)}") from None


def advice(stiffness: float) -> str:
    """What to do where there are too many steps."""
    if stiffness > STIFF:
        return (
            f". The problem is stiff here (h times the rate of its fastest decay is about {stiffness:.2g}, where"
            ' explicit methods bear 3): use an implicit method, such as "radauIIA5"'
        )
    return (
        ". Raise options['max_num_steps'] or the tolerances; if the problem is stiff, use an implicit"
        ' method, such as "radauIIA5"'
    )


def integrate_adaptive(problem: Problem, y0: Sequence[Tensor], checkpoints: Checkpoints | None) -> list[Tensor]:
    """The states at ``problem.output_times``, or at the start and the event: for each leaf (T, *shape).

    ``problem`` learns of the steps that were taken. ``checkpoints``, where gradients are wanted, keeps of every
    accepted step what the sweep will need.
    """
    assert problem.first is not None
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)]
    norm = new_norm(problem, problem.first)
    rows = Rows(y, 2 if problem.search is not None else len(problem.output_times), problem.output_dtypes)
    if norm is not None and TensorArithmetic.serves(problem, norm, checkpoints):
        arithmetic: Arithmetic = TensorArithmetic(problem, norm, checkpoints)
    else:
        arithmetic = Arithmetic(problem, norm, checkpoints)
    run_loop(problem, y, problem.first, arithmetic, rows, norm, checkpoints)
    return rows.leaves


def new_norm(problem: Problem, first: Stage) -> ErrorNorm | None:
    """The norm of the error; None where steps are not judged."""
    if not isinstance(problem.control, AdaptiveOptions):
        return None
    return ErrorNorm(problem, problem.control.norm, unit_of_rounding(problem, first.k))


def run_loop(
    problem: Problem,
    y: list[Tensor],
    first: Stage,
    arithmetic: Arithmetic,
    rows: Rows,
    norm: ErrorNorm | None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Integrates by the control that the problem asks for, and tells the problem how it went."""
    start, sign = problem.output_times[0], problem.sign
    control: AdaptiveSteps | EqualSteps
    if isinstance(problem.control, EqualOptions):
        control = EqualSteps(start, sign * problem.control.step_size, problem.control.max_num_steps)
    else:
        assert norm is not None
        control = adaptive_steps(problem, y, first, norm)
    course = Loop(problem, control, arithmetic, rows, checkpoints, problem.search).run(y, first)
    if norm is not None and isinstance(control, AdaptiveSteps):
        norm.warn_of_rounding(control.worst_noise)
    conclude(problem, course)


def adaptive_steps(problem: Problem, y: list[Tensor], first: Stage, norm: ErrorNorm) -> AdaptiveSteps:
    """The control of a solve from ``y``, with the size of its first step; ``norm`` measures the rounding of f."""
    options, method = problem.control, problem.method
    assert isinstance(options, AdaptiveOptions)
    assert isinstance(method, EmbeddedTableau)
    start, sign, order = problem.output_times[0], problem.sign, method.control_order
    if norm.measurable:
        norm.measure(y, first)
    h = options.first_step
    if h is None:
        with torch.no_grad():
            h = norm.first_step(y, first, start, sign, order)
    return AdaptiveSteps(options, order, start, sign, h)


def conclude(problem: Problem, course: Course) -> None:
    """Tells the problem how its solve went."""
    start = problem.output_times[0]
    problem.step_times = course.steps
    problem.grid = TimeGrid(problem.grid.points, course.steps.points or [start], course.outputs)
    if course.event_time is not None:
        problem.event_time = course.event_time
        problem.output_times = [start, course.event_time]
