"""Explicit Runge-Kutta tableaux: coefficients that check themselves and know their order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

Coefficient = int | float | Fraction
Velocity = TypeVar("Velocity")
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
        b = _numbers("b", self.b)
        stages = len(b)
        if not 1 <= stages <= MAX_STAGES:
            raise ValueError(f"b has {stages} weights, expected between 1 and {MAX_STAGES} stages")
        if isinstance(self.a, str) or not isinstance(self.a, Sequence):
            raise TypeError(f"a is {self.a!r}, expected {stages} rows of numbers")
        if len(self.a) != stages:
            raise ValueError(f"a has {len(self.a)} rows, expected one for each of the {stages} weights in b")
        rows = []
        for i, given in enumerate(self.a):
            row = _numbers(f"a[{i}]", given)
            if len(row) > stages:
                raise ValueError(f"a[{i}] has {len(row)} entries, expected at most {stages}")
            if any(row[i:]):
                raise ValueError(
                    f"a[{i}] has non-zero entries from column {i} on: {list(row)}; expected an explicit method,"
                    " strictly lower triangular"
                )
            rows.append(row[:i] + (0,) * (i - len(row)))
        nodes = tuple(sum(row, start=Fraction(0)) for row in rows)
        c = nodes if self.c is None else _numbers("c", self.c)
        if len(c) != stages:
            raise ValueError(f"c has {len(c)} nodes, expected {stages}")
        for i, (node, row_sum) in enumerate(zip(c, nodes, strict=True)):
            if not _equal(node, row_sum):
                raise ValueError(f"c[{i}] is {node}, expected {row_sum}, the sum of a[{i}] (consistency)")
        if not _equal(sum(b), 1):
            raise ValueError(f"b sums to {sum(b)}, expected 1 (consistency)")
        object.__setattr__(self, "a", tuple(rows))
        object.__setattr__(self, "b", b)
        object.__setattr__(self, "c", c)

    @property
    def stages(self) -> int:
        """Number of stages ``s``: evaluations of f in a step."""
        return len(self.b)

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """``c`` as floats."""
        assert self.c is not None
        return tuple(float(node) for node in self.c)

    @cached_property
    def stage_inputs(self) -> tuple[Combination, ...]:
        """For each stage ``i`` the velocities in ``X_i``: row ``i`` of ``a``."""
        return tuple(_combination(row) for row in self.a)

    @cached_property
    def update(self) -> Combination:
        """The velocities in ``y_next``: ``b``."""
        return _combination(self.b)

    @cached_property
    def cotangents(self) -> tuple[StageCotangent, ...]:
        """What makes up the cotangent of each stage, last stage first; stages that affect nothing are left out."""
        cotangents: list[StageCotangent] = []
        swept: list[int] = []
        for i in reversed(range(self.stages)):
            later = _combination([self.a[j][i] for j in swept])
            if self.b[i] != 0 or later.stages:
                cotangents.append(StageCotangent(i, float(self.b[i]), later))
                swept.append(i)
        return tuple(cotangents)

    @cached_property
    def order(self) -> int:
        """Order of convergence for ``y' = f(t, y)``, found by checking all order conditions up to order 8.

        A method has order ``p`` when for every rooted tree with at most ``p`` nodes the elementary weight equals
        ``1 / density`` (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, theorem II.2.13).
        """
        for order in range(1, HIGHEST_ORDER_CHECKED + 1):
            for tree in rooted_trees(order):
                weight = sum(b * phi for b, phi in zip(self.b, self._stage_weights(tree), strict=True))
                if not _equal(weight * density(tree), 1):
                    return order - 1
        return HIGHEST_ORDER_CHECKED

    def _stage_weights(self, tree: Tree) -> list[Coefficient]:
        """The derivative weights of ``tree`` at each stage: product over subtrees of ``sum_j a_ij phi_j``."""
        products: list[Coefficient] = [1] * self.stages
        for subtree in tree:
            inner = self._stage_weights(subtree)
            for i, row in enumerate(self.a):
                products[i] *= sum(a * phi for a, phi in zip(row, inner, strict=False))
        return products


def _numbers(name: str, values: Sequence[Coefficient]) -> tuple[Coefficient, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is {values!r}, expected a sequence of numbers")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
            raise TypeError(f"{name}[{index}] is {value!r}, expected an int, a float or a Fraction")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}[{index}] is {value}, expected a finite number")
    return tuple(values)


def _equal(left: Coefficient, right: Coefficient) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        return math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return left == right


def _combination(weights: Sequence[Coefficient]) -> Combination:
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


@lru_cache
def density(tree: Tree) -> int:
    """The density gamma of a rooted tree: its number of nodes times the densities of its subtrees."""
    return _size(tree) * math.prod(density(subtree) for subtree in tree)


def _size(tree: Tree) -> int:
    return 1 + sum(_size(subtree) for subtree in tree)
