"""Random numbers inside f: the recomputation draws the ones that the forward solve drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rampde.capture import is_recorded


@dataclass(frozen=True)
class RandomState:
    """State of the CPU generator and of the one of the state's device."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @staticmethod
    def current(device: torch.device) -> RandomState:
        accelerator = None
        readable = device.type != "cpu" and not is_recorded(device)
        if readable and hasattr(torch.get_device_module(device), "get_rng_state"):
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


class DrawWatch(TorchDispatchMode):
    """Sees whether random numbers are drawn, where the state of a generator cannot be read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


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
