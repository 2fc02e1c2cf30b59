"""``rampde::rk_stage`` on the GPU: the input of a Runge-Kutta stage in one pass over ``y`` and the ``k``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampde.kernels import operands
from rampde.kernels.elementwise import advanced, rounded
from rampde.kernels.launch import Launcher


@triton.jit
def stage_block(
    y_ptr,
    k_ptrs,
    stage_ptr,
    h_ptr,
    coefficients: tl.constexpr,
    accumulation: tl.constexpr,
    offsets,  # [BLOCK]
    mask,  # [BLOCK], or None for a full block
):
    base = tl.load(y_ptr + offsets, mask=mask).to(accumulation)
    total = advanced(base, k_ptrs, h_ptr, coefficients, offsets, mask)
    tl.store(stage_ptr + offsets, rounded(total, stage_ptr.dtype.element_ty), mask=mask)


# what changes from step to step must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["h_ptr", "numel"])
def rk_stage_kernel(
    y_ptr,
    k_ptrs,  # a tuple, one pointer per coefficient
    stage_ptr,
    h_ptr,
    numel: tl.int64,
    coefficients: tl.constexpr,
    accumulation: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # a mask of unknown alignment splits every access into single elements, so only the last block has one
    if start + BLOCK <= numel:
        stage_block(y_ptr, k_ptrs, stage_ptr, h_ptr, coefficients, accumulation, offsets, None)
    else:
        stage_block(y_ptr, k_ptrs, stage_ptr, h_ptr, coefficients, accumulation, offsets, offsets < numel)


_launch = Launcher(rk_stage_kernel)


def rk_stage(y: Tensor, k: Sequence[Tensor], h: Tensor, a: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Input of a Runge-Kutta stage; :func:`rampde.eager.rk_stage` says what it means."""
    operands.check_state("rk_stage", y, h)
    operands.check_dtype("rk_stage", "dtype is", dtype)
    terms, coefficients = operands.used_terms("rk_stage", "k", y, k, a)
    stage = torch.empty_like(y, dtype=dtype)
    if stage.numel():
        _launch(y, terms, (stage,), (h,), (), coefficients, operands.ACCUMULATION[y.dtype])
    return stage
