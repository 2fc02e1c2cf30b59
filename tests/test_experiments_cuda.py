"""The experiments on a GPU: short runs of every program, and a killed run that goes on."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from experiment_runs import interrupted

for _package in ("h5py", "jinja2", "matplotlib", "pandas", "psutil", "sklearn", "tabulate", "torchdiffeq", "tqdm"):
    pytest.importorskip(_package)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cnf", ["--density", "2spirals", "--compare"]),
        ("cnf_gradients", []),
        ("otflow", ["--dataset", "power", "--compare"]),
        ("stl10", ["--data", "digits", "--compare"]),
        ("stl10", ["--data", "stl10", "--precision", "fp16", "--scaler", "both"]),
        ("adjoint_scaling", []),
        ("roundoff", []),
    ],
    ids=["cnf", "cnf_gradients", "otflow", "digits", "stl10", "adjoint_scaling", "roundoff"],
)
def test_short_runs(name: str, arguments: list[str], tmp_path: Path) -> None:
    program = importlib.import_module(f"experiments.{name}")
    assert program.main([*arguments, "--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    assert records
    for record in records:
        # torchdiffeq in fp16 without a scaler may fail; nothing of ours may
        assert record["status"] == "done" or record["config"].get("solver") == "torchdiffeq", record["failure"]
        if record["status"] == "done" and not record["study"]:
            assert all(math.isfinite(value) for value in record["summary"].values())
            assert record["summary"]["peak MiB"] > 0


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_killed_run_goes_on(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same curve, but for what atomic additions of gradients in another order may change."""
    from experiments import stl10

    def options(folder: str) -> stl10.ImageOptions:
        return stl10.ImageOptions(
            precision=precision, data="digits", quick=True, epochs=3, device="cuda", out=str(tmp_path / folder)
        )

    images = stl10.load(options("whole"))
    whole = stl10.run_one(options("whole"), images)
    judge = stl10.judge
    monkeypatch.setattr(stl10, "judge", interrupted(judge, call=2))
    with pytest.raises(KeyboardInterrupt):
        stl10.run_one(options("parts"), images)
    monkeypatch.setattr(stl10, "judge", judge)
    again = stl10.run_one(options("parts"), images)
    mine, its = (torch.tensor(run.column("loss")[1]) for run in (again, whole))
    # what the first epoch computed is the same but for that order; later losses differ by what training makes of it
    unit = {"tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
    torch.testing.assert_close(mine, its, rtol=4 * unit, atol=0)
