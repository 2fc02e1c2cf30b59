"""Steps in 8 bits: the format itself, in plain ATen; each operator's test holds its backends against it."""

import pytest
import torch
from operands import DTYPES, LAYOUTS, bytes_of, random, same_bits
from torch import Tensor

from rampde import fp8_blocks
from rampde.fp8_blocks import BLOCK, dequantise, quantise

SIZES = (0, 1, 127, 128, 129, 1000, 1025)
# of the codes from 0 on, which float32 has exactly
MAGNITUDES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
LARGEST = float(MAGNITUDES[-1])


def pinned(values: Tensor, scale: float = 1.0) -> Tensor:
    """``values`` in blocks that begin with the largest code, so that their scale is ``scale``."""
    blocks = torch.full((-(-values.numel() // (BLOCK - 1)), BLOCK), LARGEST, dtype=values.dtype)
    blocks[:, 1:] = torch.nn.functional.pad(values, (0, -values.numel() % (BLOCK - 1))).view(-1, BLOCK - 1)
    return (blocks * scale).view(-1)


def nearest(values: Tensor) -> Tensor:
    """The nearest codes to ``values``, the even one of two, by looking at all of them."""
    distances = (values.double().abs()[:, None] - MAGNITUDES.double()).abs()
    even = torch.arange(127) % 2 == 0
    # of equal distances the first is taken
    order = torch.cat([torch.arange(127)[even], torch.arange(127)[~even]])
    return order[distances[:, order].argmin(1)].to(torch.uint8) | torch.where(values.signbit(), 0x80, 0).to(torch.uint8)


def test_formats_and_shapes() -> None:
    y = random((3, 100), torch.float64)
    for codes, scales in (quantise(y), fp8_blocks.empty_like(y)):
        assert (codes.dtype, codes.shape, codes.stride()) == (torch.float8_e4m3fn, y.shape, y.stride())
        assert (scales.dtype, scales.shape) == (torch.float32, (3,))
    for size in SIZES:
        assert quantise(torch.ones(size))[1].tolist() == [2.0**-8] * -(-size // BLOCK)


def test_codes_are_the_nearest() -> None:
    """Codes, what lies in the middle of two and next to it, in the subnormals too."""
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(limit)) for limit in (0.0, torch.inf)]
    values = torch.cat([MAGNITUDES, middles, *beside, torch.rand(5000) * LARGEST, torch.rand(5000) * 2**-6])
    values = pinned(torch.cat([values, -values]))
    codes, scales = quantise(values)
    assert bool((scales == 1).all())
    assert torch.equal(codes.view(torch.uint8), nearest(values))
    for scale in (2.0**-100, 2.0**119):
        scaled, scales = quantise(values * scale)
        assert bool((scales == scale).all())
        assert same_bits([scaled], [codes])


@pytest.mark.parametrize("exponent", [-149, -140, -126, -119, -118, -117, -20, 0, 8, 100, 118, 119])
def test_scales_are_the_least_powers_of_two(exponent: int) -> None:
    for mantissa in (1.0, 1 + 2**-23, 1.5, 1.75 - 2**-23, 1.75, 1.75 + 2**-23, 2 - 2**-23):
        largest = torch.tensor(mantissa, dtype=torch.float64).ldexp(torch.tensor(exponent)).float()
        values = torch.tensor([0.25, -1.0, 0.5]) * largest
        (scale,) = quantise(values)[1].tolist()
        exact, least = largest.item(), 2.0**fp8_blocks.LEAST_EXPONENT
        assert torch.tensor(scale, dtype=torch.float64).frexp().mantissa == 0.5
        assert exact <= LARGEST * scale
        assert scale == least or (scale > least and exact > LARGEST * scale / 2)


def test_zeros_have_scale_one() -> None:
    codes, scales = quantise(torch.cat([torch.zeros(BLOCK), torch.full((3,), -0.0)]))
    assert scales.tolist() == [1.0, 1.0]
    assert codes.view(torch.uint8).tolist() == [0] * BLOCK + [0x80] * 3


@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_not_finite_becomes_nan_and_leaves_the_others_alone(seed: int | None) -> None:
    values = torch.randn(300)
    clean = values.clone()
    bad = torch.zeros(300, dtype=torch.bool)
    bad[[0, 5, 130, 299]] = True
    values[bad] = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan])
    clean[bad] = 0.0
    codes, scales = quantise(values, seed)
    expected, expected_scales = quantise(clean, seed)
    assert same_bits([scales], [expected_scales])
    assert codes.view(torch.uint8)[bad].tolist() == [0x7F] * 4
    assert torch.equal(codes.view(torch.uint8)[~bad], expected.view(torch.uint8)[~bad])
    assert torch.equal(dequantise(codes, scales, torch.float32).isnan(), bad)
    # finite in float64, but not on the way to 8 bits
    codes, scales = quantise(torch.tensor([1e300, 1.0], dtype=torch.float64), seed)
    assert codes.view(torch.uint8).tolist() == [0x7F, 0x78]
    assert scales.tolist() == [2.0**-8]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_goes_through_float32(dtype: torch.dtype, seed: int | None) -> None:
    values = random((1000,), dtype)
    assert same_bits(quantise(values, seed), quantise(values.float(), seed))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_those_of_memory(layout: str, seed: int | None) -> None:
    values = random(LAYOUTS[layout], torch.float32, layout=layout)
    codes, scales = quantise(values, seed)
    in_memory = torch.as_strided(values, (values.numel(),), (1,))
    expected, expected_scales = quantise(in_memory.clone(), seed)
    assert codes.stride() == values.stride()
    assert same_bits([scales], [expected_scales])
    assert same_bits([torch.as_strided(codes, (values.numel(),), (1,))], [expected])
    restored = dequantise(codes, scales, torch.float32)
    assert restored.stride() == values.stride()
    assert same_bits(
        [torch.as_strided(restored, (values.numel(),), (1,))], [dequantise(expected, scales, torch.float32)]
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_code_times_its_scale(size: int) -> None:
    codes = torch.arange(size).to(torch.uint8).view(torch.float8_e4m3fn)
    exponents = torch.arange(-(-size // BLOCK)) * 30 - 126
    scales = torch.ones(len(exponents)).ldexp(exponents)
    exact = codes.double() * scales.double().repeat_interleave(BLOCK)[:size]
    for dtype in (torch.float64, torch.float32):
        found = dequantise(codes, scales, dtype)
        assert torch.equal(found.isnan(), exact.isnan())
        assert same_bits([found.nan_to_num(0.0)], [exact.to(dtype).nan_to_num(0.0)])


@pytest.mark.parametrize("scale", [2.0**-126, 1.0, 2.0**119])
def test_codes_are_exact_both_ways(scale: float) -> None:
    values = pinned(torch.cat([MAGNITUDES, -MAGNITUDES]), scale)
    for seed in (None, 0, 1):
        assert same_bits([dequantise(*quantise(values, seed), torch.float32)], [values])


def test_the_largest_floats_may_round_to_infinity() -> None:
    """As anything beyond the largest number does: in 8 bits the next one below 2^128 is 15/16 of it."""
    values = torch.tensor([torch.finfo(torch.float32).max, 1.9375 * 2.0**127, 1.93 * 2.0**127])
    assert dequantise(*quantise(values), torch.float32).tolist() == [torch.inf, torch.inf, 1.875 * 2.0**127]
    assert dequantise(*quantise(values), torch.float64).tolist() == [2.0**128, 2.0**128, 1.875 * 2.0**127]


@pytest.mark.parametrize("scale", [2.0**-126, 1.0, 2.0**100])
def test_random_rounding_takes_a_neighbour(scale: float) -> None:
    values = pinned(torch.cat([torch.randn(3000) * 20, torch.randn(3000) * 2**-7]).clamp(-LARGEST, LARGEST), scale)
    exact = (values.double() / scale).abs()
    above = torch.searchsorted(MAGNITUDES.double(), exact)
    codes = (quantise(values, 5)[0].view(torch.uint8) & 0x7F).long()
    below = torch.where(MAGNITUDES.double()[above] == exact, above, above - 1)
    assert bool(((codes == above) | (codes == below)).all())
    assert bool((codes == above).any())
    assert bool((codes == below).any())
    signs = quantise(values, 5)[0].view(torch.uint8) >> 7
    assert torch.equal(signs.bool(), values.signbit())


def test_random_rounding_is_right_on_average() -> None:
    """Over seeds, and over elements, to six standard deviations of a mean."""
    seeds, values = 2000, pinned(torch.tensor([1.03, -1.03, 7.7, 200.1, -0.3, 2**-6.5, -(2**-8.2), 2**-11.5]))
    _, exponent = values.double().abs().frexp()
    quantum = torch.ones_like(values, dtype=torch.float64).ldexp((exponent - 1).clamp(min=-6) - 3)
    rounded = torch.stack([dequantise(*quantise(values, seed), torch.float64) for seed in range(seeds)])
    # what is rounded to a quantum has half of it as its largest standard deviation; random numbers have 20 bits
    error = (rounded.mean(0) - values.double()).abs()
    assert bool((error <= quantum * (6 * 0.5 / seeds**0.5 + 2.0**-20)).all())
    many = torch.full((100 * BLOCK,), 1.03)
    for seed in range(20):
        error = (dequantise(*quantise(many, seed), torch.float64).mean() - many[0].double()).abs()
        assert error <= 0.125 * (6 * 0.5 / len(many) ** 0.5 + 2.0**-20)


def test_random_rounding_is_a_function_of_seed_and_offset() -> None:
    values = torch.rand(1000) + 1
    first = {seed: bytes_of(quantise(values, seed)[0]) for seed in (0, 1, 2, -1, 2**32, 2**32 + 1, -(2**63))}
    assert len(set(first.values())) == len(first)
    for seed, expected in first.items():
        assert bytes_of(quantise(values, seed)[0]) == expected
    # neighbouring seeds are not each other's, moved by some elements
    one, two = (torch.frombuffer(bytearray(first[seed]), dtype=torch.uint8) for seed in (0, 1))
    assert all(not torch.equal(one[shift : shift + 200], two[:200]) for shift in range(800))


def test_random_numbers_are_hashes() -> None:
    """Of an element's offset and a seed, written out in Python integers."""

    def finalise(word: int) -> int:
        word ^= word >> 16
        word = word * 0x85EBCA6B % 2**32
        word ^= word >> 13
        word = word * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    assert finalise(1) == 0x514E28B7
    for seed in (0, 1, 12345, 2**40 + 17, -1, -(2**63)):
        word = finalise(seed % 2**32 ^ finalise(seed % 2**64 // 2**32))
        assert fp8_blocks.seed_word(seed) == word
        expected = [(finalise((offset + word) % 2**32) >> 12) / 2**20 for offset in range(300)]
        assert fp8_blocks.uniform(300, seed, torch.device("cpu")).tolist() == expected
