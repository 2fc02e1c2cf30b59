"""The gradient of the untrained flow: what its errors are measured against, and the program from start to end."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("tabulate")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tqdm")

from experiments import cnf_gradients
from experiments.cnf_gradients import QUICK, GradientOptions, Problem, variants
from experiments.options import Options
from experiments.reference import distance
from experiments.study import read_rows


def test_float64_is_exact_and_torchdiffeqs() -> None:
    problem = Problem(GradientOptions(quick=True, seed=int(torch.randint(1000, ()))))
    for solver in ("torchdiffeq", "rampde"):
        errors = problem.errors(Options("fp64", solver))
        assert list(errors) == [setting.column for setting in QUICK.settings]
        assert max(errors.values()) < 1e-12


def test_every_variant_has_the_same_network_and_points() -> None:
    """In fp32 nothing but roundoff is between them: a few units of 2^-24 in each of the steps."""
    problem = Problem(GradientOptions(quick=True))
    assert torch.equal(problem.points(7), problem.points(7))
    assert max(problem.errors(Options("fp32", "rampde")).values()) < 100 * 2**-24


def test_what_is_not_finite_is_infinitely_far() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    assert distance(torch.tensor([1.0, math.nan, 1.0]), exact) == math.inf
    assert distance(torch.tensor([1.0, math.inf, 1.0]), exact) == math.inf
    assert distance(exact + torch.tensor([0.0, 0.3, 0.0]), exact) == pytest.approx(0.3 / math.sqrt(3))


def test_program_measures_draws_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cnf_gradients.main(command) == 0
    folder = tmp_path / "cnf_gradients" / "checkerboard-quick"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    rows = read_rows(folder / "study.csv")
    assert len(rows) == len(variants(GradientOptions(quick=True))) == 9
    assert all(math.isfinite(row[setting.column]) for row in rows for setting in QUICK.settings)
    assert (folder / "gradients.png").read_bytes().startswith(b"\x89PNG")
    assert "rampde fp16 dynamic" in capsys.readouterr().out
    # what is measured already is not measured again
    before = (folder / "study.csv").stat().st_mtime_ns
    assert cnf_gradients.main(command) == 0
    assert (folder / "study.csv").stat().st_mtime_ns == before


def test_options() -> None:
    with pytest.raises(ValueError, match="density is 'rings', expected one of"):
        GradientOptions(density="rings")
    chosen = variants(GradientOptions(only=(("precision", "fp16"), ("solver", "torchdiffeq"))))
    assert [options.scaler for options in chosen] == ["none", "grad"]
