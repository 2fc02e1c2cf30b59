"""Adaptive steps for each sample by itself: the road back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.adjoint import Gradients, Sweep
from rampde.checkpoint.every_step import EveryStep
from rampde.ops import adjoint_stage, adjoint_update
from rampde.per_sample import BatchStages, BatchStep, polynomial
from rampde.problem import Stage
from rampde.scaling import power_of_two_below
from rampde.tableau import StageCotangent
from rampde.velocity import vector_jacobian_product

# by how much a scale is lowered that overflowed
LOWERED = 2.0**-4


class PerSampleSweep(Sweep):
    """The discrete adjoint where every sample has its own step size.

    The size cannot stay outside of the cotangents as it does in :class:`Sweep`, since products sum over the samples:
    ``w_i = h (b_i lam + sum_j a_ji v_j)`` with ``v_j = VJP_y(f, X_j)[w_j]``, sample by sample.
    """

    def _place(self, cotangents: Sequence[Tensor | None]) -> None:
        # the scale is decided in each step by the host, which looks at the device there anyway
        self.scale_state = None
        outputs = self.points.shape[-1]
        self.rows_of_outputs: list[Sequence[Tensor | None]] = [
            [None] * outputs if leaf is None else leaf.unbind(0) for leaf in cotangents
        ]

    def run(self, y0: Sequence[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        problem = self.problem
        assert problem.batch_steps is not None
        self.batch_steps = problem.batch_steps
        self.stages = BatchStages(problem)
        self.moved_first = torch.zeros(self.stages.samples, dtype=self.points.dtype, device=self.points.device)
        self.moved_outputs = torch.zeros_like(self.points.expand(self.stages.samples, -1))
        adjoint = [
            torch.zeros_like(leaf, dtype=spec.state_dtype)
            for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)
        ]
        for step in reversed(range(len(self.batch_steps))):
            self._sweep_batch(step, adjoint)
        for lam, rows in zip(adjoint, self.rows_of_outputs, strict=True):
            adjoint_update(lam, [], self.stages.one, rows[0], lam, None)
        return self._results(adjoint)

    def _sweep_batch(self, number: int, adjoint: list[Tensor]) -> None:
        step = self.batch_steps[number]
        if step.rows is None:
            self._sweep_rows(step, number, adjoint)
            return
        parts = [lam[step.rows] for lam in adjoint]
        self._sweep_rows(step, number, parts)
        for lam, part in zip(adjoint, parts, strict=True):
            lam.index_copy_(0, step.rows, part)

    def _sweep_rows(self, step: BatchStep, number: int, adjoint: list[Tensor]) -> None:
        """Takes the adjoint of the samples of a step from its end to its start."""
        tableau = self.stages.tableau
        swept = tableau.interpolated_cotangents if step.outputs else tableau.cotangents
        graphs, terms = self._load(step, number, swept[0].stage + 1)
        bases = self._bases(step, adjoint, [cotangent.stage for cotangent in swept])
        if self.problem.time_needs_grad:
            self._add_output_times(step, terms)
        scale = self._scale(bases, step)
        while True:
            products, gradients, times, finite = self._products(step, graphs, bases, swept, scale)
            # with scaling, the one look at the device in a step
            if self.scaler is None or finite or float(scale) < 2.0**-90:
                break
            scale = scale * LOWERED
        inverse = 1.0 / scale
        for leaf, lam in enumerate(adjoint):
            present = [product for product in products[leaf] if product is not None]
            total = self._with_outputs(step, lam, leaf)
            adjoint_update(total, present, inverse, None, lam, None)
        if gradients:
            self._accumulate(gradients, inverse)
        if self.problem.time_needs_grad:
            first = sum((time.reshape(-1) for time in times), start=torch.zeros_like(step.start)) * inverse
            self._add_to_first(step, first)

    def _load(self, step: BatchStep, number: int, count: int) -> tuple[list[Stage], list[list[Tensor]]]:
        """The first ``count`` stages with their graphs, and ``h k`` of each."""
        assert isinstance(self.checkpoints, EveryStep)
        stages, tableau = self.stages, self.stages.tableau
        y = self.checkpoints.loaded(number)
        graphs: list[Stage] = []
        terms: list[list[Tensor]] = [[] for _ in y]
        sizes, times = stages.sizes(step.h), stages.times(step.start, step.h)
        for i in range(count):
            x = [leaf.detach() for leaf in y] if i == 0 else stages.combined(y, terms, tableau.stage_inputs[i])
            time = times[i]
            if self.problem.time_needs_grad:
                time = time.detach().requires_grad_()
            graphs.append(Stage(time, x, stages.evaluate(time, x, graph=True)))
            increments = stages.increments([value.detach() for value in graphs[-1].k], sizes)
            for of_leaf, term in zip(terms, increments, strict=True):
                of_leaf.append(term)
        return graphs, terms

    def _cotangents_of(self, step: BatchStep, leaf: int) -> list[tuple[Tensor, Tensor]]:
        """For each output in the step where it lies (R,) and its loss gradient, zero for the other samples."""
        found = []
        for output in step.outputs:
            row = self.rows_of_outputs[leaf][output.index]
            if row is not None:
                row = row if step.rows is None else row[step.rows]
                mask = self.stages.along(output.mask, leaf, torch.bool)
                dtype = self.problem.velocity.spec.leaves[leaf].state_dtype
                found.append((output.theta, torch.where(mask, row, 0.0).to(dtype)))
        return found

    def _bases(self, step: BatchStep, adjoint: list[Tensor], wanted: list[int]) -> list[dict[int, Tensor]]:
        """``b_i lam`` and what the outputs in the step add to it, for each leaf and stage."""
        tableau = self.stages.tableau
        bases = []
        for leaf, lam in enumerate(adjoint):
            outputs = self._cotangents_of(step, leaf)
            of_leaf = {}
            for stage in wanted:
                total = lam * float(tableau.b[stage])
                for theta, row in outputs:
                    weight = polynomial(tableau.interpolant[stage], theta)
                    total = total + self.stages.along(weight, leaf, total.dtype) * row
                of_leaf[stage] = total
            bases.append(of_leaf)
        return bases

    def _with_outputs(self, step: BatchStep, lam: Tensor, leaf: int) -> Tensor:
        for _, row in self._cotangents_of(step, leaf):
            lam = lam + row
        return lam

    def _scale(self, bases: list[dict[int, Tensor]], step: BatchStep) -> Tensor:
        """A power of two that takes the cotangents into the range of float16; 1 without scaling."""
        if self.scaler is None:
            return self.stages.one
        largest = [
            (self.stages.along(step.h, leaf, base.dtype) * base).abs().amax()
            for leaf, of_leaf in enumerate(bases)
            for base in of_leaf.values()
        ]
        target = self.scaler.target / math.sqrt(self.problem.velocity.spec.elements_per_sample)
        return power_of_two_below(target / torch.stack(largest).amax()).to(self.stages.one.dtype)

    def _products(
        self,
        step: BatchStep,
        graphs: list[Stage],
        bases: list[dict[int, Tensor]],
        swept: Sequence[StageCotangent],
        scale: Tensor,
    ) -> tuple[list[list[Tensor | None]], Gradients, list[Tensor], bool]:
        """The vector-Jacobian products of all stages, times ``scale``; and whether they are finite."""
        stages, captures = self.stages, self.captures
        products: list[list[Tensor | None]] = [[] for _ in bases]
        gradients: Gradients = []
        times: list[Tensor] = []
        for i, _, later in swept:
            stage = graphs[i]
            cotangents = []
            for leaf, (of_leaf, k) in enumerate(zip(bases, stage.k, strict=True)):
                pairs = [(products[leaf][j], a) for j, a in zip(later.stages, later.weights, strict=True)]
                present = [(product, a) for product, a in pairs if product is not None]
                base = of_leaf[i] * scale.to(of_leaf[i].dtype)
                total = adjoint_stage(
                    base, [p for p, _ in present], stages.one, 1.0, [a for _, a in present], base.dtype
                )
                cotangents.append((stages.along(step.h, leaf, total.dtype) * total).to(k.dtype))
            if self.problem.opaque or step is self.batch_steps[-1]:
                self._check_captures(stage)
            inputs = [*stage.x, *([stage.time] if self.problem.time_needs_grad else []), *captures]
            found = vector_jacobian_product(stage.k, inputs, cotangents, retain_graph=self.scaler is not None)
            for of_products, product in zip(products, found, strict=False):
                of_products.append(product)
            after = len(stage.x)
            if self.problem.time_needs_grad:
                if found[after] is not None:
                    times.append(found[after].to(self.points.dtype))  # type: ignore[union-attr]
                after += 1
            gradients.extend(found[after:])
        finite = True
        if self.scaler is not None:
            present_all = [p for p in (*gradients, *(p for of_leaf in products for p in of_leaf)) if p is not None]
            finite = all(bool(torch.isfinite(p).all()) for p in present_all)
        return products, gradients, times, finite

    def _add_output_times(self, step: BatchStep, terms: list[list[Tensor]]) -> None:
        """Gradients with respect to the times of the outputs in the step; its points move against them."""
        size = torch.where(step.h == 0, 1.0, step.h)
        rows = slice(None) if step.rows is None else step.rows
        for leaf, of_leaf in enumerate(terms):
            outputs = self._cotangents_of(step, leaf)
            places = [o.index for o in step.outputs if self.rows_of_outputs[leaf][o.index] is not None]
            for index, (theta, row) in zip(places, outputs, strict=True):
                total = torch.zeros_like(theta)
                for coefficients, term in zip(self.stages.tableau.interpolant, of_leaf, strict=False):
                    slope = torch.zeros_like(theta)
                    for power in reversed(range(len(coefficients))):
                        slope = slope * theta + (power + 1) * coefficients[power]
                    total = total + slope * (row * term).reshape(len(row), -1).sum(1).to(theta.dtype)
                total = total / size
                self.moved_outputs[rows, index] += total
                self._add_to_first(step, -total)

    def _add_to_first(self, step: BatchStep, gradient: Tensor) -> None:
        rows = slice(None) if step.rows is None else step.rows
        self.moved_first[rows] += gradient

    def _points_gradient(self) -> Tensor:
        total = self.moved_outputs.clone()
        total[:, 0] += self.moved_first
        return total.sum(0) if self.points.dim() == 1 else total
