"""Runs the suites of values twice: where Triton interprets its kernels on the CPU, and on a GPU.

Triton reads the switch when it is imported, so each run has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")


# with the number of tests that they have at least
SUITES = {"value_suite.py": 100, "quantised_suite.py": 80, "step_suite.py": 80, "leaves_suite.py": 80}


def run_suite(name: str, folder: Path, interpret: bool) -> None:
    suite = Path(__file__).with_name(name)
    report = folder / "report.xml"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(suite)],
        cwd=folder,  # python puts it on the path, where the repository's root would shadow the package
        env=os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    counts = next(ElementTree.parse(report).iter("testsuite")).attrib
    assert int(counts["tests"]) > SUITES[name]
    assert int(counts["skipped"]) == 0, "a skipped test proves nothing here"


@pytest.mark.parametrize("suite", SUITES)
def test_interpreted_kernels_match_the_oracle(suite: str, tmp_path: Path) -> None:
    run_suite(suite, tmp_path, interpret=True)


@pytest.mark.cuda
@pytest.mark.parametrize("suite", SUITES)
def test_compiled_kernels_match_the_oracle(suite: str, tmp_path: Path) -> None:
    run_suite(suite, tmp_path, interpret=False)
