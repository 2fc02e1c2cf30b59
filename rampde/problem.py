"""What one solve is, decided before it starts and shared by the road out and the road back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rampde.agreement import Agreement
from rampde.checkpoint.policy import Checkpoint
from rampde.grid import StepSequence, TimeGrid
from rampde.options import AdaptiveOptions, EqualOptions
from rampde.randomness import RandomState
from rampde.scaling import DynamicScaler
from rampde.statistics import SolveStats
from rampde.tableau import ButcherTableau, ClosedTableau, Combination
from rampde.tolerance import Tolerance
from rampde.velocity import Velocity

if TYPE_CHECKING:
    from rampde.events import EventSearch
    from rampde.observer import Observer
    from rampde.per_sample import BatchStep


@dataclass(slots=True)
class Stage:
    """One evaluation of f: its arguments and its result, which carries the graph when one was recorded.

    Of a result that only a product is to be taken of, its place in the graph is enough.
    ``random``: state of the random number generators before it, where it is to be made again.
    """

    time: Tensor
    x: list[Any]
    k: list[Any]
    random: RandomState | None = None


@dataclass
class Problem:
    """One solve.

    Attributes:
        velocity: f and the structure of its state.
        method: the method; its class says which family it is of.
        tolerance: tolerances of the error control, or of the iterations of an implicit method.
        options: options that the family of the method knows, checked.
        grid: steps and outputs; of a solve whose steps are decided on the way, known once it is over.
        checkpoint: what is kept for the backward pass.
        compensated: whether the state is summed with compensation.
        perturb: whether f is evaluated just inside the ends of a step.
        scaler: dynamic loss scaling of the adjoint; None for none.
        scaler_given: whether the caller gave the scaler, and is told by an error when it fails.
        poison: without a scaler, whether one non-finite gradient makes all of them infinite, so that a
            ``GradScaler`` skips the step.
        output_dtypes: dtype of each leaf of the result.
        closed: the tableau of a solve whose steps are decided on the way; None where the grid is known before.
        control: the options of its steps: adaptive ones, or the size of equal ones.
        agreement: with the other processes of a batch-sharded solve, about the steps; None where each steps by itself.
        cuda_graph: whether it is to be recorded and repeated.
        recorded: whether it is being recorded, so that nothing on the device can be read.
        search: the event that ends it, where there is one; ``event_time`` is where it was found.
        output_times: the times of the user's ``t``.
        observer: is told of the steps; None where nobody listens.
        stats: counts what the solve costs, where that is asked for.
        step_times: step sizes and stage times, once the solve has begun.
        batch_steps: the steps that were taken, where each sample has its own.
        first: the evaluation at the start, done before the solve as it shows what f returns and captures; None
            where there are no steps.
        random: state of the random number generators before ``first``; None when f draws no random numbers.
        time_needs_grad: whether the grid points require a gradient.
        captures: tensors f uses that require a gradient, known after the first stage.
        opaque: whether f keeps tensors where they cannot be found but by evaluating it.
        buffers: tensors of modules in training that f may change when it is evaluated, such as running means.
    """

    velocity: Velocity
    method: object
    tolerance: Tolerance
    options: dict[str, Any]
    grid: TimeGrid
    checkpoint: Checkpoint
    compensated: bool
    perturb: bool
    scaler: DynamicScaler | None
    scaler_given: bool
    poison: bool
    output_dtypes: list[torch.dtype]
    closed: ClosedTableau | None = None
    control: AdaptiveOptions | EqualOptions | None = None
    agreement: Agreement | None = None
    cuda_graph: bool = False
    recorded: bool = False
    search: EventSearch | None = None
    event_time: float | None = None
    output_times: list[float] = field(default_factory=list)
    observer: Observer | None = None
    stats: SolveStats | None = None
    step_times: StepSequence | None = None
    batch_steps: list[BatchStep] | None = None
    first: Stage | None = None
    random: RandomState | None = None
    time_needs_grad: bool = False
    captures: list[Tensor] = field(default_factory=list)
    opaque: bool = False
    buffers: list[Tensor] = field(default_factory=list)

    @property
    def tableau(self) -> ButcherTableau:
        """The tableau of an explicit Runge-Kutta method."""
        return cast(ButcherTableau, self.method) if self.closed is None else self.closed

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to integrate: no time but the first, and no event to look for."""
        return len(self.output_times) == 1

    @property
    def per_sample(self) -> bool:
        """Whether each sample of the batch has its own steps."""
        return isinstance(self.control, AdaptiveOptions) and self.control.batch_axis is not None

    @property
    def norm_is_fused(self) -> bool:
        """Whether one operator updates the state and takes the norm of its error."""
        adaptive = isinstance(self.control, AdaptiveOptions) and self.control.norm is None
        return adaptive and self.tolerance.uniform and not any(x.dtype.is_complex for x in self.velocity.spec.leaves)

    @property
    def end_is_a_stage(self) -> bool:
        """Whether the next step begins where the last stage was evaluated, before the compensated sum was formed."""
        closed = self.closed
        last = closed is not None and closed.attempted == closed.stages
        return last and self.compensated and self.norm_is_fused

    def first_time(self) -> Tensor:
        """The initial time as f receives it."""
        if self.per_sample:
            shape = self.velocity.spec.leaves[0].shape
            start = self.grid.points[..., 0].expand(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
            return start.to(self.velocity.spec.time_dtype)
        if self.step_times is not None:
            return self.step_times[0][1][0]
        return self.grid.points[0].to(self.velocity.spec.time_dtype)

    def event_at(self, index: int) -> bool:
        """Whether the output is that of an event, whose time is not one that the user gave."""
        return self.search is not None and index == 1

    @property
    def sign(self) -> float:
        """-1 in reverse time."""
        return -1.0 if self.output_times[-1] < self.output_times[0] else 1.0

    @cached_property
    def kept(self) -> list[int]:
        """Indices of the grid points whose states the solve returns."""
        return self.grid.kept

    @cached_property
    def later_stages(self) -> list[tuple[int, Combination]]:
        """All stages but the first, with what enters their inputs."""
        return list(enumerate(self.tableau.stage_inputs))[1:]

    @property
    def evaluated_again(self) -> int:
        """How many stages of a step, the first ones, have a part in gradients; 1 of a multistep method."""
        if isinstance(self.method, ButcherTableau):
            return self.tableau.cotangents[0].stage + 1
        return 1

    @property
    def leaves(self) -> range:
        return range(len(self.velocity.spec.leaves))
