"""The caller's autocast: kept for the evaluations of f, kept away from the solver's own arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AutocastState:
    """The autocast of one device type, to be entered again where f is evaluated later."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @staticmethod
    def current(device_type: str) -> AutocastState:
        if not torch.amp.is_autocast_available(device_type):
            return AutocastState(device_type, False, torch.float32, True)
        return AutocastState(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This autocast state; one entry for a whole sweep, so that parameters are cast once and not per call."""
        if not self.enabled and not _is_enabled(self.device_type):
            yield
            return
        with torch.autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled):
            yield


def _is_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def switched_off(device: torch.device) -> AbstractContextManager[None]:
    """No autocast: ``torch.stack`` and ``torch.cat`` change dtypes under it, or refuse them."""
    if not _is_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def uncached_autocast(device: torch.device) -> Iterator[None]:
    """Casts of parameters made here, without a graph, are not used later where there is one."""
    if not _is_enabled(device.type):
        # a state that changes would make a compiled f compile anew
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
