"""The families of methods: which options and callbacks each knows, and how it solves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from rampde.adams import AdamsMethod, AdamsOptions
from rampde.checkpoint import Checkpoint
from rampde.explicit import solve_explicit
from rampde.implicit import solve_implicit
from rampde.implicit_tableau import ImplicitTableau
from rampde.multistep import solve_multistep
from rampde.newton import NewtonOptions
from rampde.observer import CALLBACKS
from rampde.options import ADAPTIVE, FIXED, OptionNames
from rampde.problem import Problem
from rampde.scipy_solver import ScipyOptions, ScipySolver, solve_with_scipy
from rampde.tableau import ButcherTableau, EmbeddedTableau


@dataclass(frozen=True)
class Family:
    """What the front door must know of a method.

    Attributes:
        options: names of its options.
        solve: takes the problem and the leaves of y0 to the states that it returns.
        callbacks: attributes of f that are called during a solve.
        steps_on_the_way: whether its steps can be decided on the way, so that it can end at an event.
        has_tape: whether plain autograd can go through its steps, as forward mode and ``torch.func`` need.
        steps_again: whether a step can be taken again from the state at its start alone.
    """

    options: OptionNames
    solve: Callable[[Problem, list[Tensor]], list[Tensor]]
    callbacks: tuple[str, ...] = CALLBACKS[:1]
    steps_on_the_way: bool = False
    has_tape: bool = True
    steps_again: bool = False

    def check_policy(self, policy: Checkpoint, method: str) -> None:
        """Raises ValueError where the method cannot do with what ``policy`` keeps."""
        if self.steps_again:
            return
        if not policy.keeps_every_step or policy.quantiser is not None:
            raise ValueError(
                f'checkpoint is {policy!r}, with which method "{method}" cannot be differentiated: its steps follow'
                ' from more than the state at their start. Expected "none", "stage", "step", "lean", one of these'
                " offloaded, or an explicit Runge-Kutta method"
            )


def _names(options: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(options))


EMBEDDED = Family(ADAPTIVE, solve_explicit, CALLBACKS, steps_on_the_way=True, steps_again=True)
EXPLICIT = Family(FIXED, solve_explicit, steps_on_the_way=True, steps_again=True)
ADAMS = Family(FIXED.with_known(_names(AdamsOptions)), solve_multistep)
SCIPY = Family(
    OptionNames(_names(ScipyOptions), ("norm", "grid_points", "eps", "step_size")),
    solve_with_scipy,
    callbacks=(),
    has_tape=False,
    steps_again=True,  # there is no gradient that would ask for it
)
IMPLICIT = Family(FIXED.with_known(_names(NewtonOptions)), solve_implicit, has_tape=False)


def solves_equations(method: object) -> bool:
    """Whether a step takes the solution of an equation with f, and with that many products of one evaluation.

    ``method`` as :func:`rampde.methods.get_method` returned it.
    """
    return isinstance(method, ImplicitTableau) or (isinstance(method, AdamsMethod) and method.implicit)


def family_of(method: object) -> Family:
    """The family of a method that :func:`rampde.methods.get_method` returned."""
    if isinstance(method, EmbeddedTableau):
        return EMBEDDED
    if isinstance(method, ImplicitTableau):
        return IMPLICIT
    if isinstance(method, AdamsMethod):
        return ADAMS
    if isinstance(method, ScipySolver):
        return SCIPY
    assert isinstance(method, ButcherTableau)
    return EXPLICIT
