"""Outputs inside of steps, on the road back: their part in the cotangents of a step's stages.

An output ``y(t + theta h) = y + h sum_i w_i(theta) k_i`` with loss gradient ``c`` adds ``c`` to the gradient of ``y``
and ``w_i(theta) c`` to what ``b_i lam`` is for the step's end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.grid import Output
from rampde.ops import rk_stage
from rampde.tableau import ClosedTableau

# terms that the fused sum takes
MAX_TERMS = 16


class OutputsInside:
    """The outputs inside of the steps of a solve, and the loss gradients with respect to them."""

    def __init__(self, tableau: ClosedTableau, outputs: Sequence[Output], cotangents: Sequence[Tensor | None]) -> None:
        """``cotangents``: for each leaf (T, *shape) or None for zero, as are ``outputs``."""
        self._tableau, self._outputs, self._cotangents = tableau, outputs, cotangents
        self._of_step: dict[int, list[int]] = {}
        for index, output in enumerate(outputs):
            if output.inside:
                self._of_step.setdefault(output.step, []).append(index)

    def __contains__(self, step: int) -> bool:
        return step in self._of_step

    def stacked(self, step: int, leaf: int) -> Tensor | None:
        """The loss gradients of the outputs in ``step``, (M, *shape)."""
        indices, cotangents = self._of_step.get(step), self._cotangents[leaf]
        if indices is None or cotangents is None:
            return None
        # times are monotone, so that outputs of one step are neighbours
        return cotangents[indices[0] : indices[-1] + 1]

    def add_to(self, adjoint: Tensor, step: int, leaf: int) -> Tensor:
        """``adjoint`` plus what the outputs of ``step`` give to the state at its start; a new tensor."""
        rows = self.stacked(step, leaf)
        if rows is None:
            return adjoint
        return _weighted(adjoint, rows, [1.0] * rows.shape[0])

    def base(self, adjoint: Tensor, step: int, leaf: int, stage: int) -> Tensor:
        """``b_i lam + sum_m w_i(theta_m) c_m`` of a stage."""
        rows = self.stacked(step, leaf)
        b = self._tableau.b[stage]
        base = adjoint * float(b) if b != 0 else torch.zeros_like(adjoint)
        if rows is None:
            return base
        weights = [self._tableau.weights_at(self._outputs[index].theta)[stage] for index in self._of_step[step]]
        return _weighted(base, rows, weights)

    def forget_time_gradients(self, totals: dict[int, Tensor], step: int) -> None:
        """Removes from ``totals`` what a sweep of ``step`` that did not count has added."""
        for index in self._of_step[step]:
            totals.pop(index, None)

    def add_time_gradients(self, totals: dict[int, Tensor], step: int, stage: int, k: Sequence[Tensor]) -> None:
        """Adds to ``totals``, for each output of ``step``, what a stage with the velocity ``k`` adds to the gradient of
        the loss with respect to its time."""
        for position, index in enumerate(self._of_step[step]):
            slope = self._tableau.slopes_at(self._outputs[index].theta)[stage]
            if slope == 0.0:
                continue
            for leaf, value in enumerate(k):
                rows = self.stacked(step, leaf)
                if rows is not None:
                    part = slope * (rows[position].double() * value.detach().double()).sum()
                    totals[index] = totals[index] + part if index in totals else part


def _weighted(base: Tensor, rows: Tensor, weights: Sequence[float]) -> Tensor:
    one = torch.ones((), dtype=torch.float64 if base.device.type != "mps" else torch.float32, device=base.device)
    terms = rows.unbind(0)
    for start in range(0, len(terms), MAX_TERMS):
        part = slice(start, start + MAX_TERMS)
        base = rk_stage(base, terms[part], one, weights[part], base.dtype)
    return base
