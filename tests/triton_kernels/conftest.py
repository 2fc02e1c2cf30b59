"""The device on which the suites of values run."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device_of_triton() -> Iterator[None]:
    from suites import INTERPRETED  # needs Triton, which the tests beside the suites may lack

    torch.set_default_device("cpu" if INTERPRETED else "cuda")
    yield
    torch.set_default_device(None)
