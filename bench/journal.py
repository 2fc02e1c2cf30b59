"""A pytest plugin that writes down how each test ended, so that tests which were cut off go on where they were.

    python -m pytest -p bench.journal --journal FILE

Tests that passed, or were skipped, according to the file are not run again.
"""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

DONE = ("passed", "skipped")


def outcomes(path: Path) -> dict[str, str]:
    """How each test ended the last time: passed, skipped, failed, or error (before or after the test itself)."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        # of a run that was cut off, half a line
        with suppress(json.JSONDecodeError):
            name, outcome = json.loads(line)
            found[name] = outcome
    return found


def counts(path: Path) -> dict[str, int]:
    """Numbers of tests by outcome; empty where nothing was written."""
    found = Counter(outcomes(path).values())
    return {"tests": found.total(), **{name: found[name] for name in (*DONE, "failed", "error")}} if found else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="file of outcomes; tests done according to it are not run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--journal"):
        config.pluginmanager.register(Journal(config.getoption("--journal")))


class Journal:
    """Leaves out what is done, and writes a line for each test that ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running: dict[str, str] = {}
        with path.open("a") as file:
            file.write("\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        before = outcomes(self.path)
        done = [item for item in items if before.get(item.nodeid) in DONE]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if before.get(item.nodeid) not in DONE]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = "error" if report.failed and report.when != "call" else str(report.outcome)
        # what went before counts, unless this is worse
        if report.failed or self.running.get(report.nodeid, "passed") == "passed":
            self.running[report.nodeid] = outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([nodeid, self.running.pop(nodeid)]) + "\n")
