"""The error of a step in units of the tolerance, and the size of the first step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rampde.ops import rk_error, rk_stage
from rampde.problem import Problem, Stage
from rampde.tableau import ClosedTableau
from rampde.tolerance import Bound

ROUNDOFF = 2.0
"""Rounding of a 16-bit velocity in units of its unit roundoff: that of its input, and that of its own."""


class Rounding:
    """What the rounding of 16-bit velocities is in the error of a step.

    Of a velocity k_i rounding leaves ``u k_i`` open. In the estimated error it shows as ``h u |(e_i k_i)|``, in the
    state at the end of the step as ``h u |(b_i k_i)|``, which is larger by about ``|b| / |e|``. An error below the
    latter is not worth a smaller step: the step itself brings as much.

    Attributes:
        unit: twice the unit roundoff; 0 where velocities have 32 bits or more, whose rounding lies below every
            sensible tolerance.
        allowed: ``unit`` times ``|b| / |e|``: what is taken off the error, where velocities are multiplied with e.
        visible: the share of ``allowed`` that shows in the estimated error.
    """

    def __init__(self, problem: Problem, k: Sequence[Tensor]) -> None:
        """``k``: velocities that f returned."""
        velocity, tableau = problem.velocity, problem.tableau
        assert isinstance(tableau, ClosedTableau)
        dtypes = [*velocity.dtypes, *(value.dtype for value in k)]
        if velocity.autocast.enabled:
            dtypes.append(velocity.autocast.dtype)
        epsilons = [torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize == 2]
        self.unit = ROUNDOFF * max(epsilons) / 2 if epsilons else 0.0
        of_state, of_error = (math.hypot(*map(float, weights)) for weights in (tableau.b, tableau.error))
        ratio = max(of_state / of_error, 1.0)
        self.allowed, self.visible = self.unit * ratio, 1.0 / ratio


def warn_of_rounding(problem: Problem, noise: float) -> None:
    """Warns that rounding alone makes errors ``noise`` times as large as the tolerances, and names reachable ones."""
    tolerance, velocity = problem.tolerance, problem.velocity
    rtol, atol = (
        max(float(torch.as_tensor(bound).max()) for bound in bounds) for bounds in (tolerance.rtol, tolerance.atol)
    )
    dtype = velocity.autocast.dtype if velocity.autocast.enabled else velocity.dtypes[0]
    warnings.warn(
        f"rtol={rtol:g}, atol={atol:g} cannot be reached with velocities in {dtype}: their rounding alone makes errors"
        f" {noise:.2g} times as large. About rtol={rtol * noise:.1g}, atol={atol * noise:.1g} is reachable: ask for"
        " that, or evaluate func in float32",
        UserWarning,
        stacklevel=2,
    )


class ErrorNorm:
    """``norm(error / (atol + rtol max(|y|, |y_next|)))`` (Hairer, Norsett, Wanner I, II.4, eq. 4.10 and 4.11).

    What the rounding of 16-bit velocities brings into the step is taken off the estimated error, in squares: a
    controller that saw it would shrink the steps for ever, since it falls only as h. See :class:`Rounding`.

    Attributes:
        fused: whether one operator updates the state and takes the norm: where the tolerances are numbers and the
            norm is the default one, on real leaves.
    """

    def __init__(self, problem: Problem, norm: Callable[[Any], Any] | None, rounding: Rounding) -> None:
        self.problem, self.norm, self.rounding = problem, norm, rounding
        spec = problem.velocity.spec
        tolerance = problem.tolerance
        self.sizes = [max(leaf.shape.numel(), 1) for leaf in spec.leaves]
        self.fused = norm is None and tolerance.uniform and not any(leaf.dtype.is_complex for leaf in spec.leaves)
        tableau: ClosedTableau = problem.tableau  # type: ignore[assignment]  # closed: adaptive ones are
        self.b, self.e = tableau.error_weights
        self.attempted = tableau.attempted

    def fused_update(
        self,
        y: Sequence[Tensor],
        k: Sequence[Sequence[Tensor]],
        h: Tensor,
        y_next: Sequence[Tensor | None],
        rounded: Sequence[Tensor | None] | None,
        compensation: Sequence[Tensor | None],
    ) -> tuple[float, float]:
        """Writes the state at the end of the step; its error and the rounding's share of it.

        ``y_next`` and ``rounded``, where given, receive the state and the rounded state.
        """
        tolerance = self.problem.tolerance
        sums = [
            rk_error(
                state,
                of_leaf,
                h,
                self.b,
                self.e,
                tolerance.rtol[leaf],
                tolerance.atol[leaf],
                self.rounding.allowed,
                1,
                y_next[leaf],
                None if rounded is None else rounded[leaf],
                compensation[leaf],
            )
            for leaf, (state, of_leaf) in enumerate(zip(y, k, strict=True))
        ]
        values = sums[0].tolist() if len(sums) == 1 else torch.cat(sums).tolist()
        ratio = noise = 0.0
        for (square, of_rounding), size in zip(values, self.sizes, strict=True):
            # nan must win
            ratio = max(square / size - of_rounding / size, ratio) if square == square else math.inf
            noise = max(noise, of_rounding / size)
        return math.sqrt(max(ratio, 0.0)), math.sqrt(noise)

    def fused_tensor_update(
        self, y: Tensor, k: Sequence[Tensor], h: Tensor, y_next: Tensor | None
    ) -> tuple[float, float]:
        """As ``fused_update``, of a state of one tensor."""
        rtol, atol = self.problem.tolerance.rtol[0], self.problem.tolerance.atol[0]
        sums = rk_error(y, k, h, self.b, self.e, rtol, atol, self.rounding.allowed, 1, y_next)
        square, of_rounding = sums.tolist()[0]
        if square != square:
            return math.inf, 0.0
        size = self.sizes[0]
        return math.sqrt(max(square - of_rounding, 0.0) / size), math.sqrt(of_rounding / size)

    def measured(
        self, y: Sequence[Tensor], y_next: Sequence[Tensor], k: Sequence[Sequence[Tensor]], h: Tensor
    ) -> tuple[float, float]:
        """As ``fused_update`` for any norm, of a step whose end ``y_next`` is known."""
        y, y_next = [leaf.detach() for leaf in y], [leaf.detach() for leaf in y_next]
        used = [[value.detach() for value in of_leaf[: self.attempted]] for of_leaf in k]
        errors = [
            rk_stage(torch.zeros_like(state), of_leaf, h, self.e, state.dtype)
            for state, of_leaf in zip(y, used, strict=True)
        ]
        sizes = [
            torch.maximum(one, other) for one, other in zip(self._magnitudes(y), self._magnitudes(y_next), strict=True)
        ]
        ratio = self._norm(errors, sizes)
        if not self.rounding.unit:
            return ratio, 0.0
        weights = [self.rounding.allowed * e for e in self.e]
        rounding = [_root_of_squares(of_leaf, weights, h) for of_leaf in used]
        noise = self._norm(rounding, sizes)
        below = math.sqrt(max(ratio**2 - noise**2, 0.0)) if math.isfinite(ratio) else ratio
        return below, noise

    def _magnitudes(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Absolute values, of complex leaves one for both parts."""
        return [
            torch.linalg.vector_norm(leaf, dim=-1, keepdim=True) if of_leaf.dtype.is_complex else leaf.abs()
            for leaf, of_leaf in zip(leaves, self.problem.velocity.spec.leaves, strict=True)
        ]

    def _norm(self, values: Sequence[Tensor], sizes: Sequence[Tensor]) -> float:
        """The norm of ``values`` in units of the tolerance at states of these ``sizes``."""
        tolerance, spec = self.problem.tolerance, self.problem.velocity.spec
        ratios = []
        for leaf, value in enumerate(values):
            is_complex = spec.leaves[leaf].dtype.is_complex
            allowed = (
                _fitted(tolerance.atol[leaf], value, is_complex)
                + _fitted(tolerance.rtol[leaf], value, is_complex) * sizes[leaf]
            )
            ratios.append(torch.where(value == 0, 0.0, value / allowed))
        if self.norm is not None:
            return abs(float(self.norm(spec.unflatten(ratios))))
        return max((_root_mean_square(ratio, size) for ratio, size in zip(ratios, self.sizes, strict=True)))

    def first_step(self, y: Sequence[Tensor], first: Stage, start: float, sign: float, order: int) -> float:
        """A good size of the first step, by one more evaluation (Hairer, Norsett, Wanner I, II.4).

        ``order`` is that of the estimated error in the step size.
        """
        velocity = self.problem.velocity
        y = [leaf.detach() for leaf in y]
        k = [value.detach().to(leaf.dtype) for value, leaf in zip(first.k, y, strict=True)]
        sizes = self._magnitudes(y)
        of_state, of_velocity = self._norm(y, sizes), self._norm(k, sizes)
        if not math.isfinite(of_velocity):
            raise RuntimeError(f"func is not finite at the initial state, t = {start:.6g}; expected finite values")
        guess = 1e-6 if of_state < 1e-5 or of_velocity < 1e-5 else 0.01 * of_state / of_velocity
        h = torch.tensor(sign * guess, dtype=torch.float64 if y[0].device.type != "mps" else torch.float32)
        h = h.to(y[0].device)
        x = [rk_stage(leaf, [slope], h, [1.0], dtype) for leaf, slope, dtype in zip(y, k, velocity.dtypes, strict=True)]
        time = torch.tensor(start + sign * guess, dtype=velocity.spec.time_dtype, device=y[0].device)
        moved = [value.detach() for value in velocity.evaluate(time, x)]
        changes = [new.to(old.dtype) - old for new, old in zip(moved, k, strict=True)]
        # a change that rounding alone would make says nothing about the problem
        change = max(self._norm(changes, sizes) - self.rounding.unit * of_velocity, 0.0) / guess
        if of_velocity <= 1e-15 and change <= 1e-15:
            step = max(1e-6, guess * 1e-3)
        else:
            largest = max(of_velocity, change)
            step = (0.01 / largest) ** (1.0 / order) if math.isfinite(largest) else guess
        return min(100 * guess, step)


def _fitted(bound: Bound, value: Tensor, is_complex: bool) -> float | Tensor:
    if isinstance(bound, Tensor):
        bound = bound.to(value.device, value.dtype)
        return bound[..., None] if is_complex else bound
    return bound


def _root_mean_square(ratio: Tensor, size: int) -> float:
    return math.sqrt(float(ratio.square().sum()) / size)


def _root_of_squares(k: Sequence[Tensor], weights: Sequence[float], h: Tensor) -> Tensor:
    """``sqrt(sum_j (h w_j k_j)^2)``, elementwise."""
    total = torch.zeros_like(k[0], dtype=torch.float32 if k[0].dtype.itemsize == 2 else k[0].dtype)
    for value, weight in zip(k, weights, strict=True):
        total += (weight * h.to(total.dtype) * value.to(total.dtype)).square()
    return total.sqrt()
