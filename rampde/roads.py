"""The ``autograd.Function`` that joins the road out and the road back, for every family of methods."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from rampde.adjoint import Gradients
from rampde.buffers import unchanged
from rampde.captures import Captures, hooks_muted, record
from rampde.checkpoint import Checkpoint
from rampde.checkpoint.auto import CHOICES, SavedBytes, budget_of, hooks_are_set, saved_bytes
from rampde.checkpoint.costs import Sizes, sizes_of
from rampde.checkpoint.policy import Auto
from rampde.out_of_memory import explained
from rampde.problem import Problem, Stage
from rampde.randomness import DrawWatch, RandomState, preserved
from rampde.sharded import Hold, may_be_sharded
from rampde.tape import Gate


class Kept(Protocol):
    """What of the road out is kept for the road back."""

    keeps_graphs: bool

    def tensors(self) -> list[Tensor]:
        """What is to be saved for the backward pass by autograd, which may offload or check it."""

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Takes back what ``tensors`` gave, when a backward pass begins."""

    def rest(self) -> None:
        """A backward pass is over, and another one may follow: forgets what ``restore`` took."""

    def clear(self) -> None:
        """Forgets everything."""


class Backward(Protocol):
    """A sweep."""

    def run(self, y0: Sequence[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        """Gradients with respect to the leaves ``y0`` (in the state's dtype), the grid points and the captures."""


K = TypeVar("K", bound=Kept)


class Roads(ABC, Generic[K]):
    """What a family of methods does on the road out, on the road back and on the tape.

    Attributes:
        iterates: whether f is evaluated several times for one stage, with the derivative of the first evaluation: such
            evaluations must all draw the same random numbers, whether gradients are wanted or not.
    """

    iterates = False

    @abstractmethod
    def prepare(self, problem: Problem) -> Tensor:
        """Makes the times of the steps, where they are known before the solve; that of the first evaluation of f."""

    @abstractmethod
    def keep(self, problem: Problem) -> K:
        """Where the road out keeps what the road back will need."""

    @abstractmethod
    def out(self, problem: Problem, y0: list[Tensor], kept: K | None) -> list[Tensor]:
        """The states of the result from ``problem.first`` on, without graphs but those that ``kept`` needs."""

    @abstractmethod
    def back(
        self,
        problem: Problem,
        points: Tensor,
        kept: K,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> Backward:
        """The sweep over what was kept."""

    @abstractmethod
    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        """The result with every operation recorded by autograd, the first evaluation included."""

    def repeated(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        """As ``taped``, of a solve that was made before."""
        return self.taped(problem, y0, points)

    def first_stage(self, problem: Problem, time: Tensor, x: list[Tensor]) -> Stage:
        """The first evaluation of f where no gradients are wanted."""
        return Stage(time, x, problem.velocity.evaluate_first(time, x))

    def choose(self, problem: Problem, sizes: Sizes, budget: int) -> Checkpoint:
        """The policy that "auto" becomes, so that the gradient takes no more than ``budget`` bytes if that can be."""
        return Checkpoint("step")

    def check_random(self, problem: Problem, wanted: bool, later: bool) -> None:
        """Raises RuntimeError where f draws random numbers that cannot be drawn again.

        ``problem.random`` is given where the first evaluation drew some; ``wanted``: gradients are; ``later``: only
        later evaluations were seen to draw some. Called before the solve and after it.
        """


def travel(roads: Roads[Any], problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """The states that the solve returns, leaf by leaf, differentiable in every tensor that f uses.

    On a grid that is known before: the states at the grid points ``problem.kept``; else one for each output time.
    ``y0``: real, dense leaves. The first stage is evaluated here, checked, and searched for what f captures.
    """

    def forget() -> None:
        problem.first, problem.step_times = None, None

    solve = partial(explained, partial(_travel, roads, problem, y0), problem, "forward", forget)
    if not may_be_sharded():
        return solve()
    with Hold(y0, lambda: problem.first is not None and not problem.checkpoint.is_tape) as hold:
        return hold.release(solve())


def _travel(roads: Roads[Any], problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    velocity, points = problem.velocity, problem.grid.points
    if problem.is_empty:
        return [leaf[None].to(dtype) for leaf, dtype in zip(y0, problem.output_dtypes, strict=True)]
    if problem.checkpoint.is_tape and not roads.iterates:
        return _on_tape(roads, problem, y0)
    with torch.no_grad():
        time = roads.prepare(problem)
        x = [leaf.detach().to(dtype) for leaf, dtype in zip(y0, velocity.dtypes, strict=True)]
    if not torch.is_grad_enabled() and not roads.iterates:
        problem.first = roads.first_stage(problem, time, x)
        return roads.out(problem, [leaf.detach() for leaf in y0], None)

    generators = partial(RandomState.current, velocity.spec.device)
    before = None if problem.recorded else generators()
    # whoever treats what graphs save in a way of his own wants little of it on the device
    asks = isinstance(problem.checkpoint, Auto)
    hooked = asks and hooks_are_set()
    chosen = CHOICES.get(problem) if asks and not hooked else None
    measures = asks and not hooked and chosen is None
    draws: AbstractContextManager[object] = DrawWatch() if problem.recorded else nullcontext()
    with draws, saved_bytes() if measures else problem.checkpoint.recording() as saved:
        captures = first_evaluation(roads, problem, time, x)
    after = None if problem.recorded else generators()
    wanted = torch.is_grad_enabled() and bool(
        captures.tensors or captures.problem or problem.time_needs_grad or any(leaf.requires_grad for leaf in y0)
    )
    if (wanted or roads.iterates) and before is not None and after is not None and not before.equals(after):
        problem.random = before
    if wanted and isinstance(draws, DrawWatch) and draws.seen:
        _check_recorded_draws(problem)
    if captures.problem and not problem.checkpoint.is_tape:
        warnings.warn(
            f'func {captures.problem}; the solve falls back to checkpoint="tape": more memory, 16-bit gradients are'
            " summed in 16 bits, and float16 is not scaled",
            UserWarning,
            stacklevel=6,
        )
        problem.checkpoint = Checkpoint("tape")
    note_precision(problem)
    if asks and wanted and isinstance(problem.checkpoint, Auto):
        problem.checkpoint = chosen or _chosen(roads, problem, problem.checkpoint, saved, captures)
    twice = problem.scaler is not None or problem.closed is not None
    if captures.compiled and twice and problem.checkpoint.keeps_graphs and not roads.iterates:
        # a sweep that is resumed needs its graphs twice, and so do two steps that share a stage where there are outputs
        # inside, but compiled ones give their memory away when they are used
        problem.checkpoint = Checkpoint("stage")
    if not (wanted and problem.checkpoint.keeps_graphs) and not roads.iterates:
        detach_first(problem)
    if wanted and problem.checkpoint.releases_inputs and not roads.iterates:
        velocity.origin = torch.zeros((), device=velocity.spec.device, requires_grad=True)
    if problem.stats is not None and wanted:
        problem.stats.checkpoint = problem.checkpoint.name
    if wanted and problem.checkpoint.is_tape:
        outputs = _on_tape(roads, problem, y0)
    elif wanted:
        roads.check_random(problem, wanted, later=False)
        outputs = list(
            _Solve.apply(  # type: ignore[no-untyped-call]
                roads, problem, captures.observed, points, *y0, *captures.tensors
            )
        )
    else:
        with torch.no_grad():
            outputs = roads.out(problem, [leaf.detach() for leaf in y0], None)
    later = after is not None and problem.random is None and not after.equals(generators())
    roads.check_random(problem, wanted, later)
    return outputs


def _check_recorded_draws(problem: Problem) -> None:
    if isinstance(problem.checkpoint, Auto):
        problem.checkpoint = Checkpoint("none")
    if not problem.checkpoint.keeps_graphs:
        raise RuntimeError(
            "func draws random numbers, which cannot be drawn again in a CUDA graph, as checkpoint="
            f'"{problem.checkpoint.name}" would have to; use checkpoint="none"'
        )


def _on_tape(roads: Roads[Any], problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    points = problem.grid.points
    problem.time_needs_grad = points.requires_grad and torch.is_grad_enabled()
    return roads.taped(problem, y0, points)


def first_evaluation(roads: Roads[Any], problem: Problem, time: Tensor, x: list[Tensor]) -> Captures:
    """Evaluates the first stage, with its graph where that is kept, and finds what f captures."""
    velocity = problem.velocity
    if not torch.is_grad_enabled():
        problem.first = roads.first_stage(problem, time, x)
        return Captures()
    problem.time_needs_grad = problem.grid.points.requires_grad
    if problem.time_needs_grad:
        time = time.detach().requires_grad_()
    for leaf in x:
        leaf.requires_grad_()
    k, captures = record(velocity.original, velocity.evaluate_first, time, x)
    problem.first = Stage(time, x, k)
    problem.captures, problem.opaque, problem.buffers = captures.tensors, captures.opaque, captures.buffers
    return captures


def detach_first(problem: Problem) -> None:
    """Plain aliases: the graph of the first evaluation is not needed again, and a checkpoint is no leaf of a graph."""
    first = problem.first
    assert first is not None
    x, k = [leaf.detach() for leaf in first.x], [value.detach() for value in first.k]
    problem.first = Stage(first.time.detach(), x, k)


def _chosen(
    roads: Roads[Any], problem: Problem, asked: Auto, saved: SavedBytes | None, captures: Captures
) -> Checkpoint:
    """The policy in the place of "auto", remembered for later solves where it follows from what was measured."""
    if saved is None or problem.recorded:
        return Checkpoint("step")
    graph = saved.beyond([*captures.tensors, *captures.constants])
    budget = budget_of(asked, problem.velocity.spec.device)
    policy = roads.choose(problem, sizes_of(problem, graph), budget)
    CHOICES.put(problem, policy)
    return policy


def note_precision(problem: Problem) -> None:
    """Scaling is for float16 wherever it enters: in the input of f, under autocast, or in what f returns."""
    assert problem.first is not None
    half = problem.velocity.half or any(value.dtype == torch.float16 for value in problem.first.k)
    if not half:
        problem.poison = False
        if not problem.scaler_given:
            problem.scaler = None


class _Solve(torch.autograd.Function):
    """The forward solve, and the sweep as its backward."""

    @staticmethod
    def forward(
        ctx: Any, roads: Roads[Any], problem: Problem, observed: int, points: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = len(problem.leaves)
        y0, captures = tensors[:leaves], tensors[leaves:]
        kept = roads.keep(problem)
        with problem.checkpoint.recording():
            outputs = roads.out(problem, [leaf.detach() for leaf in y0], kept)
        problem.first = None
        if problem.velocity.autocast.enabled and not kept.keeps_graphs:
            # casts made above without a graph would detach these parameters in the rest of the caller's region
            torch.clear_autocast_cache()
        ctx.set_materialize_grads(False)
        ctx.roads, ctx.problem, ctx.kept, ctx.observed = roads, problem, kept, observed
        # products are taken with respect to the tensors themselves, not to what saved_tensors_hooks make of them
        ctx.captures = captures
        # only what f was seen to use is checked for changes in place: the rest may be no business of the solve
        ctx.save_for_backward(points, *y0, *captures[:observed], *kept.tensors())
        ctx.swept = False
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        leaves = len(problem.leaves)
        points, *saved = ctx.saved_tensors
        y0, saved = saved[:leaves], saved[leaves:]
        captures = ctx.captures
        unused = (None, None, None)
        if all(cotangent is None for cotangent in cotangents):
            return (*unused, None, *[None] * (leaves + len(captures)))
        with ExitStack() as stack:
            if problem.stats is not None:
                stack.enter_context(problem.stats.backward())
            stack.enter_context(problem.velocity.autocast.entered())
            stack.enter_context(preserved(problem.velocity.spec.device, problem.random is not None))
            if torch.is_grad_enabled():
                return (*unused, *differentiable_backward(ctx.roads, problem, points, y0, captures, cotangents))
            retain_graph = torch._C._autograd._get_current_graph_task_keep_graph()
            if ctx.swept:
                raise RuntimeError(
                    "what this solve kept for gradients was freed by an earlier backward pass; give that one"
                    ' retain_graph=True, or solve with checkpoint="step"'
                )
            ctx.swept = ctx.kept.keeps_graphs and not retain_graph
            stack.enter_context(hooks_muted(captures))
            stack.enter_context(unchanged([] if problem.checkpoint.stages == "none" else problem.buffers))
            ctx.kept.restore(saved[ctx.observed :])
            # a sweep that may have to resume needs its graphs twice; those that are made anew serve once
            retain = ctx.kept.keeps_graphs and (retain_graph or problem.scaler is not None)

            def sweep() -> tuple[Gradients, Tensor | None, Gradients]:
                back: Backward = ctx.roads.back(problem, points, ctx.kept, captures, cotangents, retain)
                return back.run(y0)

            def forget() -> None:
                ctx.kept.clear()
                saved.clear()
                ctx.maybe_clear_saved_tensors()
                ctx.swept = True

            try:
                gradients, points_gradient, totals = explained(sweep, problem, "backward", forget)
            finally:
                ctx.kept.rest()
            if not retain_graph:
                ctx.kept.clear()
        return (
            *unused,
            points_gradient,
            *(_cast(gradient, leaf) for gradient, leaf in zip(gradients, y0, strict=True)),
            *(_cast(total, capture) for total, capture in zip(totals, captures, strict=True)),
        )


def _cast(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(tensor.dtype)


def differentiable_backward(
    roads: Roads[Any],
    problem: Problem,
    points: Tensor,
    y0: Sequence[Tensor],
    captures: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """The gradients with their own graph (``create_graph=True``): the solve is repeated on the tape."""
    if problem.random is not None:
        problem.random.restore()
    gate = Gate()
    points, y0 = gate(points), [gate(leaf) for leaf in y0]
    outputs = roads.repeated(problem, y0, points)
    return gate.gradients(outputs, cotangents, [points, *y0], captures)
