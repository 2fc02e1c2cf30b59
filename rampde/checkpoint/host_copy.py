"""Copies of tensors off the device: in pinned host memory, beside the computation; of the CPU's in a mapped file."""

from __future__ import annotations

import mmap
import tempfile
import threading
import weakref
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

# copies off the device that may be under way before the computation waits for the oldest of them
IN_FLIGHT = 2
# bytes of a file that is filled with tensors, at least; a larger tensor gets one of its own
FILE_SIZE = 64 << 20


class HostCopy(Protocol):
    """A tensor elsewhere."""

    def prefetch(self) -> None:
        """Begins to bring the tensor back, where that can be done beside other work."""

    def get(self) -> Tensor:
        """The tensor, on its device, in memory of its own."""


class PinnedCopy:
    """A tensor of a GPU in pinned memory, copied out and in on a stream of its own.

    Nothing waits on the host. The tensor copied from is held until the computation's stream has waited for the copy,
    and the one copied into is memory of the computation's stream: so neither is used for something else too early, and
    at most ``IN_FLIGHT`` tensors are held.
    """

    def __init__(self, tensor: Tensor, out: deque[weakref.ref[PinnedCopy]], stream: torch.cuda.Stream) -> None:
        """``out``: copies under way on ``stream``."""
        self._device, self._stream = tensor.device, stream
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._source: Tensor | None = tensor
        self._copied = torch.cuda.Event()
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        computation = torch.cuda.current_stream(self._device)
        while len(out) >= IN_FLIGHT:
            oldest = out.popleft()()
            if oldest is not None:
                oldest._finish(computation)
        stream.wait_stream(computation)
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
            self._copied.record(stream)
        out.append(weakref.ref(self))

    def _finish(self, computation: torch.cuda.Stream) -> None:
        if self._source is not None:
            computation.wait_event(self._copied)
            self._source = None

    def prefetch(self) -> None:
        if self._arriving is not None:
            return
        computation = torch.cuda.current_stream(self._device)
        self._finish(computation)
        target = torch.empty_like(self._host, device=self._device, pin_memory=False)
        # its memory may still be read by what the computation did before
        self._stream.wait_stream(computation)
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            target.copy_(self._host, non_blocking=True)
            arrived.record(self._stream)
        self._arriving = target, arrived

    def get(self) -> Tensor:
        self.prefetch()
        assert self._arriving is not None
        (tensor, arrived), self._arriving = self._arriving, None
        torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensor


class MappedCopy:
    """A tensor of the CPU in a file that is mapped into memory, whose pages the system may write out and drop."""

    def __init__(self, tensor: Tensor, file: mmap.mmap, offset: int) -> None:
        self._file, self._offset, self._size = file, offset, tensor.numel() * tensor.element_size()
        self._like = torch.empty_like(tensor, device="meta")
        self._view().copy_(tensor)
        self._drop()

    def _view(self) -> Tensor:
        like, count = self._like, self._like.numel()
        if count == 0:
            return torch.empty_like(like, device="cpu")
        flat = torch.frombuffer(self._file, dtype=like.dtype, count=count, offset=self._offset)
        return flat.as_strided(like.shape, like.stride())

    def _advise(self, advice: int) -> None:
        # whole pages only: their neighbours may belong to other tensors
        start = -(-self._offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self._offset + self._size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._file.madvise(advice, start, end - start)

    def _drop(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            # of a shared mapping: what was written stays with the file
            self._advise(mmap.MADV_DONTNEED)

    def prefetch(self) -> None:
        if hasattr(mmap, "MADV_WILLNEED"):
            self._advise(mmap.MADV_WILLNEED)

    def get(self) -> Tensor:
        result = torch.empty_like(self._like, device="cpu").copy_(self._view())
        self._drop()
        return result


class HostMemory:
    """Where copies go; serves any number of solves and threads."""

    def __init__(self, folder: str | None) -> None:
        """``folder``: where files are made for tensors of the CPU; None for the system's folder of temporary files."""
        self.folder = folder
        self._lock = threading.Lock()
        self._file: mmap.mmap | None = None
        self._used = 0
        self._out: dict[torch.device, deque[weakref.ref[PinnedCopy]]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, tensor: Tensor) -> HostCopy:
        """A copy of ``tensor``.

        Raises:
            TypeError: the tensor is neither on the CPU nor on a CUDA device.
            OSError: the file cannot be made.
        """
        if tensor.device.type == "cuda":
            with self._lock:
                if tensor.device not in self._streams:
                    self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
                    self._out[tensor.device] = deque()
                return PinnedCopy(tensor, self._out[tensor.device], self._streams[tensor.device])
        if tensor.device.type != "cpu":
            raise TypeError(
                f"a tensor on {tensor.device} cannot be offloaded, expected one on the CPU or a CUDA device"
            )
        return MappedCopy(tensor, *self._place(tensor.numel() * tensor.element_size()))

    def _place(self, size: int) -> tuple[mmap.mmap, int]:
        """A file, and where in it ``size`` bytes are free."""
        with self._lock:
            if self._file is None or self._used + size > len(self._file):
                self._file, self._used = _new_file(max(size, FILE_SIZE), self.folder), 0
            offset = self._used
            # of any dtype, on a cache line of its own
            self._used += -(-size // 64) * 64
            return self._file, offset


def _new_file(size: int, folder: str | None) -> mmap.mmap:
    """A file of ``size`` bytes without a name, which is gone when nothing refers to its memory any more."""
    with tempfile.TemporaryFile(prefix="rampde-", dir=folder) as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def is_copy(value: Any) -> bool:
    """Whether ``value`` is a copy that :class:`HostMemory` made."""
    return isinstance(value, PinnedCopy | MappedCopy)
