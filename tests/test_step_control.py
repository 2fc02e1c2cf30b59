"""The control of adaptive steps on the device, on every backend, against that of the host."""

import math
from typing import Any

import pytest
import torch
from device_steps import DeviceSteps, random_leaves
from operands import DTYPES, Backend

from rampde import ops
from rampde import step_state as at
from rampde.options import CONTROLLERS, AdaptiveOptions

NONE, GOOD, BAD, BROKEN = [(0.0, 0.0, 1)], [(0.01, 0.0, 1)], [(9.0, 0.0, 1)], [(math.inf, 0.0, 1)]
# a controller that takes larger steps after larger errors, but for those without bounds
ODD = {"coefficients": (0.3, -0.5, 0.1)}
TIMES = [0.0, 0.5, 1.0, 100.0]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_takes_the_steps_of_the_host(backend: Backend, controller: str, noise: float, reverse: bool) -> None:
    options = AdaptiveOptions(coefficients=CONTROLLERS[controller], max_step=0.4)
    times = torch.linspace(-1.0, 2.0, 20, dtype=torch.float64).tolist()
    steps = DeviceSteps(backend.step_control, options, times[::-1] if reverse else times, device=backend.device)
    taken = 0
    # errors that know nothing of the size of the step would let it fall for ever
    while steps.follow(random_leaves(noise) if abs(steps.attempt.h) > 1e-2 else NONE, taken):
        taken += 1
    assert taken > 10


@pytest.mark.parametrize("order", [2, 8])
@pytest.mark.parametrize(
    "changed",
    [
        {"min_step": 0.03},
        {"max_step": 0.05},
        {"safety": 0.5},
        {"ifactor": 1.0},
        {"dfactor": 1.0},
        {"ifactor": 3.0},
        ODD,
    ],
    ids=str,
)
def test_follows_the_options(backend: Backend, changed: dict[str, Any], order: int) -> None:
    steps = DeviceSteps(backend.step_control, AdaptiveOptions(**changed), [0.0, 3.0], order, device=backend.device)
    for taken in range(60):
        leaves = random_leaves(0.3)
        if "min_step" in changed:
            # what is not finite and forced ends the solve
            leaves = [(min(square, 1e6), share, size) for square, share, size in leaves]
        if not steps.follow(leaves, taken):
            return


@pytest.mark.parametrize("dtype", DTYPES)
def test_times_of_the_stages_are_those_of_the_host(backend: Backend, dtype: torch.dtype) -> None:
    options = AdaptiveOptions()
    steps = DeviceSteps(backend.step_control, options, [1 / 3, 50.0], h=0.1, dtype=dtype, device=backend.device)
    for taken in range(10):
        assert steps.follow(random_leaves(0.0), taken)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000])
def test_counts_the_outputs_in_a_step(backend: Backend, count: int) -> None:
    times = [0.0, *torch.linspace(0.5, 1.0, count, dtype=torch.float64).tolist(), 3.0]
    options = AdaptiveOptions(max_step=1.0)
    steps = DeviceSteps(backend.step_control, options, times, h=1.0, device=backend.device)
    assert steps.follow(GOOD, 0)
    # the last of them lies at the end of the step
    assert (steps.record[at.FIRST_OUTPUT], steps.record[at.LAST_OUTPUT]) == (1, count + 1)
    assert steps.follow(GOOD, 1)
    assert (steps.record[at.FIRST_OUTPUT], steps.record[at.LAST_OUTPUT]) == (count + 1, count + 1)
    assert not steps.follow(GOOD, 2)


def end(steps: DeviceSteps, reason: str) -> int:
    """Brings the solve to an end; its status."""
    if reason == "done":
        steps.judge(GOOD)
        return at.DONE
    if reason == "not finite":
        steps.judge(BROKEN)
        return at.NOT_FINITE
    while steps.status == at.RUNNING:
        steps.judge(BAD)
    return at.UNDERFLOW if reason == "underflow" else at.TOO_MANY


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("done", {}),
        ("not finite", {"min_step": 0.5}),
        ("underflow", {}),
        ("too many", {"max_num_steps": 7}),
        ("too many", {"max_num_steps": 1}),
    ],
    ids=str,
)
def test_after_the_end_nothing_changes(backend: Backend, reason: str, changed: dict[str, float]) -> None:
    options = AdaptiveOptions(max_step=10.0, **changed)
    steps = DeviceSteps(backend.step_control, options, [1.0, 1.25], h=0.5, device=backend.device)
    assert end(steps, reason) == steps.status
    # the step that ends the solve stands, one that breaks it does not
    assert steps.record[at.ACCEPTED] == (reason == "done")
    before = steps.state()
    for leaves in (GOOD, BAD, BROKEN, random_leaves(0.5)):
        steps.judge(leaves)
        assert steps.state() == before
        assert steps.record[at.ACCEPTED] == 0


def test_underflow_comes_where_the_host_raises(backend: Backend) -> None:
    steps = DeviceSteps(backend.step_control, AdaptiveOptions(), [1.0, 2.0], h=0.5, device=backend.device)

    def fall() -> None:
        for taken in range(100):
            steps.follow(BROKEN, taken)

    with pytest.raises(RuntimeError, match="underflow in the step size"):
        fall()
    assert steps.status == at.UNDERFLOW
    assert steps.control[at.SIZE] == pytest.approx(steps.host.h, rel=1e-12)


@pytest.mark.parametrize("allowed", [1, 5])
def test_attempts_are_counted_from_output_to_output(backend: Backend, allowed: int) -> None:
    options = AdaptiveOptions(max_num_steps=allowed, max_step=1.0)
    steps = DeviceSteps(backend.step_control, options, TIMES, h=0.5, device=backend.device)
    for taken in range(2):
        # an output is reached by each of these steps: the count begins anew
        assert steps.follow(GOOD, taken)
        assert steps.control[at.ATTEMPTS] == 1
    for _ in range(allowed - 1):
        steps.judge(GOOD)
        assert steps.status == at.RUNNING
    steps.judge(GOOD)
    assert steps.status == at.TOO_MANY
    # the step itself stands: it is the next one that is not taken
    assert steps.record[at.ACCEPTED] == 1


def test_a_step_that_is_not_finite_leaves_its_own_place(backend: Backend) -> None:
    options = AdaptiveOptions(min_step=0.25)
    steps = DeviceSteps(backend.step_control, options, [0.0, 9.0], h=0.25, device=backend.device)
    steps.judge(BROKEN)
    assert steps.status == at.NOT_FINITE
    assert steps.control[[at.TIME, at.H, at.END]].tolist() == [0.0, 0.25, 0.25]
    # above the smallest size it is rejected like any other
    steps = DeviceSteps(backend.step_control, options, [0.0, 9.0], h=0.5, device=backend.device)
    steps.judge(BROKEN)
    assert steps.status == at.RUNNING
    assert steps.control[[at.TIME, at.H, at.END]].tolist() == [0.0, 0.25, 0.25]


def test_a_proposal_is_remembered_exactly(backend: Backend) -> None:
    """A rejected step does not move the memory of the controller, an accepted one moves it by one."""
    options = AdaptiveOptions(coefficients=CONTROLLERS["PID"])
    steps = DeviceSteps(backend.step_control, options, [0.0, 9.0], device=backend.device)
    for leaves, memory in ((GOOD, [0.1, 1.0]), (BAD, [0.1, 1.0]), ([(0.25, 0.0, 1)], [0.5, 0.1])):
        steps.judge(leaves)
        assert steps.control[[at.PREVIOUS, at.ONE_BEFORE]].tolist() == pytest.approx(memory, rel=1e-15)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_opcheck(controller: str) -> None:
    options = AdaptiveOptions(coefficients=CONTROLLERS[controller])
    steps = DeviceSteps(ops.step_control, options, [0.0, 0.001, 9.0])
    steps.record.zero_()
    arguments = (steps.numbers([[0.5, 0.1]]), steps.numbers([1.0]), steps.output_times)
    outputs = (steps.control, steps.record, steps.stage_times)
    torch.library.opcheck(ops.step_control, (*outputs, *arguments, [0.0, 0.2, 0.3, 8 / 9, 1.0, 1.0], steps.parameters))
