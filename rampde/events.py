"""Events: where along a solution a function of it changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rampde.grid import time_dtype
from rampde.state import StateSpec
from rampde.tolerance import Tolerance

EventFunction = Callable[[Tensor, object], Tensor]

# halvings after which a step of float64 time has nothing left to halve
MOST_HALVINGS = 60


class EventSearch:
    """Watches ``event_fn(t, y)`` along a solution, and finds where it changes its sign.

    Of several values the first one to change counts: the least of them is watched, each taken with the sign that makes
    it positive at the start.
    """

    def __init__(self, event_fn: EventFunction, spec: StateSpec, tolerance: Tolerance) -> None:
        self._event_fn, self._spec = event_fn, spec
        self._signs: Tensor | None = None
        self._start_sign = 1.0
        bounds = [float(torch.as_tensor(bound).min()) for bound in tolerance.atol]
        self._precision = min(bounds)

    def begins_at_event(self, time: float, y: Sequence[Tensor]) -> bool:
        """Looks at the start of the solution, which may be where the event is."""
        values = self._evaluate(time, y)
        self._signs = torch.sign(values)
        least = float((values * self._signs).min())
        self._start_sign = math.copysign(1.0, least)
        return least == 0.0

    def crossed(self, time: float, y: Sequence[Tensor]) -> bool:
        """Whether the event lies at or before ``time``."""
        value = self._value(time, y)
        if math.isnan(value):
            raise RuntimeError(f"event_fn returned NaN at t = {time:.6g}, expected a number")
        return value == 0.0 or (value > 0) != (self._start_sign > 0)

    def locate(self, state_at: Callable[[float], Sequence[Tensor]], start: float, end: float) -> float:
        """The time of the event between ``start`` and ``end``, by halving, to the absolute tolerance."""
        width = abs(end - start)
        halvings = MOST_HALVINGS
        if self._precision > 0:
            halvings = min(max(math.ceil(math.log2(width / self._precision)), 0), MOST_HALVINGS)
        for _ in range(halvings):
            middle = (start + end) / 2
            value = self._value(middle, state_at(middle))
            if value != 0.0 and (value > 0) == (self._start_sign > 0):
                start = middle
            else:
                end = middle
        return (start + end) / 2

    def _value(self, time: float, y: Sequence[Tensor]) -> float:
        assert self._signs is not None
        return float((self._evaluate(time, y) * self._signs).min())

    def _evaluate(self, time: float, y: Sequence[Tensor]) -> Tensor:
        leaves = [leaf.detach().to(spec.real_dtype) for leaf, spec in zip(y, self._spec.leaves, strict=True)]
        device = self._spec.device
        with torch.no_grad():
            values = self._event_fn(
                torch.tensor(time, dtype=time_dtype(device), device=device), self._spec.unflatten(leaves)
            )
        if not isinstance(values, Tensor) or values.numel() == 0:
            given = f"a {type(values).__name__}" if not isinstance(values, Tensor) else "an empty tensor"
            raise TypeError(f"event_fn returned {given}, expected a tensor with at least one element")
        return values.detach()
