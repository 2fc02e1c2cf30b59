"""The error of a step in units of the tolerance, and the size of the first step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rampde.autocast import uncached_autocast
from rampde.ops import error_sums, rk_error, rk_stage
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.tableau import ClosedTableau
from rampde.tolerance import Bound

FEW = 144  # elements of which a twelfth says little: all are moved

ROUNDOFF = 2.0
"""Rounding of a 16-bit velocity in units of its unit roundoff: that of its input, and that of its own."""


# rounding varies from step to step, and is measured at a few of them: the share of it in an error, in units of the
# tolerance, above which a warning is due, and how much more of it the tolerances named there allow for
VISIBLE, MARGIN = 2.0, 4.0


def unit_of_rounding(problem: Problem, k: Sequence[Tensor]) -> float:
    """What rounding to 16 bits makes of the velocities ``k`` at least, relatively; 0 where they have 32 bits or more,
    whose rounding lies below every sensible tolerance."""
    velocity = problem.velocity
    dtypes = [*velocity.dtypes, *(value.dtype for value in k)]
    if velocity.autocast.enabled:
        dtypes.append(velocity.autocast.dtype)
    epsilons = [torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize == 2]
    return ROUNDOFF * max(epsilons) / 2 if epsilons else 0.0


class ErrorNorm:
    """``norm(error / (atol + rtol max(|y|, |y_next|)))`` (Hairer, Norsett, Wanner I, II.4, eq. 4.10 and 4.11).

    Of the estimated error, what the rounding of 16-bit velocities alone would make it is taken off, in squares: it
    falls with the step size only, as does the error that rounding makes in the state itself, so that a controller that
    saw it would shrink the steps and gain nothing.

    How large that rounding is, relative to the velocity, depends on f: input and intermediate results are rounded, and
    weights and cancellation magnify what comes of it. It is therefore measured, at the start and wherever a step fails:
    f is evaluated once more with every twelfth element of its input moved by one unit in the last place, which moves
    the input by as much as its rounding does, in the mean square (a twelfth of a unit squared). The result differs by
    that and by two roundings of all that is in between, where an evaluation errs by one: it is at most ``sqrt(2)``
    times too large.

    Attributes:
        measurable: whether f rounds to 16 bits, and says the same when it is asked twice.
        fused: whether one operator updates the state and takes the norm: where the tolerances are numbers and the
            norm is the default one, on real leaves.
    """

    def __init__(self, problem: Problem, norm: Callable[[Any], Any] | None, unit: float) -> None:
        """``unit``: least relative rounding of a velocity, as of :func:`unit_of_rounding`."""
        self.problem, self.norm, self.unit = problem, norm, unit
        spec = problem.velocity.spec
        self.measurable = unit > 0.0
        # by leaf; never less than what a single rounding of input and output makes
        self.roundoffs = [unit for _ in spec.leaves]
        # of the last step: error and rounding's share in it, squared, by leaf
        self._parts: list[tuple[float, float]] = []
        self.agreement = problem.agreement
        # of the whole batch, where other processes have parts of it
        self.sizes = (
            [max(leaf.shape.numel(), 1) for leaf in spec.leaves] if self.agreement is None else self.agreement.sizes
        )
        self.fused = problem.norm_is_fused
        tableau: ClosedTableau = problem.tableau  # type: ignore[assignment]  # closed: adaptive ones are
        self.b, self.e = tableau.error_weights
        self.attempted = tableau.attempted

    def warn_of_rounding(self, noise: float) -> None:
        """Warns where rounding made an estimated error, ``noise`` times the tolerances, larger than these by far; names
        reachable ones."""
        if noise <= VISIBLE:
            return
        tolerance, velocity = self.problem.tolerance, self.problem.velocity
        rtol, atol = (
            max(float(torch.as_tensor(bound).max()) for bound in bounds) for bounds in (tolerance.rtol, tolerance.atol)
        )
        reachable = MARGIN * noise
        dtype = velocity.autocast.dtype if velocity.autocast.enabled else velocity.dtypes[0]
        otherwise = "evaluate func in float32" if dtype.itemsize == 2 else "solve in float64"
        warnings.warn(
            f"rtol={rtol:g}, atol={atol:g} cannot be reached with velocities in {dtype}: their rounding alone makes"
            f" errors {noise:.2g} times as large. About rtol={rtol * reachable:.1g}, atol={atol * reachable:.1g} is"
            f" reachable: ask for that, or {otherwise}",
            UserWarning,
            stacklevel=2,
        )

    def fused_update(
        self,
        y: Sequence[Tensor],
        k: Sequence[Sequence[Tensor]],
        h: Tensor,
        y_next: Sequence[Tensor | None],
        rounded: Sequence[Tensor | None] | None,
        compensation: Sequence[Tensor | None],
        quantised: Sequence[tuple[Any, ...]],
    ) -> tuple[float, float]:
        """Writes the state at the end of the step; its error and the rounding's share of it.

        The arguments are those of ``fused_sums``.
        """
        sums = self.fused_sums(y, k, h, y_next, rounded, compensation, quantised)
        values = (sums if self.agreement is None else self.agreement.sum(sums)).tolist()
        self._parts = [(square / size, share / size) for (square, share), size in zip(values, self.sizes, strict=True)]
        return self._judged()

    def fused_sums(
        self,
        y: Sequence[Tensor],
        k: Sequence[Sequence[Tensor]],
        h: Tensor,
        y_next: Sequence[Tensor | None],
        rounded: Sequence[Tensor | None] | None,
        compensation: Sequence[Tensor | None],
        quantised: Sequence[tuple[Any, ...]],
    ) -> Tensor:
        """Writes the state at the end of the step; the sums that its error is made of, (leaves, 2) float64.

        ``y_next`` and ``rounded``, where given, receive the state and the rounded state; ``quantised``: further
        arguments of the operator, leaf by leaf.
        """
        tolerance = self.problem.tolerance
        bounds: Any = (tolerance.rtol, tolerance.atol, self.roundoffs)
        outputs: Any = (y_next, [None] * len(y) if rounded is None else rounded, compensation, quantised)
        return error_sums(y, k, h, self.b, self.e, *bounds, *outputs)

    def _judged(self) -> tuple[float, float]:
        """Error without rounding's share, and that share, of the worst leaf each."""
        # nan must win
        if any(math.isnan(square) for square, _ in self._parts):
            return math.inf, 0.0
        ratio = max(max(square - share, 0.0) for square, share in self._parts)
        return math.sqrt(ratio), math.sqrt(max(share for _, share in self._parts))

    def measure(self, y: Sequence[Tensor], at: Stage) -> tuple[float, float]:
        """Measures the rounding of f at a stage of the state ``y``, and judges the last step anew."""
        velocity, before = self.problem.velocity, list(self.roundoffs)
        device = velocity.spec.device
        random = RandomState.current(device)
        unit = self.unit / (ROUNDOFF / 2)
        with torch.no_grad(), uncached_autocast(device):
            moved = velocity.evaluate(at.time.detach(), [_moved_by(leaf.detach(), unit) for leaf in at.x])
        drew = not random.equals(RandomState.current(device))
        if drew:
            random.restore()
        y = [leaf.detach() for leaf in y]
        k = [value.detach().to(leaf.dtype) for value, leaf in zip(at.k, y, strict=True)]
        changes = [new.detach().to(leaf.dtype) - old for new, old, leaf in zip(moved, k, y, strict=True)]
        sizes = self._magnitudes(y)
        squares = [_sum_of_squares(ratio) for ratio in (*self._ratios(changes, sizes), *self._ratios(k, sizes))]
        *squares, any_drew = self._sums([*squares, float(drew)])
        if any_drew:
            # what f draws at random would count as rounding
            self.measurable = False
            return self._judged() if self._parts else (0.0, 0.0)
        for leaf, (of_change, of_whole) in enumerate(zip(squares[: len(y)], squares[len(y) :], strict=True)):
            if math.isfinite(of_change) and of_whole > 0:
                self.roundoffs[leaf] = max(self.unit, math.sqrt(of_change / of_whole))
        if not self._parts:
            return 0.0, 0.0
        factors = [(new / old) ** 2 for old, new in zip(before, self.roundoffs, strict=True)]
        if self.norm is not None:
            # the user's norm has taken all leaves together
            factors = [max(factors)]
        self._parts = [(square, share * f) for (square, share), f in zip(self._parts, factors, strict=True)]
        return self._judged()

    def fused_tensor_update(
        self, y: Tensor, k: Sequence[Tensor], h: Tensor, y_next: Tensor | None
    ) -> tuple[float, float]:
        """As ``fused_update``, of a state of one tensor."""
        rtol, atol = self.problem.tolerance.rtol[0], self.problem.tolerance.atol[0]
        sums = rk_error(y, k, h, self.b, self.e, rtol, atol, self.roundoffs[0], 1, y_next)
        square, share = (sums if self.agreement is None else self.agreement.sum(sums)).tolist()[0]
        size = self.sizes[0]
        self._parts = [(square / size, share / size)]
        return self._judged()

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
        ratios = self._ratios(errors, sizes)
        shares = [torch.zeros_like(ratio) for ratio in ratios]
        if self.unit:
            rounding = [
                _root_of_squares(of_leaf, [roundoff * e for e in self.e], h)
                for of_leaf, roundoff in zip(used, self.roundoffs, strict=True)
            ]
            shares = self._ratios(rounding, sizes)
        if self.norm is None:
            squares = self._sums([_sum_of_squares(ratio) for ratio in (*ratios, *shares)])
            pairs = zip(squares[: len(ratios)], squares[len(ratios) :], self.sizes, strict=True)
            self._parts = [(square / size, share / size) for square, share, size in pairs]
            return self._judged()
        error, noise = self._largest([self._norm(ratios), self._norm(shares) if self.unit else 0.0])
        self._parts = [(error**2, noise**2)]
        return self._judged()

    def _sums(self, values: list[float]) -> list[float]:
        """Sums over the batch, of which this process may have a part only."""
        return values if self.agreement is None else self.agreement.sums(values)

    def _largest(self, values: list[float]) -> list[float]:
        """The user's norm takes part by part what no sum could join."""
        return values if self.agreement is None else self.agreement.largest(values)

    def _norm(self, ratios: Sequence[Tensor]) -> float:
        """The user's norm."""
        assert self.norm is not None
        if self.agreement is not None and not any(ratio.numel() for ratio in ratios):
            return 0.0  # a process without a part of the batch has no say
        return abs(float(self.norm(self.problem.velocity.spec.unflatten(ratios))))

    def _magnitudes(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Absolute values, of complex leaves one for both parts."""
        return [
            torch.linalg.vector_norm(leaf, dim=-1, keepdim=True) if of_leaf.dtype.is_complex else leaf.abs()
            for leaf, of_leaf in zip(leaves, self.problem.velocity.spec.leaves, strict=True)
        ]

    def _norms(self, groups: Sequence[Sequence[Tensor]], sizes: Sequence[Tensor]) -> list[float]:
        """The norm of each of ``groups`` in units of the tolerance at states of these ``sizes``."""
        ratios = [self._ratios(values, sizes) for values in groups]
        if self.norm is not None:
            return self._largest([self._norm(of_group) for of_group in ratios])
        squares = iter(self._sums([_sum_of_squares(ratio) for of_group in ratios for ratio in of_group]))
        return [max(math.sqrt(next(squares) / size) for size in self.sizes) for _ in groups]

    def _ratios(self, values: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
        """``values`` in units of the tolerance at states of these ``sizes``."""
        tolerance, spec = self.problem.tolerance, self.problem.velocity.spec
        ratios = []
        for leaf, value in enumerate(values):
            is_complex = spec.leaves[leaf].dtype.is_complex
            allowed = (
                _fitted(tolerance.atol[leaf], value, is_complex)
                + _fitted(tolerance.rtol[leaf], value, is_complex) * sizes[leaf]
            )
            ratios.append(torch.where(value == 0, 0.0, value / allowed))
        return ratios

    def first_step(self, y: Sequence[Tensor], first: Stage, start: float, sign: float, order: int) -> float:
        """A good size of the first step, by one more evaluation (Hairer, Norsett, Wanner I, II.4).

        ``order`` is that of the estimated error in the step size.
        """
        velocity = self.problem.velocity
        y = [leaf.detach() for leaf in y]
        k = [value.detach().to(leaf.dtype) for value, leaf in zip(first.k, y, strict=True)]
        sizes = self._magnitudes(y)
        of_state, of_velocity = self._norms([y, k], sizes)
        if not math.isfinite(of_velocity):
            raise RuntimeError(f"func is not finite at the initial state, t = {start:.6g}; expected finite values")
        guess = 1e-6 if of_state < 1e-5 or of_velocity < 1e-5 else 0.01 * of_state / of_velocity
        h = torch.tensor(sign * guess, dtype=torch.float64 if y[0].device.type != "mps" else torch.float32)
        h = h.to(y[0].device)
        x = [rk_stage(leaf, [slope], h, [1.0], dtype) for leaf, slope, dtype in zip(y, k, velocity.dtypes, strict=True)]
        time = torch.tensor(start + sign * guess, dtype=velocity.spec.time_dtype, device=y[0].device)
        with uncached_autocast(velocity.spec.device):
            moved = [value.detach() for value in velocity.evaluate(time, x)]
        changes = [new.to(old.dtype) - old for new, old in zip(moved, k, strict=True)]
        # a change that rounding alone would make says nothing about the problem
        of_rounding = [roundoff * value for roundoff, value in zip(self.roundoffs, k, strict=True)]
        of_change, hidden = self._norms([changes, of_rounding], sizes)
        change = max(of_change - hidden, 0.0) / guess
        if of_velocity <= 1e-15 and change <= 1e-15:
            step = max(1e-6, guess * 1e-3)
        else:
            largest = max(of_velocity, change)
            step = (0.01 / largest) ** (1.0 / order) if math.isfinite(largest) else guess
        return min(100 * guess, step)


def _moved_by(x: Tensor, unit: float) -> Tensor:
    """``x`` with elements moved by one unit in the last place, up or down: every twelfth, or all of a few."""
    index = torch.arange(x.numel(), device=x.device)
    # a multiplicative hash, the high bits of multiples of the golden ratio: random, but always alike
    draw = (index * 2654435769 >> 16) % 24
    sign = draw % 2 * 2 - 1
    if x.numel() >= FEW:
        sign = torch.where(draw < 2, sign, 0)
    # between 3/4 of a unit in the last place and 3/2, which rounds to one
    return x * (1 + 0.75 * unit * sign).view(x.shape).to(x.dtype)


def _fitted(bound: Bound, value: Tensor, is_complex: bool) -> float | Tensor:
    if isinstance(bound, Tensor):
        bound = bound.to(value.device, value.dtype)
        return bound[..., None] if is_complex else bound
    return bound


def _sum_of_squares(ratio: Tensor) -> float:
    return float(ratio.square().sum())


def _root_of_squares(k: Sequence[Tensor], weights: Sequence[float], h: Tensor) -> Tensor:
    """``sqrt(sum_j (h w_j k_j)^2)``, elementwise."""
    total = torch.zeros_like(k[0], dtype=torch.float32 if k[0].dtype.itemsize == 2 else k[0].dtype)
    for value, weight in zip(k, weights, strict=True):
        total += (weight * h.to(total.dtype) * value.to(total.dtype)).square()
    return total.sqrt()
