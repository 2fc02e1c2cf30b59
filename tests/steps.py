"""Adaptive methods on steps that are known before: what a test needs to compare or to perturb them."""

from typing import Any

from rampde.methods import ADAPTIVE


def equal_steps(h: float) -> dict[str, Any]:
    """Options under which every step of an adaptive method has the size ``h`` and is accepted."""
    return {"first_step": h, "min_step": h, "max_step": h}


def options_of(method: str, h: float) -> dict[str, Any] | None:
    """``equal_steps(h)`` for an adaptive method, nothing for one whose steps the output times decide."""
    return equal_steps(h) if method in ADAPTIVE else None
