"""What is installed, and what is said when something is missing or wrong."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from rampde import __main__ as environment_report
from rampde import ops

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "*.so", "*.o", "__pycache__", "bench", "docs", "examples", "tests"
)


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's outcome, in ``folder``, with changed environment variables."""
    # an import path inherited from this run could hide what the test looks at
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAMPDE_BUILD")}
    return subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False)


def python(site: Path, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that sees the unpacked wheel, and everything installed but this repository's rampde."""
    # -S leaves out the .pth files, with which an editable install would offer its rampde._C
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return run([sys.executable, "-S", *options, "-c", program], site, PYTHONPATH=path)


def build_wheel(folder: Path, mode: str) -> subprocess.CompletedProcess[str]:
    """Builds a wheel of a copy of the sources, so that nothing in the repository is touched or reused."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    return run([*pip, "--no-build-isolation", "--no-deps", "-w", "..", "."], source, RAMPDE_BUILD=mode)


def unpack(folder: Path, mode: str) -> tuple[str, Path]:
    """The name of a fresh wheel and the folder that it is unpacked in."""
    built = build_wheel(folder, mode)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return wheel.name, folder / "site"


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return unpack(tmp_path_factory.mktemp("wheel"), "python")


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_and_nothing_else(pure_wheel: tuple[str, Path]) -> None:
    name, site = pure_wheel
    assert name.endswith("-py3-none-any.whl")
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "rampde").rglob("*.py")}
    expected |= {f"rampde/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected.add("rampde/py.typed")
    found = files(site)
    assert {path for path in found if ".dist-info" not in path} == expected
    (top_level,) = site.glob("*.dist-info/top_level.txt")
    assert top_level.read_text().split() == ["rampde"]
    assert any(path.endswith("LICENSE") for path in found)


STAGE_PROGRAM = """
import rampde, rampde.ops, torch
y, k, h = torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.tensor(0.5, dtype=torch.float64)
print(rampde.ops.rk_stage(y, [k], h, [1.0], torch.float32).tolist(), rampde.__file__)
"""


def test_install_without_extension_works_and_says_so_once(pure_wheel: tuple[str, Path]) -> None:
    _, site = pure_wheel
    done = python(site, STAGE_PROGRAM, "-W", "always")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[1.5,", "1.5,", "1.5]", str(site / "rampde" / "__init__.py")]
    assert done.stderr.count("RuntimeWarning: rampde._C was not built") == 1, done.stderr


def test_broken_extension_is_an_error(pure_wheel: tuple[str, Path], tmp_path: Path) -> None:
    _, site = pure_wheel
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    (broken / "rampde" / "_C.abi3.so").write_bytes(b"not a library")
    done = python(broken, "import rampde")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "_C.abi3.so" in done.stderr


def test_unknown_build_mode_is_refused(tmp_path: Path) -> None:
    built = build_wheel(tmp_path, "nonsense")
    assert built.returncode != 0
    message = "RAMPDE_BUILD is 'nonsense', expected one of auto, cuda, cpu, python"
    assert message in built.stdout + built.stderr


def test_without_compiler_the_wheel_is_pure_python(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    done = run([sys.executable, "setup.py", "bdist_wheel"], source, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler found") == 1
    assert [path.name.endswith("-py3-none-any.whl") for path in source.glob("dist/*.whl")] == [True]


@pytest.mark.slow
def test_compiled_wheel_uses_only_the_stable_interface(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    name, site = unpack(tmp_path, "cpu")
    assert "-cp310-abi3-" in name
    library = site / "rampde" / "_C.abi3.so"
    assert not [path for path in files(site) if path.endswith((".so", ".h", ".cpp")) and "_C.abi3" not in path]
    if shutil.which("nm") is not None:
        symbols = run(["nm", "-DC", "--undefined-only", str(library)], tmp_path).stdout
        assert "aoti_torch" in symbols
        assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line]
    program = f"{STAGE_PROGRAM}\nprint(rampde.ops.MISSING or 'compiled')"
    done = python(site, program, "-W", "error:rampde")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "compiled"


def test_folder_kernels_is_not_a_package_of_its_own() -> None:
    done = run([sys.executable, "-c", "import kernels"], ROOT)
    assert done.returncode != 0
    assert "import rampde.kernels" in done.stderr


def test_every_operator_is_declared_with_an_oracle_and_a_test() -> None:
    registered = {
        name.removeprefix("rampde::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("rampde::")
    }
    assert registered == set(ops.SCHEMAS)
    for name in registered:
        key = "CompositeExplicitAutograd"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rampde::{name}", key), name
        # operators that take all leaves of a state are held against those that take one, all of them in one file
        test = "test_leaves.py" if name.endswith("_leaves") else f"test_{name}.py"
        assert (ROOT / "tests" / test).exists(), f"tests/{test} is missing"


def test_module_reports_what_is_installed() -> None:
    done = run([sys.executable, "-m", "rampde"], ROOT.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["rampde", environment_report.package_version("rampde")]
    assert lines[0].split()[1][0].isdigit()
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)
    table: Mapping[str, list[str]] = {line.split()[0]: line.split()[1:] for line in lines if line}
    for name in ops.SCHEMAS:
        assert table[name] == [
            environment_report.backend(name, "cpu"),
            environment_report.backend(name, "cuda"),
            "ATen",
        ]
        assert table[name][0] == ("ATen" if ops.MISSING or name in ops.WITHOUT_CPU_KERNEL else "C++")
        assert (table[name][1] == "Triton") == (name in ops.TRITON_OPERATORS)
