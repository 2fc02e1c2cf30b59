"""Checks of the operands, whose messages name operator, argument, found and expected, and their layout."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from rampde import fp8_blocks

ACCUMULATION = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}
"""Supported dtype to the type in which sums with it are formed."""

_SUPPORTED = "one of " + ", ".join(map(str, ACCUMULATION))


def check_state(op: str, y: Tensor, h: Tensor, coded: bool = False) -> None:
    """``y`` dense, and floating unless it is ``coded`` in 8 bits; ``h`` a 0-dim float64 or float32 beside it."""
    if not coded:
        check_dtype(op, "y has dtype", y.dtype)
    if not y.is_contiguous() and not _is_dense(y):
        raise ValueError(
            f"{op}: y of shape {tuple(y.shape)} has strides {y.stride()}, expected a dense tensor, of any"
            " memory format but without gaps or overlap"
        )
    if (h.dtype != torch.float64 and h.dtype != torch.float32) or h.dim() != 0 or h.device != y.device:
        raise ValueError(
            f"{op}: h is {_describe(h)}, expected a 0-dim torch.float64 or torch.float32 tensor on {y.device}"
        )


def check_dtype(op: str, what: str, dtype: torch.dtype) -> None:
    if dtype not in ACCUMULATION:
        others = f"; {dtype} is for the y of rk_update, with its block_scales" if dtype == fp8_blocks.CODES else ""
        raise ValueError(f"{op}: {what} {dtype}, expected {_SUPPORTED}{others}")


def used_terms(
    op: str, name: str, y: Tensor, terms: Sequence[Tensor], coefficients: Sequence[float]
) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """The terms with a non-zero coefficient in the layout of ``y``, and their coefficients.

    The others are not read: they cost nothing, and a NaN in them does not spread.
    """
    if len(terms) != len(coefficients):
        raise ValueError(f"{op}: {name} has {len(terms)} terms, expected {len(coefficients)}, one per coefficient")
    shape, stride, device = y.shape, y.stride(), y.device
    used = []
    for index, term in enumerate(terms):
        if coefficients[index] == 0.0:
            continue
        if term.shape != shape or term.dtype not in ACCUMULATION or term.device != device:
            raise _mismatch(op, f"{name}[{index}]", y, term)
        if term.stride() != stride and not _same_layout(y, term):
            term = torch.empty_like(y, dtype=term.dtype).copy_(term)
        used.append(term)
    return tuple(used), tuple([coefficient for coefficient in coefficients if coefficient != 0.0])


def used_pairs(
    op: str, name: str, y: Tensor, terms: Sequence[Tensor], b: Sequence[float], e: Sequence[float]
) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """As :func:`used_terms` for terms with two coefficients each; returns all of ``b``, then all of ``e``."""
    if len(b) != len(e):
        raise ValueError(f"{op}: b has {len(b)} coefficients and e {len(e)}, expected as many of one as of the other")
    either = [one or other for one, other in zip(b, e, strict=True)]
    used, _ = used_terms(op, name, y, terms, either)
    return used, tuple([c for kind in (b, e) for c, read in zip(kind, either, strict=True) if read])


def check_rows(op: str, y: Tensor, rows: int) -> None:
    """1, or the size of a contiguous ``y`` along dimension 0."""
    slices = y.shape[0] if y.dim() else 1
    if rows not in (1, slices):
        raise ValueError(f"{op}: rows is {rows}, expected 1 or the size of y along dimension 0, {slices}")
    if rows != 1 and not y.is_contiguous():
        raise ValueError(f"{op}: y has strides {y.stride()}, expected it contiguous for rows other than 1")


def check_output(op: str, name: str, y: Tensor, output: Tensor) -> None:
    """A tensor that the kernel writes: as ``y``, also in its layout, in any supported dtype."""
    if output.shape != y.shape or output.dtype not in ACCUMULATION or output.device != y.device:
        raise _mismatch(op, name, y, output)
    if output.stride() != y.stride() and not _same_layout(y, output):
        raise ValueError(
            f"{op}: {name} has strides {output.stride()}, expected the layout of y, {y.stride()};"
            " torch.empty_like(y) has it"
        )


def quantised_output(
    op: str, y: Tensor, quantised: Tensor | None, block_scales: Tensor | None, seed: int | None
) -> tuple[Tensor | None, int]:
    """Of the three the codes as bytes, which kernels write, and the word of the seed, 0 without one."""
    written = fp8_blocks.check_written(op, y, quantised, block_scales, seed)
    if written is None:
        return None, 0
    return written[0].view(torch.uint8), 0 if seed is None else fp8_blocks.seed_word(seed)


def check_counter(op: str, name: str, y: Tensor, counter: Tensor) -> None:
    """A 0-dim int64 on the device of ``y``."""
    if counter.dtype != torch.int64 or counter.dim() != 0 or counter.device != y.device:
        raise ValueError(f"{op}: {name} is {_describe(counter)}, expected a 0-dim torch.int64 tensor on {y.device}")


def check_numbers(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Contiguous numbers of a given shape and dtype, which a kernel reads or writes one by one."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} is {_describe(tensor)} with strides {tensor.stride()}, expected a contiguous {dtype} tensor"
            f" of shape {shape} on {device}"
        )


def _mismatch(op: str, name: str, y: Tensor, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{op}: {name} is {_describe(tensor)}, expected the shape of y, {tuple(y.shape)}, on {y.device},"
        f" with dtype {_SUPPORTED}"
    )


def _same_layout(y: Tensor, tensor: Tensor) -> bool:
    """Whether equal offsets hold equal elements; the stride of a dimension of size 1 says nothing."""
    strides = zip(y.stride(), tensor.stride(), y.shape, strict=True)
    return all(ours == theirs or size == 1 for ours, theirs, size in strides)


def _is_dense(y: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(y.stride(), y.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _describe(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"
