"""Checkpoint policies: what of a step is kept, and how its stage graphs come back for the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.stages import evaluate_stages, evaluate_tensor_stages

POLICIES = ("step", "none", "tape")


def tape_is_needed() -> bool:
    """Whether forward mode or a transform of ``torch.func`` is active, which see through the tape alone."""
    in_forward_mode: bool = forward_ad._current_level >= 0
    return in_forward_mode or torch._C._are_functorch_transforms_active()


class Checkpoints(Protocol):
    """What a policy does on the road out and on the road back."""

    needs_graph: bool

    def store(self, x: list[Tensor], graphs: list[Stage] | None, random: tuple[RandomState, ...]) -> None:
        """Keeps what the policy wants of a step; ``x`` is the rounded state at its start, ``graphs`` its stages where
        ``needs_graph``, ``random`` the state of the random number generators before its first stage and, where that
        was evaluated at the end of the step before, before its second."""

    def tensors(self) -> list[Tensor]:
        """What is to be saved for the backward pass by autograd, which may offload or check it."""

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Takes back what ``tensors`` gave."""

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> list[Stage]:
        """The stages of a step at ``times``, the first ones or all, with their graphs; at every call anew."""

    def release(self, step: int) -> None:
        """Frees what is kept of a step that will not be loaded again."""


class KeptGraphs:
    """Policy "none": every stage's graph from the forward solve; nothing is evaluated again."""

    needs_graph = True

    def __init__(self) -> None:
        self.steps: list[list[Stage]] = []

    def store(self, x: list[Tensor], graphs: list[Stage] | None, random: tuple[RandomState, ...]) -> None:
        assert graphs is not None
        self.steps.append(graphs)

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> list[Stage]:
        return list(self.steps[step])

    def tensors(self) -> list[Tensor]:
        return []  # the graphs save their own

    def restore(self, tensors: Sequence[Tensor]) -> None:
        pass

    def release(self, step: int) -> None:
        self.steps[step] = []


class StepStates:
    """Policy "step": the rounded state at the start of each step; its stages are evaluated again."""

    needs_graph = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.states: list[list[Tensor]] = []
        self.random: list[tuple[RandomState, ...]] = []

    def store(self, x: list[Tensor], graphs: list[Stage] | None, random: tuple[RandomState, ...]) -> None:
        self.states.append(x)
        self.random.append(random)

    def tensors(self) -> list[Tensor]:
        tensors = [leaf for state in self.states for leaf in state]
        self.states = []
        return tensors

    def restore(self, tensors: Sequence[Tensor]) -> None:
        leaves = len(self.problem.leaves)
        self.states = [list(tensors[i : i + leaves]) for i in range(0, len(tensors), leaves)]

    def release(self, step: int) -> None:
        pass  # autograd holds the states until the backward pass is over

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> list[Stage]:
        problem, random = self.problem, self.random[step]
        if random:
            random[0].restore()
        y = self.states[step]
        # an alias: becoming a leaf of the graph must not show on the checkpoint
        x = [leaf.detach() for leaf in y]
        if problem.time_needs_grad:
            times = [time.detach().requires_grad_() for time in times]
        stages: list[Stage] = []
        first: Stage | None = None
        if len(random) == 2:
            first = Stage(times[0], x, problem.velocity.evaluate_with_graph(times[0], x))
            random[1].restore()
        if problem.velocity.is_plain:
            evaluate_tensor_stages(problem, y[0], x[0], h, times, first, stages)
        else:
            evaluate_stages(problem, y, x, h, times, first, stages)
        return stages


def new_checkpoints(problem: Problem) -> Checkpoints:
    """The policy that ``problem.checkpoint`` names."""
    return KeptGraphs() if problem.checkpoint == "none" else StepStates(problem)
