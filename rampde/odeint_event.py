"""The time of an event as a differentiable result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rampde.graph_break import breaks_graph
from rampde.grid import time_dtype
from rampde.odeint import odeint
from rampde.state import StateSpec
from rampde.velocity import Velocity


@breaks_graph
def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solves until an event, and gives the event's time and state with their gradients.

    With ``c(t, y) = 0`` at the event, its time moves by ``dt = -(dc/dy dy + dc/dp dp) / (dc/dt + dc/dy f)`` when the
    solution or a parameter p of ``event_fn`` does (the implicit function theorem; R. T. Q. Chen, B. Amos, M. Nickel,
    Learning Neural Event Functions for Ordinary Differential Equations, 2021, section 3.1), and its state by
    ``f dt`` more.

    Args:
        func, y0: as of :func:`rampde.odeint`.
        t0: initial time, a tensor with one element.
        event_fn: as of :func:`rampde.odeint`; tensors that it uses get their gradients.
        reverse_time: look for the event at times before ``t0``.
        odeint_interface: :func:`rampde.odeint`, :func:`rampde.odeint_adjoint` or a function with their signature.
        kwargs: further arguments of the interface.

    Returns:
        The event's time, 0-dim in the dtype of ``t0``, and the states (2, *shape) at ``t0`` and at the event.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`rampde.odeint`. Second derivatives raise a RuntimeError.
    """
    if not isinstance(t0, Tensor):
        raise TypeError(f"t0 is a {type(t0).__name__}, expected a floating point tensor with one element")
    if t0.numel() != 1:
        raise ValueError(f"t0 has shape {list(t0.shape)}, expected a single element")
    start = t0.reshape(1)
    direction = -1.0 if reverse_time else 1.0
    t = torch.cat([start, start.detach() + direction])
    time, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    spec = StateSpec(y0)
    leaves = spec.flatten(solution)
    if not torch.is_grad_enabled():
        return time, solution
    states = [leaf[-1] for leaf in leaves]
    values = event_fn(time.detach().to(time_dtype(spec.device)), spec.unflatten(states))
    if not values.requires_grad:
        return time, solution
    with torch.no_grad():
        signs = torch.sign(event_fn(start[0].detach().to(time_dtype(spec.device)), y0))
    condition = (values * signs).min()
    velocity = Velocity(func, spec, kwargs.get("velocity_dtype"))
    moves, slope = _moves(velocity, event_fn, signs, time, states)
    # differentiable in all that the condition depends on, and zero in value
    shift = -(condition - condition.detach()) / slope
    moved_time = time.detach() + _first_derivative(shift).to(time.dtype)
    moved = []
    for leaf, move in zip(leaves, moves, strict=True):
        last = leaf[-1] + move.to(leaf.dtype) * _first_derivative(shift).to(leaf.dtype)
        moved.append(torch.cat([leaf[:-1], last[None]]))
    return moved_time, spec.unflatten(moved)


def _moves(
    velocity: Velocity,
    event_fn: Callable[[Tensor, Any], Tensor],
    signs: Tensor,
    time: Tensor,
    states: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """f at the event, and how fast the condition changes along the solution."""
    spec = velocity.spec
    with torch.no_grad():
        x = [state.detach().to(dtype) for state, dtype in zip(states, velocity.dtypes, strict=True)]
        moves = [value.detach() for value in velocity.evaluate(time.detach().to(spec.time_dtype), x)]
    with torch.enable_grad():
        at = time.detach().to(time_dtype(spec.device)).requires_grad_()
        y = [state.detach().requires_grad_() for state in states]
        condition = (event_fn(at, spec.unflatten(y)) * signs).min()
        by_time, *by_state = torch.autograd.grad(condition, [at, *y], allow_unused=True)
    slope = torch.zeros_like(at) if by_time is None else by_time
    for gradient, move in zip(by_state, moves, strict=True):
        if gradient is not None:
            slope = slope + (gradient.double() * move.double()).sum().to(slope.dtype)
    return moves, slope.detach()


def _first_derivative(value: Tensor) -> Tensor:
    result: Tensor = _FirstDerivative.apply(value)  # type: ignore[no-untyped-call]
    return result


class _FirstDerivative(torch.autograd.Function):
    """The identity, whose derivative cannot be differentiated: the event's time is linearised, which says nothing of
    second derivatives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return gradients[0]
        # a gradient without a graph would pass for one whose derivative is zero; on the way to any input lies the value
        (value,) = ctx.saved_tensors
        refused: Tensor = _NoSecondDerivative.apply(gradients[0], value)  # type: ignore[no-untyped-call]
        return refused


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "second derivatives of the time of an event are not available; differentiate odeint at the event's time,"
            " held fixed, instead"
        )
