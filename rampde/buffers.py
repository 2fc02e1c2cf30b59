"""Buffers of modules that f changes, such as running means: once for each evaluation of the solve, not again when the
evaluation is repeated for gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Leaves ``buffers`` afterwards as they were; for autograd they have not been changed at all."""
    if not buffers:
        yield
        return
    before = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):  # type: ignore[attr-defined]
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
