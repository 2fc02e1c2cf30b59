"""End of an attempted Runge-Kutta step with the norm of its error, on every backend."""

import math

import pytest
import torch
from operands import (
    DTYPES,
    LAYOUTS,
    OPCHECKS_IN_8_BITS,
    SHAPES,
    Backend,
    assert_deterministic,
    mixed,
    random,
    same_bits,
    scalar,
)
from tolerance import assert_within_budget
from torch import Tensor

from rampde import eager, fp8_blocks, ops

B = [1 / 6, 1 / 3, -0.7, 0.0, 1.5, -0.4, 0.0, 0.05] * 2
E = [0.1, -0.3, 0.0, 0.4, -0.2, 0.05, -0.1, 0.0] * 2
RTOL, ATOL, ROUNDOFF = 1e-3, 3e-5, 2.0**-8
ROW_SHAPES = ((5, 7), (1, 9), (4099, 1), (100, 3, 10), (3, 1024), (3, 2500), (700, 2, 3), (0, 3), (3, 0))


def exact_step(y: Tensor, k: list[Tensor], h: Tensor, b: list[float]) -> Tensor:
    return sum((h.double() * weight * term.double() for term, weight in zip(k, b, strict=True) if weight), y.double())


def composed_step(y: Tensor, k: list[Tensor], h: Tensor, b: list[float], dtype: torch.dtype) -> Tensor:
    """Another order of the same operations: the velocities are summed first."""
    accumulate = eager.accumulation_dtype(y.dtype)
    slope = sum(
        (term.to(accumulate) * weight for term, weight in zip(k, b, strict=True)), torch.zeros_like(y, dtype=accumulate)
    )
    return (y.to(accumulate) + h.to(accumulate) * slope).to(dtype)


def assert_sums(found: Tensor, y: Tensor, k: list[Tensor], h: Tensor, rows: int = 1) -> None:
    """Both sums as the definition has them in float64, up to what rounding in the accumulation dtype costs.

    Each of a handful of operations on an element rounds once, relative to the sum of the magnitudes, and so does
    each of the additions in float64, all of whose terms have one sign.
    """
    b, e = B[: len(k)], E[: len(k)]
    total, zero = exact_step(y, k, h, b), torch.zeros_like(y, dtype=torch.float64)
    tolerance = ATOL + RTOL * torch.maximum(y.double().abs(), total.abs())
    parts = [h.double() * weight * term.double() / tolerance for term, weight in zip(k, e, strict=True) if weight]
    ratio, share = sum(parts, zero), ROUNDOFF**2 * sum((part.square() for part in parts), zero)
    terms = [h.double() * weight * term.double() for term, weight in zip(k, b, strict=True)]
    of_step = sum((term.abs() for term in terms), y.double().abs())
    eps = (len(k) + 6) * torch.finfo(eager.accumulation_dtype(y.dtype)).eps
    relative = eps * (1 + RTOL * of_step / tolerance)
    off = relative * sum((part.abs() for part in parts), zero)
    exact = torch.stack([ratio.square(), share], -1)
    allowed = torch.stack([(2 * ratio.abs() + off) * off, (2 + relative) * relative * share], -1)
    allowed += y.numel() * torch.finfo(torch.float64).eps * exact
    exact, allowed = (x.reshape(rows, y.numel() // max(rows, 1), 2).sum(1) for x in (exact, allowed))
    assert found.dtype == torch.float64
    assert found.shape == (rows, 2)
    assert found.device == y.device
    assert bool(((found - exact).abs() <= allowed).all())


@pytest.mark.parametrize("stages", [1, 3, 7, 16])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_precision(backend: Backend, state: torch.dtype, saved: torch.dtype, stages: int) -> None:
    y = random((777,), state, backend.device)
    k, b, e, h = mixed(stages, y), B[:stages], E[:stages], scalar(-0.1, backend.device)
    y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=saved)
    sums = backend.rk_error(y, k, h, b, e, RTOL, ATOL, ROUNDOFF, 1, y_next, checkpoint)
    accumulation = eager.accumulation_dtype(state)
    for result in (y_next, checkpoint):
        assert_within_budget(result, composed_step(y, k, h, b, result.dtype), exact_step(y, k, h, b), accumulation)
    assert_sums(sums, y, k, h)


@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (40_001,)], ids=str)
def test_sizes(backend: Backend, shape: tuple[int, ...], velocity: torch.dtype) -> None:
    y = random(shape, torch.float32, backend.device)
    k, b, e, h = mixed(4, y, [velocity]), B[:4], E[:4], scalar(0.1, backend.device)
    y_next, expected = torch.empty_like(y), torch.empty_like(y)
    backend.rk_update(y, k, h, b, expected)
    assert_sums(backend.rk_error(y, k, h, b, e, RTOL, ATOL, ROUNDOFF, 1, y_next), y, k, h)
    assert same_bits([y_next], [expected])


@pytest.mark.parametrize("velocity_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, velocity_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, velocity_layout) else LAYOUTS[layout]
    y = random(shape, torch.float32, backend.device, layout)
    k, b, e, h = mixed(3, y, layout=velocity_layout), B[:3], E[:3], scalar(0.1, backend.device)
    y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=torch.float16)
    sums = backend.rk_error(y, k, h, b, e, RTOL, ATOL, ROUNDOFF, 1, y_next, checkpoint)
    assert_within_budget(y_next, composed_step(y, k, h, b, torch.float32), exact_step(y, k, h, b))
    assert_within_budget(checkpoint, composed_step(y, k, h, b, torch.float16), exact_step(y, k, h, b))
    assert_sums(sums, y, k, h)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_rows(backend: Backend, shape: tuple[int, ...], state: torch.dtype) -> None:
    y = random(shape, state, backend.device)
    k, b, e, h = mixed(5, y, layout="permuted"), B[:5], E[:5], scalar(0.1, backend.device)
    y_next, whole = torch.empty_like(y), torch.empty_like(y)
    sums = backend.rk_error(y, k, h, b, e, RTOL, ATOL, ROUNDOFF, len(y), y_next)
    assert_sums(sums, y, k, h, len(y))
    assert_sums(backend.rk_error(y, k, h, b, e, RTOL, ATOL, ROUNDOFF, 1, whole), y, k, h)
    assert same_bits([y_next], [whole])


def test_a_scalar_state(backend: Backend) -> None:
    y, h = random((), torch.float64, backend.device), scalar(0.1, backend.device)
    k = mixed(3, y)
    y_next = torch.empty_like(y)
    assert_sums(backend.rk_error(y, k, h, B[:3], E[:3], RTOL, ATOL, ROUNDOFF, 1, y_next), y, k, h)
    assert torch.allclose(y_next, exact_step(y, k, h, B[:3]))


@pytest.mark.parametrize("state", DTYPES)
def test_in_place(backend: Backend, state: torch.dtype) -> None:
    y = random((1001,), state, backend.device)
    k, h = [*mixed(4, y), y], scalar(0.1, backend.device)
    expected = torch.empty_like(y)
    sums = backend.rk_error(y, k, h, B[:5], E[:5], RTOL, ATOL, ROUNDOFF, 1, expected)
    again = backend.rk_error(y, k, h, B[:5], E[:5], RTOL, ATOL, ROUNDOFF, 1, y)
    assert same_bits([y, again], [expected, sums])


@pytest.mark.parametrize("seed", [None, 0, -5])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("size", [0, 1, 127, 129, 1000, 1025, 3001])
@pytest.mark.parametrize("state", DTYPES)
def test_the_step_is_that_of_rk_update(
    backend: Backend, state: torch.dtype, size: int, compensated: bool, seed: int | None
) -> None:
    """To the bit, in 8 of them too; and the sums do not depend on what is written."""
    y, h = random((size,), state, backend.device), scalar(1e-4, backend.device)
    k, lost = mixed(7, y), random((size,), eager.accumulation_dtype(state), backend.device) * 1e-8
    outcomes, sums = [], []
    for operator in ("rk_update", "rk_error"):
        y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=torch.bfloat16)
        compensation, quantised = lost.clone() if compensated else None, fp8_blocks.empty_like(y)
        if operator == "rk_update":
            backend.rk_update(y, k, h, B[:7], y_next, checkpoint, compensation, None, 0, *quantised, seed)
        else:
            arguments = (y, k, h, B[:7], E[:7], RTOL, ATOL, ROUNDOFF, 1)
            sums.append(backend.rk_error(*arguments, y_next, checkpoint, compensation, *quantised, seed))
            for outputs in ((), (torch.empty_like(y),), (None, torch.empty_like(checkpoint))):
                sums.append(backend.rk_error(*arguments, *outputs))
            sums.append(backend.rk_error(*arguments, None, None, None, *fp8_blocks.empty_like(y)))
        outcomes.append([y_next, checkpoint, *quantised, *([compensation] if compensation is not None else [])])
    assert same_bits(*outcomes)
    if not compensated:
        assert all(same_bits([sums[0]], [other]) for other in sums[1:])
        assert_sums(sums[0], y, k, h)


def test_term_with_zero_weight_is_not_read(backend: Backend) -> None:
    y, h = random((100,), torch.float32, backend.device), scalar(0.1, backend.device)
    k = [torch.full_like(y, torch.nan), *mixed(2, y)]
    first, second, third = (torch.empty_like(y) for _ in range(3))
    clean = backend.rk_error(y, k[1:], h, B[:2], E[:2], RTOL, ATOL, ROUNDOFF, 1, first)
    sums = backend.rk_error(y, k, h, [0.0, *B[:2]], [0.0, *E[:2]], RTOL, ATOL, ROUNDOFF, 1, second)
    assert same_bits([first, clean], [second, sums])
    # the last velocity of a method that reuses it: in the error alone
    sums = backend.rk_error(y, k, h, [0.0, *B[:2]], [0.5, *E[:2]], RTOL, ATOL, ROUNDOFF, 1, third)
    assert same_bits([first], [third])
    assert sums.tolist() == [[math.inf, 0.0]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["y", "step", "error"])
@pytest.mark.parametrize("shape", [(6, 7), (3, 2000)], ids=str)
def test_what_is_not_finite_makes_its_row_infinite(
    backend: Backend, shape: tuple[int, ...], where: str, value: float
) -> None:
    y, h = random(shape, torch.float32, backend.device), scalar(0.1, backend.device)
    k, b, e = mixed(3, y, [torch.float32]), [1.0, 0.5, 0.0], [0.5, 0.0, -0.5]
    {"y": y, "step": k[1], "error": k[2]}[where][1, -1] = value
    for rows in (1, len(y)):
        sums = backend.rk_error(y, k, h, b, e, RTOL, ATOL, ROUNDOFF, rows, torch.empty_like(y))
        bad = sums[:, 0].isinf()
        assert bad.nonzero().tolist() == [[1 if rows > 1 else 0]]
        assert bool((sums[:, 0] > 0).all())
        assert bool(sums[:, 1].isfinite().all())
    # a step beyond the range is as bad, even where its error would be zero
    y = torch.full_like(y, 3e38)
    sums = backend.rk_error(y, [torch.ones_like(y)], scalar(3e38, backend.device), [1.0], [0.0], RTOL, ATOL, ROUNDOFF)
    assert sums.tolist() == [[math.inf, 0.0]]


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_tolerance_of_zero(backend: Backend, state: torch.dtype) -> None:
    """Where nothing moves there is no error, whatever the tolerance."""
    y, h = random((50,), state, backend.device), scalar(0.1, backend.device)
    k = mixed(5, y)
    for tensor in (y, *k):
        tensor[::2] = 0.0
    sums = backend.rk_error(y, k, h, B[:5], E[:5], RTOL, 0.0, ROUNDOFF)
    alone = backend.rk_error(y[1::2].clone(), [x[1::2].clone() for x in k], h, B[:5], E[:5], RTOL, 0.0, ROUNDOFF)
    assert bool(((sums - alone).abs() <= 50 * torch.finfo(torch.float64).eps * alone).all())
    assert backend.rk_error(y[::2].clone(), [], h, [], [], 0.0, 0.0, ROUNDOFF).tolist() == [[0.0, 0.0]]
    assert backend.rk_error(y, k, h, B[:5], E[:5], 0.0, 0.0, 0.0)[0, 0] > 1e60


@pytest.mark.parametrize("exponent", [-70, 70])
def test_sums_have_no_units(backend: Backend, exponent: int) -> None:
    """A state of 1e-21 or 1e21 has the same sums to the bit: its squares would not fit float32."""
    y, h = random((777,), torch.float32, backend.device), scalar(0.1, backend.device)
    k, unit = mixed(5, y, [torch.float32, torch.float64]), 2.0**exponent
    sums = backend.rk_error(y, k, h, B[:5], E[:5], RTOL, ATOL, ROUNDOFF)
    scaled = backend.rk_error(y * unit, [x * unit for x in k], h, B[:5], E[:5], RTOL, ATOL * unit, ROUNDOFF)
    assert same_bits([sums], [scaled])


def test_the_second_sum_is_what_rounded_velocities_cost(backend: Backend) -> None:
    y, h = random((20_000,), torch.float32, backend.device), scalar(0.1, backend.device)
    k, b = mixed(7, y, [torch.float32]), [0.0] * 7
    rounded = [x.bfloat16() for x in k]
    lost = [x - x.bfloat16() for x in k]
    share = backend.rk_error(y, rounded, h, b, E[:7], RTOL, ATOL, torch.finfo(torch.bfloat16).eps / 2)[0, 1]
    cost = backend.rk_error(y, lost, h, b, E[:7], RTOL, ATOL, 0.0)
    # the bound of one rounding for its mean: between a third and a twelfth of it, by where numbers lie in a binade
    assert share / 12 < cost[0, 0] < share / 3
    assert cost[0, 1] == 0


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("state", DTYPES)
def test_cpu_agrees_with_the_oracle_to_the_last_bit(state: torch.dtype, compensated: bool) -> None:
    """But for the order of the sums, of terms of one sign."""
    y, h = random((5000, 1), state), scalar(0.37, "cpu")
    k, lost = mixed(7, y), random((5000, 1), eager.accumulation_dtype(state)) * 1e-7
    outcomes, sums, single = [], [], []
    for rk_error in (ops.rk_error, eager.rk_error):
        y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=torch.bfloat16)
        compensation = lost.clone() if compensated else None
        arguments = (y, k, h, B[:7], E[:7], RTOL, ATOL, ROUNDOFF)
        single.append(rk_error(*arguments, 5000))
        sums.append(rk_error(*arguments, 1, y_next, checkpoint, compensation))
        outcomes.append([y_next, checkpoint, *([compensation] if compensated else [])])
    assert same_bits(*outcomes)
    assert same_bits(single[:1], single[1:])
    assert bool(((sums[0] - sums[1]).abs() <= y.numel() * torch.finfo(torch.float64).eps * sums[1]).all())


@pytest.mark.parametrize("rows", [1, 7])
def test_deterministic(backend: Backend, rows: int) -> None:
    y, h = random((7, 100_003), torch.float32, backend.device), scalar(0.1, backend.device)
    k = mixed(4, y)

    def call() -> list[Tensor]:
        y_next, quantised = torch.empty_like(y), fp8_blocks.empty_like(y)
        arguments = (y, k, h, B[:4], E[:4], RTOL, ATOL, ROUNDOFF, rows, y_next)
        if rows != 1:
            return [y_next, backend.rk_error(*arguments)]
        return [y_next, backend.rk_error(*arguments, None, None, *quantised, 5), *quantised]

    assert_deterministic(call)


@pytest.mark.parametrize("complete", [False, True])
def test_opcheck(complete: bool) -> None:
    y = random((4, 3), torch.float32)
    arguments = [y, mixed(3, y), scalar(0.1, "cpu"), B[:3], E[:3], RTOL, ATOL, ROUNDOFF]
    if complete:
        arguments += [4, torch.zeros_like(y), torch.zeros_like(y).half(), torch.zeros_like(y)]
    torch.library.opcheck(ops.rk_error, tuple(arguments))


@pytest.mark.parametrize("seed", [None, 5])
def test_opcheck_quantised(seed: int | None) -> None:
    y = random((4, 3), torch.float32)
    arguments = (y, mixed(3, y), scalar(0.1, "cpu"), B[:3], E[:3], RTOL, ATOL, ROUNDOFF)
    outputs = (1, torch.zeros_like(y), None, None, *fp8_blocks.quantise(y), seed)
    torch.library.opcheck(ops.rk_error, (*arguments, *outputs), test_utils=OPCHECKS_IN_8_BITS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(y: Tensor, k: Tensor, h: Tensor) -> list[Tensor]:
        y_next, checkpoint, compensation = torch.empty_like(y), k.clone(), torch.zeros_like(y)
        arguments = (y, [k, k + 1], h, [0.5, 0.25], [0.1, -0.2], RTOL, ATOL, ROUNDOFF)
        codes, scales = fp8_blocks.empty_like(y)
        sums = ops.rk_error(*arguments, 1, y_next, checkpoint, compensation, codes, scales, 5)
        return [sums.sqrt(), y_next + 1, checkpoint, compensation, codes, scales * 2]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    arguments = (random((12,), torch.float32), random((12,), torch.float16), scalar(0.1, "cpu"))
    assert same_bits(compiled(*arguments), step(*arguments))


def test_meta_tensors() -> None:
    y, h = torch.empty(4, 3, device="meta"), torch.empty((), device="meta")
    for rows in (1, 4):
        sums = ops.rk_error(y, [y], h, [1.0], [0.5], RTOL, ATOL, ROUNDOFF, rows, torch.empty_like(y))
        assert sums.shape == (rows, 2)
        assert sums.dtype == torch.float64


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_next": torch.ones(4)}, "y_next has shape [4], expected that of y, [4, 2]"),
        ({"y_next": torch.ones(2, 4).t()}, "y_next is laid out in memory differently than y"),
        ({"checkpoint": torch.ones(4, 2).int()}, "checkpoint has dtype int32, expected float64"),
        ({"compensation": torch.ones(())}, "compensation has shape [], expected that of y, [4, 2]"),
        ({"b": [1.0]}, "k has 2 tensors, but b has 1 coefficients"),
        ({"e": [1.0]}, "k has 2 tensors, but e has 1 coefficients"),
        ({"k": [torch.ones(4, 2), torch.ones(2)]}, "k[1] has shape [2], expected that of y, [4, 2]"),
        ({"rows": 2}, "rows is 2, expected 1 or the size of y along dimension 0, 4"),
        ({"rows": 4, "y": torch.ones(2, 4).t()}, "y of shape [4, 2] is not contiguous, expected so for rows"),
        (
            {"k": [torch.ones(4, 2)] * 17, "b": [0.0] * 17, "e": [1.0] * 17},
            "k[16] is one too many, expected at most 16",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_name_argument_found_and_expected(change: dict, message: str) -> None:
    y = torch.ones(4, 2)
    valid = {"y": y, "k": [y, y], "h": torch.tensor(0.1), "b": [1.0, 1.0], "e": [1.0, -1.0]}
    valid |= {"rtol": RTOL, "atol": ATOL, "roundoff": ROUNDOFF}
    with pytest.raises(RuntimeError) as error:
        ops.rk_error(**(valid | change))
    assert str(error.value).startswith("rampde::rk_error: " + message)


CODES, SCALES = torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.zeros(1)


@pytest.mark.parametrize(
    ("quantised", "block_scales", "rows", "message"),
    [
        (CODES, SCALES, 4, "rows is 4, expected 1 where quantised is given"),
        (CODES, None, 1, "block_scales is None, expected the scales of quantised"),
        (None, SCALES, 1, "quantised is None, expected a .*float8_e4m3fn tensor"),
        (CODES.float(), SCALES, 1, "quantised has dtype .*float32, expected .*float8_e4m3fn"),
        (CODES, torch.zeros(2), 1, r"block_scales .*shape .2.*, expected .*1.*, one for each 128 elements"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_of_quantised_outputs(
    backend: Backend, quantised: Tensor | None, block_scales: Tensor | None, rows: int, message: str
) -> None:
    y, h = torch.ones(4, 2, device=backend.device), scalar(0.1, backend.device)
    y_next = torch.zeros_like(y)
    quantised, block_scales = (None if x is None else x.to(backend.device) for x in (quantised, block_scales))
    arguments = (y, [y], h, [1.0], [0.5], RTOL, ATOL, ROUNDOFF, rows, y_next)
    with pytest.raises((RuntimeError, ValueError), match="rk_error: " + message):
        backend.rk_error(*arguments, quantised=quantised, block_scales=block_scales)
    # nothing was written
    assert not y_next.any()


def test_a_seed_needs_something_to_round(backend: Backend) -> None:
    y, h = torch.ones(4, 2, device=backend.device), scalar(0.1, backend.device)
    y_next = torch.zeros_like(y)
    with pytest.raises((RuntimeError, ValueError), match="rk_error: seed is 5, expected None without quantised"):
        backend.rk_error(y, [y], h, [1.0], [0.5], RTOL, ATOL, ROUNDOFF, 1, y_next, seed=5)
    assert not y_next.any()
