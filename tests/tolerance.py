"""The error budget of a kernel: derived from what low precision costs anyone, not tuned.

An independent composition of ATen operations in the same precision shows the error that rounding causes. A
kernel may err twice as much, plus twice the roundoff of the largest value. Both errors are taken against
float64.
"""

import torch
from torch import Tensor


def largest_error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference in float64; infinite where one is finite and the other is not."""
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    result, exact = result.double(), exact.double()
    if result.numel() == 0:
        return 0.0
    alike = (result == exact) | (result.isnan() & exact.isnan())
    difference = torch.where(alike, 0.0, (result - exact).abs())
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def budget(low_precision: Tensor, exact: Tensor, *dtypes: torch.dtype) -> float:
    """What a kernel may err that rounds to the dtype of ``low_precision``, and to ``dtypes`` on the way."""
    largest = float(exact.double().abs().max()) if exact.numel() > 0 else 0.0
    roundoff = max(torch.finfo(dtype).eps for dtype in (low_precision.dtype, *dtypes))
    return 2 * (largest_error(low_precision, exact) + roundoff * largest)


def assert_within_budget(result: Tensor, low_precision: Tensor, exact: Tensor, *dtypes: torch.dtype) -> None:
    """``result`` is as good as an independent computation ``low_precision`` in the same dtypes."""
    assert result.dtype == low_precision.dtype, f"dtype {result.dtype}, expected {low_precision.dtype}"
    allowed = budget(low_precision, exact, *dtypes)
    assert allowed < torch.inf, "the comparison left the range of its dtype: choose smaller operands"
    error = largest_error(result, exact)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
