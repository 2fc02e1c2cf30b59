"""Values of the Triton kernels against float64, interpreted or on a GPU; ``test_values.py`` runs it.

The interpreter truncates to bfloat16 instead of rounding, so there bfloat16 results are only claimed to one
unit in the last place; the rounding itself is checked in the compiled code and on a GPU.
"""

from collections.abc import Callable, Sequence

import pytest
import tolerance
import torch
from suites import DTYPES, INTERPRETED, LAYOUTS, coefficients, step_size, update_both
from torch import Tensor

from rampde import eager, fp8_blocks
from rampde.kernels import rk_error, rk_stage, rk_update

pytestmark = pytest.mark.usefixtures("device_of_triton")

SIZES = (1, 3, 17, 1000, 4099)


def exact_sum(y: Tensor, k: Sequence[Tensor], h: Tensor, a: Sequence[float]) -> Tensor:
    total = y.double()
    for term, coefficient in zip(k, a, strict=True):
        if coefficient != 0.0:
            total = total + h.double() * coefficient * term.double()
    return total


def assert_within_budget(found: Tensor, independent: Tensor, exact: Tensor) -> None:
    if not (INTERPRETED and found.dtype == torch.bfloat16):
        tolerance.assert_within_budget(found, independent, exact)
        return
    # one unit in the last place; the sum that is truncated carries an error of its own
    budget = torch.finfo(found.dtype).eps * exact.abs() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert found.dtype == independent.dtype
    assert bool(((found.double() - exact).abs() <= budget).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stage_mixes_dtypes(size: int, y_dtype: torch.dtype, dtype: torch.dtype) -> None:
    y = torch.randn(size).to(y_dtype)
    k = [torch.randn(size).to(k_dtype) for k_dtype in DTYPES]
    a = coefficients(len(k))
    for h in (step_size(), step_size(-0.1, torch.float32)):
        found = rk_stage(y, k, h, a, dtype)
        assert_within_budget(found, eager.rk_stage(y, k, h, a, dtype), exact_sum(y, k, h, a))


@pytest.mark.parametrize("count", range(17))
def test_stage_takes_any_number_of_terms(count: int) -> None:
    y = torch.randn(1000)
    k = [torch.randn(1000, dtype=torch.float16) for _ in range(count)]
    a = coefficients(count)
    found = rk_stage(y, k, step_size(), a, torch.float32)
    assert_within_budget(found, eager.rk_stage(y, k, step_size(), a, torch.float32), exact_sum(y, k, step_size(), a))


@pytest.mark.parametrize("y_dtype", [torch.float64, torch.float32])
def test_backends_agree_to_the_bit(y_dtype: torch.dtype) -> None:
    y = torch.randn(4099, dtype=y_dtype)
    k = [torch.randn(4099).to(k_dtype) for k_dtype in DTYPES]
    a = coefficients(4)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert torch.equal(rk_stage(y, k, step_size(), a, dtype), eager.rk_stage(y, k, step_size(), a, dtype))


def test_float64_coefficients_keep_their_precision() -> None:
    y = torch.zeros(17, dtype=torch.float64)
    k = [torch.ones(17, dtype=torch.float64)]
    assert torch.equal(rk_stage(y, k, step_size(1.0), [1 / 3], torch.float64), torch.full_like(y, 1 / 3))
    assert torch.equal(rk_stage(y, k, step_size(0.1), [1.0], torch.float64), torch.full_like(y, 0.1))


def test_zero_keeps_its_sign() -> None:
    y, k = torch.tensor([0.0, -0.0, 0.0, -0.0]), torch.tensor([0.0, 0.0, -0.0, -0.0])
    for terms in ([], [k]):
        h, a = step_size(1.0), [1.0] * len(terms)
        found = [rk_stage(y, terms, h, a, torch.float32), torch.empty(4), torch.empty(4)]
        rk_update(y, terms, h, a, found[1])
        rk_error(y, terms, h, a, a, 1e-3, 1e-5, 0.0, 1, found[2])
        for x in found:
            assert x.signbit().tolist() == [False, not terms, False, True]


@pytest.mark.parametrize("k_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout: str, k_layout: str) -> None:
    y = LAYOUTS[layout](torch.randn(2, 3, 5, 7))
    k = [LAYOUTS[k_layout](torch.randn(2, 3, 5, 7, dtype=torch.float16)) for _ in range(2)]
    # what a network that ignores its input returns
    k.append(torch.randn(3, 1, 1, dtype=torch.float64).expand(2, 3, 5, 7))
    a = coefficients(3)
    stage = rk_stage(y, k, step_size(), a, torch.float32)
    assert stage.stride() == y.stride()
    exact = exact_sum(y, k, step_size(), a)
    assert_within_budget(stage, eager.rk_stage(y, k, step_size(), a, torch.float32), exact)
    y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=torch.float16)
    rk_update(y, k, step_size(), a, y_next, checkpoint)
    assert torch.equal(y_next, stage)
    assert torch.equal(checkpoint, stage.half())


def test_strides_of_single_dimensions_do_not_matter() -> None:
    y = torch.randn(4, 1, 3)
    k = torch.randn(4, 3).as_strided((4, 1, 3), (3, 77, 1))
    y_next = torch.empty(12).as_strided((4, 1, 3), (3, 55, 1))
    rk_update(y, [k], step_size(), [1.0], y_next)
    assert torch.equal(y_next, eager.rk_stage(y, [k], step_size(), [1.0], torch.float32))


def test_zero_coefficients_are_not_read() -> None:
    y = torch.randn(17)
    k = [torch.randn(17), torch.full((17,), torch.nan), torch.empty(3, dtype=torch.int32)]
    stage = rk_stage(y, k, step_size(), [0.5, 0.0, -0.0], torch.float32)
    assert torch.equal(stage, rk_stage(y, k[:1], step_size(), [0.5], torch.float32))
    y_next = torch.empty_like(y)
    rk_update(y, k[1:], step_size(), [0.0, 0.0], y_next)
    assert torch.equal(y_next, y)


def test_empty_states_are_checked_and_left() -> None:
    y = torch.empty(0, 3)
    assert rk_stage(y, [y], step_size(), [1.0], torch.float16).shape == (0, 3)
    overflow = torch.tensor(9)
    rk_update(y, [y], step_size(), [1.0], torch.empty_like(y), overflow_step=overflow, step=2)
    assert overflow.item() == 9
    with pytest.raises(ValueError, match=r"rk_stage: k\[0\]"):
        rk_stage(y, [torch.empty(0, 4)], step_size(), [1.0], torch.float16)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("next_dtype", DTYPES)
@pytest.mark.parametrize("checkpoint_dtype", [None, *DTYPES])
def test_update_writes_every_output(size: int, next_dtype: torch.dtype, checkpoint_dtype: torch.dtype | None) -> None:
    k = [torch.randn(size).to(k_dtype) for k_dtype in DTYPES]
    b = coefficients(len(k))
    for y in (torch.randn(size), torch.randn(size, dtype=torch.float64), torch.randn(size).half()):
        outputs = {"y_next": torch.empty(size, dtype=next_dtype)}
        if checkpoint_dtype is not None:
            outputs["checkpoint"] = torch.empty(size, dtype=checkpoint_dtype)
        found, independent = update_both(y, k, step_size(), b, **outputs)
        for name in outputs:
            assert_within_budget(found[name], independent[name], exact_sum(y, k, step_size(), b))


def test_update_in_place_and_of_itself() -> None:
    for dtype in (torch.float32, torch.float16):
        y = torch.randn(4099).to(dtype)
        expected = torch.empty_like(y)
        eager.rk_update(y, [y, y], step_size(), [0.5, 0.25], expected)
        rk_update(y, [y, y], step_size(), [0.5, 0.25], y)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compensation_is_the_oracles_to_the_bit(dtype: torch.dtype) -> None:
    # of all magnitudes, so that the increment is the larger summand here and there
    y = torch.randn(4099, dtype=dtype) * 10 ** (-10 * torch.rand(4099, dtype=dtype))
    k = [torch.randn(4099).half() for _ in range(3)]
    compensation = 1e-8 * torch.randn_like(y)
    found, expected = update_both(
        y, k, step_size(1e-4), coefficients(3), y_next=torch.empty_like(y), compensation=compensation
    )
    assert bool((expected["compensation"] != 0).any())
    assert torch.equal(found["y_next"], expected["y_next"])
    assert torch.equal(found["compensation"], expected["compensation"])


def test_compensation_carries_what_a_sum_loses() -> None:
    k = torch.rand(17)
    plain, compensated, compensation = torch.ones(17), torch.ones(17), torch.zeros(17)
    steps, h = 100, step_size(1e-5)
    for _ in range(steps):
        rk_update(plain, [k], h, [1.0], plain)
        rk_update(compensated, [k], h, [1.0], compensated, compensation=compensation)
    exact = 1 + steps * h * k.double()
    eps = torch.finfo(torch.float32).eps
    assert bool(((compensated.double() - exact).abs() <= eps).all())
    assert (plain.double() - exact).abs().max() > 8 * eps


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("size", "where"), [(1, 0), (17, 16), (4099, 0), (4099, 4098)])
def test_overflow_lowers_the_step(size: int, where: int, value: float) -> None:
    y = torch.randn(size)
    y[where] = value
    for before, expected in ((9, 5), (5, 5), (2, 2)):
        overflow = torch.tensor(before)
        rk_update(y, [], step_size(), [], torch.empty_like(y), overflow_step=overflow, step=5)
        assert overflow.item() == expected


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_overflow_is_that_of_the_stored_checkpoint() -> None:
    for value, checkpoint_dtype, overflows in (
        (70000.0, torch.float16, True),
        (70000.0, torch.bfloat16, False),
        (70000.0, None, False),
        (1e300, None, False),
        (1e300, torch.float32, True),
    ):
        y = torch.full((4099,), value, dtype=torch.float64)
        checkpoint = None if checkpoint_dtype is None else torch.empty_like(y, dtype=checkpoint_dtype)
        overflow = torch.tensor(9)
        rk_update(y, [], step_size(), [], torch.empty_like(y), checkpoint, overflow_step=overflow, step=5)
        assert overflow.item() == (5 if overflows else 9)


def error_both(
    y: Tensor, k: Sequence[Tensor], rows: int = 1, atol: float = 1e-5, **outputs: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums and outputs of the kernel and of the oracle; the last velocity is in the error alone."""
    b, e = coefficients(len(k)), coefficients(len(k))[::-1]
    if len(k) > 1:
        b[-1] = e[1] = 0.0
    results = []
    for operator in (rk_error, eager.rk_error):
        copies = {name: value.clone() for name, value in outputs.items() if value is not None}
        sums = operator(y.clone(), list(k), step_size(), b, e, 1e-3, atol, 2.0**-8, rows, **copies)
        results.append([sums, *copies.values()])
    return results[0], results[1]


def assert_same_sums(found: Tensor, expected: Tensor, terms: int) -> None:
    """But for their order: sums of ``terms`` float64 of one sign."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= terms * torch.finfo(torch.float64).eps * expected).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("y_dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("compensated", [False, True])
def test_error_is_the_oracles_to_the_bit(size: int, y_dtype: torch.dtype, compensated: bool) -> None:
    """But for the order of the sums; ``test_rk_error.py`` holds the oracle against the definition."""
    y, k = torch.randn(size).to(y_dtype), [torch.randn(size).to(dtype) for dtype in DTYPES]
    lost = 1e-8 * torch.randn(size, dtype=torch.float64 if y_dtype == torch.float64 else torch.float32)
    outputs = {"y_next": torch.empty_like(y), "checkpoint": torch.empty(size, dtype=torch.float16)}
    found, expected = error_both(y, k, compensation=lost if compensated else None, **outputs)
    assert_same_sums(found[0], expected[0], size)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (4099, 1), (100, 3, 10), (3, 1024), (3, 2500)], ids=str)
def test_error_of_rows(shape: tuple[int, ...]) -> None:
    y, k = torch.randn(shape), [torch.randn(shape).to(dtype) for dtype in DTYPES]
    for rows in (1, len(y)):
        found, expected = error_both(y, k, rows, y_next=torch.empty_like(y))
        assert_same_sums(found[0], expected[0], y.numel() // rows)
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_of_layouts(layout: str) -> None:
    y, k = LAYOUTS[layout](torch.randn(2, 3, 5, 7)), [torch.randn(2, 3, 5, 7, dtype=torch.float16) for _ in range(3)]
    # a clone of a dense tensor keeps its layout
    found, expected = error_both(y, k, y_next=torch.empty_like(y))
    assert_same_sums(found[0], expected[0], y.numel())
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_error_takes_any_number_of_terms(count: int) -> None:
    y = torch.randn(1000)
    found, expected = error_both(y, [torch.randn(1000, dtype=torch.float16) for _ in range(count)])
    assert_same_sums(found[0], expected[0], 1000)


def test_error_in_place_and_of_itself() -> None:
    for compensated in (False, True):
        y, other = torch.randn(4099), torch.randn(4099)
        lost = [torch.zeros(4099) if compensated else None for _ in range(2)]
        arguments = ([y, other], step_size(), [0.5, 0.25], [0.25, -0.5], 1e-3, 1e-5, 0.0)
        expected = torch.empty_like(y)
        sums = eager.rk_error(y, *arguments, 1, expected, None, lost[0])
        assert_same_sums(rk_error(y, *arguments, 1, y, None, lost[1]), sums, 4099)
        assert torch.equal(y, expected)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero)")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("operand", [0, 1, 3])
def test_error_that_is_not_finite(operand: int, value: float) -> None:
    operands = [torch.randn(3, 1500) for _ in range(4)]
    operands[operand][1, 7] = value
    for rows in (1, 3):
        (found,), (expected,) = error_both(operands[0], operands[1:], rows)
        assert found[:, 0].isinf().tolist() == ([True] if rows == 1 else [False, True, False])
        finite = torch.where(expected.isinf(), 0.0, expected)
        assert_same_sums(torch.where(expected.isinf() & found.isinf(), 0.0, found), finite, 4500)


def test_error_without_tolerance() -> None:
    y, k = torch.zeros(17), [torch.zeros(17), torch.zeros(17)]
    assert error_both(y, k, atol=0.0)[0][0].tolist() == [[0.0, 0.0]]
    k[0][3] = 1.0
    found, expected = error_both(y, k, atol=0.0)
    assert_same_sums(found[0], expected[0], 17)
    assert found[0][0, 0] > 1e3


def test_error_of_nothing() -> None:
    y = torch.empty(0, 3)
    assert rk_error(y, [y], step_size(), [1.0], [1.0], 1e-3, 0.0, 0.0).tolist() == [[0.0, 0.0]]
    assert rk_error(y, [y], step_size(), [1.0], [1.0], 1e-3, 0.0, 0.0, 0).shape == (0, 2)


def test_errors_say_what_was_found_and_expected() -> None:
    y, h = torch.randn(4, 3), step_size()
    codes, scales = fp8_blocks.quantise(y)

    def error(y: Tensor, k: list[Tensor], b: list[float], e: list[float], *others: object) -> Tensor:
        return rk_error(y, k, h, b, e, 1e-3, 1e-5, 0.0, *others)

    def read(codes: Tensor, block_scales: Tensor, **others: object) -> None:
        rk_update(codes, [], h, [], y, block_scales=block_scales, **others)

    cases: list[tuple[str, Callable[[], object]]] = [
        (r"rk_stage: y has dtype torch.int64, expected", lambda: rk_stage(y.long(), [], h, [], torch.half)),
        (r"rk_stage: y of shape .* expected a dense", lambda: rk_stage(y[:, :2], [], h, [], torch.half)),
        (
            r"rk_stage: y of shape .* expected a dense",
            lambda: rk_stage(y[:1].expand(4, 3), [], h, [], torch.half),
        ),
        (
            r"rk_stage: h is .*shape \(1,\).*expected a 0-dim",
            lambda: rk_stage(y, [], h[None], [], torch.half),
        ),
        (r"rk_stage: h is .*float16", lambda: rk_stage(y, [], h.half(), [], torch.half)),
        (r"rk_stage: dtype is torch.int32, expected", lambda: rk_stage(y, [], h, [], torch.int32)),
        (r"rk_stage: k has 1 terms, expected 2", lambda: rk_stage(y, [y], h, [1.0, 2.0], torch.half)),
        (r"rk_stage: k\[1\] is .*\(3, 4\)", lambda: rk_stage(y, [y, y.T], h, [1.0, 2.0], torch.half)),
        (r"rk_stage: k\[0\] is .*on meta", lambda: rk_stage(y, [y.to("meta")], h, [1.0], torch.half)),
        (r"rk_update: k\[0\] is .*int64", lambda: rk_update(y, [y.long()], h, [1.0], y)),
        (r"rk_update: y_next is .*\(4, 2\)", lambda: rk_update(y, [], h, [], y[:, :2])),
        (r"rk_update: y_next has strides", lambda: rk_update(y, [], h, [], torch.empty(3, 4).T)),
        (r"rk_update: checkpoint has strides", lambda: rk_update(y, [], h, [], y, torch.empty(3, 4).T)),
        (r"rk_update: compensation is .*int32", lambda: rk_update(y, [], h, [], y, None, y.int())),
        (r"rk_error: k has 1 terms, expected 2", lambda: error(y, [y], [1.0, 2.0], [1.0, 2.0])),
        (r"rk_error: b has 1 coefficients and e 2", lambda: error(y, [y], [1.0], [1.0, 2.0])),
        (r"rk_error: k\[1\] is .*\(3, 4\)", lambda: error(y, [y, y.T], [1.0, 0.0], [0.0, 2.0])),
        (r"rk_error: checkpoint has strides", lambda: error(y, [], [], [], 1, y, torch.empty(3, 4).T)),
        (r"rk_error: rows is 3, expected 1 or .* 4", lambda: error(y, [], [], [], 3)),
        (r"rk_error: y has strides .*contiguous", lambda: error(y.T, [], [], [], 3)),
        (r"rk_stage: y has dtype torch.float8_e4m3fn, .* rk_update", lambda: rk_stage(codes, [], h, [], torch.half)),
        (r"rk_error: y has dtype torch.float8_e4m3fn, .* rk_update", lambda: error(codes, [], [], [])),
        (r"rk_error: seed is 5, expected None", lambda: error(y, [], [], [], 1, y, None, None, None, None, 5)),
        (r"rk_update: seed is 5, expected None", lambda: rk_update(y, [], h, [], y, seed=5)),
        (r"rk_update: block_scales is None.* y,", lambda: rk_update(codes, [], h, [], y)),
        (r"rk_update: y has strides", lambda: read(codes[:, :2], scales)),
        (r"rk_update: block_scales .*float16", lambda: read(codes, scales.half())),
        (r"rk_update: block_scales .*\(1, 1\)", lambda: read(codes, scales[None])),
        (r"rk_update: h is .*float16", lambda: rk_update(codes, [], h.half(), [], y, block_scales=scales)),
        (r"rk_update: y_next is .*float8_e4m3fn", lambda: rk_update(codes, [], h, [], codes, block_scales=scales)),
        (r"rk_update: seed is given, expected None", lambda: read(codes, scales, seed=5)),
        (r"rk_update: quantised is given, expected None", lambda: read(codes, scales, quantised=codes)),
        (r"rk_update: compensation is given, expected None", lambda: read(codes, scales, compensation=y)),
        (r"rk_update: block_scales is None", lambda: rk_update(y, [], h, [], y, quantised=codes)),
        (r"rk_update: quantised is None", lambda: rk_update(y, [], h, [], y, block_scales=scales)),
        (
            r"rk_update: quantised has dtype torch.float32",
            lambda: rk_update(y, [], h, [], y, quantised=y, block_scales=scales),
        ),
        (
            r"rk_update: quantised has strides .*layout of y",
            lambda: rk_update(y.T, [], h, [], y.T, quantised=codes.view(3, 4), block_scales=scales),
        ),
        (
            r"rk_update: quantised has shape \(2, 3\)",
            lambda: rk_update(y, [], h, [], y, quantised=codes[:2], block_scales=scales),
        ),
        (r"rk_error: rows is 4, expected 1", lambda: error(y, [], [], [], 4, y, None, None, codes, scales)),
        (r"rk_error: block_scales is None", lambda: error(y, [], [], [], 1, y, None, None, codes)),
        (r"rk_update: overflow_step is .*float32", lambda: rk_update(y, [], h, [], y, None, None, y[0, 0])),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
