"""How much memory a device has left."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on ``device`` without taking them from others; an estimate on the CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what the allocator holds and nobody uses
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_of_system(), _of_group())


def _of_system() -> int:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    # a system that does not tell what is free: half of what there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_group() -> int:
    """What the control group of a container leaves."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(int(limit) - used, 0)
