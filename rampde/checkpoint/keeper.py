"""What of one solve is kept: the common face of all policies on the road out and on the road back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rampde.checkpoint.fp8 import Fp8, Quantised
from rampde.checkpoint.recomputed import Stages
from rampde.problem import Stage
from rampde.randomness import RandomState


@dataclass(slots=True)
class StepStart:
    """Where a step begins.

    Attributes:
        y: the state, leaf by leaf.
        x: what f sees of it, the input of the first stage.
        compensation: what the sum that made ``y`` has rounded away; None where that is not asked for.
        random: state of the random number generators before the first stage and, where that was evaluated at the end
            of the step before, before the second one; empty where f draws none.
        quantised: the change of ``y`` over the step before, backwards, as the kernel that ended that step has written
            it; None where that was not asked for, and at the first step.
    """

    y: list[Tensor]
    x: list[Tensor]
    compensation: Sequence[Tensor | None]
    random: tuple[RandomState, ...] = ()
    quantised: list[Quantised] | None = None


class Checkpoints:
    """What of the steps of one solve is kept.

    Attributes:
        keeps_graphs: whether graphs are kept, of some steps at least.
        needs_graph: whether the stages of the next step are to be evaluated with their graphs.
        needs_stages: whether ``store`` is to be given the stages of each step.
        quantiser: makes that form in which the kernel that ends a step writes the change of the state, if it is to.
    """

    keeps_graphs = False
    needs_graph = False
    needs_stages = False
    quantiser: Fp8 | None = None

    def store(self, start: StepStart, stages: list[Stage] | None) -> None:
        """Keeps what the policy wants of the step that begins at ``start``, the next one in order."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """What is to be saved for the backward pass by autograd, which may offload or check it."""
        return []

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Takes back what ``tensors`` gave, when a backward pass begins."""

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> Stages:
        """The stages of a step at ``times``, the first ones or all; steps come in reverse order, and a sweep that was
        stopped by an overflow may go back to a later one."""
        raise NotImplementedError

    def release(self, step: int) -> None:
        """Frees what is kept of a step that will not be loaded again."""

    def rest(self) -> None:
        """A backward pass is over, and another one may follow: forgets what ``restore`` took."""

    def clear(self) -> None:
        """Forgets everything."""
        raise NotImplementedError
