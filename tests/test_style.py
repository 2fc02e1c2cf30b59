"""Style and types: the commands that a developer runs, as tests, so that running the tests is enough."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted(str(path) for path in (ROOT / "csrc").rglob("*.*") if path.is_file())


def succeed(command: list[str]) -> None:
    """Runs a command in the repository root; where it fails, what it says is the test's message."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command[:3])}:\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        pytest.param("ruff", ["check", "--no-cache", "."], id="ruff-check"),
        pytest.param("ruff", ["format", "--no-cache", "--check", "."], id="ruff-format"),
        pytest.param("mypy", [], id="mypy-strict"),
        pytest.param("clang-format", ["--dry-run", "-Werror", *CSRC], id="clang-format"),
    ],
)
def test_tool_has_no_complaint(tool: str, arguments: list[str]) -> None:
    # only the pinned tool of this environment: another version would find other faults
    path = shutil.which(tool, path=sysconfig.get_path("scripts"))
    if path is None:
        pytest.skip(f"{tool} is not installed in this environment")
    succeed([path, *arguments])


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["bash", "-n", ".ci/run"], id="ci"),
        pytest.param(["make", "--dry-run", "--always-make", "test", "demo", "gpu-check", "clean"], id="make"),
        pytest.param(["make", "--dry-run", "gpu-check", "VENV=", "PYTHON=python3"], id="make-no-venv"),
    ],
)
def test_script_parses(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    succeed(command)


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    loose = [line for line in lines if line and not line.startswith("#") and "==" not in line.split(";")[0]]
    assert not loose
