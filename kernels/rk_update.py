"""``rampde::rk_update`` on the GPU: the end of a step, with all it leaves behind, in one pass."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampde import fp8_blocks
from rampde.kernels import operands
from rampde.kernels.elementwise import add_weighted, nothing, rounded, two_sum
from rampde.kernels.fp8 import dequantised, store_negated
from rampde.kernels.launch import Launcher


@triton.jit
def _note_overflow(stored, overflow_ptr, step, mask):
    """Lowers the step at ``overflow_ptr`` to ``step`` where an element of ``stored`` is not finite."""
    # 16-bit comparisons do not exist on every architecture; a comparison with nan is false too
    wide = stored.to(tl.float64 if stored.dtype == tl.float64 else tl.float32)
    overflowed = ~(tl.abs(wide) < float("inf"))
    if mask is not None:
        overflowed = overflowed & mask
    # reduced first, so that a state full of nan costs one atomic a block; a minimum shows no order
    found = tl.max(overflowed.to(tl.int32), axis=0)
    tl.atomic_min(overflow_ptr, step, mask=found != 0, sem="relaxed")


@triton.jit
def update_block(
    y_ptr,
    k_ptrs,
    next_ptr,
    checkpoint_ptr,
    compensation_ptr,
    codes_ptr,
    h_ptr,
    overflow_ptr,
    scales_ptr,
    step,
    seed,
    numel,
    coefficients: tl.constexpr,
    accumulation: tl.constexpr,
    stochastic: tl.constexpr,
    offsets,  # [BLOCK]
    mask,  # [BLOCK], or None for a full block
):
    if y_ptr.dtype.element_ty == tl.uint8:
        base = dequantised(y_ptr, scales_ptr, numel, accumulation, offsets, mask)
    else:
        base = tl.load(y_ptr + offsets, mask=mask).to(accumulation)
    # the terms first: what is accumulated from step to step is rounded once in a step
    if compensation_ptr is None:
        increment = nothing(base)
    else:
        increment = tl.load(compensation_ptr + offsets, mask=mask).to(accumulation)
    increment = add_weighted(increment, k_ptrs, h_ptr, coefficients, offsets, mask)
    if codes_ptr is not None:
        store_negated(increment, codes_ptr, scales_ptr, seed, stochastic, numel, offsets, mask)
    if compensation_ptr is None:
        total = base + increment
    else:
        total, lost = two_sum(base, increment)
        tl.store(compensation_ptr + offsets, rounded(lost, compensation_ptr.dtype.element_ty), mask=mask)
    stored = rounded(total, next_ptr.dtype.element_ty)
    tl.store(next_ptr + offsets, stored, mask=mask)
    if checkpoint_ptr is not None:
        stored = rounded(total, checkpoint_ptr.dtype.element_ty)
        tl.store(checkpoint_ptr + offsets, stored, mask=mask)
    if overflow_ptr is not None:
        _note_overflow(stored, overflow_ptr, step, mask)


# what changes from step to step must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["h_ptr", "overflow_ptr", "scales_ptr", "step", "seed", "numel"])
def rk_update_kernel(
    y_ptr,
    k_ptrs,  # a tuple, one pointer per coefficient
    next_ptr,
    checkpoint_ptr,  # or None, as compensation_ptr, codes_ptr and overflow_ptr
    compensation_ptr,
    codes_ptr,
    h_ptr,
    overflow_ptr,
    scales_ptr,  # beside codes_ptr, or a y in 8 bits
    step: tl.int64,
    seed: tl.int64,
    numel: tl.int64,
    coefficients: tl.constexpr,
    accumulation: tl.constexpr,
    stochastic: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # a mask of unknown alignment splits every access into single elements, so only the last block has one
    if start + BLOCK <= numel:
        update_block(
            y_ptr, k_ptrs, next_ptr, checkpoint_ptr, compensation_ptr, codes_ptr, h_ptr, overflow_ptr, scales_ptr,
            step, seed, numel, coefficients, accumulation, stochastic, offsets, None,
        )  # fmt: skip
    else:
        update_block(
            y_ptr, k_ptrs, next_ptr, checkpoint_ptr, compensation_ptr, codes_ptr, h_ptr, overflow_ptr, scales_ptr,
            step, seed, numel, coefficients, accumulation, stochastic, offsets, offsets < numel,
        )  # fmt: skip


_launch = Launcher(rk_update_kernel)


def rk_update(
    y: Tensor,
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    y_next: Tensor,
    checkpoint: Tensor | None = None,
    compensation: Tensor | None = None,
    overflow_step: Tensor | None = None,
    step: int = 0,
    quantised: Tensor | None = None,
    block_scales: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """End of a step; :func:`rampde.eager.rk_update` says what it means."""
    coded = y.dtype == fp8_blocks.CODES
    if coded:
        others = {"compensation": compensation, "quantised": quantised, "seed": seed}
        fp8_blocks.check_read("rk_update", y, block_scales, **others)
    operands.check_state("rk_update", y, h, coded)
    terms, coefficients = operands.used_terms("rk_update", "k", y, k, b)
    operands.check_output("rk_update", "y_next", y, y_next)
    accumulation = operands.ACCUMULATION[y_next.dtype if coded else y.dtype]
    if checkpoint is not None:
        operands.check_output("rk_update", "checkpoint", y, checkpoint)
    if compensation is not None:
        operands.check_output("rk_update", "compensation", y, compensation)
        if compensation.dtype == torch.float64:
            accumulation = tl.float64
    if overflow_step is not None:
        operands.check_counter("rk_update", "overflow_step", y, overflow_step)
    codes, word = None, 0
    if coded:
        y = y.view(torch.uint8)
    else:
        codes, word = operands.quantised_output("rk_update", y, quantised, block_scales, seed)
    if y.numel():
        outputs, cells = (y_next, checkpoint, compensation, codes), (h, overflow_step, block_scales)
        _launch(y, terms, outputs, cells, (step, word), coefficients, accumulation, (seed is not None,))
