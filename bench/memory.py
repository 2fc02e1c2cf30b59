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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite, log2
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rampde
from bench.common import (
    Quantiles,
    interleave,
    machine,
    machine_line,
    print_table,
    quantiles,
    ratio_summary,
    results_folder,
    synchronize,
    write_results,
)
from bench.counts import _evaluations, _Kept
from bench.problems import PRECISIONS, Mlp, State, as_leaves, make_problem
from bench.solvers import TOLERANCES
from rampde.checkpoint import Binomial, Checkpoint, Fp8, Offload
from rampde.meter import metered
from rampde.plan import MemoryPlan, plan_memory

PROBLEMS = ("mlp", "flow", "stl128", "stl256", "stl512", "stl10")
REFERENCE = "torchdiffeq"
ADJOINT = "torchdiffeq adjoint"
FLOOR = "one stage alone"
HAND_WRITTEN = "checkpoint by hand"
MIB = 2**20
# torchdiffeq's peak in fp32 over rampde's in 16 bits, for the network of STL-10
BARS = {"rampde step": 8.0, "rampde stage": 20.0}
# with as few steps as the blocks of STL-10 take these are other names for "step", "none" and "none"
OTHER_NAMES = ("rampde 4", "rampde tape", "rampde auto")

Solver = Callable[[nn.Module, State, Tensor], State]


class Block(nn.Module):
    """f = -A^T(norm(ReLU(A y))), A a convolution whose weights are piecewise constant in t."""

    PIECES = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = (9 * channels) ** -0.5
        self.bank = nn.Parameter(torch.empty(self.PIECES, channels, channels, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(self.PIECES, channels).uniform_(-bound, bound))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # a lookup on the device, for which the host does not wait as it would for t.item()
        piece = (self.PIECES * t).long().clamp(max=self.PIECES - 1).reshape(1)
        weight, bias = self.bank.index_select(0, piece)[0], self.bias.index_select(0, piece)[0]
        z = F.instance_norm(F.relu(F.conv2d(y, weight, bias, padding=1)))
        return -F.conv_transpose2d(z, weight, padding=1)


class Transition(nn.Module):
    """From one block of the network to the next: more channels, fewer pixels."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        # without the bias, which the norm takes away
        convolution = nn.Conv2d(ins, outs, 1, bias=False)
        self.layers = nn.Sequential(convolution, nn.InstanceNorm2d(outs), nn.ReLU(), nn.AvgPool2d(2))

    def forward(self, y: Tensor) -> Tensor:
        return self.layers(y)


@dataclass(frozen=True)
class Case:
    """y' = f(t, y) from t = 0 to 1; of several functions one after another, with a layer between each two.

    Attributes:
        steps: the numbers of steps that are measured.
        brief: whether it takes too long to be repeated, and to be solved in fp32 by all.
    """

    name: str
    title: str
    funcs: tuple[nn.Module, ...]
    between: tuple[nn.Module, ...]
    y0: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    steps: tuple[int, ...]
    brief: bool = False

    @property
    def device(self) -> torch.device:
        return self.y0[0].device

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are taken with respect to."""
        return [*self.y0, *(parameter for part in (*self.funcs, *self.between) for parameter in part.parameters())]

    @property
    def state(self) -> State:
        return self.y0[0] if len(self.y0) == 1 else self.y0

    @property
    def times(self) -> Tensor:
        return torch.tensor([0.0, 1.0], device=self.device)

    def autocast(self, precision: str) -> torch.autocast:
        """The caller's autocast: on for the 16-bit precisions."""
        dtype = PRECISIONS[precision]
        low = dtype != torch.float32
        return torch.autocast(self.device.type, dtype if low else None, enabled=low)

    def forward(self, solver: Solver, precision: str) -> list[Tensor]:
        """y(1), ready for the backward pass."""
        state, times = self.state, self.times
        with self.autocast(precision):
            for index, func in enumerate(self.funcs):
                if index > 0:
                    state = self.between[index - 1](state)
                ends = [states[-1] for states in as_leaves(solver(func, state, times))]
                state = ends[0] if len(ends) == 1 else tuple(ends)
        return ends

    def backward(self, ends: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients with respect to y(0) and the parameters."""
        return torch.autograd.grad(ends, self.inputs, self.cotangents, allow_unused=True)

    def train(self, solver: Solver, precision: str) -> None:
        """A training step without the optimizer."""
        self.backward(self.forward(solver, precision))


def make_case(name: str, device: torch.device, quick: bool) -> Case:
    """The case of that name; of STL-10 with fewer images on the CPU, and small ones where it is to be quick."""
    steps = (2, 4) if quick else (2, 8, 32)
    if name == "flow":
        steps = (2, 4) if quick else (1, 4, 16)
        problem = make_problem("b", device, quick)
        return Case(name, problem.title, (problem.func,), (), problem.y0, problem.cotangents, steps)
    torch.manual_seed(0)
    if name == "mlp":
        batch = 128 if quick else 1024
        return _case(name, "MLP 64-512-64", [Mlp(64, 512, 64)], [], (batch, 64), steps, device)
    on_cpu = device.type == "cpu"
    batch, share = 1 if on_cpu else 16, 4 if quick else 1
    channels = [128, 256, 512] if name == "stl10" else [int(name.removeprefix("stl"))]
    side = 128 * 128 // channels[0] // share
    channels = [number // share for number in channels]
    blocks = [Block(number) for number in channels]
    between = [Transition(ins, 2 * ins) for ins in channels[:-1]]
    title = "three STL-10 blocks" if between else f"STL-10 block of {channels[0]} channels"
    return _case(name, title, blocks, between, (batch, channels[0], side, side), (4,), device, on_cpu and not quick)


def _case(
    name: str,
    title: str,
    funcs: Sequence[nn.Module],
    between: Sequence[nn.Module],
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    device: torch.device,
    brief: bool = False,
) -> Case:
    """A case whose state is a tensor of ``shape``."""
    y0 = torch.randn(shape)
    halvings = len(between)
    end = (shape[0], shape[1] << halvings, *(side >> halvings for side in shape[2:]))
    cotangent = torch.randn(end).to(device)
    parts = [nn.ModuleList(funcs).to(device), nn.ModuleList(between).to(device)]
    return Case(
        name, title, tuple(parts[0]), tuple(parts[1]), (y0.to(device).requires_grad_(),), (cotangent,), steps, brief
    )


def by_hand(func: nn.Module, y0: State, t: Tensor, steps: int) -> State:
    """The method without a library, each step under PyTorch's checkpoint; from 0 to 1."""
    h = 1 / steps
    times = torch.linspace(0, 1, steps + 1, device=t.device)
    y = as_leaves(y0)

    def f(now: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return as_leaves(func(now, leaves[0] if isinstance(y0, Tensor) else tuple(leaves)))

    def step(start: Tensor, end: Tensor, *y: Tensor) -> tuple[Tensor, ...]:
        k1 = f(start, y)
        k2 = f(start + h / 3, [a + h / 3 * b for a, b in zip(y, k1, strict=True)])
        k3 = f(start + h * 2 / 3, [a + h * (c - b / 3) for a, b, c in zip(y, k1, k2, strict=True)])
        k4 = f(end, [a + h * (b - c + d) for a, b, c, d in zip(y, k1, k2, k3, strict=True)])
        return tuple(a + h / 8 * (b + 3 * (c + d) + e) for a, b, c, d, e in zip(y, k1, k2, k3, k4, strict=True))

    for n in range(steps):
        y = checkpoint(step, times[n], times[n + 1], *y, use_reentrant=False)
    ends = tuple(leaf[None] for leaf in y)
    return ends[0] if isinstance(y0, Tensor) else ends


def policies(steps: int) -> dict[str, Checkpoint | str | int]:
    """What ``checkpoint=`` is given, by its name in the tables."""
    few = ceil(log2(steps)) + 1
    return {
        "none": "none",
        "tape": "tape",
        "stage": "stage",
        "step": "step",
        "lean": "lean",
        "4": 4,
        "log2 N + 1": few,
        "log2 N + 1, lean": Binomial(few, "lean"),
        "offload none": Offload("none"),
        "offload step": Offload("step"),
        "fp8": Fp8(),
        "auto": "auto",
    }


def make_solvers(steps: int) -> dict[str, Solver]:
    """What is compared, in that many steps."""
    options: dict[str, Any] = {"method": "rk4", "options": {"step_size": 1 / steps}}
    found: dict[str, Solver] = {
        REFERENCE: partial(torchdiffeq.odeint, **options),
        ADJOINT: partial(torchdiffeq.odeint_adjoint, **options),
        HAND_WRITTEN: partial(by_hand, steps=steps),
    }
    for name, policy in policies(steps).items():
        found[f"rampde {name}"] = partial(rampde.odeint, **options, checkpoint=policy)
    return found


def solvers_of(case: Case, steps: int, precision: str) -> dict[str, Solver]:
    """What is compared in this case at this precision."""
    found = make_solvers(steps)
    if case.brief and precision == "fp32":
        return {REFERENCE: found[REFERENCE]}
    left_out = OTHER_NAMES if case.name.startswith("stl") else ()
    return {name: solver for name, solver in found.items() if name not in left_out}


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
    kept = _Kept([*case.inputs, *case.cotangents])
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
        calls = [stack.enter_context(_evaluations(func)) for func in case.funcs]
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""

    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            found = text.split(",")
            for name in found:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return found

        return split

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
