"""``make gpu-check`` goes on where it was cut off, and knows what it need not do again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _repository_root_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tabulate", "psutil", "torchdiffeq"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(ROOT))


Scripts = dict[str, str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, Scripts]]:
    """Runs scripts in the place of the checks; the exit status, and the outcomes written."""
    from bench import check

    def call(scripts: Scripts, *arguments: str) -> tuple[int, Scripts]:
        def fake(name: str, *_: Any) -> check.Check:
            return check.Check({name: [sys.executable, "-S", "-c", scripts[name]]})

        monkeypatch.setattr(check, "make_check", fake)
        status = check.main([*scripts, "--out", str(tmp_path), *arguments])
        found = json.loads((tmp_path / "check.json").read_text())["checks"]
        return status, {outcome["check"]: outcome["outcome"] for outcome in found}

    return call


def counting(file: Path, then: str = "") -> str:
    """A script that writes a line to the file each time that it is run."""
    return f"open({str(file)!r}, 'a').write('.'); {then}"


def test_what_has_passed_is_not_run_again(
    run: Callable[..., tuple[int, Scripts]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import common

    passing, failing = tmp_path / "passing", tmp_path / "failing"
    scripts = {"kernels": counting(passing), "solvers": counting(failing, "raise SystemExit(1)")}
    for times in (1, 2):
        assert run(scripts) == (1, {"kernels": "passed", "solvers": "failed"})
        assert (passing.read_text(), failing.read_text()) == (".", "." * times)
    assert run({"kernels": counting(passing)}) == (0, {"kernels": "passed", "solvers": "failed"})
    assert passing.read_text() == "."
    # asked for, in another form, and with other sources it is
    assert run({"kernels": counting(passing)}, "--again") == (0, {"kernels": "passed"})
    assert run({"kernels": counting(passing)}, "--quick") == (0, {"kernels": "passed"})
    monkeypatch.setattr(common, "sources", lambda: "changed")
    assert run({"kernels": counting(passing)}, "--quick") == (0, {"kernels": "passed"})
    assert passing.read_text() == "...."


def test_what_was_stopped_is_taken_up_by_the_next_run(
    run: Callable[..., tuple[int, Scripts]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before"
    slow = {"kernels": counting(before, "import time; print('begun', flush=True); time.sleep(60)"), "adaptive": ""}
    start = time.perf_counter()
    assert run(slow, "--seconds", "3") == (3, {"kernels": "unfinished", "adaptive": "passed"})
    assert time.perf_counter() - start < 30
    assert before.read_text() == "."
    assert "begun" in (tmp_path / "check.log").read_text()
    assert "run it again to go on" in capfd.readouterr().out
    assert run({"kernels": "", "adaptive": "raise SystemExit(1)"}) == (0, {"kernels": "passed", "adaptive": "passed"})


def test_time_that_others_leave_goes_to_what_was_stopped(
    run: Callable[..., tuple[int, Scripts]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import check

    before = tmp_path / "before"
    monkeypatch.setattr(check, "SHORT", 0.1)
    # 2 of 8 parts of four seconds are not enough for a second and a half, what the tests leave is
    scripts = {"kernels": counting(before, "import time; time.sleep(1.5)"), "tests": ""}
    assert run(scripts, "--seconds", "4") == (0, {"kernels": "passed", "tests": "passed"})
    assert before.read_text() == ".."


def test_comparison_says_itself_that_it_is_unfinished(run: Callable[..., tuple[int, Scripts]]) -> None:
    # having left time, it is not asked at once again
    assert run({"compare": "raise SystemExit(3)"}) == (3, {"compare": "unfinished"})
    # pytest means an error of its own by that
    assert run({"tests": "raise SystemExit(3)"})[1]["tests"] == "failed"


def test_every_check_gets_its_share_and_more_where_that_did_not_suffice() -> None:
    from bench.check import CHECKS, share, suffices

    left = 540.0
    for place, check in enumerate(CHECKS):
        seconds = share(check, CHECKS[place + 1 :], left, {})
        assert 20 < seconds < 200
        left -= seconds
    assert left == pytest.approx(0)
    unfinished = {"outcome": "unfinished", "seconds": 100.0}
    assert share("kernels", CHECKS[1:], 540, unfinished) == 200
    assert share("kernels", CHECKS[1:], 150, unfinished) == 150
    assert suffices("kernels", unfinished, 101)
    assert not suffices("kernels", unfinished, 99)
    assert suffices("tests", unfinished, 99)
    # goes on where it was: no need to have it all at once
    assert share("tests", CHECKS[:3], 540, unfinished) == share("tests", CHECKS[:3], 540, {})


def test_commands_of_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import check

    def command(name: str, quick: bool = False, goes_on: bool = True) -> str:
        (found,) = check.make_check(name, tmp_path, quick, goes_on, 100.0).parts.values()
        return " ".join(found)

    assert command("compare").endswith(f"-m bench.compare --out {tmp_path} --seconds 85 --resume")
    assert "--resume" not in command("compare", goes_on=False)
    assert command("memory", quick=True).endswith(f"-m bench.memory --out {tmp_path} --quick")
    assert command("tests").endswith(f"-p bench.journal --journal {tmp_path / 'tests.log'} --slow")
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert check.make_check("sanitizer", tmp_path, False, True, 9.0).skipped == "no compute-sanitizer here"
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.sanitizer().skipped == "no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = check.sanitizer().parts
    assert {"memcheck test_rk_stage", "racecheck test_rk_update", "memcheck test_adjoint_update"} < set(parts)
    for part, words in parts.items():
        assert words[:3] == ["/bin/compute-sanitizer", "--tool", part.partition(" ")[0]]


def test_what_is_skipped_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import check

    monkeypatch.setattr(check, "sanitizer", lambda: check.Check({}, "no GPU"))
    assert check.main(["sanitizer", "--out", str(tmp_path)]) == 0
    (outcome,) = json.loads((tmp_path / "check.json").read_text())["checks"]
    assert (outcome["outcome"], outcome["why"]) == ("skipped", "no GPU")


def test_tests_go_on_behind_the_last_one(tmp_path: Path) -> None:
    from bench.journal import counts, outcomes

    file, done = tmp_path / "test_some.py", tmp_path / "tests.log"
    body = """
import os, pytest
@pytest.fixture
def broken(): raise RuntimeError
@pytest.fixture
def breaks_later():
    yield
    raise RuntimeError
def test_passes(): pass
def test_is_skipped(): pytest.skip("for now")
def test_fails(): assert os.environ.get("REPAIRED")
def test_has_no_fixture(broken): pass
def test_does_not_end_well(breaks_later): pass
def test_dies(): os._exit(9) if not os.environ.get("REPAIRED") else None
def test_after(): pass
"""
    file.write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.journal", "-p", "no:cacheprovider"]
    command += ["--journal", str(done), f"--rootdir={tmp_path}", "-c", str(tmp_path / "none.ini"), str(file)]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    assert counts(done) == {}
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 9
    assert counts(done) == {"tests": 5, "passed": 1, "skipped": 1, "failed": 1, "error": 2}
    assert {name.partition("::")[2]: outcome for name, outcome in outcomes(done).items()} == {
        "test_passes": "passed",
        "test_is_skipped": "skipped",
        "test_fails": "failed",
        "test_has_no_fixture": "error",
        "test_does_not_end_well": "error",
    }
    # the line that was being written when the machine went
    with done.open("a") as journal:
        journal.write('["test_some.py::test_di')
    environment = {**os.environ, "REPAIRED": "1"}
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "2 deselected" in again.stdout
    assert counts(done) == {"tests": 7, "passed": 4, "skipped": 1, "failed": 0, "error": 2}


def test_unknown_checks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import check

    with pytest.raises(SystemExit):
        check.main(["tests", "nonsense"])
    assert "check is 'nonsense', expected one of kernels, solvers, compare" in capsys.readouterr().err
