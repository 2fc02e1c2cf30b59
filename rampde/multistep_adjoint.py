"""The road back of a multistep solve: the discrete adjoint, swept over the grid points in reverse."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rampde.adams import AdamsMethod, Weights, read_options, step_weights
from rampde.adjoint import Gradients, Sweep
from rampde.grid import CHUNK
from rampde.multistep_stages import RK4, PointStages, chained_sum, evaluate_single, formulas_of
from rampde.ops import adjoint_update, rk_stage
from rampde.precision import accumulation_dtype
from rampde.problem import Problem, Stage
from rampde.scaling import INCREASE_INTERVAL, power_of_two_below
from rampde.velocity import vector_jacobian_product

# products with the Jacobian that the equation of an implicit step may take at least; more where the corrector of the
# road out may take many iterations, which are fewer as it need not reach roundoff
LEAST_PRODUCTS = 100
PRODUCTS_PER_ITERATION = 8


@dataclass(frozen=True)
class _Step:
    """A multistep step that has been swept: what the velocities that entered it get of its adjoint."""

    step: int
    h: Tensor
    weights: Weights
    scaled: list[Tensor]  # h times the gradient with respect to the increment of the state


class MultistepSweep(Sweep):
    """One sweep of the discrete adjoint of an :class:`rampde.adams.AdamsMethod`.

    With ``lam_n`` the gradient of the loss with respect to the increment of step n - 1, and ``w_mj`` the weight of
    the velocity ``f_{m-j}`` in step m, the velocity at point n gets and gives

    ``c_n = sum_m w_{m,m-n} lam_{m+1}``,  ``lam_n = lam_{n+1} + J_n^T c_n + dL/dy_n``,
    ``theta += VJP_theta(f_n)[c_n]``.

    Where step n - 1 is implicit, ``c_n`` holds ``w lam_n`` too: ``lam_n`` then solves a linear equation, that of the
    implicit function theorem at the corrector's limit, by the iteration that mirrors the corrector's.

    Sums are in the state's dtype, also ``c_n``; it is rounded to the velocity's after scaling by a power of two.
    """

    def __init__(
        self,
        problem: Problem,
        points: Tensor,
        stages: PointStages,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> None:
        """As :meth:`rampde.adjoint.Sweep.__init__`; ``stages``: the evaluations of the road out."""
        super().__init__(problem, points, stages, captures, cotangents, retain_graph)  # type: ignore[arg-type]
        self.stages = stages
        self.implicit = cast(AdamsMethod, problem.method).implicit
        self.formulas = formulas_of(problem)
        self.scale_state = None  # scaled here, evaluation by evaluation
        self.one = points.new_ones(())
        self.later: deque[_Step] = deque(maxlen=self.formulas.history)
        self.total_of_points = torch.zeros_like(points)
        self.weight_gradients: dict[int, dict[int, Tensor]] = {}
        self.max_products = max(LEAST_PRODUCTS, PRODUCTS_PER_ITERATION * read_options(problem.options).max_iters)
        self.first_scale: Tensor | None = None
        self.stalled: int | None = None

    def run(self, y0: Sequence[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        """Gradients with respect to the leaves ``y0`` (in the state's dtype), the grid points and the captures."""
        adjoint = self._sweep(y0) if self.scaler is None else self._sweep_scaled(y0)
        if self.stalled is not None:
            warnings.warn(
                f"the gradient of the implicit step that ends at t = {self.problem.grid.times[self.stalled]:.6g} did"
                f" not converge in {self.max_products} products with the Jacobian of func; gradients may be incorrect:"
                " use smaller steps",
                RuntimeWarning,
                stacklevel=2,
            )
        gradients, points, totals = self._results(adjoint)
        if points is not None:
            points = points + self.total_of_points + self._gradient_through_weights()
        return gradients, points, totals

    def _sweep(self, y0: Sequence[Tensor]) -> list[Tensor]:
        self.totals, self.complete = [None] * len(self.captures), False
        self.total_of_points = torch.zeros_like(self.points)
        self.weight_gradients = {}
        self.later.clear()
        self.stalled = None
        self.lost = torch.full((), -1, dtype=torch.int64, device=self.points.device)
        adjoint = [
            torch.zeros_like(leaf, dtype=spec.state_dtype)
            for leaf, spec in zip(y0, self.problem.velocity.spec.leaves, strict=True)
        ]
        for point in reversed(range(self.steps + 1)):
            adjoint = self._sweep_point(point, adjoint)
            if self.scaler is not None:
                # the first point in the sweep where the adjoint was not finite
                self.lost = torch.where((self.lost < 0) & ~_finite(adjoint), point, self.lost)
        return adjoint

    def _sweep_scaled(self, y0: Sequence[Tensor]) -> list[Tensor]:
        """The sweep with every cotangent scaled, repeated with smaller scales where that left the range."""
        scaler = self.scaler
        assert scaler is not None
        attempts = 0
        while True:
            adjoint = self._sweep(y0)
            if attempts == 0 and self.first_scale is not None:
                scaler.S = float(self.first_scale)
                scaler.note("init", scaler.S)
            if bool(_finite([*adjoint, *(total for total in self.totals if total is not None)])):
                break
            attempts += 1
            if attempts > scaler.max_attempts or not self._incoming_is_finite():
                self._give_up(max(int(self.lost) - 1, 0), attempts)
                self.total_of_points = torch.zeros_like(self.points)
                self.weight_gradients = {}
                return [torch.full_like(lam, math.inf) for lam in adjoint]
            scaler.headroom *= scaler.decrease_factor
            scaler.note("overflow", (scaler.S or 1.0) * scaler.decrease_factor**attempts)
        if attempts == 0 and scaler.headroom < 1 and self.steps >= INCREASE_INTERVAL:
            scaler.headroom = min(1.0, scaler.headroom * scaler.increase_factor)
            scaler.note("increase", scaler.headroom)
        return adjoint

    def _sweep_point(self, point: int, adjoint: list[Tensor]) -> list[Tensor]:
        """The gradient with respect to the increment of the step before the point; ``adjoint``: of the one after."""
        incoming = [of_leaf.get(point) for of_leaf in self.cotangents]
        at_end = point == self.steps
        if at_end and not self.implicit:
            adjoint = self._add(adjoint, None, incoming)
            self._push(point, adjoint)
            return adjoint
        h, times = self.step_times[point - at_end]
        single = at_end or self.formulas[point] is not None
        stages: list[Stage | None] = [*self.stages.load(point, h, times[-1:] if at_end else times, single)]
        if not self.retain_graph:
            self.stages.release(point)
        first = stages[0]
        assert first is not None
        if point in (self.steps - 1, self.steps // 2) or self.problem.opaque:
            self._check_captures(first)

        cotangents = self._from_later_steps(point, adjoint, first)
        if not single:
            cotangents, products = self._sweep_stages(point, h, stages, adjoint, cotangents)
            adjoint = self._add(adjoint, products, None)
        before = self.formulas[point - 1] if point > 0 else None
        if before is None or before.corrector is None:
            adjoint = self._add(adjoint, self._pull_back(first, cotangents, point), incoming)
        else:
            adjoint = self._add(adjoint, None, incoming)
            adjoint = self._solve_implicit(point, first, before.corrector, cotangents, adjoint)
        self._push(point, adjoint)
        return adjoint

    def _from_later_steps(self, point: int, adjoint: list[Tensor], stage: Stage) -> list[Tensor]:
        """``sum_m w_{m,m-n} lam_{m+1}`` over the later steps that the velocity at the point entered, leaf by leaf."""
        skip = 1 if self.implicit else 0
        entered = [
            (later, skip + later.step - point)
            for later in self.later
            if skip + later.step - point < len(later.weights.values)
        ]
        results = []
        for leaf, lam in enumerate(adjoint):
            terms = [later.scaled[leaf] for later, _ in entered]
            zero = torch.zeros_like(lam)
            if len(entered) == self.formulas.history and all(later.weights.equal for later, _ in entered):
                weights = [later.weights.values[index] for later, index in entered]
                results.append(rk_stage(zero, terms, self.one, weights, lam.dtype))
            elif entered:
                results.append(chained_sum(zero, terms, [later.weights.scalars[index] for later, index in entered]))
            else:
                results.append(zero)
        if self.problem.time_needs_grad:
            for later, index in entered:
                self._note_weight(later.step, index, stage, later.scaled, later.h)
        return results

    def _push(self, point: int, adjoint: list[Tensor]) -> None:
        """Notes ``adjoint`` for the velocities that entered the step before the point, where that is multistep."""
        formula = self.formulas[point - 1] if point > 0 else None
        if formula is None:
            return
        h = self.step_times[point - 1][0]
        scaled = [rk_stage(torch.zeros_like(lam), [lam], h, [1.0], lam.dtype) for lam in adjoint]
        self.later.appendleft(_Step(point - 1, h, formula.corrector or formula.predictor, scaled))

    def _sweep_stages(
        self, point: int, h: Tensor, stages: list[Stage | None], adjoint: list[Tensor], known: list[Tensor]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The later stages of a step of rk4: the cotangent of its first one, and the products of the others."""
        products: list[list[Tensor]] = [[] for _ in adjoint]  # of the stages in the order of the sweep
        for i, b, later in RK4.cotangents:
            bases = known if i == 0 else [torch.zeros_like(lam) for lam in adjoint]
            weights = [b, *later.weights]
            cotangents = [
                rk_stage(base, [lam, *later.pick(of_leaf)], h, weights, lam.dtype)
                for base, lam, of_leaf in zip(bases, adjoint, products, strict=True)
            ]
            stage = stages[i]
            assert stage is not None
            if self.problem.time_needs_grad:
                # those of later steps do not know of this one's size
                own = [c - base for c, base in zip(cotangents, bases, strict=True)]
                slope = _inner(stage.k, own, self.points.dtype) / h
                self.total_of_points[point] -= slope
                self.total_of_points[point + 1] += slope
            if i == 0:
                break
            stages[i] = None  # the graph of the stage goes as soon as its product is taken
            pulled = self._pull_back(stage, cotangents, point, RK4.nodes[i])
            for of_leaf, terms, lam in zip(products, pulled, adjoint, strict=True):
                of_leaf.append(terms[0] if terms else torch.zeros_like(lam))
        return cotangents, products

    def _solve_implicit(
        self, point: int, stage: Stage, corrector: Weights, known: list[Tensor], total: list[Tensor]
    ) -> list[Tensor]:
        """``lam = total + J^T c`` with ``c = known + w lam``, ``w`` the weight of the velocity in the step before."""
        h, times = self.step_times[point - 1]
        weight = h * corrector.scalars[0]
        if self.problem.perturb:
            # the corrector saw f just before the point, later steps just after it
            total = self._add(total, self._pull_back(stage, known, point), None)
            known = [torch.zeros_like(lam) for lam in total]
            time = times[-1].detach().requires_grad_(self.problem.time_needs_grad)
            stages: list[Stage] = []
            evaluate_single(self.problem, [leaf.detach() for leaf in stage.x], time, stages)
            stage = stages[0]
        roundoff = max(torch.finfo(k.dtype).eps for k in stage.k)
        lam = total
        for _ in range(self.max_products):
            cotangents = [rk_stage(c, [leaf], weight, [1.0], c.dtype) for c, leaf in zip(known, lam, strict=True)]
            products, inverse = self._products(stage, cotangents, stage.x, retain_graph=True)
            previous, lam = lam, self._add(total, self._unscaled(products, inverse), None)
            if _stands_still(previous, lam, 2 * roundoff):
                break
        else:
            self.stalled = point
        if self.problem.time_needs_grad:
            self._note_weight(point - 1, 0, stage, lam, self.one)
        cotangents = [rk_stage(c, [leaf], weight, [1.0], c.dtype) for c, leaf in zip(known, lam, strict=True)]
        return self._add(total, self._pull_back(stage, cotangents, point), None)

    def _add(
        self,
        adjoint: list[Tensor],
        products: Sequence[Sequence[Tensor]] | None,
        incoming: Sequence[Tensor | None] | None,
    ) -> list[Tensor]:
        """``adjoint`` plus products, and plus the gradient with respect to an output, leaf by leaf, new tensors."""
        results = [torch.empty_like(lam) for lam in adjoint]
        for leaf, (lam, result) in enumerate(zip(adjoint, results, strict=True)):
            terms = [] if products is None else list(products[leaf])
            adjoint_update(lam, terms, self.one, None if incoming is None else incoming[leaf], result)
        return results

    def _pull_back(self, stage: Stage, cotangents: list[Tensor], point: int, node: float = 0.0) -> list[list[Tensor]]:
        """Products with the Jacobian of f, for each leaf one or, where f does not depend on it, none.

        Those with respect to the captures, and to the time at ``node`` of the step, are added to their totals.
        """
        timed = self.problem.time_needs_grad
        inputs = [*stage.x, stage.time] if timed else stage.x
        products, inverse = self._products(stage, cotangents, (*inputs, *self.captures), self.retain_graph)
        leaves = len(stage.x)
        if timed:
            gradient = products[leaves]
            if gradient is not None:
                gradient = gradient.to(self.points.dtype) * inverse
                self.total_of_points[point] += (1.0 - node) * gradient
                if node > 0:
                    self.total_of_points[point + 1] += node * gradient
        gradients = list(products[len(inputs) :])
        if gradients:
            self._accumulate(gradients, inverse)
        return self._unscaled(products[:leaves], inverse)

    def _products(
        self, stage: Stage, cotangents: Sequence[Tensor], inputs: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Vector-Jacobian products, and the inverse of the scale they carry."""
        inverse = self.one
        if self.scaler is not None:
            scale = self._scale(cotangents)
            inverse = 1.0 / scale
            cotangents = [scale * cotangent for cotangent in cotangents]
        rounded = [cotangent.to(k.dtype) for cotangent, k in zip(cotangents, stage.k, strict=True)]
        return vector_jacobian_product(stage.k, inputs, rounded, retain_graph), inverse

    def _unscaled(self, products: Sequence[Tensor | None], inverse: Tensor) -> list[list[Tensor]]:
        present = [[] if product is None else [product] for product in products]
        if self.scaler is None:
            return present
        # 16 bits would not hold what the scale kept in range
        return [[product.to(accumulation_dtype(product.dtype)) * inverse for product in terms] for terms in present]

    def _scale(self, cotangents: Sequence[Tensor]) -> Tensor:
        """A power of two that takes the largest of ``cotangents`` near the scaler's target, a 0-dim float32 tensor."""
        assert self.scaler is not None
        target = self.scaler.target / math.sqrt(self.problem.velocity.spec.elements_per_sample)
        largest = [c.abs().amax().to(torch.float32) for c in cotangents if c.numel() > 0]
        if not largest:
            return self.one.to(torch.float32)
        scale = self.scaler.headroom * power_of_two_below(target / (torch.stack(largest).amax() + self.scaler.delta))
        if self.first_scale is None:
            self.first_scale = scale
        return scale

    def _note_weight(self, step: int, index: int, stage: Stage, adjoint: list[Tensor], h: Tensor) -> None:
        """The gradient with respect to weight ``index`` of ``step``, which is ``<adjoint, k> / h``."""
        gradient = _inner(stage.k, adjoint, self.points.dtype) / h
        self.weight_gradients.setdefault(step, {})[index] = gradient

    def _gradient_through_weights(self) -> Tensor:
        """What the grid points get of the gradient as the nodes of the interpolation polynomials."""
        by_length: dict[int, list[int]] = {}
        for step in self.weight_gradients:
            formula = self.formulas[step]
            assert formula is not None
            by_length.setdefault(formula.past, []).append(step)
        with torch.enable_grad():
            points = self.points.detach().requires_grad_()
            total = torch.zeros_like(points)
            for past, steps in by_length.items():
                for start in range(0, len(steps), CHUNK):
                    chunk = steps[start : start + CHUNK]
                    count = past + int(self.implicit)
                    gradients = [
                        self.weight_gradients[step].get(index, total.new_zeros(()))
                        for step in chunk
                        for index in range(count)
                    ]
                    offsets = torch.arange(1 - past, 2, device=points.device)
                    rows = points[torch.tensor(chunk, device=points.device)[:, None] + offsets]
                    weights = step_weights(rows, self.implicit)
                    upstream = torch.stack(gradients).view_as(weights)
                    total += torch.autograd.grad(weights, points, upstream)[0]
        return total.detach()


def _inner(k: Sequence[Tensor], cotangents: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    products = [(a.detach().to(dtype) * b.to(dtype)).sum() for a, b in zip(k, cotangents, strict=True)]
    return torch.stack(products).sum()


def _stands_still(previous: list[Tensor], lam: list[Tensor], tolerance: float) -> bool:
    """Whether no leaf moved by more than ``tolerance`` times its largest element; what is not finite moves no more."""
    moved = [
        (new - old).abs().amax() > tolerance * new.abs().amax()
        for old, new in zip(previous, lam, strict=True)
        if new.numel() > 0
    ]
    return not moved or not bool(torch.stack(moved).any())


def _finite(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()
