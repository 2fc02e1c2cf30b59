"""Operands for the tests of the operators: any shape, dtype and layout, on any backend."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rampde import ops, scaling

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((0,), (1,), (3,), (17,), (1000,), (4099,))
LAYOUTS = {
    "contiguous": (5, 7, 9),
    "channels_last": (2, 3, 5, 7),
    "permuted": (6, 7, 8),
    "misaligned": (4099,),
}
"""A shape for each memory layout that :func:`random` knows."""
# all but the check of what is mutated, in which PyTorch multiplies by what it finds: not implemented for 8 bits
OPCHECKS_IN_8_BITS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Backend:
    """The operators as one implementation has them: ``eager`` (the oracle itself), ``cpu``, ``cuda``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"

    def missing(self) -> bool:
        """Whether some operator has no kernel of its own on this backend."""
        if self.name == "eager":
            return False
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        names = [name for name in ops.SCHEMAS if self.name != "cpu" or name not in ops.WITHOUT_CPU_KERNEL]
        return not all(has_kernel(f"rampde::{name}", self.name.upper()) for name in names)

    def __getattr__(self, operator: str) -> Callable:
        return ops.oracle(operator) if self.name == "eager" else getattr(ops, operator)


def random(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous") -> Tensor:
    """Normally distributed, rounded to ``dtype``."""
    values = torch.randn(tuple(shape), dtype=torch.float64).to(device=device, dtype=dtype)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        order = (*range(1, values.dim()), 0)
        return values.permute(order).contiguous().permute(tuple(torch.tensor(order).argsort().tolist()))
    if layout == "misaligned":
        buffer = torch.empty(values.numel() + 1, dtype=dtype, device=device)
        return buffer[1:].view(shape).copy_(values)
    return values


def mixed(count: int, like: Tensor, dtypes: Sequence[torch.dtype] = DTYPES, layout: str = "contiguous") -> list[Tensor]:
    """``count`` random tensors of the shape and device of ``like``, of ``dtypes`` in turn."""
    turns = itertools.islice(itertools.cycle(dtypes), count)
    return [random(like.shape, dtype, like.device.type, layout) for dtype in turns]


def scalar(value: float, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def scale_state(device: str, scale: float = 1024.0, **values: float) -> Tensor:
    """The state of the loss scale as a sweep starts with it, with some entries changed by name."""
    state = torch.zeros(scaling.STATE_SIZE)
    state[scaling.SCALE] = state[scaling.SCALE_OF_STEP] = scale
    state[scaling.FINITE] = state[scaling.HEADROOM] = 1.0
    for name, value in values.items():
        state[getattr(scaling, name)] = value
    return state.to(device)


def same_bits(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    """Whether tensors are equal to the last bit, NaN and the sign of zero included."""
    return all(
        x.dtype == y.dtype and x.shape == y.shape and bytes_of(x) == bytes_of(y) for x, y in zip(xs, ys, strict=True)
    )


def bytes_of(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_deterministic(call: Callable[[], Sequence[Tensor]]) -> None:
    """The same bits on every run and with any number of threads."""
    first = call()
    assert same_bits(first, call())
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert same_bits(first, call())
    finally:
        torch.set_num_threads(threads)


def exact_step(y: Tensor, k: list[Tensor], h: Tensor, b: list[float]) -> Tensor:
    """``y + h sum_j b_j k_j`` in float64."""
    total = y.double()
    for term, weight in zip(k, b, strict=True):
        if weight != 0.0:
            total = total + h.double() * weight * term.double()
    return total
