"""The policy "auto": what the graph of f keeps is measured at its first evaluation, and a policy chosen by that."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rampde.checkpoint.costs import Sizes
from rampde.checkpoint.policy import Auto, Checkpoint, untraced
from rampde.free_memory import free_memory
from rampde.problem import Problem

SHARE = 4
"""Of the free memory, the part of which a solve may take one."""

# a product with the Jacobian costs about as much as two evaluations
PRODUCT = 2


class SavedBytes:
    """Bytes that graphs save, each memory once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def note(self, tensor: Tensor) -> None:
        for storage in _storages(tensor):
            self._sizes[storage.data_ptr()] = storage.nbytes()

    def beyond(self, shared: Iterable[Tensor]) -> int:
        """All bytes but those of ``shared`` tensors, which are there anyway."""
        there = {storage.data_ptr() for tensor in shared for storage in _storages(tensor)}
        return sum(size for place, size in self._sizes.items() if place not in there)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Where the numbers of ``tensor`` are; of one that wraps others, such as a DTensor, theirs."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    names, _ = tensor.__tensor_flatten__()
    for value in (getattr(tensor, name) for name in names):
        if isinstance(value, Tensor):
            yield from _storages(value)


@contextmanager
def saved_bytes() -> Iterator[SavedBytes]:
    """Measures what is saved by the graphs recorded within."""
    found = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        # not what autocast made of a parameter, once for all evaluations
        if not _is_of_parameter(tensor):
            found.note(tensor)
        # an alias: the graph must not hold the tensor that holds the graph
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(untraced(pack), untraced(lambda tensor: tensor)):
        yield found


def _is_of_parameter(tensor: Tensor) -> bool:
    base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
    if base.grad_fn is None:
        return base.requires_grad
    following = base.grad_fn.next_functions
    cast = base.grad_fn.name() == "ToCopyBackward0" and len(following) == 1
    return cast and type(following[0][0]).__name__ == "AccumulateGrad"


def hooks_are_set() -> bool:
    """Whether the caller treats what graphs save in a way of its own, such as ``save_on_cpu``."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def choose(sizes: Sizes, budget: int, policies: Iterable[Checkpoint]) -> Checkpoint:
    """The fastest of ``policies`` that fits into ``budget`` bytes; where none does, the one that takes least."""

    def work(policy: Checkpoint) -> int:
        evaluations = sizes.evaluations(policy)
        return evaluations.plain + evaluations.with_graph + PRODUCT * evaluations.products

    def memory(policy: Checkpoint) -> int:
        return sizes.kept(policy) + sizes.alive(policy)

    known = list(policies)
    fitting = [policy for policy in known if memory(policy) <= budget]
    if fitting:
        return min(fitting, key=lambda policy: (work(policy), memory(policy)))
    return min(known, key=lambda policy: (memory(policy), work(policy)))


class Choices:
    """What was chosen for a func, a shape and a method, for as long as the func lives."""

    def __init__(self) -> None:
        self._of_func: weakref.WeakKeyDictionary[Any, dict[Any, Checkpoint]] = weakref.WeakKeyDictionary()

    def get(self, problem: Problem) -> Checkpoint | None:
        """The policy that was chosen."""
        try:
            return self._of_func.get(problem.velocity.original, {}).get(_key(problem))
        except TypeError:
            return None  # nothing that could be remembered: not hashable, or without weak references

    def put(self, problem: Problem, policy: Checkpoint) -> None:
        try:
            self._of_func.setdefault(problem.velocity.original, {})[_key(problem)] = policy
        except TypeError:
            return


def _key(problem: Problem) -> tuple[Any, ...]:
    velocity, asked = problem.velocity, problem.checkpoint
    leaves = tuple((leaf.shape, leaf.dtype) for leaf in velocity.spec.leaves)
    budget = asked.budget if isinstance(asked, Auto) else None
    training = getattr(velocity.original, "training", None)
    return (
        leaves, tuple(velocity.dtypes), velocity.autocast, velocity.spec.device, id(problem.method),
        problem.grid.steps, problem.compensated, problem.per_sample, budget, training,
    )  # fmt: skip


CHOICES = Choices()


def budget_of(policy: Auto, device: torch.device) -> int:
    """Bytes that a solve may take."""
    return free_memory(device) // SHARE if policy.budget is None else policy.budget
