"""Device functions that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def add_weighted(total, term_ptrs, h_ptr, coefficients: tl.constexpr, offsets, mask):  # [BLOCK]
    """``total + sum_j h * coefficients[j] * terms[j]`` at ``offsets``, in the dtype of ``total``.

    The weights are formed in float64, where both factors are exact, and rounded once.
    """
    h = tl.load(h_ptr).to(tl.float64)
    for j in tl.static_range(len(coefficients)):
        # a bare float would become an fp32 constant wherever triton has no fp64 operand beside it
        weight = (h * tl.full((), coefficients[j], tl.float64)).to(total.dtype)
        total += tl.load(term_ptrs[j] + offsets, mask=mask).to(total.dtype) * weight
    return total


@triton.jit
def nothing(like):  # [BLOCK]
    """Minus zero: what added to anything leaves it as it is."""
    # as a literal it would lose its sign
    return tl.full(like.shape, -1.0, like.dtype) * 0.0


@triton.jit
def advanced(base, term_ptrs, h_ptr, coefficients: tl.constexpr, offsets, mask):  # [BLOCK]
    """``base + sum_j h * coefficients[j] * terms[j]``, the terms summed first.

    What is accumulated from step to step is so rounded once in a step.
    """
    return base + add_weighted(nothing(base), term_ptrs, h_ptr, coefficients, offsets, mask)


@triton.jit
def two_sum(base, increment):  # [BLOCK]
    """The sum and its rounding error, which together are exact."""
    # sums alone, so there is no product to contract into an fma, and nothing here may be reassociated
    total = base + increment
    shifted = total - base
    return total, (base - (total - shifted)) + (increment - shifted)


@triton.jit
def reciprocal(x):  # [BLOCK]
    """``1 / x``, to nearest even."""
    one = tl.full((), 1.0, x.dtype)
    # in float32 the plain division is an approximation
    if x.dtype == tl.float64:
        return one / x
    else:
        return tl.div_rn(one, x)


@triton.jit
def rounded(value, dtype: tl.constexpr):  # [BLOCK]
    """``value`` in ``dtype``, to nearest even."""
    # float64 reaches 16 bits through float32, as it does in pytorch
    if dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)
