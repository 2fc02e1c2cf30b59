"""``rampde::rk_error`` on the GPU: step, embedded error and its weighted norm, in one pass."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampde.kernels import operands
from rampde.kernels.elementwise import nothing, reciprocal, rounded, two_sum
from rampde.kernels.fp8 import store_negated
from rampde.kernels.launch import BLOCK, Launcher

SMALLEST = {tl.float32: torch.finfo(torch.float32).tiny, tl.float64: torch.finfo(torch.float64).tiny}
"""Added to ``atol``: makes every weight finite, and 0 of 0 / 0."""


@triton.jit
def error_block(
    y_ptr,
    k_ptrs,
    next_ptr,
    checkpoint_ptr,
    compensation_ptr,
    codes_ptr,
    h_ptr,
    scales_ptr,
    rtol,
    atol,
    seed,
    numel,
    coefficients: tl.constexpr,
    accumulation: tl.constexpr,
    stochastic: tl.constexpr,
    offsets,  # [BLOCK], or [rows, WIDTH]
    mask,  # as offsets, or None for a full block
):
    """Writes the step; returns what each element adds to the two sums, in float64."""
    terms: tl.constexpr = len(k_ptrs)
    h = tl.load(h_ptr).to(tl.float64)
    base = tl.load(y_ptr + offsets, mask=mask).to(accumulation)
    # read once and kept, for the weight of an error depends on all of the step
    k = ()
    for j in tl.static_range(terms):
        k += (tl.load(k_ptrs[j] + offsets, mask=mask),)

    # the terms first: what is accumulated from step to step is rounded once in a step
    if compensation_ptr is None:
        increment = nothing(base)
    else:
        increment = tl.load(compensation_ptr + offsets, mask=mask).to(accumulation)
    for j in tl.static_range(terms):
        if coefficients[j] != 0.0:
            weight = (h * tl.full((), coefficients[j], tl.float64)).to(accumulation)
            increment += k[j].to(accumulation) * weight
    if codes_ptr is not None:
        store_negated(increment, codes_ptr, scales_ptr, seed, stochastic, numel, offsets, mask)
    if compensation_ptr is None:
        total = base + increment
    else:
        total, lost = two_sum(base, increment)
        tl.store(compensation_ptr + offsets, rounded(lost, compensation_ptr.dtype.element_ty), mask=mask)

    tolerance = tl.maximum(tl.abs(base), tl.abs(total)) * tl.full((), rtol, tl.float64).to(accumulation)
    tolerance += tl.full((), atol, tl.float64).to(accumulation)
    inverse = reciprocal(tolerance)
    # zero, or nan where the step is not finite
    ratio = total - total
    share = tl.zeros_like(total)
    for j in tl.static_range(terms):
        if coefficients[terms + j] != 0.0:
            weight = (h * tl.full((), coefficients[terms + j], tl.float64)).to(accumulation)
            part = k[j].to(accumulation) * weight * inverse
            ratio += part
            share += part * part

    # last, since y and the velocities may be the output itself
    if next_ptr is not None:
        tl.store(next_ptr + offsets, rounded(total, next_ptr.dtype.element_ty), mask=mask)
    if checkpoint_ptr is not None:
        tl.store(checkpoint_ptr + offsets, rounded(total, checkpoint_ptr.dtype.element_ty), mask=mask)
    # the square of a float32 need not be one
    square = ratio.to(tl.float64) * ratio.to(tl.float64)
    square = tl.where(square == square, square, float("inf"))
    share = tl.where(tl.abs(share) < float("inf"), share, 0.0).to(tl.float64)
    if mask is not None:
        square = tl.where(mask, square, 0.0)
        share = tl.where(mask, share, 0.0)
    return square, share


@triton.jit
def write_sums(sums_ptr, index, square, share, roundoff, mask):
    tl.store(sums_ptr + 2 * index, square, mask=mask)
    tl.store(sums_ptr + 2 * index + 1, share * roundoff * roundoff, mask=mask)


# what changes from step to step, or with the tolerances, must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["h_ptr", "scales_ptr", "rtol", "atol", "roundoff", "seed", "numel"])
def rk_error_kernel(
    y_ptr,
    k_ptrs,  # a tuple, one pointer per pair of coefficients
    next_ptr,  # or None, as checkpoint_ptr, compensation_ptr and codes_ptr
    checkpoint_ptr,
    compensation_ptr,
    codes_ptr,  # of all of y in one row
    sums_ptr,  # [rows, blocks of a row, 2]
    h_ptr,
    scales_ptr,  # beside codes_ptr
    rtol: tl.float64,
    atol: tl.float64,
    roundoff: tl.float64,
    seed: tl.int64,
    numel: tl.int64,
    coefficients: tl.constexpr,  # those of the step, then those of the error
    accumulation: tl.constexpr,
    stochastic: tl.constexpr,
    LENGTH: tl.constexpr,  # of a row, or None for all of y in one
    WIDTH: tl.constexpr,  # of the part of a row that a program sees
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if LENGTH is None:
        start = program * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        # a mask of unknown alignment splits every access into single elements, so only the last block has one
        if start + BLOCK <= numel:
            square, share = error_block(
                y_ptr, k_ptrs, next_ptr, checkpoint_ptr, compensation_ptr, codes_ptr, h_ptr, scales_ptr, rtol, atol,
                seed, numel, coefficients, accumulation, stochastic, offsets, None,
            )  # fmt: skip
        else:
            square, share = error_block(
                y_ptr, k_ptrs, next_ptr, checkpoint_ptr, compensation_ptr, codes_ptr, h_ptr, scales_ptr, rtol, atol,
                seed, numel, coefficients, accumulation, stochastic, offsets, offsets < numel,
            )  # fmt: skip
        write_sums(sums_ptr, program, tl.sum(square, 0), tl.sum(share, 0), roundoff, None)
    else:
        # several short rows, or one part of a long one
        parts: tl.constexpr = (LENGTH + WIDTH - 1) // WIDTH
        row = program // parts * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
        column = program % parts * WIDTH + tl.arange(0, WIDTH)
        offsets = row[:, None] * LENGTH + column[None, :]
        mask = (row[:, None] * LENGTH < numel) & (column[None, :] < LENGTH)
        square, share = error_block(
            y_ptr, k_ptrs, next_ptr, checkpoint_ptr, compensation_ptr, codes_ptr, h_ptr, scales_ptr, rtol, atol,
            seed, numel, coefficients, accumulation, stochastic, offsets, mask,
        )  # fmt: skip
        index = row * parts + program % parts
        write_sums(sums_ptr, index, tl.sum(square, 1), tl.sum(share, 1), roundoff, row * LENGTH < numel)


_launch = Launcher(rk_error_kernel)


def rk_error(
    y: Tensor,
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    rtol: float,
    atol: float,
    roundoff: float,
    rows: int = 1,
    y_next: Tensor | None = None,
    checkpoint: Tensor | None = None,
    compensation: Tensor | None = None,
    quantised: Tensor | None = None,
    block_scales: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """End of an attempted step; :func:`rampde.eager.rk_error` says what it means."""
    operands.check_state("rk_error", y, h)
    operands.check_rows("rk_error", y, rows)
    terms, coefficients = operands.used_pairs("rk_error", "k", y, k, b, e)
    accumulation = operands.ACCUMULATION[y.dtype]
    outputs = {"y_next": y_next, "checkpoint": checkpoint, "compensation": compensation}
    for name, output in outputs.items():
        if output is not None:
            operands.check_output("rk_error", name, y, output)
    if compensation is not None and compensation.dtype == torch.float64:
        accumulation = tl.float64
    codes, word = operands.quantised_output("rk_error", y, quantised, block_scales, seed)
    if codes is not None and rows != 1:
        raise ValueError(f"rk_error: rows is {rows}, expected 1 where quantised is given")
    if y.numel() == 0:
        return y.new_zeros((rows, 2), dtype=torch.float64)
    length = y.numel() // rows
    width = BLOCK if rows == 1 else min(BLOCK, triton.next_power_of_2(length))
    parts = -(-length // width)
    sums = y.new_empty((rows, parts, 2), dtype=torch.float64)
    numbers = (rtol, atol + SMALLEST[accumulation], roundoff, word)
    programs = -(-rows // (BLOCK // width)) * parts
    constants = (seed is not None, None if rows == 1 else length, width)
    written, cells = (*outputs.values(), codes, sums), (h, block_scales)
    _launch(y, terms, written, cells, numbers, coefficients, accumulation, constants, programs)
    return sums[:, 0] if parts == 1 else sums.sum(1)
