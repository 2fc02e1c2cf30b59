"""Roundoff against the size of the steps: state, adjoint and parameter gradients, with and without compensation.

    python -m experiments.roundoff [--finest 16] [--finest-network 12] [--quick] [--device cpu] [--out DIR]

Two problems on [0, 1], from steps of h = 2^-3 down: a rotation with decay (2 by 2), to h = 2^-16, and an MLP 2-16-2
(tanh) on 4 samples, to h = 2^-12; ``--finest 20`` goes on to a million steps, which takes minutes for each row. The
method is rk4, the loss a linear functional of y(1). Exact is the same discretisation in float64: of the rotation in
closed form, by a power of its stability polynomial; of the MLP by torchdiffeq.

What the theory says of a scheme with the velocity in a precision of unit roundoff u_L and sums in u_H: errors are
O(u_L) + O(u_H/h). With 16-bit velocities the first term is all that shows, as long as u_H/h is below it: errors do not
grow with the number of steps. The second is the roundoff of the state's sum over 1/h steps. In fp32, where u_L is as
small as u_H, it shows from a few steps on, and at 2^-20 fp32 is no better than fp16. ``compensated=True`` removes it
from the state: the error stays at u_L, at any h. The sums of the adjoint and of the parameter gradients are plain ones
in fp32, so that their second term stays.
Checkpoints in 8 bits leave the state as it is; gradients see the rounding of the states from which a step is repeated.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.common import machine, machine_line, print_table, synchronize
from experiments.run import Options, Precision, Run, program, solve
from experiments.study import Row, Study, StudyOptions
from experiments.style import COLOURS, picture

COARSEST = 3
QUANTITIES = ("state", "adjoint", "gradient")
TITLES = {"state": "state y(1)", "adjoint": "adjoint dL/dy(0)", "gradient": "parameter gradient dL/dθ"}
# unit roundoff of the velocity, and of the sums
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
OF_SUMS = 2.0**-24


class Rotation(nn.Module):
    """``f(t, y) = y Aᵀ``, y of shape (..., 2): a rotation by 2 radians in a unit of time that loses a tenth."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The velocity, of y's shape."""
        return nn.functional.linear(y, self.A)


class Network(nn.Module):
    """``f(t, y) = W₂ tanh(W₁ y + b₁) + b₂``, y of shape (..., 2), 16 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The velocity, of y's shape."""
        velocity: Tensor = self.layers(y)
        return velocity


@dataclass(frozen=True)
class Found:
    """State at t = 1 and gradients with respect to the initial state and the parameters; float64 on the CPU, flat."""

    state: Tensor
    adjoint: Tensor
    gradient: Tensor

    def errors(self, exact: "Found") -> dict[str, float]:
        """``|found - exact| / |exact|`` of each quantity, in the Euclidean norm."""
        pairs = {name: (getattr(self, name), getattr(exact, name)) for name in QUANTITIES}
        return {f"{name} error": ((mine - its).norm() / its.norm()).item() for name, (mine, its) in pairs.items()}


@dataclass(frozen=True)
class Problem:
    """A velocity, the initial state (batch, 2) and the cotangent c of the loss <c, y(1)>, float32."""

    name: str
    func: nn.Module
    y0: Tensor
    cotangent: Tensor

    def found(self, y0: Tensor, state: Tensor, parameters: Sequence[Tensor]) -> Found:
        """The figures of a solve that ended in ``state``, after the sweep back."""
        gradients = torch.autograd.grad((self.cotangent.to(state) * state).sum(), (y0, *parameters))
        flat = [tensor.detach().double().flatten().cpu() for tensor in (state, *gradients)]
        return Found(flat[0], flat[1], torch.cat(flat[2:]))


def problems(seed: int) -> list[Problem]:
    """The rotation and the network, with initial states and losses drawn from ``seed``."""
    torch.manual_seed(seed)
    made = []
    for name, func, batch in (("rotation", Rotation(), 1), ("network", Network(), 4)):
        made.append(Problem(name, func, torch.randn(batch, 2), torch.randn(batch, 2)))
    return made


def numeric(problem: Problem, options: Options, steps: int, compensated: bool = False) -> tuple[Found, float, float]:
    """Solves by ``steps`` equal steps and sweeps back; also the seconds of both."""
    precision = Precision(options)
    device, dtype = precision.device, precision.state_dtype
    func = type(problem.func)().to(device, dtype)
    func.load_state_dict(problem.func.state_dict())
    y0 = problem.y0.to(device, dtype, copy=True).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    more = {"compensated": True} if compensated else {}
    synchronize(device)
    start = time.perf_counter()
    y = solve(precision, func, y0, t, options={"step_size": 1 / steps}, **more)
    synchronize(device)
    middle = time.perf_counter()
    found = problem.found(y0, y[-1], list(func.parameters()))
    return found, middle - start, time.perf_counter() - middle


def exact(problem: Problem, steps: int) -> Found:
    """The same discretisation in float64: the rotation's in closed form, else by torchdiffeq."""
    if not isinstance(problem.func, Rotation):
        return numeric(problem, Options("fp64", "torchdiffeq", "none"), steps)[0]
    y0 = problem.y0.double().requires_grad_()
    A = problem.func.A.detach().double().requires_grad_()
    # every method of four stages and fourth order makes the same step of a linear ODE
    hA, one = A / steps, torch.eye(2, dtype=torch.float64)
    step = one + hA @ (one + hA / 2 @ (one + hA / 3 @ (one + hA / 4)))
    return problem.found(y0, y0 @ torch.linalg.matrix_power(step, steps).T, [A])


@dataclass(frozen=True)
class Variant:
    """A curve of the figures."""

    options: Options
    compensated: bool = False

    @property
    def name(self) -> str:
        """For tables and figures."""
        checkpoint = ", fp8 checkpoints" if self.options.checkpoint == "fp8" else ""
        compensated = ", compensated" if self.compensated else ""
        return f"{self.options.solver} {self.options.precision}{checkpoint}{compensated}"


def variants(study: StudyOptions) -> list[Variant]:
    """The curves that the study takes: torchdiffeq's, and rampde's with plain and with compensated sums."""
    kinds = [
        ("fp32", "none", "step"),
        ("bf16", "none", "step"),
        ("fp16", "dynamic", "step"),
        ("fp16", "dynamic", "fp8"),
    ]
    common: dict[str, Any] = {"device": study.device, "threads": study.threads}
    found = [Variant(Options(precision, "torchdiffeq", "none", **common)) for precision in ROUNDOFF]
    found += [
        Variant(Options(precision, "rampde", scaler, checkpoint, **common), compensated)
        for precision, scaler, checkpoint in kinds
        for compensated in (False, True)
    ]
    return [variant for variant in found if study.takes(variant.options)]


@dataclass(frozen=True)
class RoundoffOptions(StudyOptions):
    """Options of the study.

    Attributes:
        finest, finest_network: exponents of the smallest steps, 2^-finest, of the two problems.
        finest_torchdiffeq: likewise for torchdiffeq, which keeps every step's graph, some 10 KiB.
    """

    finest: int = 16
    finest_network: int = 12
    finest_torchdiffeq: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("finest", "finest_network", "finest_torchdiffeq"):
            if not COARSEST <= getattr(self, name) <= 24:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {COARSEST} to 24")

    def exponents(self, problem: Problem, solver: str) -> list[int]:
        """Steps 2^-exponent that are taken: all to 12, then every second."""
        finest = self.finest if problem.name == "rotation" else self.finest_network
        finest = min(finest, self.finest_torchdiffeq) if solver == "torchdiffeq" else finest
        return [n for n in range(COARSEST, finest + 1) if n <= 12 or n % 2 == 0]


def measure(problem: Problem, variant: Variant, steps: int, oracle: Callable[[], Found]) -> Row:
    """Errors and seconds of a solve and its sweep."""
    found, forward, backward = numeric(problem, variant.options, steps, variant.compensated)
    return {**found.errors(oracle()), "seconds forward": forward, "seconds backward": backward}


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Errors of the three quantities against h, with the theory's lines."""
    with picture(path, panels=3, width=4.4, height=5.2) as panels:
        for quantity, panel in zip(QUANTITIES, panels, strict=True):
            for name in dict.fromkeys(row["variant"] for row in rows):
                of_variant = [row for row in rows if row["variant"] == name]
                at = [1 / row["steps"] for row in of_variant]
                errors = [row[f"{quantity} error"] for row in of_variant]
                panel.loglog(at, errors, label=name, linewidth=1.2, **_style(of_variant[0]))
            h = [1 / row["steps"] for row in rows]
            for precision, roundoff in ROUNDOFF.items():
                label = rf"$u_L$ of {precision}, $2^{{{round(math.log2(roundoff))}}}$"
                panel.axhline(roundoff, color=COLOURS[precision], linewidth=5, alpha=0.25, label=label)
            ends = [max(h), min(h)]
            panel.loglog(ends, [OF_SUMS / end for end in ends], "k-.", linewidth=1, label=r"$u_H/h$, sums in fp32")
            panel.set_xlim(max(h) * 1.3, min(h) / 1.3)
            panel.set_xscale("log", base=2)
            panel.set_xlabel("step size h")
            panel.set_title(f"relative error of the {TITLES[quantity]}", fontsize=10)
        figure = panels[0].figure
        figure.suptitle(title, fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def _style(row: Row) -> dict[str, Any]:
    fp8 = row["checkpoint"] == "fp8"
    style: dict[str, Any] = {"color": "tab:green" if fp8 else COLOURS[row["precision"]]}
    if row["solver"] == "torchdiffeq":
        return style | {"linestyle": ":", "marker": "x", "markersize": 6}
    if row["compensated"]:
        return style | {"linestyle": "-", "marker": "." if not fp8 else "+", "markersize": 6}
    # hollow and large: what coincides with another curve is seen around it
    return style | {
        "linestyle": "--",
        "marker": "s" if fp8 else "o",
        "markersize": 9 if fp8 else 7,
        "markerfacecolor": "none",
    }


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Each variant's error of the rotation's state at the finest steps that it took."""
    of_state = [row for row in rows if row["problem"] == "rotation"]
    return {f"state error, {row['variant']}, h = 2^-{row['exponent']}": row["state error"] for row in _finest(of_state)}


def _finest(rows: Sequence[Row]) -> list[Row]:
    return list({row["variant"]: row for row in sorted(rows, key=lambda row: row["exponent"])}.values())


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, draws and writes."""
    parser = RoundoffOptions.parser("roundoff", __doc__.partition("\n")[0])
    parser.add_argument("--finest", type=int, help="smallest steps of the rotation: 2^-16, or what is given here")
    parser.add_argument("--finest-network", type=int, help="smallest steps of the network: 2^-12")
    parser.add_argument("--finest-torchdiffeq", type=int, help="smallest steps of torchdiffeq: 2^-14")
    quick = "--quick" in (sys.argv[1:] if arguments is None else arguments)
    parser.set_defaults(
        finest=9 if quick else RoundoffOptions.finest,
        finest_network=6 if quick else RoundoffOptions.finest_network,
        finest_torchdiffeq=9 if quick else RoundoffOptions.finest_torchdiffeq,
    )
    options = RoundoffOptions.read(parser, arguments, variants)
    options.prepare()
    print(machine_line(machine()))
    with Run(options, "roundoff", f"{options.run_name}-2^-{options.finest}") as run:
        study = Study(run.folder / "study.csv", options.fresh)
        for problem in problems(options.seed):
            take(study, problem, options)
            rows = [row for row in study.rows if row["problem"] == problem.name]
            columns = [f"{quantity} error" for quantity in QUANTITIES]
            table = [
                {"": row["variant"], "h": f"2^-{row['exponent']}", **{name: f"{row[name]:.1e}" for name in columns}}
                for row in _finest(rows)
            ]
            print_table(table, f"{problem.name}: relative errors at the finest steps")
            draw(run.folder / f"{problem.name}.png", rows, f"{problem.name}, rk4 on [0, 1]: errors against float64")
        run.finish(**summarise(study.rows))
    return 0 if run.done else 1


def take(study: Study, problem: Problem, options: RoundoffOptions) -> None:
    """All rows of a problem, coarse steps first."""
    plan = [(variant, options.exponents(problem, variant.options.solver)) for variant in variants(options)]
    exponents = sorted({exponent for _, taken in plan for exponent in taken})
    total = sum(2**exponent for _, taken in plan for exponent in taken)
    progress = tqdm(desc=problem.name, total=total, unit=" steps", mininterval=1)
    for exponent in exponents:
        oracle = cache(partial(exact, problem, 2**exponent))
        for variant in (variant for variant, taken in plan if exponent in taken):
            key = {"problem": problem.name, "variant": variant.name, "exponent": exponent, "steps": 2**exponent}
            chosen = variant.options
            key |= {name: getattr(chosen, name) for name in ("solver", "precision", "scaler", "checkpoint")}
            key |= {"compensated": variant.compensated}
            study.row(key, partial(measure, problem, variant, 2**exponent, oracle))
            progress.update(2**exponent)
    progress.close()


if __name__ == "__main__":
    sys.exit(main())
