"""Steps in 8 bits: one ``float8_e4m3fn`` code an element, and one scale for 128 of them.

What is held so is the step taken backwards, the state before it minus the state after: one known to a sixteenth of its
size says more of the state before it than that state itself would in 8 bits, by as much as it is smaller.

A step of any dense layout is held as *codes*, of its shape and strides, and *scales*, float32 of shape
``(ceil(numel / 128),)``: one for every 128 elements that are consecutive in memory, the last block may be short.
An element is ``code * scale``, exactly, for scales are powers of two: the least ``2^p >= max|x| / 448`` with
``p >= -126``, over the finite elements of the block; 1 where these are all zero. What is not finite becomes NaN.

Codes are rounded to nearest even, or with a ``seed`` up or down at random, so that their mean is right. The random
number of an element is a hash of its offset in memory and of the seed. All backends give the same bits; this module
is what their kernels are held against.
"""

from typing import TypeVar

import torch
from torch import Tensor

from rampde.precision import accumulation_dtype

BLOCK = 128
"""Elements, consecutive in memory, that share a scale."""

CODES = torch.float8_e4m3fn

# so that 2^p and its inverse are normal numbers
LEAST_EXPONENT = -126

LOW_WORD = 0xFFFFFFFF
# odd, and of no pattern: the golden ratio, as in Fibonacci hashing
OF_HIGH_WORD = 0x9E3779B1

Word = TypeVar("Word", int, Tensor)


def empty_like(y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales for a step from a state like ``y``, uninitialised."""
    return torch.empty_like(y, dtype=CODES), y.new_empty(-(-y.numel() // BLOCK), dtype=torch.float32)


def quantise(values: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``values``; float64 goes through float32 first, as on its way to 16 bits."""
    blocks = _blocks(in_memory_order(values).to(torch.float32))
    finite = blocks.isfinite()
    blocks = torch.where(finite, blocks, 0.0)
    largest = blocks.abs().amax(1)
    # m * 2^e with m in [1/2, 1), and 448 is 7/8 * 2^9
    mantissa, exponent = torch.frexp(largest)
    scales = _power_of_two((exponent - 9 + (mantissa > 0.875).to(torch.int32)).clamp(min=LEAST_EXPONENT))
    scales = torch.where(largest > 0, scales, 1.0)
    scaled = blocks / scales[:, None]
    if seed is not None:
        # the distance of neighbouring codes; subnormal ones are as far apart as the smallest normal ones
        quantum = _power_of_two((torch.frexp(scaled).exponent - 1).clamp(min=-6) - 3)
        up = uniform(scaled.numel(), seed, scaled.device).view(-1, BLOCK)
        scaled = torch.copysign(torch.floor(scaled.abs() / quantum + up) * quantum, scaled)
    codes = torch.empty_like(values, dtype=CODES)
    in_memory_order(codes).copy_(torch.where(finite, scaled, torch.nan).view(-1)[: values.numel()])
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantise` gave codes and scales to, in ``dtype``, its products in the one that sums have."""
    values = torch.empty_like(codes, dtype=dtype)
    blocks = _blocks(in_memory_order(codes).to(accumulation_dtype(dtype))) * scales[:, None]
    in_memory_order(values).copy_(blocks.view(-1)[: codes.numel()])
    return values


def in_memory_order(x: Tensor) -> Tensor:
    """The elements of a dense tensor one after the other as they lie in memory, a view."""
    return _ordered(x).view(-1)


def uniform(count: int, seed: int, device: torch.device) -> Tensor:
    """Of each of ``count`` elements its random number, a multiple of ``2^-20`` in [0, 1)."""
    offset = torch.arange(count, device=device)
    word = (offset & LOW_WORD) + (offset >> 32) * OF_HIGH_WORD + seed_word(seed)
    return (_scrambled(word & LOW_WORD) >> 12).to(torch.float32) * 2.0**-20


def seed_word(seed: int) -> int:
    """What an int64 ``seed`` adds to the offsets: 32 bits, without order, so that seeds may be consecutive."""
    return _scrambled((seed & LOW_WORD) ^ _scrambled(seed >> 32 & LOW_WORD))


def check_written(
    op: str, y: Tensor, quantised: Tensor | None, block_scales: Tensor | None, seed: int | None
) -> tuple[Tensor, Tensor] | None:
    """What an operator writes in 8 bits beside ``y``: codes and scales, or nothing where neither is given."""
    if seed is not None and quantised is None:
        raise ValueError(f"{op}: seed is {seed}, expected None without quantised")
    if quantised is None and block_scales is None:
        return None
    return checked(op, "quantised", quantised, block_scales, y)


def check_read(op: str, y: Tensor, block_scales: Tensor | None, **others: object) -> tuple[Tensor, Tensor]:
    """The codes ``y`` and their scales, which an operator reads; ``others``, which say nothing then, must be None."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{op}: {name} is given, expected None where y has dtype {CODES}")
    return checked(op, "y", y, block_scales, y)


def checked(op: str, name: str, codes: Tensor | None, scales: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, argument ``name`` of an operator, and its ``block_scales``: both are given, and laid out for ``y``."""
    if scales is None:
        raise ValueError(f"{op}: block_scales is None, expected the scales of {name}, which is in {CODES}")
    if codes is None:
        raise ValueError(f"{op}: {name} is None, expected a {CODES} tensor beside block_scales")
    if codes.dtype != CODES:
        raise ValueError(f"{op}: {name} has dtype {codes.dtype}, expected {CODES} beside block_scales")
    if not _ordered(codes).is_contiguous():
        raise ValueError(f"{op}: {name} has strides {codes.stride()}, expected a dense tensor, without gaps or overlap")
    if codes.shape != y.shape or codes.device != y.device:
        raise ValueError(
            f"{op}: {name} has shape {tuple(codes.shape)} on {codes.device}, expected the shape of y,"
            f" {tuple(y.shape)}, on {y.device}"
        )
    # the stride of a dimension of size 1 says nothing
    strides = zip(codes.stride(), y.stride(), y.shape, strict=True)
    if any(mine != theirs and size != 1 for mine, theirs, size in strides):
        raise ValueError(f"{op}: {name} has strides {codes.stride()}, expected the layout of y, {y.stride()}")
    blocks = -(-y.numel() // BLOCK)
    if scales.dtype != torch.float32 or scales.shape != (blocks,) or scales.device != y.device:
        raise ValueError(
            f"{op}: block_scales is a {scales.dtype} tensor of shape {tuple(scales.shape)} on {scales.device},"
            f" expected torch.float32 of shape {(blocks,)}, one for each {BLOCK} elements, on {y.device}"
        )
    if not scales.is_contiguous():
        raise ValueError(f"{op}: block_scales has strides {scales.stride()}, expected it contiguous")
    return codes, scales


def _ordered(x: Tensor) -> Tensor:
    """With its dimensions as they lie in memory, the last one innermost."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def _blocks(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _power_of_two(exponent: Tensor) -> Tensor:
    """In float32, of a normal number's exponent; its bits, since ``pow`` may be off by one."""
    return ((exponent + 127) << 23).view(torch.float32)


def _scrambled(word: Word) -> Word:
    """The finaliser of MurmurHash3: each bit of 32 depends on all."""
    word = word ^ (word >> 16)
    word = word * 0x85EBCA6B & LOW_WORD
    word = word ^ (word >> 13)
    word = word * 0xC2B2AE35 & LOW_WORD
    return word ^ (word >> 16)
