"""Steps that the operator ``step_control`` decides, next to the same steps by the rules of the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rampde import step_state as at
from rampde.attempts import AttemptedSteps
from rampde.control import AdaptiveSteps
from rampde.options import AdaptiveOptions

NODES = (0.0, 0.2, 0.3, 8 / 9, 1.0, 1.0)
# of each attempt: a handful of roundings, and a power of an error whose logarithm is below 20 in size
ROUNDOFF = 100 * torch.finfo(torch.float64).eps

Leaf = tuple[float, float, int]
"""Sums of the squares of error and of rounding of one leaf, and its number of elements."""


class DeviceSteps:
    """What the operator reads and writes, as a solve begins with it."""

    def __init__(
        self,
        operator: Callable[..., None],
        options: AdaptiveOptions,
        times: Sequence[float],
        order: int = 5,
        h: float = 0.01,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.operator, self.options, self.device = operator, options, torch.device(device)
        self.sign = 1.0 if times[-1] > times[0] else -1.0
        self.host = AdaptiveSteps(options, order, times[0], self.sign, h)
        self.attempt = self.host.propose()
        self.parameters = list(at.Parameters.of(options, order, self.sign))
        self.times = list(times)
        self.output_times = self.numbers(self.times)
        self.control = self.numbers(at.initial_control(options, self.attempt, h))
        self.record = torch.full((at.RECORD_SIZE,), torch.nan, dtype=torch.float64, device=device)
        self.steps = AttemptedSteps(NODES, dtype, self.device)
        self.stage_times = torch.stack(tuple(self.steps.tensors(self.attempt)[1]))
        self.due = 1

    def numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def judge(self, leaves: Sequence[Leaf]) -> None:
        """The operator on an attempt with these errors."""
        sums = self.numbers([[square, share] for square, share, _ in leaves])  # type: ignore[list-item]
        sizes = self.numbers([float(size) for _, _, size in leaves])
        arguments = (sums, sizes, self.output_times, list(NODES), self.parameters)
        self.operator(self.control, self.record, self.stage_times, *arguments)

    def state(self) -> list[float]:
        """The control and the stage times."""
        return [*self.control.tolist(), *self.stage_times.tolist()]

    @property
    def status(self) -> int:
        return int(self.control[at.STATUS])

    def follow(self, leaves: Sequence[Leaf], taken: int) -> bool:
        """Judges on the device and on the host, and compares; ``taken`` attempts came before. Whether it goes on."""
        self.judge(leaves)
        ratio = math.sqrt(max(max(square / size - share / size, 0.0) for square, share, size in leaves))
        noise = math.sqrt(max(share / size for _, share, size in leaves))
        tolerance = (taken + 2) * ROUNDOFF
        attempt, due = self.attempt, self.due
        accepted = self.host.judge(attempt, ratio, noise)
        record = self.record.tolist()
        assert record[at.ACCEPTED] == accepted
        if accepted:
            while self.due < len(self.times) and self.sign * (attempt.end - self.times[self.due]) >= 0:
                self.due += 1
                self.host.new_interval()
            found = [record[index] for index in (at.START, at.STEP, at.STEP_END)]
            assert close(found, [attempt.start, attempt.h, attempt.end], tolerance)
            assert (record[at.FIRST_OUTPUT], record[at.LAST_OUTPUT]) == (due, self.due)
        control = self.control.tolist()
        assert control[at.DUE] == self.due
        found = [control[index] for index in (at.TIME, at.SIZE, at.WORST_NOISE)]
        assert close(found, [self.host.time, self.host.h, self.host.worst_noise], tolerance)
        if self.due == len(self.times):
            assert self.status == at.DONE
            return False
        self.attempt = self.host.propose()
        assert self.status == at.RUNNING
        assert close([control[at.H], control[at.END]], [self.attempt.h, self.attempt.end], tolerance)
        # the attempt is the device's own now: what follows from it is exact
        self.attempt = self.attempt._replace(start=control[at.TIME], end=control[at.END], h=control[at.H])
        self.host.time, self.host.h = control[at.TIME], control[at.SIZE]
        times = torch.stack(tuple(self.steps.tensors(self.attempt)[1]))
        assert torch.equal(times, self.stage_times)
        return True


def close(found: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    return all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(found, expected, strict=True))


def random_leaves(noise: float, sizes: Sequence[int] = (7, 1, 40)) -> list[Leaf]:
    """Errors between a hundredth and ten tolerances, some of them zero or infinite, with up to as much ``noise``."""
    leaves = []
    kind = torch.rand(()).item()
    for size in sizes:
        square = size * 10 ** float(4 * torch.rand(()) - 3.5)
        share = size * noise**2 * torch.rand(()).item()
        if kind < 0.05:
            square = share = 0.0
        elif kind < 0.1:
            square = math.inf
        leaves.append((square + share, share, size))
    return leaves
