"""How figures look, and what runs are called in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# of precisions, in all figures
COLOURS = {"fp64": "tab:brown", "fp32": "tab:grey", "tf32": "black", "bf16": "tab:orange", "fp16": "tab:blue"}


def in_words(solver: str, precision: str, scaler: str) -> str:
    """A variant as tables and legends name it; a scaler that is "none" goes without saying."""
    return " ".join(word for word in (solver, precision, scaler) if word != "none")


@contextmanager
def picture(path: Path | BinaryIO, panels: int = 1, width: float = 6.6, height: float = 4.2) -> Iterator[list[Any]]:
    """A figure to be drawn on: yields its axes, and writes it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, height), squeeze=False, layout="constrained")
    for panel in axes[0]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    yield list(axes[0])
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
