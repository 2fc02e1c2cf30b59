"""Training curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments.run import Run


def draw_curves(run: Run, columns: Sequence[str], unit: str = "") -> Path:
    """Draws columns of a run's log over the iterations, into ``curve.png`` of its folder.

    Args:
        run: whose log it is.
        columns: their names; those that the log does not have are left out.
        unit: of all of them, for the axis.

    Returns:
        The picture's path.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name in columns:
        iterations, values = run.column(name)
        if values:
            # a line through every iteration is a band of noise: it is drawn thin, the rare ones are drawn on top
            rare = len(values) < 0.5 * max(run.column("iteration")[0])
            axes.plot(iterations, values, label=name, linewidth=2 if rare else 0.6, zorder=3 if rare else 2)
    axes.set(xlabel="iteration", ylabel=unit, title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = run.folder / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
