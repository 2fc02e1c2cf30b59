"""``make gpu-check``: all tests and the benchmarks on this machine, and a record of how they ended.

    python -m bench.check [tests] [kernels] [solvers] [adaptive] [memory] [--out DIR] [--quick]

On a machine with a GPU a skipped CUDA test is a failure; elsewhere the same run is a rehearsal. What fails
does not keep the rest from running, but decides the exit status.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

import torch

from bench.common import ROOT, machine, machine_line, print_table, results_folder, write_json
from rampde.__main__ import report

CHECKS = ("tests", "kernels", "solvers", "adaptive", "memory")


def run(command: Sequence[str], log: TextIO, environment: Mapping[str, str]) -> int:
    """Runs a command, showing what it prints and writing it to the log; its exit status."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()
    return process.wait()


def counts(junit: Path) -> dict[str, int]:
    """Numbers of tests by outcome, from pytest's XML report; empty when it wrote none."""
    if not junit.exists():
        return {}
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    total["passed"] = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks asked for; the exit status is 1 when one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="check", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--quick", action="store_true", help="short benchmarks and no slow tests")
    options = parser.parse_args(arguments)
    for check in options.checks:
        if check not in CHECKS:
            parser.error(f"check is {check!r}, expected one of {', '.join(CHECKS)}")

    folder = results_folder(options.out)
    required = "cuda" if torch.cuda.is_available() else os.environ.get("RAMPDE_REQUIRE", "")
    environment = {**os.environ, "RAMPDE_REQUIRE": required, "PYTHONUNBUFFERED": "1"}
    print(machine_line(machine()), report(), f"results go to {folder}", sep="\n\n")

    junit = folder / "tests.xml"
    junit.unlink(missing_ok=True)
    tests = [sys.executable, "-m", "pytest", "--color=no", f"--junitxml={junit}"]
    speed = ["--quick"] if options.quick else []
    commands = {
        "tests": tests if options.quick else [*tests, "--slow"],
        "kernels": [sys.executable, "-m", "bench.kernels", "--out", str(folder), *speed],
        "solvers": [sys.executable, "-m", "bench.solvers", "--out", str(folder), *speed],
        "adaptive": [sys.executable, "-m", "bench.adaptive", "--out", str(folder), *speed],
        "memory": [sys.executable, "-m", "bench.memory", "--out", str(folder), *speed],
    }
    outcomes: list[dict[str, Any]] = []
    with (folder / "check.log").open("w") as log:
        for check in options.checks or CHECKS:
            print(f"\n{check}: {' '.join(commands[check])}", flush=True)
            start = time.perf_counter()
            status = run(commands[check], log, environment)
            seconds = round(time.perf_counter() - start, 1)
            outcome = {"check": check, "passed": status == 0, "seconds": seconds, "exit status": status}
            outcomes.append(outcome | ({"counts": counts(junit)} if check == "tests" else {}))
    junit.unlink(missing_ok=True)
    record = {"RAMPDE_REQUIRE": required, "report": report().splitlines(), "checks": outcomes}
    write_json(folder, "check", record)
    print_table([{**outcome, "counts": outcome.get("counts", "")} for outcome in outcomes])
    return 0 if all(outcome["passed"] for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
