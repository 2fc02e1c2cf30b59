"""How the Triton kernels are launched, without a GPU: one compilation serves all steps and sizes."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from rampde import fp8_blocks
from rampde.kernels import rk_error, rk_stage, rk_update
from rampde.kernels.launch import BLOCK, Launcher
from rampde.kernels.rk_error import rk_error_kernel
from rampde.kernels.rk_stage import rk_stage_kernel
from rampde.kernels.rk_update import rk_update_kernel

KERNELS = {rk_stage: rk_stage_kernel, rk_update: rk_update_kernel, rk_error: rk_error_kernel}


class StandInDriver:
    """As much of a driver as a launch asks for; it compiles for real and runs nothing."""

    def __init__(self) -> None:
        self.utils = self
        self.launches: list[tuple[Any, ...]] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launches.append(arguments)


def describe(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return [describe(item) for item in argument]
    return (argument.data_ptr(), argument.dtype) if isinstance(argument, Tensor) else argument


def compilations(kernel: Any) -> int:
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers without memory."""
    for function, kernel in KERNELS.items():
        # the functions' own globals: their modules' names are taken by them in the package
        monkeypatch.setitem(function.__globals__, "_launch", Launcher(kernel))


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


def test_steps_and_sizes_share_one_compilation(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)
    overflow = torch.zeros(3, dtype=torch.int64)
    for step, size in enumerate((4096, 1, 16, 17, 5000)):
        y, y_next = torch.empty(size), torch.empty(size)
        k = [torch.empty(size, dtype=torch.float16) for _ in range(2)]
        # without the memory of the launchers, which relies on just that
        forget(monkeypatch)
        # both 0-dim operands are aligned to 8 bytes at every other step
        h, overflow_step = grid[step], overflow[step % 3]
        rk_stage(y, k, h, [0.5, 0.25], torch.float16)
        rk_update(y, k, h, [0.5, 0.25], y_next, overflow_step=overflow_step, step=step)
        rk_error(y, k, h, [0.5, 0.25], [0.1, 0.0], 1e-3 * step, float(step), 0.5 * step, 1, y_next)
    assert [compilations(kernel) for kernel in KERNELS.values()] == [1, 1, 1]
    assert len(driver.launches) == 15


def test_seeds_and_rows_of_checkpoints_share_one_compilation(
    driver: StandInDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, h = torch.empty(4096), torch.tensor(0.1, dtype=torch.float64)
    k = [torch.empty(4096, dtype=torch.float16)]
    # the scales of a step lie at any multiple of 4 bytes
    codes, scales = torch.empty(4, 4096, dtype=fp8_blocks.CODES), torch.empty(4, 33)[:, :32]
    for step, seed in enumerate((0, 1, -1, 2**60)):
        forget(monkeypatch)
        quantised = codes[step], scales[step]
        rk_update(y, k, h, [0.5], y, None, None, None, step, *quantised, seed)
        rk_error(y, k, h, [0.5], [0.1], 1e-3, 1e-5, 0.0, 1, y, None, None, *quantised, seed)
        rk_update(quantised[0], [y], h, [1.0], y, None, None, None, step, None, quantised[1])
    # what reads a step is another kernel than what writes it
    assert [compilations(kernel) for kernel in KERNELS.values()] == [0, 2, 1]


def test_outputs_in_8_bits_compile_anew(driver: StandInDriver) -> None:
    y, h = torch.empty(300), torch.tensor(0.1, dtype=torch.float64)
    outputs = {"quantised": torch.empty(300, dtype=fp8_blocks.CODES), "block_scales": torch.empty(3)}
    for count, options in enumerate(({}, outputs, outputs | {"seed": 5}), 1):
        for _ in range(2):
            rk_update(y, [y], h, [0.5], y, **options)
            rk_error(y, [y], h, [0.5], [0.1], 1e-3, 1e-5, 0.0, 1, y, **options)
        assert [compilations(kernel) for kernel in (rk_update_kernel, rk_error_kernel)] == [count, count]
    # a remembered launch gets the word of its own seed
    rk_update(y, [y], h, [0.5], y, **outputs, seed=6)
    assert fp8_blocks.seed_word(6) in [argument for argument in driver.launches[-1] if isinstance(argument, int)]
    assert compilations(rk_update_kernel) == 3
    # so does what reads them, as bytes, for each dtype in which sums are formed
    for count, result in enumerate((y, y.double()), 4):
        for _ in range(2):
            rk_update(outputs["quantised"], [y], h, [0.5], result, block_scales=outputs["block_scales"])
        assert compilations(rk_update_kernel) == count
        assert torch.uint8 in [x.dtype for x in driver.launches[-1] if isinstance(x, Tensor)]


@pytest.mark.parametrize(
    ("shape", "rows", "programs", "compiled_in"),
    [
        ((4099,), 1, 5, [None, BLOCK]),
        ((4, 2500), 4, 12, [2500, BLOCK]),
        ((100, 3, 11), 100, 7, [33, 64]),
        ((7, 1), 7, 1, [1, 1]),
    ],
    ids=str,
)
def test_rows_are_cut_into_parts_or_bundled(
    driver: StandInDriver, shape: tuple[int, ...], rows: int, programs: int, compiled_in: list[int | None]
) -> None:
    y, h = torch.empty(shape), torch.tensor(0.1, dtype=torch.float64)
    sums = rk_error(y, [y], h, [0.5], [0.25], 1e-3, 0.25, 0.5, rows)
    (launch,) = driver.launches
    assert launch[:3] == (programs, 1, 1)
    assert list(launch[-3:-1]) == compiled_in
    assert sums.shape == (rows, 2)


def test_other_rows_compile_anew(driver: StandInDriver) -> None:
    h = torch.tensor(0.1, dtype=torch.float64)
    for count, (batch, length, rows) in enumerate([(4, 8, 1), (4, 8, 4), (6, 8, 6), (4, 12, 4), (4, 12, 1)], 1):
        y = torch.empty(batch, length)
        for _ in range(2):
            rk_error(y, [y], h, [0.5], [0.25], 1e-3, 0.25, 0.5, rows)
        # the number of rows is not compiled in, their length is
        assert compilations(rk_error_kernel) == (1, 2, 2, 3, 3)[count - 1]


def test_a_remembered_launch_gets_the_same_arguments(driver: StandInDriver) -> None:
    y, h = torch.empty(4099), torch.tensor(0.1, dtype=torch.float64)
    k = [torch.empty(4099, dtype=torch.bfloat16) for _ in range(3)]
    checkpoint, overflow_step = torch.empty(4099, dtype=torch.bfloat16), torch.tensor(7)
    for _ in range(2):
        rk_update(y, k, h, [0.5, 0.0, 0.25], y, checkpoint, overflow_step=overflow_step, step=3)
    # grid, then what describes the launch, then the kernel's own arguments
    first, again = (describe(launch[:3] + launch[9:]) for launch in driver.launches)
    assert first == again
    assert first[:3] == [5, 1, 1]
    assert first[-4:] == [[0.5, 0.25], tl.float32, False, BLOCK]


def test_other_dtypes_alignments_and_coefficients_compile_anew(driver: StandInDriver) -> None:
    h, y, k = torch.tensor(0.1, dtype=torch.float64), torch.empty(65), torch.empty(65, dtype=torch.float16)
    for call in (
        (y, [k], h, [0.5], torch.float16),
        (y, [k], h, [0.25], torch.float16),
        (y, [k], h, [0.5], torch.bfloat16),
        (y[1:], [k[1:]], h, [0.5], torch.float16),
        (y, [k], h.float(), [0.5], torch.float16),
        (y, [k, k], h, [0.5, 0.5], torch.float16),
        (y, [], h, [], torch.float16),
    ):
        before = compilations(rk_stage_kernel)
        for _ in range(2):
            rk_stage(*call)
        assert compilations(rk_stage_kernel) == before + 1
