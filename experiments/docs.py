"""Writes the tables and figures of the docs that come from the experiments.

    python -m experiments.docs [--runs experiments/results]

Each table stands between the lines ``<!-- experiments: name -->`` and ``<!-- end -->``, and is made of ``run.json`` and
``study.csv`` of the runs in ``experiments/recorded``. With ``--runs`` those of a folder are taken over into it first,
and the figures in ``docs/figures`` are made of its logs and pictures; those whose sources are not there stay as they
are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.tables import CPU, written
from experiments.report import claims_table, markdown_table, markdown_tables, section
from experiments.report_figures import draw_accuracy, draw_memory, draw_training
from experiments.report_runs import Recorded, collect, groups
from experiments.run import program

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "experiments" / "recorded"
# of a run what is recorded
FILES = ("run.json", "study.csv")
PAGES = (ROOT / "README.md", ROOT / "docs" / "experiments.md")
FIGURES = ROOT / "docs" / "figures"
EXPERIMENTS = ("cnf", "cnf_gradients", "otflow", "stl10", "adjoint_scaling", "roundoff")
# pictures that runs draw
PICTURES = {
    "range": "adjoint_scaling/full/range.png",
    "constants": "adjoint_scaling/full/constants.png",
    "rotation": "roundoff/full-2^-20/rotation.png",
    "network": "roundoff/full-2^-20/network.png",
    "gradients": "cnf_gradients/checkerboard-full/gradients.png",
    "density-fp32": "cnf/2spirals-torchdiffeq-fp32-0/density.png",
    "density-fp16": "cnf/2spirals-rampde-fp16-dynamic-0/density.png",
}
# of which runs the training curves are drawn
TRAINING = {"training-flow": ("cnf", "2spirals", "validation loss")}


def tables(runs: Sequence[Recorded]) -> dict[str, Callable[[], str]]:
    """The tables by the names under which they stand."""

    def of_experiment(name: str) -> str:
        return "\n".join(markdown_tables(section(name, runs), "###"))

    found: dict[str, Callable[[], str]] = {"experiments: claims": lambda: markdown_table(claims_table(runs))}
    return found | {f"experiments: {name}": lambda name=name: of_experiment(name) for name in EXPERIMENTS}


def record(folder: Path) -> None:
    """Takes over the runs of a folder, in place of recorded ones of the same names."""
    for name in FILES:
        for source in folder.rglob(name):
            target = RECORDED / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def draw(folder: Path) -> list[Path]:
    """Writes the figures whose sources are in a folder of runs, and those of the benchmarks; which."""
    made, runs = [], collect(folder)
    FIGURES.mkdir(exist_ok=True)
    for name, source in PICTURES.items():
        if (folder / source).exists():
            shutil.copyfile(folder / source, FIGURES / f"{name}.png")
            made.append(FIGURES / f"{name}.png")
    drawn: dict[str, bytes] = {}
    for name, (experiment, subject, column) in TRAINING.items():
        for group in groups(runs):
            if (group.experiment, group.subject) == (experiment, subject) and any(run.log() for run in group.runs):
                drawn[name] = draw_training(group, column)
    for name, of_record in (("accuracy", draw_accuracy), ("memory", draw_memory)):
        drawn[name] = of_record(json.loads((CPU / f"{name}.json").read_text()))
    for name, png in drawn.items():
        (FIGURES / f"{name}.png").write_bytes(png)
        made.append(FIGURES / f"{name}.png")
    return made


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Reads, draws and writes; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m experiments.docs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of runs to take over")
    options = parser.parse_args(arguments)
    if options.runs is not None:
        if not any(options.runs.rglob("run.json")):
            parser.error(f"there is no run in {options.runs}")
        record(options.runs)
        for path in draw(options.runs):
            print(f"wrote {path.relative_to(ROOT)}")
    runs = collect(RECORDED)
    for page in PAGES:
        page.write_text(written(page.read_text(), tables(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
