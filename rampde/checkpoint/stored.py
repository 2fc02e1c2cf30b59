"""Tensors of each step as a policy stores them, between the road out and the road back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from rampde.checkpoint.policy import Checkpoint


class StoredSteps:
    """A list of what was stored of each step.

    Tensors in it are saved by autograd, which may offload them or check them for changes in place; anything else that
    the policy made is held here.
    """

    def __init__(self, policy: Checkpoint) -> None:
        self.policy = policy
        self._steps: list[list[Any]] = []
        self._saved: _Split | None = None

    def append(self, leaves: Iterable[Any]) -> list[Any]:
        """Stores what is kept of the next step."""
        stored = [self.policy.store(leaf) for leaf in leaves]
        self._steps.append(stored)
        return stored

    def loaded(self, step: int) -> list[Tensor]:
        """What was stored of ``step``; that of the step before is announced."""
        policy = self.policy
        leaves = [policy.load(stored) for stored in self._steps[step]]
        if step > 0:
            for stored in self._steps[step - 1]:
                policy.prefetch(stored)
        return leaves

    def tensors(self) -> list[Tensor]:
        """What is to be saved for the backward pass by autograd."""
        self._saved = _Split(self._steps)
        self._steps = []
        tensors, self._saved.tensors = self._saved.tensors, []
        return tensors

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Takes back what ``tensors`` gave, when a backward pass begins."""
        assert self._saved is not None
        self._steps = self._saved.joined(tensors)

    def rest(self) -> None:
        """A backward pass is over, and another one may follow: forgets what ``restore`` took."""
        self._steps = []

    def clear(self) -> None:
        """Forgets everything."""
        self._steps, self._saved = [], None


class _Split:
    """A nesting of containers, split into its tensors and the rest."""

    def __init__(self, content: Any) -> None:
        leaves, self._spec = tree_flatten(content)
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._rest = [None if flag else leaf for leaf, flag in zip(leaves, self._is_tensor, strict=True)]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def joined(self, tensors: Sequence[Tensor]) -> Any:
        """The content, around the ``tensors`` that it had."""
        given = iter(tensors)
        leaves = [next(given) if flag else rest for flag, rest in zip(self._is_tensor, self._rest, strict=True)]
        return tree_unflatten(leaves, self._spec)
