"""Solves that ``torch.compile`` cannot hold: they run outside of its graphs, with f compiled by itself.

Where the host decides on the steps, or iterates, no graph could hold them; what is worth compiling is f.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from rampde.compilation import is_compiled
from rampde.families import EXPLICIT, family_of, solves_equations
from rampde.methods import get_method

P = ParamSpec("P")
Result = TypeVar("Result")

REASON = (
    "a solve whose steps follow from the values of tensors, such as an adaptive or an implicit one, runs outside of"
    " compiled graphs, with func compiled by itself; leave fullgraph=True away, or use an explicit method with fixed"
    " steps, such as method='rk4'"
)


_THIS = sys.modules[__name__]
_OUTSIDE: dict[str, tuple[Callable[..., Any], str]] = {}


def __getattr__(name: str) -> Callable[..., Any]:
    """A function that is not to be traced, made when a compiler asks for it: importing the compiler takes seconds."""
    if name not in _OUTSIDE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function, reason = _OUTSIDE[name]
    found: Callable[..., Any] = torch.compiler.disable(function, reason=reason)
    globals()[name] = found
    return found


def is_held(method: object, event_fn: object) -> bool:
    """Whether a solve by ``method`` consists of the same operations whatever the values of its tensors are."""
    return event_fn is None and family_of(get_method(method)) is EXPLICIT


def outside(function: Callable[P, Result], reason: str) -> Callable[P, Result]:
    """``function``, which breaks the graph where ``torch.compile`` meets it.

    With ``fullgraph=True`` that is an error, which gives the ``reason``.
    """
    name = f"_outside_{len(_OUTSIDE)}"
    _OUTSIDE[name] = function, reason

    @wraps(function)
    def front(*args: P.args, **kwargs: P.kwargs) -> Result:
        if torch.compiler.is_dynamo_compiling():
            broken: Callable[P, Result] = getattr(_THIS, name)
            return broken(*args, **kwargs)
        return function(*args, **kwargs)

    return front


def breaks_graph(solve: Callable[..., Result]) -> Callable[..., Result]:
    """``solve``, a function of f and further arguments, outside of graphs, for which f is compiled by itself."""

    def with_compiled(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Result:
        return solve(_compiled(func, kwargs.get("method")), *args, **kwargs)

    broken = outside(with_compiled, REASON)

    @wraps(solve)
    def front(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Result:
        return (broken if torch.compiler.is_dynamo_compiling() else solve)(func, *args, **kwargs)

    return front


def _compiled(func: Callable[..., Any], method: object) -> Callable[..., Any]:
    """``func``, compiled where that serves; what was compiled for it before is found again by PyTorch itself."""
    if is_compiled(func) or not callable(func) or solves_equations(get_method(method)):
        return func
    return torch.compile(func)
