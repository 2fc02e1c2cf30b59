"""Any policy, with what it keeps in host memory; on the CPU in a file."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_map

from rampde.checkpoint.fp8 import Fp8
from rampde.checkpoint.host_copy import HostCopy, HostMemory, is_copy
from rampde.checkpoint.policy import Checkpoint, untraced
from rampde.checkpoint.read import read_checkpoint

# saved tensors that are brought back ahead of the one that is needed
AHEAD = 4


class Offload(Checkpoint):
    """Keeps what another policy keeps off the device: on a GPU in pinned host memory, on the CPU in a mapped file.

    Copies run on a stream of their own beside the computation, nothing waits for them on the host, and in the backward
    pass the next state is on its way while a step is swept. Of "none" the tensors that the graphs save are kept so,
    parameters left out.
    """

    def __init__(self, policy: Checkpoint | str | int = "step", folder: str | None = None) -> None:
        """
        Args:
            policy: what is kept: any of the policies that ``checkpoint=`` takes but "auto", "tape" and this one.
            folder: where files are made for tensors of the CPU; None for the system's folder of temporary files.
                Where that lies in memory, as it may on Linux, another one is needed to gain anything.

        Raises:
            TypeError, ValueError: an argument that is not as described.
        """
        inner = read_checkpoint(policy)
        if inner.is_tape or isinstance(inner, Offload) or inner.name == "auto":
            raise ValueError(
                f"policy is {inner.name}, which cannot be offloaded; expected a policy that keeps something"
            )
        if folder is not None and not isinstance(folder, str):
            raise TypeError(f"folder is {folder!r}, expected a path or None")
        super().__init__(inner.stages)
        self.policy = inner
        self._memory = HostMemory(folder)

    @property
    def name(self) -> str:
        return f"offload {self.policy.name}"

    @property
    def releases_inputs(self) -> bool:
        return self.stages == "none"

    @property
    def quantiser(self) -> Fp8 | None:
        return self.policy.quantiser

    @property
    def keeps_every_step(self) -> bool:
        return self.policy.keeps_every_step

    @property
    def cheaper(self) -> str:
        return self.policy.cheaper

    def __repr__(self) -> str:
        return f"Offload({self.policy!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # files, streams and locks belong to a process
        return Offload, (self.policy, self._memory.folder)

    def schedule(self, step: int, end: int | None, kept: Sequence[int]) -> Sequence[int]:
        return self.policy.schedule(step, end, kept)

    def store(self, state: Tensor) -> Any:
        inner = self.policy.store(state)
        return tree_map(lambda leaf: self._memory.copy(leaf) if isinstance(leaf, Tensor) else leaf, inner)

    def load(self, stored: Any) -> Tensor:
        return self.policy.load(tree_map(lambda leaf: leaf.get() if is_copy(leaf) else leaf, stored))

    def prefetch(self, stored: Any) -> None:
        for leaf in tree_flatten(stored)[0]:
            if is_copy(leaf):
                leaf.prefetch()

    def recording(self) -> AbstractContextManager[Any]:
        if self.stages != "none":
            return nullcontext()
        recording = _Recording(self._memory)
        return torch.autograd.graph.saved_tensors_hooks(untraced(recording.pack), untraced(recording.unpack))


class _Saved:
    """A tensor that a graph saved, and the one that was saved before it."""

    def __init__(self, copy: HostCopy, storage: StorageWeakRef, previous: _Saved | None) -> None:
        """``storage``: the memory that was copied."""
        self.copy, self.storage = copy, storage
        self._previous = None if previous is None else weakref.ref(previous)

    @property
    def previous(self) -> _Saved | None:
        return None if self._previous is None else self._previous()


class _Recording:
    """Takes the tensors that graphs save off the device, each memory once, and brings them back in reverse order."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._known: weakref.WeakValueDictionary[tuple[Any, ...], _Saved] = weakref.WeakValueDictionary()
        self._latest: Callable[[], _Saved | None] = lambda: None

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if base.is_leaf and base.requires_grad:
            return tensor  # a parameter, which is there anyway
        storage = tensor.untyped_storage()
        place = storage._cdata, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        known = self._known.get(place)
        # memory that was freed may hold another tensor by now
        if known is not None and not known.storage.expired():
            return known
        saved = _Saved(self._memory.copy(tensor.detach()), StorageWeakRef(storage), self._latest())
        self._known[place], self._latest = saved, weakref.ref(saved)
        return saved

    def unpack(self, packed: Tensor | _Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.copy.get()
        previous = packed.previous
        for _ in range(AHEAD):
            if previous is None:
                break
            previous.copy.prefetch()
            previous = previous.previous
        return tensor
