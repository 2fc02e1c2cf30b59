"""Values of the kernels that decide on steps, interpreted or on a GPU; ``test_values.py`` runs it.

Against the rules of the host, and against the oracles: to the bit, but for powers, and for bfloat16 where the
interpreter truncates instead of rounding.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from device_steps import NODES, DeviceSteps, random_leaves
from operands import random, same_bits
from torch import Tensor

from rampde import eager_adaptive
from rampde import step_state as at
from rampde.kernels import step_commit, step_control
from rampde.methods import get_method
from rampde.options import CONTROLLERS, AdaptiveOptions
from rampde.tableau import EmbeddedTableau

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float64, torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
SIZES = (1, 3, 1000, 1024, 4099)
LAYOUTS: dict[str, tuple[int, ...]] = {"contiguous": (5, 7, 9), "channels_last": (2, 3, 5, 7), "permuted": (6, 7, 8)}
# a controller that takes larger steps after larger errors, but for those without bounds
ODD = {"coefficients": (0.3, -0.5, 0.1)}
NONE, GOOD, BAD, BROKEN = [(0.0, 0.0, 1)], [(0.01, 0.0, 1)], [(9.0, 0.0, 1)], [(math.inf, 0.0, 1)]


def new_steps(options: AdaptiveOptions, times: Sequence[float], **arguments: Any) -> DeviceSteps:
    return DeviceSteps(step_control, options, times, device=DEVICE, **arguments)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_takes_the_steps_of_the_host(controller: str, noise: float, reverse: bool) -> None:
    options = AdaptiveOptions(coefficients=CONTROLLERS[controller], max_step=0.4)
    times = torch.linspace(-1.0, 2.0, 20, dtype=torch.float64).tolist()
    steps = new_steps(options, times[::-1] if reverse else times)
    taken = 0
    while steps.follow(random_leaves(noise) if abs(steps.attempt.h) > 1e-2 else NONE, taken):
        taken += 1
    assert taken > 10


@pytest.mark.parametrize("order", [2, 8])
@pytest.mark.parametrize(
    "changed",
    [{"min_step": 0.03}, {"max_step": 0.05}, {"safety": 0.5}, {"ifactor": 1.0}, {"dfactor": 1.0}, ODD],
    ids=str,
)
def test_follows_the_options(changed: dict[str, Any], order: int) -> None:
    steps = new_steps(AdaptiveOptions(**changed), [0.0, 3.0], order=order)
    for taken in range(30):
        leaves = [(min(square, 1e6), share, size) for square, share, size in random_leaves(0.3)]
        if not steps.follow(leaves, taken):
            return


@pytest.mark.parametrize("dtype", DTYPES)
def test_times_of_the_stages_are_those_of_the_host(dtype: torch.dtype) -> None:
    steps = new_steps(AdaptiveOptions(), [1 / 3, 50.0], h=0.1, dtype=dtype)
    for taken in range(10):
        assert steps.follow(random_leaves(0.0), taken)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000])
def test_counts_the_outputs_in_a_step(count: int) -> None:
    times = [0.0, *torch.linspace(0.5, 1.0, count, dtype=torch.float64).tolist(), 3.0]
    steps = new_steps(AdaptiveOptions(max_step=1.0), times, h=1.0)
    assert steps.follow(GOOD, 0)
    assert steps.record[at.LAST_OUTPUT] == count + 1
    assert steps.follow(GOOD, 1)
    assert not steps.follow(GOOD, 2)


@pytest.mark.parametrize(
    ("changed", "leaves", "status"),
    [
        ({}, GOOD, at.DONE),
        ({"min_step": 0.5}, BROKEN, at.NOT_FINITE),
        ({}, BAD, at.UNDERFLOW),
        ({"max_num_steps": 7}, BAD, at.TOO_MANY),
        ({"max_num_steps": 1}, BAD, at.TOO_MANY),
    ],
    ids=str,
)
def test_after_the_end_nothing_changes(changed: dict[str, float], leaves: Any, status: int) -> None:
    steps = new_steps(AdaptiveOptions(max_step=10.0, **changed), [1.0, 1.25], h=0.5)
    while steps.status == at.RUNNING:
        steps.judge(leaves)
    assert steps.status == status
    assert steps.record[at.ACCEPTED] == (status == at.DONE)
    before = steps.state()
    for more in (GOOD, BAD, BROKEN):
        steps.judge(more)
        assert steps.state() == before
        assert steps.record[at.ACCEPTED] == 0


def committed(operator: Callable[..., None], arguments: Sequence[Any], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs after a call, copies of what they were before."""
    copies = [output.clone() for output in outputs]
    operator(*arguments, *copies)
    return copies


def operands(
    y: Tensor, dtypes: Sequence[torch.dtype], method: str = "dopri5", count: int = 7, layout: str = "contiguous"
) -> tuple[list[Any], list[Tensor]]:
    """Arguments and outputs; velocities, their first one, rows and the copy of the state before in turns of dtypes."""
    found = get_method(method)
    assert isinstance(found, EmbeddedTableau)
    tableau, turns = found.closed, itertools.cycle(dtypes)
    numbers = {"dtype": torch.float64, "device": DEVICE}
    # the last output of the step is its end
    times = torch.linspace(0.0, 1.0, count, **numbers)
    record = torch.tensor([1.0, 0.1, times[-2].item() - 0.1, times[-2].item(), 1, count - 1], **numbers)
    later = [random(y.shape, next(turns), DEVICE, layout) for _ in range(tableau.stages - 1)]
    y_next = random(y.shape, y.dtype, DEVICE, layout)
    first = torch.empty_like(y, dtype=next(turns)).copy_(random(y.shape, torch.float16, DEVICE))
    shape, strides = (count, *y.shape), (y.numel(), *y.stride())
    rows = torch.empty_strided(shape, strides, dtype=next(turns), device=DEVICE).fill_(torch.nan)
    staged = torch.empty_like(y, dtype=next(turns)).fill_(torch.nan)
    interpolant = [c for row in tableau.interpolant for c in row]
    return [record, times, y_next, later, interpolant], [y, first, rows, staged]


def assert_as_the_oracle(arguments: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    found = committed(step_commit, arguments, outputs)
    assert same_bits(found, committed(eager_adaptive.step_commit, arguments, outputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_commits_as_the_oracle(size: int, state: torch.dtype, dtype: torch.dtype) -> None:
    arguments, outputs = operands(random((size,), state, DEVICE), [dtype])
    assert_as_the_oracle(arguments, outputs)
    assert_as_the_oracle(arguments, outputs[:3])


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "dopri8", "adaptive_heun"])
def test_commits_dtypes_in_any_mixture(method: str) -> None:
    assert_as_the_oracle(*operands(random((1000,), torch.float32, DEVICE), DTYPES, method))


@pytest.mark.parametrize("velocity_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_commits_in_any_layout(layout: str, velocity_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, velocity_layout) else LAYOUTS[layout]
    y = random(shape, torch.float32, DEVICE, layout)
    assert_as_the_oracle(*operands(y, [torch.float16], layout=velocity_layout))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)], ids=str)
def test_commits_scalars_and_nothing(shape: tuple[int, ...]) -> None:
    assert_as_the_oracle(*operands(random(shape, torch.float32, DEVICE), [torch.float16]))


def test_commits_many_outputs() -> None:
    assert_as_the_oracle(*operands(random((33,), torch.float32, DEVICE), [torch.float32], count=300))


def test_a_rejected_step_changes_nothing() -> None:
    arguments, outputs = operands(random((1000,), torch.float32, DEVICE), [torch.float16])
    arguments[0][at.ACCEPTED] = 0.0
    for tensor in (arguments[2], *arguments[3]):
        tensor.fill_(torch.nan)
    assert same_bits(committed(step_commit, arguments, outputs), outputs)


def test_a_velocity_without_weight_is_not_read() -> None:
    arguments, outputs = operands(random((1000,), torch.float32, DEVICE), [torch.float32])
    arguments[3][0].fill_(torch.nan)
    rows = committed(step_commit, arguments, outputs)[2]
    assert bool(rows[1:-1].isfinite().all())


def test_bad_operands_raise() -> None:
    y = random((4, 3), torch.float32, DEVICE)
    steps = new_steps(AdaptiveOptions(), [0.0, 1.0])
    sums, sizes = steps.numbers([[0.5, 0.0]]), steps.numbers([1.0])  # type: ignore[list-item]

    def control(**changed: Any) -> None:
        given = {
            "control": steps.control,
            "record": steps.record,
            "stage_times": steps.stage_times,
            "sums": sums,
            "sizes": sizes,
            "output_times": steps.output_times,
            "nodes": list(NODES),
            "parameters": steps.parameters,
        }
        step_control(**given | changed)

    def commit(**changed: Any) -> None:
        (record, times, y_next, later, interpolant), (state, first, rows, staged) = operands(y, [torch.float32])
        given = {
            "record": record,
            "output_times": times,
            "y_next": y_next,
            "later": later,
            "interpolant": interpolant,
            "y": state,
            "first": first,
            "rows": rows,
            "staged": staged,
        }
        step_commit(**given | changed)

    cases: tuple[tuple[str, Callable[[], None]], ...] = (
        (r"step_control: control is .*float32", lambda: control(control=steps.control.float())),
        (r"step_control: control is .*shape \(3,\)", lambda: control(control=steps.control[:3])),
        (r"step_control: record is .*strides \(2,\)", lambda: control(record=steps.control.new_zeros(12)[::2])),
        (r"step_control: sums is .*shape \(1,\)", lambda: control(sums=sums[0, :1])),
        (r"step_control: stage_times has dtype torch.int64", lambda: control(stage_times=steps.stage_times.long())),
        (r"step_control: stage_times is .*shape \(2,\)", lambda: control(stage_times=steps.stage_times[:2])),
        (r"step_commit: record is .*float32", lambda: commit(record=steps.record.float())),
        (r"step_commit: y of shape .*dense", lambda: commit(y=torch.zeros(4, 6, device=DEVICE)[:, ::2])),
        (r"step_commit: interpolant has 5 coefficients", lambda: commit(interpolant=[1.0] * 5)),
        (r"step_commit: velocity\[1\] is .*shape \(3,\)", lambda: commit(later=[y[0], y], interpolant=[1.0] * 3)),
        (r"step_commit: y_next\[0\] is .*shape \(2, 3\)", lambda: commit(y_next=y[:2])),
        (r"step_commit: first has strides .*layout of y", lambda: commit(first=y.T.contiguous().T)),
        (r"step_commit: rows has shape \(2, 4, 3\)", lambda: commit(rows=torch.zeros(2, 4, 3, device=DEVICE))),
        (r"step_commit: staged is .*shape \(3,\)", lambda: commit(staged=y[0])),
    )
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
