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

from rampde.checkpoint import Checkpoints
from rampde.control import NOISE_LIMITED
from rampde.error_norm import velocity_roundoff, warn_of_rounding
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
        # the time that f receives broadcasts against its state
        self.time_shape = (-1, *[1] * (len(leaves[0].shape) - 1))

    def along(self, vector: Tensor, leaf: int, dtype: torch.dtype) -> Tensor:
        """A vector over the samples in the shape of a leaf."""
        return vector.to(dtype).reshape(-1, *[1] * (self.dims[leaf] - 1))

    def times(self, step: BatchStep, stage: int) -> Tensor:
        """The time of a stage as f receives it: (R, 1, ..., 1), with as many dimensions as the first tensor of y0."""
        time = step.start + self.tableau.nodes[stage] * step.h
        return time.to(self.velocity.spec.time_dtype).reshape(self.time_shape)

    def increments(self, k: Sequence[Tensor], h: Tensor) -> list[Tensor]:
        """``h k`` for each leaf, in the state's dtype."""
        return [
            self.along(h, leaf, spec.state_dtype) * value.to(spec.state_dtype)
            for leaf, (value, spec) in enumerate(zip(k, self.velocity.spec.leaves, strict=True))
        ]

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
        self.taped = problem.checkpoint == "tape"
        self.stages = BatchStages(problem, self.taped)
        spec = problem.velocity.spec
        self.y = [leaf.contiguous().to(of_leaf.state_dtype) for leaf, of_leaf in zip(y0, spec.leaves, strict=True)]
        self.x, self.k = problem.first.x, list(problem.first.k)
        self.roundoff = velocity_roundoff(problem, self.k)
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
        self.time = self.output_times[:, 0].clone()
        self.due = torch.ones_like(self.time, dtype=torch.int64)
        self.attempts = torch.zeros_like(self.due)
        self.previous, self.one_before = torch.ones_like(self.time), torch.ones_like(self.time)
        self.rejected_size, self.rejected_ratio = (torch.full_like(self.time, math.inf) for _ in range(2))
        self.worst_noise = torch.zeros_like(self.time)
        self.accepted = torch.zeros_like(self.due)
        self.rejected = torch.zeros_like(self.due)
        self.steps: list[BatchStep] = []
        self.result: list[list[Tensor]] = [
            [leaf.to(dtype) for leaf, dtype in zip(self.y, problem.output_dtypes, strict=True)]
        ]
        empty = [torch.full_like(leaf, math.nan) for leaf in self.result[0]]
        self.result += [[leaf.clone() for leaf in empty] for _ in range(self.output_times.shape[1] - 1)]
        with torch.no_grad():
            self.h = self._first_step()

    def run(self) -> list[Tensor]:
        outputs = self.output_times.shape[1]
        worst = torch.zeros((), dtype=self.time.dtype, device=self.time.device)
        counts = torch.zeros((2, self.stages.samples), dtype=torch.int64, device=self.time.device)
        while True:
            self._step()
            active = self.due < outputs
            over = active & (self.attempts >= self.options.max_num_steps)
            stuck = active & (self._end() == self.time)
            # the one look at the device in a step
            going, too_many, underflow = torch.stack([active, over, stuck]).cpu().unbind(0)
            every = slice(None) if self.rows is None else self.rows
            counts[0, every], counts[1, every] = self.accepted, self.rejected
            worst = torch.maximum(worst, self.worst_noise.max())
            if not bool(going.any()):
                break
            if bool(too_many.any()):
                raise self._error(too_many, f"max_num_steps exceeded ({self.options.max_num_steps})")
            if bool(underflow.any()):
                raise self._error(underflow, "underflow in the step size")
            self._drop_done_tiles(going)
        self.problem.batch_steps = self.steps
        if self.roundoff and float(worst) > 1.0:
            warn_of_rounding(self.problem, float(worst))
        if self.problem.stats is not None:
            accepted, rejected = counts.tolist()
            self.problem.stats.accepted_of_sample, self.problem.stats.rejected_of_sample = accepted, rejected
        return [torch.stack([row[leaf] for row in self.result]) for leaf in range(len(self.y))]

    def _error(self, mask: Tensor, what: str) -> RuntimeError:
        sample = int(mask.nonzero()[0])
        index = sample if self.rows is None else int(self.rows[sample])
        return RuntimeError(
            f"{what} for sample {index} at t = {float(self.time[sample]):.6g}, with steps of"
            f" {float(self.h[sample]):.3g}: func may be stiff, not finite or singular there, or the tolerances below"
            " what its precision can reach"
        )

    def _end(self) -> Tensor:
        return self.time + self.sign * self.h.clamp(self.options.min_step, self.options.max_step)

    def _step(self) -> None:
        """Attempts a step of every sample that is under way."""
        options, tableau, stages = self.options, self.stages.tableau, self.stages
        active = self.due < self.output_times.shape[1]
        size = self.h.clamp(options.min_step, options.max_step)
        h = torch.where(active, self.sign * size, 0.0)
        end = self.time + h
        step = BatchStep(self.rows, self.time, h)
        x, terms = self.x, [[term] for term in stages.increments(self.k, h)]
        for i, inputs in tableau.stages_before_end:
            self._append(terms, stages.evaluate(self._times(step, i), stages.combined(self.y, terms, inputs)), h)
        x_next = stages.combined(self.y, terms, tableau.stage_inputs[-1])
        # also where the error is known without it: some samples will accept the step, and outputs may lie in it
        k_last = stages.evaluate(self._times(step, tableau.stages - 1), x_next)
        self._append(terms, k_last, h)
        with torch.no_grad():
            y_next, ratio, noise = self._errors(terms)
        if self.taped:
            update = tableau.update
            y_next = [
                combine(state, stages.one, state.dtype, update.weights, None, update.pick(of_leaf))
                for state, of_leaf in zip(self.y, terms, strict=True)
            ]
        accepted = active & self._judge(size, ratio, noise)
        failed = accepted & ~torch.isfinite(ratio)
        if options.min_step > 0 and bool(failed.any()):
            raise self._error(failed.cpu(), "non-finite values in the state after a step that min_step forced,")
        step.h = torch.where(accepted, h, 0.0)
        self._write(step, terms, accepted, end)
        if self.checkpoints is not None:
            self.checkpoints.store(x, None, ())
        self.steps.append(step)
        self.time = torch.where(accepted, end, self.time)
        self.y = self._chosen(accepted, y_next, self.y)
        self.x = self._chosen(accepted, x_next, self.x)
        self.k = self._chosen(accepted, k_last, self.k)

    def _times(self, step: BatchStep, stage: int) -> Tensor:
        time = self.stages.times(step, stage)
        return time if self.moved is None else time + self.moved[:, 0].to(time.dtype).reshape(self.stages.time_shape)

    def _append(self, terms: list[list[Tensor]], k: Sequence[Tensor], h: Tensor) -> None:
        for of_leaf, term in zip(terms, self.stages.increments(k, h), strict=True):
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
                sums = rk_error(y, used, self.stages.one, b, e, rtol, atol, self.roundoff, y.shape[0], new)
            else:
                new = rk_stage(y, used, self.stages.one, b, y.dtype)
                sums = self._sums(leaf, y, new, used, e)
            y_next.append(new)
            squares.append(sums / self.sizes[leaf])
        largest = torch.stack(squares).amax(0).to(self.time.dtype)
        ratio = (largest[:, 0] - largest[:, 1]).clamp(min=0).sqrt()
        return y_next, torch.where(torch.isnan(ratio), math.inf, ratio), largest[:, 1].sqrt()

    def _sums(self, leaf: int, y: Tensor, y_next: Tensor, terms: list[Tensor], e: list[float]) -> Tensor:
        """As the operator's sums, for tolerances that are tensors and for complex leaves."""
        error = rk_stage(torch.zeros_like(y), terms, self.stages.one, e, y.dtype)
        rounding = sum((self.roundoff * w * term).square() for w, term in zip(e, terms, strict=True))
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

    def _judge(self, size: Tensor, ratio: Tensor, noise: Tensor) -> Tensor:
        """Which steps stand, and the sizes of the next ones; as :class:`rampde.control.AdaptiveSteps`."""
        options = self.options
        accepted = (ratio <= 1.0) | (size <= options.min_step)
        limited = ~accepted & (noise > 0) & torch.isfinite(ratio) & torch.isfinite(self.rejected_ratio)
        limited &= ratio > self.rejected_ratio * (size / self.rejected_size) ** NOISE_LIMITED
        noise = torch.where(limited, torch.maximum(noise, ratio), noise)
        ratio = torch.where(limited, ratio.clamp(max=1.0), ratio)
        accepted = accepted | limited
        p, i, d = options.coefficients
        positive = ratio.clamp(min=torch.finfo(ratio.dtype).tiny)
        factor = options.safety * positive ** (-(p + i + d) / self.order)
        factor = factor * self.previous ** ((p + 2 * d) / self.order) * self.one_before ** (-d / self.order)
        smallest = torch.full_like(ratio, options.dfactor)
        if not (p or d):
            smallest = torch.where(ratio < 1.0, 1.0, smallest)
        factor = torch.maximum(factor, smallest).clamp(max=options.ifactor)
        factor = torch.where(torch.isfinite(ratio), factor, options.dfactor)
        active = self.due < self.output_times.shape[1]
        self.h = torch.where(active, (size * factor).clamp(options.min_step, options.max_step), self.h)
        self.one_before = torch.where(accepted, self.previous, self.one_before)
        self.previous = torch.where(accepted, positive, self.previous)
        self.rejected_size = torch.where(accepted, math.inf, size)
        self.rejected_ratio = torch.where(accepted, math.inf, ratio)
        self.worst_noise = torch.where(accepted, torch.maximum(self.worst_noise, noise), self.worst_noise)
        self.accepted += accepted & active
        self.rejected += ~accepted & active
        self.attempts += active
        return accepted

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
        reached_count = reached.sum(1)
        self.due = self.due + reached_count
        self.attempts = torch.where(reached_count > 0, 0, self.attempts)

    def _drop_done_tiles(self, going: Tensor) -> None:
        """Takes tiles of which no sample is under way out of the batch."""
        tile = self.options.batch_tile
        if tile is None or bool(going.all()):
            return
        kept = [chunk for chunk in torch.arange(len(going)).split(tile) if bool(going[chunk].any())]
        indices = torch.cat(kept)
        if len(indices) == len(going):
            return
        indices = indices.to(self.time.device)
        self.rows = indices if self.rows is None else self.rows[indices]
        for name in ("y", "x", "k"):
            setattr(self, name, [leaf[indices] for leaf in getattr(self, name)])
        for name in (
            "output_times", "time", "due", "attempts", "previous", "one_before", "rejected_size", "rejected_ratio",
            "worst_noise", "accepted", "rejected", "h",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[indices])
        if self.moved is not None:
            self.moved = self.moved[indices]

    def _first_step(self) -> Tensor:
        """Sizes of the first steps, as :meth:`rampde.error_norm.ErrorNorm.first_step` for each sample."""
        if self.options.first_step is not None:
            return torch.full_like(self.time, self.options.first_step)
        y = [leaf.detach() for leaf in self.y]
        k = [value.detach().to(leaf.dtype) for value, leaf in zip(self.k, y, strict=True)]
        allowed = [self._allowed(leaf, self._magnitude(leaf, state)) for leaf, state in enumerate(y)]
        of_state, of_velocity = self._row_norm(y, allowed), self._row_norm(k, allowed)
        small = (of_state < 1e-5) | (of_velocity < 1e-5)
        guess = torch.where(small, 1e-6, 0.01 * of_state / torch.where(small, 1.0, of_velocity))
        step = BatchStep(None, self.time, self.sign * guess)
        terms = [[term] for term in self.stages.increments(k, step.h)]
        x = [
            rk_stage(state, of_leaf, self.stages.one, [1.0], dtype)
            for state, of_leaf, dtype in zip(y, terms, self.problem.velocity.dtypes, strict=True)
        ]
        time = (step.start + step.h).to(self.problem.velocity.spec.time_dtype).reshape(self.stages.time_shape)
        moved = self.stages.evaluate(time, x)
        changes = [new.detach().to(old.dtype) - old for new, old in zip(moved, k, strict=True)]
        change = (self._row_norm(changes, allowed) - self.roundoff * of_velocity).clamp(min=0) / guess
        largest = torch.maximum(of_velocity, change)
        flat = largest <= 1e-15
        size = torch.where(flat, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1.0 / self.order))
        size = torch.where(torch.isfinite(largest), size, guess)
        return torch.minimum(100 * guess, size)

    def _row_norm(self, values: Sequence[Tensor], allowed: Sequence[Tensor]) -> Tensor:
        norms = []
        for value, bound, size in zip(values, allowed, self.sizes, strict=True):
            ratio = torch.where(value == 0, 0.0, value / bound)
            norms.append((ratio.reshape(len(ratio), -1).square().sum(1).to(self.time.dtype) / size).sqrt())
        return torch.stack(norms).amax(0)
