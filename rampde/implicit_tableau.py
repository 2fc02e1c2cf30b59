"""Implicit Runge-Kutta tableaux: coefficients that check themselves, their order and their structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction as F
from functools import cached_property

from rampde.tableau import (
    Coefficient,
    Combination,
    combination,
    consistent_nodes,
    nearly_equal,
    order_of,
    read_tableau,
)


@dataclass(frozen=True)
class Block:
    """Consecutive stages whose equations are solved together, after those of all blocks before.

    ``coupling`` is the part of ``a`` within the block. A block of one stage with a zero there is explicit: its input
    is known, and evaluating f solves it.
    """

    stages: range
    coupling: tuple[tuple[float, ...], ...]

    @property
    def explicit(self) -> bool:
        return self.coupling == ((0.0,),)


@dataclass(frozen=True)
class ImplicitTableau:
    """An implicit Runge-Kutta method with ``s`` stages.

    ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)`` for all stages at once, ``y_next = y + h sum_i b_i k_i``.

    Args:
        a: ``s`` rows of at most ``s`` coefficients; trailing zeros may be left out.
        b: the ``s`` weights, which sum to 1.
        c: the ``s`` nodes; each must be the sum of its row of ``a`` (the default).

    Coefficients are ints, floats or, where they are rational, :class:`fractions.Fraction`.

    Raises:
        ValueError: more than 16 stages, a strictly lower triangular ``a`` (an explicit method), a row or ``b`` of
            the wrong length, a coefficient that is not finite, or a consistency condition (``sum b = 1``,
            ``c_i = sum_j a_ij``) that does not hold.
        TypeError: a coefficient that is not a real number.
    """

    a: Sequence[Sequence[Coefficient]]
    b: Sequence[Coefficient]
    c: Sequence[Coefficient] | None = None

    def __post_init__(self) -> None:
        b, rows = read_tableau(self.a, self.b)
        if not any(any(row[i:]) for i, row in enumerate(rows)):
            raise ValueError("a is strictly lower triangular, which is an explicit method: use rampde.ButcherTableau")
        object.__setattr__(self, "a", tuple(rows))
        object.__setattr__(self, "b", b)
        object.__setattr__(self, "c", consistent_nodes(rows, b, self.c))

    @property
    def stages(self) -> int:
        """Number of stages ``s``."""
        return len(self.b)

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """``c`` as floats."""
        assert self.c is not None
        return tuple(float(node) for node in self.c)

    @cached_property
    def stage_inputs(self) -> tuple[Combination, ...]:
        """For each stage ``i`` the velocities in its input: row ``i`` of ``a``."""
        return tuple(combination(row) for row in self.a)

    @cached_property
    def update(self) -> Combination:
        """The velocities in ``y_next``: ``b``."""
        return combination(self.b)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The finest partition into consecutive stages for which ``a`` is block lower triangular."""
        blocks: list[Block] = []
        start = 0
        while start < self.stages:
            stop = start + 1
            i = start
            while i < stop:
                stop = max(stop, *(j + 1 for j, a in enumerate(self.a[i]) if a != 0), 0)
                i += 1
            stages = range(start, stop)
            blocks.append(Block(stages, tuple(tuple(float(self.a[i][j]) for j in stages) for i in stages)))
            start = stop
        return tuple(blocks)

    @property
    def diagonally_implicit(self) -> bool:
        """Whether the stages can be solved one by one."""
        return len(self.blocks) == self.stages

    @property
    def stiffly_accurate(self) -> bool:
        """Whether ``y_next`` is the input of the last stage: ``b`` is the last row of ``a``."""
        return all(nearly_equal(a, b) for a, b in zip(self.a[-1], self.b, strict=True))

    @cached_property
    def order(self) -> int:
        """Order of convergence for ``y' = f(t, y)``, found by checking all order conditions up to order 8.

        The conditions are those of explicit methods (Hairer, Norsett, Wanner, Solving Ordinary Differential
        Equations I, theorem II.2.13), the sums taken over full rows.
        """
        return order_of(self.a, self.b)


_R2, _R3, _R6, _R15 = (math.sqrt(n) for n in (2, 3, 6, 15))
_GAMMA = 1 - _R2 / 2  # makes the two-stage methods below L-stable

IMPLICIT_METHODS: dict[str, ImplicitTableau] = {
    # E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, section IV.3; the trapezoidal rule is the
    # Lobatto IIIA method with two stages
    "implicit_euler": ImplicitTableau(a=[[1]], b=[1]),
    "implicit_midpoint": ImplicitTableau(a=[[F(1, 2)]], b=[1]),
    "trapezoid": ImplicitTableau(a=[[], [F(1, 2), F(1, 2)]], b=[F(1, 2), F(1, 2)]),
    # J. Kuntzmann, Z. Angew. Math. Mech. 41, 1961; J. C. Butcher, Math. Comp. 18, 1964: the Gauss methods of orders
    # 4 and 6 (Hairer, Wanner II, tables IV.5.1 and IV.5.2)
    "gl4": ImplicitTableau(
        a=[[F(1, 4), 1 / 4 - _R3 / 6], [1 / 4 + _R3 / 6, F(1, 4)]],
        b=[F(1, 2), F(1, 2)],
        c=[1 / 2 - _R3 / 6, 1 / 2 + _R3 / 6],
    ),
    "gl6": ImplicitTableau(
        a=[
            [F(5, 36), 2 / 9 - _R15 / 15, 5 / 36 - _R15 / 30],
            [5 / 36 + _R15 / 24, F(2, 9), 5 / 36 - _R15 / 24],
            [5 / 36 + _R15 / 30, 2 / 9 + _R15 / 15, F(5, 36)],
        ],
        b=[F(5, 18), F(4, 9), F(5, 18)],
        c=[1 / 2 - _R15 / 10, F(1, 2), 1 / 2 + _R15 / 10],
    ),
    # B. L. Ehle, BIT 8, 1968, and O. Axelsson, BIT 9, 1969: Radau IIA of orders 3 and 5 (Hairer, Wanner II, tables
    # IV.5.5 and IV.5.6)
    "radauIIA3": ImplicitTableau(a=[[F(5, 12), F(-1, 12)], [F(3, 4), F(1, 4)]], b=[F(3, 4), F(1, 4)]),
    "radauIIA5": ImplicitTableau(
        a=[
            [(88 - 7 * _R6) / 360, (296 - 169 * _R6) / 1800, (-2 + 3 * _R6) / 225],
            [(296 + 169 * _R6) / 1800, (88 + 7 * _R6) / 360, (-2 - 3 * _R6) / 225],
            [(16 - _R6) / 36, (16 + _R6) / 36, F(1, 9)],
        ],
        b=[(16 - _R6) / 36, (16 + _R6) / 36, F(1, 9)],
        c=[(4 - _R6) / 10, (4 + _R6) / 10, 1],
    ),
    # R. Alexander, SIAM J. Numer. Anal. 14, 1977
    "sdirk2": ImplicitTableau(a=[[_GAMMA], [1 - _GAMMA, _GAMMA]], b=[1 - _GAMMA, _GAMMA], c=[_GAMMA, 1]),
    # R. E. Bank et al., IEEE Trans. Electron Devices 32, 1985, as M. E. Hosea and L. F. Shampine, Appl. Numer.
    # Math. 20, 1996, write it: a step of the trapezoidal rule, then one of BDF2
    "trbdf2": ImplicitTableau(
        a=[[], [_GAMMA, _GAMMA], [_R2 / 4, _R2 / 4, _GAMMA]],
        b=[_R2 / 4, _R2 / 4, _GAMMA],
        c=[0, 2 * _GAMMA, 1],
    ),
}
