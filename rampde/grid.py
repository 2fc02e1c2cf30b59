"""The time grid of a fixed-step solve: where the steps end, and how outputs lie among them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rampde.autocast import switched_off
from rampde.compilation import traced_as_constant

GridConstructor = Callable[[Callable[..., object], object, Tensor], Tensor]

# more than anyone waits for, and than memory holds the times of
MAX_STEPS = 10**8

# steps whose time tensors exist at once: one unbind serves them all, and memory does not grow with the steps
CHUNK = 512


@dataclass(frozen=True)
class Output:
    """Where an output time lies: at the end of step ``step``, or inside it."""

    step: int  # the output lies in (grid[step], grid[step + 1]]; -1 for the initial time
    inside: bool
    theta: float = 1.0  # where inside of an adaptive step, as a fraction of it


@dataclass(frozen=True)
class TimeGrid:
    """Steps and outputs of one solve.

    ``points``: (N + 1,) float64 (float32 on devices without it), strictly monotone, on the state's device,
    differentiable with respect to the user's ``t``; ``times``: the same as floats; ``outputs``: one for each
    of the user's output times.
    """

    points: Tensor
    times: list[float]
    outputs: list[Output]

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def at(self, points: Tensor) -> TimeGrid:
        """The same grid, its points in another tensor."""
        return TimeGrid(points, self.times, self.outputs)

    def with_outputs_inside(self) -> TimeGrid:
        """The same grid; outputs that meet a step's end without being it count as inside of the step."""
        ends = (-1, self.steps - 1)
        outputs = [output if output.step in ends else Output(output.step, inside=True) for output in self.outputs]
        return TimeGrid(self.points, self.times, outputs)

    @property
    def kept(self) -> list[int]:
        """Indices of the grid points whose state the outputs need, ascending."""
        needed = set()
        for output in self.outputs:
            needed.add(output.step + 1)
            if output.inside:
                needed.add(output.step)
        return sorted(needed)


def time_dtype(device: torch.device) -> torch.dtype:
    """Dtype of the time arithmetic: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_times(values: list[float]) -> None:
    """Raises ValueError unless ``values`` is non-empty, finite and strictly monotone."""
    if not values:
        raise ValueError("t is empty, expected at least one time")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"t[{index}] is {value}, expected finite times")
    if len(values) < 2:
        return
    sign = 1.0 if values[1] > values[0] else -1.0
    for index in range(1, len(values)):
        if (values[index] - values[index - 1]) * sign <= 0:
            raise ValueError(
                f"t must be strictly increasing or decreasing, but t[{index - 1}] is {values[index - 1]}"
                f" and t[{index}] is {values[index]}"
            )


def grid_of_outputs(t: Tensor, values: list[float], device: torch.device) -> TimeGrid:
    """Steps from one output time to the next."""
    outputs = [Output(step, inside=False) for step in range(-1, len(values) - 1)]
    return TimeGrid(t.to(device, time_dtype(device)), values, outputs)


def grid_of_step_size(t: Tensor, values: list[float], step_size: float, device: torch.device) -> TimeGrid:
    """Steps of ``step_size`` from ``t[0]``; the last one is cut short at ``t[-1]``."""
    if len(values) == 1:
        return grid_of_outputs(t, values, device)
    steps = _count_steps(values[0], values[-1], t.dtype, step_size)
    signed = math.copysign(step_size, values[-1] - values[0])
    times = [values[0] + signed * n for n in range(steps)] + [values[-1]]
    if steps > 1 and abs(times[-2] - times[0]) >= abs(times[-1] - times[0]):
        del times[-2]
        steps -= 1
    start, end = t[0].to(device, time_dtype(device)), t[-1].to(device, time_dtype(device))
    offsets = torch.arange(steps, dtype=start.dtype, device=device) * signed
    with switched_off(device):
        points = torch.cat([start + offsets, end[None]])
    return TimeGrid(points, times, _place(values, times))


@traced_as_constant
def _count_steps(start: float, end: float, dtype: torch.dtype, step_size: float) -> int:
    """How many steps of ``step_size`` it takes, in t's own precision ``dtype``: the last point must coincide with the
    last time where the user's arithmetic says so."""
    ends = torch.tensor([start, end], dtype=dtype)
    count = torch.ceil((ends[1] - ends[0]).abs() / step_size).item()
    if not count <= MAX_STEPS:
        raise ValueError(f"step_size is {step_size}, which makes {count:.3g} steps, expected at most {MAX_STEPS}")
    return max(int(count), 1)


@traced_as_constant
def read_times(t: Tensor) -> list[float]:
    """Times as numbers on the host; while ``torch.compile`` traces, those of the tensors that it traces with."""
    times: list[float] = t.detach().to("cpu", torch.float64).flatten().tolist()
    return times


_KNOWN: MutableMapping[Tensor, tuple[int, list[float]]] = WeakTensorKeyDictionary()


def known_times(t: Tensor) -> list[float] | None:
    """The values of ``t``, where they were remembered and have not changed since."""
    version, values = _KNOWN.get(t, (-1, []))
    return values if version == t._version else None


def remember_times(t: Tensor, values: list[float]) -> None:
    """Makes a second look at ``t`` needless."""
    _KNOWN[t] = t._version, values


def grid_of_points(points: object, t: Tensor, values: list[float], device: torch.device) -> TimeGrid:
    """Steps on the points that a user's ``grid_constructor`` returned.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: not one-dimensional, not monotone in the direction of ``t``, or with other ends than ``t``.
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        raise TypeError(f"grid_constructor returned {_describe(points)}, expected a floating point tensor")
    if points.dim() != 1:
        raise ValueError(f"grid_constructor returned a tensor of shape {list(points.shape)}, expected one dimension")
    if points.device.type == "meta" or points.layout != torch.strided:
        raise TypeError(f"grid_constructor returned {_describe(points)}, expected a dense tensor with data")
    times = read_times(points)
    for index, time in enumerate(times):
        if not math.isfinite(time):
            raise ValueError(f"grid_constructor returned {time} as point {index}, expected finite times")
    # a grid computed by the user's arithmetic may miss the ends by its rounding
    slack = 4 * torch.finfo(points.dtype).eps * max(abs(values[0]), abs(values[-1]))
    if not times or abs(times[0] - values[0]) > slack or abs(times[-1] - values[-1]) > slack:
        ends = f"{times[0]} to {times[-1]}" if times else "nothing"
        raise ValueError(f"grid_constructor returned a grid from {ends}, expected it from {values[0]} to {values[-1]}")
    points = points.to(device, time_dtype(device))
    if len(values) > 1:
        own = t.to(device, points.dtype)
        with switched_off(device):
            points = torch.cat([own[:1], points[1:-1], own[-1:]])
        times[0], times[-1] = values[0], values[-1]
    sign = 1.0 if values[-1] >= values[0] else -1.0
    for index in range(1, len(times)):
        if (times[index] - times[index - 1]) * sign <= 0:
            raise ValueError(
                f"grid_constructor returned points {index - 1} and {index} at {times[index - 1]} and"
                f" {times[index]}, expected a strictly monotone grid in the direction of t"
            )
    return TimeGrid(points, times, _place(values, times))


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a {value.dtype} tensor of layout {value.layout} on {value.device}"


@traced_as_constant
def _place(values: list[float], times: list[float]) -> list[Output]:
    sign = 1.0 if times[-1] >= times[0] else -1.0
    ascending = [sign * time for time in times]
    outputs = []
    for value in values:
        index = bisect_left(ascending, sign * value)
        outputs.append(Output(index - 1, inside=times[index] != value))
    return outputs


def unbound(tensor: Tensor) -> Iterator[Tensor]:
    """The slices of ``tensor`` along its first dimension, made a chunk at a time."""
    for start in range(0, tensor.shape[0], CHUNK):
        yield from tensor[start : start + CHUNK].unbind(0)


class StepSequence(Protocol):
    """Step size and stage times of each step."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> tuple[Tensor, Sequence[Tensor]]: ...


class StepTimes:
    """Step size and stage times of each step, as 0-dim tensors made a chunk at a time.

    ``h``: (N,) step sizes in float64; ``times``: (N, s) times in the dtype that f receives.
    """

    def __init__(self, h: Tensor, times: Tensor) -> None:
        self._h, self._times = h, times
        self._stages = times.shape[1]
        self._chunk = -1
        self._h_of_chunk: tuple[Tensor, ...] = ()
        self._times_of_chunk: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self._h.shape[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        stages = self._stages
        for start in range(0, len(self), CHUNK):
            times = self._times[start : start + CHUNK].flatten().unbind(0)
            for offset, h in enumerate(self._h[start : start + CHUNK].unbind(0)):
                yield h, times[offset * stages : (offset + 1) * stages]

    def __getitem__(self, step: int) -> tuple[Tensor, Sequence[Tensor]]:
        chunk, offset = divmod(step, CHUNK)
        if chunk != self._chunk:
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            self._h_of_chunk = self._h[rows].unbind(0)
            self._times_of_chunk = self._times[rows].flatten().unbind(0)
            self._chunk = chunk
        first = offset * self._stages
        return self._h_of_chunk[offset], self._times_of_chunk[first : first + self._stages]


def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor of one dimension, which is not to be changed."""
    # a compiler sees no memory of earlier calls, and makes constants by itself
    make = torch.tensor if torch.compiler.is_dynamo_compiling() else _on_device
    return make(values, dtype=dtype, device=device)


@lru_cache
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def stage_times(points: Tensor, nodes: tuple[float, ...], dtype: torch.dtype, perturb: bool) -> tuple[Tensor, Tensor]:
    """Step sizes (N,) and the times (N, s) at which f is evaluated, the latter rounded once to ``dtype``.

    With ``perturb`` the first and the last time of a step move by one unit in the last place into the step.
    """
    start, end = points[:-1], points[1:]
    h = end - start
    times = start[:, None] + h[:, None] * constants(nodes, h.dtype, h.device)
    for stage, node in enumerate(nodes):
        if node == 1.0:
            times[:, stage] = end  # start + h may miss it by its rounding
    times = times.to(dtype)
    if perturb:
        inner = {0.0: end.to(dtype), 1.0: start.to(dtype)}
        columns = [
            torch.nextafter(time, inner[node]) if node in inner else time
            for time, node in zip(times.unbind(1), nodes, strict=True)
        ]
        with switched_off(points.device):
            times = torch.stack(columns, dim=1)
    return h, times
