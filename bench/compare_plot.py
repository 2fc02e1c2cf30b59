"""The picture of the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare_solvers import FLOOR, FLOOR_GRAPH, SOLVERS

# from left to right; what is related has related colours
COLOURS = {
    "rampde": "tab:red",
    "rampde, CUDA graph": "darkred",
    "rampde, f compiled": "tab:orange",
    "rampde, whole compiled": "gold",
    "rampde, own steps": "salmon",
    "torchdiffeq": "tab:blue",
    "torchdiffeq, GradScaler": "lightsteelblue",
    "torchdiffeq adjoint": "tab:cyan",
    "torchdiffeq adjoint, GradScaler": "paleturquoise",
    "torchdiffeq, f compiled": "navy",
    "torchdiffeq, f compiled, GradScaler": "slateblue",
    "torchode, own steps": "tab:green",
    "diffrax, jitted": "tab:purple",
}
FLOORS = {FLOOR: "--", FLOOR_GRAPH: ":"}
ACROSS = 4


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A panel for each workload: milliseconds of a training step, bars in groups by precision, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    down = -(-len(workloads) // ACROSS)
    across = -(-len(workloads) // down)
    size = max(7.0, 4.2 * across), 1.9 + 3.0 * down
    figure, grid = pyplot.subplots(down, across, figsize=size, squeeze=False)
    handles: dict[str, Any] = {}
    for panel in grid.flat[len(workloads) :]:
        panel.set_axis_off()
    for workload, panel in zip(workloads, grid.flat, strict=False):
        handles |= _draw(panel, [row for row in rows if row["workload"] == workload])
        panel.set_title(workload, fontsize=10)
    for panels in grid:
        panels[0].set_ylabel("ms")
    figure.suptitle(f"{title}\ntime of a training step; ends: 20 % and 80 % quantiles; x: wrong or failed", fontsize=8)
    figure.tight_layout(rect=(0, 0.9 / size[1], 1, 1))
    known = {solver: handles[solver] for solver in (*SOLVERS, *FLOORS) if solver in handles}
    figure.legend(known.values(), known.keys(), loc="lower center", ncols=across + 1, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")


def _draw(panel: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One panel; what was drawn for each candidate."""
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    handles: dict[str, Any] = {}
    bars = [row for row in rows if row["solver"] in COLOURS]
    width = 0.8 / max(1, *(sum(row["precision"] == precision for row in bars) for precision in precisions))
    for place, precision in enumerate(precisions):
        mine = [row for row in bars if row["precision"] == precision]
        for index, row in enumerate(mine):
            at = place + width * (index - (len(mine) - 1) / 2)
            colour, value = COLOURS[row["solver"]], row.get("ms")
            if value is None:
                transform = panel.get_xaxis_transform()
                panel.plot([at], [0.04], marker="x", markersize=8, color=colour, transform=transform)
                continue
            ends = [[value - row["ms_low"]], [row["ms_high"] - value]]
            handles[row["solver"]] = panel.bar(
                at, value, 0.92 * width, yerr=ends, color=colour, error_kw={"linewidth": 0.8}
            )
        for row in rows:
            name = row["solver"]
            if row["precision"] == precision and name in FLOORS and row.get("ms") is not None:
                ends = place - 0.45, place + 0.45
                handles[name] = panel.hlines(row["ms"], *ends, color="black", linestyle=FLOORS[name])
    panel.set_xticks(range(len(precisions)), precisions)
    panel.set_xlim(-0.55, len(precisions) - 0.45)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3, axis="y")
    panel.set_axisbelow(True)
    return handles
