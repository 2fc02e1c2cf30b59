"""Explicit Runge-Kutta tableaux: coefficients that check themselves and know their order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

from torch import Tensor

Coefficient = int | float | Fraction
Velocity = TypeVar("Velocity")
Number = TypeVar("Number", float, Tensor)
Tree = tuple["Tree", ...]  # a rooted tree is the tuple of its subtrees

MAX_STAGES = 16
HIGHEST_ORDER_CHECKED = 8
TOLERANCE = 1e-10  # of the conditions, for coefficients given as floats; fractions must meet them exactly


@dataclass(frozen=True)
class Combination:
    """A weighted sum over stages: the ones with a non-zero weight, and these weights.

    ``dense`` says that the stages are all there are, 0 .. n - 1, so that a list of n velocities needs no picking.
    """

    stages: tuple[int, ...]
    weights: list[float]
    dense: bool

    def pick(self, velocities: list[Velocity]) -> list[Velocity]:
        """The velocities that have a weight."""
        return [velocities[stage] for stage in self.stages]


class StageCotangent(NamedTuple):
    """``w_i = b lam + sum_j a_j g_j`` over the later stages ``j`` whose input holds ``k_i``.

    ``later`` counts stages as the sweep meets them, the last one that affects anything being 0.
    """

    stage: int
    b: float
    later: Combination


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge-Kutta method with ``s`` stages.

    ``X_i = y + h sum_{j<i} a_ij f(t + c_j h, X_j)``, ``y_next = y + h sum_i b_i f(t + c_i h, X_i)``.

    Args:
        a: ``s`` rows; row ``i`` holds ``a_i1 .. a_i,i-1``, trailing zeros may be given or left out.
        b: the ``s`` weights, which sum to 1.
        c: the ``s`` nodes; each must be the sum of its row of ``a`` (the default).

    Coefficients are ints, floats or, best, :class:`fractions.Fraction`.

    Raises:
        ValueError: more than 16 stages, an implicit row, a row or ``b`` of the wrong length, a coefficient that
            is not finite, or a consistency condition (``sum b = 1``, ``c_i = sum_j a_ij``) that does not hold.
        TypeError: a coefficient that is not a real number.
    """

    a: Sequence[Sequence[Coefficient]]
    b: Sequence[Coefficient]
    c: Sequence[Coefficient] | None = None

    def __post_init__(self) -> None:
        b, full = read_tableau(self.a, self.b)
        rows = []
        for i, row in enumerate(full):
            if any(row[i:]):
                raise ValueError(
                    f"a[{i}] has non-zero entries from column {i} on: {list(row)}; expected an explicit method,"
                    " strictly lower triangular"
                )
            rows.append(row[:i])
        object.__setattr__(self, "a", tuple(rows))
        object.__setattr__(self, "b", b)
        object.__setattr__(self, "c", consistent_nodes(rows, b, self.c))
        # torch.compile reads them, but cannot make them
        _ = self.nodes, self.stage_inputs, self.update

    @property
    def stages(self) -> int:
        """Number of stages ``s``: evaluations of f in a step."""
        return len(self.b)

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """``c`` as floats; the ends of the step, which rounded coefficients may miss, are 0 and 1."""
        assert self.c is not None
        return tuple(float(round(node)) if nearly_equal(node, round(node)) else float(node) for node in self.c)

    @cached_property
    def stage_inputs(self) -> tuple[Combination, ...]:
        """For each stage ``i`` the velocities in ``X_i``: row ``i`` of ``a``."""
        return tuple(combination(row) for row in self.a)

    @cached_property
    def update(self) -> Combination:
        """The velocities in ``y_next``: ``b``."""
        return combination(self.b)

    @cached_property
    def cotangents(self) -> tuple[StageCotangent, ...]:
        """What makes up the cotangent of each stage, last stage first; stages that affect nothing are left out."""
        return self._cotangents(lambda i: self.b[i] != 0)

    def _cotangents(self, wanted: Callable[[int], bool]) -> tuple[StageCotangent, ...]:
        """The cotangents of the ``wanted`` stages and of all that these depend on."""
        cotangents: list[StageCotangent] = []
        swept: list[int] = []
        for i in reversed(range(self.stages)):
            later = combination([self.a[j][i] for j in swept])
            if wanted(i) or later.stages:
                cotangents.append(StageCotangent(i, float(self.b[i]), later))
                swept.append(i)
        return tuple(cotangents)

    @cached_property
    def order(self) -> int:
        """Order of convergence for ``y' = f(t, y)``, found by checking all order conditions up to order 8.

        A method has order ``p`` when for every rooted tree with at most ``p`` nodes the elementary weight equals
        ``1 / density`` (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, theorem II.2.13).
        """
        return order_of(self.a, self.b)


@dataclass(frozen=True)
class EmbeddedTableau(ButcherTableau):
    """An explicit Runge-Kutta method with an embedded error estimate and an interpolant, for adaptive steps.

    Args:
        a, b, c: as of :class:`ButcherTableau`.
        error: ``s`` weights of the error estimate ``h sum_i error_i k_i``: ``b`` less the weights of the embedded
            method, so that they sum to 0.
        middle: weights of the state in the middle of a step, ``y + h sum_i middle_i k_i``, which sum to 1/2. They may
            have ``s + 1`` entries where the last stage of the method is not at the end of the step: the last is then
            that of the velocity there. None: the cubic Hermite interpolant is used.

    Raises:
        ValueError, TypeError: as :class:`ButcherTableau`; ``error`` or ``middle`` of the wrong length or sum.
    """

    error: Sequence[Coefficient] = ()
    middle: Sequence[Coefficient] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        error = read_coefficients("error", self.error)
        if len(error) != self.stages:
            raise ValueError(f"error has {len(error)} weights, expected {self.stages}, one for each stage")
        if not nearly_equal(sum(error), 0):
            raise ValueError(f"error sums to {sum(error)}, expected 0: the embedded method's weights sum to 1 too")
        object.__setattr__(self, "error", error)
        if self.middle is None:
            return
        middle = read_coefficients("middle", self.middle)
        count = len(close(self).b)
        if not self.stages <= len(middle) <= count:
            raise ValueError(f"middle has {len(middle)} weights, expected {count}")
        if not nearly_equal(sum(middle), Fraction(1, 2)):
            raise ValueError(f"middle sums to {sum(middle)}, expected 1/2 (consistency)")
        object.__setattr__(self, "middle", middle + (0,) * (count - len(middle)))

    @cached_property
    def control_order(self) -> int:
        """Order in the step size of the estimated error: that of the embedded method, plus one."""
        embedded = [b - e for b, e in zip(self.b, self.error, strict=True)]
        return min(self.order, order_of(self.a, embedded)) + 1 if any(self.error) else self.order

    @cached_property
    def closed(self) -> ClosedTableau:
        """The same method with the velocity at the end of the step as its last stage."""
        return close(self, self.error, self.middle)


@dataclass(frozen=True)
class ClosedTableau(ButcherTableau):
    """An explicit method whose last stage is the velocity at the end of the step, the first of the next step.

    Such a step can be interpolated: ``y(t + theta h) = y + h sum_i w_i(theta) k_i`` with polynomials ``w_i``.

    Attributes:
        error: weights of the error estimate; all zero where there is none.
        interpolant: for each stage the coefficients of ``theta, theta^2, ...`` in ``w_i``.
    """

    error: Sequence[Coefficient] = ()
    interpolant: tuple[tuple[float, ...], ...] = ()

    @cached_property
    def attempted(self) -> int:
        """Number of stages that must be known before the error is."""
        return self.stages if self.error[-1] != 0 else self.stages - 1

    @cached_property
    def stages_before_end(self) -> list[tuple[int, Combination]]:
        """The stages between the first and the last, with what enters their inputs."""
        return list(enumerate(self.stage_inputs))[1:-1]

    @cached_property
    def interpolated_cotangents(self) -> tuple[StageCotangent, ...]:
        """As ``cotangents``, of a step with outputs inside, where every stage may have one."""
        return self._cotangents(lambda i: any(self.interpolant[i]) or self.b[i] != 0)

    @cached_property
    def error_weights(self) -> tuple[list[float], list[float]]:
        """Weights of the update and of the error over the stages attempted."""
        count = self.attempted
        return [float(b) for b in self.b[:count]], [float(e) for e in self.error[:count]]

    def weights_at(self, theta: Number) -> list[Number]:
        """``w_i(theta)`` of all stages."""
        return [theta * _horner(row, theta) for row in self.interpolant]

    def slopes_at(self, theta: float) -> list[float]:
        """``w_i'(theta)`` of all stages: the state moves by ``sum_i w_i' k_i`` per unit of time."""
        return [_horner([(n + 1) * c for n, c in enumerate(row)], theta) for row in self.interpolant]


def close(
    tableau: ButcherTableau,
    error: Sequence[Coefficient] = (),
    middle: Sequence[Coefficient] | None = None,
    linear: bool = False,
) -> ClosedTableau:
    """``tableau`` with the velocity at the end of the step as its last stage, added where it is not there yet.

    The interpolant is the quartic through the states at both ends and in the ``middle`` of the step with the slopes
    at both ends (L. F. Shampine, Math. Comp. 46, 1986), the cubic one without ``middle`` (Hairer, Norsett, Wanner I,
    II.6, eq. 6.7), or the line between the ends.
    """
    b = list(tableau.b)
    closed = b[-1] == 0 and list(tableau.a[-1]) == b[:-1]
    rows = list(tableau.a) if closed else [*tableau.a, b]
    weights = b if closed else [*b, 0]
    count = len(weights)
    first = [1.0] + [0.0] * (count - 1)
    last = first[::-1]
    if middle is None:
        # where the cubic has its middle
        mid = [float(w) / 2 + (f - e) / 8 for w, f, e in zip(weights, first, last, strict=True)]
    else:
        mid = [float(m) for m in middle] + [0.0] * (count - len(middle))
    interpolant = tuple(
        (float(w),)
        if linear
        else (
            f,
            e - 4 * f - 5 * float(w) + 16 * m,
            5 * f - 3 * e + 14 * float(w) - 32 * m,
            2 * (e - f) - 8 * float(w) + 16 * m,
        )
        for f, e, w, m in zip(first, last, weights, mid, strict=True)
    )
    errors = (*error, *[0] * (count - len(error)))
    return ClosedTableau(a=rows, b=weights, error=errors, interpolant=interpolant)


def _horner(coefficients: Sequence[float], x: Number) -> Number:
    total = 0.0 * x
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


def read_coefficients(name: str, values: Sequence[Coefficient]) -> tuple[Coefficient, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is {values!r}, expected a sequence of numbers")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
            raise TypeError(f"{name}[{index}] is {value!r}, expected an int, a float or a Fraction")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}[{index}] is {value}, expected a finite number")
    return tuple(values)


def read_tableau(
    a: Sequence[Sequence[Coefficient]], b: Sequence[Coefficient]
) -> tuple[tuple[Coefficient, ...], list[tuple[Coefficient, ...]]]:
    """The weights ``b`` and the full rows of ``a``, in which trailing zeros may be left out."""
    weights = read_coefficients("b", b)
    stages = len(weights)
    if not 1 <= stages <= MAX_STAGES:
        raise ValueError(f"b has {stages} weights, expected between 1 and {MAX_STAGES} stages")
    if isinstance(a, str) or not isinstance(a, Sequence):
        raise TypeError(f"a is {a!r}, expected {stages} rows of numbers")
    if len(a) != stages:
        raise ValueError(f"a has {len(a)} rows, expected one for each of the {stages} weights in b")
    rows = []
    for i, given in enumerate(a):
        row = read_coefficients(f"a[{i}]", given)
        if len(row) > stages:
            raise ValueError(f"a[{i}] has {len(row)} entries, expected at most {stages}")
        rows.append(row + (0,) * (stages - len(row)))
    return weights, rows


def consistent_nodes(
    rows: Sequence[Sequence[Coefficient]], b: Sequence[Coefficient], c: Sequence[Coefficient] | None
) -> tuple[Coefficient, ...]:
    """The nodes of a method: ``c``, which must be the sums of the ``rows``, or these sums; ``b`` must sum to 1."""
    sums = tuple(sum(row, start=Fraction(0)) for row in rows)
    nodes = sums if c is None else read_coefficients("c", c)
    if len(nodes) != len(rows):
        raise ValueError(f"c has {len(nodes)} nodes, expected {len(rows)}")
    for i, (node, row_sum) in enumerate(zip(nodes, sums, strict=True)):
        if not nearly_equal(node, row_sum):
            raise ValueError(f"c[{i}] is {node}, expected {row_sum}, the sum of a[{i}] (consistency)")
    if not nearly_equal(sum(b), 1):
        raise ValueError(f"b sums to {sum(b)}, expected 1 (consistency)")
    return nodes


def nearly_equal(left: Coefficient, right: Coefficient) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        return math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return left == right


def combination(weights: Sequence[Coefficient]) -> Combination:
    used = tuple(index for index, weight in enumerate(weights) if weight != 0)
    return Combination(used, [float(weights[index]) for index in used], dense=len(used) == len(weights))


@lru_cache
def rooted_trees(nodes: int) -> tuple[Tree, ...]:
    """All rooted trees with ``nodes`` nodes."""
    return tuple(tuple(sorted(forest)) for forest in _forests(nodes - 1, nodes - 1))


def _forests(nodes: int, largest: int) -> Iterator[list[Tree]]:
    """Multisets of rooted trees with ``nodes`` nodes in all, none with more than ``largest``."""
    if nodes == 0:
        yield []
        return
    for size in range(min(nodes, largest), 0, -1):
        for count in range(1, nodes // size + 1):
            for trees in itertools.combinations_with_replacement(rooted_trees(size), count):
                for rest in _forests(nodes - size * count, size - 1):
                    yield [*trees, *rest]


def order_of(rows: Sequence[Sequence[Coefficient]], weights: Sequence[Coefficient]) -> int:
    """Order of the method with the ``weights`` and stages ``rows``, which may leave out trailing zeros, up to 8."""
    for order in range(1, HIGHEST_ORDER_CHECKED + 1):
        for tree in rooted_trees(order):
            weight = sum(b * phi for b, phi in zip(weights, _stage_weights(rows, tree), strict=True))
            if not nearly_equal(weight * density(tree), 1):
                return order - 1
    return HIGHEST_ORDER_CHECKED


def _stage_weights(rows: Sequence[Sequence[Coefficient]], tree: Tree) -> list[Coefficient]:
    """The derivative weights of ``tree`` at each stage: product over subtrees of ``sum_j a_ij phi_j``."""
    products: list[Coefficient] = [1] * len(rows)
    for subtree in tree:
        inner = _stage_weights(rows, subtree)
        for i, row in enumerate(rows):
            products[i] *= sum(a * phi for a, phi in zip(row, inner, strict=False))
    return products


@lru_cache
def density(tree: Tree) -> int:
    """The density gamma of a rooted tree: its number of nodes times the densities of its subtrees."""
    return _size(tree) * math.prod(density(subtree) for subtree in tree)


def _size(tree: Tree) -> int:
    return 1 + sum(_size(subtree) for subtree in tree)
