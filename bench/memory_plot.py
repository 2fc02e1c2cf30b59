"""The picture of the memory benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.memory_cases import ADJOINT, HAND_WRITTEN, REFERENCE

# colour, marker, line; where memory is off the device markers are hollow
STYLES = {
    REFERENCE: ("tab:blue", "o", "-"),
    ADJOINT: ("tab:cyan", "s", "-"),
    HAND_WRITTEN: ("tab:grey", "D", "-"),
    "rampde none": ("tab:red", "o", "-"),
    "rampde tape": ("tab:pink", "x", ":"),
    "rampde stage": ("tab:orange", "^", "-"),
    "rampde step": ("tab:green", "s", "-"),
    "rampde lean": ("tab:purple", "v", "-"),
    "rampde 4": ("tab:brown", "P", "-"),
    "rampde log2 N + 1": ("tab:olive", "P", "--"),
    "rampde log2 N + 1, lean": ("black", "P", ":"),
    "rampde offload none": ("tab:red", "o", "--"),
    "rampde offload step": ("tab:green", "s", "--"),
    "rampde fp8": ("gold", "*", "-"),
    "rampde auto": ("tab:red", "+", ":"),
}


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Peak memory and time over the steps, a row for each problem; of STL-10 for each block, in one row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    groups = list(dict.fromkeys("stl" if row["problem"].startswith("stl") else row["problem"] for row in rows))
    columns = [(quantity, precision) for quantity in ("peak_mib", "ms") for precision in precisions]
    size = 1 + 4.3 * len(columns), 2.4 + 3.4 * len(groups)
    figure, grid = pyplot.subplots(len(groups), len(columns), figsize=size, squeeze=False)
    handles: dict[str, Any] = {}
    for group, panels in zip(groups, grid, strict=True):
        of_group = [row for row in rows if row["problem"].startswith(group)]
        for (quantity, precision), panel in zip(columns, panels, strict=True):
            name = "STL-10 blocks, 4 steps" if group == "stl" else group
            panel.set_title(f"{name}, {precision}: {'peak MiB' if quantity == 'peak_mib' else 'ms'}", fontsize=10)
            lines = _draw(panel, of_group, precision, quantity, by_block=group == "stl")
            handles = lines | handles
    figure.suptitle(f"{title}\npeak memory and time of a training step", fontsize=9)
    figure.tight_layout(rect=(0, 1.1 / size[1], 1, 1))
    known = {solver: handles[solver] for solver in STYLES if solver in handles}
    figure.legend(known.values(), known.keys(), loc="lower center", ncols=2 + len(columns) // 2, frameon=False)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def _draw(
    panel: Any, rows: Sequence[Mapping[str, Any]], precision: str, quantity: str, by_block: bool
) -> dict[str, Any]:
    """One panel; what was drawn for each solver."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    places = list(dict.fromkeys(row["problem"] if by_block else row["steps"] for row in rows))
    lines: dict[str, Any] = {}
    for place, (solver, (colour, marker, line)) in enumerate(STYLES.items()):
        found = [row for row in rows if (row["solver"], row["precision"]) == (solver, precision)]
        if not found:
            continue
        # blocks are no sequence: marks alone, those of the solvers side by side
        shift = 0.05 * (place - len(STYLES) / 2)
        at = [places.index(row["problem"]) + shift if by_block else row["steps"] for row in found]
        style = {"color": colour, "marker": marker, "linestyle": "" if by_block else line, "markersize": 5}
        if solver == REFERENCE:
            # seen beneath what takes as much
            style |= {"markersize": 9, "linewidth": 4, "alpha": 0.5}
        if "offload" in solver:
            style["markerfacecolor"] = "none"
        (lines[solver],) = panel.plot(at, [row[quantity] for row in found], **style)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    if by_block:
        panel.set_xlim(-0.5, len(places) - 0.5)
        panel.set_xticks(range(len(places)), places)
    else:
        panel.set_xscale("log")
        panel.set_xticks(places, [str(place) for place in places])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("steps")
    panel.grid(alpha=0.3, axis="y")
    return lines
