"""Runs the cases of ``test_distributed`` in every process of a ``torchrun``: python distributed_worker.py REPORT.

Each process runs all cases in the same order, and the first one writes what they found: for each case the results of
all processes, or the error that was met.
"""

import gc
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import distributed_agreement  # noqa: F401  # these add their cases
import distributed_gradients  # noqa: F401
import torch
import torch.distributed as dist
from distributed_common import CASES, METHODS, POLICIES, rank

__all__ = ["CASES", "METHODS", "POLICIES"]


def run(name):
    try:
        return {"found": CASES[name]()}
    except Exception:
        return {"raised": traceback.format_exc()}


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    report = {}
    for name in CASES:
        torch.manual_seed(rank())
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, run(name))
        report[name] = results
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))
    # a group that goes with the last module which holds it may wait for its own thread for ever
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
