"""The benchmarks run, and refuse to time what is wrong."""

import csv
import json
from pathlib import Path

import pytest
import torch

from rampde import ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _repository_root_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tabulate")
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(str(ROOT))


def test_kernels_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from bench import kernels

    arguments = [
        "--quick",
        "--device",
        "cpu",
        "--sizes",
        "1000",
        "--dtypes",
        "float16",
        "--out",
        str(tmp_path),
    ]
    assert kernels.main(arguments) == 0
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["operator"].partition(",")[0] for row in rows} == set(ops.SCHEMAS)
    for row in rows:
        assert float(row["op_us"]) > 0
        assert float(row["error_of_allowed"]) <= 1
        assert float(row["of_copy_low"]) <= float(row["of_copy"]) <= float(row["of_copy_high"])
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert record["machine"]["torch"] == torch.__version__
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert "over eager" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import kernels

    right = ops.rk_stage
    monkeypatch.setattr(ops, "rk_stage", lambda *arguments: right(*arguments) * 1.01)
    arguments = ["--quick", "--device", "cpu", "--sizes", "1000", "--operators", "rk_stage"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "rk_stage is wrong: error" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_memory_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchdiffeq")
    from bench import memory

    arguments = ["--quick", "--device", "cpu", "--problems", "mlp", "--precision", "bf16"]
    assert memory.main([*arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["solver"] for row in rows} == set(memory.make_solvers(4))
    for row in rows:
        assert 0 < float(row["held_mib"]) <= float(row["peak_mib"])
        assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
    four = {row["solver"]: row for row in rows if row["steps"] == "4"}
    evaluations = {solver: (int(row["f_forward"]), int(row["f_backward"])) for solver, row in four.items()}
    assert evaluations["rampde none"] == (16, 0)
    assert evaluations["rampde stage"] == evaluations["rampde step"] == evaluations["torchdiffeq adjoint"] == (16, 16)
    assert evaluations["rampde lean"] == (16, 28)
    assert int(four["rampde log2 N + 1"]["steps_again"]) == 1
    assert float(four["rampde step"]["saved_mib"]) < float(four["rampde none"]["saved_mib"]) / 4
    assert 0.5 < float(four["rampde step"]["predicted_over_peak"]) < 2
    record = json.loads((tmp_path / "memory.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "predictions over what was measured" in capsys.readouterr().out


def test_memory_of_a_wrong_solver_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchdiffeq")
    import rampde
    from bench import memory

    right = rampde.odeint
    monkeypatch.setattr(rampde, "odeint", lambda func, y0, t, **options: 1.01 * right(func, y0, t, **options))
    arguments = ["--quick", "--device", "cpu", "--problems", "mlp", "--precision", "fp32"]
    assert memory.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "a gradient of rampde none is 0.01 from torchdiffeq's; nothing is timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("velocity", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 150, 5003])
def test_right_kernels_pass_the_check(size: int, velocity: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import cases

    # the end alone is compared for the largest size
    monkeypatch.setattr(cases, "CHECKED", 200)
    for case in cases.cases(size, velocity, torch.device("cpu")):
        assert 0 <= cases.verify(case) <= 1


@pytest.mark.parametrize(("text", "size"), [("1000", 1000), ("1e6", 10**6), ("2**28", 2**28)])
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    from bench import kernels

    assert kernels.parse(["--sizes", text]).sizes == [size]


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "2**", "many"])
def test_impossible_sizes_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import kernels

    with pytest.raises(SystemExit):
        kernels.parse([f"--sizes={text}"])
    assert f"'{text}' is no positive whole number" in capsys.readouterr().err


def test_ratios_are_taken_within_a_round() -> None:
    from bench import common

    summary = common.ratio_summary({"fast": [1.0, 10.0, 100.0], "slow": [2.0, 20.0, 200.0]}, "fast")
    assert summary["slow"] == common.Quantiles(2.0, 2.0, 2.0)
    assert summary["fast"] == common.Quantiles(1.0, 1.0, 1.0)


def test_candidates_are_all_called_in_every_round() -> None:
    from bench import common

    called: list[str] = []
    candidates = {name: (lambda name=name: called.append(name)) for name in ("a", "b", "c")}
    times = common.interleave(candidates, 4, sample_seconds=1e-9, warmup=0)
    assert {name: len(samples) for name, samples in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [called[start : start + 3] for start in range(len(called) - 12, len(called), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_clock_of_the_device_needs_one() -> None:
    from bench import common

    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        common.interleave({"a": lambda: None}, 1, clock="device")
