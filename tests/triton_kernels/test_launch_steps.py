"""How the kernels that decide on steps are launched, without a GPU: compiled once for all steps, options and sizes."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")

import triton
from device_steps import DeviceSteps
from test_launch import StandInDriver, compilations

from rampde import step_state as at
from rampde.kernels import step_commit, step_control
from rampde.kernels.launch import BLOCK, Launcher
from rampde.kernels.step_commit import step_commit_kernel
from rampde.kernels.step_control import step_control_kernel
from rampde.options import CONTROLLERS, AdaptiveOptions

KERNELS = (step_control_kernel, step_commit_kernel)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher without memory."""
    monkeypatch.setitem(step_commit.__globals__, "_launch", Launcher(step_commit_kernel))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInDriver]:
    stand_in = StandInDriver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    triton.runtime.driver.set_active(stand_in)
    yield stand_in
    monkeypatch.undo()
    for kernel in KERNELS:
        kernel.device_caches.clear()
    # what was compiled here is unloaded here
    gc.collect()
    # the next use looks for a real one
    triton.runtime.driver.set_active(None)


def test_all_options_share_one_compilation(driver: StandInDriver) -> None:
    options = [
        AdaptiveOptions(),
        AdaptiveOptions(safety=1.0, ifactor=1.0, dfactor=1.0, min_step=1.0, max_step=16.0, max_num_steps=16),
        AdaptiveOptions(coefficients=CONTROLLERS["PID"]),
    ]
    records = torch.zeros(3, at.RECORD_SIZE, dtype=torch.float64)
    for index, (given, outputs, leaves) in enumerate(zip(options, (2, 16, 17), (1, 16, 3), strict=True)):
        times = torch.linspace(0, 100, outputs).tolist()
        steps = DeviceSteps(step_control, given, times[::-1] if index else times, order=index + 1)
        steps.record = records[index]
        steps.judge([(0.5, 0.0, 1)] * leaves)
    assert compilations(step_control_kernel) == 1
    assert [launch[:3] for launch in driver.launches] == [(1, 1, 1)] * 3


def commit(size: int, records: int, staged: torch.dtype | None = torch.float16) -> None:
    """Attempts after attempts, each with a record and a place for its start of its own."""
    y, y_next = torch.empty(size), torch.empty(size)
    later = [torch.empty(size, dtype=torch.float16) for _ in range(2)]
    starts = None if staged is None else torch.empty(records, size, dtype=staged)
    times, rows = torch.linspace(0, 1, 5, dtype=torch.float64), torch.empty(5, size)
    for index, record in enumerate(torch.zeros(records, at.RECORD_SIZE, dtype=torch.float64).unbind(0)):
        kept = None if starts is None else starts[index]
        step_commit(record, times, y_next, later, [0.5, 0.25] * 3, y, later[0].clone(), rows, kept)


def test_attempts_and_sizes_share_one_compilation(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (16, BLOCK, 3 * BLOCK + 16):
        # without the memory of the launcher, which relies on just that
        forget(monkeypatch)
        commit(size, 3)
    assert compilations(step_commit_kernel) == 1
    assert [launch[0] for launch in driver.launches] == [1] * 6 + [4] * 3
    # rows of any other size lie where wide accesses cannot begin: so may the starts of steps, at odd addresses
    for size in (1, 15, BLOCK + 1):
        commit(size, 1)
    assert compilations(step_commit_kernel) == 2


def test_nothing_is_launched_for_an_empty_leaf(driver: StandInDriver) -> None:
    commit(0, 2)
    assert not driver.launches
