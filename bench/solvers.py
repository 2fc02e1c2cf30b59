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
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
    write_results,
)

State = Tensor | tuple[Tensor, ...]
STAGES = 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# how far rampde may be from torchdiffeq in fp32, relative to the norm: its accuracy is tested elsewhere
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}

FORWARD = "forward over F"
TRAINING = "training over FB"
RECOMPUTING = "training over F + FB"
BEYOND_F = "us a step beyond f, forward"
BEYOND_TORCHDIFFEQ = "beyond f, over torchdiffeq's"
BEYOND_HAND_WRITTEN = "beyond f, over the hand-written's"

COUNTS = (
    "rampde ops forward",
    "rampde ops backward",
    "ATen beyond f forward",
    "ATen beyond f backward",
    "host reads forward",
    "host reads backward",
    "f forward",
    "f backward",
    "kept, fp32 states",
)


class Mlp(nn.Module):
    """A tanh network of the state."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs in pairwise(widths):
            layers += [nn.Linear(ins, outs), nn.Tanh()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


class Flow(nn.Module):
    """Velocity of points in the plane, and its divergence by differentiating inside f."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.velocity = Mlp(2, width, width, 2)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].requires_grad_()
            velocity = self.velocity(t, x)
            rows = [torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i : i + 1] for i in range(2)]
        return velocity, rows[0] + rows[1]


class Convolutions(nn.Module):
    """Two rounds of normalization, ReLU and convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(16, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


class Linear(nn.Module):
    """y' = A y in the plane: nothing but the cost of the solver."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix


@dataclass(frozen=True)
class Problem:
    """y' = f(t, y) from y0, in ``steps`` steps to t = 1, with the cotangent of y(1)."""

    letter: str
    title: str
    func: nn.Module
    y0: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    steps: int

    def state(self, leaves: Sequence[Tensor]) -> State:
        """What f and the solvers take: a tuple only where there is more than one leaf."""
        return leaves[0] if len(leaves) == 1 else tuple(leaves)

    def times(self, steps: int) -> Tensor:
        """The grid; all states on it are returned."""
        return torch.linspace(0, 1, steps + 1, device=self.y0[0].device)

    def loss(self, solution: State) -> Tensor:
        """<cotangent, y(1)>."""
        ends = [states[-1] for states in as_leaves(solution)]
        products = [(end * c).sum() for end, c in zip(ends, self.cotangents, strict=True)]
        return products[0] if len(products) == 1 else torch.stack(products).sum()


def as_leaves(state: State) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def make_problem(letter: str, device: torch.device, quick: bool) -> Problem:
    """The problem of that letter; on a GPU with states and networks that give it work."""
    large, share = device.type == "cuda", 8 if quick else 1
    torch.manual_seed(0)
    func: nn.Module
    shapes: list[tuple[int, ...]]
    if letter == "a":
        batch = (1 << 16 if large else 256) // share
        title, func, shapes, steps = "MLP 2-64-64-2", Mlp(2, 64, 64, 2), [(batch, 2)], 32
    elif letter == "b":
        batch = (1 << 15 if large else 1024) // share
        title, func, shapes, steps = "flow, exact trace by autograd", Flow(64), [(batch, 2), (batch, 1)], 16
    elif letter == "c":
        batch, width = ((1 << 13) // share, 1024) if large else (1024 // share, 64)
        title, func, shapes, steps = (
            f"MLP {width}-{8 * width}-{width}",
            Mlp(width, 8 * width, width),
            [(batch, width)],
            8,
        )
    elif letter == "d":
        batch, channels, side = (64 // share, 128, 64) if large else (16 // share, 64, 32)
        title, func, shapes, steps = (
            "two convolutions",
            Convolutions(channels),
            [(batch, channels, side, side)],
            4,
        )
    else:
        title, func, shapes, steps = "linear 2x2", Linear(), [(1, 2)], 256
    y0 = [torch.randn(shape) for shape in shapes]
    if letter == "b":
        y0[1].zero_()
    cotangents = tuple(torch.randn(shape).to(device) for shape in shapes)
    # N(0, 1) cotangents of a thousand rows add up: the gradients of all problems have a like size
    leaves = tuple(leaf.to(device).requires_grad_() for leaf in y0)
    return Problem(letter, title, func.to(device), leaves, cotangents, steps)


def hand_written(func: nn.Module, y0: State, t: Tensor) -> State:
    """The method as one would write it without a library."""
    steps = (t[1:] - t[:-1]).tolist()
    y = as_leaves(y0)
    states = [y]

    def f(time: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return as_leaves(func(time, leaves[0] if isinstance(y0, Tensor) else tuple(leaves)))

    for n, h in enumerate(steps):
        start = t[n]
        k1 = f(start, y)
        k2 = f(start + h / 3, [a + h / 3 * b for a, b in zip(y, k1, strict=True)])
        k3 = f(start + h * 2 / 3, [a + h * (c - b / 3) for a, b, c in zip(y, k1, k2, strict=True)])
        k4 = f(t[n + 1], [a + h * (b - c + d) for a, b, c, d in zip(y, k1, k2, k3, strict=True)])
        y = tuple(a + h / 8 * (b + 3 * (c + d) + e) for a, b, c, d, e in zip(y, k1, k2, k3, k4, strict=True))
        states.append(y)
    solution = tuple(torch.stack(leaf) for leaf in zip(*states, strict=True))
    return solution[0] if isinstance(y0, Tensor) else solution


SOLVERS: dict[str, Callable[[nn.Module, State, Tensor], State]] = {
    "rampde none": partial(rampde.odeint, method="rk4", checkpoint="none"),
    "rampde step": partial(rampde.odeint, method="rk4", checkpoint="step"),
    "torchdiffeq": partial(torchdiffeq.odeint, method="rk4"),
    "torchdiffeq adjoint": partial(torchdiffeq.odeint_adjoint, method="rk4"),
    "hand-written": hand_written,
}
# which floor a training step is held against: those that evaluate f again have more to do
FLOORS = {
    "rampde none": TRAINING,
    "rampde step": RECOMPUTING,
    "torchdiffeq": TRAINING,
    "torchdiffeq adjoint": RECOMPUTING,
    "hand-written": TRAINING,
}


class Work:
    """A problem at a precision: the solves, training steps and floors that are timed and counted."""

    def __init__(self, problem: Problem, precision: str) -> None:
        self.problem = problem
        self.precision = precision
        self.dtype = PRECISIONS[precision]
        self.device = problem.y0[0].device
        self.parameters = list(problem.func.parameters())

    def autocast(self) -> torch.autocast:
        """The caller's autocast: on for the 16-bit precisions."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=low)

    @torch.no_grad()
    def solve(self, name: str, steps: int | None = None) -> State:
        """A solve without a graph."""
        problem = self.problem
        times = problem.times(steps or problem.steps)
        with self.autocast():
            return SOLVERS[name](problem.func, problem.state(problem.y0), times)

    def forward(self, name: str, steps: int | None = None) -> Tensor:
        """The loss, ready for the backward pass."""
        problem = self.problem
        times = problem.times(steps or problem.steps)
        with self.autocast():
            return problem.loss(SOLVERS[name](problem.func, problem.state(problem.y0), times))

    def train(self, name: str, steps: int | None = None) -> tuple[Tensor | None, ...]:
        """A training step without the optimizer: gradients with respect to y0 and the parameters."""
        inputs = [*self.problem.y0, *self.parameters]
        return torch.autograd.grad(self.forward(name, steps), inputs, allow_unused=True)

    def rounded(self) -> list[Tensor]:
        """The state as a solver hands it to f."""
        return [leaf.detach().to(self.dtype) for leaf in self.problem.y0]

    @torch.no_grad()
    def floor_forward(self, evaluations: int | None = None) -> None:
        """F."""
        problem, leaves = self.problem, self.rounded()
        time = torch.zeros((), device=self.device)
        with self.autocast():
            for _ in range(evaluations or STAGES * problem.steps):
                problem.func(time, problem.state([leaf.detach() for leaf in leaves]))

    def floor_backward(self, evaluations: int | None = None) -> None:
        """FB."""
        problem, leaves = self.problem, self.rounded()
        time = torch.zeros((), device=self.device)
        cotangents: list[Tensor] = []
        with self.autocast():
            for _ in range(evaluations or STAGES * problem.steps):
                y = [leaf.detach().requires_grad_() for leaf in leaves]
                k = as_leaves(problem.func(time, problem.state(y)))
                cotangents = cotangents or [
                    c.to(velocity.dtype) for c, velocity in zip(problem.cotangents, k, strict=True)
                ]
                torch.autograd.grad(k, [*y, *self.parameters], cotangents, allow_unused=True)

    def disagreement(self) -> tuple[float, str]:
        """The largest relative difference of a solution or gradient from torchdiffeq's in fp32, and where."""
        exact = Work(self.problem, "fp32")
        expected = [*as_leaves(exact.solve("torchdiffeq")), *exact.train("torchdiffeq")]
        worst = 0.0, "nothing"
        # without a library the parameters' gradients are summed in 16 bits, and lost
        others = ["hand-written"] if self.precision == "fp32" else []
        for name in ("rampde none", "rampde step", *others):
            found = [*as_leaves(self.solve(name)), *self.train(name)]
            for index, (mine, its) in enumerate(zip(found, expected, strict=True)):
                if mine is None or its is None:
                    continue
                distance = ((mine - its).norm() / its.norm().clamp_min(1e-30)).item()
                # a difference that is not a number is the worst there is
                if not distance <= worst[0]:
                    worst = distance, f"result {index} of {name}"
        return worst


class _Operators(TorchDispatchMode):
    """Counts what is dispatched: rampde's operators, ATen's, and those that bring a value to the host."""

    READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        self.counts["rampde" if name.startswith("rampde::") else "aten"] += 1
        to_host = name == "aten::_to_copy" and args[0].device.type != "cpu" and result.device.type == "cpu"
        self.counts["reads"] += name in self.READS or to_host
        return result


class _Kept:
    """Bytes that autograd keeps alive, each storage once and those of ``known`` tensors not at all."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: weakref.WeakSet[_Box] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> "_Box":
        box = _Box(tensor.detach())
        self.alive.add(box)
        return box

    def bytes(self) -> int:
        storages = [box.tensor.untyped_storage() for box in self.alive]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self.known}.values())


class _Box:
    """What stands for a saved tensor in the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def _evaluations(func: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of f."""
    counts: Counter[str] = Counter()
    handle = func.register_forward_pre_hook(lambda *_: counts.update(["f"]))
    try:
        yield counts
    finally:
        handle.remove()


def count_training(work: Work, name: str, steps: int) -> Counter[str]:
    """What one training step of ``steps`` steps dispatches, evaluates and keeps."""
    problem = work.problem
    inputs = [*problem.y0, *work.parameters]
    # in a solve of its own, because the hooks dispatch operators themselves
    kept = _Kept([*inputs, *problem.cotangents])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda box: box.tensor):
        loss = work.forward(name, steps)
    found = Counter(bytes=kept.bytes())
    with _evaluations(problem.func) as calls:
        with _Operators() as out:
            loss = work.forward(name, steps)
        evaluated = calls["f"]
        with _Operators() as back:
            torch.autograd.grad(loss, inputs, allow_unused=True)
    found.update({f"{kind} forward": value for kind, value in out.counts.items()})
    found.update({f"{kind} backward": value for kind, value in back.counts.items()})
    found.update({"f forward": evaluated, "f backward": calls["f"] - evaluated})
    return found


def count_f(work: Work) -> tuple[int, int, int]:
    """ATen operators of f: a call without a graph, a call with one, and its vector-Jacobian product."""
    problem = work.problem
    time = torch.zeros((), device=work.device)
    found = 0, 0, 0
    with work.autocast():
        # of two calls the second counts: the first casts the weights
        for _ in range(2):
            y = [leaf.detach() for leaf in work.rounded()]
            with torch.no_grad(), _Operators() as bare:
                problem.func(time, problem.state(y))
            y = [leaf.detach().requires_grad_() for leaf in work.rounded()]
            with _Operators() as forward:
                k = as_leaves(problem.func(time, problem.state(y)))
            cotangents = [torch.ones_like(velocity) for velocity in k]
            with _Operators() as backward:
                torch.autograd.grad(k, [*y, *work.parameters], cotangents, allow_unused=True)
            found = bare.counts["aten"], forward.counts["aten"], backward.counts["aten"]
    return found


def count_rows(work: Work) -> Iterator[dict[str, Any]]:
    """Exact counts a step for each solver."""
    problem, short, long = work.problem, 4, 8
    bare, with_graph, product = count_f(work)
    state_bytes = 4 * sum(leaf.numel() for leaf in problem.y0)
    for name in SOLVERS:
        first, second = count_training(work, name, short), count_training(work, name, long)
        step = {key: (second[key] - first[key]) / (long - short) for key in first | second}
        again = step.get("f backward", 0.0)
        figures = (
            step.get("rampde forward", 0.0),
            step.get("rampde backward", 0.0),
            step["aten forward"] - step["f forward"] * (bare if again else with_graph),
            step["aten backward"] - again * with_graph - STAGES * product,
            step.get("reads forward", 0.0),
            step.get("reads backward", 0.0),
            step["f forward"],
            again,
            step.get("bytes", 0.0) / state_bytes,
        )
        for quantity, value in zip(COUNTS, figures, strict=True):
            yield row(work, name, quantity, value)


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

    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            found = text.split(",")
            for name in found:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return found

        return split

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
            found += count_rows(work)
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
