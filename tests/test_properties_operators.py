"""Random operands: the compiled operators of the CPU agree with the ATen oracle, element by element."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from rampde import eager, ops, scaling

pytestmark = pytest.mark.usefixtures("compiled")

REALS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATES = [torch.float64, torch.float32]
checked = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (7,), (33,), (1000,), (3, 0, 2)]),
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
)
COEFFICIENTS = st.one_of(st.just(0.0), st.floats(-2, 2, allow_nan=False, width=32))
LAYOUTS = ["dense", "transposed", "channels_last", "sliced", "expanded", "offset"]


def operand(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """Random numbers of order one in any layout; the values do not depend on it."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and len(shape) == 4:
        return values.to(memory_format=torch.channels_last)
    if layout == "sliced" and len(shape) >= 1:
        padded = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)
        padded[..., ::2] = values
        return padded[..., ::2]
    if layout == "expanded" and len(shape) >= 2:
        return values[:1].expand(shape)
    if layout == "offset":
        # not aligned to any vector width
        memory = torch.full((values.numel() + 1,), torch.nan, dtype=dtype)
        memory[1:] = values.flatten()
        return memory[1:].view(shape)
    return values


@st.composite
def sums(draw: st.DrawFn) -> dict[str, Any]:
    """A state-like operand with terms of several dtypes and layouts, their coefficients, a step size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(STATES))
    count = draw(st.integers(0, 6))
    layouts = st.sampled_from(LAYOUTS)
    return {
        "base": operand(shape, dtype, draw(st.sampled_from(["dense", "transposed", "channels_last"])), generator),
        "terms": [operand(shape, draw(st.sampled_from(REALS)), draw(layouts), generator) for _ in range(count)],
        "weights": [draw(COEFFICIENTS) for _ in range(count)],
        "h": torch.tensor(draw(st.floats(-0.5, 0.5, width=32)), dtype=draw(st.sampled_from(STATES))),
        "out": draw(st.sampled_from(REALS)),
    }


def largest_difference(
    base: Tensor, terms: list[Tensor], factors: list[float], accumulation: torch.dtype, out: torch.dtype
) -> Tensor:
    """What two orders of the same sum may differ by, element by element.

    Each of the n additions and n products rounds once in the accumulation dtype, relative to the sum of the
    magnitudes; two results rounded to ``out`` from there differ by at most one unit more.
    """
    magnitude = base.double().abs()
    for term, factor in zip(terms, factors, strict=True):
        if factor != 0:
            magnitude = magnitude + abs(factor) * term.double().abs()
    eps = (2 * len(terms) + 2) * torch.finfo(accumulation).eps + torch.finfo(out).eps
    return eps * magnitude + torch.finfo(out).smallest_normal * torch.finfo(out).eps


def difference_of(case: dict[str, Any], base: Tensor, out: torch.dtype) -> Tensor:
    factors = [float(case["h"]) * weight for weight in case["weights"]]
    return largest_difference(base, case["terms"], factors, case["base"].dtype, out)


def assert_close(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert bool(((found.double() - expected.double()).abs() <= allowed).all())


def same_strides(left: Tensor, right: Tensor) -> bool:
    return left.stride() == right.stride()


@checked
@given(sums())
def test_rk_stage(case: dict[str, Any]) -> None:
    arguments = (case["base"], case["terms"], case["h"], case["weights"], case["out"])
    found, expected = ops.rk_stage(*arguments), eager.rk_stage(*arguments)
    assert_close(found, expected, difference_of(case, case["base"], case["out"]))
    assert same_strides(found, expected)


@checked
@given(sums(), st.booleans(), st.booleans(), st.booleans())
def test_rk_update(case: dict[str, Any], checkpoint: bool, compensated: bool, in_place: bool) -> None:
    def run(rk_update: Any) -> list[Tensor | None]:
        y = case["base"].clone()
        target = y if in_place else torch.empty_like(y)
        rounded = torch.empty_like(y, dtype=case["out"]) if checkpoint else None
        lost = torch.zeros_like(y) if compensated else None
        overflow = torch.tensor(99)
        rk_update(y, case["terms"], case["h"], case["weights"], target, rounded, lost, overflow, 5)
        assert overflow.item() == 99
        return [target, rounded, lost]

    dtypes = [case["base"].dtype, case["out"], case["base"].dtype]
    for found, expected, dtype in zip(run(ops.rk_update), run(eager.rk_update), dtypes, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert_close(found, expected, difference_of(case, case["base"], dtype))
            assert same_strides(found, expected)


@checked
@given(sums(), st.data())
def test_rk_error(case: dict[str, Any], data: st.DataObject) -> None:
    """The step as rk_update's, to the bit; the sums as the oracle's, but for the order of terms of one sign."""
    y = case["base"]
    e = data.draw(st.lists(COEFFICIENTS, min_size=len(case["terms"]), max_size=len(case["terms"])))
    by_row = y.dim() > 0 and y.is_contiguous() and data.draw(st.booleans())
    rows = len(y) if by_row else 1
    rtol, atol = data.draw(st.sampled_from([0.0, 1e-6, 1e-2])), data.draw(st.sampled_from([0.0, 1e-9, 1e-3]))
    stepped, updated = torch.empty_like(y), torch.empty_like(y)
    arguments = (case["terms"], case["h"], case["weights"], e, rtol, atol, 2.0**-8, rows)
    found, expected = ops.rk_error(y, *arguments, stepped), eager.rk_error(y, *arguments, torch.empty_like(y))
    ops.rk_update(y, case["terms"], case["h"], case["weights"], updated)
    assert torch.equal(stepped, updated)
    allowed = y.numel() * torch.finfo(torch.float64).eps * expected
    assert_close(found.nan_to_num(posinf=1e300), expected.nan_to_num(posinf=1e300), allowed.nan_to_num(posinf=1e300))


def scale_states() -> st.SearchStrategy[Tensor]:
    """Scale states as sweeps meet them: a power of two, running or after an overflow."""

    def build(exponent: int, running: bool, clean: bool, headroom: int) -> Tensor:
        state = torch.zeros(scaling.STATE_SIZE)
        state[scaling.SCALE] = 2.0**exponent
        state[scaling.SCALE_OF_STEP] = 2.0**exponent if clean else 0.0
        state[scaling.FINITE] = 1.0
        state[scaling.HEADROOM] = 2.0**-headroom
        state[scaling.CLEAN_STEPS] = 1999.0
        state[scaling.OVERFLOWED] = 0.0 if running else 1.0
        return state

    return st.builds(build, st.integers(-12, 12), st.booleans(), st.booleans(), st.integers(0, 3))


@checked
@given(sums(), COEFFICIENTS, st.none() | scale_states())
def test_adjoint_stage(case: dict[str, Any], b: float, state: Tensor | None) -> None:
    arguments = (case["base"], case["terms"], case["h"], b, case["weights"], case["out"], state)
    found, expected = ops.adjoint_stage(*arguments), eager.adjoint_stage(*arguments)
    scale = 1.0 if state is None else float(state[scaling.SCALE])
    # a scaled value beyond the range of float16 is infinite in both or, at the very edge, in one of them
    edge = torch.finfo(case["out"]).max
    allowed = difference_of(case, b * scale * case["base"].double(), case["out"])
    finite = expected.double().abs() < edge * 0.99
    zero = torch.zeros((), dtype=found.dtype)
    assert_close(torch.where(finite, found, zero), torch.where(finite, expected, zero), allowed)
    assert same_strides(found, expected)


@checked
@given(sums(), st.booleans(), st.none() | scale_states())
def test_adjoint_update(case: dict[str, Any], with_cotangent: bool, state: Tensor | None) -> None:
    base, terms, h = case["base"], case["terms"], case["h"]
    cotangent = torch.linspace(-1, 1, base.numel(), dtype=torch.float64).view(base.shape).to(case["out"])

    def run(adjoint_update: Any) -> tuple[Tensor, Tensor | None]:
        target = torch.full_like(base, 7.0)
        scale_state = None if state is None else state.clone()
        adjoint_update(base, terms, h, cotangent if with_cotangent else None, target, scale_state)
        return target, scale_state

    (found, found_state), (expected, expected_state) = run(ops.adjoint_update), run(eager.adjoint_update)
    scale = 1.0 if state is None else float(state[scaling.SCALE])
    factors = [float(h) / scale] * len(terms)
    allowed = largest_difference(base.double().abs() + 1, terms, factors, base.dtype, base.dtype)
    assert_close(found, expected, allowed)
    if found_state is not None and expected_state is not None:
        difference = (found_state - expected_state).abs()
        if base.numel():
            assert difference[scaling.MAXIMUM] <= float(allowed.max())
        difference[scaling.MAXIMUM] = 0
        assert not difference.any()


@checked
@given(st.data(), st.none() | scale_states())
def test_accumulate_gradients(data: st.DataObject, state: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=4))
    stages = data.draw(st.integers(1, 4))
    totals = [operand(shape, data.draw(st.sampled_from(STATES)), "dense", generator) for shape in shapes]
    layouts = st.sampled_from(LAYOUTS)
    gradients = [
        None
        if data.draw(st.integers(0, 4)) == 0
        else operand(shape, data.draw(st.sampled_from(REALS)), data.draw(layouts), generator)
        for _ in range(stages)
        for shape in shapes
    ]
    h = torch.tensor(data.draw(st.floats(-0.5, 0.5, width=32)), dtype=data.draw(st.sampled_from(STATES)))
    found, expected = ([total.clone() for total in totals] for _ in range(2))
    ops.accumulate_gradients(found, gradients, h, state)
    eager.accumulate_gradients(expected, gradients, h, state)
    scale = 1.0 if state is None else float(state[scaling.SCALE_OF_STEP])
    for index, (ours, theirs, total) in enumerate(zip(found, expected, totals, strict=True)):
        terms = [gradient for gradient in gradients[index :: len(totals)] if gradient is not None]
        factors = [float(h) / scale if scale else 0.0] * len(terms)
        assert_close(ours, theirs, largest_difference(total, terms, factors, total.dtype, total.dtype))


@checked
@given(
    scale_states(),
    st.sampled_from([0.0, 1e-30, 3e-5, 0.5, 1.0, 65504.0, 3e38]),
    st.lists(st.sampled_from(["finite", "inf", "nan", "none", "empty"]), max_size=4),
    st.integers(0, 1),
)
def test_update_scale(state: Tensor, maximum: float, kinds: list[str], steps: int) -> None:
    """Decisions are exact: the same bits."""
    state[scaling.MAXIMUM] = maximum
    values = {"inf": torch.inf, "nan": torch.nan, "finite": 3.0}
    gradients = [
        None if kind == "none" else torch.full((0 if kind == "empty" else 5,), values.get(kind, 0.0)).half()
        for kind in kinds
    ]
    found, expected = state.clone(), state.clone()
    for update_scale, target in ((ops.update_scale, found), (eager.update_scale, expected)):
        update_scale(target, gradients, 1024.0 / 3, 0.5, 2.0, 2000, 0.0, steps)
    assert torch.equal(found, expected)
