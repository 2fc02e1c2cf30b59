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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rampde.compilation import as_written, is_compiled
from rampde.state import State

Edge = tuple[Any, int]  # an autograd node and the number of one of its outputs

# how deep containers and plain objects are followed, and how long they may be: what lies beyond is found in the
# graph; parameters are found at any depth of a module
MAX_DEPTH = 4
MAX_LENGTH = 1024

# the node of torch.utils.checkpoint that takes gradients with respect to everything or nothing
_REENTRANT = "CheckpointFunctionBackward"
# by which FSDP knows that the backward pass has left a call: it would take each product of a sweep for the last one
_SHARDED = "RegisterPostBackwardFunctionBackward"
# that of a part of f that torch.compile made
_COMPILED = "CompiledFunctionBackward"

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_INERT = (bool, int, float, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, types.NoneType)


@dataclass
class Captures:
    """Tensors that f uses besides its arguments.

    Attributes:
        tensors: each requires a gradient and occurs once; the first ``observed`` ones were seen in a graph.
        observed: how many of them the first evaluation used.
        opaque: whether f was seen to use a tensor that none of the objects it holds shows.
        problem: why the gradients cannot be taken by a sweep; empty where they can.
        compiled: whether a part of f is compiled, whose graphs cannot be used twice.
        constants: tensors that f can reach and that require no gradient.
        buffers: those of ``constants`` that are buffers of modules in training, which f may change.
    """

    tensors: list[Tensor] = field(default_factory=list)
    observed: int = 0
    opaque: bool = False
    problem: str = ""
    compiled: bool = False
    constants: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Sees the tensors that enter torch functions, so that edges out of f can be matched to tensors."""

    def __init__(self, start: int, threaded: bool) -> None:
        super().__init__()
        self.start = start
        # f's own backward passes run on another thread except on the CPU: their node numbers do not compare
        self.threaded = threaded
        self.tensors: dict[Edge, Tensor] = {}
        self.numbers_mix = False
        self.compiled = False  # what the walk along the graph has seen

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
        if is_compiled(func):
            # a mode would make a compiled f compile anew; its graph alone tells of leaves
            k = evaluate(time, x)
        else:
            with recorder:
                k = evaluate(time, x)
    arguments = {id(tensor) for tensor in (time, *x)}
    used, untraced = _walk(k, start, recorder, arguments)
    reachable, constants, buffers, compiled, _ = reachable_tensors(as_written(func))
    compiled = compiled or is_compiled(func)
    known = {id(tensor) for tensor in used}
    unused = [tensor for tensor in reachable if id(tensor) not in known | arguments]
    shown = {id(tensor) for tensor in reachable}
    opaque = any(id(tensor) not in shown for tensor in used)
    unused, problem = _untangle(used, unused)
    if _REENTRANT in untraced:
        problem = "uses torch.utils.checkpoint with use_reentrant=True, which refuses the products of a sweep"
    elif _SHARDED in untraced:
        problem = "runs a method of a sharded module (register_fsdp_forward_method) instead of the module itself"
    elif any(getattr(tensor, "_is_flat_param", False) for tensor in used):
        problem = "calls a FullyShardedDataParallel module, which frees its parameters after every evaluation"
    elif untraced:
        problem = f"uses the result of {untraced[0]}, computed outside of it, which could not be traced to a tensor"
    return k, Captures(used + unused, len(used), opaque, problem, compiled or recorder.compiled, constants, buffers)


def _untangle(used: list[Tensor], unused: list[Tensor]) -> tuple[list[Tensor], str]:
    """The ``unused`` that no other capture was computed from, nor they from a used one; and whether f uses both
    a tensor and what was computed from it.

    A product with respect to both would run through the computation between them, outside of f, at every stage,
    and autograd would run through it once more.
    """
    computed = [tensor for tensor in (*used, *unused) if tensor.grad_fn is not None]
    if not computed:
        return unused, ""
    origins = {_edge(tensor): tensor for tensor in (*used, *unused)}
    in_use = {id(tensor) for tensor in used}
    dropped: set[int] = set()
    for tensor in computed:
        for origin in _origins(tensor, origins):
            if id(origin) not in in_use:
                dropped.add(id(origin))
            elif id(tensor) not in in_use:
                dropped.add(id(tensor))
            else:
                return unused, "uses both a tensor and another one that was computed from it"
    return [tensor for tensor in unused if id(tensor) not in dropped], ""


def _edge(tensor: Tensor) -> Edge:
    """What stands for a tensor in the graph of whatever was computed from it."""
    return (id(tensor), 0) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _edge_of(node: Any, output: int) -> Edge:
    return (id(node.variable), 0) if _is_leaf(node) else (node, output)


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _origins(tensor: Tensor, candidates: dict[Edge, Tensor]) -> list[Tensor]:
    """Those of ``candidates`` from which ``tensor`` was computed."""
    found: list[Tensor] = []
    visited: set[Any] = set()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        for node, output in pending.pop().next_functions:
            if node is None:
                continue
            origin = candidates.get(_edge_of(node, output))
            if origin is not None:
                found.append(origin)
            if node not in visited:
                visited.add(node)
                pending.append(node)
    return found


def any_related(tensors: Sequence[Tensor]) -> bool:
    """Whether one of ``tensors`` was computed from another one."""
    candidates = {_edge(tensor): tensor for tensor in tensors}
    return any(tensor.grad_fn is not None and _origins(tensor, candidates) for tensor in tensors)


def own_shares(tensors: Sequence[Tensor], totals: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with respect to ``tensors`` as if none of them was computed from another one.

    ``totals`` are the gradients along all paths, those that lead from one of the tensors to another one included.
    """
    places = {_edge(tensor): place for place, tensor in enumerate(tensors)}
    candidates = {_edge(tensor): tensor for tensor in tensors}
    origins = [
        set() if tensor.grad_fn is None else {places[_edge(origin)] for origin in _origins(tensor, candidates)}
        for tensor in tensors
    ]
    shares, done, pending = list(totals), list[int](), set(range(len(tensors)))
    while pending:
        # from which nothing that is left was computed
        ready = pending.difference(*(origins[place] for place in pending))
        for place in ready:
            through = [other for other in done if place in origins[other]]
            if through:
                (passed,) = torch.autograd.grad(
                    [tensors[other] for other in through],
                    tensors[place],
                    [shares[other].to(tensors[other].dtype) for other in through],
                    retain_graph=True,
                )
                shares[place] = shares[place] - passed.to(shares[place].dtype)
        done += ready
        pending -= ready
    return shares


def find_unknown_leaf(k: Sequence[Tensor], known: Iterable[Tensor]) -> Tensor | None:
    """A leaf in the graph of ``k`` that is none of ``known``, nor lies behind one of them."""
    edges = {_edge(tensor) for tensor in known}
    visited: set[Any] = set()
    pending: list[Edge] = [(value.grad_fn, value.output_nr) for value in k if value.grad_fn is not None]
    while pending:
        node, output = pending.pop()
        if _edge_of(node, output) in edges or node in visited:
            continue
        if _is_leaf(node):
            leaf: Tensor = node.variable
            return leaf
        visited.add(node)
        pending.extend(edge for edge in node.next_functions if edge[0] is not None)
    return None


@contextmanager
def hooks_muted(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Hooks on ``tensors`` do not run: they are for the whole gradient, not for each stage's part of it."""
    muted = []
    try:
        for tensor in tensors:
            hooks = tensor._backward_hooks
            if hooks:
                muted.append((hooks, dict(hooks)))
                hooks.clear()
        yield
    finally:
        for hooks, own in muted:
            added = dict(hooks)
            hooks.clear()
            hooks.update(own | added)


def _sequence_number() -> int:
    """Autograd numbers the nodes of a thread upwards: nodes made from now on have at least this number."""
    marker = torch.empty((), requires_grad=True).view(())
    assert marker.grad_fn is not None
    return marker.grad_fn._sequence_nr()


def _walk(k: Sequence[Tensor], start: int, recorder: _Recorder, arguments: set[int]) -> tuple[list[Tensor], list[str]]:
    """Tensors at which the graph of ``k`` leaves f, and names of nodes that no product can be taken through: outside of
    f without a tensor that stands for them, reentrant checkpoints, or calls that FSDP watches."""
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
        if _is_leaf(node):
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
        name = node.name()
        recorder.compiled = recorder.compiled or name == _COMPILED
        if name in (_REENTRANT, _SHARDED):
            untraced.append(name)
        if node._sequence_nr() < start and not recorder.numbers_mix and not _is_cached_cast(node):
            untraced.append(node.name())
            continue
        pending.extend(edge for edge in node.next_functions if edge[0] is not None)
    return list(found.values()), untraced


def _is_cached_cast(node: Any) -> bool:
    """Whether the node is the cast of a leaf, as autocast made it once for all uses in the caller's region."""
    following = node.next_functions
    return node.name() == "ToCopyBackward0" and len(following) == 1 and _is_leaf(following[0][0])


class Reachable(NamedTuple):
    """Tensors that an object holds: those that require a gradient, the others, and buffers of modules in training; and
    whether it holds anything that torch.compile made. ``registered``: identities of what modules hold as buffers."""

    requiring: list[Tensor]
    constants: list[Tensor]
    buffers: list[Tensor]
    compiled: bool
    registered: set[int]


def reachable_tensors(func: object) -> Reachable:
    """Tensors that ``func`` can reach without being called."""
    found: dict[int, Tensor] = {}
    constants: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    compiled = False
    registered: set[int] = set()
    visited: set[int] = set()
    pending: list[tuple[object, int]] = [(func, 0)]
    while pending:
        value, depth = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            (found if value.requires_grad else constants)[id(value)] = value
        elif depth < MAX_DEPTH:
            compiled = compiled or _is_compiled(value)
            if isinstance(value, nn.Module):
                buffers.update((id(buffer), buffer) for buffer in _buffers(value, in_training=True))
                registered.update(id(buffer) for buffer in _buffers(value))
            pending.extend((item, depth + 1) for item in _contents(value) if not isinstance(item, _INERT))
    requiring = list(reversed(found.values()))
    return Reachable(requiring, list(constants.values()), list(buffers.values()), compiled, registered)


def _is_compiled(value: object) -> bool:
    if isinstance(value, nn.Module):
        parts = list(value.modules())
        return any("_orig_mod" in part._modules or part.__dict__.get("_compiled_call_impl") for part in parts)
    return isinstance(value, types.FunctionType) and is_compiled(value)


def _buffers(module: nn.Module, in_training: bool = False) -> Iterator[Tensor]:
    for part in module.modules():
        if part.training or not in_training:
            yield from (buffer for buffer in part._buffers.values() if buffer is not None)


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
