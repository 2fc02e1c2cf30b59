"""All runs in one page: tables and figures of the experiments, beside what has been published.

    python -m experiments.report [--runs experiments/results] [--bench bench/results] [--out DIR]

Writes ``report.html``, which needs no other file, and ``report.md`` with the same tables.
"""

from __future__ import annotations

import argparse
import base64
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from experiments import published
from experiments.claims import claims
from experiments.report_figures import bench_records, curve_column, draw_accuracy, draw_memory, draw_training
from experiments.report_runs import Group, Recorded, collect, groups, machines, number, spread
from experiments.run import program
from experiments.study import Row

ROOT = Path(__file__).resolve().parent
TITLE = "Mixed-precision neural ODEs: the experiments"
LEAD = (
    "Training neural ODEs with 16-bit velocities and 32-bit sums. Every figure was measured by the command that stands "
    "beside it, on the machine named there; figures of others are marked as theirs."
)
TEXTS = {
    "cnf": (
        "Continuous normalizing flow in the plane",
        "A flow learns three densities by maximum likelihood. NLL is that of held-out points, in nats. "
        "fp16 is run without scaling, too. The gradient error is that of the trained network, whose gradient is a "
        "small sum of large terms.",
    ),
    "cnf_gradients": (
        "The flow's gradient before training",
        "The same network and batch in every precision: relative error of the gradient against float64. The loss is a "
        "mean, so a sample's cotangent falls with the batch, in fp16 below what it can hold; and what sums "
        "gradients in 16 bits loses more with every step. Curves that coincide lie upon each other.",
    ),
    "otflow": (
        "OT-Flow on tables",
        "A potential flow with an analytic Laplacian, trained for likelihood, transport cost and the "
        "Hamilton-Jacobi-Bellman equation.",
    ),
    "stl10": (
        "Classification of images",
        "Blocks of a convolutional neural ODE: three on STL-10, as published; two on the digits of scikit-learn, whose "
        "8 by 8 pixels make other choices necessary (fewer channels, a norm with a larger epsilon, a clipped gradient, "
        "more decay).",
    ),
    "adjoint_scaling": (
        "Why the adjoint is scaled",
        "A damped scalar ODE whose adjoint lies far below what float16 can hold. Errors are "
        "relative, against the same discretisation in float64. A constant scale has to be in a narrow window; the "
        "dynamic one finds its own in every step.",
    ),
    "roundoff": (
        "Roundoff against the size of the steps",
        "Theory: errors are O(u_L) + O(u_H/h), u_L the unit roundoff of the velocity, u_H that of the sums. With "
        "16-bit velocities the first term is what shows, and it does not grow with the number of steps. The second "
        "shows in fp32, the more the smaller h is; compensated sums remove it from the state, not from "
        "adjoint and gradients, which are summed plainly. Curves that coincide lie upon each other.",
    ),
}
# of the pictures that the runs draw
CAPTIONS = {
    "density": "Data, learned density and samples",
    "range": "State, velocity and adjoint of the damped ODE, and the numbers that float16 has",
    "errors": "Errors of state and adjoint over time; what is not finite is drawn at 10",
    "gradients": "Error of the untrained flow's gradient against the batch and against the steps",
    "constants": "Error of the worst gradient against the constant that the loss is multiplied by",
    "rotation": "Errors against h: a rotation with decay",
    "network": "Errors against h: a small network",
}
# variants whose pictures are not folded away
SHOWN = (("torchdiffeq", "fp32", "none"), ("rampde", "bf16", "none"), ("rampde", "fp16", "dynamic"))
CLAIMS = "What is claimed, and what was reached"
BENCHMARKS = "Errors and memory against the number of steps"


@dataclass(frozen=True)
class Figure:
    """A picture with its caption; ``data`` is PNG in base 64."""

    title: str
    commands: list[str]
    data: str
    wide: bool = False


@dataclass(frozen=True)
class TableRow:
    """Cells as they are shown, and what there is to say: failures with their reasons."""

    cells: list[str]
    remarks: list[str] = field(default_factory=list)
    failed: bool = False


@dataclass
class Table:
    """A table; the first ``names`` columns say what a row is, ``words`` that all of it is text."""

    title: str
    columns: list[str]
    rows: list[TableRow]
    names: int = 1
    note: str = ""
    synthetic: bool = False
    words: bool = False
    machines: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    more: list[Figure] = field(default_factory=list)


@dataclass
class Section:
    """A part of the page."""

    anchor: str
    title: str
    text: list[str]
    tables: list[Table]


def figure(title: str, commands: Sequence[str], png: bytes) -> Figure:
    """A figure of the page; one of more than 1,200 pixels in width gets all of it."""
    # the header of a PNG has the width here
    width = int.from_bytes(png[16:20], "big")
    return Figure(title, list(commands), base64.b64encode(png).decode(), wide=width > 1200)


def training_table(group: Group) -> Table:
    """Figures of trained runs, mean and spread over seeds, with their training curves and pictures."""
    checkpoints = any(line.variant[3] not in ("auto", "") for line in group.lines)
    columns = ["solver", "precision", "scaler", *(["checkpoint"] if checkpoints else [])]
    rows = []
    for line in group.lines:
        cells = list(line.variant[: 4 if checkpoints else 3])
        cells += [spread(line.values(column), column) for column in group.columns]
        failed = not line.done and any(run.status == "failed" for run in line.runs)
        rows.append(TableRow([*cells, str(len(line.done))], line.remarks, failed))
    commands = _distinct(run.command for run in group.runs)
    table = Table(
        title=group.subject,
        columns=[*columns, *group.columns, "seeds"],
        rows=rows,
        names=len(columns),
        note=group.described,
        synthetic=group.synthetic,
        machines=machines(group.runs),
        commands=commands,
    )
    if column := curve_column(group.runs):
        title = f"Training on {group.subject}: {column}, a line for each seed"
        table.figures.append(figure(title, commands, draw_training(group, column)))
    for line in group.lines:
        first = min(line.runs, key=lambda run: run.config.get("seed", 0))
        pictures = [_picture(first, path) for path in first.pictures()]
        (table.figures if line.variant[:3] in SHOWN else table.more).extend(pictures)
    return table


def _picture(run: Recorded, path: Path) -> Figure:
    title = CAPTIONS.get(path.stem, path.stem.replace("_", " "))
    return figure(f"{title} ({run.record.get('name', '')})", [run.command], path.read_bytes())


def study_table(run: Recorded) -> Table:
    """The rows of a study; of one over step sizes those with the finest steps."""
    rows = run.study()
    note = ""
    if any("exponent" in row for row in rows):
        finest: dict[Any, Row] = {}
        for row in sorted(rows, key=lambda row: row["exponent"]):
            finest[row["problem"], row["variant"]] = row
        rows = sorted(finest.values(), key=lambda row: -["network", "rotation"].index(row["problem"]))
        rows = [
            {"problem": row["problem"], "variant": row["variant"], "h": f"2^-{row['exponent']}", **row} for row in rows
        ]
        note = "At the finest steps that were taken; all others are in the figures and in study.csv."
    names = [name for name in ("problem", "variant", "case", "h") if rows and name in rows[0]]
    figures = [name for name in (rows[0] if rows else {}) if any(isinstance(row[name], float) for row in rows)]
    return Table(
        title=f"Study {run.record.get('name', '')}{'' if run.status == 'done' else ': ' + run.status}",
        columns=[*names, *figures],
        rows=[
            TableRow(
                [str(row[name]) for name in names] + [_study_cell(row.get(name), name) for name in figures],
                failed=not all(_is_finite(row.get(name)) for name in figures),
            )
            for row in rows
        ],
        names=len(names),
        note=run.failure or note,
        synthetic=run.synthetic,
        machines=machines([run]),
        commands=[run.command],
        figures=[_picture(run, path) for path in run.pictures(list(CAPTIONS))],
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _study_cell(value: Any, column: str) -> str:
    if value is None:
        return "–"
    plain = column.startswith("seconds") or column == "constant"
    return number(float(value), column if plain else "error")


def published_table(experiment: str, found: Sequence[Group], studies: Sequence[Recorded]) -> Table | None:
    """What others have published on an experiment, and ours beside it; None where nothing is."""
    entries = [entry for entry in published.FIGURES if entry.experiment == experiment]
    if not entries:
        return None
    return Table(
        title="Published, measured on other hardware",
        columns=["quantity", "theirs", "ours", "source of theirs"],
        rows=[TableRow([entry.quantity, entry.value, ours(entry, found, studies), entry.source]) for entry in entries],
        note=f"Theirs: {published.HARDWARE}; their memory is all that was allocated. Ours: the machines and settings "
        "of the tables above; our memory is what an iteration allocates beyond parameters, optimizer and data.",
        words=True,
    )


def ours(entry: published.Published, found: Sequence[Group], studies: Sequence[Recorded]) -> str:
    """The counterpart of a published figure: a number for each table, or how the runs failed; a dash without runs."""
    said = [number(run.summary[entry.column], "error") for run in studies if entry.column in run.summary]
    for group in (group for group in found if entry.subject in ("", group.subject)):
        lines = [line for variant in entry.variants for line in group.line(*variant)]
        values = [statistics.fmean(line.values(entry.column)) for line in lines if line.values(entry.column)]
        if entry.over is not None:
            below = [value for line in group.line(*entry.over) for value in line.values(entry.column)]
            values = [value / statistics.fmean(below) for value in values] if below else []
        ends = _distinct(number(value, entry.column if entry.over is None else "") for value in sorted(values))
        text = " to ".join(_distinct([*ends[:1], *ends[-1:]]))
        if not text and any(run.status == "failed" for line in lines for run in line.runs):
            text = "failed"
        if text:
            unit = " MiB" if entry.column == "peak MiB" and entry.over is None else ""
            kind = [group.subject, *(["quick"] if group.quick else []), *(["synthetic"] if group.synthetic else [])]
            said.append(f"{text}{unit} ({', '.join(kind)})")
    return "; ".join(said) or "–"


def claims_table(runs: Sequence[Recorded]) -> Table:
    """The claims with their bars, and what the runs say of them."""
    return Table(
        title="",
        columns=["claim", "bar", "reached", ""],
        rows=[
            TableRow([claim.text, claim.bar, claim.reached or "–", claim.verdict], failed=claim.verdict == "missed")
            for claim in claims(runs)
        ],
        words=True,
    )


def benchmark_section(folder: Path) -> Section | None:
    """Gradient errors and memory against steps, from the benchmarks' files; None where there are none."""
    figures = []
    for name, draw, title in (
        ("accuracy", draw_accuracy, "Relative errors of an MLP's training gradients against float64"),
        ("memory", draw_memory, "Peak memory of a training step"),
    ):
        for record in bench_records(folder, name):
            machine = Recorded(folder, record).machine
            figures.append(figure(f"{title}; {machine}", [record.get("command", "")], draw(record)))
    if not figures:
        return None
    table = Table("Figures", [], [], figures=figures)
    return Section("benchmarks", BENCHMARKS, ["From the files that the benchmarks wrote."], [table])


def sections(runs: Sequence[Recorded], bench: Path) -> list[Section]:
    """The parts of the page: the claims, an experiment each, those that are known first, then the benchmarks'."""
    names = dict.fromkeys([*TEXTS, *sorted(run.experiment for run in runs)])
    judged = Section("claims", CLAIMS, [], [claims_table(runs)])
    benchmarks = benchmark_section(bench)
    return [judged, *(section(name, runs) for name in names), *([benchmarks] if benchmarks else [])]


def section(name: str, runs: Sequence[Recorded]) -> Section:
    """The part of an experiment: a table for each kind of its runs, and what others have published."""
    title, text = TEXTS.get(name, (name, ""))
    of_name = [run for run in runs if run.experiment == name]
    found, studies = groups(of_name), [run for run in of_name if run.is_study]
    tables = [training_table(group) for group in found] + [study_table(run) for run in studies]
    theirs = published_table(name, found, studies)
    tables += [theirs] if theirs else []
    said = [text] if of_name else [text, "No runs yet."]
    return Section(name.replace("_", "-"), title, [paragraph for paragraph in said if paragraph], tables)


def html(parts: Sequence[Section], runs: Sequence[Recorded], command: str) -> str:
    """The page."""
    loader = jinja2.FileSystemLoader(ROOT)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    count = {status: sum(run.status == status for run in runs) for status in ("done", "failed", "running")}
    return environment.get_template("report.html.j2").render(
        title=TITLE,
        lead=LEAD,
        sections=parts,
        counts=f"{len(runs)} runs: {count['done']} done, {count['failed']} failed, {count['running']} not finished. "
        "Tables show the mean and standard deviation over seeds. Seconds are medians of the iterations and seeds; peak "
        "MiB is what an iteration allocates beyond what was there before it: not parameters, optimizer and data.",
        command=command,
        date=datetime.now(timezone.utc).strftime("%d %B %Y"),
    )


def markdown(parts: Sequence[Section], command: str) -> str:
    """The tables, for reading in a repository."""
    lines = [f"# {TITLE}", "", LEAD, "", f"Written by `{command}`."]
    for part in parts:
        lines += ["", f"## {part.title}"]
        lines += [line for paragraph in part.text for line in ("", paragraph)]
        lines += ["", *markdown_tables(part, "###")] if any(table.columns for table in part.tables) else []
    return "\n".join(lines) + "\n"


def markdown_tables(part: Section, level: str) -> list[str]:
    """The lines of a part's tables, each under a heading of that level, with machine and command."""
    blocks = []
    for table in (table for table in part.tables if table.columns):
        title = f"{level} {table.title}{' (synthetic data)' if table.synthetic else ''}" if table.title else ""
        commands = [f"`{line}`" for line in table.commands if line]
        blocks += [block for block in (title, table.note, markdown_table(table), *table.machines, *commands) if block]
    return "\n\n".join(blocks).splitlines()


def markdown_table(table: Table) -> str:
    """A table, its remarks in a last column where there are any."""
    remarked = any(row.remarks for row in table.rows)
    sides = ["---" if n < table.names or table.words else "---:" for n in range(len(table.columns))]
    rows = [[*table.columns, "remarks"], [*sides, "---"]]
    rows += [[*row.cells, "; ".join(row.remarks)] for row in table.rows]
    return "\n".join(_markdown_row(row if remarked else row[:-1]) for row in rows)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _distinct(texts: Any) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Reads, draws and writes."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "results", help="folder of the runs")
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "bench" / "results", help="of the benchmarks")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder of the runs)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs
    command = shlex.join(["python", "-m", "experiments.report", *(sys.argv[1:] if arguments is None else arguments)])
    runs = collect(options.runs)
    parts = sections(runs, options.bench)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.html", html(parts, runs, command)), ("report.md", markdown(parts, command))):
        (out / name).write_text(text)
        print(f"wrote {out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
