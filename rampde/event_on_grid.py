"""Events of methods whose steps lie on a grid known before: the grid grows until the event lies in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rampde.control import no_event
from rampde.grid import Output, TimeGrid
from rampde.interpolation import interpolate
from rampde.options import MAX_NUM_STEPS, FixedOptions
from rampde.problem import Problem

# steps looked at first; doubled until the event is found
FIRST_STEPS = 16


def solve_until_event(
    problem: Problem, y0: list[Tensor], options: FixedOptions, solve: Callable[[Problem, list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """The states at ``t[0]`` and at the event, leaf by leaf; ``problem.event_time`` is then known.

    The event is looked for without graphs; then the steps up to it are taken once more, where gradients are wanted.
    """
    search, size = problem.search, options.step_size
    assert search is not None
    assert size is not None
    h, start, first_point = problem.sign * size, problem.output_times[0], problem.grid.points[:1]
    device = first_point.device
    if search.begins_at_event(start, y0):
        problem.event_time = start
        return [torch.stack([leaf, leaf]).to(dtype) for leaf, dtype in zip(y0, problem.output_dtypes, strict=True)]

    def on_grid(steps: int, outputs: list[Output]) -> Problem:
        points = first_point + torch.arange(steps + 1, dtype=first_point.dtype, device=device) * h
        times = [start + n * h for n in range(steps + 1)]
        return replace(
            problem,
            grid=TimeGrid(points, times, outputs),
            search=None,
            output_times=times,
            # between steps the states are interpolated before they are rounded
            output_dtypes=[leaf.state_dtype for leaf in problem.velocity.spec.leaves],
        )

    steps, seen = FIRST_STEPS, 0
    with torch.no_grad():
        while True:
            everywhere = [Output(n - 1, inside=False) for n in range(steps + 1)]
            states = solve(replace(on_grid(steps, everywhere), observer=None), [leaf.detach() for leaf in y0])
            times = [start + n * h for n in range(steps + 1)]
            crossing = (n for n in range(seen + 1, steps + 1) if search.crossed(times[n], [leaf[n] for leaf in states]))
            last = next(crossing, None)
            if last is not None:
                break
            if steps >= MAX_NUM_STEPS:
                raise no_event(steps, size, times[-1])
            steps, seen = min(2 * steps, MAX_NUM_STEPS), steps
        ends = slice(last - 1, last + 1)
        step = on_grid(last, [])
        step.grid = TimeGrid(step.grid.points[ends], times[ends], [Output(0, inside=True)])
        pair = [leaf[ends] for leaf in states]

        def state_at(time: float) -> list[Tensor]:
            where = torch.tensor([time], dtype=first_point.dtype, device=device)
            return [leaf[0] for leaf in interpolate(step, pair, where, options.interp)]

        problem.event_time = search.locate(state_at, times[last - 1], times[last])
    final = on_grid(last, [Output(-1, inside=False), Output(last - 1, inside=True)])
    # the event's time is not one that the user gave: it has no gradient
    event = torch.tensor([start, problem.event_time], dtype=first_point.dtype, device=device)
    return interpolate(final, solve(final, y0), event, options.interp)
