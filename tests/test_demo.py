"""The demo runs from start to end, and its table and picture are there."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("density", ["8gaussians", "checkerboard", "2spirals"])
def test_demo_trains_measures_and_draws(density: str, tmp_path: Path) -> None:
    for package in ("matplotlib", "torchdiffeq", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path / "new" / "flow.png"
    command = [sys.executable, str(ROOT / "examples" / "cnf.py"), "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--density", density, "--output", str(picture)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loss fp32" in done.stderr
    # evaluations of f in the backward pass, of four steps of four stages
    ways = {"torchdiffeq fp32": 0, "rampde bf16": 0, "rampde fp16": 0, "rampde bf16+fp8": 28}
    lines = done.stdout.splitlines()
    rows = {way: line.removeprefix(way) for line in lines for way in ways if line.startswith(f"{way} ")}
    assert set(rows) == set(ways)
    nll = {}
    for way, row in rows.items():
        figures = [float(word) for word in row.split() if word not in ("%", "ms", "MiB")]
        assert len(figures) == 7, row
        assert all(math.isfinite(figure) for figure in figures), row
        nll[way], _, forward, backward, peak, *evaluations = figures
        assert min(forward, backward, peak) > 0
        assert evaluations == [16, ways[way]]
    for value in nll.values():
        assert value == pytest.approx(nll["torchdiffeq fp32"], rel=0.02)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
