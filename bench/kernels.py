"""Each fused operator against its ATen composition and against the copy bandwidth, measured in one run.

    python -m bench.kernels [--device cpu|cuda] [--sizes 1e3 2**20 ...] [--dtypes float16 ...]
                            [--threads N] [--out DIR] [--quick]

The operators are called as the classical Runge-Kutta method of order 4 calls them, `rk_error` as dopri5 does, on
a float32 state. The bytes of an operator are its floor: each operand that it must read or write, once. The copy
moves as many bytes, half of them read and half written. Nothing is timed before the operator has agreed with the
float64 oracle at that size and dtype in this run.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.cases import Case, cases, verify
from bench.common import (
    Quantiles,
    interleave,
    machine,
    machine_line,
    print_table,
    quantiles,
    ratio_summary,
    results_folder,
    write_results,
)
from rampde import ops
from rampde.__main__ import backend

SIZES = [1000, *(4**power for power in range(6, 15))]  # up to 2**28
QUICK_SIZES = [1000, 2**14, 2**18, 2**22]
# two cores take a second a call beyond this, and nothing changes: --sizes asks for more
CPU_LIMIT = 2**26
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(case: Case, device: torch.device, clock: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Times operator, ATen composition and copy in turns: one row of the results."""
    source = torch.zeros(max(1, case.bytes // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    compiled, oracle = getattr(ops, case.operator), ops.oracle(case.operator)
    candidates = {
        "op": lambda: compiled(*case.arguments),
        "eager": lambda: oracle(*case.arguments),
        "copy": lambda: target.copy_(source),
    }
    times = interleave(candidates, rounds, device=device, clock=clock, max_seconds=seconds)
    over = ratio_summary(times, "op")
    return {
        **{f"{name}_us": quantiles([second * 1e6 for second in times[name]]) for name in candidates},
        "gb_per_s": quantiles([case.bytes / second * 1e-9 for second in times["op"]]),
        "of_copy": over["copy"],
        "over_eager": over["eager"],
    }


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    """Quantiles as three columns, for the files."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Quantiles):
            flat |= {key: value.median, f"{key}_low": value.low, f"{key}_high": value.high}
        else:
            flat[key] = value
    return flat


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table of one operator: medians, and the 20 to 80 % range of the ratios."""
    table = []
    for row in rows:
        table.append(
            {
                "operator": row["operator"],
                "backend": row["backend"],
                "velocity": row["velocity"],
                "elements": f"{row['elements']:,}",
                "clock": row["clock"],
                "op us": f"{row['op_us'].median:.4g}",
                "eager us": f"{row['eager_us'].median:.4g}",
                "GB/s": f"{row['gb_per_s'].median:.4g}",
                "of copy": str(row["of_copy"]),
                "over eager": str(row["over_eager"]),
            }
        )
    print_table(table)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bandwidth over size, one panel for each operator: operator, ATen composition and copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clock = "device" if any(row["clock"] == "device" for row in rows) else "wall"
    names = list(dict.fromkeys(row["operator"] for row in rows))
    columns = 4
    figure, grid = pyplot.subplots(
        math.ceil((len(names) + 1) / columns),
        columns,
        figsize=(15, 7),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels = list(grid.flat)
    colours = dict(zip(DTYPES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for panel, name in zip(panels, names, strict=False):
        for velocity, colour in colours.items():
            mine = [row for row in rows if (row["operator"], row["velocity"], row["clock"]) == (name, velocity, clock)]
            if not mine:
                continue
            elements = [row["elements"] for row in mine]

            def rate(column: str, rows: list[dict[str, Any]] = mine) -> list[float]:
                return [row["bytes"] / row[column].median * 1e-3 for row in rows]

            low, high = [[getattr(row["gb_per_s"], end) for row in mine] for end in ("low", "high")]
            panel.fill_between(elements, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.plot(elements, rate("op_us"), color=colour, marker="o", markersize=3, label=f"{velocity}")
            panel.plot(elements, rate("eager_us"), color=colour, linestyle="--", linewidth=1)
            panel.plot(elements, rate("copy_us"), color="grey", linestyle=":", linewidth=1)
        panel.set(title=f"{name} ({next(r['backend'] for r in rows if r['operator'] == name)})")
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    legend = panels[len(names)]
    legend.plot([], [], color="black", marker="o", markersize=3, label="operator")
    legend.plot([], [], color="black", linestyle="--", linewidth=1, label="ATen composition")
    legend.plot([], [], color="grey", linestyle=":", linewidth=1, label="copy of as many bytes")
    for velocity in dict.fromkeys(row["velocity"] for row in rows):
        legend.plot([], [], color=colours[velocity], linewidth=4, label=f"{velocity} velocities")
    legend.legend(loc="center", frameon=False)
    for panel in panels[len(names) :]:
        panel.axis("off")
    figure.supxlabel("elements of the float32 state, or parameters")
    figure.supylabel(f"GB/s on the floor's bytes ({clock} clock)")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def _number(text: str) -> int:
    """``1000``, ``1e6`` or ``2**20``."""
    base, power, exponent = text.partition("**")
    try:
        number = int(base) ** int(exponent) if power else float(text)
    except ValueError:
        number = 0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number such as 1000, 1e6 or 2**20")
    return int(number)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; sizes and rounds that were not given depend on ``--quick`` and on the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=_number, nargs="+", help="state elements, such as 1000 1e6 2**28")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the velocities")
    parser.add_argument("--operators", nargs="+", choices=ops.SCHEMAS, default=list(ops.SCHEMAS))
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--threads", type=_number, help="of PyTorch on the CPU (default: as PyTorch has it)")
    parser.add_argument("--quick", action="store_true", help="four sizes, few rounds")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch can use no GPU here")
    if options.sizes is None:
        limit = CPU_LIMIT if options.device == "cpu" else SIZES[-1]
        options.sizes = QUICK_SIZES if options.quick else [size for size in SIZES if size <= limit]
        if limit < SIZES[-1] and not options.quick:
            print(f"sizes end at {limit:,} elements on the CPU; --sizes asks for others")
    options.rounds, options.seconds = (7, 0.5) if options.quick else (15, 2.0)
    return options


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, measures, prints and writes; the exit status is 1 when an operator is wrong."""
    options = parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    title = machine_line(machine())
    print(title)
    if device.type == "cpu":
        print("operands that fit into the CPU's caches are found there: above them the memory is measured")
    clocks = ("wall", "device") if device.type == "cuda" else ("wall",)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for n in options.sizes:
        # operands, what ATen allocates between them, and the two sides of the copy
        needed = 160 * n
        if needed > free_bytes(device):
            print(f"left out: {n:,} elements need {needed / 2**30:.0f} GiB, more than is free on {device}")
            continue
        found = []
        for name in options.dtypes:
            for case in cases(n, DTYPES[name], device):
                if case.operator not in options.operators:
                    continue
                try:
                    share = verify(case)
                except RuntimeError as error:
                    print(f"{error} ({name}, {n:,} elements); nothing is timed", file=sys.stderr)
                    return 1
                for clock in clocks:
                    head = {
                        "operator": case.name,
                        "backend": backend(case.operator, device.type),
                        "velocity": name,
                        "elements": n,
                        "bytes": case.bytes,
                        "clock": clock,
                        "error_of_allowed": share,
                    }
                    found.append(head | measure(case, device, clock, options.rounds, options.seconds))
        show(found)
        rows += found
    if not rows:
        print("nothing was measured", file=sys.stderr)
        return 1
    folder = results_folder(options.out)
    write_results(folder, "kernels", [flatten(row) for row in rows], {"device": str(device)})
    plot(rows, folder / "kernels.png", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
