"""Who is compared: rampde, its peers where they are installed, and what each of them is held against."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import rampde
from bench import adaptive
from bench.compare_problems import Result, Scaler, Workload
from bench.memory_cases import Solver
from bench.problems import PRECISIONS as AUTOCAST
from bench.problems import State
from bench.solvers import TOLERANCES

RAMPDE = "rampde"
GRAPH = "rampde, CUDA graph"
RAMPDE_COMPILED = "rampde, f compiled"
WHOLE = "rampde, whole compiled"
TORCHDIFFEQ = "torchdiffeq"
ADJOINT = "torchdiffeq adjoint"
TORCHDIFFEQ_COMPILED = "torchdiffeq, f compiled"
SCALED = ", GradScaler"
DIFFRAX = "diffrax, jitted"
PER_SAMPLE = "rampde, own steps"
TORCHODE = "torchode, own steps"
FLOOR = "floor"
FLOOR_GRAPH = "floor, CUDA graph"

PEERS = tuple(name + end for name in (TORCHDIFFEQ, ADJOINT, TORCHDIFFEQ_COMPILED) for end in ("", SCALED))
SOLVERS = (RAMPDE, GRAPH, RAMPDE_COMPILED, WHOLE, PER_SAMPLE, *PEERS, TORCHODE, DIFFRAX)
# a solve compiled whole is unrolled: the compiler takes long for more steps, and on a CPU for more workloads
MOST_STEPS_UNROLLED = 8
# modules that a peer needs
MODULES = {TORCHODE: ("torchode", "torchtyping"), DIFFRAX: ("jax", "diffrax")}
# errors allowed between solves that choose their steps for themselves, in units of the tolerance
ADAPTIVE_ALLOWED = 1e3


@dataclass
class Candidate:
    """One way to take a training step.

    Attributes:
        compiled: whether a compiler is needed, which a machine may not have.
        counted: what evaluates f, whose calls are counted; empty where they cannot be.
        continuous: whether the gradients are those of the continuous adjoint.
        sums_low: whether autograd sums the parameters' gradients over the steps, in the precision of f.
        foreign: whether the work is not done by PyTorch, which could count and weigh it.
        holds: whether memory is held from the first call on, and so is looked at there.
    """

    name: str
    step: Callable[[], Result]
    compiled: bool = False
    counted: tuple[nn.Module, ...] = ()
    continuous: bool = False
    sums_low: bool = False
    foreign: bool = False
    holds: bool = False

    @property
    def scaled(self) -> bool:
        return self.name.endswith(SCALED)


def chosen(patterns: Sequence[str]) -> list[str]:
    """The solvers that the patterns name.

    Raises:
        ValueError: a pattern names none.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in SOLVERS):
            raise ValueError(f"{pattern!r} is none of {'; '.join(SOLVERS)}")
    return [name for name in SOLVERS if any(fnmatch(name, pattern) for pattern in patterns)]


def missing(name: str) -> list[str]:
    """Modules that the solver needs and that are not installed."""
    return [module for module in MODULES.get(name, ()) if find_spec(module) is None]


def candidates(workload: Workload, precision: str, names: Sequence[str], quick: bool) -> Iterator[Candidate]:
    """Those of ``names`` that can solve this workload at this precision."""
    for candidate in _adaptive(workload) if workload.family == "adaptive" else _fixed(workload, precision, quick):
        if candidate.name in names:
            yield candidate


def _fixed(workload: Workload, precision: str, quick: bool) -> Iterator[Candidate]:
    """Those that take the steps of the grid."""
    ours: dict[str, Any] = {"method": "rk4"}
    train = partial(workload.step, precision=precision)
    funcs = workload.funcs
    yield Candidate(RAMPDE, partial(train, partial(rampde.odeint, **ours)), counted=funcs)
    if workload.device.type == "cuda":
        solver = partial(rampde.odeint, **ours, cuda_graph=True)
        yield Candidate(GRAPH, partial(train, solver), holds=True)
    # the compiler takes its time: where it is short, only for the workloads that are there for it
    compiles = workload.family == "compiled" or not quick
    # the same compiled f for all
    compiled = {func: torch.compile(func, dynamic=False) for func in funcs}

    def with_compiled(solver: Solver) -> Solver:
        return lambda func, y0, t: solver(compiled[func], y0, t)

    of_compiled = tuple(compiled.values())
    if compiles:
        solver = with_compiled(partial(rampde.odeint, **ours))
        yield Candidate(RAMPDE_COMPILED, partial(train, solver), compiled=True, counted=of_compiled)
    unrolls = workload.family == "compiled" or workload.device.type == "cuda"
    if compiles and unrolls and len(workload.times) - 1 <= MOST_STEPS_UNROLLED:
        yield Candidate(WHOLE, partial(train, compiled_whole(**ours)), compiled=True, sums_low=True)

    backpropagated, adjoint = (partial(o, method="rk4") for o in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint))
    peers = [(TORCHDIFFEQ, backpropagated, funcs)]
    if workload.training:
        peers.append((ADJOINT, adjoint, funcs))
    if compiles:
        peers.append((TORCHDIFFEQ_COMPILED, with_compiled(backpropagated), of_compiled))
    for name, solver, counted in peers:
        of_adjoint = name == ADJOINT
        given = {"compiled": counted is of_compiled, "counted": counted}
        given |= {"continuous": of_adjoint, "sums_low": not of_adjoint}
        yield Candidate(name, partial(train, solver), **given)
        if precision == "fp16" and workload.training:
            scaler = Scaler(workload.device)
            yield Candidate(name + SCALED, partial(train, solver, scaler=scaler), **given)
    if workload.family in ("mlp", "linear") and precision == "fp32" and not missing(DIFFRAX):
        from bench.compare_jax import on_device, training_step

        if on_device(workload.device):
            yield Candidate(DIFFRAX, training_step(workload), compiled=True, foreign=True)


def compiled_whole(**options: Any) -> Solver:
    """rampde's solve as one graph of the compiler, f and all."""

    def solve(func: nn.Module, y0: State, t: Tensor) -> State:
        return rampde.odeint(func, y0, t, **options)

    return torch.compile(solve, fullgraph=True, dynamic=False)


def _adaptive(workload: Workload) -> Iterator[Candidate]:
    """Those that choose their steps, with dopri5 at the same tolerances."""
    for name, solver in adaptive.solvers().items():
        yield Candidate(name, partial(workload.step, solver, "fp32"), counted=workload.funcs)


def baseline(names: Sequence[str]) -> str | None:
    """What the others are measured against: torchdiffeq; with a GradScaler where it is wrong without."""
    return next((name for name in (TORCHDIFFEQ, TORCHDIFFEQ + SCALED) if name in names), None)


class References:
    """What a workload should give: torchdiffeq's in float64, each worked out when it is first needed."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.found: dict[bool, Result] = {}

    def of(self, candidate: Candidate) -> Result:
        """Of the discrete solution, or of the continuous adjoint; exact where steps are chosen."""
        if candidate.continuous not in self.found:
            self.found[candidate.continuous] = self._solved(candidate.continuous)
        return self.found[candidate.continuous]

    def _solved(self, continuous: bool) -> Result:
        workload = self.workload.in_double()
        if workload.family == "adaptive":
            return workload.step(partial(torchdiffeq.odeint, rtol=1e-10, atol=1e-10), "fp32")
        odeint = torchdiffeq.odeint_adjoint if continuous else torchdiffeq.odeint
        # in float64, with a graph of all steps, a large batch does not fit
        parts = [part.step(partial(odeint, method="rk4"), "fp32") for part in workload.parts(8 if _on_gpu(self) else 1)]
        ends = tuple(torch.cat(rows) for rows in zip(*(part.ends for part in parts), strict=True))
        leaves = len(workload.y0)
        gradients = tuple(
            _joined(gradients, torch.cat if index < leaves else _sum)
            for index, gradients in enumerate(zip(*(part.gradients for part in parts), strict=True))
        )
        return Result(ends, gradients)


def _on_gpu(references: References) -> bool:
    return references.workload.device.type == "cuda"


def _joined(parts: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return join(found) if found else None


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def errors(workload: Workload, found: Result, expected: Result) -> dict[str, float]:
    """The largest relative error of a leaf at the end, of a gradient with respect to y(0), and to a parameter;
    infinite where one is missing or not finite."""
    leaves = len(workload.y0)
    groups = {"y(end)": (found.ends, expected.ends)}
    if workload.training:
        groups["dL/dy0"] = found.gradients[:leaves], expected.gradients[:leaves]
        groups["dL/dtheta"] = found.gradients[leaves:], expected.gradients[leaves:]
    return {
        name: max((_error(mine, its) for mine, its in zip(*pair, strict=True)), default=0.0)
        for name, pair in groups.items()
    }


def _error(mine: Tensor | None, its: Tensor | None) -> float:
    # what does not depend on a leaf: no gradient is as good as zeros
    if its is None or mine is None:
        given = mine if its is None else its
        return 0.0 if given is None or not given.any() else math.inf
    its = its.detach()
    off = float((mine.detach().double() - its).norm() / its.norm().clamp_min(1e-30))
    return off if math.isfinite(off) else math.inf


def allowed(
    workload: Workload, precision: str, candidate: Candidate, of_torchdiffeq: dict[str, float], name: str
) -> float:
    """How far the candidate may be off: as its precision allows, or twice as far as torchdiffeq is at that precision,
    for some problems magnify the rounding of f.

    Derivatives that jump are the other ones where rounding takes an activation across: a share u of them, the unit of
    rounding, or at least one. The gradient is off by the root of that share, and may be by twice as much.

    Parameter gradients that autograd sums in 16 bits may be off by the rounding of as many sums as there are
    evaluations: all of them, if there are many, which the figures then show.
    """
    if workload.family == "adaptive":
        return ADAPTIVE_ALLOWED * adaptive.TOLERANCE
    # the factors of a product have as many bits in tf32 as in fp16
    bound = TOLERANCES["fp16" if precision == "tf32" else precision]
    unit = torch.finfo(AUTOCAST["fp16" if precision == "tf32" else precision]).eps / 2
    if name != "y(end)" and workload.kinks:
        bound = max(bound, 2 * math.sqrt(max(unit, 1 / workload.kinks)))
    if name == "dL/dtheta" and candidate.sums_low and precision != "tf32":
        bound = max(bound, workload.evaluations * unit)
    # of torchdiffeq's own error twice would allow anything
    twice = 2 * of_torchdiffeq.get(name, 0.0) if not candidate.name.startswith(TORCHDIFFEQ) else 0.0
    return max(bound, twice if math.isfinite(twice) else 0.0)
