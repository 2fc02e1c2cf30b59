"""Random numbers inside f: the recomputation draws the ones that the forward solve drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the CPU generator and of the one of the state's device."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @staticmethod
    def current(device: torch.device) -> RandomState:
        accelerator = None
        if device.type != "cpu" and hasattr(torch.get_device_module(device), "get_rng_state"):
            accelerator = torch.get_device_module(device).get_rng_state(device)
        return RandomState(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def equals(self, other: RandomState) -> bool:
        same = torch.equal(self.cpu, other.cpu)
        if self.accelerator is not None and other.accelerator is not None:
            return same and torch.equal(self.accelerator, other.accelerator)
        return same


@contextmanager
def preserved(device: torch.device, active: bool) -> Iterator[None]:
    """Leaves the generators afterwards as they were, when ``active``."""
    if not active:
        yield
        return
    before = RandomState.current(device)
    try:
        yield
    finally:
        before.restore()
