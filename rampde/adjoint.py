"""The road back: the discrete adjoint, swept over the steps in reverse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rampde import scaling
from rampde.captures import find_unknown_leaf
from rampde.checkpoint.keeper import Checkpoints
from rampde.inside import OutputsInside
from rampde.ops import accumulate_gradients, adjoint_update, stage_cotangents, update_adjoints, update_scale
from rampde.precision import accumulation_dtype
from rampde.problem import Problem, Stage
from rampde.velocity import vector_jacobian_product

Gradients = list[Tensor | None]

SMALL = 1 << 20
"""Bytes of parameters whose gradients are so small that operators count for more."""


def gradients_wait(problem: Problem, captures: Sequence[Tensor]) -> bool:
    """Whether the captures' gradients of a step are collected until its last stage is swept, and then added at once.

    One operator adds those of all stages; but where memory is short, or they are larger than a state, they are added
    stage by stage, which gives the same sums to the bit. Under scaling the decision on the step comes before.
    """
    if problem.scaler is not None:
        return True
    if problem.checkpoint.stages in ("stage", "lean"):
        return False
    state = sum(leaf.shape.numel() * leaf.state_dtype.itemsize for leaf in problem.velocity.spec.leaves)
    return sum(capture.nbytes for capture in captures) <= max(state, SMALL)


class Sweep:
    """One sweep of the discrete adjoint.

    With ``lam`` the gradient of the loss with respect to the state at the end of a step, the stages i = s .. 1 give

    ``w_i = b_i lam + sum_{j>i} a_ji g_j``,  ``g_i = h VJP_y(f, X_i)[w_i]``,  ``theta += h VJP_theta(f, X_i)[w_i]``

    and ``lam + sum_i g_i`` is the gradient at its start (Hager, Numer. Math. 87, 2000; scaled as in
    arXiv 2510.23498). ``h`` stays outside the cotangents, which are rounded to the velocity's dtype.
    """

    def __init__(
        self,
        problem: Problem,
        points: Tensor,
        checkpoints: Checkpoints,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> None:
        """``points``: (N + 1,) grid points, or (T,) output times where the steps were decided on the way;
        ``captures``: tensors f uses; ``cotangents``: the loss gradient with respect to the result of the forward
        solve, leaf by leaf, None for zero; ``retain_graph``: whether graphs that were kept are needed once more."""
        self.problem = problem
        self.points = points
        self.checkpoints = checkpoints
        self.captures = captures
        self.retain_graph = retain_graph
        self.scaler = problem.scaler
        self.incoming = [leaf for leaf in cotangents if leaf is not None]
        self.inside: OutputsInside | None = None
        self.time_gradients: list[tuple[Tensor, Tensor] | None] = []
        self.output_time_gradients: dict[int, Tensor] = {}
        self.totals: Gradients = [None] * len(captures)
        self.any_complex = any(capture.is_complex() for capture in captures)
        self.complete = False  # whether every capture has a total
        self.sparse = False  # whether some f did not depend on some part of the state
        self.scale_state: Tensor | None = None
        self.overflowed: Tensor | None = None  # on the device, where the host is not to know
        if self.scaler is not None:
            new_state = self.scaler.recorded_state if problem.recorded else self.scaler.new_state
            self.scale_state = new_state(points.device)
        self.gradients_wait = not captures or gradients_wait(problem, captures)
        self._place(cotangents)

    def _place(self, cotangents: Sequence[Tensor | None]) -> None:
        """Where among the steps the loss gradients lie."""
        problem = self.problem
        self.cotangents = [self._by_grid_point(leaf) for leaf in cotangents]
        if problem.closed is not None:
            self.inside = OutputsInside(problem.closed, problem.grid.outputs, cotangents)
        assert problem.step_times is not None
        self.step_times = problem.step_times
        self.steps = len(problem.step_times)
        self.time_gradients = [None] * self.steps

    def _by_grid_point(self, cotangent: Tensor | None) -> dict[int, Tensor]:
        if cotangent is None:
            return {}
        if self.problem.closed is None:
            return dict(zip(self.problem.kept, cotangent.unbind(0), strict=True))
        rows: dict[int, Tensor] = {}
        for output, row in zip(self.problem.grid.outputs, cotangent.unbind(0), strict=True):
            if not output.inside:
                point = output.step + 1
                rows[point] = rows[point] + row if point in rows else row
        return rows

    def run(self, y0: Sequence[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        """Gradients with respect to the leaves ``y0`` (in the state's dtype), the grid points and the captures."""
        steps = self.steps
        adjoint = [
            torch.zeros_like(leaf, dtype=spec.state_dtype)
            for leaf, spec in zip(y0, self.problem.velocity.spec.leaves, strict=True)
        ]
        self._add_cotangents(adjoint, steps)
        if self.scaler is None:
            for step in reversed(range(steps)):
                self._sweep_step(step, adjoint, adjoint)
        elif self.problem.recorded:
            adjoint = self._run_recorded(adjoint)
        else:
            adjoint = self._run_scaled(adjoint)
        return self._results(adjoint)

    def _add_cotangents(self, adjoint: list[Tensor], point: int) -> None:
        zero = self.points.new_zeros(())
        rows = [of_leaf.get(point) for of_leaf in self.cotangents]
        update_adjoints(adjoint, [[]] * len(adjoint), zero, rows, adjoint, self.scale_state)
        self._gather_inside(point - 1)

    def _gather_inside(self, step: int) -> None:
        """The scale of a step must suit the gradients of the outputs inside of it, too."""
        if self.inside is None or self.scale_state is None or step not in self.inside:
            return
        for leaf in range(len(self.cotangents)):
            rows = self.inside.stacked(step, leaf)
            if rows is not None:
                rows = rows.contiguous()
                adjoint_update(rows, [], self.points.new_zeros(()), None, torch.empty_like(rows), self.scale_state)

    def _run_scaled(self, adjoint: list[Tensor]) -> list[Tensor]:
        """The sweep under dynamic scaling; reads the device twice where no step overflows."""
        assert self.scaler is not None
        assert self.scale_state is not None
        scaler, state = self.scaler, self.scale_state
        self._decide([], steps=0)
        buffers = (adjoint, [torch.empty_like(lam) for lam in adjoint])
        steps = self.steps
        attempts = 0
        committed = 0
        while True:
            for swept in range(committed, steps):
                self._sweep_step(steps - 1 - swept, buffers[swept % 2], buffers[(swept + 1) % 2])
                # a scale that is too large overflows at once, mostly: one look here saves a futile sweep
                if swept == committed and self._overflowed():
                    break
            values = state.tolist()
            committed = int(values[scaling.COMMITTED_STEPS])
            if attempts == 0:
                self._note_start(values)
            if not values[scaling.OVERFLOWED]:
                break
            attempts += 1
            scaler.note("overflow", values[scaling.SCALE] * scaler.decrease_factor)
            if attempts > scaler.max_attempts or not self._incoming_is_finite():
                self._give_up(steps - 1 - committed, attempts)
                return [torch.full_like(lam, math.inf) for lam in adjoint]
            # the scale state is the host's again until the sweep goes on
            state[scaling.SCALE] *= scaler.decrease_factor
            state[scaling.OVERFLOWED] = 0.0
            state[scaling.MAXIMUM] = 0.0
        scaler.headroom = values[scaling.HEADROOM]
        for _ in range(int(values[scaling.INCREASED])):
            scaler.note("increase", values[scaling.SCALE])
        return buffers[steps % 2]

    def _run_recorded(self, adjoint: list[Tensor]) -> list[Tensor]:
        """The sweep under dynamic scaling in a CUDA graph, which cannot resume: after an overflow all gradients are
        infinite, and the next sweep has less headroom."""
        assert self.scaler is not None
        assert self.scale_state is not None
        self._decide([], steps=0)
        buffers = (adjoint, [torch.empty_like(lam) for lam in adjoint])
        for swept in range(self.steps):
            self._sweep_step(self.steps - 1 - swept, buffers[swept % 2], buffers[(swept + 1) % 2])
        self.overflowed = self.scaler.keep(self.scale_state)
        # what is left of a step that overflowed is nothing
        return [torch.where(self.overflowed, math.inf, lam) for lam in buffers[self.steps % 2]]

    def _overflowed(self) -> bool:
        assert self.scale_state is not None
        return bool(self.scale_state[scaling.OVERFLOWED].item())

    def _incoming_is_finite(self) -> bool:
        return all(bool(torch.isfinite(leaf).all()) for leaf in self.incoming)

    def _note_start(self, values: list[float]) -> None:
        assert self.scaler is not None
        self.scaler.S = values[scaling.SCALE_OF_STEP] or values[scaling.SCALE]
        self.scaler.note("init", self.scaler.S)

    def _give_up(self, step: int, attempts: int) -> None:
        """No scale makes the step finite: gradients become infinite, which a ``GradScaler`` skips, or an error."""
        assert self.scaler is not None
        self.totals = [torch.full_like(capture, math.inf) for capture in self.captures]
        self.time_gradients = [None] * self.steps
        self.output_time_gradients = {}
        if attempts <= self.scaler.max_attempts:
            return  # the loss gradient itself was not finite, which is the caller's to know
        message = (
            f"reached the maximum number of {self.scaler.max_attempts} attempts at step {step} of {self.steps},"
            f" t = {self.problem.grid.times[step]:.6g}: the vector-Jacobian product of func is not finite at any"
            " scale of its cotangent; use bfloat16 or look for NaN in func"
        )
        if self.problem.scaler_given:
            raise RuntimeError(message)
        warnings.warn(message + "; all gradients are set to inf", RuntimeWarning, stacklevel=2)

    def _decide(self, gradients: Gradients, steps: int) -> None:
        scaler = self.scaler
        assert scaler is not None
        assert self.scale_state is not None
        target = scaler.target / math.sqrt(self.problem.velocity.spec.elements_per_sample)
        update_scale(
            self.scale_state,
            gradients,
            target,
            scaler.decrease_factor,
            scaler.increase_factor,
            scaling.INCREASE_INTERVAL,
            scaler.delta,
            steps,
        )

    def _sweep_step(self, step: int, adjoint: list[Tensor], adjoint_next: list[Tensor]) -> None:
        """Takes ``adjoint`` from the end of ``step`` to its start."""
        h, times = self.step_times[step]
        captures, retain_graph, scale_state = self.captures, self.retain_graph, self.scale_state
        inside = self.inside if self.inside is not None and step in self.inside else None
        swept = self.problem.tableau.cotangents
        if inside is not None:
            assert self.problem.closed is not None
            swept = self.problem.closed.interpolated_cotangents
        stages = self.checkpoints.load(step, h, times[: swept[0].stage + 1])
        if not self.retain_graph:
            self.checkpoints.release(step)
        # products in the order of the sweep, for each leaf
        vjps: list[list[Tensor | None]] = [[] for _ in adjoint]
        gradients: Gradients = []
        time_gradient = TimeGradient(self, h) if self.problem.time_needs_grad else None
        if inside is not None:
            inside.forget_time_gradients(self.output_time_gradients, step)
        # where f shows what it holds, a look at the last and at a middle step is enough to see that it does
        watched = step + 1 == self.steps or step == self.steps // 2
        for i, b, later in swept:
            stage = stages.take(i)
            bases, terms = adjoint, vjps
            if not later.dense:
                terms = [later.pick(of_leaf) for of_leaf in vjps]
            if inside is not None:
                bases, b = [inside.base(lam, step, leaf, i) for leaf, lam in enumerate(adjoint)], 1.0
            dtypes = [k.dtype for k in stage.k]
            cotangents = stage_cotangents(bases, terms, h, b, later.weights, dtypes, scale_state, self.sparse)
            if watched or self.problem.opaque:
                self._check_captures(stage)
                watched = False
            inputs = stage.x
            if time_gradient is not None:
                inputs = [*inputs, stage.time]
                time_gradient.add_velocity(stage.k, cotangents)
                if inside is not None:
                    inside.add_time_gradients(self.output_time_gradients, step, i, stage.k)
            # the first stage may be the last one of the step before, which takes a product of it too
            shared = i == 0 and self.inside is not None and step - 1 in self.inside
            products = vector_jacobian_product(
                stage.k, (*inputs, *captures), cotangents, retain_graph or (shared and self.checkpoints.keeps_graphs)
            )
            for of_leaf, product in zip(vjps, products, strict=False):
                of_leaf.append(product)
                self.sparse = self.sparse or product is None
            if time_gradient is not None:
                time_gradient.add_time(products[len(vjps)], self.problem.tableau.nodes[i])
            if not self.gradients_wait:
                self._accumulate(list(products[len(inputs) :]), h)
            else:
                gradients.extend(products[len(inputs) :])
            # the graph of the stage goes as soon as its product is taken, before that of the next one is made
            del stage, inputs, cotangents, terms, bases, products, product
        bases = adjoint
        if inside is not None:
            bases = [inside.add_to(lam, step, leaf) for leaf, lam in enumerate(adjoint)]
        rows = [of_leaf.get(step) for of_leaf in self.cotangents]
        update_adjoints(bases, vjps, h, rows, adjoint_next, scale_state, self.sparse)
        self._gather_inside(step - 1)
        if self.scale_state is not None:
            self._decide(gradients, steps=1)
        if gradients:
            self._accumulate(gradients, h)
        if time_gradient is not None:
            self.time_gradients[step] = time_gradient.ends()

    def _check_captures(self, stage: Stage) -> None:
        """Raises RuntimeError where f uses a tensor now that it did not show before: its gradient would be missing."""
        unknown = find_unknown_leaf(stage.k, [*stage.x, stage.time, *self.captures])
        if unknown is not None:
            raise RuntimeError(
                f"func used a tensor of shape {list(unknown.shape)} that requires a gradient at t ="
                f" {float(stage.time):.6g}, though not in its first evaluation, and no module, closure or attribute"
                ' of func holds it: its gradient would be missing. Hold it there, or use checkpoint="tape"'
            )

    def _accumulate(self, gradients: Gradients, h: Tensor) -> None:
        """Adds the captures' gradients of all stages of a step, in the accumulation dtype."""
        count = len(self.captures)
        if self.any_complex:
            gradients = [
                torch.view_as_real(g.resolve_conj()) if g is not None and g.is_complex() else g for g in gradients
            ]
        if self.complete:
            accumulate_gradients(self.totals, gradients, h, self.scale_state)
            return
        for index, gradient in enumerate(gradients):
            capture = index % count
            if gradient is not None and self.totals[capture] is None:
                # in the layout of the gradient, which is often that of the transposed parameter
                dtype = accumulation_dtype(self.captures[capture].dtype)
                self.totals[capture] = torch.zeros_like(gradient, dtype=dtype)
        used = [c for c in range(count) if self.totals[c] is not None]
        self.complete = len(used) == count
        if not used:
            return
        present = [gradients[start + c] for start in range(0, len(gradients), count) for c in used]
        accumulate_gradients([self.totals[c] for c in used], present, h, self.scale_state)

    def _points_gradient(self) -> Tensor:
        total = torch.zeros_like(self.points)
        if self.inside is None:
            for step, ends in enumerate(self.time_gradients):
                if ends is not None:
                    total[step] += ends[0]
                    total[step + 1] += ends[1]
            return total
        # the steps keep their sizes: all of them move with the first time, and against the outputs inside of them
        for ends in self.time_gradients:
            if ends is not None:
                total[0] += ends[0] + ends[1]
        for index, gradient in self.output_time_gradients.items():
            if not self.problem.event_at(index):
                total[index] += gradient
            total[0] -= gradient
        return total

    def _results(self, adjoint: list[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        points = self._points_gradient() if self.problem.time_needs_grad else None
        totals: Gradients = []
        for capture, total in zip(self.captures, self.totals, strict=True):
            if total is not None and capture.is_complex() and not total.is_complex():
                total = torch.view_as_complex(total.contiguous())
            totals.append(total)
        gradients: Gradients = [*adjoint]
        if self.overflowed is not None:
            overflowed = self.overflowed
            totals = [None if g is None else torch.where(overflowed, math.inf, g) for g in totals]
            points = None if points is None else torch.where(overflowed, math.inf, points)
        if self.problem.poison:
            present = [g for g in (*gradients, *totals) if g is not None]
            finite = torch.stack([torch.isfinite(g).all() for g in present]).all()
            gradients = [None if g is None else torch.where(finite, g, math.inf) for g in gradients]
            totals = [None if g is None else torch.where(finite, g, math.inf) for g in totals]
        return gradients, points, totals


class TimeGradient:
    """Gradient of one step with respect to its two ends.

    ``dL/dh = sum_i <k_i, w_i>`` at fixed stage times, and each stage time is ``(1 - c_i) start + c_i end``.
    """

    def __init__(self, sweep: Sweep, h: Tensor) -> None:
        self.scale = None if sweep.scale_state is None else sweep.scale_state[scaling.SCALE].clone()
        self.h = h
        self.dtype = self.h.dtype
        self.start = torch.zeros_like(self.h)
        self.end = torch.zeros_like(self.h)

    def add_velocity(self, k: list[Tensor], cotangents: list[Tensor]) -> None:
        for velocity, cotangent in zip(k, cotangents, strict=True):
            product = (velocity.detach().to(self.dtype) * cotangent).sum()
            self.end += product
            self.start -= product

    def add_time(self, gradient: Tensor | None, node: float) -> None:
        if gradient is not None:
            product = self.h * gradient.to(self.dtype)
            self.end += node * product
            self.start += (1.0 - node) * product

    def ends(self) -> tuple[Tensor, Tensor]:
        if self.scale is None:
            return self.start, self.end
        return self.start / self.scale, self.end / self.scale
