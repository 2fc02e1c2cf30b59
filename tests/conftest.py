"""What every test gets: seeded random numbers, NaN in uninitialised memory, the choice of tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from operands import Backend

import rampde
from rampde import ops
from rampde.capture import RECORDERS

# bench and experiments are not installed; last, so that an installed rampde goes before the source tree's
sys.path.append(str(Path(__file__).resolve().parent.parent))

REQUIRED = os.environ.get("RAMPDE_REQUIRE", "")
"""``cpp`` or ``cuda``: a backend whose absence fails the tests that need it instead of skipping them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (or RAMPDE_SLOW=1)")


def pytest_configure(config: pytest.Config) -> None:
    if REQUIRED not in ("", "cpp", "cuda"):
        raise pytest.UsageError(f"RAMPDE_REQUIRE is {REQUIRED!r}, expected cpp or cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow") and os.environ.get("RAMPDE_SLOW", "") in ("", "0"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if not torch.cuda.is_available() and REQUIRED != "cuda":
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20251027)


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory() -> Iterator[None]:
    """With deterministic algorithms, ``torch.empty`` and the like come filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warns_only)


@pytest.fixture(params=["eager", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """An implementation of the operators by name: the oracle itself, or the kernel that a device has."""
    found = Backend(request.param)
    if found.missing():
        reason = f"no compiled operators for {found.name}. {ops.MISSING}"
        if REQUIRED and (found.name == "cpu" or REQUIRED == "cuda"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def compiled() -> None:
    """For tests of the C++ kernels of the CPU alone."""
    if Backend("cpu").missing():
        if REQUIRED:
            pytest.fail(ops.MISSING)
        pytest.skip(ops.MISSING)


@pytest.fixture
def emulated_recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``cuda_graph=True`` works on the CPU, by emulated graphs."""
    from recorded import Emulated

    Emulated.instances = []
    monkeypatch.setitem(RECORDERS, "cpu", Emulated)
    rampde.clear_cuda_graphs()
    yield
    rampde.clear_cuda_graphs()
