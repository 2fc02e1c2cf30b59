"""``rampde::step_commit`` on the GPU: takes one leaf of the state past an attempt that stands, outputs included."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampde import step_state as at
from rampde.kernels import operands
from rampde.kernels.elementwise import nothing, rounded
from rampde.kernels.launch import Launcher

ACCEPTED = tl.constexpr(at.ACCEPTED)
START = tl.constexpr(at.START)
STEP = tl.constexpr(at.STEP)
STEP_END = tl.constexpr(at.STEP_END)
FIRST_OUTPUT = tl.constexpr(at.FIRST_OUTPUT)
LAST_OUTPUT = tl.constexpr(at.LAST_OUTPUT)

ALIGNMENT = tl.constexpr(16)
"""Elements: of rows of a multiple of them, each begins where wide accesses may."""


@triton.jit
def _interpolated(base, k_ptrs, h, theta, coefficients: tl.constexpr, offsets, mask):
    """``base + h sum_i w_i(theta) k_i``, the terms summed first."""
    degree: tl.constexpr = len(coefficients) // len(k_ptrs)
    total = nothing(base)
    for stage in tl.static_range(len(k_ptrs)):
        weight = theta * 0.0
        for power in tl.static_range(degree):
            weight = weight * theta + tl.full((), coefficients[stage * degree + degree - 1 - power], tl.float64)
        weight = theta * weight
        k = tl.load(k_ptrs[stage] + offsets, mask=mask).to(total.dtype)
        # what has no weight is not read: a nan in it does not spread
        total = tl.where(weight != 0.0, total + k * (h * weight).to(total.dtype), total)
    return base + total


@triton.jit
def _commit_block(
    y_ptr,
    k_ptrs,
    next_ptr,
    first_ptr,
    last_ptr,
    rows_ptr,
    staged_ptr,
    record_ptr,
    times_ptr,
    numel,
    coefficients: tl.constexpr,
    accumulation: tl.constexpr,
    aligned: tl.constexpr,
    offsets,  # [BLOCK]
    mask,  # [BLOCK], or None for a full block
):
    if staged_ptr is not None:
        base = tl.load(y_ptr + offsets, mask=mask)
        tl.store(staged_ptr + offsets, rounded(base, staged_ptr.dtype.element_ty), mask=mask)
    output = tl.load(record_ptr + FIRST_OUTPUT).to(tl.int64)
    last_output = tl.load(record_ptr + LAST_OUTPUT).to(tl.int64)
    if output < last_output:
        start, end = tl.load(record_ptr + START), tl.load(record_ptr + STEP_END)
        h = tl.load(record_ptr + STEP)
        while output < last_output:
            time = tl.load(times_ptr + output)
            # the compiler sees that such rows are aligned
            shift = output * (numel // ALIGNMENT) * ALIGNMENT if aligned else output * numel
            # an index of an output is never negative, but the compiler does not know: else it would form all addresses
            # before the loop, for which registers do not suffice
            here = offsets + tl.where(output < 0, ALIGNMENT, 0)
            if time == end:
                after = tl.load(next_ptr + here, mask=mask)
                tl.store(rows_ptr + shift + offsets, rounded(after, rows_ptr.dtype.element_ty), mask=mask)
            else:
                theta = (time - start) / (end - start)
                base = tl.load(y_ptr + here, mask=mask).to(accumulation)
                total = _interpolated(base, k_ptrs, h, theta, coefficients, here, mask)
                tl.store(rows_ptr + shift + offsets, rounded(total, rows_ptr.dtype.element_ty), mask=mask)
            output += 1
    after = tl.load(next_ptr + offsets, mask=mask)
    velocity = tl.load(last_ptr + offsets, mask=mask)
    # another thread may still read for an output what is written now
    tl.debug_barrier()
    tl.store(first_ptr + offsets, rounded(velocity, first_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, rounded(after, y_ptr.dtype.element_ty), mask=mask)


# what changes from step to step must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["record_ptr", "times_ptr", "numel"])
def step_commit_kernel(
    y_ptr,
    k_ptrs,  # a tuple, the velocities that the interpolant has
    next_ptr,
    first_ptr,
    last_ptr,
    rows_ptr,  # [count, numel]
    staged_ptr,  # or None
    record_ptr,
    times_ptr,  # [count]
    numel: tl.int64,
    coefficients: tl.constexpr,  # of the first velocity, then of the second, ...
    accumulation: tl.constexpr,
    aligned: tl.constexpr,  # whether the size of a row is a multiple of ALIGNMENT
    BLOCK: tl.constexpr,
):
    # a step that is rejected costs this read
    if tl.load(record_ptr + ACCEPTED) != 0.0:
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        offsets = begin + tl.arange(0, BLOCK)
        # a mask of unknown alignment splits every access into single elements, so only the last block has one
        if begin + BLOCK <= numel:
            _commit_block(
                y_ptr, k_ptrs, next_ptr, first_ptr, last_ptr, rows_ptr, staged_ptr, record_ptr, times_ptr, numel,
                coefficients, accumulation, aligned, offsets, None,
            )  # fmt: skip
        else:
            _commit_block(
                y_ptr, k_ptrs, next_ptr, first_ptr, last_ptr, rows_ptr, staged_ptr, record_ptr, times_ptr, numel,
                coefficients, accumulation, aligned, offsets, offsets < numel,
            )  # fmt: skip


_launch = Launcher(step_commit_kernel)


def step_commit(
    record: Tensor,
    output_times: Tensor,
    y_next: Tensor,
    later: Sequence[Tensor],
    interpolant: Sequence[float],
    y: Tensor,
    first: Tensor,
    rows: Tensor,
    staged: Tensor | None = None,
) -> None:
    """End of an attempted step; :func:`rampde.eager_adaptive.step_commit` says what it means."""
    count, stages = output_times.numel(), len(later) + 1
    operands.check_numbers("step_commit", "record", record, (at.RECORD_SIZE,), torch.float64, y.device)
    operands.check_numbers("step_commit", "output_times", output_times, (count,), torch.float64, y.device)
    operands.check_state("step_commit", y, record[at.STEP])
    degree, rest = divmod(len(interpolant), stages)
    if rest:
        raise ValueError(
            f"step_commit: interpolant has {len(interpolant)} coefficients, expected as many for each of the {stages}"
            " velocities"
        )
    of_stages = [tuple(interpolant[stage * degree : (stage + 1) * degree]) for stage in range(stages)]
    weighted = [any(coefficients) for coefficients in of_stages]
    # the last one is read in any case
    weighted[-1] = True
    used, _ = operands.used_terms("step_commit", "velocity", y, [first, *later], [float(read) for read in weighted])
    (y_next,), _ = operands.used_terms("step_commit", "y_next", y, [y_next], [1.0])
    operands.check_output("step_commit", "first", y, first)
    if staged is not None:
        operands.check_output("step_commit", "staged", y, staged)
    if rows.shape != (count, *y.shape) or (y.numel() and rows.stride(0) != y.numel()):
        raise ValueError(
            f"step_commit: rows has shape {tuple(rows.shape)} and strides {rows.stride()}, expected"
            f" {(count, *y.shape)}, one row after the other"
        )
    operands.check_output("step_commit", "rows", y, rows[0])
    if y.numel() == 0:
        return
    coefficients = tuple(c for of_stage, read in zip(of_stages, weighted, strict=True) if read for c in of_stage)
    outputs, cells = (y_next, first, used[-1], rows, staged), (record, output_times)
    aligned = y.numel() % ALIGNMENT.value == 0
    _launch(y, used, outputs, cells, (), coefficients, operands.ACCUMULATION[y.dtype], (int(aligned),))
