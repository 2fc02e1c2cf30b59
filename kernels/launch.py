"""The launch that the kernels share: its geometry, its device, and the memory of what Triton compiled."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program. With the 4 warps below that is 8 per thread: one 128-bit access of a 16-bit operand,
two of a 32-bit one. More would only leave fewer programs to small states, less would split the accesses."""

LEAVES = 8
"""Leaves of a state that one launch takes."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""Products are rounded before they are added, as by the oracle, so that both agree to the bit (but for
Blackwell under Triton 3.6, whose ptxas 12.9 fuses packed products all the same); the fma that this gives up
costs nothing where memory is the limit."""

ALIGNMENT = 16
"""Bytes: Triton compiles other code, with narrower accesses, for a pointer that is not a multiple of it."""

# on rocm triton specialises on the size of a tensor as well, which the key below does not hold
_REUSABLE = torch.version.hip is None

_ON_CURRENT_DEVICE: AbstractContextManager[None] = nullcontext()


class Launcher:
    """Launches ``kernel(y, terms, *outputs, *cells, *numbers, numel, coefficients, accumulation, *constants, BLOCK)``.

    Triton's own path examines every argument at every call; remembering the compiled kernel under a key of
    our own halves the host time of a launch. ``cells`` are 0-dim tensors, absent ones None. The kernel must
    specialise neither on them nor on numbers: a step size that is a view into a grid of them is aligned to
    8 bytes only, and the number of the step changes at every call. ``constants`` are compiled in. There are as many
    programs as ``programs`` says, else one for each block of ``y``.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        y: Tensor,
        terms: tuple[Tensor, ...],
        outputs: tuple[Tensor | None, ...],
        cells: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        coefficients: tuple[float, ...],
        accumulation: tl.dtype,
        constants: tuple[int | None, ...] = (),
        programs: int | None = None,
    ) -> None:
        numel = y.numel()
        grid = (-(-numel // BLOCK) if programs is None else programs, 1, 1)
        arguments = (y, terms, *outputs, *cells, *numbers, numel, coefficients, accumulation, *constants, BLOCK)
        addresses = y.data_ptr()
        key: list[Any] = [y.get_device(), coefficients, y.dtype, constants]
        for tensor in terms + outputs:
            if tensor is None:
                key.append(None)
            else:
                addresses |= tensor.data_ptr()
                key.append(tensor.dtype)
        for cell in cells:
            key.append(None if cell is None else cell.dtype)
        self._run(y, grid, arguments, tuple(key), addresses)

    def _run(
        self, y: Tensor, grid: tuple[int, int, int], arguments: tuple[Any, ...], key: tuple[Any, ...], addresses: int
    ) -> None:
        """Launches what is remembered under ``key`` if ``addresses``, those of all pointers joined, are aligned."""
        aligned = addresses % ALIGNMENT == 0 and _REUSABLE
        with device_of(y):
            compiled = self._compiled.get(key) if aligned else None
            if compiled is not None:
                compiled[grid](*arguments)
                return
            compiled = self._kernel[grid](*arguments, **OPTIONS)
            # triton's interpreter compiles nothing
            if aligned and compiled is not None:
                self._compiled[key] = compiled


class LeavesLauncher(Launcher):
    """Launches ``kernel(y, terms, *outputs, *cells, *numbers, *numels, coefficients, accumulations, BLOCK)``.

    As :class:`Launcher`, for up to ``LEAVES`` leaves in one launch. ``y``, ``terms`` (one leaf after the other) and
    outputs are tuples of tensors, absent outputs None; ``numels`` are one for each of ``LEAVES`` leaves, 0 where there
    is none, and no tuple, whose elements Triton would specialise on.
    """

    def __call__(  # type: ignore[override]  # it takes tuples
        self,
        y: tuple[Tensor, ...],
        terms: tuple[Tensor, ...],
        outputs: tuple[tuple[Tensor, ...] | None, ...],
        cells: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        numels: tuple[int, ...],
        coefficients: tuple[float, ...],
        accumulations: tuple[tl.dtype, ...],
        programs: int,
    ) -> None:
        first = y[0]
        arguments = (y, terms, *outputs, *cells, *numbers, *numels, coefficients, accumulations, BLOCK)
        addresses = 0
        key: list[Any] = [first.get_device(), coefficients, len(y)]
        for tensors in (y, terms, *outputs):
            if tensors is None:
                key.append(None)
                continue
            for tensor in tensors:
                addresses |= tensor.data_ptr()
                key.append(tensor.dtype)
        for cell in cells:
            key.append(None if cell is None else cell.dtype)
        self._run(first, (programs, 1, 1), arguments, tuple(key), addresses)


def device_of(y: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device; changing it costs microseconds, so only where it differs."""
    if not y.is_cuda or y.get_device() == torch.cuda.current_device():
        return _ON_CURRENT_DEVICE
    return torch.cuda.device(y.device)
