"""The road out with steps that are decided on the way: adaptive steps, and equal steps until an event."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rampde.checkpoint import Checkpoints
from rampde.control import AdaptiveSteps, Attempt, Control, EqualSteps, TooManySteps
from rampde.error_norm import ErrorNorm, unit_of_rounding
from rampde.events import EventSearch
from rampde.grid import Output, TimeGrid, time_dtype
from rampde.ops import rk_stage, rk_update
from rampde.options import AdaptiveOptions, EqualOptions
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.tableau import ClosedTableau, Combination, EmbeddedTableau
from rampde.velocity import Velocity

# of two stages at the same time, how much further apart their velocities are than the stability of any explicit
# method bears (Hairer, Wanner II, IV.2, eq. 2.6 and figure 2.1: 3.3 for order 5)
STIFF = 2.5


class AttemptedSteps:
    """The accepted steps of a solve: step size and stage times of each, as 0-dim tensors made when asked for."""

    def __init__(self, nodes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.attempts: list[Attempt] = []
        self._nodes, self._dtype, self._device = nodes, dtype, device

    def __len__(self) -> int:
        return len(self.attempts)

    def __getitem__(self, step: int) -> tuple[Tensor, Sequence[Tensor]]:
        return self.tensors(self.attempts[step])

    @property
    def points(self) -> list[float]:
        """Start of the first step and ends of all."""
        return [*(attempt.start for attempt in self.attempts[:1]), *(attempt.end for attempt in self.attempts)]

    def tensors(self, attempt: Attempt) -> tuple[Tensor, Sequence[Tensor]]:
        """Step size and stage times of ``attempt``, in one transfer to the device."""
        start, end, h, after_jump, before_jump = attempt
        wide = time_dtype(self._device)
        values = [h, *[end if node == 1.0 else start + node * h for node in self._nodes]]
        numbers = torch.tensor(values, dtype=wide, device=self._device)
        times = numbers[1:].to(self._dtype)
        if after_jump or before_jump:
            for stage, node in enumerate(self._nodes):
                if (node == 0.0 and after_jump) or (node == 1.0 and before_jump):
                    inner = end if node == 0.0 else start
                    times[stage] = torch.nextafter(times[stage], times.new_tensor(inner))
        return numbers[0], times.unbind(0)


@dataclass(slots=True)
class Trial:
    """One attempted step.

    ``k``: velocities as ``[leaf][stage]``; ``x_next``: the rounded state at its end; ``ratio`` and ``noise``: its
    error and the share of rounding in it, in units of the tolerance.
    """

    attempt: Attempt
    h: Tensor
    times: Sequence[Tensor]
    k: list[list[Tensor]]
    y_next: list[Tensor]
    x_next: list[Tensor]
    compensation: list[Tensor | None]
    stages: list[Stage] | None
    ratio: float = 0.0
    noise: float = 0.0
    last: Stage | None = None
    random: tuple[RandomState, ...] = ()  # before the stages after the first, and before the last


class Arithmetic:
    """What a step is made of, without autograd."""

    def __init__(self, problem: Problem, graphs: bool, norm: ErrorNorm | None) -> None:
        self.problem, self.graphs, self.norm = problem, graphs, norm
        self.velocity: Velocity = problem.velocity
        self.tableau: ClosedTableau = problem.tableau  # type: ignore[assignment]  # closed: such solves are
        self.state_dtypes = [leaf.state_dtype for leaf in self.velocity.spec.leaves]
        self.separate = [
            dtype != state or problem.compensated
            for dtype, state in zip(self.velocity.dtypes, self.state_dtypes, strict=True)
        ]
        self.steps = AttemptedSteps(self.tableau.nodes, self.velocity.spec.time_dtype, self.velocity.spec.device)

    def evaluate(self, time: Tensor, x: list[Tensor]) -> Stage:
        """A stage, with its graph where graphs are kept."""
        if not self.graphs:
            return Stage(time, x, self.velocity.evaluate(time, x))
        if self.problem.time_needs_grad:
            time = time.detach().requires_grad_()
        return Stage(time, x, self.velocity.evaluate_with_graph(time, x))

    def evaluate_again(self, time: Tensor, x: list[Tensor]) -> Stage:
        """Another stage where f was evaluated at ``x`` already."""
        # aliases: they become leaves of another graph
        return self.evaluate(time, [leaf.detach() for leaf in x])

    def stage_input(self, y: list[Tensor], k: list[list[Tensor]], h: Tensor, inputs: Combination) -> list[Tensor]:
        return [
            rk_stage(state, of_leaf if inputs.dense else inputs.pick(of_leaf), h, inputs.weights, dtype)
            for state, of_leaf, dtype in zip(y, k, self.velocity.dtypes, strict=True)
        ]

    def attempt(self, y: list[Tensor], first: Stage, compensation: list[Tensor | None], attempt: Attempt) -> Trial:
        """Takes a step from ``y`` up to its error."""
        tableau = self.tableau
        h, times = self.steps.tensors(attempt)
        k = [[value] for value in first.k]
        stages = [first] if self.graphs else None
        random = self.random()
        for i, inputs in tableau.stages_before_end:
            stage = self.evaluate(times[i], self.stage_input(y, k, h, inputs))
            _append(k, stages, stage)
        trial = Trial(attempt, h, times, k, y, y, compensation, stages, random=random)
        self.update(y, trial)
        return trial

    def update(self, y: list[Tensor], trial: Trial) -> None:
        """The state at the end of the step, and its error."""
        tableau, norm = self.tableau, self.norm
        if trial.compensation[0] is not None:
            # a step that is rejected must leave no trace
            trial.compensation = [c.clone() if c is not None else None for c in trial.compensation]
        if norm is None or not norm.fused:
            trial.y_next, trial.x_next = self._plain_update(y, trial)
            if norm is not None:
                if tableau.attempted == tableau.stages:
                    self.finish(trial)
                trial.ratio, trial.noise = norm.measured(y, trial.y_next, trial.k, trial.h)
            return
        if tableau.attempted == tableau.stages:
            trial.x_next = self.stage_input(y, trial.k, trial.h, tableau.stage_inputs[-1])
            self.finish(trial)
            y_next = [
                torch.empty_like(state) if separate else None for state, separate in zip(y, self.separate, strict=True)
            ]
            trial.ratio, trial.noise = norm.fused_update(y, trial.k, trial.h, y_next, None, trial.compensation)
            trial.y_next = [x.detach() if new is None else new for new, x in zip(y_next, trial.x_next, strict=True)]
            return
        trial.y_next = [torch.empty_like(state) for state in y]
        rounded = [
            torch.empty_like(state, dtype=dtype) if dtype != state.dtype else None
            for state, dtype in zip(y, self.velocity.dtypes, strict=True)
        ]
        trial.ratio, trial.noise = norm.fused_update(y, trial.k, trial.h, trial.y_next, rounded, trial.compensation)
        trial.x_next = [
            # an alias: becoming a leaf of a graph must not show on the state
            state.detach() if x is None else x
            for x, state in zip(rounded, trial.y_next, strict=True)
        ]

    def _plain_update(self, y: list[Tensor], trial: Trial) -> tuple[list[Tensor], list[Tensor]]:
        update = self.tableau.update
        y_next, x_next = [], []
        for state, of_leaf, dtype, c in zip(y, trial.k, self.velocity.dtypes, trial.compensation, strict=True):
            new = torch.empty_like(state)
            rounded = torch.empty_like(state, dtype=dtype) if dtype != state.dtype else None
            rk_update(state, update.pick(of_leaf), trial.h, update.weights, new, rounded, c)
            y_next.append(new)
            x_next.append(new.detach() if rounded is None else rounded)
        return y_next, x_next

    def finish(self, trial: Trial) -> None:
        """The velocity at the end of the step, where it is not known yet."""
        if trial.last is None:
            trial.random += self.random()
            trial.last = self.evaluate(trial.times[-1], trial.x_next)
            _append(trial.k, trial.stages, trial.last)

    def random(self) -> tuple[RandomState, ...]:
        return () if self.problem.random is None else (RandomState.current(self.velocity.spec.device),)

    def output(
        self, y: list[Tensor], trial: Trial, theta: float, index: int, dtypes: Sequence[torch.dtype]
    ) -> list[Tensor]:
        """The state inside of a step; ``index`` is that of the output."""
        weights = self.tableau.weights_at(theta)
        return [
            rk_stage(state, of_leaf, trial.h, weights[: len(of_leaf)], dtype)
            for state, of_leaf, dtype in zip(y, trial.k, dtypes, strict=True)
        ]


class TensorArithmetic(Arithmetic):
    """A state of one real tensor, the usual case, with as little Python as can be between two evaluations of f."""

    def __init__(self, problem: Problem, graphs: bool, norm: ErrorNorm) -> None:
        super().__init__(problem, graphs, norm)
        self.call: Callable[[Tensor, Tensor], Any] = self.velocity.call_with_graph if graphs else self.velocity.func
        self.dtype, self.state_dtype = self.velocity.dtypes[0], self.state_dtypes[0]
        self.later_stages = self.tableau.stages_before_end
        self.error_needs_last = self.tableau.attempted == self.tableau.stages
        # the input of the last stage is the state at the end of the step
        self.end_weights = self.tableau.stage_inputs[-1]

    @staticmethod
    def serves(problem: Problem, norm: ErrorNorm | None) -> bool:
        """Whether the problem is of the usual kind."""
        plain = problem.velocity.is_plain and not problem.compensated
        return plain and problem.random is None and not problem.time_needs_grad and norm is not None and norm.fused

    def attempt(self, y: list[Tensor], first: Stage, compensation: list[Tensor | None], attempt: Attempt) -> Trial:
        call, dtype, state = self.call, self.dtype, y[0]
        h, times = self.steps.tensors(attempt)
        k: list[Any] = [first.k[0]]
        stages = [first] if self.graphs else None
        for i, inputs in self.later_stages:
            x = rk_stage(state, k if inputs.dense else inputs.pick(k), h, inputs.weights, dtype)
            value = call(times[i], x)
            k.append(value)
            if stages is not None:
                stages.append(Stage(times[i], [x], [value]))
        trial = Trial(attempt, h, times, [k], y, y, compensation, stages)
        if not self.error_needs_last:
            self.update(y, trial)
            return trial
        end = self.end_weights
        x = rk_stage(state, k if end.dense else end.pick(k), h, end.weights, dtype)
        value = call(times[-1], x)
        k.append(value)
        trial.last = Stage(times[-1], [x], [value])
        if stages is not None:
            stages.append(trial.last)
        assert self.norm is not None
        y_next = None if dtype == self.state_dtype else torch.empty_like(state)
        trial.ratio, trial.noise = self.norm.fused_tensor_update(state, k, h, y_next)
        trial.x_next = [x]
        trial.y_next = [x.detach() if y_next is None else y_next]
        return trial


def _append(k: list[list[Tensor]], stages: list[Stage] | None, stage: Stage) -> None:
    for of_leaf, value in zip(k, stage.k, strict=True):
        of_leaf.append(value)
    if stages is not None:
        stages.append(stage)


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
        if torch.compiler.is_dynamo_compiling():
            # the host decides on every step: there is nothing here that a graph could hold
            course: Course = torch._dynamo.disable(self._run)(y, first)
            return course
        return self._run(y, first)

    def _run(self, y: list[Tensor], first: Stage) -> Course:
        problem, control, arithmetic, observer = self.problem, self.control, self.arithmetic, self.problem.observer
        compensation: list[Tensor | None] = [torch.zeros_like(leaf) if problem.compensated else None for leaf in y]
        random: tuple[RandomState, ...] = () if problem.random is None else (problem.random,)
        self.rows.put(0, y)
        if self._ended(y):
            return self.course
        measured_at: Stage | None = first  # before the loop, where it is measured at all
        while True:
            attempt = self._propose()
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
                raise RuntimeError(
                    f"non-finite values in the state at t = {attempt.end:.6g}, after a step of {abs(attempt.h):.3g}"
                    " that min_step forced; expected a func that stays finite, or a smaller min_step"
                )
            self.rows.step(arithmetic, y, trial)
            ended = self._write_event(y, trial) if self.search is not None else self._write_outputs(y, trial)
            if self.checkpoints is not None:
                self.checkpoints.store(first.x, trial.stages, (*random, *trial.random[:1]))
            arithmetic.steps.attempts.append(attempt)
            if ended:
                return self.course
            y, compensation = trial.y_next, trial.compensation
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
            stiffness = 0.0 if self.latest is None else _stiffness(self.arithmetic.tableau, *self.latest)
            advice = (
                f". The problem is stiff here (h times the rate of its fastest decay is about {stiffness:.2g}, where"
                ' explicit methods bear 3): use an implicit method, such as "radauIIA5"'
                if stiffness > STIFF
                else ". Raise options['max_num_steps'] or the tolerances; if the problem is stiff, use an implicit"
                ' method, such as "radauIIA5"'
            )
            raise RuntimeError(f"{error}{advice}") from None


def integrate_adaptive(problem: Problem, y0: Sequence[Tensor], checkpoints: Checkpoints | None) -> list[Tensor]:
    """The states at ``problem.output_times``, or at the start and the event: for each leaf (T, *shape).

    ``problem`` learns of the steps that were taken. ``checkpoints``, where gradients are wanted, keeps of every
    accepted step what the sweep will need.
    """
    assert problem.first is not None
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)]
    norm = new_norm(problem, problem.first)
    graphs = checkpoints is not None and checkpoints.needs_graph
    rows = Rows(y, 2 if problem.search is not None else len(problem.output_times), problem.output_dtypes)
    if norm is not None and TensorArithmetic.serves(problem, norm):
        arithmetic: Arithmetic = TensorArithmetic(problem, graphs, norm)
    else:
        arithmetic = Arithmetic(problem, graphs, norm)
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
        assert isinstance(problem.control, AdaptiveOptions)
        method = problem.method
        assert isinstance(method, EmbeddedTableau)
        order = method.control_order
        if norm.measurable:
            norm.measure(y, first)
        h = problem.control.first_step
        if h is None:
            with torch.no_grad():
                h = norm.first_step(y, first, start, sign, order)
        control = AdaptiveSteps(problem.control, order, start, sign, h)
    course = Loop(problem, control, arithmetic, rows, checkpoints, problem.search).run(y, first)
    if norm is not None and isinstance(control, AdaptiveSteps):
        norm.warn_of_rounding(control.worst_noise)
    problem.step_times = course.steps
    problem.grid = TimeGrid(problem.grid.points, course.steps.points or [start], course.outputs)
    if course.event_time is not None:
        problem.event_time = course.event_time
        problem.output_times = [start, course.event_time]


def _stiffness(tableau: ClosedTableau, y: list[Tensor], trial: Trial) -> float:
    """``|h|`` times how fast f changes between two stages at the same time, which differ in the fast directions."""
    if trial.last is None:
        return 0.0
    nodes = tableau.nodes
    pairs = [(i, j) for j in range(len(nodes)) for i in range(j) if i > 0 and nodes[i] == nodes[j]]
    if not pairs:
        return 0.0
    i, j = pairs[-1]
    rows = [[*map(float, tableau.a[n]), *[0.0] * (len(nodes) - n)] for n in (i, j)]
    apart = moved = 0.0
    for k in trial.k:
        wide = [value.detach().double() for value in k]
        apart += float((wide[j] - wide[i]).square().sum())
        between = sum((b - a) * value for a, b, value in zip(*rows, wide, strict=False))
        moved += float(torch.as_tensor(between).square().sum())
    return math.sqrt(apart / moved) if moved > 0 else 0.0
