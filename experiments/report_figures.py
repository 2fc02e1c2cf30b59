"""The figures that the report draws itself, from all runs of a table and from the benchmarks' result files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report_runs import Group, Recorded
from experiments.study import Row
from experiments.style import COLOURS, in_words, picture

LINES = {"none": "-", "grad": "--", "dynamic": "-", "both": "-."}
# what a training curve shows: the first of these that a log has twice
CURVES = ("validation accuracy", "validation NLL", "validation loss", "loss")
# of the memory benchmark what says most: solver, and how it is drawn
MEMORY = {
    "torchdiffeq": ("tab:red", "o-"),
    "torchdiffeq adjoint": ("tab:pink", "s:"),
    "rampde none": ("tab:orange", "o-"),
    "rampde step": ("tab:blue", "o-"),
    "rampde lean": ("tab:purple", "o-"),
    "rampde log2 N + 1": ("tab:olive", "^-"),
    "rampde fp8": ("tab:green", "o-"),
}
QUANTITIES = {"y(1)": "state y(1)", "dL/dy0": "adjoint dL/dy(0)", "dL/dtheta": "parameter gradient dL/dθ"}


def curve_column(runs: Sequence[Recorded]) -> str:
    """The column of the logs that tells most of a training; empty where none does."""
    logs = [run.log() for run in runs]
    return next((name for name in CURVES if any(len(_points(log, name)[0]) > 1 for log in logs)), "")


def _points(log: Sequence[Row], column: str) -> tuple[list[int], list[float]]:
    rows = [row for row in log if isinstance(row.get(column), int | float) and isinstance(row.get("iteration"), int)]
    return [row["iteration"] for row in rows], [float(row[column]) for row in rows]


def draw_training(group: Group, column: str) -> bytes:
    """A column of the logs over the iterations: a line for each seed, a colour for each precision; PNG."""
    buffer = io.BytesIO()
    with picture(buffer, width=7.4) as (panel,):
        for line in group.lines:
            solver, precision, scaler, _ = line.variant
            label = in_words(solver, precision, scaler)
            style: dict[str, Any] = {
                "color": COLOURS.get(precision, "tab:purple"),
                "linestyle": ":" if solver == "torchdiffeq" else LINES.get(scaler, "-"),
                "linewidth": 2 if solver == "torchdiffeq" else 1.2,
                "alpha": 0.6 if scaler == "none" and precision == "fp16" else 0.9,
            }
            for run in line.runs:
                iterations, values = _points(run.log(), column)
                if iterations:
                    panel.plot(iterations, values, label=label, **style)
                    if run.status == "failed":
                        panel.plot(iterations[-1:], values[-1:], "X", color=style["color"], markersize=9)
                    # the seeds of a variant share an entry of the legend
                    label = ""
        panel.set_xlabel("iteration (a cross: the run failed there)")
        panel.set_title(column, fontsize=10)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, ncols=2)
    return buffer.getvalue()


def draw_accuracy(record: Mapping[str, Any]) -> bytes:
    """Errors of state, adjoint and gradient over the number of steps, of ``bench.accuracy``; PNG."""
    buffer = io.BytesIO()
    with picture(buffer, panels=len(QUANTITIES), width=4.6) as panels:
        for (quantity, title), panel in zip(QUANTITIES.items(), panels, strict=True):
            curves: dict[tuple[str, str], list[Row]] = {}
            for row in (row for row in record["rows"] if row["quantity"] == quantity):
                curves.setdefault((row["solver"], row["precision"]), []).append(row)
            for (solver, precision), rows in curves.items():
                steps, errors = [row["steps"] for row in rows], [row["relative_error"] for row in rows]
                style = "x:" if solver == "torchdiffeq" else "o-"
                panel.loglog(steps, errors, style, color=COLOURS[precision], label=f"{solver} {precision}")
            panel.set_xscale("log", base=2)
            panel.set_title(f"relative error of the {title}", fontsize=10)
            panel.set_xlabel("steps")
        _alike(panels)
        panels[0].legend(fontsize=8)
    return buffer.getvalue()


def draw_memory(record: Mapping[str, Any]) -> bytes:
    """Peak memory of a training step over the number of steps, of ``bench.memory``; PNG."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rows = [row for row in record["rows"] if row["solver"] in MEMORY]
    kinds = dict.fromkeys((row["problem"], row["precision"]) for row in rows)
    # a curve needs two numbers of steps
    kinds = [
        kind for kind in kinds if len({row["steps"] for row in rows if (row["problem"], row["precision"]) == kind}) > 1
    ]
    buffer = io.BytesIO()
    with picture(buffer, panels=max(1, len(kinds)), width=3.4, height=4.4) as panels:
        for (problem, precision), panel in zip(kinds, panels, strict=False):
            for solver, (colour, style) in MEMORY.items():
                chosen = [
                    row
                    for row in rows
                    if (row["problem"], row["precision"], row["solver"]) == (problem, precision, solver)
                ]
                steps, peaks = [row["steps"] for row in chosen], [row["peak_mib"] for row in chosen]
                # seen beneath what takes as much
                beneath = {"linewidth": 6, "alpha": 0.35} if solver == "torchdiffeq" else {"linewidth": 1.5}
                panel.loglog(steps, peaks, style, color=colour, label=solver, markersize=5, **beneath)
            panel.set_xscale("log", base=2)
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set_title(f"{problem}, {precision}: peak MiB", fontsize=10)
            panel.set_xlabel("steps")
        figure = panels[0].figure
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return buffer.getvalue()


def _alike(panels: Sequence[Any]) -> None:
    lows, highs = zip(*(panel.get_ylim() for panel in panels), strict=True)
    for panel in panels:
        panel.set_ylim(min(lows), max(highs))


def bench_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The ``<name>.json`` of each machine below the benchmarks' results, those that have rows."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{name}.json"))]
    return [record for record in found if record.get("rows")]
