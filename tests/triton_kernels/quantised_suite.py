"""Values of the Triton kernels that read or write 8 bits, interpreted or on a GPU; ``test_values.py`` runs it."""

from collections.abc import Sequence

import pytest
import torch
from suites import DTYPES, LAYOUTS, coefficients, step_size, update_both
from torch import Tensor

from rampde import eager, fp8_blocks
from rampde.kernels import rk_error, rk_update

pytestmark = pytest.mark.usefixtures("device_of_triton")

QUANTISED_SIZES = (1, 127, 128, 129, 1000, 1024, 1025, 4099)


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """NaN and the sign of zero included."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:overflow encountered in (multiply|cast)")
@pytest.mark.parametrize("seed", [None, 0, -1, 2**40 + 3])
@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("size", QUANTISED_SIZES)
def test_quantised_outputs_are_the_oracles_to_the_bit(size: int, y_dtype: torch.dtype, seed: int | None) -> None:
    # of all magnitudes
    y = (torch.randn(size) * 10 ** (-6 * torch.rand(size))).to(y_dtype)
    k, wide = [torch.randn(size).to(dtype) for dtype in DTYPES], torch.promote_types(y_dtype, torch.float32)
    lost = 1e-4 * torch.randn(size, dtype=wide)
    for compensation in (None, lost):
        b = coefficients(len(k))
        outcomes = []
        for of_update, of_error in ((rk_update, rk_error), (eager.rk_update, eager.rk_error)):
            for operator in (of_update, of_error):
                y_next, quantised = torch.empty_like(y, dtype=wide), fp8_blocks.empty_like(y)
                copy = None if compensation is None else compensation.clone()
                if operator is of_update:
                    operator(y, k, step_size(), b, y_next, None, copy, None, 0, *quantised, seed)
                else:
                    operator(y, k, step_size(), b, b, 1e-3, 1e-5, 0.0, 1, y_next, None, copy, *quantised, seed)
                outcomes.append([y_next, *quantised])
        for outcome in outcomes[1:]:
            assert_same_bits(outcome, outcomes[0])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("y_dtype", [torch.float64, torch.float32])
def test_quantised_special_values(y_dtype: torch.dtype, seed: int | None) -> None:
    normal = torch.randn(128, dtype=torch.float64).clamp(-3, 3)
    bits = torch.randint(-(2**31), 2**31, (50 * 128,)).to(torch.int32).view(torch.float32)
    special = [normal * 0.0, normal * 2.0**-140, normal * 2.0**-120, normal * 2.0**126, bits.double()]
    special += [torch.full((128,), value, dtype=torch.float64) for value in (torch.nan, torch.inf, -torch.inf)]
    special += [torch.where(torch.rand(128) < 0.5, normal, value) for value in (torch.nan, -torch.inf, 1e300)]
    special += [(torch.arange(256) + 0.5) / 2**9, 448 * torch.arange(3, dtype=torch.float64)]
    change = torch.cat(special).to(y_dtype)
    y, quantised = torch.ones_like(change), fp8_blocks.empty_like(change)
    rk_update(y, [change], step_size(1.0), [-1.0], torch.empty_like(y), None, None, None, 0, *quantised, seed)
    assert_same_bits(quantised, fp8_blocks.quantise(change, seed))
    rk_update(y, [], step_size(), [], torch.empty_like(y), None, None, None, 0, *quantised, seed)
    assert_same_bits(quantised, fp8_blocks.quantise(torch.zeros_like(y), seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_layouts(layout: str) -> None:
    y, k = LAYOUTS[layout](torch.randn(2, 3, 5, 7)), [torch.randn(2, 3, 5, 7, dtype=torch.float16)]
    y_next, expected = torch.empty_like(y), fp8_blocks.empty_like(y)
    eager.rk_update(y, k, step_size(), [0.5], y_next, quantised=expected[0], block_scales=expected[1], seed=5)
    codes = torch.zeros(y.numel() + 1, dtype=torch.float8_e4m3fn)[1:].as_strided(y.shape, y.stride())
    scales = torch.zeros(len(expected[1]) + 1)[1:]
    rk_update(y, k, step_size(), [0.5], y_next, quantised=codes, block_scales=scales, seed=5)
    assert_same_bits([codes, scales], expected)
    for step in (codes, expected[0]):
        found, independent = update_both(
            step, [y_next], step_size(1.0), [1.0], y_next=torch.empty_like(y), block_scales=scales
        )
        assert_same_bits([found["y_next"]], [independent["y_next"]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("size", QUANTISED_SIZES)
def test_a_step_in_8_bits_is_read(size: int, dtype: torch.dtype) -> None:
    codes, scales = fp8_blocks.quantise(torch.randn(size))
    k = [torch.randn(size).to(k_dtype) for k_dtype in DTYPES]
    for count in (0, 1, 4):
        outputs = {"y_next": torch.empty(size, dtype=dtype), "checkpoint": torch.empty(size, dtype=torch.float16)}
        found, independent = update_both(
            codes, k[:count], step_size(), coefficients(count), block_scales=scales, **outputs
        )
        for name in outputs:
            assert_same_bits([found[name]], [independent[name]])


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_code_and_scale(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(247).view(torch.float8_e4m3fn)
    scales = torch.ones(2 * 247).ldexp(torch.arange(-126, 121).repeat_interleave(2))
    found, expected = torch.empty(codes.shape, dtype=dtype), fp8_blocks.dequantise(codes, scales, dtype)
    rk_update(codes, [], step_size(), [], found, block_scales=scales)
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits([found.nan_to_num(0.0)], [expected.nan_to_num(0.0)])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_quantised_overflow_and_nothing() -> None:
    y, k = torch.full((300,), 70000.0), torch.randn(300)
    codes, scales = fp8_blocks.empty_like(y)
    overflow, checkpoint = torch.tensor(9), torch.empty(300, dtype=torch.float16)
    rk_update(y, [k], step_size(1.0), [-1.0], torch.empty_like(y), checkpoint, None, overflow, 5, codes, scales)
    assert overflow.item() == 5
    assert_same_bits([codes, scales], fp8_blocks.quantise(k))
    rk_update(
        codes, [y], step_size(1.0), [1.0], torch.empty_like(y), checkpoint, None, overflow, 2, block_scales=scales
    )
    assert overflow.item() == 2
    y = torch.empty(0, 3)
    codes, scales = fp8_blocks.empty_like(y)
    rk_update(y, [], step_size(), [], torch.empty_like(y), quantised=codes, block_scales=scales)
    rk_update(codes, [y], step_size(), [1.0], torch.empty_like(y), block_scales=scales)
