"""The runs of a folder, put together into tables: a row for each solver, precision and scaler, over its seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import machine_line
from experiments.files import Refused
from experiments.options import PRECISIONS, SCALERS
from experiments.study import Row, read_rows
from experiments.style import in_words

# of a run's options those that tell the rows of a table from each other
VARIANT = ("solver", "precision", "scaler", "checkpoint")
# of others those of which a table's heading does not speak
UNSPOKEN = ("device", "quick", "threads", "seed", "only", *VARIANT)
# percent of the cores from which on a machine is called busy
BUSY = 20
COSTS = ("seconds forward", "seconds backward", "peak MiB")


@dataclass(frozen=True)
class Recorded:
    """One run, as its folder tells it.

    Attributes:
        folder: where it lies.
        record: its ``run.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def experiment(self) -> str:
        """Name of the module."""
        return str(self.record.get("experiment", self.folder.parent.name))

    @property
    def config(self) -> Mapping[str, Any]:
        """Its options."""
        found: Mapping[str, Any] = self.record.get("config") or {}
        return found

    @property
    def is_study(self) -> bool:
        """Whether it compares precisions by itself."""
        return bool(self.record.get("study")) or (self.folder / "study.csv").exists()

    @property
    def variant(self) -> tuple[str, ...]:
        """Solver, precision, scaler and checkpoint."""
        return tuple(str(self.config.get(name, "")) for name in VARIANT)

    @property
    def seed(self) -> int:
        """Of parameters, data and batches."""
        return int(self.config.get("seed", 0))

    @property
    def subject(self) -> str:
        """What is learned: the run's name up to the solver's."""
        return str(self.record.get("name", self.folder.name)).partition(f"-{self.variant[0]}-")[0]

    @property
    def hardware(self) -> str:
        """The GPU, else the processor."""
        machine = self.record.get("machine") or {}
        on_gpu = str(self.config.get("device", "cpu")).startswith("cuda")
        return str((machine.get("gpu") if on_gpu else None) or machine.get("cpu") or "unknown machine")

    @property
    def machine(self) -> str:
        """Hardware, versions and commit, in a line."""
        return self._line(self.record.get("machine"))

    @property
    def earlier(self) -> list[str]:
        """Likewise, of what was computed before it went on elsewhere or with other sources."""
        return [self._line(found) for found in self.record.get("earlier") or []]

    def _line(self, machine: Any) -> str:
        on_gpu = str(self.config.get("device", "cpu")).startswith("cuda")
        try:
            shown = {"cpu_used_by_others_percent": 0} | ({} if on_gpu else {"gpu": None})
            return machine_line({**machine, **shown})
        except (KeyError, TypeError):
            return self.hardware

    @property
    def used_by_others(self) -> float:
        """Percent of the cores that others used when it was started."""
        found = self.record.get("machine") or {}
        return float(found.get("cpu_used_by_others_percent") or 0)

    @property
    def command(self) -> str:
        """What it was started with."""
        return str(self.record.get("command") or "")

    @property
    def status(self) -> str:
        """ "done", "failed" or "running", which is also what a run is that was killed."""
        return str(self.record.get("status", "running"))

    @property
    def failure(self) -> str:
        """Why it failed; empty where it did not."""
        return str(self.record.get("failure") or "") if self.status == "failed" else ""

    @property
    def synthetic(self) -> bool:
        """Whether its data were generated in place of the published ones."""
        return bool(self.record.get("synthetic"))

    @property
    def summary(self) -> dict[str, float]:
        """Its figures, as far as they are numbers."""
        found = self.record.get("summary") or {}
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}

    def log(self) -> list[Row]:
        """The rows of its log, none where there is no log."""
        path = self.folder / "log.csv"
        return read_rows(path) if path.exists() else []

    def study(self) -> list[Row]:
        """The rows of its study, none where it was cut off before the first."""
        path = self.folder / "study.csv"
        return read_rows(path) if path.exists() else []

    def pictures(self, order: Sequence[str] = ()) -> list[Path]:
        """Its figures, those named in ``order`` first; without the training curve, which is drawn for all together."""
        found = (path for path in self.folder.glob("*.png") if path.stem != "curve")
        return sorted(found, key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem))


def busy(runs: Sequence[Recorded]) -> bool:
    """Whether others used so much of a machine that times say little of a solver."""
    return any(run.used_by_others >= BUSY for run in runs)


def machines(runs: Sequence[Recorded]) -> list[str]:
    """Where runs were made, a line for each machine and commit, and how busy it was."""
    lines = list(dict.fromkeys(line for run in runs for line in (*run.earlier, run.machine)))
    if busy(runs):
        most = max(run.used_by_others for run in runs)
        lines.append(
            f"Times are left out, as others used up to {most:.0f} % of the cores; python -m bench.compare measures "
            "such networks in turns."
        )
    return lines


def collect(folder: Path) -> list[Recorded]:
    """All runs below a folder.

    Raises:
        Refused: a ``run.json`` cannot be read; the message says which.
    """
    found = []
    for path in sorted(folder.rglob("run.json")):
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise Refused(f"{path} is not JSON ({error}): remove its folder, or run it again with --fresh") from error
        found.append(Recorded(path.parent, record))
    return found


@dataclass
class Line:
    """A row of a table: the runs of one variant, which differ in their seeds."""

    variant: tuple[str, ...]
    runs: list[Recorded] = field(default_factory=list)

    @property
    def done(self) -> list[Recorded]:
        """Those that came to an end."""
        return [run for run in self.runs if run.status == "done"]

    @property
    def failed(self) -> list[Recorded]:
        """Those that failed."""
        return [run for run in self.runs if run.status == "failed"]

    @property
    def name(self) -> str:
        """Solver, precision and scaler in words."""
        solver, precision, scaler, _ = self.variant
        return in_words(solver, precision, scaler)

    def values(self, column: str, seeds: Collection[int] | None = None) -> list[float]:
        """A column's values over the seeds, or those of ``seeds``, as far as they are there."""
        runs = [run for run in self.done if seeds is None or run.seed in seeds]
        return [run.summary[column] for run in runs if column in run.summary]

    @property
    def remarks(self) -> list[str]:
        """Failures with their reasons, and what has not ended."""
        found = []
        for reason in dict.fromkeys(run.failure for run in self.failed):
            count = sum(run.failure == reason for run in self.failed)
            found.append(f"{_of(count, len(self.runs))}failed: {reason or 'no reason recorded'}")
        if unfinished := sum(run.status == "running" for run in self.runs):
            found.append(f"{_of(unfinished, len(self.runs))}not finished")
        return found


def _of(count: int, total: int) -> str:
    return f"{count} of {total} seeds " if total > 1 else ""


@dataclass
class Group:
    """The runs of an experiment that belong into one table: they differ in solver, precision, scaler and seed alone.

    Attributes:
        experiment: name of the module.
        subject: what is learned.
        setting: options that all have in common, but for those of which nothing need be said.
        lines: a row for each variant.
    """

    experiment: str
    subject: str
    hardware: str
    synthetic: bool
    setting: dict[str, Any]
    lines: list[Line] = field(default_factory=list)

    @property
    def runs(self) -> list[Recorded]:
        """All of them."""
        return [run for line in self.lines for run in line.runs]

    @property
    def columns(self) -> list[str]:
        """Names of the figures that any run has, costs last; without times where the machine was busy."""
        names = dict.fromkeys(name for run in self.runs for name in run.summary)
        if busy(self.runs):
            names = dict.fromkeys(name for name in names if not name.startswith("seconds"))
        return [name for name in names if name not in COSTS] + [name for name in COSTS if name in names]

    @property
    def quick(self) -> bool:
        """Whether the runs were short ones that only show that everything runs."""
        return bool(self.setting.get("quick"))

    @property
    def described(self) -> str:
        """The setting in words."""
        said = {name: value for name, value in self.setting.items() if value is not False and value not in ("", None)}
        return ", ".join(name if value is True else f"{name} {value}" for name, value in said.items())

    def line_of(self, variant: tuple[str, str, str]) -> Line | None:
        """The row of a variant with the usual checkpoints, if there is one."""
        return next((line for line in self.lines if line.variant == (*variant, "auto")), None)

    def line(self, solver: str, precision: str, scaler: str) -> list[Line]:
        """The rows of such variants; an empty name is any."""
        wanted = (solver, precision, scaler)
        return [
            line
            for line in self.lines
            if all(not name or name == its for name, its in zip(wanted, line.variant, strict=False))
        ]


def groups(runs: Sequence[Recorded]) -> list[Group]:
    """Tables of the runs that are no studies, in the order of the experiments' names.

    Raises:
        Refused: a run is there twice.
    """
    found: dict[str, Group] = {}
    for run in (run for run in runs if not run.is_study):
        setting = {name: value for name, value in run.config.items() if name not in UNSPOKEN}
        if run.config.get("quick"):
            setting["quick"] = True
        key = json.dumps([run.experiment, run.subject, run.hardware, run.synthetic, setting], sort_keys=True)
        group = found.setdefault(key, Group(run.experiment, run.subject, run.hardware, run.synthetic, setting))
        line = next((line for line in group.lines if line.variant == run.variant), None)
        if line is None:
            line = Line(run.variant)
            group.lines.append(line)
        twin = next((other for other in line.runs if other.seed == run.seed), None)
        if twin is not None:
            raise Refused(f"{twin.folder} and {run.folder} hold the same run: remove one of them")
        line.runs.append(run)
    for group in found.values():
        group.lines.sort(key=_place)
    return [found[key] for key in sorted(found)]


def _place(line: Line) -> tuple[int, ...]:
    orders = (("torchdiffeq", "rampde"), tuple(PRECISIONS), SCALERS)
    solver, precision, scaler = (
        order.index(name) if name in order else len(order) for order, name in zip(orders, line.variant, strict=False)
    )
    return precision, solver, scaler


def number(value: float, column: str = "") -> str:
    """A figure as a table shows it."""
    if not math.isfinite(value):
        return "not finite"
    if column.startswith("peak"):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if "accuracy" in column:
        return f"{value:.2f}"
    if "error" in column:
        return f"{value:.1e}"
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}" if column.startswith("seconds") or 0 < abs(value) < 1e-2 else f"{value:.4g}"


def spread(values: Sequence[float], column: str = "") -> str:
    """Mean and standard deviation, or the only value; of times the median; a dash where there is none."""
    if not values:
        return "–"
    if column.startswith("seconds"):
        return number(statistics.median(values), column)
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return number(statistics.fmean(values), column)
    deviation = statistics.stdev(values)
    if deviation == 0:
        return number(values[0], column)
    if "error" in column:
        said = number(deviation, column)
    else:
        said = f"{deviation:.2g}" if deviation < 100 else f"{deviation:,.0f}"
    return f"{number(statistics.fmean(values), column)} ± {said}"
