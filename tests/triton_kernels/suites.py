"""What the suites of values share: dtypes, layouts, coefficients, runs of a kernel beside its oracle."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rampde import eager
from rampde.kernels import rk_update

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "offset": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
}


def step_size(value: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def coefficients(count: int) -> list[float]:
    """Neither exact in binary nor of one sign."""
    return [(-1) ** j / (3 + j) for j in range(count)]


def update_both(
    y: Tensor, k: Sequence[Tensor], h: Tensor, b: Sequence[float], **outputs: Tensor | int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of the kernel and of the oracle, from copies of the same operands."""
    results = []
    for operator in (rk_update, eager.rk_update):
        arguments = {name: value.clone() if isinstance(value, Tensor) else value for name, value in outputs.items()}
        operator(y.clone(), [term.clone() for term in k], h, b, **arguments)
        results.append(arguments)
    return results[0], results[1]
