"""Implicit tableaux: the built-in coefficients, what is computed from them, and what is refused."""

import math
from fractions import Fraction as F
from typing import Any

import pytest
import torch

from rampde.implicit_tableau import IMPLICIT_METHODS, ImplicitTableau

# order, stages of each block, explicit blocks, stiffly accurate
PROPERTIES: dict[str, tuple[int, list[int], int, bool]] = {
    "implicit_euler": (1, [1], 0, True),
    "implicit_midpoint": (2, [1], 0, False),
    "trapezoid": (2, [1, 1], 1, True),
    "gl4": (4, [2], 0, False),
    "gl6": (6, [3], 0, False),
    "radauIIA3": (3, [2], 0, True),
    "radauIIA5": (5, [3], 0, True),
    "sdirk2": (2, [1, 1], 0, True),
    "trbdf2": (2, [1, 1, 1], 1, True),
}
L_STABLE = ("implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2")


def stability(name: str, z: complex) -> complex:
    """The factor by which a step of the method multiplies the solution of ``y' = z y``, for step size 1."""
    tableau = IMPLICIT_METHODS[name]
    a = torch.tensor([[float(x) for x in row] for row in tableau.a], dtype=torch.complex128)
    b = torch.tensor([float(x) for x in tableau.b], dtype=torch.complex128)
    ones = torch.ones(tableau.stages, dtype=torch.complex128)
    k = torch.linalg.solve(torch.eye(tableau.stages, dtype=torch.complex128) - z * a, ones)
    return complex(1 + z * (b * k).sum())


def test_no_built_in_method_goes_unchecked() -> None:
    assert set(PROPERTIES) == set(IMPLICIT_METHODS)


@pytest.mark.parametrize("name", PROPERTIES)
def test_order_and_structure(name: str) -> None:
    order, blocks, explicit, stiffly_accurate = PROPERTIES[name]
    tableau = IMPLICIT_METHODS[name]
    assert tableau.order == order
    assert [len(block.stages) for block in tableau.blocks] == blocks
    assert [stage for block in tableau.blocks for stage in block.stages] == list(range(tableau.stages))
    assert sum(block.explicit for block in tableau.blocks) == explicit
    assert tableau.diagonally_implicit == (max(blocks) == 1)
    assert tableau.stiffly_accurate == stiffly_accurate


def test_abscissae_are_the_zeros_of_legendre_and_radau_polynomials() -> None:
    """The nodes of gl4 lie on both sides of the middle: with two equal ones the method would have order one."""
    half = math.sqrt(3) / 6
    assert IMPLICIT_METHODS["gl4"].nodes == pytest.approx((0.5 - half, 0.5 + half), abs=1e-16)
    for x in IMPLICIT_METHODS["gl6"].nodes:
        u = 2 * x - 1
        assert abs(5 * u**3 - 3 * u) < 1e-14
    for x in IMPLICIT_METHODS["radauIIA5"].nodes:
        # the second derivative of x^2 (x - 1)^3, without a constant factor
        assert abs(10 * x**3 - 18 * x**2 + 9 * x - 1) < 1e-14


@pytest.mark.parametrize("name", PROPERTIES)
def test_stability(name: str) -> None:
    """All are A-stable; those that stiff problems ask for are L-stable; Gauss methods conserve what they should."""
    for angle in torch.linspace(math.pi / 2, math.pi, 9).tolist():
        for radius in (1e-2, 1.0, 30.0, 1e4):
            assert abs(stability(name, radius * complex(math.cos(angle), math.sin(angle)))) <= 1 + 1e-9
    assert (abs(stability(name, -1e9)) < 1e-6) == (name in L_STABLE)
    if name in ("implicit_midpoint", "trapezoid", "gl4", "gl6"):
        assert abs(stability(name, 7j)) == pytest.approx(1, abs=1e-14)


def test_blocks_of_a_method_that_is_explicit_coupled_and_diagonal_in_turn() -> None:
    # Lobatto IIIA of order 4, and the same with a diagonally implicit stage behind that nothing uses
    lobatto = [[], [F(5, 24), F(1, 3), F(-1, 24)], [F(1, 6), F(2, 3), F(1, 6)]]
    b: list[Any] = [F(1, 6), F(2, 3), F(1, 6)]
    assert [block.stages for block in ImplicitTableau(a=lobatto, b=b).blocks] == [range(1), range(1, 3)]
    assert ImplicitTableau(a=lobatto, b=b).order == 4
    longer = ImplicitTableau(a=[*lobatto, [0, 0, F(1, 2), F(1, 2)]], b=[*b, 0])
    assert [block.stages for block in longer.blocks] == [range(1), range(1, 3), range(3, 4)]
    assert longer.order == 4
    assert not longer.diagonally_implicit


def test_fractions_are_exact_and_floats_are_close() -> None:
    with pytest.raises(ValueError, match=r"c\[0\] is"):
        ImplicitTableau(a=[[F(1, 2)]], b=[1], c=[F(1, 2) + F(1, 10**15)])
    ImplicitTableau(a=[[0.1, 0.2], [0.5, 0.5]], b=[0.5, 0.5], c=[0.3, 1])
    rounded = ImplicitTableau(a=[[5 / 12, -1 / 12], [3 / 4, 1 / 4]], b=[3 / 4, 1 / 4])
    assert rounded.order == 3
    assert rounded.nodes == pytest.approx((1 / 3, 1), abs=1e-15)


@pytest.mark.parametrize(
    ("a", "b", "c", "error", "message"),
    [
        pytest.param([[], [1]], [F(1, 2), F(1, 2)], None, ValueError, "explicit method: use", id="explicit"),
        pytest.param([[1]], [F(1, 2)], None, ValueError, "b sums to 1/2", id="weights"),
        pytest.param([[1, 2]], [1], None, ValueError, "at most 1", id="long-row"),
        pytest.param([[1]], [F(1, 2), F(1, 2)], None, ValueError, "one for each of the 2", id="rows"),
        pytest.param([[1]], [1], [0, 1], ValueError, "c has 2 nodes, expected 1", id="nodes"),
        pytest.param([[math.inf]], [1], None, ValueError, "finite", id="infinite"),
        pytest.param([["1"]], [1], None, TypeError, "an int, a float or a Fraction", id="string"),
        pytest.param("1", [1], None, TypeError, "1 rows of numbers", id="no-rows"),
        pytest.param([[1] * 17] * 17, [F(1, 17)] * 17, None, ValueError, "17 weights", id="too-many"),
    ],
)
def test_errors(a: Any, b: Any, c: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImplicitTableau(a=a, b=b, c=c)
