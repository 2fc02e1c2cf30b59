"""Adaptive solves beside torchdiffeq's and torchode's, and beside the evaluations of f alone.

    python -m bench.adaptive [--device cpu|cuda] [--threads N] [--rounds N] [--out DIR] [--quick]

Every candidate solves the same problem with dopri5 at the same tolerances in float32. torchode gives every sample steps
of its own, so it is compared with rampde's ``batch_axis=0`` as well as with its solve of the whole batch; on a batch of
one sample all three take the same steps. Counted, exactly: evaluations of f, accepted and rejected steps. Timed,
interleaved: the solve, the training step, and as many bare evaluations of f, whose time is taken off: what is left is
what the solver costs for each accepted step. torchode is measured where it is installed (``pip install torchode``).
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

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
from bench.problems import Mlp

TOLERANCE = 1e-5
STEP_COST = "us an accepted step beyond f"
OVER_TORCHDIFFEQ = "beyond f, over torchdiffeq's"
BAR = 0.25


class Pendulum(nn.Module):
    """A pendulum: nothing but the cost of the solver."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[..., 1:], -torch.sin(y[..., :1])], dim=-1)


class Swirl(nn.Module):
    """A network that turns points about the origin, so that the solution stays where it is interesting."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = Mlp(2, width, width, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 2 * y.flip(-1) * y.new_tensor([1.0, -1.0]) + self.network(t, y)


@dataclass
class Problem:
    """y' = f(t, y) from y0 to the last time of t."""

    name: str
    func: nn.Module
    y0: Tensor
    t: Tensor


class Counter(nn.Module):
    """Counts evaluations of f."""

    def __init__(self, func: nn.Module) -> None:
        super().__init__()
        self.func, self.calls = func, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.func(t, y)


def problems(device: torch.device, quick: bool) -> list[Problem]:
    """A pendulum and networks, on batches of one sample and of many."""
    torch.manual_seed(0)
    end = 10.0 if quick else 40.0
    t = torch.tensor([0.0, end], device=device)
    batch = 32 if quick else 256
    return [
        Problem("pendulum, 1 sample", Pendulum().to(device), torch.tensor([[1.0, 0.0]], device=device), t),
        Problem("MLP 2-64-64-2, 1 sample", Swirl(64).to(device), torch.randn(1, 2, device=device), t),
        Problem(f"MLP 2-64-64-2, {batch} samples", Swirl(64).to(device), torch.randn(batch, 2, device=device), t),
    ]


def solve_rampde(func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    return rampde.odeint(func, y0, t, rtol=TOLERANCE, atol=TOLERANCE)


def solve_rampde_per_sample(func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    return rampde.odeint(func, y0, t, rtol=TOLERANCE, atol=TOLERANCE, options={"batch_axis": 0})


def solve_torchdiffeq(func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    return torchdiffeq.odeint(func, y0, t, rtol=TOLERANCE, atol=TOLERANCE)


def solve_torchode(func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    import torchode

    term = torchode.ODETerm(func)
    method = torchode.Dopri5(term=term)
    controller = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    solver = torchode.AutoDiffAdjoint(method, controller)
    times = t.expand(len(y0), -1)
    solution = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=times))
    return solution.ys.transpose(0, 1)


Solver = Callable[[nn.Module, Tensor, Tensor], Tensor]


def solvers() -> dict[str, Solver]:
    """What is compared: torchode where it is installed."""
    found: dict[str, Solver] = {
        "rampde": solve_rampde,
        "torchdiffeq": solve_torchdiffeq,
        "rampde, own steps": solve_rampde_per_sample,
    }
    if find_spec("torchode") is not None and find_spec("torchtyping") is not None:
        found["torchode, own steps"] = solve_torchode
    return found


def count(problem: Problem, solver: Solver) -> int:
    """Evaluations of f in one solve."""
    counter = Counter(problem.func)
    with torch.no_grad():
        solver(counter, problem.y0, problem.t)
    return counter.calls


def bare(problem: Problem, calls: int) -> None:
    """As many evaluations of f, and nothing else."""
    time = problem.t[0]
    if len(problem.y0) > 1:
        time = time.expand(len(problem.y0), 1)
    with torch.no_grad():
        for _ in range(calls):
            problem.func(time, problem.y0)


def forward(problem: Problem, solver: Solver) -> None:
    """A solve without gradients."""
    with torch.no_grad():
        solver(problem.func, problem.y0, problem.t)


def train(problem: Problem, solver: Solver) -> None:
    """A solve and its gradients."""
    y0 = problem.y0.clone().requires_grad_()
    solver(problem.func, y0, problem.t)[-1].square().sum().backward()
    problem.func.zero_grad(set_to_none=True)


def accepted_steps(problem: Problem) -> tuple[int, int]:
    """Accepted and rejected steps of rampde's solve of the whole batch."""
    with torch.no_grad(), rampde.stats() as stats:
        solve_rampde(problem.func, problem.y0, problem.t)
    return stats.accepted, stats.rejected


def rows_of(problem: Problem, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """The figures of one problem."""
    chosen = solvers()
    accepted, rejected = accepted_steps(problem)
    calls = {name: count(problem, solver) for name, solver in chosen.items()}
    rows: list[dict[str, Any]] = []

    def add(solver: str, quantity: str, value: float | Quantiles, bar: float | None = None) -> None:
        found = value if isinstance(value, Quantiles) else Quantiles(value, value, value)
        rows.append(
            {
                "problem": problem.name,
                "solver": solver,
                "quantity": quantity,
                "value": found.median,
                "low": found.low,
                "high": found.high,
                "bar": bar,
                "met": None if bar is None else found.median <= bar,
            }
        )

    add("rampde", "accepted steps", accepted)
    add("rampde", "rejected steps", rejected)
    for name, number in calls.items():
        add(name, "f evaluations", number, calls["torchdiffeq"] if name == "rampde" else None)
    candidates: dict[str, Callable[[], object]] = {}
    for name, solver in chosen.items():
        candidates[name] = partial(forward, problem, solver)
        candidates[f"F {name}"] = partial(bare, problem, calls[name])
        candidates[f"train {name}"] = partial(train, problem, solver)
    gc.collect()
    gc.disable()
    try:
        times = interleave(candidates, rounds, device=device)
    finally:
        gc.enable()
    beyond: dict[str, list[float]] = {}
    for name in chosen:
        samples = list(zip(times[name], times[f"F {name}"], strict=True))
        beyond[name] = [1e6 * (mine - floor) / accepted for mine, floor in samples]
        add(name, "ms forward", quantiles([1e3 * sample for sample in times[name]]))
        add(name, "ms training", quantiles([1e3 * sample for sample in times[f"train {name}"]]))
        add(name, STEP_COST, quantiles(beyond[name]))
    ratios = ratio_summary(beyond, "torchdiffeq")
    for name in chosen:
        add(name, OVER_TORCHDIFFEQ, ratios[name], BAR if name == "rampde" else None)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table for each problem."""
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == problem]
        quantities = list(dict.fromkeys(row["quantity"] for row in mine))
        lines = []
        for solver in dict.fromkeys(row["solver"] for row in mine):
            line: dict[str, str] = {"": solver}
            for quantity in quantities:
                found = next((r for r in mine if r["solver"] == solver and r["quantity"] == quantity), None)
                line[quantity] = "" if found is None else f"{found['value']:.3g}"
            lines.append(line)
        print_table(lines, problem)
    barred = [row for row in rows if row["bar"] is not None]
    for row in barred:
        verdict = "pass" if row["met"] else "short"
        print(f"{row['problem']}: {row['quantity']} {row['value']:.3g}, at most {row['bar']:.3g}: {verdict}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, counts, measures, prints and writes; the exit status is 1 when a solver is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.adaptive", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, help="of timing (default: 15, quick 3)")
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    parser.add_argument("--quick", action="store_true", help="short solves of small batches")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    print(machine_line(machine()))
    rows: list[dict[str, Any]] = []
    for problem in problems(device, options.quick):
        with torch.no_grad():
            reference = solve_torchdiffeq(problem.func, problem.y0, problem.t)[-1]
            for name, solver in solvers().items():
                distance = float((solver(problem.func, problem.y0, problem.t)[-1] - reference).norm())
                # global errors of two solves with other steps
                if not distance <= 1e3 * TOLERANCE * float(reference.norm() + 1):
                    print(
                        f"{problem.name}: {name} is {distance:.3g} from torchdiffeq; nothing is timed", file=sys.stderr
                    )
                    return 1
        rows += rows_of(problem, options.rounds or (3 if options.quick else 15), device)
    show(rows)
    write_results(
        results_folder(options.out),
        "adaptive",
        rows,
        {"device": str(device), "threads": options.threads, "tolerance": TOLERANCE},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
