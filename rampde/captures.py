"""Finds every tensor that f uses and that requires a gradient.

An ``autograd.Function`` passes gradients only to its inputs, so the tensors f reaches on its own (parameters of
modules, tensors in a closure, results of computations outside the solve) must be found and made inputs. Two
sources are joined: the objects f can reach (modules, closures, bound objects, globals it names), and the graph of
its first evaluation, walked back to leaves and to edges that lead out of the evaluation. The second sees what no
object shows; the first sees what a time-dependent f uses only later.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rampde.state import State

Edge = tuple[Any, int]  # an autograd node and the number of one of its outputs

# how deep containers and plain objects are followed, and how long they may be: what lies beyond is found in the
# graph; parameters are found at any depth of a module
MAX_DEPTH = 4
MAX_LENGTH = 1024

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_INERT = (bool, int, float, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, types.NoneType)


@dataclass
class Captures:
    """Tensors that f uses besides its arguments.

    Attributes:
        tensors: each requires a gradient and occurs once; the first ``observed`` ones were seen in a graph.
        observed: how many of them the first evaluation used.
        untraced: names of graph nodes that lead out of f by an edge no tensor was seen for.
    """

    tensors: list[Tensor] = field(default_factory=list)
    observed: int = 0
    untraced: list[str] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Sees the tensors that enter torch functions, so that edges out of f can be matched to tensors."""

    def __init__(self, start: int, threaded: bool) -> None:
        super().__init__()
        self.start = start
        # f's own backward passes run on another thread except on the CPU: their node numbers do not compare
        self.threaded = threaded
        self.tensors: dict[Edge, Tensor] = {}
        self.numbers_mix = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            self._see(value)
            if isinstance(value, tuple | list):
                for item in value:
                    self._see(item)
        if func is torch.autograd.grad and self.threaded:
            self.numbers_mix = True
        return func(*args, **kwargs)

    def _see(self, value: object) -> None:
        if isinstance(value, Tensor):
            node = value.grad_fn
            if node is not None and node._sequence_nr() < self.start:
                self.tensors[node, value.output_nr] = value


def record(
    func: Callable[[Tensor, State], State],
    evaluate: Callable[[Tensor, list[Tensor]], list[Tensor]],
    time: Tensor,
    x: list[Tensor],
) -> tuple[list[Tensor], Captures]:
    """Evaluates f with its graph and finds what it captures.

    ``time`` and ``x`` are the arguments, leaves of the graph; ``evaluate`` calls ``func`` on them.
    """
    with torch.enable_grad():
        start = _sequence_number()
        recorder = _Recorder(start, threaded=x[0].device.type != "cpu")
        if hasattr(func, "_orig_mod") or hasattr(func, "_torchdynamo_orig_callable"):
            # a mode would make a compiled f compile anew; its graph alone tells of leaves
            k = evaluate(time, x)
        else:
            with recorder:
                k = evaluate(time, x)
    arguments = {id(tensor) for tensor in (time, *x)}
    found, untraced = _walk(k, start, recorder, arguments)
    observed = len(found)
    known = {id(tensor) for tensor in found} | arguments
    found += [tensor for tensor in reachable_tensors(func) if id(tensor) not in known]
    return k, Captures(found, observed, untraced)


def _sequence_number() -> int:
    """Autograd numbers the nodes of a thread upwards: nodes made from now on have at least this number."""
    marker = torch.empty((), requires_grad=True).view(())
    assert marker.grad_fn is not None
    return marker.grad_fn._sequence_nr()


def _walk(k: Sequence[Tensor], start: int, recorder: _Recorder, arguments: set[int]) -> tuple[list[Tensor], list[str]]:
    """Tensors at which the graph of ``k`` leaves f, and names of nodes outside that no tensor stands for."""
    found: dict[int, Tensor] = {}
    untraced: list[str] = []
    visited: set[Any] = set()
    pending: list[Edge] = []
    for value in k:
        if value.grad_fn is not None:
            pending.append((value.grad_fn, value.output_nr))
        elif value.requires_grad and id(value) not in arguments:
            found[id(value)] = value  # f returns a tensor of its own as it is
    while pending:
        node, output = pending.pop()
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable
            if id(leaf) not in arguments:
                found[id(leaf)] = leaf
            continue
        seen = recorder.tensors.get((node, output))
        if seen is not None:
            found[id(seen)] = seen
            continue
        if node in visited:
            continue
        visited.add(node)
        if node._sequence_nr() < start and not recorder.numbers_mix:
            untraced.append(node.name())
            continue
        pending.extend(edge for edge in node.next_functions if edge[0] is not None)
    return list(found.values()), untraced


def reachable_tensors(func: object) -> list[Tensor]:
    """Tensors that require a gradient and that ``func`` can reach without being called."""
    found: dict[int, Tensor] = {}
    visited: set[int] = set()
    pending: list[tuple[object, int]] = [(func, 0)]
    while pending:
        value, depth = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            if value.requires_grad:
                found[id(value)] = value
        elif depth < MAX_DEPTH:
            pending.extend((item, depth + 1) for item in _contents(value) if not isinstance(item, _INERT))
    return list(reversed(found.values()))


def _contents(value: object) -> Iterable[object]:
    """What ``value`` holds directly."""
    if isinstance(value, nn.Module):
        contents: list[object] = list(value.parameters())
        for module in value.modules():
            contents += (item for name, item in vars(module).items() if name not in _MODULE_INTERNALS)
            contents += module._buffers.values()
        return contents
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.FunctionType):
        names = value.__code__.co_names
        globals_used = [value.__globals__[name] for name in names if name in value.__globals__]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return (*globals_used, *cells, *defaults, getattr(value, "__wrapped__", None))
    if isinstance(value, dict):
        return value.values() if len(value) <= MAX_LENGTH else ()
    if isinstance(value, list | tuple | set | frozenset):
        return value if len(value) <= MAX_LENGTH else ()
    return vars(value).values() if hasattr(value, "__dict__") else ()
