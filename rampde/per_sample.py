"""Adaptive steps for each sample of a batch by itself: the road out.

All samples of a batch are evaluated together, each at its own time: step sizes, errors and acceptance are vectors with
an element for each. A sample whose step is rejected, or that has reached its last time, takes a step of size 0. Once
all samples of a tile are done, the tile leaves the batch and costs no more evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rampde.batch_control import BatchControl
from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.error_norm import ErrorNorm, unit_of_rounding
from rampde.grid import time_dtype
from rampde.ops import rk_error, rk_stage
from rampde.options import AdaptiveOptions
from rampde.problem import Problem
from rampde.tableau import ClosedTableau, Combination, EmbeddedTableau
from rampde.tape import combine


@dataclass
class BatchOutput:
    """Samples that have an output in a step: ``index`` of the output, where in the step (R,), and which (R,)."""

    index: int
    theta: Tensor
    mask: Tensor


@dataclass
class BatchStep:
    """One step of the samples that were still in the batch.

    ``rows``: (R,) their indices, None for all; ``start``: (R,) times; ``h``: (R,) signed sizes, 0 where a sample
    takes no step; ``outputs``: what of the result lies in it.
    """

    rows: Tensor | None
    start: Tensor
    h: Tensor
    outputs: list[BatchOutput] = field(default_factory=list)


class BatchStages:
    """The stages of a step whose size differs from sample to sample."""

    def __init__(self, problem: Problem, taped: bool = False) -> None:
        self.problem, self.taped = problem, taped
        self.velocity = problem.velocity
        self.tableau: ClosedTableau = problem.tableau  # type: ignore[assignment]  # closed: such solves are
        leaves = self.velocity.spec.leaves
        self.dims = [len(leaf.shape) + leaf.dtype.is_complex for leaf in leaves]
        self.samples = leaves[0].shape[0]
        device = self.velocity.spec.device
        self.one = torch.ones((), dtype=time_dtype(device), device=device)
        self.nodes = torch.tensor(self.tableau.nodes, dtype=self.one.dtype, device=device)
        # the time that f receives broadcasts against its state
        self.time_shape = (-1, *[1] * (len(leaves[0].shape) - 1))

    def along(self, vector: Tensor, leaf: int, dtype: torch.dtype) -> Tensor:
        """A vector over the samples in the shape of a leaf."""
        return vector.to(dtype).reshape(-1, *[1] * (self.dims[leaf] - 1))

    def times(self, start: Tensor, h: Tensor) -> list[Tensor]:
        """The times of the stages as f receives them: (R, 1, ..., 1), as many dimensions as the first tensor of y0."""
        times = (start + self.nodes[:, None] * h).to(self.velocity.spec.time_dtype)
        return [time.view(self.time_shape) for time in times.unbind(0)]

    def sizes(self, h: Tensor) -> list[Tensor]:
        """Step sizes (R,) in dtype and shape of each leaf."""
        return [self.along(h, leaf, spec.state_dtype) for leaf, spec in enumerate(self.velocity.spec.leaves)]

    def increments(self, k: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
        """``h k`` for each leaf, in the state's dtype."""
        return [size * value.to(size.dtype) for size, value in zip(sizes, k, strict=True)]

    def combined(self, y: Sequence[Tensor], terms: list[list[Tensor]], inputs: Combination) -> list[Tensor]:
        """``y + sum_j a_j (h k_j)`` rounded to the dtypes that f receives; ``terms`` are ``[leaf][stage]``."""
        results = []
        for state, of_leaf, dtype in zip(y, terms, self.velocity.dtypes, strict=True):
            picked = inputs.pick(of_leaf)
            if self.taped:
                results.append(combine(state, self.one, dtype, inputs.weights, None, picked))
            else:
                results.append(rk_stage(state, picked, self.one, inputs.weights, dtype))
        return results

    def interpolated(self, y: Tensor, terms: list[Tensor], theta: Tensor, leaf: int) -> Tensor:
        """The leaf of the state at ``theta`` (R,) of the step."""
        total = y
        for row, term in zip(self.tableau.interpolant, terms, strict=True):
            if any(row):
                total = total + self.along(polynomial(row, theta), leaf, total.dtype) * term
        return total

    def evaluate(self, time: Tensor, x: list[Tensor], graph: bool = False) -> list[Tensor]:
        """f on the samples that are left."""
        call = self.velocity.evaluate_with_graph if graph else self.velocity.evaluate
        if x[0].shape[0] == self.samples:
            return call(time, x)
        try:
            k = call(time, x)
        except Exception as error:
            raise RuntimeError(
                f"func failed on {x[0].shape[0]} of the {self.samples} samples, though not on all of them: {error}."
                " With options['batch_axis'] it must treat samples by themselves; if it holds a tensor for each of"
                " them, set options['batch_tile'] to None, so that samples that are done stay"
            ) from error
        return k


def polynomial(coefficients: Sequence[float], theta: Tensor) -> Tensor:
    """``sum_p c_p theta^(p + 1)``."""
    total = torch.zeros_like(theta)
    for coefficient in reversed(coefficients):
        total = (total + coefficient) * theta
    return total


def integrate_per_sample(problem: Problem, y0: Sequence[Tensor], checkpoints: Checkpoints | None) -> list[Tensor]:
    """The states at the output times, (T, batch, ...) for each leaf; ``problem.batch_steps`` are then known.

    With ``problem.checkpoint`` "tape" autograd records all operations.
    """
    return _Batch(problem, y0, checkpoints).run()


class _Batch:
    """The samples that are still under way, and their control. Vectors have an element for each of them."""

    def __init__(self, problem: Problem, y0: Sequence[Tensor], checkpoints: Checkpoints | None) -> None:
        assert isinstance(problem.control, AdaptiveOptions)
        assert isinstance(problem.method, EmbeddedTableau)
        assert problem.first is not None
        self.problem, self.checkpoints, self.options = problem, checkpoints, problem.control
        self.order = problem.method.control_order
        self.taped = problem.checkpoint.is_tape
        self.stages = BatchStages(problem, self.taped)
        spec = problem.velocity.spec
        self.y = [leaf.contiguous().to(of_leaf.state_dtype) for leaf, of_leaf in zip(y0, spec.leaves, strict=True)]
        self.x, self.k = problem.first.x, list(problem.first.k)
        self.norm = ErrorNorm(problem, None, unit_of_rounding(problem, self.k))
        if self.norm.measurable:
            self.norm.measure(self.y, problem.first)
        self.sizes = [
            max(leaf[:1].numel() // (2 if of_leaf.dtype.is_complex else 1), 1)
            for leaf, of_leaf in zip(self.y, spec.leaves, strict=True)
        ]
        self.rows: Tensor | None = None
        points = problem.grid.points
        every = points.expand(self.stages.samples, -1) if points.dim() == 1 else points
        self.output_times = every.detach()
        # what moves all times of a sample when its first one does
        self.moved = every - every.detach() if self.taped and problem.time_needs_grad else None
        self.sign = problem.sign
        start = self.output_times[:, 0].clone()
        with torch.no_grad():
            h = self._first_step(start)
        self.control = BatchControl(self.options, problem.method.control_order, start, h, self.norm.unit > 0)
        # index of the next output of each sample, its time, and the step at which the last one was reached
        self.due = torch.ones_like(start, dtype=torch.int64)
        self.next_time = self.output_times[:, 1].clone()
        self.reached_at = torch.zeros_like(self.due)
        self.active = torch.ones_like(self.due, dtype=torch.bool)
        self.accepted = torch.zeros(self.stages.samples, dtype=torch.int64, device=start.device)
        self.attempted = torch.zeros_like(self.accepted)
        self.worst_noise = 0.0
        self.steps: list[BatchStep] = []
        first = [leaf.to(dtype) for leaf, dtype in zip(self.y, problem.output_dtypes, strict=True)]
        self.result: list[list[Tensor]] = [first]
        for _ in range(self.output_times.shape[1] - 1):
            self.result.append([torch.full_like(leaf.detach(), math.nan) for leaf in first])

    def run(self) -> list[Tensor]:
        """Takes steps until every sample has reached its last time."""
        problem = self.problem
        while not self._step():
            pass
        problem.batch_steps = self.steps
        if self.norm.unit:
            self.norm.warn_of_rounding(max(self.worst_noise, float(self.control.worst_noise.max())))
        if problem.stats is not None:
            problem.stats.accepted_of_sample = self.accepted.tolist()
            problem.stats.rejected_of_sample = (self.attempted - self.accepted).tolist()
        return [torch.stack([row[leaf] for row in self.result]) for leaf in range(len(self.y))]

    def _step(self) -> bool:
        """Attempts a step of every sample that is under way; says whether all are done."""
        control, tableau, stages, active = self.control, self.stages.tableau, self.stages, self.active
        h = torch.where(active, self.sign * control.h, 0.0)
        start, end = control.time, control.time + h
        times = self._times(start, h)
        sizes = stages.sizes(h)
        x, terms = self.x, [[term] for term in stages.increments(self.k, sizes)]
        for i, inputs in tableau.stages_before_end:
            k = stages.evaluate(times[i], stages.combined(self.y, terms, inputs))
            self._append(terms, stages.increments(k, sizes))
        x_next = stages.combined(self.y, terms, tableau.stage_inputs[-1])
        # also where the error is known without it: some samples will accept the step, and outputs may lie in it
        k_last = stages.evaluate(times[-1], x_next)
        self._append(terms, stages.increments(k_last, sizes))
        with torch.no_grad():
            y_next, ratio, noise = self._errors(terms)
        if self.taped:
            update = tableau.update
            y_next = [
                combine(state, stages.one, state.dtype, update.weights, None, update.pick(of_leaf))
                for state, of_leaf in zip(self.y, terms, strict=True)
            ]
        stuck = active & (end == start)
        accepted = active & control.judge(ratio, noise)
        if self.options.min_step > 0:
            stuck |= accepted & ~torch.isfinite(ratio)
        crossing = accepted & (self.sign * (end - self.next_time) >= 0)
        # the one look at the device in a step
        any_crossing, any_stuck = torch.stack([crossing.any(), stuck.any()]).tolist()
        if any_stuck:
            raise self._error(stuck, "the step size has no effect, or the state is not finite,")
        if self.problem.stats is not None:
            self._count(accepted)
        step = BatchStep(self.rows, start, torch.where(accepted, h, 0.0))
        if self.checkpoints is not None:
            self.checkpoints.store(StepStart(self.y, x, ()), None)
        self.steps.append(step)
        if any_crossing:
            self._write(step, terms, accepted, end)
        control.time = torch.where(accepted, end, start)
        self.y = self._chosen(accepted, y_next, self.y)
        self.x = self._chosen(accepted, x_next, self.x)
        self.k = self._chosen(accepted, k_last, self.k)
        if any_crossing:
            return self._drop_done_tiles()
        self._check_count()
        return False

    def _count(self, accepted: Tensor) -> None:
        rows = slice(None) if self.rows is None else self.rows
        self.accepted[rows] += accepted
        self.attempted[rows] += self.active

    def _check_count(self) -> None:
        most = self.options.max_num_steps
        if len(self.steps) < most:
            return
        too_many = self.active & (len(self.steps) - self.reached_at >= most)
        if bool(too_many.any()):
            raise self._error(too_many, f"max_num_steps exceeded ({most})")

    def _error(self, mask: Tensor, what: str) -> RuntimeError:
        sample = int(mask.nonzero()[0])
        index = sample if self.rows is None else int(self.rows[sample])
        return RuntimeError(
            f"{what} for sample {index} at t = {float(self.control.time[sample]):.6g}, with steps of"
            f" {float(self.control.h[sample]):.3g}: func may be stiff, not finite or singular there, or the tolerances"
            " below what its precision can reach"
        )

    def _times(self, start: Tensor, h: Tensor) -> list[Tensor]:
        times = self.stages.times(start, h)
        if self.moved is None:
            return times
        moved = self.moved[:, 0].to(times[0].dtype).reshape(self.stages.time_shape)
        return [time + moved for time in times]

    @staticmethod
    def _append(terms: list[list[Tensor]], increments: Sequence[Tensor]) -> None:
        for of_leaf, term in zip(terms, increments, strict=True):
            of_leaf.append(term)

    def _chosen(self, mask: Tensor, one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.where(self.stages.along(mask, leaf, torch.bool), new, old)
            for leaf, (new, old) in enumerate(zip(one, other, strict=True))
        ]

    def _errors(self, terms: list[list[Tensor]]) -> tuple[list[Tensor], Tensor, Tensor]:
        """The states at the end of the step; each sample's error and rounding in units of the tolerance."""
        b, e = self.stages.tableau.error_weights
        tolerance, spec = self.problem.tolerance, self.problem.velocity.spec
        y_next, squares = [], []
        for leaf, (y, of_leaf) in enumerate(zip(self.y, terms, strict=True)):
            y, used = y.detach(), [term.detach() for term in of_leaf[: len(b)]]
            new = torch.empty_like(y)
            rtol, atol = tolerance.rtol[leaf], tolerance.atol[leaf]
            if isinstance(rtol, float) and isinstance(atol, float) and not spec.leaves[leaf].dtype.is_complex:
                sums = rk_error(y, used, self.stages.one, b, e, rtol, atol, self.norm.roundoffs[leaf], y.shape[0], new)
            else:
                new = rk_stage(y, used, self.stages.one, b, y.dtype)
                sums = self._sums(leaf, y, new, used, e)
            y_next.append(new)
            squares.append(sums / self.sizes[leaf])
        largest = torch.stack(squares).amax(0).to(self.output_times.dtype)
        ratio = (largest[:, 0] - largest[:, 1]).clamp(min=0).sqrt()
        return y_next, torch.where(torch.isnan(ratio), math.inf, ratio), largest[:, 1].sqrt()

    def _sums(self, leaf: int, y: Tensor, y_next: Tensor, terms: list[Tensor], e: list[float]) -> Tensor:
        """As the operator's sums, for tolerances that are tensors and for complex leaves."""
        error = rk_stage(torch.zeros_like(y), terms, self.stages.one, e, y.dtype)
        rounding = sum((self.norm.roundoffs[leaf] * w * term).square() for w, term in zip(e, terms, strict=True))
        allowed = self._allowed(leaf, torch.maximum(self._magnitude(leaf, y), self._magnitude(leaf, y_next)))
        of_error = torch.where(error == 0, 0.0, error / allowed).square()
        of_rounding = torch.where(error == 0, 0.0, rounding / allowed.square())
        of_error = torch.where(torch.isfinite(y_next), of_error, math.inf)
        return torch.stack([of_error.reshape(len(y), -1).sum(1), of_rounding.reshape(len(y), -1).sum(1)], dim=1)

    def _magnitude(self, leaf: int, y: Tensor) -> Tensor:
        if self.problem.velocity.spec.leaves[leaf].dtype.is_complex:
            return torch.linalg.vector_norm(y, dim=-1, keepdim=True)  # type: ignore[no-any-return]
        return y.abs()

    def _allowed(self, leaf: int, magnitude: Tensor) -> Tensor:
        bounds: list[float | Tensor] = []
        for bound in (self.problem.tolerance.atol[leaf], self.problem.tolerance.rtol[leaf]):
            if isinstance(bound, Tensor):
                bound = bound.to(magnitude.device, magnitude.dtype)
                shape = self.problem.velocity.spec.leaves[leaf].shape
                bound = bound.expand(shape) if self.rows is None else bound.expand(shape)[self.rows]
                bound = bound[..., None] if self.problem.velocity.spec.leaves[leaf].dtype.is_complex else bound
            bounds.append(bound)
        allowed: Tensor = bounds[0] + bounds[1] * magnitude
        return allowed

    def _write(self, step: BatchStep, terms: list[list[Tensor]], accepted: Tensor, end: Tensor) -> None:
        """Writes the outputs that lie in the step."""
        reached = accepted[:, None] & (self.sign * (end[:, None] - self.output_times) >= 0)
        position = torch.arange(self.output_times.shape[1], device=end.device)
        reached &= position >= self.due[:, None]
        indices = reached.any(0).nonzero().flatten().tolist()
        for index in indices:
            mask = reached[:, index]
            theta = torch.where(mask, (self.output_times[:, index] - step.start) / torch.where(mask, step.h, 1.0), 0.0)
            output = BatchOutput(index, theta, mask)
            step.outputs.append(output)
            if self.moved is not None:
                # all points of a sample move with its first time, the output with its own
                theta = theta + (self.moved[:, index] - self.moved[:, 0]) / torch.where(mask, step.h, 1.0)
            for leaf, (y, of_leaf) in enumerate(zip(self.y, terms, strict=True)):
                value = self.stages.interpolated(y, of_leaf, theta, leaf).to(self.problem.output_dtypes[leaf])
                target = self.result[index][leaf]
                rows = self.rows
                chosen = self.stages.along(mask, leaf, torch.bool)
                if rows is None:
                    self.result[index][leaf] = torch.where(chosen, value, target)
                else:
                    self.result[index][leaf] = target.index_copy(0, rows, torch.where(chosen, value, target[rows]))
        count = reached.sum(1)
        last = self.output_times.shape[1] - 1
        self.due = self.due + count
        self.next_time = self.output_times.gather(1, self.due.clamp(max=last)[:, None])[:, 0]
        self.active = self.due <= last
        self.reached_at = torch.where(count > 0, len(self.steps), self.reached_at)

    def _drop_done_tiles(self) -> bool:
        """Takes tiles of which no sample is under way out of the batch; says whether none is left."""
        going = self.active.cpu()
        if not bool(going.any()):
            return True
        tile = self.options.batch_tile
        if tile is None or bool(going.all()):
            return False
        kept = torch.cat([chunk for chunk in torch.arange(len(going)).split(tile) if bool(going[chunk].any())])
        if len(kept) == len(going):
            return False
        indices = kept.to(self.due.device)
        if self.norm.unit:
            self.worst_noise = max(self.worst_noise, float(self.control.worst_noise.max()))
        self.rows = indices if self.rows is None else self.rows[indices]
        self.control.keep(indices)
        for name in ("y", "x", "k"):
            setattr(self, name, [leaf[indices] for leaf in getattr(self, name)])
        for name in ("output_times", "due", "next_time", "reached_at", "active"):
            setattr(self, name, getattr(self, name)[indices])
        if self.moved is not None:
            self.moved = self.moved[indices]
        return False

    def _first_step(self, start: Tensor) -> Tensor:
        """Sizes of the first steps, as :meth:`rampde.error_norm.ErrorNorm.first_step` for each sample."""
        if self.options.first_step is not None:
            return torch.full_like(start, self.options.first_step)
        y = [leaf.detach() for leaf in self.y]
        k = [value.detach().to(leaf.dtype) for value, leaf in zip(self.k, y, strict=True)]
        allowed = [self._allowed(leaf, self._magnitude(leaf, state)) for leaf, state in enumerate(y)]
        of_state, of_velocity = self._row_norm(y, allowed), self._row_norm(k, allowed)
        small = (of_state < 1e-5) | (of_velocity < 1e-5)
        guess = torch.where(small, 1e-6, 0.01 * of_state / torch.where(small, 1.0, of_velocity))
        terms = [[term] for term in self.stages.increments(k, self.stages.sizes(self.sign * guess))]
        x = [
            rk_stage(state, of_leaf, self.stages.one, [1.0], dtype)
            for state, of_leaf, dtype in zip(y, terms, self.problem.velocity.dtypes, strict=True)
        ]
        time = (start + self.sign * guess).to(self.problem.velocity.spec.time_dtype).reshape(self.stages.time_shape)
        moved = self.stages.evaluate(time, x)
        changes = [new.detach().to(old.dtype) - old for new, old in zip(moved, k, strict=True)]
        change = (self._row_norm(changes, allowed) - self.norm.unit * of_velocity).clamp(min=0) / guess
        largest = torch.maximum(of_velocity, change)
        flat = largest <= 1e-15
        size = torch.where(flat, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1.0 / self.order))
        size = torch.where(torch.isfinite(largest), size, guess)
        return torch.minimum(100 * guess, size)

    def _row_norm(self, values: Sequence[Tensor], allowed: Sequence[Tensor]) -> Tensor:
        norms = []
        for value, bound, size in zip(values, allowed, self.sizes, strict=True):
            ratio = torch.where(value == 0, 0.0, value / bound)
            norms.append((ratio.reshape(len(ratio), -1).square().sum(1).to(self.output_times.dtype) / size).sqrt())
        return torch.stack(norms).amax(0)
