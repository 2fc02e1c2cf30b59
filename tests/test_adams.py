"""The weights of the Adams methods: on equal steps those of the books, on any grid exact for polynomials."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from rampde.adams import (
    ADAMS_METHODS,
    AdamsMethod,
    AdamsOptions,
    Formulas,
    exact_weights,
    lagrange_integrals,
    read_options,
    step_weights,
)

EXPLICIT, IMPLICIT = ADAMS_METHODS["explicit_adams"], ADAMS_METHODS["implicit_adams"]


def bashforth(count: int) -> tuple[int, ...]:
    return tuple(range(0, -count, -1))


def moulton(count: int) -> tuple[int, ...]:
    return tuple(range(1, 1 - count, -1))


def formulas(method: AdamsMethod, times: list[float], max_order: int = 12) -> Formulas:
    return Formulas(method, max_order, torch.tensor(times, dtype=torch.float64), times, torch.float64)


def newton_coefficient(order: int, implicit: bool) -> Fraction:
    """``gamma_j`` or ``gamma*_j`` of Hairer, Norsett, Wanner I, III.1, by the recurrences (1.7) and (1.11) there."""
    gammas: list[Fraction] = []
    for j in range(order + 1):
        known = sum((gammas[m] * Fraction(1, j + 1 - m) for m in range(j)), start=Fraction(0))
        gammas.append((Fraction(int(j == 0)) if implicit else Fraction(1)) - known)
    return gammas[order]


def test_the_textbook_formulas() -> None:
    assert exact_weights(bashforth(1)) == (1,)
    assert exact_weights(bashforth(2)) == (Fraction(3, 2), Fraction(-1, 2))
    assert exact_weights(bashforth(4)) == (
        Fraction(55, 24),
        Fraction(-59, 24),
        Fraction(37, 24),
        Fraction(-9, 24),
    )
    assert exact_weights(moulton(2)) == (Fraction(1, 2), Fraction(1, 2))
    assert exact_weights(moulton(3)) == (Fraction(5, 12), Fraction(8, 12), Fraction(-1, 12))


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("count", range(1, 13))
def test_equal_steps_agree_with_backward_differences(count: int, implicit: bool) -> None:
    """``sum_j gamma_j nabla^j f`` written out in velocities: another derivation of the same numbers."""
    weights = [Fraction(0)] * count
    for j in range(count):
        gamma = newton_coefficient(j, implicit)
        for i in range(j + 1):
            weights[i] += gamma * (-1) ** i * math.comb(j, i)
    assert exact_weights(moulton(count) if implicit else bashforth(count)) == tuple(weights)


@pytest.mark.parametrize("count", range(1, 13))
def test_quadrature_is_exact_to_rounding(count: int) -> None:
    for nodes in (bashforth(count), moulton(count)):
        exact = torch.tensor([float(weight) for weight in exact_weights(nodes)], dtype=torch.float64)
        integrals = lagrange_integrals(torch.tensor(nodes, dtype=torch.float64))
        assert ((integrals - exact) / exact).abs().max() <= 4 * count * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("past", range(1, 12))
def test_unequal_steps_integrate_polynomials(past: int, implicit: bool) -> None:
    gaps = 0.5 + torch.rand(past, dtype=torch.float64)
    times = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)]) - 0.3
    rows = times[None]
    weights = step_weights(rows, implicit)[0]
    # at which the velocities are, the latest first
    nodes = times.flip(0) if implicit else times.flip(0)[1:]
    assert len(weights) == len(nodes)
    for power in range(len(nodes)):
        integral = (times[-1] ** (power + 1) - times[-2] ** (power + 1)) / (power + 1)
        terms = weights * nodes**power
        assert (terms.sum() - integral).abs() <= 1e-14 * terms.abs().sum()


def test_weights_are_differentiable_in_the_grid() -> None:
    rows = torch.tensor([[0.0, 0.1, 0.3, 0.35, 0.5], [1.0, 0.9, 0.7, 0.6, 0.5]], dtype=torch.float64)
    for implicit in (False, True):
        assert torch.autograd.gradcheck(
            lambda rows, implicit=implicit: step_weights(rows, implicit), rows.requires_grad_()
        )


@pytest.mark.parametrize("method", [EXPLICIT, IMPLICIT], ids=["explicit", "implicit"])
@pytest.mark.parametrize("step", [0.1, -1 / 3, 1e-3])
def test_an_equal_grid_has_the_constants_of_the_books(method: AdamsMethod, step: float) -> None:
    """Also where the times are rounded: the same list in all steps with a full history, for one kernel."""
    found = formulas(method, [2.0 + step * n for n in range(1200)])
    assert found[0] is None
    assert found[1] is None
    for step_index in range(2, 1199):
        formula = found[step_index]
        assert formula is not None
        past = min(step_index + 1, 11)
        assert formula.past == past
        weights = formula.corrector or formula.predictor
        nodes = moulton(past + 1) if method.implicit else bashforth(past)
        assert weights.values == [float(weight) for weight in exact_weights(nodes)]
        assert weights.equal == (past == 11)
        assert torch.equal(weights.row, torch.tensor(weights.values, dtype=torch.float64))


@pytest.mark.parametrize("method", [EXPLICIT, IMPLICIT], ids=["explicit", "implicit"])
def test_formulas_of_a_smooth_grid_use_the_whole_history(method: AdamsMethod) -> None:
    found = formulas(method, [math.exp(0.02 * n) for n in range(40)])
    for step in range(2, 39):
        formula = found[step]
        assert formula is not None
        assert formula.past == min(step + 1, 11)
        assert not formula.predictor.equal


@pytest.mark.parametrize("method", [EXPLICIT, IMPLICIT], ids=["explicit", "implicit"])
def test_no_formula_amplifies(method: AdamsMethod) -> None:
    """Where a long step follows short ones, fewer velocities enter, or the step is one of rk4."""
    gaps = torch.rand(400, dtype=torch.float64) ** 4 + 1e-4
    times = [0.0, *gaps.cumsum(0).tolist()]
    found = formulas(method, times)
    kinds = set()
    for step in range(2, 400):
        formula = found[step]
        kinds.add(None if formula is None else formula.past)
        if formula is None:
            continue
        assert formula.past >= min(4, step + 1)
        weights = formula.corrector or formula.predictor
        nodes = moulton(formula.past + 1) if method.implicit else bashforth(formula.past)
        regular = sum(abs(weight) for weight in exact_weights(nodes))
        assert sum(abs(weight) for weight in weights.values) <= 2 * regular * (1 + 1e-12)
        exact = step_weights(
            torch.tensor(times[step + 1 - formula.past : step + 2], dtype=torch.float64)[None], method.implicit
        )[0] / (times[step + 1] - times[step])
        assert (torch.tensor(weights.values, dtype=torch.float64) - exact).abs().max() <= 1e-12 * exact.abs().max()
    assert {None, 11} <= kinds


def test_formulas_can_be_asked_for_in_any_order() -> None:
    times = [0.01 * n + 0.002 * math.sin(n) for n in range(1100)]
    upwards, downwards = formulas(IMPLICIT, times), formulas(IMPLICIT, times)
    ascending = [upwards[step] for step in range(1099)]
    descending = [downwards[step] for step in reversed(range(1099))][::-1]
    for one, other in zip(ascending, descending, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.predictor.values == other.predictor.values


def test_options() -> None:
    assert read_options({"step_size": 0.1, "max_order": None}) == AdamsOptions(max_order=None, max_iters=4)
    assert read_options({"max_order": 5.0, "max_iters": 9}) == AdamsOptions(5, 9)
    for options, message in (
        ({"max_order": 13}, "max_order is 13, expected at most 12"),
        ({"max_order": 0}, "max_order is 0, expected a positive integer"),
        ({"max_iters": 0}, "max_iters is 0, expected a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options(options)
    for name, value in itertools.product(("max_order", "max_iters"), (True, "4", 4.5, torch.tensor(4))):
        with pytest.raises(TypeError, match=f"{name} is .*, expected a positive integer"):
            read_options({name: value})


def test_orders() -> None:
    """Of the whole solve: the first steps bound what the formulas could do."""
    assert [EXPLICIT.order_with(m) for m in (1, 3, 4, 5, 6, 12)] == [4, 4, 3, 4, 4, 4]
    assert [IMPLICIT.order_with(m) for m in (1, 3, 4, 5, 6, 12)] == [4, 4, 4, 5, 5, 5]
    assert (EXPLICIT.order, IMPLICIT.order) == (4, 5)
    assert ADAMS_METHODS["fixed_adams"] == IMPLICIT


def test_equal_steps_of_single_precision_times() -> None:
    """f sees the times in float32 alone, so what float32 cannot tell apart is equal."""
    times = torch.linspace(0, 1, 101).tolist()
    points: Tensor = torch.tensor(times, dtype=torch.float64)
    single = Formulas(EXPLICIT, 5, points, times, torch.float32)
    double = Formulas(EXPLICIT, 5, points, times, torch.float64)
    for step in range(3, 100):
        one, other = single[step], double[step]
        assert one is not None
        assert other is not None
        assert one.predictor.equal
        assert one.predictor.values == pytest.approx(other.predictor.values, rel=1e-3)
    assert not all(
        formula is not None and formula.predictor.equal for formula in (double[step] for step in range(3, 100))
    )
