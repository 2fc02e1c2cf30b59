"""Adaptive steps that all processes of a batch-sharded solve agree on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def read_process_group(value: object) -> ProcessGroup:
    """The option ``process_group``, checked.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is no member of it.
        RuntimeError: ``torch.distributed`` is missing or not initialized.
    """
    if not distributed.is_available():
        raise RuntimeError("process_group was given, but this build of torch has no torch.distributed")
    if value is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group is one that this process is no member of, expected one of its own groups")
    if not isinstance(value, distributed.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(value).__name__}, expected a torch.distributed.ProcessGroup, such as"
            " torch.distributed.group.WORLD or the get_group() of a DeviceMesh"
        )
    if not distributed.is_initialized():
        raise RuntimeError(
            "process_group was given, but torch.distributed is not initialized, expected"
            " torch.distributed.init_process_group to have been called"
        )
    return value


class Agreement:
    """Sums and maxima over the processes of a group, each of which has a part of the batch.

    Every method is one collective of one small tensor, and every process must call the same ones.

    Attributes:
        sizes: how many numbers each leaf of the state has, in all processes together; at least 1.
    """

    def __init__(self, group: ProcessGroup, leaves: Sequence[Tensor], sizes: Sequence[int], t: Tensor) -> None:
        """Compares what the processes are about to solve: ``leaves``, the real leaves of y0, ``sizes``, how many
        numbers each has, of which a complex one counts once, and the times ``t``.

        Raises:
            ValueError: in every process, where y0 is not finite in one, or where the times differ; or where the group
                does not communicate on the device of the state.
        """
        self._group, self._device = group, leaves[0].device
        devices = [entry.partition(":")[0] for entry in str(distributed.get_backend_config(group)).split(",")]
        if self._device.type not in devices:
            raise ValueError(
                f"process_group communicates on {' and '.join(devices)}, but y0 is on {self._device}, expected a"
                " backend for that device"
            )
        finite = all(bool(torch.isfinite(leaf.detach()).all()) for leaf in leaves)
        # times are compared by a number that differs where they do, mostly
        times = zlib.crc32(repr(t.detach().double().cpu().tolist()).encode())
        own = torch.tensor([int(finite), times, *sizes], device=self._device)
        gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(gathered, own, group=group)
        rows: list[list[int]] = torch.stack(gathered).tolist()
        failed = [rank for rank, row in enumerate(rows) if not row[0]]
        if failed:
            raise ValueError(
                f"y0 has elements that are not finite in the processes {failed} of process_group, expected a finite"
                " initial state in all of them"
            )
        different = [rank for rank, row in enumerate(rows) if row[1] != rows[0][1]]
        if different:
            raise ValueError(
                f"t differs from that of process 0 of process_group in the processes {different}, expected the same"
                " times in all of them"
            )
        self.sizes = [max(sum(of_leaf), 1) for of_leaf in zip(*(row[2:] for row in rows), strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Replaces ``values``, of float64, by their sums over the processes."""
        distributed.all_reduce(values, distributed.ReduceOp.SUM, group=self._group)
        return values

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of numbers that are not negative; infinite where one is not a number."""
        return self._reduced([math.inf if math.isnan(value) else value for value in values], distributed.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        distributed.all_reduce(tensor, operation, group=self._group)
        reduced: list[float] = tensor.tolist()
        return reduced
