"""What each checkpoint policy would cost a solve, predicted from one evaluation of f."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rampde.adjoint import gradients_wait
from rampde.arguments import Request, read_arguments
from rampde.buffers import unchanged
from rampde.captures import reachable_tensors, record
from rampde.checkpoint import Checkpoint, Fp8, Offload
from rampde.checkpoint.auto import budget_of
from rampde.checkpoint.costs import Evaluations, Sizes, sizes_of
from rampde.checkpoint.policy import Auto
from rampde.explicit import GridRoads, SteppingRoads, solve_explicit
from rampde.meter import metered
from rampde.ops import rk_stage
from rampde.precision import accumulation_dtype
from rampde.problem import Stage
from rampde.randomness import preserved
from rampde.roads import note_precision
from rampde.scaling import DynamicScaler
from rampde.statistics import uncollected
from rampde.tableau import ButcherTableau
from rampde.velocity import root, vector_jacobian_product

# evaluations that are timed, after one that is not
REPETITIONS = 3


@dataclass(frozen=True)
class PlannedPolicy:
    """What a policy would cost.

    Attributes:
        policy: to be given as ``checkpoint=``.
        peak: bytes that the solve and its gradient take at most on the device, beyond what is there before; the result
            and its gradient are among them.
        seconds: of the solve and its gradient, as far as f and the operators between its evaluations take it.
        evaluations: how often f is evaluated.
    """

    policy: Checkpoint
    peak: int
    seconds: float
    evaluations: Evaluations

    @property
    def name(self) -> str:
        return self.policy.name


@dataclass(frozen=True)
class MemoryPlan:
    """Predictions for a solve.

    Attributes:
        policies: what each policy would cost, the fastest first.
        chosen: the fastest one within the budget, or the one that takes least where none is; among those that do not
            change the gradients, which "fp8" does.
        budget: bytes that the solve may take.
        steps: how many steps the solve takes.
    """

    policies: list[PlannedPolicy]
    chosen: PlannedPolicy
    budget: int
    steps: int

    def __getitem__(self, name: str) -> PlannedPolicy:
        """The policy of that name."""
        for planned in self.policies:
            if planned.name == name:
                return planned
        raise KeyError(f"{name!r} is not among the planned policies, {[planned.name for planned in self.policies]}")

    def __str__(self) -> str:
        lines = [f"{'checkpoint':<16}{'peak MiB':>12}{'seconds':>12}{'evaluations of f':>20}{'again':>10}"]
        for planned in self.policies:
            total = planned.evaluations.plain + planned.evaluations.with_graph
            mark = "  <- chosen" if planned is self.chosen else "  over the budget" * (planned.peak > self.budget)
            lines.append(
                f"{planned.name:<16}{planned.peak / 2**20:>12.2f}{planned.seconds:>12.4g}{total:>20}"
                f"{total - self._least:>10}{mark}"
            )
        lines.append(f"{self.steps} steps, budget {self.budget / 2**20:.2f} MiB")
        return "\n".join(lines)

    @property
    def _least(self) -> int:
        return min(planned.evaluations.plain + planned.evaluations.with_graph for planned in self.policies)


def plan_memory(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    method: str | ButcherTableau | None = None,
    budget: int | None = None,
    show: bool = True,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    options: dict[str, Any] | None = None,
    loss_scaler: DynamicScaler | bool | object | None = None,
    velocity_dtype: torch.dtype | None = None,
    compensated: bool = False,
) -> MemoryPlan:
    """Predicts peak memory and time of a solve and its gradient under each checkpoint policy, and prints a table.

    Memory and time of one evaluation of ``func`` and of its vector-Jacobian product are measured, under the caller's
    ``torch.autocast``; the rest is arithmetic. The steps of an adaptive method are counted by a solve without
    gradients.

    Args:
        func, y0, t, method, rtol, atol, options, loss_scaler, velocity_dtype, compensated: as of :func:`rampde.odeint`.
        budget: bytes that the solve may take; None for a quarter of the device's free memory.
        show: print the table.

    Returns:
        A :class:`MemoryPlan`, whose ``chosen.policy`` is what ``checkpoint=`` of the solve may be given.

    Raises:
        TypeError, ValueError: an argument that is not as described, a method that is not an explicit Runge-Kutta one,
            or steps for each sample.
        RuntimeError: a profiler is running, which is needed to measure memory on the CPU.
    """
    with torch.no_grad(), uncollected():
        request = read_arguments(
            func,
            y0,
            t,
            rtol=rtol,
            atol=atol,
            method=method,
            options=options,
            loss_scaler=loss_scaler,
            velocity_dtype=velocity_dtype,
            compensated=compensated,
            checkpoint="step",
        )
    problem = request.problem
    if not isinstance(problem.method, ButcherTableau):
        raise ValueError("plan_memory is for explicit Runge-Kutta methods, expected one of them as method")
    if problem.per_sample:
        raise ValueError('with options["batch_axis"] the policy is "step" always, so there is nothing to plan')
    if problem.is_empty:
        raise ValueError("t has one time only, expected a solve with steps")
    allowed = budget_of(Auto(budget), problem.velocity.spec.device)
    buffers = reachable_tensors(func).buffers
    with preserved(problem.velocity.spec.device, True), unchanged(buffers):
        probe = _Probe(request)
        sizes = sizes_of(problem, probe.graph)
        if problem.closed is not None:
            sizes = _sizes_of_steps(request, sizes)
    planned = [
        PlannedPolicy(policy, probe.peak(policy, sizes), probe.seconds(policy, sizes), sizes.evaluations(policy))
        for policy in _policies(sizes, allowed)
    ]
    planned.sort(key=lambda one: (one.seconds, one.peak))
    exact = [one for one in planned if one.policy.quantiser is None and not isinstance(one.policy, Offload)]
    within = [one for one in exact if one.peak <= allowed]
    plan = MemoryPlan(planned, within[0] if within else min(exact, key=lambda one: one.peak), allowed, sizes.steps)
    if show:
        print(plan)
    return plan


def _policies(sizes: Sizes, budget: int) -> list[Checkpoint]:
    found = [*sizes.policies(budget), Fp8(), Offload("step"), Offload("none")]
    return list({policy.name: policy for policy in found}.values())


def _sizes_of_steps(request: Request, sizes: Sizes) -> Sizes:
    """``sizes`` of a solve whose steps are decided on the way, which is made to find them."""
    problem = request.problem
    assert problem.closed is not None
    problem.observer = None  # callbacks are for the solves of the user
    with torch.no_grad():
        solve_explicit(problem, [leaf.detach() for leaf in request.leaves])
    inside = {output.step for output in problem.grid.outputs if output.inside}
    swept = problem.closed.interpolated_cotangents[0].stage + 1
    return replace(sizes, steps=problem.grid.steps, steps_inside=len(inside), stages_inside=swept)


class _Probe:
    """One evaluation of f, measured.

    Attributes:
        graph: bytes of a graph, with its input and its result.
    """

    def __init__(self, request: Request) -> None:
        problem = request.problem
        self.problem = problem
        velocity, spec = problem.velocity, problem.velocity.spec
        device = spec.device
        roads = GridRoads() if problem.closed is None else SteppingRoads()
        with torch.no_grad():
            point = roads.prepare(problem)
            x = [leaf.detach().to(dtype) for leaf, dtype in zip(request.leaves, velocity.dtypes, strict=True)]
            leaves = [leaf.detach().requires_grad_() for leaf in x]
            warm = metered(lambda: record(velocity.original, velocity.evaluate_first, point, leaves), device)
            captures = warm.result[1]
            problem.first = Stage(point, x, [value.detach() for value in warm.result[0]])
            problem.captures = captures.tensors
            note_precision(problem)
            left_first = warm.left
            del warm
            self._measure(point, x, captures.tensors, device)
        # what autocast makes of parameters, once for all evaluations
        self.casts = max(left_first - (self.graph - self.input_bytes), 0) if velocity.autocast.enabled else 0
        outputs = len(problem.output_times) if problem.closed is not None else len(problem.kept)
        numbers = [leaf.numel() for leaf in x]
        self.result = outputs * sum(n * d.itemsize for n, d in zip(numbers, problem.output_dtypes, strict=True))
        self.written_to_result = problem.closed is None and outputs == problem.grid.steps + 1
        self.totals = sum(
            capture.numel() * (2 if capture.is_complex() else 1) * accumulation_dtype(capture.dtype).itemsize
            for capture in captures.tensors
        )

    def _measure(self, point: Tensor, x: list[Tensor], captures: list[Tensor], device: torch.device) -> None:
        velocity = self.problem.velocity

        def evaluate(with_graph: bool) -> list[Any]:
            inputs = [leaf.detach() for leaf in x]
            if not with_graph:
                return velocity.evaluate_without_graph(point, inputs)
            self._inputs = inputs
            return [root(value) for value in velocity.evaluate_with_graph(point, inputs)]

        plain = metered(lambda: evaluate(with_graph=False), device)
        self.plain_peak, self.velocity_bytes = plain.peak, plain.left
        del plain
        recorded = metered(lambda: evaluate(with_graph=True), device)
        self.input_bytes = sum(leaf.nbytes for leaf in x)
        self.graph = recorded.left + self.input_bytes
        self.graph_peak, kept_by_graph = recorded.peak, recorded.left
        del recorded
        assert self.problem.first is not None
        cotangents = [torch.ones_like(value) for value in self.problem.first.k]

        k: list[Any] = []

        def take() -> list[Tensor | None]:
            roots = [*k]
            k.clear()
            return list(vector_jacobian_product(roots, [*self._inputs, *captures], cotangents, retain_graph=False))

        def both() -> None:
            k.extend(evaluate(with_graph=True))
            take()

        product = metered(take, device, before=lambda: k.extend(evaluate(with_graph=True)))
        self.product_peak = product.peak - kept_by_graph
        sizes = [0 if gradient is None else gradient.nbytes for gradient in product.result]
        self.gradients_of_input, self.gradients = sum(sizes[: len(x)]), sum(sizes)
        del product

        def stage() -> None:
            h = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
            for leaf, dtype in zip(x, velocity.dtypes, strict=True):
                rk_stage(leaf, [leaf, leaf], h, [1.0, 1.0], dtype)

        self.plain_seconds = _seconds(lambda: evaluate(with_graph=False), device)
        self.graph_seconds = _seconds(lambda: evaluate(with_graph=True), device)
        self.product_seconds = max(_seconds(both, device) - self.graph_seconds, 0.0)
        self.operator_seconds = _seconds(stage, device)
        self._inputs = []

    def seconds(self, policy: Checkpoint, sizes: Sizes) -> float:
        """Of the solve and its gradient."""
        evaluations = sizes.evaluations(policy)
        # for each evaluation its input, and as many operators again in the sweep; the accumulation is another one
        operators = evaluations.plain + evaluations.with_graph + evaluations.products + 2 * sizes.steps
        return (
            evaluations.plain * self.plain_seconds
            + evaluations.with_graph * self.graph_seconds
            + evaluations.products * self.product_seconds
            + operators * self.operator_seconds
        )

    def peak(self, policy: Checkpoint, sizes: Sizes) -> int:
        """Bytes at most, beyond those before the solve: on the road out or on the road back, whichever takes more."""
        kept = sizes.kept(policy)
        out, back = self.casts + self._out(policy, sizes, kept), self._back(policy, sizes, kept)
        # graphs bring their casts back with them
        return max(out, back if policy.releases_inputs else self.casts + back)

    def _out(self, policy: Checkpoint, sizes: Sizes, kept: int) -> int:
        states = (0 if self.written_to_result else 2 * sizes.state) + sizes.compensation
        velocities = sizes.stages * self.velocity_bytes
        last = self.graph_peak if policy.keeps_graphs else self.plain_peak
        # the graphs of the last step are not complete while it is taken
        inputs = (sizes.stages if policy.keeps_graphs else 2) * self.input_bytes
        step = 0 if kept and policy.keeps_graphs else velocities + inputs
        return self.result + kept + states + step + last - self.velocity_bytes

    def _back(self, policy: Checkpoint, sizes: Sizes, kept: int) -> int:
        # the result and its gradient, and the adjoint
        base = 2 * self.result + kept + sizes.state * (1 if self.problem.scaler is None else 2)
        if not policy.keeps_every_step and sizes.steps > 1:
            # a state that a step is taken again from, unless the kept one is used
            base += self.input_bytes
        elif policy.quantiser is not None:
            # the state that the sweep is at, in full precision, and what f sees of it
            base += sizes.state + (self.input_bytes if sizes.rounded < sizes.state else 0)
        elif isinstance(policy, Offload):
            base += self.input_bytes * (sizes.stages if policy.stages == "stage" else 1)
        # what parameters have got so far is not there in the first step that is swept, the last one, if it waits
        totals = self.totals if sizes.steps > 1 or not self._gradients_wait(policy) else 0
        moments = [totals + self._swept(policy, sizes.stages, sizes.graph)]
        # when a step is swept, the gradients of its stages are added to the totals
        if self._gradients_wait(policy):
            swept = max(sizes.stages, sizes.stages_inside)
            gone = sizes.graph if policy.stages == "none" and self.problem.scaler is None and kept else 0
            moments.append(self.totals + swept * (self.gradients - gone))
        if sizes.steps_inside:
            # what the outputs in a step make of the adjoint, for one stage
            collected = totals if sizes.steps_inside > 1 else 0
            moments.append(collected + sizes.state + self._swept(policy, sizes.stages_inside, sizes.graph))
        return base + max(moments)

    def _gradients_wait(self, policy: Checkpoint) -> bool:
        """Whether those of parameters are collected for all stages of a step."""
        return gradients_wait(replace(self.problem, checkpoint=policy), self.problem.captures)

    def _swept(self, policy: Checkpoint, s: int, graph: int) -> int:
        """Bytes at most while a step of ``s`` stages is swept."""
        # the first input is what is kept
        first_is_kept = self.input_bytes
        moments = []
        for swept in range(s):
            collected = swept * (self.gradients if self._gradients_wait(policy) else self.gradients_of_input)
            if policy.stages == "none":
                # kept already; the graphs of later stages are gone, unless an overflow may ask for them again
                gone = swept * graph if self.problem.scaler is None else 0
                alive = graph if isinstance(policy, Offload) else self.velocity_bytes - gone
            elif policy.stages == "step":
                alive = (s - swept) * graph - first_is_kept + self.velocity_bytes
            elif policy.stages == "lean":
                waiting = max(s - 2 - swept, 0) * self.input_bytes
                alive = waiting + graph - first_is_kept * (swept == s - 1) + self.velocity_bytes
            else:
                alive = graph - self.input_bytes + self.velocity_bytes
            moments.append(alive + collected + self.product_peak)
        if policy.stages == "lean":
            # before the sweep of a step, to find where its stages are
            moments.append((s - 1) * self.input_bytes + (s - 2) * self.velocity_bytes + self.plain_peak)
        return max(moments)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(REPETITIONS))
