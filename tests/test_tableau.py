"""Butcher tableaux: the built-in coefficients, the order computed from them, the registry, unused entries."""

import math
from collections.abc import Iterator
from fractions import Fraction as F
from typing import Any

import pytest
import torch
from torch import Tensor

from rampde import METHODS, ButcherTableau, EmbeddedTableau, odeint, register_method
from rampde.methods import ADAPTIVE, FIXED
from rampde.tableau import density, rooted_trees

# the rules as printed in Hairer, Norsett, Wanner I (tables II.1.1 and II.1.2) and in Ralston's paper:
# (a below the diagonal, b, c, order)
PRINTED: dict[str, tuple[list[list[F | int]], list[F | int], list[F | int], int]] = {
    "euler": ([[]], [1], [0], 1),
    "midpoint": ([[], [F(1, 2)]], [0, 1], [0, F(1, 2)], 2),
    "heun2": ([[], [1]], [F(1, 2), F(1, 2)], [0, 1], 2),
    "heun3": ([[], [F(1, 3)], [0, F(2, 3)]], [F(1, 4), 0, F(3, 4)], [0, F(1, 3), F(2, 3)], 3),
    "ralston": ([[], [F(2, 3)]], [F(1, 4), F(3, 4)], [0, F(2, 3)], 2),
    "rk4": (
        [[], [F(1, 3)], [F(-1, 3), 1], [1, -1, 1]],
        [F(1, 8), F(3, 8), F(3, 8), F(1, 8)],
        [0, F(1, 3), F(2, 3), 1],
        4,
    ),
    "rk4_classic": (
        [[], [F(1, 2)], [0, F(1, 2)], [0, 0, 1]],
        [F(1, 6), F(2, 6), F(2, 6), F(1, 6)],
        [0, F(1, 2), F(1, 2), 1],
        4,
    ),
}

# Dormand, Prince, J. Comp. Appl. Math. 6, 1980: six stages of the fifth-order rule, the seventh of the pair
DOPRI5 = [
    [],
    [F(1, 5)],
    [F(3, 40), F(9, 40)],
    [F(44, 45), F(-56, 15), F(32, 9)],
    [F(19372, 6561), F(-25360, 2187), F(64448, 6561), F(-212, 729)],
    [F(9017, 3168), F(-355, 33), F(46732, 5247), F(49, 176), F(-5103, 18656)],
]
DOPRI5_B = [F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84)]
DOPRI5_EMBEDDED = [F(5179, 57600), 0, F(7571, 16695), F(393, 640), F(-92097, 339200), F(187, 2100), F(1, 40)]

# Butcher, J. Austral. Math. Soc. 4, 1964: order six with seven stages
BUTCHER6 = [
    [],
    [F(1, 3)],
    [0, F(2, 3)],
    [F(1, 12), F(1, 3), F(-1, 12)],
    [F(25, 48), F(-55, 24), F(35, 48), F(15, 8)],
    [F(3, 20), F(-11, 24), F(-1, 8), F(1, 2), F(1, 10)],
    [F(-261, 260), F(33, 13), F(43, 156), F(-118, 39), F(32, 195), F(80, 39)],
]
BUTCHER6_B = [F(13, 200), 0, F(11, 40), F(11, 40), F(4, 25), F(4, 25), F(13, 200)]

# Bogacki, Shampine, Appl. Math. Lett. 2, 1989
BOSH3 = [[], [F(1, 2)], [0, F(3, 4)], [F(2, 9), F(1, 3), F(4, 9)]]


def cooper_verner8() -> ButcherTableau:
    """Cooper, Verner, SIAM J. Numer. Anal. 9, 1972: order eight, eleven stages, irrational coefficients."""
    s = math.sqrt(21)
    a: list[list[float]] = [
        [],
        [1 / 2],
        [1 / 4, 1 / 4],
        [1 / 7, (-7 - 3 * s) / 98, (21 + 5 * s) / 49],
        [(11 + s) / 84, 0, (18 + 4 * s) / 63, (21 - s) / 252],
        [(5 + s) / 48, 0, (9 + s) / 36, (-231 + 14 * s) / 360, (63 - 7 * s) / 80],
        [
            (10 - s) / 42,
            0,
            (-432 + 92 * s) / 315,
            (633 - 145 * s) / 90,
            (-504 + 115 * s) / 70,
            (63 - 13 * s) / 35,
        ],
        [1 / 14, 0, 0, 0, (14 - 3 * s) / 126, (13 - 3 * s) / 63, 1 / 9],
        [1 / 32, 0, 0, 0, (91 - 21 * s) / 576, 11 / 72, (-385 - 75 * s) / 1152, (63 + 13 * s) / 128],
        [
            *(1 / 14, 0, 0, 0, 1 / 9, (-733 - 147 * s) / 2205),
            *((515 + 111 * s) / 504, (-51 - 11 * s) / 56, (132 + 28 * s) / 245),
        ],
        [
            *(0, 0, 0, 0, (-42 + 7 * s) / 18, (-18 + 28 * s) / 45),
            *((-273 - 53 * s) / 72, (301 + 53 * s) / 72, (28 - 28 * s) / 45, (49 - 7 * s) / 18),
        ],
    ]
    return ButcherTableau(a=a, b=[1 / 20, 0, 0, 0, 0, 0, 0, 49 / 180, 16 / 45, 49 / 180, 1 / 20])


@pytest.mark.parametrize("name", PRINTED)
def test_built_in_coefficients_are_the_printed_ones(name: str) -> None:
    a, b, c, order = PRINTED[name]
    tableau = FIXED[name]
    assert [list(row) for row in tableau.a] == a
    assert list(tableau.b) == b
    assert tableau.c is not None
    assert list(tableau.c) == c
    assert tableau.order == order
    assert tableau.stages == len(b)


def test_no_built_in_method_goes_unchecked() -> None:
    assert set(PRINTED) == set(FIXED)


@pytest.mark.parametrize(
    ("a", "b", "order"),
    [
        pytest.param(DOPRI5, DOPRI5_B, 5, id="dopri5-6-stages"),
        pytest.param([*DOPRI5, DOPRI5_B], [*DOPRI5_B, 0], 5, id="dopri5-7-stages"),
        pytest.param([*DOPRI5, DOPRI5_B], DOPRI5_EMBEDDED, 4, id="dopri5-embedded"),
        pytest.param(BUTCHER6, BUTCHER6_B, 6, id="butcher6"),
        pytest.param(BOSH3[:3], [F(2, 9), F(1, 3), F(4, 9)], 3, id="bosh3"),
        pytest.param(BOSH3, [F(7, 24), F(1, 4), F(1, 3), F(1, 8)], 2, id="bosh3-embedded"),
        # two weights of the classical rule exchanged
        pytest.param([[], [F(1, 2)], [0, F(1, 2)], [0, 0, 1]], [F(1, 3), F(1, 6), F(1, 3), F(1, 6)], 1, id="spoiled"),
        # Kutta's third-order rule, and with only sum_ij b_i a_ij c_j wrong
        pytest.param([[], [F(1, 2)], [-1, 2]], [F(1, 6), F(2, 3), F(1, 6)], 3, id="kutta3"),
        pytest.param([[], [F(1, 2)], [0, 1]], [F(1, 6), F(2, 3), F(1, 6)], 2, id="kutta3-spoiled"),
    ],
)
def test_order(a: Any, b: Any, order: int) -> None:
    exact = ButcherTableau(a=a, b=b)
    assert exact.order == order
    rounded = ButcherTableau(a=[[float(x) for x in row] for row in a], b=[float(x) for x in b])
    assert rounded.order == order
    assert rounded.nodes == pytest.approx(exact.nodes, abs=1e-15)


def test_order_eight_of_irrational_coefficients() -> None:
    assert cooper_verner8().order == 8


def test_order_conditions_are_complete() -> None:
    # sequence A000081 of the OEIS: a tree missed would let a method claim an order it has not
    assert [len(set(rooted_trees(n))) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert [len(rooted_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    # the bushy tree with four leaves has density 5, the tall tree with n nodes n!
    assert density(((),) * 4) == 5
    assert density(((((),),),)) == math.factorial(4)


def test_consistency_is_exact_for_fractions_and_close_for_floats() -> None:
    tenth = F(1, 10)
    ButcherTableau(a=[[], [tenth]], b=[0, 1], c=[0, tenth])
    ButcherTableau(a=[[], [0.1 + 0.2]], b=[0, 1], c=[0, 0.3])
    with pytest.raises(ValueError, match=r"c\[1\]"):
        ButcherTableau(a=[[], [tenth]], b=[0, 1], c=[0, tenth + F(1, 10**15)])
    with pytest.raises(ValueError, match="b sums to"):
        ButcherTableau(a=[[]], b=[1 + F(1, 10**15)])


def test_rows_may_carry_their_zeros_and_nodes_may_be_left_out() -> None:
    short = FIXED["rk4"]
    full = ButcherTableau(
        a=[[0, 0, 0, 0], [F(1, 3), 0, 0, 0], [F(-1, 3), 1, 0, 0], [1, -1, 1, 0]],
        b=tuple(short.b),
        c=[0, F(1, 3), F(2, 3), 1],
    )
    assert full == short
    assert full.order == 4


def test_a_tableau_does_not_change() -> None:
    with pytest.raises(AttributeError):
        FIXED["rk4"].b = (1,)  # type: ignore[misc]


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts back the registry as it was."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def rotation(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0] * (1 + t)])


Y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
T = torch.linspace(0, 1, 6, dtype=torch.float64)


def test_registered_method_by_name_and_tableau_directly(registry: None) -> None:
    tableau = ButcherTableau(a=BUTCHER6, b=BUTCHER6_B)
    assert register_method("butcher6", tableau) is tableau
    assert METHODS["butcher6"] is tableau
    by_name = odeint(rotation, Y0, T, method="butcher6")
    assert torch.equal(by_name, odeint(rotation, Y0, T, method=tableau))
    # the same tableau again is no conflict, another one is
    register_method("butcher6", ButcherTableau(a=BUTCHER6, b=BUTCHER6_B))
    with pytest.raises(ValueError, match="butcher6"):
        register_method("butcher6", FIXED["euler"])
    with pytest.raises(ValueError, match="rk9"):
        odeint(rotation, Y0, T, method="rk9")


@pytest.mark.parametrize("name", FIXED)
def test_floats_and_fractions_give_the_same_solution(name: str) -> None:
    exact = FIXED[name]
    rounded = ButcherTableau(a=[[float(x) for x in row] for row in exact.a], b=[float(x) for x in exact.b])
    assert torch.equal(odeint(rotation, Y0, T, method=name), odeint(rotation, Y0, T, method=rounded))


# stage 2 is used by no one: neither a later stage nor the update reads it
WITH_UNUSED_STAGE = ButcherTableau(a=[[], [F(1, 3)], [F(1, 2), 0]], b=[0, 0, 1])


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_what_has_coefficient_zero_is_never_read(checkpoint: str, dtype: torch.dtype) -> None:
    """A stage that nothing uses may be NaN, its gradients too: the results are those without it."""

    def gradients(method: Any, poisoned: bool) -> list[Tensor]:
        y0 = Y0.to(dtype).requires_grad_()
        weight = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        calls = 0

        def func(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            spoiled = poisoned and calls % 3 == 2
            return weight * y * (math.nan if spoiled else 1.0)

        y = odeint(func, y0, T, method=method, checkpoint=checkpoint)
        return [y.detach(), *torch.autograd.grad(y.float().sum(), [y0, weight])]

    expected = gradients("midpoint", False)
    found = gradients(WITH_UNUSED_STAGE, True)
    # the same operations in the same order
    assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
def test_sixteen_stages(checkpoint: str) -> None:
    # sixteen Euler steps written as one step: the largest tableau, with every coefficient in use
    part = F(1, 16)
    tableau = ButcherTableau(a=[[part] * i for i in range(16)], b=[part] * 16)
    assert tableau.order == 1
    y0 = Y0.clone().requires_grad_()
    once = odeint(rotation, y0, T, method=tableau, checkpoint=checkpoint)
    fine = torch.linspace(0, 1, 5 * 16 + 1, dtype=torch.float64)
    often = odeint(rotation, y0, fine, method="euler")[::16]
    # 80 steps of at most four roundings each, of numbers below 2
    bound = 80 * 4 * 2 * torch.finfo(torch.float64).eps
    assert (once - often).abs().max() <= bound
    gradients = [torch.autograd.grad(y[-1].sum(), y0)[0] for y in (once, often)]
    assert (gradients[0] - gradients[1]).abs().max() <= 4 * bound


def test_negative_weights_and_unused_first_stage() -> None:
    # b_1 = 0 and a_21 = 0 in part: nodes (0, 1/2, -1/2), a negative node and a negative weight
    tableau = ButcherTableau(a=[[], [F(1, 2)], [F(-1, 2), 0]], b=[-1, F(3, 2), F(1, 2)])
    assert tableau.order == 2
    y = odeint(lambda t, y: 2 * t, torch.zeros((), dtype=torch.float64), T, method=tableau)
    # a second-order rule integrates 2 t exactly
    assert (y - T.square()).abs().max() <= 4 * torch.finfo(torch.float64).eps


# order of the method, order in the step size of its estimated error, evaluations in a step after the first one
PAIRS = {
    "dopri8": (8, 8, 13),
    "dopri5": (5, 5, 6),
    "tsit5": (5, 5, 6),
    "bosh3": (3, 3, 3),
    "fehlberg2": (2, 2, 3),
    "adaptive_heun": (2, 2, 2),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_orders_of_pairs(name: str) -> None:
    tableau = ADAPTIVE[name]
    order, control_order, evaluations = PAIRS[name]
    assert (tableau.order, tableau.control_order) == (order, control_order)
    closed = tableau.closed
    assert closed.stages - 1 == evaluations
    # the last stage is the first of the next step
    assert list(closed.a[-1]) == list(closed.b[:-1])
    assert closed.b[-1] == 0
    assert closed.nodes[-1] == 1.0
    # rounded coefficients do not lead beyond the end of the step
    assert all(0.0 <= node <= 1.0 for node in closed.nodes)
    assert closed.order == order


@pytest.mark.parametrize("name", ADAPTIVE)
def test_interpolant_meets_both_ends_with_the_slopes_there(name: str) -> None:
    closed = ADAPTIVE[name].closed
    first, last = [1.0, *[0.0] * (closed.stages - 1)], [*[0.0] * (closed.stages - 1), 1.0]
    # sums of coefficients up to a few thousands, in dopri8
    close = {"abs": 1e-11}
    assert closed.weights_at(0.0) == [0.0] * closed.stages
    assert closed.weights_at(1.0) == pytest.approx([float(b) for b in closed.b], **close)
    assert closed.slopes_at(0.0) == pytest.approx(first, **close)
    assert closed.slopes_at(1.0) == pytest.approx(last, **close)
    for theta in (0.3, 0.5, 0.9):
        assert sum(closed.weights_at(theta)) == pytest.approx(theta, **close)
        assert sum(closed.slopes_at(theta)) == pytest.approx(1.0, **close)


def test_pair_from_the_literature_is_the_built_in_one() -> None:
    error = [b - e for b, e in zip([*DOPRI5_B, 0], DOPRI5_EMBEDDED, strict=True)]
    pair = EmbeddedTableau(a=[*DOPRI5, DOPRI5_B], b=[*DOPRI5_B, 0], error=error)
    assert pair.control_order == 5
    built_in = ADAPTIVE["dopri5"]
    assert [list(row) for row in built_in.a] == [list(row) for row in pair.a]
    # Shampine's error estimate is another one of the same order
    assert list(built_in.b) == list(pair.b)
    y = odeint(rotation, Y0, T[[0, -1]], method=pair, rtol=1e-8, atol=1e-8, options={"step_t": [1.0]})
    by_name = odeint(rotation, Y0, T[[0, -1]], method="dopri5", rtol=1e-8, atol=1e-8, options={"step_t": [1.0]})
    assert (y - by_name).abs().max() <= 1e-7


def test_method_without_the_stage_at_the_end_gets_it() -> None:
    heun = ADAPTIVE["adaptive_heun"]
    assert heun.stages == 2
    assert heun.closed.stages == 3
    assert heun.closed.attempted == 2
    assert ADAPTIVE["dopri5"].closed.attempted == 7


HEUN = {"a": [[], [1]], "b": [F(1, 2), F(1, 2)]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "error has 0 weights, expected 2"),
        ({"error": [0]}, "error has 1 weights, expected 2"),
        ({"error": [F(1, 2), F(1, 2)]}, "error sums to 1, expected 0"),
        ({"error": [1e-9, 0]}, "error sums to 1e-09, expected 0"),
        ({"error": [1, -1], "middle": [F(1, 2)]}, "middle has 1 weights, expected 3"),
        ({"error": [1, -1], "middle": [F(1, 2), 0, 0, 0]}, "middle has 4 weights, expected 3"),
        ({"error": [1, -1], "middle": [1, 0]}, "middle sums to 1, expected 1/2"),
        ({"error": [1, -1], "b": [1, 1]}, "b sums to 2, expected 1"),
        ({"error": [math.nan, 0]}, r"error\[0\] is nan, expected a finite number"),
    ],
)
def test_embedded_tableau_checks_its_arguments(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddedTableau(**{**HEUN, **changes})


@pytest.mark.parametrize(
    "changes", [{"error": 1}, {"error": "ab"}, {"error": ["a", 0]}, {"error": [1, -1], "middle": 2}]
)
def test_embedded_tableau_wants_numbers(changes: Any) -> None:
    with pytest.raises(TypeError, match=r"error|middle"):
        EmbeddedTableau(**{**HEUN, **changes})


def test_registered_pair_is_adaptive(registry: None) -> None:
    pair = EmbeddedTableau(**HEUN, error=[F(-1, 2), F(1, 2)])
    register_method("mine", pair)
    y = odeint(rotation, Y0, T, method="mine", rtol=1e-4, atol=1e-4)
    assert torch.equal(y, odeint(rotation, Y0, T, method="adaptive_heun", rtol=1e-4, atol=1e-4))


def test_rounded_nodes_at_the_ends_are_the_ends() -> None:
    tableau = ButcherTableau(a=[[], [0.6], [0.6, 0.3], [0.6, 0.3, 0.1]], b=[0.25] * 4)
    assert 0.6 + 0.3 + 0.1 != 1.0
    assert tableau.nodes[-1] == 1.0
