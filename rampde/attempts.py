"""One attempted step: its stages, the state at its end, its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rampde.checkpoint.fp8 import Quantised
from rampde.checkpoint.keeper import Checkpoints
from rampde.control import Attempt
from rampde.error_norm import ErrorNorm
from rampde.grid import time_dtype
from rampde.ops import rk_stage, rk_update, stage_inputs
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.tableau import ClosedTableau, Combination
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
    quantised: list[Quantised] | None = None  # the change of the state backwards, in eight bits
    random: tuple[RandomState, ...] = ()  # before the stages after the first, and before the last


class Arithmetic:
    """What a step is made of, without autograd."""

    def __init__(self, problem: Problem, norm: ErrorNorm | None, checkpoints: Checkpoints | None = None) -> None:
        """``checkpoints``, where gradients are wanted, says what of a step it needs."""
        self.problem, self.norm, self.checkpoints = problem, norm, checkpoints
        self.quantiser = None if checkpoints is None else checkpoints.quantiser
        self.velocity: Velocity = problem.velocity
        self.tableau: ClosedTableau = problem.tableau  # type: ignore[assignment]  # closed: such solves are
        self.state_dtypes = [leaf.state_dtype for leaf in self.velocity.spec.leaves]
        self.separate = [
            dtype != state or problem.compensated
            for dtype, state in zip(self.velocity.dtypes, self.state_dtypes, strict=True)
        ]
        self.steps = AttemptedSteps(self.tableau.nodes, self.velocity.spec.time_dtype, self.velocity.spec.device)

    @property
    def with_graph(self) -> bool:
        """Whether stages are evaluated with their graphs."""
        return self.checkpoints is not None and self.checkpoints.needs_graph

    def record(self, first: Stage) -> list[Stage] | None:
        """A list for the stages of a step, where they are wanted, with the first one in it."""
        return [first] if self.checkpoints is not None and self.checkpoints.needs_stages else None

    def evaluate(self, time: Tensor, x: list[Tensor]) -> Stage:
        """A stage, with its graph where graphs are kept."""
        if not self.with_graph:
            random = self.random() if self.checkpoints is not None and self.checkpoints.needs_stages else ()
            return Stage(time, x, self.velocity.evaluate_without_graph(time, x), *random)
        if self.problem.time_needs_grad:
            time = time.detach().requires_grad_()
        return Stage(time, x, self.velocity.evaluate_with_graph(time, x))

    def evaluate_again(self, time: Tensor, x: list[Tensor]) -> Stage:
        """Another stage where f was evaluated at ``x`` already."""
        # aliases: they become leaves of another graph
        return self.evaluate(time, [leaf.detach() for leaf in x])

    def stage_input(self, y: list[Tensor], k: list[list[Tensor]], h: Tensor, inputs: Combination) -> list[Tensor]:
        terms = k if inputs.dense else [inputs.pick(of_leaf) for of_leaf in k]
        return stage_inputs(y, terms, h, inputs.weights, self.velocity.dtypes)

    def attempt(self, y: list[Tensor], first: Stage, compensation: list[Tensor | None], attempt: Attempt) -> Trial:
        """Takes a step from ``y`` up to its error."""
        return self.attempt_at(y, first, compensation, attempt, *self.steps.tensors(attempt))

    def attempt_at(
        self,
        y: list[Tensor],
        first: Stage,
        compensation: list[Tensor | None],
        attempt: Attempt,
        h: Tensor,
        times: Sequence[Tensor],
    ) -> Trial:
        """As ``attempt``, with its step size and stage times as tensors."""
        tableau = self.tableau
        k = [[value] for value in first.k]
        stages = self.record(first)
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
        if self.quantiser is not None:
            trial.quantised = [self.quantiser.empty_like(leaf) for leaf in y]
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
            trial.ratio, trial.noise = norm.fused_update(
                y, trial.k, trial.h, y_next, None, trial.compensation, self._quantised(trial)
            )
            trial.y_next = [x.detach() if new is None else new for new, x in zip(y_next, trial.x_next, strict=True)]
            return
        trial.y_next = [torch.empty_like(state) for state in y]
        rounded = [
            torch.empty_like(state, dtype=dtype) if dtype != state.dtype else None
            for state, dtype in zip(y, self.velocity.dtypes, strict=True)
        ]
        trial.ratio, trial.noise = norm.fused_update(
            y, trial.k, trial.h, trial.y_next, rounded, trial.compensation, self._quantised(trial)
        )
        trial.x_next = [
            # an alias: becoming a leaf of a graph must not show on the state
            state.detach() if x is None else x
            for x, state in zip(rounded, trial.y_next, strict=True)
        ]

    def _plain_update(self, y: list[Tensor], trial: Trial) -> tuple[list[Tensor], list[Tensor]]:
        update = self.tableau.update
        y_next, x_next = [], []
        quantised = self._quantised(trial)
        for leaf, (state, dtype, c) in enumerate(zip(y, self.velocity.dtypes, trial.compensation, strict=True)):
            new = torch.empty_like(state)
            rounded = torch.empty_like(state, dtype=dtype) if dtype != state.dtype else None
            k = update.pick(trial.k[leaf])
            rk_update(state, k, trial.h, update.weights, new, rounded, c, None, 0, *quantised[leaf])
            y_next.append(new)
            x_next.append(new.detach() if rounded is None else rounded)
        return y_next, x_next

    def _quantised(self, trial: Trial) -> list[tuple[Any, ...]]:
        """Further arguments, leaf by leaf, of the operators that write the state at the end of a step."""
        if self.quantiser is None or trial.quantised is None:
            return [()] * len(trial.k)
        step = len(self.steps) + 1
        return [self.quantiser.arguments(target, step, leaf) for leaf, target in enumerate(trial.quantised)]

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
        return stage_inputs(y, trial.k, trial.h, weights[: len(trial.k[0])], dtypes)


class TensorArithmetic(Arithmetic):
    """A state of one real tensor, the usual case, with as little Python as can be between two evaluations of f."""

    def __init__(self, problem: Problem, norm: ErrorNorm, checkpoints: Checkpoints | None) -> None:
        super().__init__(problem, norm, checkpoints)
        self.dtype, self.state_dtype = self.velocity.dtypes[0], self.state_dtypes[0]
        self.later_stages = self.tableau.stages_before_end
        self.error_needs_last = self.tableau.attempted == self.tableau.stages
        # the input of the last stage is the state at the end of the step
        self.end_weights = self.tableau.stage_inputs[-1]

    @staticmethod
    def serves(problem: Problem, norm: ErrorNorm | None, checkpoints: Checkpoints | None) -> bool:
        """Whether the problem is of the usual kind."""
        plain = problem.velocity.is_plain and not problem.compensated
        plain = plain and (checkpoints is None or checkpoints.quantiser is None)
        return plain and problem.random is None and not problem.time_needs_grad and norm is not None and norm.fused

    def attempt(self, y: list[Tensor], first: Stage, compensation: list[Tensor | None], attempt: Attempt) -> Trial:
        call: Callable[[Tensor, Tensor], Any]
        with_graph = self.with_graph
        call = self.velocity.call_with_graph if with_graph else self.velocity.func
        dtype, state = self.dtype, y[0]
        h, times = self.steps.tensors(attempt)
        k: list[Any] = [first.k[0]]
        stages = self.record(first)
        for i, inputs in self.later_stages:
            x = rk_stage(state, k if inputs.dense else inputs.pick(k), h, inputs.weights, dtype)
            value: Any = call(times[i], x)
            if not with_graph and value.requires_grad:
                # f recorded a graph for itself
                value = value.detach()
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
        if not with_graph and value.requires_grad:
            value = value.detach()
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


def stiffness_of(tableau: ClosedTableau, y: list[Tensor], trial: Trial) -> float:
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
