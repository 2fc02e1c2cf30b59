"""Training steps of rampde beside torchdiffeq's, torchode's and diffrax's, on networks as they are used.

    python -m bench.compare [--workloads compiled,mlp,linear,cnf,stl10,otflow,adaptive] [--precision fp32,bf16]
                            [--solvers 'rampde*,torchdiffeq'] [--device cpu|cuda] [--threads N] [--rounds N]
                            [--out DIR] [--quick] [--seconds S] [--resume]

Every candidate takes the same steps with rk4 (the 3/8 rule) and gives the end state and the gradients of
<random cotangent, y(end)> with respect to y(0) and the parameters:

    rampde                 as it is, with ``checkpoint="auto"``; captured in a CUDA graph; with f compiled by
                           ``torch.compile``; with the whole solve compiled, where it has few steps
    torchdiffeq            by backpropagation, by the adjoint method, with the same compiled f; under autocast, in
                           fp16 also with a GradScaler
    diffrax                jitted, in fp32, of networks that are easily written in JAX
    torchode               in the workload "adaptive" alone, where all choose their steps at the same tolerances
    floor                  the evaluations of f alone, each with its graph and a vector-Jacobian product

Before anything is measured the result must be that of torchdiffeq in float64, as exactly as the precision allows: who
is wrong is said to be wrong, and not timed. Times are taken interleaved, ratios are formed within a round. Host
synchronisations, launches (on a GPU those of kernels, on a CPU operators), evaluations of f and peak memory are those
of one training step. Each workload's rows are written as soon as they are there; ``--resume`` goes on behind them.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.common import (
    UNFINISHED,
    machine,
    machine_line,
    names,
    print_table,
    read_json,
    results_folder,
    write_results,
)
from bench.compare_measure import measure
from bench.compare_plot import plot
from bench.compare_problems import FAMILIES, IN_FP32, PRECISIONS, workloads
from bench.compare_solvers import RAMPDE_COMPILED, SOLVERS, WHOLE, References, chosen, missing

# on the CPU in fp32: at most so much of torchdiffeq's training step (or solve) with the same compiled f
BARS = {
    ("compiled, 8 steps", RAMPDE_COMPILED): 0.7,
    ("compiled, 32 steps", RAMPDE_COMPILED): 0.7,
    ("compiled, 8 steps", WHOLE): 0.5,
    ("compiled, 8 steps, solve", WHOLE): 0.5,
}
BARRED = "over_torchdiffeq_compiled"


def with_bar(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The row with its bar, where it has one, and whether that is met."""
    limit = BARS.get((row["workload"], row["solver"])) if device.type == "cpu" and row["precision"] == "fp32" else None
    value = row.get(BARRED)
    return row | {"bar": limit, "met": None if limit is None else value is not None and value <= limit}


def at_fault(row: Mapping[str, Any]) -> bool:
    """Whether rampde is wrong, or failed without a compiler, which a machine may not have."""
    failed = row["outcome"] == "failed" and "compiled" not in row["solver"]
    return row["solver"].startswith("rampde") and (row["outcome"] == "wrong" or failed)


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"


def _spread(row: Mapping[str, Any], name: str, form: str = ".2f") -> str:
    if row.get(name) is None:
        return ""
    return f"{row[name]:{form}} ({row[f'{name}_low']:{form}} .. {row[f'{name}_high']:{form}})"


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table of a workload at a precision, and what was not measured."""
    lines = []
    for row in rows:
        off = [value for name, value in row.items() if name.startswith("error of ") and value is not None]
        lines.append(
            {
                "": row["solver"],
                "ms": _spread(row, "ms", ".3g"),
                "/ torchdiffeq": _spread(row, "over_torchdiffeq"),
                "/ compiled": _number(row.get(BARRED), ".2f"),
                "/ floor": _spread(row, "over_floor"),
                "syncs": _number(row.get("host_syncs"), "d"),
                "launches": _number(row.get("launches"), "d"),
                "f": _number(row.get("f_evaluations"), "d"),
                "peak MiB": _number(row.get("peak_mib"), ".2f"),
                "first s": _number(row.get("first_s"), ".2f"),
                "off by": _number(max(off, default=None), ".1e"),
            }
        )
    print_table(lines, f"{rows[0]['workload']}, {rows[0]['precision']}: {rows[0]['title']}")
    for row in rows:
        if row["outcome"] != "measured":
            where = sys.stderr if at_fault(row) else sys.stdout
            print(f"{row['solver']}: {row['outcome']}, not timed: {row['reason']}", file=where, flush=True)


def show_bars(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the bars beside what was measured."""
    lines = [
        {
            "workload": row["workload"],
            "solver": row["solver"],
            "over torchdiffeq's with compiled f": _spread(row, BARRED) or row["outcome"],
            "at most": f"{row['bar']:g}",
            "": "pass" if row["met"] else "short",
        }
        for row in rows
        if row["bar"] is not None
    ]
    if lines:
        print_table(lines, "bars")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""

    def solvers(text: str) -> list[str]:
        try:
            return chosen(text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=names(FAMILIES), default=list(FAMILIES), help="such as mlp,cnf")
    parser.add_argument("--precision", type=names(PRECISIONS), help="default: fp32,bf16, on a GPU all of them")
    parser.add_argument("--solvers", type=solvers, default=list(SOLVERS), help="patterns, such as 'rampde*'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, help="of timing, at most (default: 15, quick 3)")
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--quick", action="store_true", help="small workloads, few rounds, fp32 alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no workload after that")
    parser.add_argument("--resume", action="store_true", help="keep rows of the same sources and machine")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch can use no GPU here")
    usual = ["fp32"] if options.quick else ["fp32", "bf16"] if options.device == "cpu" else list(PRECISIONS)
    options.precision = options.precision or usual
    if options.device == "cpu" and "tf32" in options.precision:
        parser.error("--precision tf32: a CPU has none, expected fp32, bf16 or fp16")
    options.rounds = options.rounds or (3 if options.quick else 15)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 1 when rampde is wrong, and 3 when workloads were left out."""
    began = time.perf_counter()
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    title = machine_line(machine())
    print(title)
    for name in options.solvers:
        if missing(name):
            print(f"{name}: left out, {' and '.join(missing(name))} not installed")
    folder = results_folder(options.out)
    meta = {key: getattr(options, key) for key in ("device", "threads", "quick", "solvers")}
    before = read_json(folder, "compare") if options.resume else {}
    # of other candidates or sizes nothing can be kept
    rows = list(before["rows"]) if all(before.get(key) == value for key, value in meta.items()) else []
    done = {(row["workload"], row["precision"]) for row in rows}
    if done:
        print(f"{len(done)} workloads and precisions are there already")
    left_out = []
    for family in options.workloads:
        for workload in workloads(family, device, options.quick):
            references = References(workload)
            for precision in ["fp32"] if family in IN_FP32 else options.precision:
                if (workload.name, precision) in done:
                    continue
                if time.perf_counter() - began > options.seconds:
                    left_out.append(f"{workload.name}, {precision}")
                    continue
                found = measure(
                    workload,
                    precision,
                    references,
                    options.solvers,
                    rounds=options.rounds,
                    seconds=1.0 if options.quick else 6.0,
                    quick=options.quick,
                )
                found = [with_bar(row, device) for row in found]
                show(found)
                rows += found
                write_results(folder, "compare", rows, {**meta, "left_out": left_out}, say=False)
    if left_out:
        print(f"left out after {options.seconds:g} s: {'; '.join(left_out)}")
    if not rows:
        return UNFINISHED
    show_bars(rows)
    write_results(folder, "compare", rows, {**meta, "left_out": left_out})
    plot(rows, folder / "compare.png", title)
    if any(at_fault(row) for row in rows):
        return 1
    return UNFINISHED if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
