"""What solves cost: evaluations of f, steps, scales; collected where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass
class SolveStats:
    """One solve.

    Attributes:
        method: name of the method.
        evaluations_forward: how often f was evaluated to find the solution.
        evaluations_backward: how often it was evaluated again for gradients, all backward passes together.
        starts, step_sizes, error_ratios: start, signed size, and error in units of the tolerance of each accepted
            step; the error is 0 where steps are fixed.
        rejected_starts, rejected_sizes, rejected_ratios: the same of the rejected ones.
        accepted_of_sample, rejected_of_sample: numbers of steps where each sample has its own; nothing else is known of
            such steps.
        checkpoint: name of the policy that chose what is kept for gradients; empty where none were wanted.
        steps_again: how many steps were taken again to find states that were not kept.
        scale_history: changes of the scale of the adjoint, pairs (kind, scale) as of ``DynamicScaler``.
    """

    method: str
    evaluations_forward: int = 0
    evaluations_backward: int = 0
    starts: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    error_ratios: list[float] = field(default_factory=list)
    rejected_starts: list[float] = field(default_factory=list)
    rejected_sizes: list[float] = field(default_factory=list)
    rejected_ratios: list[float] = field(default_factory=list)
    checkpoint: str = ""
    steps_again: int = 0
    scale_history: list[tuple[str, float]] = field(default_factory=list)
    accepted_of_sample: list[int] = field(default_factory=list)
    rejected_of_sample: list[int] = field(default_factory=list)
    _in_backward: bool = field(default=False, repr=False)

    @property
    def accepted(self) -> int:
        """Number of accepted steps, of all samples where each has its own."""
        return len(self.step_sizes) + sum(self.accepted_of_sample)

    @property
    def rejected(self) -> int:
        """Number of rejected steps, likewise."""
        return len(self.rejected_sizes) + sum(self.rejected_of_sample)

    def note_evaluation(self) -> None:
        if self._in_backward:
            self.evaluations_backward += 1
        else:
            self.evaluations_forward += 1

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Evaluations within are those of a backward pass."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    def note_accepted(self, start: float, h: float, ratio: float) -> None:
        self.starts.append(start)
        self.step_sizes.append(h)
        self.error_ratios.append(ratio)

    def note_rejected(self, start: float, h: float, ratio: float) -> None:
        self.rejected_starts.append(start)
        self.rejected_sizes.append(h)
        self.rejected_ratios.append(ratio)


@dataclass
class Stats:
    """The solves made within :func:`stats`, in their order; sums over them."""

    solves: list[SolveStats] = field(default_factory=list)

    @property
    def evaluations_forward(self) -> int:
        """Evaluations of f to find solutions."""
        return sum(solve.evaluations_forward for solve in self.solves)

    @property
    def evaluations_backward(self) -> int:
        """Evaluations of f for gradients."""
        return sum(solve.evaluations_backward for solve in self.solves)

    @property
    def accepted(self) -> int:
        """Accepted steps."""
        return sum(solve.accepted for solve in self.solves)

    @property
    def rejected(self) -> int:
        """Rejected steps."""
        return sum(solve.rejected for solve in self.solves)


_collecting: ContextVar[Stats | None] = ContextVar("rampde_stats", default=None)


@contextmanager
def stats() -> Iterator[Stats]:
    """Collects what the solves within cost, and their backward passes, whenever these run::

        with rampde.stats() as stats:
            y = rampde.odeint(func, y0, t)
        y.sum().backward()
        print(stats.accepted, stats.evaluations_forward, stats.evaluations_backward)

    Yields:
        A :class:`Stats`, which grows with every solve. Of nested ones the innermost collects.
    """
    collected = Stats()
    token = _collecting.set(collected)
    try:
        yield collected
    finally:
        _collecting.reset(token)


@contextmanager
def uncollected() -> Iterator[None]:
    """Solves within are nobody's business."""
    token = _collecting.set(None)
    try:
        yield
    finally:
        _collecting.reset(token)


def new_solve(method: str) -> SolveStats | None:
    """The record of a solve that begins, where someone asked for it."""
    if torch.compiler.is_dynamo_compiling():
        return None
    collected = _collecting.get()
    if collected is None:
        return None
    solve = SolveStats(method)
    collected.solves.append(solve)
    return solve


class Progress:
    """A progress bar over the time of a solve.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, start: float, end: float) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        self._start, self._span = start, abs(end - start)
        layout = "{l_bar}{bar}| t {n:.3g}/{total:.3g} [{elapsed}<{remaining}]"
        self._bar = tqdm(total=self._span, bar_format=layout)

    def update(self, time: float) -> None:
        """The solve has reached ``time``."""
        self._bar.update(min(abs(time - self._start), self._span) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
