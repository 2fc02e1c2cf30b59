"""One solve in memory that stays where it is, recorded as CUDA graphs: the road out, and the road back.

A graph knows addresses. What changes from call to call is therefore copied: y0 and the times, the gradients of the
outputs, and tensors that f holds without being parameters or buffers of modules. What is returned is copied out of the
graph's memory, which the next call overwrites. Parameters and buffers are used where they are.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rampde.adjoint import Gradients
from rampde.buffers import unchanged
from rampde.capture import Recorder, Work, recorded
from rampde.captures import Captures, hooks_muted, reachable_tensors
from rampde.compilation import as_written
from rampde.problem import Problem
from rampde.randomness import preserved
from rampde.roads import Kept, Roads, detach_first, first_evaluation


@dataclass(frozen=True)
class Held:
    """The tensors that f holds: ``fixed`` ones are used where they are, ``moving`` ones are copied."""

    fixed: list[Tensor]
    moving: list[Tensor]

    @staticmethod
    def of(func: object) -> Held:
        """What ``func`` holds now; always in the same order."""
        found = reachable_tensors(as_written(func) if callable(func) else func)
        fixed: list[Tensor] = []
        moving: list[Tensor] = []
        for tensor in (*found.requiring, *found.constants):
            stays = isinstance(tensor, nn.Parameter) or id(tensor) in found.registered
            (fixed if stays else moving).append(tensor)
        return Held(fixed, moving)

    def looks_like(self, other: Held) -> bool:
        """Whether a graph for one of them serves the other one."""
        if len(self.fixed) != len(other.fixed) or len(self.moving) != len(other.moving):
            return False
        same = all(
            mine.data_ptr() == its.data_ptr() and mine.requires_grad == its.requires_grad
            for mine, its in zip(self.fixed, other.fixed, strict=True)
        )
        return same and all(_kind(mine) == _kind(its) for mine, its in zip(self.moving, other.moving, strict=True))


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


class Moving:
    """Memory for the ``moving`` tensors that f holds, where a graph finds them."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.own = [tensor.detach().clone() for tensor in held.moving]
        self._copied = [(weakref.ref(tensor), tensor._version) for tensor in held.moving]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """What f holds lies in our memory meanwhile."""
        before = [tensor.data for tensor in self._held.moving]
        try:
            for tensor, own in zip(self._held.moving, self.own, strict=True):
                tensor.data = own
            yield
        finally:
            for tensor, data in zip(self._held.moving, before, strict=True):
                tensor.data = data

    def update(self, held: Held) -> None:
        """Takes the values of what f holds now."""
        for place, tensor in enumerate(held.moving):
            latest, version = self._copied[place]
            if latest() is not tensor or version != tensor._version:
                self.own[place].copy_(tensor.detach())
                self._copied[place] = weakref.ref(tensor), tensor._version


def recorded_with_casts(recorder: Recorder, work: Work) -> Work:
    """As :func:`rampde.capture.recorded`; casts of parameters by autocast are part of the work."""

    def cast_anew() -> None:
        # a cast that autocast remembers from outside would not be made by the graph
        torch.clear_autocast_cache()
        work()

    try:
        return recorded(recorder, cast_anew)
    finally:
        # and one made inside lies in the memory of the graph
        torch.clear_autocast_cache()


class CapturedSolve:
    """Memory and graphs of one solve, which serve one call at a time.

    Attributes:
        captures: tensors that f uses and that require a gradient, as they were when the solve was recorded.
        outputs: the result of the road out, leaf by leaf.
    """

    def __init__(self, roads: Roads[Kept], problem: Problem, y0: Sequence[Tensor], held: Held, recorder: Recorder):
        """``problem``: with everything decided that its first evaluation decides; it belongs to this object now."""
        self.problem, self.held = problem, held
        self._roads = roads
        self.wanted = torch.is_grad_enabled()
        self._y0 = [leaf.detach().clone() for leaf in y0]
        self._points = problem.grid.points.detach().clone().requires_grad_(problem.grid.points.requires_grad)
        self._moving = Moving(held)
        problem.grid = problem.grid.at(self._points)
        problem.recorded = True
        self._kept: Kept | None = None
        self.captures: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._flat: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._cotangents: list[Tensor] = []
        self._places: list[tuple[int, int, tuple[int, ...]] | None] = []
        self._replay_back: Work | None = None
        # warming up evaluates f, which shall not show
        device = problem.velocity.spec.device
        with self._moving.in_place(), unchanged(problem.buffers), preserved(device, True):
            self._replay_out = recorded_with_casts(recorder, self._out)
            if self.wanted:
                # recording leaves no values, and a sweep is to see some that make sense
                self._replay_out()
                self._cotangents = [torch.zeros_like(leaf) for leaf in self.outputs]
                self._replay_back = recorded_with_casts(recorder, self._back)

    def _out(self) -> None:
        problem, roads, velocity = self.problem, self._roads, self.problem.velocity
        with torch.no_grad():
            time = roads.prepare(problem)
            x = [leaf.to(dtype) for leaf, dtype in zip(self._y0, velocity.dtypes, strict=True)]
        # a leaf of a graph is another tensor than y0
        x = [leaf.detach() for leaf in x]
        found = first_evaluation(roads, problem, time, x) if self.wanted else Captures()
        if not self.wanted:
            problem.first = roads.first_stage(problem, time, x)
        elif not problem.checkpoint.keeps_graphs:
            detach_first(problem)
        self.captures = found.tensors
        self._kept = roads.keep(problem) if self.wanted else None
        with torch.no_grad():
            self.outputs = roads.out(problem, self._y0, self._kept)
        self._saved = [] if self._kept is None else self._kept.tensors()
        problem.first = None

    def _back(self) -> None:
        problem, kept = self.problem, self._kept
        assert kept is not None
        cotangents: list[Tensor | None] = [*self._cotangents]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(problem.velocity.autocast.entered())
            stack.enter_context(hooks_muted(self.captures))
            stack.enter_context(unchanged([] if kept.keeps_graphs else problem.buffers))
            kept.restore(self._saved)
            sweep = self._roads.back(problem, self._points, kept, self.captures, cotangents, True)
            of_y0, of_points, totals = sweep.run(self._y0)
            kept.rest()
        self._store([*of_y0, of_points, *totals])

    def _store(self, found: Gradients) -> None:
        """Puts all gradients of one dtype into one piece of memory, so that one copy takes them out of the graph."""
        leaves = self.problem.velocity.spec.leaves
        dtypes = [leaf.real_dtype for leaf in leaves] + [target.dtype for target in (self._points, *self.captures)]
        by_dtype: dict[torch.dtype, list[int]] = {}
        real: list[Tensor | None] = []
        for index, (gradient, dtype) in enumerate(zip(found, dtypes, strict=True)):
            if gradient is None:
                real.append(None)
                continue
            by_dtype.setdefault(dtype, []).append(index)
            real.append(gradient.to(dtype))
        self._places = [None] * len(found)
        self._flat = []
        for number, indices in enumerate(by_dtype.values()):
            parts = [value for value in (real[index] for index in indices) if value is not None]
            offset = 0
            for index, part in zip(indices, parts, strict=True):
                self._places[index] = number, offset, tuple(part.shape)
                offset += part.numel()
            self._flat.append(torch.cat([part.flatten() for part in parts]))

    def run(self, y0: Sequence[Tensor], points: Tensor, held: Held) -> list[Tensor]:
        """The states that the solve returns for these values."""
        own = (*self._y0, self._points, *self._moving.own)
        # graphs that are kept were recorded with the values before, for autograd
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(own):  # type: ignore[attr-defined]
            torch._foreach_copy_(self._y0, [leaf.detach() for leaf in y0])
            self._points.detach().copy_(points.detach())
            self._moving.update(held)
            self._replay_out()
            return [leaf.clone() for leaf in self.outputs]

    def run_back(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of y0's leaves, of the grid points and of the captures, after :meth:`run`."""
        for own, cotangent in zip(self._cotangents, cotangents, strict=True):
            if cotangent is None:
                own.zero_()
            else:
                own.copy_(cotangent)
        assert self._replay_back is not None
        self._replay_back()
        self._lower_scale(self._replay_back)
        copies = [flat.clone() for flat in self._flat]
        return [
            None if place is None else copies[place[0]].narrow(0, place[1], math.prod(place[2])).view(place[2])
            for place in self._places
        ]

    def _lower_scale(self, replay: Work) -> None:
        """Sweeps again while the scale is too large: the graph has left less headroom behind."""
        scaler = self.problem.scaler
        if scaler is None or scaler.overflowed is None:
            return
        for _ in range(scaler.max_attempts):
            # the one look at the device of a sweep under scaling
            if not bool(scaler.overflowed):
                return
            replay()
