"""The road out: integrates the state over the grid."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.checkpoint.fp8 import Quantised
from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.control import Attempt
from rampde.grid import StepTimes, unbound
from rampde.ops import rk_update, update_states
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.stages import evaluate_stages, evaluate_tensor_stages


def integrate(
    problem: Problem, y0: list[Tensor], step_times: StepTimes, checkpoints: Checkpoints | None
) -> list[Tensor]:
    """States at the grid points ``problem.kept``: for each leaf (len(kept), *shape) in its output dtype.

    Args:
        problem: the solve; its ``first`` stage is used, not evaluated again.
        y0: real, dense leaves.
        step_times: step sizes and stage times.
        checkpoints: where gradients are wanted, keeps of every step what the sweep will need.
    """
    velocity, steps = problem.velocity, len(step_times)
    state_dtypes = [leaf.state_dtype for leaf in velocity.spec.leaves]
    # the rounded state is a tensor of its own where it differs from the state, or must outlive the step
    rounded = [
        checkpoints is not None or dtype != state for dtype, state in zip(velocity.dtypes, state_dtypes, strict=True)
    ]
    any_rounded = any(rounded)
    device = velocity.spec.device
    overflow_step = torch.full((), steps, dtype=torch.int64, device=device) if velocity.half else None

    y = [leaf.to(dtype) for leaf, dtype in zip(y0, state_dtypes, strict=True)]
    outputs = Outputs(problem, y)
    special = (
        problem.compensated
        or problem.random is not None
        or problem.time_needs_grad
        or problem.observer is not None
        or (checkpoints is not None and checkpoints.quantiser is not None)
    )
    if velocity.is_plain and not special:
        _integrate_tensor(problem, y[0], step_times, checkpoints, outputs, any_rounded, overflow_step)
    else:
        _integrate_leaves(problem, y, step_times, checkpoints, outputs, rounded, overflow_step)
    if overflow_step is not None and not problem.recorded:
        warn_of_overflow(problem, int(overflow_step.item()))
    return outputs.leaves


def _integrate_leaves(
    problem: Problem,
    y: list[Tensor],
    step_times: StepTimes,
    checkpoints: Checkpoints | None,
    outputs: Outputs,
    rounded: list[bool],
    overflow_step: Tensor | None,
) -> None:
    """The loop over the steps, for any state."""
    assert problem.first is not None
    velocity, update = problem.velocity, problem.tableau.update
    weights = update.weights
    first: Stage | None = problem.first
    x = problem.first.x
    observer, grid_times = problem.observer, problem.grid.times
    compensation = [torch.zeros_like(leaf) if problem.compensated else None for leaf in y]
    record: list[Stage] | None = None
    with_graph = False
    random = problem.random
    quantiser = None if checkpoints is None else checkpoints.quantiser
    quantised: list[Quantised] | None = None
    for step, (h, times) in enumerate(step_times):
        if observer is not None:
            attempt = Attempt(grid_times[step], grid_times[step + 1], grid_times[step + 1] - grid_times[step])
            observer.step(attempt, y)
        if checkpoints is not None:
            if random is not None and step > 0:
                random = RandomState.current(velocity.spec.device)
            record = [] if checkpoints.needs_stages else None
            with_graph = checkpoints.needs_graph
            if with_graph and problem.time_needs_grad:
                times = [time.detach().requires_grad_() for time in times]
        velocities = evaluate_stages(problem, y, x, h, times, first, record, with_graph)
        first = None
        if checkpoints is not None:
            before = () if random is None else (random,)
            checkpoints.store(StepStart(y, x, compensation, before, quantised), record)

        y_next = outputs.next_state(step + 1, y)
        x = [
            torch.empty_like(state, dtype=dtype) if separate else state
            for state, dtype, separate in zip(y_next, velocity.dtypes, rounded, strict=True)
        ]
        k = velocities if update.dense else [update.pick(of_leaf) for of_leaf in velocities]
        saved = [checkpoint if separate else None for checkpoint, separate in zip(x, rounded, strict=True)]
        if quantiser is None:
            update_states(y, k, h, weights, y_next, saved, compensation, overflow_step, step)
        else:
            quantised = [quantiser.empty_like(leaf) for leaf in y]
            for leaf, state in enumerate(y):
                outputs_of_leaf = (y_next[leaf], saved[leaf], compensation[leaf], overflow_step, step)
                in_8_bits = quantiser.arguments(quantised[leaf], step + 1, leaf)
                rk_update(state, k[leaf], h, weights, *outputs_of_leaf, *in_8_bits)
        if observer is not None:
            observer.accepted(attempt, y, 0.0)
        y = y_next
        outputs.keep(y)


def _integrate_tensor(
    problem: Problem,
    y: Tensor,
    step_times: StepTimes,
    checkpoints: Checkpoints | None,
    outputs: Outputs,
    rounded: bool,
    overflow_step: Tensor | None,
) -> None:
    """The loop over the steps for a state of one real tensor without anything special: the usual case."""
    assert problem.first is not None
    dtype, update = problem.velocity.dtypes[0], problem.tableau.update
    weights = update.weights
    first: Stage | None = problem.first
    x = problem.first.x[0]
    record: list[Stage] | None = None
    with_graph = False
    for step, (h, times) in enumerate(step_times):
        if checkpoints is not None and checkpoints.needs_stages:
            record, with_graph = [], checkpoints.needs_graph
        k = evaluate_tensor_stages(problem, y, x, h, times, first, record, with_graph)
        first = None
        if checkpoints is not None:
            checkpoints.store(StepStart([y], [x], (None,)), record)
        if not update.dense:
            k = update.pick(k)
        (y_next,) = outputs.next_state(step + 1, (y,))
        if rounded:
            x = torch.empty_like(y_next, dtype=dtype)
            rk_update(y, k, h, weights, y_next, x, None, overflow_step, step)
        else:
            x = y_next
            rk_update(y, k, h, weights, y_next)
        y = y_next
        outputs.keep((y,))


class Outputs:
    """The result, written by the step update itself wherever the dtypes allow."""

    def __init__(self, problem: Problem, y: list[Tensor]) -> None:
        self.kept = problem.kept
        self.position = 0
        # each state lies in the result with the strides of y0, so that it can be the target of the update
        self.leaves = [
            torch.empty_strided(
                (len(self.kept), *leaf.shape), (leaf.numel(), *leaf.stride()), dtype=dtype, device=leaf.device
            )
            for leaf, dtype in zip(y, problem.output_dtypes, strict=True)
        ]
        self.direct = [leaf.dtype == dtype for leaf, dtype in zip(y, problem.output_dtypes, strict=True)]
        self.all_direct = all(self.direct)
        self.slots_of_leaf = [unbound(leaf) for leaf in self.leaves]
        self.slots: list[Tensor] | None = None
        for slot, leaf in zip(self._take(0) or [], y, strict=False):
            slot.copy_(leaf)

    def _take(self, index: int) -> list[Tensor] | None:
        if self.position == len(self.kept) or self.kept[self.position] != index:
            return None
        self.position += 1
        return [next(slots) for slots in self.slots_of_leaf]

    def next_state(self, index: int, y: Sequence[Tensor]) -> list[Tensor]:
        """Where the state at grid point ``index`` is to be written."""
        self.slots = self._take(index)
        if self.slots is not None and self.all_direct:
            return self.slots
        if self.slots is None:
            return [torch.empty_like(leaf) for leaf in y]
        return [
            slot if direct else torch.empty_like(leaf)
            for slot, direct, leaf in zip(self.slots, self.direct, y, strict=True)
        ]

    def keep(self, y: Sequence[Tensor]) -> None:
        """Completes the result after the update has written ``y``."""
        if self.slots is None or self.all_direct:
            return
        for slot, direct, leaf in zip(self.slots, self.direct, y, strict=True):
            if not direct:
                slot.copy_(leaf)


def warn_of_overflow(problem: Problem, step: int) -> None:
    times = problem.grid.times
    if step >= problem.grid.steps:
        return
    warnings.warn(
        f"the state or its velocity left the range of float16 (65504) in step {step} of {problem.grid.steps}, between"
        f" t = {times[step]:.6g} and t = {times[step + 1]:.6g}; use bfloat16, which has the range of float32, or"
        " smaller steps",
        RuntimeWarning,
        stacklevel=2,
    )
