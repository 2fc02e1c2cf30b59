"""Who is told of a solve's steps: the callbacks of f, the statistics, the progress bar."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rampde.control import Attempt
from rampde.grid import time_dtype
from rampde.state import StateSpec
from rampde.statistics import Progress, SolveStats

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
"""Attributes of f that are called with ``(t0, y0, dt)`` before, after an accepted and after a rejected step."""

Callback = Callable[[Tensor, Any, Tensor], object]


class Observer:
    """Passes on what happens to the steps of a solve; costs next to nothing where nobody listens."""

    def __init__(
        self,
        func: object,
        spec: StateSpec,
        allowed: Sequence[str],
        method: str,
        stats: SolveStats | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._spec, self._stats, self._progress = spec, stats, progress
        found = {name: getattr(func, name, None) for name in CALLBACKS}
        unsupported = sorted(name for name, callback in found.items() if callback is not None and name not in allowed)
        if unsupported:
            warnings.warn(f"Solver '{method}' does not support callbacks {unsupported}", stacklevel=4)
        self._on_step, self._on_accept, self._on_reject = (
            found[name] if name in allowed else None for name in CALLBACKS
        )

    @property
    def listening(self) -> bool:
        """Whether anyone is told anything."""
        return any(
            listener is not None
            for listener in (self._on_step, self._on_accept, self._on_reject, self._stats, self._progress)
        )

    def step(self, attempt: Attempt, y: Sequence[Tensor]) -> None:
        """A step is about to be attempted from the state ``y``."""
        if self._on_step is not None:
            self._tell(self._on_step, attempt, y)

    def accepted(self, attempt: Attempt, y: Sequence[Tensor], ratio: float) -> None:
        """The step stands; ``ratio`` is its error in units of the tolerance."""
        if self._on_accept is not None:
            self._tell(self._on_accept, attempt, y)
        if self._stats is not None:
            self._stats.note_accepted(attempt.start, attempt.h, ratio)
        if self._progress is not None:
            self._progress.update(attempt.end)

    def rejected(self, attempt: Attempt, y: Sequence[Tensor], ratio: float) -> None:
        """The step is to be repeated with another size."""
        if self._on_reject is not None:
            self._tell(self._on_reject, attempt, y)
        if self._stats is not None:
            self._stats.note_rejected(attempt.start, attempt.h, ratio)

    def close(self) -> None:
        """The solve is over."""
        if self._progress is not None:
            self._progress.close()

    def _tell(self, callback: Callback, attempt: Attempt, y: Sequence[Tensor]) -> None:
        device = self._spec.device
        leaves = [leaf.detach().to(spec.real_dtype) for leaf, spec in zip(y, self._spec.leaves, strict=True)]
        dtype = time_dtype(device)
        callback(
            torch.tensor(attempt.start, dtype=dtype, device=device),
            self._spec.unflatten(leaves),
            torch.tensor(abs(attempt.h), dtype=dtype, device=device),
        )
