"""``make gpu-check``: the benchmarks and all tests on this machine, and a record of how they ended.

    python -m bench.check [kernels] [solvers] [compare] [tests] [adaptive] [memory] [sanitizer]
                          [--out DIR] [--quick] [--seconds S] [--again]

On a machine with a GPU a skipped CUDA test is a failure; elsewhere the same run is a rehearsal. What fails
does not keep the rest from running, but decides the exit status.

The run ends after ``--seconds``, of which every check gets its share, and what others leave of theirs. What could not
be finished is taken up by the next run: outcomes are written as soon as they are known, and what has passed is not run
again while the sources, the machine and the versions are the same. "tests" goes on behind the last test, "compare"
behind the last workload, "sanitizer" (compute-sanitizer over the tests of the operators on the GPU, where there is one)
behind the last file; the others begin anew, with twice the time that they had.
"""

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.common import (
    ROOT,
    UNFINISHED,
    machine,
    machine_line,
    print_table,
    read_json,
    results_folder,
    write_json,
)
from bench.journal import counts
from rampde.__main__ import report

# in this order, with these shares of the time
SHARES = {"kernels": 4, "solvers": 4, "compare": 6, "tests": 8, "adaptive": 2, "memory": 4, "sanitizer": 4}
CHECKS = tuple(SHARES)
# which begin where they were stopped
RESUMING = ("compare", "tests", "sanitizer")
SANITIZER = "compute-sanitizer"
OPERATOR_TESTS = ("test_cuda", "test_rk_*", "test_adjoint_*", "test_accumulate_gradients", "test_update_scale")
NO_TESTS_LEFT = 5
# seconds that are not worth a beginning
SHORT = 10


@dataclass(frozen=True)
class Check:
    """The commands of a check, by name; ``skipped`` says why there are none."""

    parts: Mapping[str, Sequence[str]]
    skipped: str = ""


def run(command: Sequence[str], log: TextIO, environment: Mapping[str, str], seconds: float) -> int | None:
    """Runs a command, showing what it prints and writing it to the log; its exit status, None when time was over."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # with what it starts itself it is one group, which can be stopped
        start_new_session=True,
    )
    assert process.stdout is not None
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            stop()
            process.wait()
    return None if stopped.is_set() else status


def make_check(name: str, folder: Path, quick: bool, goes_on: bool, seconds: float) -> Check:
    """What a check runs in the time that it has."""
    if name == "sanitizer":
        return sanitizer()
    if name == "tests":
        tests = [sys.executable, "-m", "pytest", "--color=no", "-p", "bench.journal", "--journal", str(journal(folder))]
        return Check({name: tests if quick else [*tests, "--slow"]})
    command = [sys.executable, "-m", f"bench.{name}", "--out", str(folder), *(["--quick"] if quick else [])]
    if name == "compare":
        # no workload is begun towards the end, when it would be cut off
        command += ["--seconds", f"{0.85 * seconds:.0f}", *(["--resume"] if goes_on else [])]
    return Check({name: command})


def journal(folder: Path) -> Path:
    """Where it is written how tests ended."""
    return folder / "tests.log"


def sanitizer() -> Check:
    """NVIDIA's compute-sanitizer over the tests of the operators: what they read and write, and who is first."""
    tool = shutil.which(SANITIZER)
    if not torch.cuda.is_available() or tool is None:
        return Check({}, f"no {SANITIZER} here" if tool is None else "no GPU")
    files = sorted(path for name in OPERATOR_TESTS for path in (ROOT / "tests").glob(f"{name}.py"))
    tests = [sys.executable, "-m", "pytest", "--color=no", "-m", "cuda"]
    return Check(
        {
            f"{look} {file.stem}": [tool, "--tool", look, "--error-exitcode", "1", *tests, str(file)]
            for look in ("memcheck", "racecheck")
            for file in files
        }
    )


def suffices(check: str, before: Mapping[str, Any], seconds: float) -> bool:
    """Whether it may help to begin: not where it begins anew and had as much time before."""
    return check in RESUMING or before.get("outcome") != "unfinished" or seconds > before["seconds"]


def share(check: str, later: Sequence[str], left: float, before: Mapping[str, Any]) -> float:
    """Seconds for a check of what is left: its share beside the later ones; twice what did not suffice before, where it
    begins anew."""
    fair = left * SHARES[check] / (SHARES[check] + sum(SHARES[name] for name in later))
    anew = before.get("outcome") == "unfinished" and check not in RESUMING
    return min(left, max(fair, 2 * before["seconds"] if anew else 0.0))


def perform(
    check: str, what: Check, before: Mapping[str, Any], seconds: float, log: TextIO, folder: Path
) -> dict[str, Any]:
    """Runs what is not done of a check; its outcome."""
    required = os.environ | {"RAMPDE_REQUIRE": requirement(), "PYTHONUNBUFFERED": "1"}
    # so that an operand's end is an allocation's end
    environment = required | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check == "sanitizer" else {})
    start = time.perf_counter()
    outcome, status = "skipped" if what.skipped else "passed", 0
    done = [part for part in before.get("done", []) if part in what.parts]
    for part, command in what.parts.items():
        if part in done:
            continue
        left = seconds - (time.perf_counter() - start)
        print(f"\n{part}: {' '.join(command)}\nat most {left:.0f} s", flush=True)
        ended = run(command, log, environment, left) if left > 0 else None
        if ended is None or (check == "compare" and ended == UNFINISHED):
            outcome = "unfinished" if outcome == "passed" else outcome
            break
        if ended == 0 or (check in ("tests", "sanitizer") and ended == NO_TESTS_LEFT):
            done.append(part)
        else:
            outcome, status = "failed", ended
    found = {"check": check, "outcome": outcome, "seconds": round(time.perf_counter() - start, 1)}
    found |= {"exit status": status, "done": done, "why": what.skipped}
    return found | ({"counts": counts(journal(folder))} if check == "tests" else {})


def requirement() -> str:
    """The backend without which its tests fail."""
    return "cuda" if torch.cuda.is_available() else os.environ.get("RAMPDE_REQUIRE", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks asked for; the exit status is 1 when one of them failed, 3 when one is unfinished."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="check", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--quick", action="store_true", help="short benchmarks and no slow tests")
    parser.add_argument("--seconds", type=float, default=540, help="for all together (default: 540)")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    options = parser.parse_args(arguments)
    for check in options.checks:
        if check not in CHECKS:
            parser.error(f"check is {check!r}, expected one of {', '.join(CHECKS)}")

    folder = results_folder(options.out)
    print(machine_line(machine()), report(), f"results go to {folder}", sep="\n\n")
    settings = {"RAMPDE_REQUIRE": requirement(), "quick": options.quick}
    found = read_json(folder, "check")
    goes_on = not options.again and all(found.get(key) == value for key, value in settings.items())
    outcomes = {outcome["check"]: outcome for outcome in found["checks"]} if goes_on else {}
    if not goes_on:
        journal(folder).unlink(missing_ok=True)

    def write(say: bool = False) -> None:
        record = {**settings, "report": report().splitlines(), "checks": list(outcomes.values())}
        write_json(folder, "check", record, say)

    # before the first test is written down: from here on the journal is of these sources
    write()
    asked = list(dict.fromkeys(options.checks or CHECKS))
    pending = [check for check in asked if outcomes.get(check, {}).get("outcome") != "passed"]
    # what failed will hardly pass now, and waits for what was not seen yet
    pending.sort(key=lambda check: outcomes.get(check, {}).get("outcome") == "failed")
    # no time is kept for what cannot be done here
    pending.sort(key=lambda check: check != "sanitizer" or not sanitizer().skipped)
    for check in asked:
        if check not in pending:
            print(f"{check}: has passed with these sources, {outcomes[check]['commit'][:10]}")
    with (folder / "check.log").open("a" if goes_on else "w") as log:
        stopped: dict[str, float] = {}
        while pending:
            check, *later = pending
            before = outcomes.get(check, {})
            left = options.seconds - (time.perf_counter() - began)
            seconds = share(check, later, left, before)
            if suffices(check, before, seconds):
                what = make_check(check, folder, options.quick, goes_on or bool(before), seconds)
                outcomes[check] = perform(check, what, before, seconds, log, folder) | {"commit": machine()["commit"]}
                write()
            # once all had their turn, where these leave more than it had
            stopped[check] = seconds if outcomes[check]["outcome"] == "unfinished" else math.inf
            if not later:
                left = options.seconds - (time.perf_counter() - began)
                later = [name for name in asked if stopped.get(name, math.inf) < left and left > SHORT]
            pending = later
    write(say=True)
    print_table([_line(outcomes[check]) for check in asked])
    ends = {outcomes[check]["outcome"] for check in asked}
    if "unfinished" in ends:
        print("run it again to go on with what is unfinished")
    return 1 if "failed" in ends else UNFINISHED if "unfinished" in ends else 0


def _line(outcome: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ", ".join(f"{value} {name}" for name, value in outcome.get("counts", {}).items())
    columns = ("check", "outcome", "seconds", "exit status")
    return {column: outcome[column] for column in columns} | {"": numbers or outcome["why"]}


if __name__ == "__main__":
    # so that what is running is stopped as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
