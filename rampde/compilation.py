"""What ``torch.compile`` returned: whether f is that, what it was made of, and how."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def traced_as_constant(function: F) -> F:
    """What ``torch.compile`` calls while it traces, with numbers for tensors, and whose result it holds."""
    # what torch.compiler.assume_constant_result does, which imports the whole compiler
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_compiled(func: object) -> bool:
    """Whether ``func`` is what ``torch.compile`` returned; an object around it, which passes its attributes on, is
    not."""
    if isinstance(func, nn.Module):
        return "_orig_mod" in func._modules
    return isinstance(func, types.FunctionType) and "_torchdynamo_orig_callable" in vars(func)


def as_written(func: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` was given, where ``func`` is what it returned; else ``func``."""
    if not is_compiled(func):
        return func
    attribute = "_orig_mod" if isinstance(func, nn.Module) else "_torchdynamo_orig_callable"
    found: Callable[..., Any] = getattr(func, attribute)
    return found


def compiler_of(func: object) -> Callable[..., Any] | None:
    """What compiles another function as ``func`` was compiled; None where that is not known."""
    if not is_compiled(func):
        return None
    found = getattr(func, "dynamo_ctx", None)
    if found is None:
        # of a function it is held by the wrapper alone
        names = getattr(getattr(func, "__code__", None), "co_freevars", ())
        held = dict(zip(names, getattr(func, "__closure__", None) or (), strict=False))
        found = held["self"].cell_contents if "self" in held else None
    return found if callable(found) else None
