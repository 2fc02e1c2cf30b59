"""Adams methods: their weights on any grid, and the methods by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from rampde.grid import CHUNK

LOWEST_ORDER, HIGHEST_ORDER = 4, 12
# the explicit formulas of high order are hardly stable: with 11 velocities h |df/dy| must stay below 0.003, with 4
# below 0.3, and the first steps allow no higher order anyway
EXPLICIT_ORDER = 5

# velocities at grid points that a multistep step needs at least; with fewer, a step is one of rk4
LEAST_HISTORY = LOWEST_ORDER - 1

# the sum of the absolute weights of a formula may be this many times that of equal steps
MAX_AMPLIFICATION = 2.0


@dataclass(frozen=True)
class AdamsMethod:
    """An Adams method whose order grows with its history: Adams-Bashforth, or Adams-Moulton where ``implicit``.

    ``y_{n+1} = y_n + sum_j w_j f_{n-j}``, ``w_j`` the integral over the step of the Lagrange polynomial of ``t_{n-j}``:
    exact where f is a polynomial along the solution, on any grid (Hairer, Norsett, Wanner I, III.1 and III.5). The
    implicit method interpolates the velocity at ``t_{n+1}`` too, predicted by the explicit one. With ``max_order``
    m, a step uses the velocities at up to m - 1 grid points; the first two steps are those of rk4, the 3/8 rule.
    """

    implicit: bool

    @property
    def order(self) -> int:
        """Order of convergence with the default options."""
        return self.order_with(self.default_order)

    @property
    def default_order(self) -> int:
        """``max_order`` where it is not given."""
        return HIGHEST_ORDER if self.implicit else EXPLICIT_ORDER

    def order_with(self, max_order: int) -> int:
        """Order of convergence with ``max_order``: the first steps, of local error h^5 and h^4, bound it."""
        if max_order < LOWEST_ORDER:
            return 4
        return min(max_order, 5) if self.implicit else min(max_order - 1, 4)


ADAMS_METHODS: dict[str, AdamsMethod] = {
    # F. Bashforth, J. C. Adams, Theories of Capillary Action, 1883
    "explicit_adams": AdamsMethod(implicit=False),
    # F. R. Moulton, New Methods in Exterior Ballistics, 1926
    "implicit_adams": AdamsMethod(implicit=True),
    "fixed_adams": AdamsMethod(implicit=True),
}


@dataclass(frozen=True)
class AdamsOptions:
    """Options of the Adams methods.

    Attributes:
        max_order: highest order of the implicit formula; the explicit one has one less. Below 4, all steps are those of
            rk4. None: 12 for the implicit method, 5 for the explicit one.
        max_iters: most evaluations of f for one implicit step.
    """

    max_order: int | None = None
    max_iters: int = 4

    def order_of(self, method: AdamsMethod) -> int:
        """``max_order``, or that of the method by default."""
        return method.default_order if self.max_order is None else self.max_order


def read_options(options: dict[str, Any]) -> AdamsOptions:
    """The options of the Adams methods among ``options``; others, and None, are left alone.

    Raises:
        TypeError: not an integer.
        ValueError: ``max_order`` above 12, or anything below 1.
    """
    given = {name: options.get(name) for name in ("max_order", "max_iters")}
    read = AdamsOptions(**{name: _integer(name, value) for name, value in given.items() if value is not None})
    if read.max_order is not None and read.max_order > HIGHEST_ORDER:
        raise ValueError(f"max_order is {read.max_order}, expected at most {HIGHEST_ORDER}")
    return read


def _integer(name: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a positive integer")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected a positive integer")
    return value


@lru_cache
def exact_weights(nodes: tuple[int, ...]) -> tuple[Fraction, ...]:
    """``int_0^1 l_j(x) dx`` for the Lagrange polynomials ``l_j`` of ``nodes``, which differ."""
    weights = []
    for j, own in enumerate(nodes):
        polynomial = [Fraction(1)]  # coefficients, lowest power first
        for other in (*nodes[:j], *nodes[j + 1 :]):
            shifted = [Fraction(0), *polynomial]
            scaled = [other * coefficient for coefficient in polynomial] + [Fraction(0)]
            polynomial = [(a - b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum((c / (power + 1) for power, c in enumerate(polynomial)), start=Fraction(0)))
    return tuple(weights)


@lru_cache
def _gauss_legendre(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Abscissae and weights on [0, 1], exact up to degree 2 count - 1 (Golub, Welsch, Math. Comp. 23, 1969)."""
    n = torch.arange(1, count, dtype=torch.float64)
    off_diagonal = torch.diag(n / torch.sqrt(4 * n * n - 1), 1)
    eigenvalues, vectors = torch.linalg.eigh(off_diagonal + off_diagonal.T)
    return ((1 + eigenvalues) / 2).to(device, dtype), vectors[0].square().to(device, dtype)


def lagrange_integrals(nodes: Tensor) -> Tensor:
    """As :func:`exact_weights` for ``nodes`` (..., k), in their dtype and differentiable in them.

    By a quadrature that is exact, and free of cancellation: where all nodes are at most 0, but for one at 1, no
    Lagrange polynomial changes its sign in the interval.
    """
    count = nodes.shape[-1]
    abscissae, quadrature = _gauss_legendre((count + 1) // 2, nodes.dtype, nodes.device)
    own = torch.eye(count, dtype=torch.bool, device=nodes.device)
    differences = nodes[..., :, None] - nodes[..., None, :] + own.to(nodes.dtype)
    distances = abscissae[:, None] - nodes[..., None, :]
    distances = torch.where(own, 1.0, distances[..., :, None, :])  # [..., abscissa, polynomial, factor]
    values = (distances / differences[..., None, :, :]).prod(-1)
    return (quadrature[:, None] * values).sum(-2)


def _nodes(rows: Tensor, implicit: bool) -> Tensor:
    """Grid points (..., k + 1) ending with the step, in units of it from its start, the latest first."""
    start, end = rows[..., -2:-1], rows[..., -1:]
    nodes = ((rows - start) / (end - start)).flip(-1)
    return nodes if implicit else nodes[..., 1:]


def step_weights(rows: Tensor, implicit: bool) -> Tensor:
    """Weights ``w_j`` of steps, the latest velocity first, differentiable in ``rows``.

    ``rows``: (n, k + 1) grid points, those of the k velocities before the end of a step and this end. Returns (n, k),
    or (n, k + 1) where ``implicit``.
    """
    return (rows[:, -1:] - rows[:, -2:-1]) * lagrange_integrals(_nodes(rows, implicit))


@dataclass(frozen=True)
class Weights:
    """Weights of one step in units of the step size, the latest velocity first.

    ``equal`` says that they are those of every step in the middle of an equal grid: ``values`` may be constants of a
    fused operator. Others change from step to step, and a kernel is compiled for its constants: these enter as
    numbers on the device, ``row``.
    """

    values: list[float]
    row: Tensor
    equal: bool

    @cached_property
    def scalars(self) -> Sequence[Tensor]:
        """The weights as 0-dim tensors."""
        return self.row.unbind(0)


@dataclass(frozen=True)
class Formula:
    """One multistep step: the explicit formula, and the implicit one which corrects it."""

    predictor: Weights
    corrector: Weights | None

    @property
    def past(self) -> int:
        """Velocities before the end of the step that enter it."""
        return len(self.predictor.values) if self.corrector is None else len(self.corrector.values) - 1


class Formulas:
    """The formula of each step of a grid; None where the step is one of rk4.

    Weights come from the grid as it is; where steps are equal up to rounding in ``precision``, the dtype of the times
    that f receives, they are the constants of equal steps. A formula reaches back as far as the history, or as the
    sum of its absolute weights stays within twice that of equal steps: where a long step follows short ones, high
    orders would amplify every error. Where that leaves fewer than four velocities (of a history that has them), the
    step is one of rk4, as the first ones are.

    Args:
        method: the method.
        max_order: one more than the most past velocities of a step.
        points: (N + 1,) grid points, on the device where the weights are wanted.
        times: the same as floats.
        precision: floating point dtype.
    """

    def __init__(
        self, method: AdamsMethod, max_order: int, points: Tensor, times: Sequence[float], precision: torch.dtype
    ) -> None:
        self.history = max_order - 1
        self._implicit = method.implicit
        self._times = torch.tensor(times, dtype=torch.float64)
        self._dtype, self._device = points.dtype, points.device
        # 16 bits are no excuse: such times are rounded for f alone
        roundoff = torch.finfo(torch.float64 if precision == torch.float64 else torch.float32).eps
        self._slack = 2 * self.history * roundoff * float(self._times.abs().max())
        self._first = -1
        self._chunk: list[Formula | None] = []

    def __getitem__(self, step: int) -> Formula | None:
        """The formula of ``step``; fast where ``step`` walks up or down."""
        full = self.history - 1  # the first step with a full history
        first = step if step < full else step - (step - full) % CHUNK
        if first != self._first:
            last = min(first + (1 if step < full else CHUNK), len(self._times) - 1)
            self._chunk, self._first = self._of_steps(first, last), first
        return self._chunk[step - first]

    def _of_steps(self, first: int, last: int) -> list[Formula | None]:
        least = min(4, self.history, first + 1)
        if least < LEAST_HISTORY:
            return [None] * (last - first)
        leading = self._weights(first, last, self._implicit, least)
        if not self._implicit:
            return [None if weights is None else Formula(weights, None) for weights in leading]
        # a predictor of low order is better than none
        predictors = self._weights(first, last, False, 1)
        return [
            None if corrector is None or predictor is None else Formula(predictor, corrector)
            for predictor, corrector in zip(predictors, leading, strict=True)
        ]

    def _weights(self, first: int, last: int, implicit: bool, least: int) -> list[Weights | None]:
        """The weights of steps ``first`` to ``last - 1``, which all have the same history."""
        found: list[Weights | None] = [None] * (last - first)
        pending = torch.arange(first, last)
        for past in range(min(first + 1, self.history), least - 1, -1):
            rows = self._times[pending[:, None] + torch.arange(1 - past, 2)]
            nodes, h = _nodes(rows, implicit), rows[:, -1:] - rows[:, -2:-1]
            newest = 1 if implicit else 0
            integers = tuple(range(newest, newest - nodes.shape[1], -1))
            values = [float(weight) for weight in exact_weights(integers)]
            constants, regular = (torch.tensor(numbers, dtype=nodes.dtype) for numbers in (values, integers))
            equal = ((nodes - regular) * h).abs().amax(-1) <= self._slack
            weights = torch.where(equal[:, None], constants, lagrange_integrals(nodes))
            usable = weights.abs().sum(-1) <= MAX_AMPLIFICATION * constants.abs().sum()
            chosen = zip(
                (pending[usable] - first).tolist(),
                weights[usable].tolist(),
                weights[usable].to(self._device, self._dtype).unbind(0),
                (equal & (past == self.history))[usable].tolist(),
                strict=True,
            )
            for index, own, row, fused in chosen:
                found[index] = Weights(values if fused else own, row, fused)
            pending = pending[~usable]
            if len(pending) == 0:
                break
        return found
