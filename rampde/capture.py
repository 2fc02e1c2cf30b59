"""CUDA graphs: work that is recorded once and repeated by one launch, and the memory that the records share."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], None]

WARM_UPS = 2
"""How often work is done before it is recorded: libraries take their workspaces and kernels are compiled then, and what
the first time decides shows in the second."""

_OURS = Path(__file__).resolve().parent
_TORCH = Path(torch.__file__).resolve().parent


class Recorder(Protocol):
    """Makes work repeatable."""

    def warm_up(self, work: Work) -> None:
        """Does the work as it will be recorded."""

    def record(self, work: Work) -> Work:
        """What repeats ``work``: the same operations on the same memory, without any Python."""


class CudaRecorder:
    """Records into CUDA graphs, whose memory comes from one pool: they must not be needed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def warm_up(self, work: Work) -> None:
        current = torch.cuda.current_stream(self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
        current.wait_stream(stream)

    def record(self, work: Work) -> Work:
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads, such as those that load data, may go on with what no graph can hold
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph.replay


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Type of a device to what records on it."""


def can_record(device: torch.device) -> bool:
    """Whether work on ``device`` can be recorded."""
    return device.type in RECORDERS


RECORDING: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_current_stream_capturing}
"""Type of a device to what knows whether work on it is recorded now."""


def is_recorded(device: torch.device) -> bool:
    """Whether what is done on ``device`` now is recorded by the caller: nothing of it can be read."""
    asked = RECORDING.get(device.type)
    return asked is not None and asked()


def recorded(recorder: Recorder, work: Work) -> Work:
    """As ``recorder.record(work)``, after warming up.

    Raises:
        RuntimeError: the work does what no graph can hold; the message names the operation and the line of f.
    """
    for _ in range(WARM_UPS):
        recorder.warm_up(work)
    watch = _Watch()

    failures: list[Exception] = []

    def watched() -> None:
        try:
            with watch:
                work()
        except Exception as error:
            # what a recorder says when it is left by an error hides the error
            failures.append(error)
            raise

    try:
        return recorder.record(watched)
    except Exception as error:
        cause = failures[0] if failures else error
        raise RuntimeError(
            f"cuda_graph=True: the solve cannot be recorded, as {watch.latest or 'it'} failed{_line_of_user(cause)}:"
            f" {cause}. A CUDA graph holds no operation that waits for the device (.item(), .tolist(), .cpu(),"
            " bool(tensor), nonzero, indexing with a mask) and none that copies from the host (torch.tensor(...,"
            " device='cuda')): move it out of func, or solve without cuda_graph"
        ) from cause


class _Watch(TorchDispatchMode):
    """Knows which operator was called last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.latest = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.latest = func.name()
        return func(*args, **(kwargs or {}))


def _line_of_user(error: BaseException) -> str:
    """The innermost line that is neither PyTorch's nor ours, up to where the operator was called."""
    frames = traceback.extract_tb(error.__traceback__)
    modes = ("__torch_function__", "__torch_dispatch__")
    calls = [place for place, frame in enumerate(frames) if frame.name in modes]
    for frame in reversed(frames[: calls[0]] if calls else frames):
        path = Path(frame.filename).resolve()
        if _OURS not in path.parents and _TORCH not in path.parents:
            return f" in {path.name}, line {frame.lineno}, `{frame.line}`"
    return ""
