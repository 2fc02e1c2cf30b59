"""A CUDA graph without a GPU: the operators of some work, recorded once and executed again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HOST_READS = {
    "aten::_local_scalar_dense": "reads a number",
    "aten::equal": "reads whether tensors are equal",
    "aten::is_nonzero": "reads a truth value",
    "aten::nonzero": "makes a tensor whose size depends on values",
    "aten::masked_select": "makes a tensor whose size depends on values",
    "aten::lift_fresh": "copies host numbers to the device",
}
"""Operators for which a stream has to wait, which capturing does not allow."""

# on a tensor of the host they call no operator, on one of a device they wait for it
METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "__array__"}

UNWRITTEN = ("aten::empty", "aten::new_empty")


class HostRead(RuntimeError):
    """The work that is recorded waits for the device, or gives it numbers of the host."""


@dataclass
class _Call:
    """One operator: ``made`` are the results that alias no argument, as recording produced them."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]


@dataclass
class EmulatedGraph:
    """Records work as a capture does, and replays it as a graph does.

    - Recording leaves no values behind: what the work has written to tensors from outside is undone, and what it has
      made is NaN until the first replay. Memory that is allocated in the work is NaN at each replay, too.
    - A replay runs no Python of the work. The recorded operators are executed again, in their order, on the very
      tensors that recording has seen; what they return is written into the tensors that recording has made. Views
      stay views, of the same memory.
    - What waits for the device while the work is recorded raises :class:`HostRead`.

    The backward pass of autograd is recorded with the rest, where the work contains one.

    Attributes:
        operators: names of what a replay executes, of all that was recorded.
        replays: how often something was replayed.
    """

    operators: list[str] = field(default_factory=list)
    replays: int = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records ``work``; what it returns repeats it.

        Raises:
            HostRead: the work reads the device, or copies to it.
        """
        recording = _Recording()
        with _NoHostReads(), recording:
            work()
        recording.undo()
        calls, touched = recording.calls, tuple(recording.touched())
        self.operators += [call.func._schema.name for call in calls]

        def replay() -> None:
            self.replays += 1
            # a graph knows neither autograd nor autocast, and shows in no version counter
            with (
                torch.no_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autograd._unsafe_preserve_version_counter(touched),
            ):
                for call in calls:
                    _repeat(call)

        return replay


def _repeat(call: _Call) -> None:
    if call.func._schema.name.startswith(UNWRITTEN):
        _poison(tensor for _, tensor in call.made)
        return
    results = tree_leaves(call.func(*call.args, **call.kwargs))
    for index, tensor in call.made:
        tensor.detach().copy_(results[index])


def _poison(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.detach().fill_(float("nan"))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _addresses(tree: Any) -> Any:
    """The tree with aliases of its tensors: a graph knows where they lie, not which objects they are."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _NoHostReads(TorchFunctionMode):
    """Refuses the methods of tensors that read them without an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            raise HostRead(f"Tensor.{METHODS[func]} reads a tensor, which no graph can")
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    """Executes operators and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        # memory that was made in the work, and what other memory has held before the work wrote to it
        self._own: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in HOST_READS:
            raise HostRead(f"{name} {HOST_READS[name]}, which no graph can")
        if name in ("aten::index", "aten::index_put_") and any(x.dtype == torch.bool for x in _tensors(args[1])):
            raise HostRead(f"{name} with a mask selects as many elements as its values say, which no graph can")
        if func._schema.is_mutable:
            self._remember(func, args, kwargs)
        result = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        results = tree_leaves(result)
        made = [(i, x) for i, x in enumerate(results) if isinstance(x, Tensor) and _memory(x) not in given]
        self._own |= {_memory(tensor) for _, tensor in made}
        # what makes nothing and writes nothing makes views, which need no repetition
        if made or func._schema.is_mutable:
            self.calls.append(_Call(func, *_addresses((args, kwargs)), made))
        return result

    def _remember(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the tensors hold that ``func`` is about to write to."""
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                memory = _memory(tensor)
                if memory not in self._own and memory not in self._before:
                    storage = tensor.untyped_storage()
                    self._before[memory] = storage, storage.clone()

    def undo(self) -> None:
        """Takes back all values that recording has written."""
        made = self._made()
        # a capture executes nothing, which for autograd is no change
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(made)):
            _poison(made)
        for storage, before in self._before.values():
            storage.copy_(before)

    def _made(self) -> list[Tensor]:
        return [tensor for call in self.calls for _, tensor in call.made]

    def touched(self) -> list[Tensor]:
        """All tensors that a replay writes to, and more."""
        return [*self._made(), *(x for call in self.calls for x in _tensors((call.args, call.kwargs)))]
