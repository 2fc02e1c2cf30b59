"""Measures the candidates of a workload at a precision: errors first, then counts, memory and time."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.common import Quantiles, interleave, quantiles, ratio_summary, synchronize
from bench.compare_problems import Workload, floor
from bench.compare_solvers import (
    FLOOR,
    FLOOR_GRAPH,
    RAMPDE,
    SCALED,
    SOLVERS,
    TORCHDIFFEQ,
    TORCHDIFFEQ_COMPILED,
    Candidate,
    References,
    allowed,
    baseline,
    candidates,
    errors,
)
from bench.counts import Operators, evaluations
from rampde.meter import metered

MIB = 2**20
# a GradScaler begins with a large scale and halves it until gradients are finite
MOST_TRIES = 30
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")

# columns of a row that a candidate may lack
RATIOS = {"over_torchdiffeq": None, "over_torchdiffeq_compiled": TORCHDIFFEQ_COMPILED, "over_floor": FLOOR}


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Matrix products and convolutions in tf32, or in fp32 as it says."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for backend, allows in zip(backends, before, strict=True):
            backend.allow_tf32 = allows


def launches_and_waits(names: Iterable[str]) -> tuple[int, int]:
    """How often a GPU was given work, and how often the host waited for it, from the profiler's events."""
    found = list(names)
    return sum(name.startswith(LAUNCHES) for name in found), sum(name in WAITS for name in found)


def counted(workload: Workload, candidates: Sequence[Candidate]) -> Iterator[tuple[str, dict[str, int]]]:
    """Host synchronisations, launches and evaluations of f in a training step of each candidate, where they can be
    counted. To be called last: what is compiled is not compiled while evaluations are counted, and never again.

    On the CPU a launch is an operator that is dispatched, of f and of the solver; what is compiled dispatches none.
    """
    on_gpu = {}
    for candidate in candidates:
        if workload.device.type == "cuda" and not candidate.foreign:
            synchronize(workload.device)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                candidate.step()
                synchronize(workload.device)
            launches, waits = launches_and_waits(event.name for event in profile.events())
            on_gpu[candidate.name] = {"launches": launches, "host_syncs": waits}
    for candidate in candidates:
        found: dict[str, int] = {}
        if candidate.counted:
            with ExitStack() as stack:
                calls = [stack.enter_context(evaluations(func)) for func in candidate.counted]
                operators = stack.enter_context(Operators())
                candidate.step()
            found["f_evaluations"] = sum(count["f"] for count in calls)
            found["host_syncs"] = operators.counts["reads"]
            if not candidate.compiled:
                found["launches"] = operators.counts["aten"] + operators.counts["rampde"]
        yield candidate.name, found | on_gpu.get(candidate.name, {})


def evaluations_of(workload: Workload, step: Callable[[], object]) -> int:
    """How often a training step evaluates f."""
    with evaluations(workload.funcs[0]) as calls:
        step()
    return calls["f"]


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph: no launches but one."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def first_run(workload: Workload, candidate: Candidate, references: References) -> dict[str, Any]:
    """Errors, seconds of the first call, and its peak memory where that is held from then on."""
    synchronize(workload.device)
    start = time.perf_counter()
    run = metered(candidate.step, workload.device) if candidate.holds else None
    result = run.result if run else candidate.step()
    synchronize(workload.device)
    seconds = time.perf_counter() - start
    for _ in range(MOST_TRIES if candidate.scaled else 0):
        if all(gradient is None or gradient.isfinite().all() for gradient in result.gradients):
            break
        result = candidate.step()
    return {
        "first_s": seconds,
        "peak": run.peak if run else None,
        "errors": errors(workload, result, references.of(candidate)),
    }


def measure(
    workload: Workload,
    precision: str,
    references: References,
    names: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """A row for each candidate, those that are wrong or fail among them, and for the floors."""
    # what was compiled for others is not looked at again
    torch._dynamo.reset()
    with multiplying(precision):
        return list(_measure(workload, precision, references, names, rounds, seconds, quick))


def _measure(
    workload: Workload,
    precision: str,
    references: References,
    names: Sequence[str],
    rounds: int,
    seconds: float,
    quick: bool,
) -> Iterator[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    of_torchdiffeq: dict[str, float] = {}
    found, right = list(candidates(workload, precision, names, quick)), []
    # torchdiffeq first: its errors say how far the others may be off
    found.sort(key=lambda candidate: not candidate.name.startswith(TORCHDIFFEQ))
    for candidate in found:
        row = _new_row(workload, precision, candidate.name)
        rows[candidate.name] = row
        try:
            first = first_run(workload, candidate, references)
            off = first["errors"]
            row |= {"first_s": first["first_s"], **{f"error of {name}": value for name, value in off.items()}}
            if candidate.name in (TORCHDIFFEQ, TORCHDIFFEQ + SCALED):
                of_torchdiffeq = off
            over = [name for name in off if off[name] > allowed(workload, precision, candidate, of_torchdiffeq, name)]
            if over:
                row["outcome"] = "wrong"
                row["reason"] = ", ".join(f"{name} is off by {off[name]:.2g}" for name in over)
                continue
            if not candidate.foreign:
                row["peak_mib"] = (first["peak"] or metered(candidate.step, workload.device).peak) / MIB
            steps[candidate.name] = candidate.step
            right.append(candidate)
        except Exception as error:
            row |= {"outcome": "failed", "reason": said(error)}
        if row["outcome"] == "failed":
            # what it left in memory is not the next one's
            gc.collect()
            torch.cuda.empty_cache()
    # how often f is evaluated is not known before, where steps are chosen
    adaptive = workload.family == "adaptive" and RAMPDE in steps
    evaluated = evaluations_of(workload, steps[RAMPDE]) if adaptive else None
    bottom = floor(workload, precision, evaluated)
    steps[FLOOR] = bottom
    rows[FLOOR] = _new_row(workload, precision, FLOOR)
    if workload.device.type == "cuda" and not adaptive:
        rows[FLOOR_GRAPH] = _new_row(workload, precision, FLOOR_GRAPH)
        try:
            steps[FLOOR_GRAPH] = captured(bottom, workload.device)
        except Exception as error:
            rows[FLOOR_GRAPH] |= {"outcome": "failed", "reason": said(error)}
    times = _timed(workload, steps, rounds, seconds)
    for name, counts in counted(workload, right):
        rows[name] |= counts
    for name in (*SOLVERS, FLOOR, FLOOR_GRAPH):
        if name in rows:
            yield rows[name] | (figures(name, times) if name in times else {})


def _timed(
    workload: Workload, steps: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    gc.collect()
    gc.disable()
    try:
        return interleave(steps, rounds, device=workload.device, max_seconds=seconds, warmup=2)
    finally:
        gc.enable()


def figures(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds, and ratios within a round."""
    found = spread("ms", quantiles([1e3 * sample for sample in times[name]]))
    found["rounds"] = len(times[name])
    for column, other in RATIOS.items():
        other = other or baseline(list(times))
        found |= spread(column, ratio_summary(times, other)[name] if other in times else None)
    return found


def spread(name: str, found: Quantiles | None) -> dict[str, float | None]:
    """Median and quantiles as three columns."""
    values = (found.median, found.low, found.high) if found else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _new_row(workload: Workload, precision: str, solver: str) -> dict[str, Any]:
    return {
        "workload": workload.name,
        "precision": precision,
        "solver": solver,
        "outcome": "measured",
        "reason": "",
        "title": workload.title,
    }


def said(error: Exception) -> str:
    """The first line of what an exception says, and its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
