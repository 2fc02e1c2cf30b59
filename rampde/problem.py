"""What one solve is, decided before it starts and shared by the road out and the road back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from rampde.grid import StepTimes, TimeGrid
from rampde.randomness import RandomState
from rampde.scaling import DynamicScaler
from rampde.tableau import ButcherTableau, Combination
from rampde.tolerance import Tolerance
from rampde.velocity import Velocity


@dataclass(slots=True)
class Stage:
    """One evaluation of f: its arguments and its result, which carries the graph when one was recorded."""

    time: Tensor
    x: list[Tensor]
    k: list[Tensor]


@dataclass
class Problem:
    """One solve.

    Attributes:
        velocity: f and the structure of its state.
        method: the method; its class says which family it is of.
        tolerance: tolerances of the error control, or of the iterations of an implicit method.
        options: options that the family of the method knows, checked.
        grid: steps and outputs.
        checkpoint: "step", "none" or "tape".
        compensated: whether the state is summed with compensation.
        perturb: whether f is evaluated just inside the ends of a step.
        scaler: dynamic loss scaling of the adjoint; None for none.
        scaler_given: whether the caller gave the scaler, and is told by an error when it fails.
        poison: without a scaler, whether one non-finite gradient makes all of them infinite, so that a
            ``GradScaler`` skips the step.
        output_dtypes: dtype of each leaf of the result.
        step_times: step sizes and stage times, once the solve has begun.
        first: the evaluation at the start, done before the solve as it shows what f returns and captures; None
            where there are no steps.
        random: state of the random number generators before ``first``; None when f draws no random numbers.
        time_needs_grad: whether the grid points require a gradient.
        captures: tensors f uses that require a gradient, known after the first stage.
        opaque: whether f keeps tensors where they cannot be found but by evaluating it.
    """

    velocity: Velocity
    method: object
    tolerance: Tolerance
    options: dict[str, Any]
    grid: TimeGrid
    checkpoint: str
    compensated: bool
    perturb: bool
    scaler: DynamicScaler | None
    scaler_given: bool
    poison: bool
    output_dtypes: list[torch.dtype]
    step_times: StepTimes | None = None
    first: Stage | None = None
    random: RandomState | None = None
    time_needs_grad: bool = False
    captures: list[Tensor] = field(default_factory=list)
    opaque: bool = False

    @property
    def tableau(self) -> ButcherTableau:
        """The tableau of an explicit Runge-Kutta method."""
        return cast(ButcherTableau, self.method)

    @cached_property
    def kept(self) -> list[int]:
        """Indices of the grid points whose states the solve returns."""
        return self.grid.kept

    @cached_property
    def later_stages(self) -> list[tuple[int, Combination]]:
        """All stages but the first, with what enters their inputs."""
        return list(enumerate(self.tableau.stage_inputs))[1:]

    @property
    def leaves(self) -> range:
        return range(len(self.velocity.spec.leaves))
