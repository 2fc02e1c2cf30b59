"""Made-up run folders, as the experiments leave them, and runs that are cut off."""

import csv
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

# hardware as bench.common.machine() describes it
MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "threads": 1,
    "cpu_used_by_others_percent": 0.0,
    "gpu": None,
    "torch": "2.13.0",
    "triton": "3.7.1",
    "python": "3.11.7",
    "commit": "0123456789abcdef",
    "uncommitted": False,
}


def write_run(
    out: Path,
    experiment: str,
    subject: str,
    solver: str = "rampde",
    precision: str = "bf16",
    scaler: str = "none",
    seed: int = 0,
    log: list[dict[str, Any]] | None = None,
    **record: Any,
) -> Path:
    """A run's folder as an experiment leaves it; ``record`` replaces what run.json says."""
    name = f"{subject}-{solver}-{precision}-{scaler}-{seed}"
    folder = out / experiment / name
    folder.mkdir(parents=True)
    config = {
        "solver": solver,
        "precision": precision,
        "scaler": scaler,
        "checkpoint": "auto",
        "seed": seed,
        "device": "cpu",
    }
    usual = {
        "experiment": experiment,
        "name": name,
        "config": {**config, "size": "small"},
        "machine": MACHINE,
        "command": f"python -m experiments.{experiment} --seeds 3",
        "synthetic": False,
        "status": "done",
        "failure": None,
        "summary": {},
    }
    (folder / "run.json").write_text(json.dumps({**usual, **record}))
    if log:
        with (folder / "log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in log for key in row)))
            writer.writeheader()
            writer.writerows(log)
    return folder


def interrupted(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """A function that is interrupted when it is called for the ``call``-th time."""
    calls = []

    @wraps(function)
    def called(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return called
