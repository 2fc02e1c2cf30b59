"""How much memory a call takes, as the allocator of the device sees it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

# the profiler's library says on stderr that it starts and stops, unless it is told not to before its first use
_QUIET = "KINETO_LOG_LEVEL"
# bytes of a tensor that marks where measuring begins, as many as nothing else has
_MARK = 7919


@dataclass(frozen=True)
class Metered(Generic[T]):
    """What a call returned, and its memory.

    Attributes:
        result: what the call returned.
        peak: most bytes that were allocated at once during the call, beyond those before it.
        left: bytes that are allocated after the call, less those before it.
    """

    result: T
    peak: int
    left: int


def metered(call: Callable[[], T], device: torch.device, before: Callable[[], object] | None = None) -> Metered[T]:
    """Calls and measures: on the CPU by the profiler's record of allocations, on a CUDA device by its allocator, whose
    peak statistics are reset.

    What ``before`` does is not measured, but bytes count from before it: the record does not show that memory is freed
    which was taken before it began.

    Raises:
        RuntimeError: a profiler is running already, on the CPU.
        TypeError: another kind of device.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        if before is not None:
            before()
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return Metered(
            result, torch.cuda.max_memory_allocated(device) - start, torch.cuda.memory_allocated(device) - start
        )
    if device.type != "cpu":
        raise TypeError(f"memory on {device} cannot be measured, expected the CPU or a CUDA device")
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise RuntimeError(
            "memory on the CPU is measured by PyTorch's profiler, which is running already; stop it first"
        )
    with _quiet(), torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        if before is not None:
            before()
        torch.empty(_MARK, dtype=torch.uint8)
        result = call()
    assert profile.kineto_results is not None
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    counts = False
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        # the mark itself is gone with its second event
        counts = counts or event.nbytes() == -_MARK
        peak = max(peak, level) if counts else level
    return Metered(result, peak, level)


@contextmanager
def _quiet() -> Iterator[None]:
    given = os.environ.get(_QUIET)
    os.environ.setdefault(_QUIET, "99")
    try:
        yield
    finally:
        if given is None:
            del os.environ[_QUIET]
