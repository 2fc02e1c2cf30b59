"""How the kernels for all leaves of a state are launched, without a GPU: once, whatever the number of leaves."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")

import triton
import triton.language as tl
from test_launch import StandInDriver, compilations, describe

from rampde import eager_leaves
from rampde.kernels import leaves, rk_error_leaves, rk_stage_leaves, rk_update_leaves
from rampde.kernels.launch import BLOCK, LEAVES, LeavesLauncher

KERNELS = {
    "_launch_stage": leaves.rk_stage_leaves_kernel,
    "_launch_update": leaves.rk_update_leaves_kernel,
    "_launch_error": leaves.rk_error_leaves_kernel,
}
HALF = eager_leaves.DTYPES.index(torch.float16)
H = torch.tensor(0.1, dtype=torch.float64)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers without memory."""
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(leaves, name, LeavesLauncher(kernel))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInDriver]:
    stand_in = StandInDriver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    for kernel in KERNELS.values():
        kernel.device_caches.clear()
    triton.runtime.driver.set_active(stand_in)
    yield stand_in
    monkeypatch.undo()
    for kernel in KERNELS.values():
        kernel.device_caches.clear()
    # what was compiled here is unloaded here
    gc.collect()
    # the next use looks for a real one
    triton.runtime.driver.set_active(None)


@pytest.mark.parametrize("count", [2, 4, LEAVES])
def test_all_leaves_take_one_launch(driver: StandInDriver, count: int) -> None:
    y = [torch.empty(size) for size in range(BLOCK - 3, BLOCK - 3 + count)]
    k = [torch.empty_like(state, dtype=torch.float16) for state in y for _ in range(2)]
    rk_stage_leaves(y, k, H, [0.5, 0.25], [HALF] * count)
    rk_update_leaves(y, k, H, [0.5, 0.25], y, [], [])
    sums = rk_error_leaves(y, k, H, [0.5, 0.25], [0.25, 0.5], 1e-3, 1e-5, [0.0] * count, y, [], [])
    # four leaves of BLOCK elements or less have a block each, the larger ones two
    programs = sum(-(-state.numel() // BLOCK) for state in y)
    assert [launch[:3] for launch in driver.launches] == [(programs, 1, 1)] * 3
    assert sums.shape == (count, 2)


def test_more_leaves_are_split(driver: StandInDriver) -> None:
    y = [torch.empty(3) for _ in range(2 * LEAVES + 1)]
    stages = rk_stage_leaves(y, y, H, [0.5], [HALF] * len(y))
    assert [launch[0] for launch in driver.launches] == [LEAVES, LEAVES, 1]
    assert len(stages) == len(y)
    sums = rk_error_leaves(y, y, H, [0.5], [0.5], 1e-3, 1e-5, [0.0] * len(y), [], [], [])
    assert sums.shape == (len(y), 2)


def test_empty_leaves_launch_nothing(driver: StandInDriver) -> None:
    y = [torch.empty(0), torch.empty(0, 3)]
    assert [x.shape for x in rk_stage_leaves(y, y, H, [0.5], [HALF] * len(y))] == [(0,), (0, 3)]
    rk_update_leaves(y, y, H, [0.5], y, [], [])
    assert not driver.launches


def test_steps_sizes_and_tolerances_share_one_compilation(
    driver: StandInDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, overflow = torch.linspace(0, 1, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    for step, size in enumerate((4096, 1, 16, 17, 5000)):
        y = [torch.empty(size), torch.empty(size + 16 * step + 1)]
        k = [torch.empty_like(state, dtype=torch.float16) for state in y]
        # without the memory of the launchers, which relies on just that
        forget(monkeypatch)
        h = grid[step]
        rk_stage_leaves(y, k, h, [0.5], [HALF] * 2)
        rk_update_leaves(y, k, h, [0.5], y, [], [], overflow[step % 3], step)
        rk_error_leaves(y, k, h, [0.5], [0.1], 1e-3 * step, float(step), [0.5 * step, 1.0], y, [], [])
    assert [compilations(kernel) for kernel in KERNELS.values()] == [1, 1, 1]
    assert len(driver.launches) == 15


def test_a_remembered_launch_gets_the_same_arguments(driver: StandInDriver) -> None:
    y = [torch.empty(4099), torch.empty(17, dtype=torch.float64)]
    k = [torch.empty_like(state, dtype=torch.bfloat16) for state in y for _ in range(3)]
    checkpoints, overflow_step = [torch.empty_like(state, dtype=torch.bfloat16) for state in y], torch.tensor(7)
    for _ in range(2):
        rk_update_leaves(y, k, H, [0.5, 0.0, 0.25], y, checkpoints, [], overflow_step, 3)
    # grid, then what describes the launch, then the kernel's own arguments
    first, again = (describe(launch[:3] + launch[9:]) for launch in driver.launches)
    assert first == again
    assert first[:3] == [6, 1, 1]
    assert first[-3:] == [[0.5, 0.25], [tl.float32, tl.float64], BLOCK]
    assert first[-3 - LEAVES : -3] == [4099, 17, *[0] * (LEAVES - 2)]


def test_dtypes_and_alignment_of_a_leaf_compile_anew(driver: StandInDriver) -> None:
    y, k = torch.empty(65), torch.empty(65, dtype=torch.float16)
    for leaves_of_call in (
        [(y, k), (y, k)],
        [(y, k), (y, k), (y, k)],
        [(y, k), (y, k.float())],
        [(y.double(), k), (y, k)],
        [(y[1:], k[1:]), (y, k)],
    ):
        before = compilations(leaves.rk_stage_leaves_kernel)
        states, velocities = map(list, zip(*leaves_of_call, strict=True))
        for _ in range(2):
            rk_stage_leaves(states, velocities, H, [0.5], [HALF] * len(states))
        assert compilations(leaves.rk_stage_leaves_kernel) == before + 1
