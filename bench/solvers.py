"""Solves and training steps beside torchdiffeq's, and beside the evaluations of f alone.

    python -m bench.solvers [--problems a,b,c,d,e] [--precision fp32,bf16] [--device cpu|cuda]
                            [--threads N] [--rounds N] [--out DIR] [--quick]

Every candidate solves the same problem with the same method, rk4 (the 3/8 rule), on the same grid of N steps,
returns all states, and trains on the same loss, <random cotangent, y(1)>. The floors are what no solver can
go below:

    F       4 N calls of f without a graph: a solve
    FB      4 N calls of f with its graph, and a vector-Jacobian product of each: a training step
    F + FB  a training step that evaluates f again instead of keeping its graphs

Under autocast they run in one context, so that weights are cast once, on an input that is rounded already.
Times are taken interleaved; ratios are formed within a round. The counts (operators, reads by the host,
evaluations of f, bytes kept for the backward pass) are exact and do not depend on the machine: a count for a
step is the difference of two solves of different length. Nothing is timed before the results agree.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import (
    Quantiles,
    interleave,
    machine,
    machine_line,
    names,
    print_table,
    quantiles,
    ratio_summary,
    results_folder,
    write_results,
)
from bench.counts import COUNTS, count_solvers
from bench.problems import PRECISIONS, SOLVERS, STAGES, Work, make_problem

# how far rampde may be from torchdiffeq in fp32, relative to the norm: its accuracy is tested elsewhere
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}

FORWARD = "forward over F"
TRAINING = "training over FB"
RECOMPUTING = "training over F + FB"
BEYOND_F = "us a step beyond f, forward"
BEYOND_TORCHDIFFEQ = "beyond f, over torchdiffeq's"
BEYOND_HAND_WRITTEN = "beyond f, over the hand-written's"

# which floor a training step is held against: those that evaluate f again have more to do
FLOORS = {
    "rampde none": TRAINING,
    "rampde step": RECOMPUTING,
    "torchdiffeq": TRAINING,
    "torchdiffeq adjoint": RECOMPUTING,
    "hand-written": TRAINING,
}


def row(work: Work, solver: str, quantity: str, value: float | Quantiles) -> dict[str, Any]:
    """One figure: its solver, its bar where there is one, and whether it is met."""
    found = value if isinstance(value, Quantiles) else Quantiles(value, value, value)
    limit = bar(work, solver, quantity)
    return {
        "problem": work.problem.letter,
        "precision": work.precision,
        "solver": solver,
        "quantity": quantity,
        "value": found.median,
        "low": found.low,
        "high": found.high,
        "bar": limit,
        "met": None if limit is None else found.median <= limit,
    }


def bar(work: Work, solver: str, quantity: str) -> float | None:
    """The most that rampde allows itself; times only on one CPU thread in fp32, counts everywhere."""
    if not solver.startswith("rampde"):
        return None
    leaves = len(work.problem.y0)
    policy = solver.removeprefix("rampde").strip()
    # cotangents of each stage and an update, for each leaf; one accumulation; and the stages again
    sweep = (STAGES + 1) * leaves + 1
    again = policy == "step"
    limits = (
        STAGES * leaves,
        sweep + (STAGES - 1) * leaves * again,
        2 * STAGES,
        2 * STAGES,
        0,
        0,
        STAGES,
        STAGES * again,
    )
    counts = dict(zip(COUNTS, limits, strict=False))
    if quantity in counts:
        return counts[quantity]
    if quantity == "kept, fp32 states" and again:
        elements = sum(leaf.numel() for leaf in work.problem.y0)
        # the rounded state, and the float32 times of the stages
        return (1.0 if work.precision == "fp32" else 0.5) + STAGES / elements
    if work.precision != "fp32" or work.device.type != "cpu" or torch.get_num_threads() != 1:
        return None
    if work.problem.letter == "e":
        # 25 us where torchdiffeq took 80 and the hand-written loop 32: as ratios, whatever the machine
        return {BEYOND_TORCHDIFFEQ: 25 / 80, BEYOND_HAND_WRITTEN: 25 / 32}.get(quantity)
    return {FORWARD: 1.05, TRAINING: 1.05, RECOMPUTING: 1.03}.get(quantity)


def time_rows(work: Work, rounds: int) -> Iterator[dict[str, Any]]:
    """Times of the floors, and of each solver over its floors."""
    candidates: dict[str, Callable[[], object]] = {"F": work.floor_forward, "FB": work.floor_backward}
    forwards = {"rampde": "rampde step", "torchdiffeq": "torchdiffeq", "hand-written": "hand-written"}
    candidates |= {f"forward {name}": partial(work.solve, solver) for name, solver in forwards.items()}
    candidates |= {f"training {name}": partial(work.train, name) for name in SOLVERS}
    gc.collect()
    gc.disable()
    try:
        times = interleave(candidates, rounds, device=work.device)
    finally:
        gc.enable()
    times["F + FB"] = [f + fb for f, fb in zip(times["F"], times["FB"], strict=True)]
    ratios = {floor: ratio_summary(times, floor) for floor in ("F", "FB", "F + FB")}
    for name, samples in times.items():
        yield row(work, name, "ms", quantiles([1e3 * sample for sample in samples]))
    beyond: dict[str, list[float]] = {}
    for name in forwards:
        yield row(work, name, FORWARD, ratios["F"][f"forward {name}"])
        samples = zip(times[f"forward {name}"], times["F"], strict=True)
        beyond[name] = [1e6 * (mine - floor) / work.problem.steps for mine, floor in samples]
        yield row(work, name, BEYOND_F, quantiles(beyond[name]))
    if work.problem.letter == "e":
        yield row(work, "rampde", BEYOND_TORCHDIFFEQ, ratio_summary(beyond, "torchdiffeq")["rampde"])
        yield row(work, "rampde", BEYOND_HAND_WRITTEN, ratio_summary(beyond, "hand-written")["rampde"])
    for name, floor in FLOORS.items():
        yield row(work, name, floor, ratios[floor.removeprefix("training over ")][f"training {name}"])


def memory_rows(work: Work) -> Iterator[dict[str, Any]]:
    """Peak memory of a training step above what was there before; the GPU's allocator knows it."""
    if work.device.type != "cuda":
        return
    for name in SOLVERS:
        gc.collect()
        before = torch.cuda.memory_allocated(work.device)
        torch.cuda.reset_peak_memory_stats(work.device)
        work.train(name)
        peak = torch.cuda.max_memory_allocated(work.device) - before
        yield row(work, name, "peak MiB", peak / 2**20)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the figures of one precision: times, a table for each ratio, and the counts."""
    found = {(row["problem"], row["solver"], row["quantity"]): row for row in rows}
    letters = list(dict.fromkeys(row["problem"] for row in rows))

    def table(quantity: str, title: str, places: int, spread: bool) -> None:
        solvers = list(dict.fromkeys(row["solver"] for row in rows if row["quantity"] == quantity))
        lines = []
        for solver in solvers:
            line = {quantity: solver}
            for letter in letters:
                figure = found.get((letter, solver, quantity))
                line[letter] = f"{figure['value']:.{places}f}" if figure else ""
                if figure and spread:
                    line[letter] += f" ({figure['low']:.{places}f} .. {figure['high']:.{places}f})"
            lines.append(line)
        if lines:
            print_table(lines, title)

    table("ms", "medians", 2, spread=False)
    for quantity in (FORWARD, TRAINING, RECOMPUTING):
        table(quantity, "medians of the ratios of a round, with the 20 % and 80 % quantiles", 2, spread=True)
    table(BEYOND_F, "what a solver adds to the evaluations of f", 1, spread=True)
    table("peak MiB", "peak memory of a training step", 1, spread=False)
    lines = [
        {"problem": letter, "solver": solver} | {name: f"{found[letter, solver, name]['value']:.4g}" for name in COUNTS}
        for letter in letters
        for solver in SOLVERS
    ]
    print_table(lines, "exact counts of a training step, for each step of the solve")


def show_bars(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the bars beside what was measured; of the counts, which are many, only those not met."""
    barred = [row for row in rows if row["bar"] is not None]
    lines = [
        {
            "problem": row["problem"],
            "precision": row["precision"],
            "solver": row["solver"],
            "quantity": row["quantity"],
            "measured": f"{row['value']:.4g}",
            "at most": f"{row['bar']:.4g}",
            "": "pass" if row["met"] else "short",
        }
        for row in barred
        if row["quantity"] not in COUNTS or not row["met"]
    ]
    if lines:
        print_table(lines, "bars")
    for kind, mine in (
        ("counts", [row["met"] for row in barred if row["quantity"] in COUNTS]),
        ("times", [row["met"] for row in barred if row["quantity"] not in COUNTS]),
    ):
        print(f"{sum(mine)} of {len(mine)} bars of {kind} are met")


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Ratios to the floors over the problems, a row for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    colours = {
        "rampde": "tab:red",
        "rampde none": "tab:red",
        "rampde step": "tab:red",
        "torchdiffeq": "tab:blue",
        "torchdiffeq adjoint": "tab:cyan",
        "hand-written": "tab:grey",
    }
    quantities = (FORWARD, TRAINING, RECOMPUTING)
    figure, grid = pyplot.subplots(
        len(precisions), len(quantities), figsize=(13, 1 + 3.4 * len(precisions)), squeeze=False
    )
    for precision, panels in zip(precisions, grid, strict=True):
        for quantity, panel in zip(quantities, panels, strict=True):
            mine = [row for row in rows if (row["precision"], row["quantity"]) == (precision, quantity)]
            letters = list(dict.fromkeys(row["problem"] for row in mine))
            solvers = list(dict.fromkeys(row["solver"] for row in mine))
            for place, solver in enumerate(solvers):
                found = [row for row in mine if row["solver"] == solver]
                middle = [row["value"] for row in found]
                spread = [
                    [row["value"] - row["low"] for row in found],
                    [row["high"] - row["value"] for row in found],
                ]
                at = [letters.index(row["problem"]) + 0.18 * (place - (len(solvers) - 1) / 2) for row in found]
                panel.errorbar(at, middle, spread, fmt="o", color=colours[solver], capsize=2, label=solver)
            panel.axhline(1, color="black", linewidth=0.8)
            limits = [row["bar"] for row in mine if row["bar"] is not None]
            if limits:
                panel.axhline(limits[0], color="tab:red", linewidth=0.8, linestyle="--")
            panel.set(title=f"{quantity}, {precision}", yscale="log", xticks=range(len(letters)))
            panel.set_xticklabels(letters)
            ticks = [1, 1.1, 1.25, 1.5, 2, 3, 4]
            panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.3, axis="y")
            panel.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}\n1 is the floor, the dashed line rampde's bar; ends: 20 % and 80 % quantiles", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.solvers", description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=names("abcde"), default=list("abcde"), help="such as a,e")
    parser.add_argument("--precision", type=names(list(PRECISIONS)), default=["fp32", "bf16"], help="such as fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, help="of timing (default: 15, quick 3)")
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch can use no GPU here")
    options.rounds = options.rounds or (3 if options.quick else 15)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, counts, measures, prints and writes; the exit status is 1 when a solver is wrong."""
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    title = machine_line(machine())
    print(title)
    rows: list[dict[str, Any]] = []
    for precision in options.precision:
        found: list[dict[str, Any]] = []
        for letter in options.problems:
            problem = make_problem(letter, device, options.quick)
            work = Work(problem, precision)
            print(f"{letter}: {problem.title}, y {[*problem.y0[0].shape]}, {problem.steps} steps, {precision}")
            distance, where = work.disagreement()
            if not distance <= TOLERANCES[precision]:
                print(f"{where} is {distance:.3g} from torchdiffeq's; nothing is timed", file=sys.stderr)
                return 1
            found += (row(work, *count) for count in count_solvers(work))
            found += time_rows(work, options.rounds)
            found += memory_rows(work)
        show(found)
        rows += found
    show_bars(rows)
    folder = results_folder(options.out)
    write_results(folder, "solvers", rows, {"device": str(device), "threads": options.threads})
    plot(rows, folder / "solvers.png", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
