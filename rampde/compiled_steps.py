"""Whole steps compiled into one: what an eager solve on a grid does with an f that ``torch.compile`` returned.

A call of a compiled function costs tens of microseconds each way, which is more than a small f takes. A step of s
stages is therefore compiled as one function, which inlines f s times with the sums between: one call a step, and one
product with its Jacobian on the road back. However long the solve is, one step is compiled.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rampde.adjoint import Gradients
from rampde.autocast import switched_off
from rampde.captures import find_unknown_leaf
from rampde.checkpoint import Checkpoint
from rampde.checkpoint.costs import Sizes
from rampde.checkpoint.policy import Auto
from rampde.compilation import as_written, compiler_of
from rampde.grid import stage_times, time_dtype
from rampde.ops import accumulate_gradients
from rampde.precision import accumulation_dtype
from rampde.problem import Problem, Stage
from rampde.roads import Roads
from rampde.state import StateSpec
from rampde.tableau import ButcherTableau
from rampde.tape import integrate_taped
from rampde.traced import advanced, stage_velocities, step_weights, weights_by_coefficient
from rampde.velocity import Velocity, vector_jacobian_product

LARGEST_MODULE = 64
"""Modules without children in an f that is worth it: compiling takes s times as long as compiling f, and beside a deep
f the calls that it saves are nothing."""


class NotServed(Exception):
    """What f does is not for whole steps."""


class StepRoads(Roads["KeptSteps"]):
    """A solve as the iteration of one compiled step ``y -> y + h sum_i b_i k_i``.

    Its "velocity" is the step: the stage that the roads speak of holds the state before it, and the one after it.
    """

    def __init__(self, problem: Problem) -> None:
        """``problem``, which the roads are for, has the step as its velocity until ``leave``."""
        self.of_f, self.step = problem.velocity, _Step(problem.velocity, problem.tableau)
        problem.velocity = self.step

    def leave(self, problem: Problem) -> None:
        """Gives ``problem`` its f back."""
        problem.velocity, problem.first = self.of_f, None

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Whether f is compiled, and the solve of the usual kind; float16 is not, as its sweep is scaled."""
        velocity, policy = problem.velocity, problem.checkpoint
        usual = problem.closed is None and not (problem.compensated or problem.grid.points.requires_grad)
        usual = usual and not (problem.cuda_graph or problem.recorded) and problem.observer is None
        usual = usual and problem.stats is None and not problem.scaler_given
        keeps = type(policy) is Auto or (type(policy) is Checkpoint and policy.stages in ("none", "step"))
        wide = all(leaf.dtype == leaf.state_dtype for leaf in velocity.spec.leaves) and not velocity.half
        context = compiler_of(velocity.func)
        return usual and keeps and wide and context is not None and _is_small(velocity.func) and not problem.is_empty

    def prepare(self, problem: Problem) -> Tensor:
        spec, tableau = problem.velocity.spec, problem.tableau
        h, times = stage_times(problem.grid.points, tableau.nodes, spec.time_dtype, problem.perturb)
        weights = step_weights(h, tableau, problem.velocity.dtypes)
        # of the dtype of the sums, which holds the times as well
        with switched_off(h.device):
            self.rows = torch.cat([weights, times.to(weights.dtype)], 1).unbind(0)
        return self.rows[0]

    def keep(self, problem: Problem) -> KeptSteps:
        return KeptSteps(problem)

    def out(self, problem: Problem, y0: list[Tensor], kept: KeptSteps | None) -> list[Tensor]:
        velocity, first = problem.velocity, problem.first
        assert first is not None
        with_graph = kept is not None and kept.keeps_graphs
        evaluate = velocity.evaluate_with_graph if with_graph else velocity.evaluate_without_graph
        wanted = set(problem.kept)
        y = [leaf.detach() for leaf in first.x]
        results = [y] if 0 in wanted else []
        for step, row in enumerate(self.rows):
            # aliases: a leaf of a graph is no state
            stage = first if step == 0 else Stage(row, y, evaluate(row, y))
            if kept is not None:
                kept.store(stage)
            y = [value.detach() for value in stage.k]
            if step + 1 in wanted:
                results.append(y)
        return [torch.stack([state[leaf] for state in results]) for leaf in problem.leaves]

    def back(
        self,
        problem: Problem,
        points: Tensor,
        kept: KeptSteps,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> StepSweep:
        return StepSweep(self.step, problem.kept, kept, captures, cotangents, retain_graph)

    def choose(self, problem: Problem, sizes: Sizes, budget: int) -> Checkpoint:
        return Checkpoint("none" if sizes.graph * sizes.steps <= budget else "step")

    def taped(self, problem: Problem, y0: list[Tensor], points: Tensor) -> list[Tensor]:
        problem.velocity = self.of_f
        return integrate_taped(problem, y0, points)

    def check_random(self, problem: Problem, wanted: bool, later: bool) -> None:
        drawn = later or problem.random is not None
        if wanted and drawn and not problem.checkpoint.keeps_graphs:
            raise RuntimeError(
                "func draws random numbers, which a compiled func cannot draw again in the backward pass; use"
                ' checkpoint="none", or func as it was before torch.compile'
            )


class KeptSteps:
    """The states before each step, or its graphs."""

    def __init__(self, problem: Problem) -> None:
        self.keeps_graphs = problem.checkpoint.keeps_graphs
        self.stages: list[Stage] = []
        self.times: list[Tensor] = []
        self.leaves = len(problem.leaves)

    def store(self, stage: Stage) -> None:
        """The next step."""
        if self.keeps_graphs:
            self.stages.append(stage)
        else:
            self.times.append(stage.time)
            self.stages.append(Stage(stage.time, [leaf.detach() for leaf in stage.x], []))

    def tensors(self) -> list[Tensor]:
        if self.keeps_graphs:
            return []
        states = [leaf for stage in self.stages for leaf in stage.x]
        self.stages = []
        return states

    def restore(self, tensors: Sequence[Tensor]) -> None:
        if self.keeps_graphs:
            return
        self.stages = [
            Stage(time, list(tensors[place : place + self.leaves]), [])
            for time, place in zip(self.times, range(0, len(tensors), self.leaves), strict=True)
        ]

    def rest(self) -> None:
        if not self.keeps_graphs:
            self.stages = []

    def clear(self) -> None:
        self.stages, self.times = [], []


class StepSweep:
    """The discrete adjoint of the iterated step: ``lam = VJP_y(step)[lam] + dL/dy``, parameters' products summed in 32
    bits or more."""

    def __init__(
        self,
        step: Velocity,
        points: Sequence[int],
        kept: KeptSteps,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> None:
        """``points``: those of the grid that ``cotangents`` have a row for, each."""
        self.step, self.kept, self.captures, self.retain_graph = step, kept, captures, retain_graph
        self.cotangents = [
            {} if leaf is None else dict(zip(points, leaf.unbind(0), strict=True)) for leaf in cotangents
        ]
        self.totals: Gradients = [None] * len(captures)
        self.one = torch.ones((), dtype=time_dtype(step.spec.device), device=step.spec.device)

    def run(self, y0: Sequence[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        leaves = len(y0)
        steps = len(self.kept.stages)
        adjoint: list[Tensor] = [self._cotangent(leaf, steps, y) for leaf, y in enumerate(y0)]
        for step in reversed(range(steps)):
            stage = self.kept.stages[step]
            if not self.kept.keeps_graphs:
                x = [leaf.detach() for leaf in stage.x]
                stage = Stage(stage.time, x, self.step.evaluate_with_graph(stage.time, x))
            if step == steps - 1:
                self._check_captures(stage)
            products = vector_jacobian_product(stage.k, (*stage.x, *self.captures), adjoint, self.retain_graph)
            adjoint = [self._with_cotangent(product, leaf, step) for leaf, product in enumerate(products[:leaves])]
            self._accumulate(products[leaves:])
            if not self.retain_graph:
                # the graph of the step goes with it
                self.kept.stages[step] = stage = Stage(stage.time, [], [])
        return [*adjoint], None, self.totals

    def _cotangent(self, leaf: int, point: int, like: Tensor) -> Tensor:
        found = self.cotangents[leaf].get(point)
        return torch.zeros_like(like) if found is None else found

    def _with_cotangent(self, product: Tensor | None, leaf: int, point: int) -> Tensor:
        # the step holds the state itself, so that there always is a product
        assert product is not None
        found = self.cotangents[leaf].get(point)
        return product if found is None else product + found

    def _check_captures(self, stage: Stage) -> None:
        unknown = find_unknown_leaf(stage.k, [*stage.x, *self.captures])
        if unknown is not None:
            raise RuntimeError(
                f"func used a tensor of shape {list(unknown.shape)} that requires a gradient in the last step, though"
                " not in the first one, and no module, closure or attribute of func holds it: its gradient would be"
                ' missing. Hold it there, or use checkpoint="tape"'
            )

    def _accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        used = []
        for capture, gradient in enumerate(gradients):
            if gradient is None:
                continue
            used.append(capture)
            if self.totals[capture] is None:
                dtype = accumulation_dtype(gradient.dtype)
                self.totals[capture] = torch.zeros_like(gradient, dtype=dtype)
        if used:
            accumulate_gradients([self.totals[c] for c in used], [gradients[c] for c in used], self.one, None)


class _Step(Velocity):
    """One step in the place of f: its time is a row of the step's weights and the times of its stages."""

    def __init__(self, velocity: Velocity, tableau: ButcherTableau) -> None:
        self.original, self.func, self.spec = velocity.original, velocity.func, velocity.spec
        self.autocast, self.half, self.origin = velocity.autocast, False, None
        self.dtypes = [leaf.state_dtype for leaf in velocity.spec.leaves]
        self.is_plain = False
        context = compiler_of(velocity.func)
        assert context is not None
        spec, func = velocity.spec, velocity.func
        step = _compiled_step(_Key(context, tableau, tuple(velocity.dtypes), spec))
        self.evaluate = lambda row, y: list(step(func, row, *y))

    def evaluate_first(self, time: Tensor, x: list[Tensor]) -> list[Tensor]:
        try:
            return self.evaluate(time, x)
        except torch._dynamo.exc.TorchDynamoException as error:
            # whatever it is, an f that is compiled by itself says it better
            raise NotServed from error


class _Key:
    """What a compiled step depends on."""

    def __init__(
        self,
        context: Callable[..., Any],
        tableau: ButcherTableau,
        dtypes: tuple[torch.dtype, ...],
        spec: StateSpec,
    ) -> None:
        self.context, self.tableau, self.dtypes, self.spec = context, tableau, dtypes, spec
        # the key holds both objects, so that no other ones can have their addresses
        self._parts = (id(context), id(tableau), dtypes, spec.structure_of_any_shapes)

    def __hash__(self) -> int:
        return hash(self._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._parts == other._parts


@lru_cache(maxsize=64)
def _compiled_step(key: _Key) -> Callable[..., tuple[Tensor, ...]]:
    tableau, dtypes, spec = key.tableau, key.dtypes, key.spec

    def step(func: Callable[..., Any], row: Tensor, *y: Tensor) -> tuple[Tensor, ...]:
        # of the shapes at hand
        own = StateSpec(spec.assemble(list(y)))

        def evaluate(time: Tensor, x: list[Tensor]) -> list[Tensor]:
            k = func(time, spec.assemble(x))
            own.check_velocity(k)
            leaves = own.velocity_leaves(k)
            if any(value.dtype == torch.float16 for value in leaves):
                raise NotServed
            return leaves

        weights = weights_by_coefficient(row[: -tableau.stages], tableau)
        times = row[-tableau.stages :].to(spec.time_dtype)
        k = stage_velocities(tableau, dtypes, evaluate, weights, times, y)
        return tuple([advanced(leaf, weights, tableau.update, of_leaf) for leaf, of_leaf in zip(y, k, strict=True)])

    # what is compiled belongs to a code object, and so does the limit on how often it is compiled anew
    own = types.FunctionType(
        step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
    )
    compiled: Callable[..., tuple[Tensor, ...]] = key.context(own)
    return compiled


def _is_small(func: Callable[..., Any]) -> bool:
    module = as_written(func)
    if not isinstance(module, nn.Module):
        return True
    return sum(1 for part in module.modules() if not part._modules) <= LARGEST_MODULE
