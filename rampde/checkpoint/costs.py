"""What a policy costs: bytes and evaluations of f, by the numbers of steps and stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2

from rampde.checkpoint.binomial import Binomial, recomputed_steps
from rampde.checkpoint.fp8 import Fp8
from rampde.checkpoint.offload import Offload
from rampde.checkpoint.policy import Checkpoint
from rampde.fp8_blocks import BLOCK
from rampde.problem import Problem


def sizes_of(problem: Problem, graph: int) -> Sizes:
    """Of a solve, whose evaluations of f have graphs of ``graph`` bytes."""
    spec, dtypes = problem.velocity.spec, problem.velocity.dtypes
    assert problem.first is not None
    numbers = [leaf.numel() for leaf in problem.first.x]
    bytes_of_state = [n * leaf.state_dtype.itemsize for n, leaf in zip(numbers, spec.leaves, strict=True)]
    return Sizes(
        steps=problem.grid.steps,
        stages=problem.evaluated_again,
        graph=graph,
        rounded=sum(n * dtype.itemsize for n, dtype in zip(numbers, dtypes, strict=True)),
        state=sum(bytes_of_state),
        compensation=sum(bytes_of_state) if problem.compensated else 0,
        elements=sum(numbers),
    )


@dataclass(frozen=True)
class Evaluations:
    """How often f is evaluated: without a graph, with one, and how many vector-Jacobian products are taken."""

    plain: int
    with_graph: int
    products: int


@dataclass(frozen=True)
class Sizes:
    """What the policies have to do with.

    Attributes:
        steps: N, the number of steps.
        stages: s, how many stages of a step are swept.
        graph: bytes that the graph of one evaluation of f keeps, its input and its result among them.
        rounded: bytes of a state as f sees it.
        state: bytes of a state in full precision.
        compensation: bytes of what a compensated sum carries along.
        elements: number of elements of a state.
        stages_inside: how many stages are swept of a step in which an output lies, where an interpolant gives it.
        steps_inside: how many such steps there are.
    """

    steps: int
    stages: int
    graph: int
    rounded: int
    state: int
    elements: int
    compensation: int = 0
    stages_inside: int = 0
    steps_inside: int = 0

    def kept(self, policy: Checkpoint) -> int:
        """Bytes on the device from the road out to the road back."""
        if isinstance(policy, Offload):
            return 0
        if policy.stages in ("none", "tape"):
            return self.steps * self.stages * self.graph
        if policy.stages == "stage":
            return self.steps * self.stages * self.rounded
        if isinstance(policy, Binomial):
            return min(policy.states, self.steps) * (self.state + self.compensation)
        if isinstance(policy, Fp8):
            changes = (self.steps - 1) * (self.elements + 4 * ceil(self.elements / BLOCK))
            return changes + self.state + self.rounded
        return self.steps * self.rounded

    def alive(self, policy: Checkpoint) -> int:
        """Bytes of the graphs, and of the inputs for further ones, that are alive at once on the road back."""
        if policy.stages in ("none", "tape"):
            return self.graph if isinstance(policy, Offload) else 0
        if policy.stages == "step":
            return self.stages * self.graph
        return self.graph + (self.stages - 1) * self.rounded * (policy.stages == "lean")

    def evaluations(self, policy: Checkpoint) -> Evaluations:
        """Evaluations of f on both roads."""
        further = self.steps_inside * (self.stages_inside - self.stages)
        all_stages = self.steps * self.stages + further
        if policy.stages in ("none", "tape"):
            return Evaluations(0, all_stages, all_stages)
        inner = policy.policy if isinstance(policy, Offload) else policy
        plain = all_stages
        if isinstance(inner, Binomial):
            plain += recomputed_steps(self.steps, inner.states) * self.stages
        if inner.stages == "lean":
            plain += all_stages - self.steps
        return Evaluations(plain, all_stages, all_stages)

    def policies(self, budget: int) -> Iterator[Checkpoint]:
        """Those that keep the bits of the gradients, and whose memory is on the device."""
        yield from map(Checkpoint, ("none", "stage", "step", "lean"))
        for stages in ("step", "lean"):
            fitting = (budget - self.alive(Checkpoint(stages))) // max(self.state + self.compensation, 1)
            few = ceil(log2(self.steps + 1))
            for states in {min(max(fitting, 1), self.steps), min(few, self.steps)}:
                if states < self.steps:
                    yield Binomial(states, stages)
