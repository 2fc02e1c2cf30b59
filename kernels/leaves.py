"""The forward operators on all leaves of a state at once: one launch for up to ``LEAVES`` of them.

The programs are numbered one leaf after the other, each leaf with as many as it has blocks; which leaf is its own a
program finds by counting down. A leaf's code is that of the operator on it alone, and is compiled for its own dtypes
and alignment.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampde.eager_leaves import DTYPES
from rampde.kernels import operands
from rampde.kernels.launch import BLOCK, LEAVES, LeavesLauncher
from rampde.kernels.rk_error import SMALLEST, error_block, write_sums
from rampde.kernels.rk_stage import stage_block
from rampde.kernels.rk_update import update_block

NUMELS = tuple(f"n{leaf}" for leaf in range(LEAVES))
ROUNDOFFS = tuple(f"r{leaf}" for leaf in range(LEAVES))

SMALLEST_OF_FLOAT = tl.constexpr(SMALLEST[tl.float32])
SMALLEST_OF_DOUBLE = tl.constexpr(SMALLEST[tl.float64])


@triton.jit
def _of_leaf(ptrs, leaf: tl.constexpr, leaves: tl.constexpr):
    """The pointers of one leaf among those of all."""
    count: tl.constexpr = len(ptrs) // leaves
    found = ()
    for j in tl.static_range(count):
        found += (ptrs[leaf * count + j],)
    return found


# what changes from step to step must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["h_ptr", *NUMELS])
def rk_stage_leaves_kernel(
    y_ptrs,  # tuples, one pointer per leaf; of k one per leaf and coefficient
    k_ptrs,
    stage_ptrs,
    h_ptr,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64, n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    coefficients: tl.constexpr,
    accumulations: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    numels = (n0, n1, n2, n3, n4, n5, n6, n7)
    leaves: tl.constexpr = len(y_ptrs)
    program = tl.program_id(0).to(tl.int64)
    for leaf in tl.static_range(leaves):
        numel = numels[leaf]
        blocks = tl.cdiv(numel, BLOCK)
        if (program >= 0) & (program < blocks):
            k = _of_leaf(k_ptrs, leaf, leaves)
            start = program * BLOCK
            offsets = start + tl.arange(0, BLOCK)
            # a mask of unknown alignment splits every access into single elements, so only the last block has one
            if start + BLOCK <= numel:
                stage_block(
                    y_ptrs[leaf], k, stage_ptrs[leaf], h_ptr, coefficients, accumulations[leaf], offsets, None
                )  # fmt: skip
            else:
                stage_block(
                    y_ptrs[leaf], k, stage_ptrs[leaf], h_ptr, coefficients, accumulations[leaf], offsets,
                    offsets < numel,
                )  # fmt: skip
        program -= blocks


# what changes from step to step must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["h_ptr", "overflow_ptr", "step", *NUMELS])
def rk_update_leaves_kernel(
    y_ptrs,  # tuples, one pointer per leaf; of k one per leaf and coefficient
    k_ptrs,
    next_ptrs,
    checkpoint_ptrs,  # or None, as compensation_ptrs and overflow_ptr
    compensation_ptrs,
    h_ptr,
    overflow_ptr,
    step: tl.int64,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64, n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    coefficients: tl.constexpr,
    accumulations: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    numels = (n0, n1, n2, n3, n4, n5, n6, n7)
    leaves: tl.constexpr = len(y_ptrs)
    program = tl.program_id(0).to(tl.int64)
    for leaf in tl.static_range(leaves):
        numel = numels[leaf]
        blocks = tl.cdiv(numel, BLOCK)
        if (program >= 0) & (program < blocks):
            k = _of_leaf(k_ptrs, leaf, leaves)
            checkpoint_ptr = None if checkpoint_ptrs is None else checkpoint_ptrs[leaf]
            compensation_ptr = None if compensation_ptrs is None else compensation_ptrs[leaf]
            start = program * BLOCK
            offsets = start + tl.arange(0, BLOCK)
            # a mask of unknown alignment splits every access into single elements, so only the last block has one
            if start + BLOCK <= numel:
                update_block(
                    y_ptrs[leaf], k, next_ptrs[leaf], checkpoint_ptr, compensation_ptr, None, h_ptr, overflow_ptr, None,
                    step, 0, numel, coefficients, accumulations[leaf], False, offsets, None,
                )  # fmt: skip
            else:
                update_block(
                    y_ptrs[leaf], k, next_ptrs[leaf], checkpoint_ptr, compensation_ptr, None, h_ptr, overflow_ptr, None,
                    step, 0, numel, coefficients, accumulations[leaf], False, offsets, offsets < numel,
                )  # fmt: skip
        program -= blocks


# what changes from step to step, or with the tolerances, must not make another kernel: see Launcher
@triton.jit(do_not_specialize=["h_ptr", "rtol", "atol", "parts", *ROUNDOFFS, *NUMELS])
def rk_error_leaves_kernel(
    y_ptrs,  # tuples, one pointer per leaf; of k one per leaf and pair of coefficients
    k_ptrs,
    next_ptrs,  # or None, as checkpoint_ptrs and compensation_ptrs
    checkpoint_ptrs,
    compensation_ptrs,
    sums_ptrs,  # of one: [leaves, parts, 2]
    h_ptr,
    rtol: tl.float64,
    atol: tl.float64,
    parts: tl.int64,  # blocks of the largest leaf, at least 1
    r0: tl.float64, r1: tl.float64, r2: tl.float64, r3: tl.float64,
    r4: tl.float64, r5: tl.float64, r6: tl.float64, r7: tl.float64,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64, n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    coefficients: tl.constexpr,  # those of the step, then those of the error
    accumulations: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    numels = (n0, n1, n2, n3, n4, n5, n6, n7)
    roundoffs = (r0, r1, r2, r3, r4, r5, r6, r7)
    leaves: tl.constexpr = len(y_ptrs)
    sums_ptr = sums_ptrs[0]
    program = tl.program_id(0).to(tl.int64)
    for leaf in tl.static_range(leaves):
        numel = numels[leaf]
        # an empty leaf has a block too, which writes its zeros
        blocks = tl.maximum(tl.cdiv(numel, BLOCK), 1)
        if (program >= 0) & (program < blocks):
            k = _of_leaf(k_ptrs, leaf, leaves)
            next_ptr = None if next_ptrs is None else next_ptrs[leaf]
            checkpoint_ptr = None if checkpoint_ptrs is None else checkpoint_ptrs[leaf]
            compensation_ptr = None if compensation_ptrs is None else compensation_ptrs[leaf]
            smallest: tl.constexpr = SMALLEST_OF_DOUBLE if accumulations[leaf] == tl.float64 else SMALLEST_OF_FLOAT
            allowed = atol + tl.full((), smallest, tl.float64)
            start = program * BLOCK
            offsets = start + tl.arange(0, BLOCK)
            # a mask of unknown alignment splits every access into single elements, so only the last block has one
            if start + BLOCK <= numel:
                square, share = error_block(
                    y_ptrs[leaf], k, next_ptr, checkpoint_ptr, compensation_ptr, None, h_ptr, None, rtol, allowed,
                    0, numel, coefficients, accumulations[leaf], False, offsets, None,
                )  # fmt: skip
            else:
                square, share = error_block(
                    y_ptrs[leaf], k, next_ptr, checkpoint_ptr, compensation_ptr, None, h_ptr, None, rtol, allowed,
                    0, numel, coefficients, accumulations[leaf], False, offsets, offsets < numel,
                )  # fmt: skip
            row = leaf * parts
            write_sums(sums_ptr, row + program, tl.sum(square, 0), tl.sum(share, 0), roundoffs[leaf], None)
            if program == blocks - 1:
                # nothing from the parts that only larger leaves have
                for begin in range(blocks, parts, BLOCK):
                    part = begin + tl.arange(0, BLOCK)
                    zeros = tl.zeros((BLOCK,), tl.float64)
                    write_sums(sums_ptr, row + part, zeros, zeros, 0.0, part < parts)
        program -= blocks


_launch_stage = LeavesLauncher(rk_stage_leaves_kernel)
_launch_update = LeavesLauncher(rk_update_leaves_kernel)
_launch_error = LeavesLauncher(rk_error_leaves_kernel)


Outputs = tuple[Sequence[Tensor] | None, ...]
"""Leaf by leaf; None where there is none of any leaf."""


class _Operands(NamedTuple):
    """What is read of each leaf, in order, and the coefficients that all leaves share."""

    terms: list[tuple[Tensor, ...]]
    coefficients: tuple[float, ...]
    accumulations: list[tl.dtype]


def _read(
    op: str, y: Sequence[Tensor], k: Sequence[Tensor], h: Tensor, a: Sequence[float], e: Sequence[float] | None = None
) -> _Operands:
    """The checked operands; each term has one coefficient, or one of ``a`` and one of ``e``."""
    count, rest = divmod(len(k), len(y))
    if rest:
        raise ValueError(f"{op}: k has {len(k)} tensors, expected a multiple of the number of leaves, {len(y)}")
    coefficients: tuple[float, ...] = ()
    terms, accumulations, start = [], [], 0
    for state in y:
        operands.check_state(op, state, h)
        of_leaf = k[start : start + count]
        start += count
        if e is None:
            used, coefficients = operands.used_terms(op, "k", state, of_leaf, a)
        else:
            used, coefficients = operands.used_pairs(op, "k", state, of_leaf, a, e)
        terms.append(used)
        accumulations.append(operands.ACCUMULATION[state.dtype])
    return _Operands(terms, coefficients, accumulations)


def _written(op: str, name: str, y: Sequence[Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The checked outputs of all leaves, or None where there are none."""
    if not tensors:
        return None
    if len(tensors) != len(y):
        raise ValueError(f"{op}: {name} has {len(tensors)} tensors, expected none or one for each of {len(y)} leaves")
    for state, tensor in zip(y, tensors, strict=True):
        operands.check_output(op, name, state, tensor)
    return tensors


def _compensations(
    op: str, y: Sequence[Tensor], tensors: Sequence[Tensor], accumulations: list[tl.dtype]
) -> Sequence[Tensor] | None:
    """As ``_written``; one in float64 has its leaf's sums formed in that."""
    written = _written(op, "compensations", y, tensors)
    for leaf, tensor in enumerate(tensors):
        if tensor.dtype == torch.float64:
            accumulations[leaf] = tl.float64
    return written


class _Part(NamedTuple):
    """The leaves of one launch, their elements and blocks."""

    leaves: slice
    numels: list[int]
    blocks: list[int]


def _parts(y: Sequence[Tensor], least: int = 0) -> Iterator[_Part]:
    """As many leaves at a time as a launch takes, each with ``least`` blocks or more."""
    for start in range(0, len(y), LEAVES):
        leaves = slice(start, start + LEAVES)
        numels = [state.numel() for state in y[leaves]]
        yield _Part(leaves, numels, [max(least, -(-numel // BLOCK)) for numel in numels])


def _launch(
    launcher: LeavesLauncher,
    part: _Part,
    y: Sequence[Tensor],
    read: _Operands,
    outputs: Outputs,
    cells: tuple[Tensor | None, ...],
    numbers: tuple[float, ...] = (),
    sums: tuple[tuple[Tensor, ...], ...] = (),
) -> None:
    leaves = part.leaves
    launcher(
        tuple(y[leaves]),
        tuple(chain.from_iterable(read.terms[leaves])),
        (*[None if tensors is None else tuple(tensors[leaves]) for tensors in outputs], *sums),
        cells,
        numbers,
        (*part.numels, *[0] * (LEAVES - len(part.numels))),
        read.coefficients,
        tuple(read.accumulations[leaves]),
        sum(part.blocks),
    )


def rk_stage_leaves(
    y: Sequence[Tensor], k: Sequence[Tensor], h: Tensor, a: Sequence[float], dtypes: Sequence[int]
) -> list[Tensor]:
    """Inputs of a Runge-Kutta stage; :func:`rampde.eager_leaves.rk_stage_leaves` says what it means."""
    read = _read("rk_stage_leaves", y, k, h, a)
    if len(dtypes) != len(y):
        raise ValueError(f"rk_stage_leaves: dtypes has {len(dtypes)} numbers, expected one for each of {len(y)} leaves")
    stages = [torch.empty_like(state, dtype=DTYPES[place]) for state, place in zip(y, dtypes, strict=True)]
    for part in _parts(y):
        if any(part.blocks):
            _launch(_launch_stage, part, y, read, (stages,), (h,))
    return stages


def rk_update_leaves(
    y: Sequence[Tensor],
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    y_next: Sequence[Tensor],
    checkpoints: Sequence[Tensor],
    compensations: Sequence[Tensor],
    overflow_step: Tensor | None = None,
    step: int = 0,
) -> None:
    """End of a step; :func:`rampde.eager_leaves.rk_update_leaves` says what it means."""
    op = "rk_update_leaves"
    read = _read(op, y, k, h, b)
    if len(y_next) != len(y):
        raise ValueError(f"{op}: y_next has {len(y_next)} tensors, expected one for each of {len(y)} leaves")
    outputs = (
        _written(op, "y_next", y, y_next),
        _written(op, "checkpoints", y, checkpoints),
        _compensations(op, y, compensations, read.accumulations),
    )
    if overflow_step is not None:
        operands.check_counter(op, "overflow_step", y[0], overflow_step)
    for part in _parts(y):
        if any(part.blocks):
            _launch(_launch_update, part, y, read, outputs, (h, overflow_step), (step,))


def rk_error_leaves(
    y: Sequence[Tensor],
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    rtol: float,
    atol: float,
    roundoffs: Sequence[float],
    y_next: Sequence[Tensor],
    checkpoints: Sequence[Tensor],
    compensations: Sequence[Tensor],
) -> Tensor:
    """End of an attempted step; :func:`rampde.eager_leaves.rk_error_leaves` says what it means."""
    op = "rk_error_leaves"
    read = _read(op, y, k, h, b, e)
    if len(roundoffs) != len(y):
        raise ValueError(f"{op}: roundoffs has {len(roundoffs)} numbers, expected one for each of {len(y)} leaves")
    outputs = (
        _written(op, "y_next", y, y_next),
        _written(op, "checkpoints", y, checkpoints),
        _compensations(op, y, compensations, read.accumulations),
    )
    results = []
    # an empty leaf has a block too, which writes its zeros
    for part in _parts(y, least=1):
        leaves, largest = len(part.blocks), max(part.blocks)
        sums = y[0].new_empty((leaves, largest, 2), dtype=torch.float64)
        numbers = (rtol, atol, largest, *roundoffs[part.leaves], *[0.0] * (LEAVES - leaves))
        _launch(_launch_error, part, y, read, outputs, (h,), numbers, ((sums,),))
        results.append(sums[:, 0] if largest == 1 else sums.sum(1))
    return results[0] if len(results) == 1 else torch.cat(results)
