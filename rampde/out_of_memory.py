"""When memory does not suffice: everything of the solve is let go, and the error says what takes less."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from rampde.problem import Problem

T = TypeVar("T")

# how allocators say so that raise no error of a type of its own
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def explained(call: Callable[[], T], problem: Problem, road: str, forget: Callable[[], None]) -> T:
    """What ``call`` returns, a part of a solve on its ``road``.

    Raises:
        torch.OutOfMemoryError: memory did not suffice. It names the policy in use and the next cheaper one, and holds
            no tensor of the solve, as the frames of the error that was met would; ``forget`` lets go the rest.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0]
        traceback.clear_frames(error.__traceback__)
    # not while the error is handled, which this one would hold otherwise
    forget()
    policy = problem.checkpoint
    raise torch.OutOfMemoryError(
        f'out of memory in the {road} pass of a solve with checkpoint "{policy.name}": {first_line} Less is taken by'
        f" {policy.cheaper}, or by smaller batches"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)
