"""Writes the tables of the README and of the docs from the measurements in ``bench/results``.

    python -m bench.tables

Each table stands between the lines ``<!-- name -->`` and ``<!-- end -->`` and names its machine and command.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *(ROOT / "docs" / name for name in ("index.md", "compile.md", "benchmarks.md")))
CPU = ROOT / "bench" / "results" / "amd-epyc"

SOLVERS = {
    "forward over F": ("forward / F", ("rampde", "torchdiffeq", "hand-written")),
    "training over FB": ("training / FB", ("rampde none", "torchdiffeq", "hand-written")),
    "training over F + FB": ("training / (F + FB)", ("rampde step", "torchdiffeq adjoint")),
    "us a step beyond f, forward": ("µs a step beyond f", ("rampde", "torchdiffeq", "hand-written")),
}


COMPILED = "rampde, f compiled"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(found: dict[str, Any]) -> str:
    """Which machine and command a table comes from."""
    machine = found["machine"]
    return (
        f"`{found['command']}` on {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']},"
        f" Python {machine['python']}."
    )


def accuracy() -> str:
    """Relative errors of a 16-bit training step as the steps grow."""
    found = json.loads((CPU / "accuracy.json").read_text())
    steps = sorted({row["steps"] for row in found["rows"]})
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in found["rows"]:
        if row["quantity"] != "y(1)":
            key = row["precision"], row["solver"], row["quantity"]
            lines.setdefault(key, []).append(f"{row['relative_error']:.1e}")
    header = ["autocast", "solver", "error of", *(f"N = {n}" for n in steps)]
    return markdown(header, [[*key, *values] for key, values in lines.items()]) + "\n\n" + source(found)


def solvers() -> str:
    """Time beside the floors, in float32 on the CPU."""
    found = json.loads((CPU / "solvers.json").read_text())
    figures = {
        (row["quantity"], row["solver"], row["problem"]): row["value"]
        for row in found["rows"]
        if row["precision"] == "fp32"
    }
    rows = []
    for quantity, (title, names) in SOLVERS.items():
        problems = "e" if quantity.startswith("us") else "abcd"
        for name in names:
            values = [
                f"{figures[quantity, name, problem]:.{0 if problems == 'e' else 2}f}" if problem in problems else ""
                for problem in "abcde"
            ]
            rows.append([title, name, *values])
    return markdown(["", "solver", *"abcde"], rows) + "\n\n" + source(found)


def adaptive() -> str:
    """What an adaptive step costs beside torchdiffeq's and torchode's."""
    found = json.loads((CPU / "adaptive.json").read_text())
    figures = {(row["problem"], row["solver"], row["quantity"]): row["value"] for row in found["rows"]}
    problems = list(dict.fromkeys(row["problem"] for row in found["rows"]))
    names = list(dict.fromkeys(row["solver"] for row in found["rows"]))
    quantities = {"f evaluations": "f evaluations", "us an accepted step beyond f": "µs a step beyond f"}
    rows = [
        [title, name, *(f"{figures[problem, name, quantity]:.0f}" for problem in problems)]
        for quantity, title in quantities.items()
        for name in names
    ]
    return markdown(["", "solver", *problems], rows) + "\n\n" + source(found)


def memory() -> str:
    """Peak memory of a training step as the steps grow, and its time, for the MLP in bfloat16 on the CPU."""
    found = json.loads((CPU / "memory.json").read_text())
    rows = [row for row in found["rows"] if (row["problem"], row["precision"]) == ("mlp", "bf16")]
    steps = sorted({row["steps"] for row in rows})
    lines = []
    for solver in dict.fromkeys(row["solver"] for row in rows):
        mine = {row["steps"]: row for row in rows if row["solver"] == solver}
        peaks = [f"{mine[n]['peak_mib']:.1f}" for n in steps]
        lines.append([solver, *peaks, f"{mine[steps[-1]]['over_torchdiffeq']:.2f}"])
    header = ["", *(f"MiB, N = {n}" for n in steps), "time / torchdiffeq's"]
    return markdown(header, lines) + "\n\n" + source(found)


def compare() -> str:
    """Training steps of the paper's networks: time, memory, reads and operators beside torchdiffeq's."""
    found = json.loads((CPU / "compare.json").read_text())
    rows = [row for row in found["rows"] if row["outcome"] == "measured" and not row["workload"].startswith("compiled")]
    lines = []
    for workload, precision in dict.fromkeys((row["workload"], row["precision"]) for row in rows):
        mine = {row["solver"]: row for row in rows if (row["workload"], row["precision"]) == (workload, precision)}
        ours, theirs = mine["rampde"], mine["torchdiffeq"]
        pairs = [f"{ours[name]:g} : {theirs[name]:g}" for name in ("host_syncs", "launches")]
        peaks = f"{ours['peak_mib']:.1f} : {theirs['peak_mib']:.1f}"
        faster = f"{mine[COMPILED]['over_torchdiffeq']:.2f}" if COMPILED in mine else ""
        lines.append([workload, precision, _ratio(ours, "torchdiffeq"), faster, _ratio(ours, "floor"), *pairs, peaks])
    titles = ("time / torchdiffeq's", "f compiled", "time / floor", "host reads", "operators", "peak MiB")
    header = ["training step", "", *titles]
    return markdown(header, lines) + "\n\nOf two numbers the first is rampde's. " + source(found)


def compiled() -> str:
    """Training steps with a compiled f, and compiled whole, beside torchdiffeq's with the same compiled f."""
    found = json.loads((CPU / "compare.json").read_text())
    rows = [row for row in found["rows"] if row["outcome"] == "measured" and row["workload"].startswith("compiled")]
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figures = {(row["workload"], row["solver"]): _ratio(row, "torchdiffeq_compiled") for row in rows}
    lines = [[solver, *(figures.get((workload, solver), "") for workload in workloads)] for solver in solvers]
    titles = [workload.removeprefix("compiled, ") for workload in workloads]
    return markdown(["time / torchdiffeq's with the same compiled f", *titles], lines) + "\n\n" + source(found)


def _ratio(row: dict[str, Any], of: str) -> str:
    """A median with its 20 and 80 % quantiles."""
    name = f"over_{of}"
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} .. {row[f'{name}_high']:.2f})"


# of benchmarks with bars: what the bar is held against, and what it is called
BARS = {
    "solvers": ("value", "quantity"),
    "adaptive": ("value", "quantity"),
    "compare": ("over_torchdiffeq_compiled", "time over torchdiffeq's with the same compiled f"),
    "memory": ("fp32_peak_over", "torchdiffeq's peak in fp32 over this one's"),
}


def bars() -> str:
    """How many bars there are, and those that were missed."""
    lines = []
    for name, (value, title) in BARS.items():
        rows = [row for row in json.loads((CPU / f"{name}.json").read_text())["rows"] if row.get("bar") is not None]
        missed = [row for row in rows if not row["met"]]
        lines.append([f"bench.{name}", f"{len(rows) - len(missed)} of {len(rows)} met", "", ""])
        for row in missed:
            of = " ".join(str(row[key]) for key in ("problem", "workload", "precision", "solver") if key in row)
            lines.append(["", f"{of}: {row.get(title, title)}", f"{row[value]:.2f}", f"{row['bar']:g}"])
    return markdown(["", "", "reached", "bar"], lines)


TABLES = {
    "bars": bars,
    "accuracy": accuracy,
    "solvers": solvers,
    "adaptive": adaptive,
    "memory": memory,
    "compare": compare,
    "compiled": compiled,
}


def written(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """``text`` with every table anew."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Writes every page anew."""
    argparse.ArgumentParser(
        prog="python -m bench.tables", description="Writes the tables of README and docs."
    ).parse_args()
    for page in PAGES:
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
