"""What every benchmark shares: clocks, interleaving, summaries, the machine's description, result files."""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
# exit status of a run whose time was over before its work
UNFINISHED = 3
# what figures and tests depend on, and what of machine() says that two runs had the same before them
SOURCES = (
    "rampde",
    "kernels",
    "csrc",
    "bench",
    "tests",
    "examples",
    "experiments",
    "docs",
    "README.md",
    "setup.py",
    "pyproject.toml",
)
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".md", ".toml")
# what runs write, which makes no other state of the tree
NOT_SOURCES = (":(exclude)bench/results", ":(exclude)experiments/recorded")
ORIGIN = ("sources", "cpu", "cores", "threads", "gpu", "torch", "triton", "python")


@dataclass(frozen=True)
class Quantiles:
    """Median of a sample with its 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} .. {self.high:.3g})"


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median and 20/80 % quantiles; a single value stands for all three."""
    if len(values) < 2:
        return Quantiles(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Quantiles(statistics.median(values), fifths[0], fifths[3])


def synchronize(device: str | torch.device) -> None:
    """Waits until the device has done all work given to it; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _wall_seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


class DeviceClock:
    """Seconds that the GPU itself spends on a call, by CUDA events, with a cold L2 cache.

    Before each call a buffer larger than the cache is overwritten, as often as keeps the GPU busy until the
    host has enqueued the call. Launch cost therefore does not show: it belongs to the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)
        for _ in range(2):
            self._pass_seconds = _wall_seconds(self._buffer.zero_, 10, device)

    def __call__(self, call: Callable[[], object], calls: int, device: torch.device) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        passes = 1 + math.ceil(2 * (time.perf_counter() - start) / self._pass_seconds)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for before, after in events:
            for _ in range(passes):
                self._buffer.zero_()
            before.record()
            call()
            after.record()
        synchronize(device)
        return statistics.median(before.elapsed_time(after) for before, after in events) * 1e-3


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str | torch.device = "cpu",
    clock: str = "wall",
    sample_seconds: float = 0.005,
    max_seconds: float | None = None,
    warmup: int = 3,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds per call of every candidate in every round, the candidates in a new random order each round.

    What slows the machine for a while then slows all of them, and ratios within a round are fair. Each
    sample repeats the call for about ``sample_seconds``. ``clock`` is "wall" (host included) or "device"
    (CUDA only, see :class:`DeviceClock`). When ``max_seconds`` is given, fewer rounds are made, at least
    three, to stay near it.
    """
    device = torch.device(device)
    if clock not in ("wall", "device"):
        raise ValueError(f"clock is {clock!r}, expected 'wall' or 'device'")
    if clock == "device" and device.type != "cuda":
        raise ValueError(f"clock 'device' needs a CUDA device, got {device}")
    timer = DeviceClock(device) if clock == "device" else _wall_seconds
    calls = {}
    round_seconds = 0.0
    for name, call in candidates.items():
        once = _wall_seconds(call, 1, device)
        # the first calls may contain one-off work; a long call is dear to repeat and contains little of it
        for _ in range(warmup if once < 20 * sample_seconds else 0):
            once = min(once, _wall_seconds(call, 1, device))
        # every call has an interval of its own on the device clock, so few of them say as much
        most = 1000 if clock == "wall" else 20
        calls[name] = max(1, min(most, round(sample_seconds / once)))
        round_seconds += calls[name] * once
    if max_seconds is not None:
        rounds = max(3, min(rounds, int(max_seconds / round_seconds)))
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(timer(candidates[name], calls[name], device))
    return times


def ratio_summary(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Quantiles]:
    """Each candidate's time over the baseline's of the same round: below 1 is faster than the baseline."""
    return {
        name: quantiles([mine / its for mine, its in zip(samples, times[baseline], strict=True)])
        for name, samples in times.items()
    }


def _output(*command: str) -> str:
    """What a command prints, or nothing when it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def used_by_others() -> float:
    """Percent of the processor in use while this process sleeps, asked once, before anything is timed."""
    return float(psutil.cpu_percent(interval=0.5))


@cache
def sources() -> str:
    """A digest of the sources, which tells states of the tree apart that share a commit, and needs no git."""
    found = [path for name in SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in SUFFIXES and path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def same_origin(record: Mapping[str, Any]) -> bool:
    """Whether a result file's content comes from these sources, on this machine, with these versions and threads."""
    here, there = machine(), record.get("machine", {})
    return all(here[key] == there.get(key) for key in ORIGIN)


def machine() -> dict[str, Any]:
    """Hardware, versions and commit that a figure belongs to."""
    commit = _output("git", "rev-parse", "HEAD")
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_used_by_others_percent": used_by_others(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "rampde": _version("rampde"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "sources": sources(),
        "commit": commit or "unknown",
        "uncommitted": bool(commit and _output("git", "status", "--porcelain", "--", ".", *NOT_SOURCES)),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        found |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver_and_clocks": _output("nvidia-smi", query, "--format=csv,noheader"),
        }
    return found


def machine_line(found: Mapping[str, Any]) -> str:
    """:func:`machine` in a line for the head of a table, and another where others use the machine as well."""
    gpu = f"{found['gpu']}, CUDA {found['cuda']}, " if found["gpu"] else ""
    commit = found["commit"][:10] + (" with uncommitted changes" if found["uncommitted"] else "")
    line = (
        f"{gpu}{found['cpu']}, {found['threads']} threads on {found['cores']} cores, torch {found['torch']}, "
        f"triton {found['triton']}, Python {found['python']}, commit {commit}"
    )
    used = found["cpu_used_by_others_percent"]
    return line if used < 20 else f"{line}\nbusy: others use {used:.0f} % of the cores, so these times mean little"


def results_folder(out: str | None = None) -> Path:
    """The folder that ``--out`` names, else ``bench/results/<GPU or CPU>``; made when it does not exist."""
    found = machine()
    name = re.sub(r"[^a-z0-9]+", "-", (found["gpu"] or found["cpu"]).lower()).strip("-")
    folder = Path(out) if out else ROOT / "bench" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(folder: Path, name: str, content: Mapping[str, Any], say: bool = True) -> Path:
    """Writes ``<name>.json``: the content, with the machine and the command that it came from; says where."""
    path = folder / f"{name}.json"
    command = shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]])
    # a run may be cut off at any time: the file is either the one before or this one
    whole = folder / f".{name}.json"
    whole.write_text(json.dumps({"machine": machine(), "command": command, **content}, indent=1) + "\n")
    whole.replace(path)
    if say:
        print(f"wrote {path}")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """What ``<name>.json`` holds; nothing where there is none, or it does not come from here (:func:`same_origin`)."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if same_origin(found) else {}


def write_results(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any], say: bool = True
) -> tuple[Path, Path]:
    """Writes ``<name>.csv`` (the rows) and ``<name>.json`` (rows, ``meta``, machine, command); says where."""
    if not rows:
        raise ValueError(f"no rows to write for {name!r}")
    table = folder / f"{name}.csv"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if say:
        print(f"wrote {table}")
    return table, write_json(folder, name, {**meta, "rows": list(rows)}, say)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type of command line arguments: some of the ``known`` names, with commas between them."""

    def split(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return found

    return split


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Prints rows that share their keys; the keys are the headings."""
    if title:
        print(f"\n{title}")
    print(tabulate([list(row.values()) for row in rows], headers=list(rows[0]), disable_numparse=True))
