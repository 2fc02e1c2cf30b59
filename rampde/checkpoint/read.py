"""From what a user gives as ``checkpoint=`` to a policy."""

from __future__ import annotations

from rampde.checkpoint.binomial import Binomial
from rampde.checkpoint.policy import STAGES, Auto, Checkpoint

NAMES = ("auto", *STAGES)


def read_checkpoint(value: object, budget: object = None) -> Checkpoint:
    """The policy that ``value`` names, or is; ``budget`` is for "auto".

    Raises:
        TypeError, ValueError: what is given is none; the message says what is expected.
    """
    names = ", ".join(f'"{name}"' for name in NAMES)
    expected = f"one of {names}, a number of states, or an instance of rampde.Checkpoint"
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"memory_budget is {budget!r}, expected a number of bytes or None")
        if budget < 0:
            raise ValueError(f"memory_budget is {budget}, expected a number of bytes that is not negative")
        if value != "auto":
            raise ValueError(f'memory_budget was given with checkpoint={value!r}, expected it with "auto" alone')
    if isinstance(value, str):
        if value == "auto":
            return Auto(budget)
        if value not in STAGES:
            raise ValueError(f'checkpoint is "{value}", expected {expected}')
        return Checkpoint(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"checkpoint is {value}, expected {expected}, which is positive")
        return Binomial(value)
    if not isinstance(value, Checkpoint):
        raise TypeError(f"checkpoint is {value!r}, expected {expected}")
    if not value.keeps_every_step and value.stages not in ("step", "lean"):
        raise ValueError(
            f'checkpoint is {value!r}, whose schedule leaves steps out while stages is "{value.stages}", expected'
            ' stages "step" or "lean"'
        )
    return value
