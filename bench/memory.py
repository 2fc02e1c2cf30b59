"""Peak memory and time of a training step under each checkpoint policy, beside torchdiffeq's and a loop by hand.

    python -m bench.memory [--problems mlp,flow,stl128,stl256,stl512,stl10] [--precision fp32,bf16]
                           [--device cpu|cuda] [--threads N] [--rounds N] [--out DIR] [--quick]

Every candidate solves the same problem with rk4 (the 3/8 rule) in the same N steps, returns the two end states, and
gives the gradients of <random cotangent, y(1)> with respect to y(0) and all parameters. The last problems are the three
ODE blocks of a network for STL-10 images, one at a time and in sequence, in 4 steps each. Measured:

    peak       most bytes that were allocated at once in the solve and its gradient, beyond those before them
    held       bytes allocated between the two, the end states among them
    saved      bytes that autograd was given to save, each storage once, parameters and y(0) left out; what a policy
               holds by itself, as those do that take steps again, is not among them
    predicted  what ``rampde.plan_memory`` said of peak and time before

Evaluations of f and steps taken again are counted. On the CPU, what is offloaded lies in a mapped file, which is no
allocation. Times are taken interleaved. The STL-10 blocks take long on a CPU: there the time is that of the run whose
memory was measured, what is saved is not looked at, and in fp32 torchdiffeq alone is run, for the ratios. Nothing is
timed before the gradients agree with torchdiffeq's in fp32, as far as they must.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

import rampde
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
    synchronize,
    write_results,
)
from bench.counts import Kept, evaluations
from bench.memory_cases import (
    ADJOINT,
    PROBLEMS,
    REFERENCE,
    Case,
    Solver,
    make_case,
    make_solvers,
    solvers_of,
)
from bench.memory_plot import plot
from bench.problems import PRECISIONS
from bench.solvers import TOLERANCES
from rampde.meter import metered
from rampde.plan import MemoryPlan, plan_memory

FLOOR = "one stage alone"
MIB = 2**20
# torchdiffeq's peak in fp32 over rampde's in 16 bits, for the network of STL-10
BARS = {"rampde step": 8.0, "rampde stage": 20.0}


def must_agree(solver: str, precision: str) -> bool:
    """Whether the gradients must be those of the discrete solution: not the ones of the continuous adjoint or of states
    in eight bits, nor in 16 bits those that autograd sums over the steps in 16 bits."""
    if solver in (ADJOINT, "rampde fp8"):
        return False
    return precision == "fp32" or (solver.startswith("rampde") and solver != "rampde tape")


@dataclass
class Run:
    """One training step, measured.

    Attributes:
        forward, backward: evaluations of f.
        again: steps taken again.
        policy: name of the policy that rampde used.
    """

    gradients: tuple[Tensor | None, ...]
    peak: int
    held: int
    saved: int | None
    forward: int
    backward: int
    again: int
    policy: str
    seconds: float


def saved_bytes(case: Case, solver: Solver, precision: str) -> int:
    """What autograd is given to save, in a solve of its own: the hooks would be measured with the rest."""
    kept = Kept([*case.inputs, *case.cotangents])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda box: box.tensor):
        ends = case.forward(solver, precision)
    found = kept.bytes()
    del ends
    return found


def run_once(case: Case, solver: Solver, precision: str) -> Run:
    """A training step under the eyes of the allocator."""
    saved = None if case.brief else saved_bytes(case, solver, precision)
    # no garbage of before may go while memory is measured
    gc.collect()
    with ExitStack() as stack:
        stats = stack.enter_context(rampde.stats())
        calls = [stack.enter_context(evaluations(func)) for func in case.funcs]
        held = metered(lambda: case.forward(solver, precision), case.device).left
        forward = sum(count["f"] for count in calls)
        synchronize(case.device)
        start = time.perf_counter()
        # both roads in one record: it does not show that memory is freed which was taken before it began
        whole = metered(lambda: case.backward(case.forward(solver, precision)), case.device)
        synchronize(case.device)
        seconds = time.perf_counter() - start
        total = sum(count["f"] for count in calls)
    return Run(
        gradients=whole.result,
        peak=whole.peak,
        held=held,
        saved=saved,
        forward=forward,
        backward=total - 2 * forward,
        again=sum(solve.steps_again for solve in stats.solves),
        policy=stats.solves[-1].checkpoint if stats.solves else "",
        seconds=seconds,
    )


def floor(case: Case, precision: str) -> int | None:
    """Of one STL-10 block: bytes of a single evaluation of f and its product, the two end states and their gradient,
    less than which no solver takes."""
    if not case.name.startswith("stl") or case.between:
        return None
    (func,), (y0,), dtype = case.funcs, case.y0, PRECISIONS[precision]
    time = torch.zeros((), device=case.device)

    def one_stage() -> tuple[Tensor, ...]:
        with case.autocast(precision):
            x = y0.detach().to(dtype).requires_grad_()
            k = func(time, x)
            return torch.autograd.grad(k, [x, *func.parameters()], torch.ones_like(k))

    one_stage()
    return metered(one_stage, case.device).peak + 4 * y0.nbytes


def distance(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest relative difference of a gradient; infinite where one is not a number."""
    worst = 0.0
    for mine, its in zip(found, expected, strict=True):
        if mine is None or its is None:
            continue
        relative = ((mine - its).norm() / its.norm().clamp_min(1e-30)).item()
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def planned(case: Case, steps: int, precision: str) -> MemoryPlan | None:
    """What rampde predicts; only for a single solve."""
    if case.between or (case.brief and precision == "fp32"):
        return None
    with case.autocast(precision):
        return plan_memory(
            case.funcs[0], case.state, case.times, method="rk4", options={"step_size": 1 / steps}, show=False
        )


def prediction(plan: MemoryPlan | None, run: Run) -> dict[str, float | None]:
    """The predictions for the policy of a run, where there are any."""
    policy = next((one for one in plan.policies if one.name == run.policy), None) if plan else None
    if policy is None:
        return {"predicted_mib": None, "predicted_over_peak": None, "predicted_ms": None}
    return {
        "predicted_mib": policy.peak / MIB,
        "predicted_over_peak": policy.peak / run.peak,
        "predicted_ms": 1e3 * policy.seconds,
    }


class Disagreement(Exception):
    """A solver whose gradients are wrong."""


def measure(case: Case, steps: int, precisions: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each solver and precision.

    Raises:
        Disagreement: gradients that must agree do not.
    """
    exact = run_once(case, make_solvers(steps)[REFERENCE], "fp32")
    for precision in precisions:
        solvers = solvers_of(case, steps, precision)
        plan = planned(case, steps, precision)
        least = floor(case, precision)
        runs, allowed = {}, TOLERANCES[precision]
        for name, solver in solvers.items():
            if name == REFERENCE and precision == "fp32":
                runs[name] = exact
                continue
            if name == "rampde auto" or case.device.type == "cuda":
                # decides what "auto" is, and allocates what libraries keep for themselves
                case.train(solver, precision)
            runs[name] = run_once(case, solver, precision)
            off = distance(runs[name].gradients, exact.gradients)
            if name == REFERENCE and isfinite(off):
                # some problems magnify the rounding of f, whatever the solver
                allowed = max(allowed, 2 * off)
            if must_agree(name, precision) and not off <= allowed:
                raise Disagreement(
                    f"{case.name}, {precision}, {steps} steps: a gradient of {name} is {off:.3g} from torchdiffeq's"
                )
        times = time_all(case, solvers, precision, runs, rounds)
        ratios = ratio_summary(times, REFERENCE)
        for name, run in runs.items():
            took = quantiles([1e3 * sample for sample in times[name]])
            guess = prediction(plan, run)
            yield {
                "problem": case.name,
                "precision": precision,
                "steps": steps,
                "solver": name,
                "policy": run.policy,
                "peak_mib": run.peak / MIB,
                "held_mib": run.held / MIB,
                "saved_mib": None if run.saved is None else run.saved / MIB,
                "f_forward": run.forward,
                "f_backward": run.backward,
                "steps_again": run.again,
                "gradient_error": distance(run.gradients, exact.gradients),
                **_spread("ms", took),
                **_spread("over_torchdiffeq", ratios[name]),
                "rounds": len(times[name]),
                **guess,
                "predicted_over_ms": None if guess["predicted_ms"] is None else guess["predicted_ms"] / took.median,
                **against_fp32(case, name, precision, run, exact),
                "floor_mib": None if least is None else least / MIB,
            }


def _spread(name: str, found: Quantiles) -> dict[str, float]:
    return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}


def time_all(
    case: Case, solvers: Mapping[str, Solver], precision: str, runs: Mapping[str, Run], rounds: int
) -> dict[str, list[float]]:
    """Seconds of a training step with each solver, interleaved where it can be repeated."""
    if case.brief:
        return {name: [run.seconds] for name, run in runs.items()}
    candidates = {name: partial(case.train, solver, precision) for name, solver in solvers.items()}
    gc.collect()
    gc.disable()
    try:
        # all of them have run before
        return interleave(candidates, rounds, device=case.device, warmup=0)
    finally:
        gc.enable()


def against_fp32(case: Case, solver: str, precision: str, run: Run, exact: Run) -> dict[str, Any]:
    """What torchdiffeq takes in fp32 over what rampde takes in 16 bits, for STL-10, with a bar where there is one."""
    if not (case.name.startswith("stl") and solver.startswith("rampde") and precision != "fp32"):
        return {"fp32_peak_over": None, "fp32_held_over": None, "bar": None, "met": None}
    ratio, bar = exact.peak / run.peak, BARS.get(solver)
    return {
        "fp32_peak_over": ratio,
        "fp32_held_over": exact.held / run.held,
        "bar": bar,
        "met": None if bar is None else ratio >= bar,
    }


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the figures of a case at a precision: peaks for each number of steps, all else for the largest one."""
    steps = sorted({row["steps"] for row in rows})
    lines = []
    for solver in dict.fromkeys(row["solver"] for row in rows):
        mine = {row["steps"]: row for row in rows if row["solver"] == solver}
        last = mine[steps[-1]]
        lines.append(
            {
                "": solver,
                **{f"peak, N = {n}": _number(mine[n]["peak_mib"], ".2f") for n in steps},
                "held": _number(last["held_mib"], ".2f"),
                "saved": _number(last["saved_mib"], ".2f"),
                "predicted/peak": _number(last["predicted_over_peak"], ".3f"),
                "f out, back": f"{last['f_forward']}, {last['f_backward']}",
                "again": last["steps_again"],
                "ms": f"{last['ms']:.3g} ({last['ms_low']:.3g} .. {last['ms_high']:.3g})",
                "/ torchdiffeq": _number(last["over_torchdiffeq"], ".2f"),
                "predicted/ms": _number(last["predicted_over_ms"], ".2f"),
                "gradient off": _number(last["gradient_error"], ".1e"),
                "policy": last["policy"],
            }
        )
    print_table(lines, f"{rows[0]['problem']}, {rows[0]['precision']}: MiB; all else for N = {steps[-1]}")


def show_ratios(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what torchdiffeq takes in fp32 over what rampde takes in 16 bits, and the bars."""
    found = [row for row in rows if row["fp32_peak_over"] is not None]
    cases = list(dict.fromkeys((row["problem"], row["precision"]) for row in found))
    lines = []
    for solver in dict.fromkeys(row["solver"] for row in found):
        line = {"": solver}
        for problem, precision in cases:
            row = next(r for r in found if (r["problem"], r["precision"], r["solver"]) == (problem, precision, solver))
            line[f"{problem} {precision}"] = f"{row['fp32_peak_over']:.2f}, {row['fp32_held_over']:.2f}"
        lines.append(line)
    if lines:
        line = {"": FLOOR}
        for problem, precision in cases:
            row = next(r for r in found if (r["problem"], r["precision"]) == (problem, precision))
            over = row["fp32_peak_over"] * row["peak_mib"] / row["floor_mib"] if row["floor_mib"] else None
            line[f"{problem} {precision}"] = _number(over, ".2f")
        lines.append(line)
        print_table(lines, "torchdiffeq in fp32 over rampde in 16 bits: peak, and bytes held between the roads")
    for row in found:
        if row["bar"] is not None:
            verdict = "pass" if row["met"] else "short"
            print(
                f"{row['problem']}, {row['precision']}: fp32 torchdiffeq's peak over {row['solver']}'s"
                f" {row['fp32_peak_over']:.2f}, at least {row['bar']:g}: {verdict}"
            )


def show_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the worst predictions of each policy."""
    lines = []
    for solver in dict.fromkeys(row["solver"] for row in rows):
        line = {"": solver}
        for quantity in ("predicted_over_peak", "predicted_over_ms"):
            mine = sorted(
                (row for row in rows if row["solver"] == solver and row[quantity] is not None),
                key=lambda row: row[quantity],
            )
            for bound, row in (("least", mine[0]), ("most", mine[-1])) if mine else ():
                where = f"{row['problem']}, {row['precision']}, {row['steps']}"
                line[f"{quantity.replace('_', ' ')}, {bound}"] = f"{row[quantity]:.3f} ({where})"
        if len(line) > 1:
            lines.append(line)
    if lines:
        print_table(lines, "predictions over what was measured")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=names(PROBLEMS), default=list(PROBLEMS), help="such as mlp,stl10")
    parser.add_argument("--precision", type=names(list(PRECISIONS)), help="default: fp32,bf16, on a GPU fp16 also")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, help="of timing (default: 3, quick 1)")
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--quick", action="store_true", help="small batches and images, few steps, one round")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch can use no GPU here")
    options.precision = options.precision or (list(PRECISIONS) if options.device == "cuda" else ["fp32", "bf16"])
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, counts, measures, prints and writes; the exit status is 1 when a solver is wrong."""
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    # what was imported need not be looked through before every run
    gc.freeze()
    # fp32 is to be what it says, in convolutions too
    torch.backends.cudnn.allow_tf32 = False
    title = machine_line(machine())
    print(title)
    rows: list[dict[str, Any]] = []
    for name in options.problems:
        case = make_case(name, device, options.quick)
        print(f"{name}: {case.title}, y {[*case.y0[0].shape]}, {sum(x.numel() for x in case.inputs)} gradients")
        found: list[dict[str, Any]] = []
        try:
            for steps in case.steps:
                found += measure(case, steps, options.precision, options.rounds)
        except Disagreement as error:
            print(f"{error}; nothing is timed", file=sys.stderr)
            return 1
        for precision in options.precision:
            show([row for row in found if row["precision"] == precision])
        rows += found
    show_ratios(rows)
    show_predictions(rows)
    folder = results_folder(options.out)
    write_results(folder, "memory", rows, {"device": str(device), "threads": options.threads})
    plot(rows, folder / "memory.png", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
