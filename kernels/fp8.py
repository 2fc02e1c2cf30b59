"""Device functions for steps in 8 bits, whose codes and scales :mod:`rampde.fp8_blocks` describes.

Codes are uint8 here, and their bits are handled as integers: not every architecture converts them, and the
interpreter does not round as they need it. A program holds whole blocks of scales.
"""

import triton
import triton.language as tl

from rampde import fp8_blocks

SCALE_BLOCK = tl.constexpr(fp8_blocks.BLOCK)
OF_HIGH_WORD = tl.constexpr(fp8_blocks.OF_HIGH_WORD)


@triton.jit
def _scale_offsets(size: tl.constexpr):  # [size // SCALE_BLOCK]
    """Where the scales of this program's ``size`` elements are."""
    scales: tl.constexpr = size // SCALE_BLOCK
    return tl.program_id(0).to(tl.int64) * scales + tl.arange(0, scales)


@triton.jit
def _to_elements(of_blocks):  # [BLOCK]
    """Repeats what all elements of a scale's block share."""
    scales: tl.constexpr = of_blocks.shape[0]
    return tl.reshape(tl.broadcast_to(of_blocks[:, None], (scales, SCALE_BLOCK)), (scales * SCALE_BLOCK,))


@triton.jit
def dequantised(codes_ptr, scales_ptr, numel, dtype: tl.constexpr, offsets, mask):  # [BLOCK]
    """The elements at ``offsets``, those of this program, in ``dtype``."""
    code = tl.load(codes_ptr + offsets, mask=mask).to(tl.int32)
    rows = _scale_offsets(offsets.shape[0])
    scale = tl.load(scales_ptr + rows, mask=None if mask is None else rows * SCALE_BLOCK < numel)
    magnitude = code & 0x7F
    # subnormals are integers times 2^-9; else the exponent is biased by 7
    normal = ((magnitude << 20) + ((127 - 7) << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 0x08, magnitude.to(tl.float32) * 2.0**-9, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    # not minus, which is a difference to zero and loses its sign
    signed = value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
    return signed.to(tl.float32, bitcast=True).to(dtype) * _to_elements(scale).to(dtype)


@triton.jit
def _scrambled(word):  # [BLOCK], uint32
    """The finaliser of MurmurHash3: each bit depends on all."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def _uniform(seed, size: tl.constexpr):  # [size]
    """The random numbers of this program's elements; ``seed`` is the word of a seed."""
    start = tl.program_id(0).to(tl.int64) * size
    first = start.to(tl.uint32) + (start >> 32).to(tl.uint32) * OF_HIGH_WORD + seed.to(tl.uint32)
    word = _scrambled(first + tl.arange(0, size).to(tl.uint32))
    return (word >> 12).to(tl.float32) * 2.0**-20


@triton.jit
def store_negated(
    sums,  # [BLOCK]
    codes_ptr,
    scales_ptr,
    seed,  # the word of a seed, not used unless stochastic
    stochastic: tl.constexpr,
    numel,
    offsets,  # [BLOCK], those of this program
    mask,  # [BLOCK], or None for a full block
):
    """Writes ``-sums`` in 8 bits."""
    size: tl.constexpr = sums.shape[0]
    bits = sums.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    magnitude = tl.where(finite, magnitude, 0)
    if mask is not None:
        magnitude = tl.where(mask, magnitude, 0)
    largest = tl.max(tl.reshape(magnitude, (size // SCALE_BLOCK, SCALE_BLOCK)), axis=1)
    # the largest code is 1.75 * 2^8: a mantissa above 1.75 carries into the exponent
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    exponent = tl.where(largest == 0, 127, exponent)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    rows = _scale_offsets(size)
    tl.store(scales_ptr + rows, scale, mask=None if mask is None else rows * SCALE_BLOCK < numel)

    inverse_scale = _to_elements(((254 - exponent) << 23).to(tl.float32, bitcast=True))
    scaled = magnitude.to(tl.float32, bitcast=True) * inverse_scale
    # neighbours are an eighth of their binade apart; below 2^-6 as far as there
    binade = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
    if stochastic:
        per_quantum = (((127 + 3) << 23) - (binade - (127 << 23))).to(tl.float32, bitcast=True)
        quanta = (scaled * per_quantum + _uniform(seed, size)).to(tl.int32)
    else:
        # the last place of a sum of this size is a quantum: the addition rounds
        large = binade + (20 << 23)
        quanta = (scaled + large.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - large
    # the first code of a binade has eight quanta
    code = (binade >> 20) - ((127 - 6) << 3) + quanta
    code = tl.where(finite, code | (~(bits >> 24) & 0x80), 0x7F)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=mask)
