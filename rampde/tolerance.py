"""Tolerances of a solve: a number, a tensor, or one of these for each tensor of the state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from rampde.state import Leaf, StateSpec

Bound = float | Tensor


@dataclass(frozen=True)
class Tolerance:
    """Relative and absolute tolerance of each leaf: a float, or a float64 tensor that broadcasts to the leaf.

    An element's error may be ``atol + rtol * |y|``.
    """

    rtol: list[Bound]
    atol: list[Bound]

    @property
    def uniform(self) -> bool:
        """Whether all bounds are numbers, as the fused operator takes them."""
        return not any(isinstance(bound, Tensor) for bound in (*self.rtol, *self.atol))


def read_tolerance(spec: StateSpec, rtol: object, atol: object) -> Tolerance:
    """The tolerances as the user gave them, checked against the state.

    Raises:
        TypeError: neither a number, nor a tensor, nor one of these for each tensor of the state.
        ValueError: negative, a tensor that requires a gradient or does not broadcast, or another number of them.
    """
    return Tolerance(_read("rtol", rtol, spec), _read("atol", atol, spec))


def _read(name: str, value: object, spec: StateSpec) -> list[Bound]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} cannot require gradient, but requires_grad is True")
        if value.dim() > 0 and not spec.is_tensor:
            return _one_for_each(name, list(value.unbind(0)), spec)
        return [_bound(name, value, leaf) for leaf in spec.leaves]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        items = list(value)
        if not spec.is_tensor:
            return _one_for_each(name, items, spec)
        for item in items:
            _check_number(name, item, value)
        return [_bound(name, torch.tensor(items, dtype=torch.float64), spec.leaves[0])]
    return [_bound(name, value, leaf) for leaf in spec.leaves]


def _one_for_each(name: str, items: list[object], spec: StateSpec) -> list[Bound]:
    if len(items) != len(spec.leaves):
        raise ValueError(f"{name} has {len(items)} values, expected {len(spec.leaves)}, one for each tensor of y0")
    return [_bound(name, item, leaf) for item, leaf in zip(items, spec.leaves, strict=True)]


def _bound(name: str, value: object, leaf: Leaf) -> Bound:
    if not isinstance(value, Tensor):
        return _check_number(name, value, value)
    if value.requires_grad:
        raise ValueError(f"{name} cannot require gradient, but requires_grad is True")
    if value.dim() == 0:
        return _check_number(name, value.item(), value)
    _check_broadcast(name, list(value.shape), list(leaf.shape))
    if value.numel() == 1:
        return _check_number(name, value.item(), value)
    return value.detach()


def _check_number(name: str, number: object, given: object) -> float:
    if isinstance(number, Tensor) and number.dim() == 0:
        number = number.item()
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} is {given!r}, expected a number, or one for each tensor of y0")
    if not float(number) >= 0:
        raise ValueError(f"{name} is {given!r}, expected a number that is not negative")
    return float(number)


def _check_broadcast(name: str, shape: list[int], state: list[int]) -> None:
    fits = len(shape) <= len(state) and all(
        size in (1, of_state) for size, of_state in zip(reversed(shape), reversed(state), strict=False)
    )
    if not fits and shape != [1]:
        raise ValueError(f"{name} has shape {shape}, expected one that broadcasts to that of y0, {state}")
