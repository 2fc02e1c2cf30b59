"""The front door: arguments, defaults, errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rampde import grid as grids
from rampde.autocast import switched_off
from rampde.checkpoint import POLICIES
from rampde.event_on_grid import solve_until_event
from rampde.events import EventSearch
from rampde.families import EMBEDDED, family_of
from rampde.interpolation import interpolate
from rampde.methods import DEFAULT, get_method
from rampde.observer import Observer
from rampde.options import AdaptiveOptions, EqualOptions, FixedOptions, named, warn_of_unknown
from rampde.problem import Problem
from rampde.scaling import DynamicScaler, automatic_scaler
from rampde.state import State, StateSpec
from rampde.statistics import Progress, new_solve
from rampde.tableau import ButcherTableau, ClosedTableau, EmbeddedTableau, close
from rampde.tolerance import read_tolerance
from rampde.velocity import Velocity


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: float | Tensor | Iterable[float] = 1e-7,
    atol: float | Tensor | Iterable[float] = 1e-9,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    loss_scaler: DynamicScaler | bool | object | None = None,
    velocity_dtype: torch.dtype | None = None,
    checkpoint: str = "step",
    compensated: bool = False,
    progress: bool = False,
) -> Any:
    """Solves ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, with 16-bit evaluations of ``func`` and 32-bit sums.

    A drop-in for ``torchdiffeq.odeint``. ``func`` runs under the caller's ``torch.autocast``; its input is rounded
    to ``velocity_dtype``, while state, adjoint and parameter gradients accumulate in float32 (float64 for a
    float64 state). Gradients flow to y0, t, and every tensor that ``func`` uses, by the discrete adjoint: they are
    the exact gradients of the discrete solution, up to rounding.

    Args:
        func: ``func(t, y)`` returns dy/dt in the structure, shapes and device of ``y0``. It receives ``t`` as a
            0-dim tensor of the real dtype of y0, and ``y`` with its floating point leaves in ``velocity_dtype``.
        y0: initial state: a floating point or complex tensor of any shape, or any nesting of tuples, lists and
            dicts of them.
        t: (T,) times, floating point, strictly increasing or decreasing, in the unit of ``func``'s time.
        rtol, atol: an element's error in a step may be ``atol + rtol * |y|``, for adaptive methods: numbers, tensors
            that broadcast to y0, or one of these for each tensor of y0.
        method: with adaptive steps "dopri5" (the default), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun";
            with fixed steps "euler", "midpoint", "heun2", "heun3", "ralston", "rk4" (the 3/8 rule, as in
            torchdiffeq), "rk4_classic"; a name given to :func:`rampde.register_method`; a
            :class:`rampde.EmbeddedTableau` or a :class:`rampde.ButcherTableau`.
        options: of adaptive methods ``first_step``, ``safety``, ``ifactor``, ``dfactor``, ``min_step``, ``max_step``,
            ``max_num_steps`` (between two output times, 100,000), ``step_t``, ``jump_t``, ``norm``, ``dtype``,
            ``controller`` ("I", "PI", "PID") with ``pcoeff``, ``icoeff``, ``dcoeff``, see
            :class:`rampde.options.AdaptiveOptions`; of fixed-step methods ``step_size`` (positive; default: the steps
            end on the points of t), ``grid_constructor`` (``(func, y0, t) -> grid``), ``interp`` ("linear" or
            "cubic", for outputs between steps), ``perturb`` (evaluate just inside the ends of a step).
        event_fn: ``event_fn(t, y)`` returns a tensor. The solve ends where its least element, each taken with the
            sign that makes it positive at the start, becomes zero; of ``t``, which must have two times, the second
            only says in which direction to go. Methods with fixed steps need ``step_size``. See also
            :func:`rampde.odeint_event`.
        loss_scaler: None scales the adjoint dynamically where float16 takes part; False does not; a
            :class:`rampde.DynamicScaler` does at any precision. Any other object, such as a
            ``torch.amp.GradScaler``, means that the caller scales the loss: not scaled here, and gradients are all
            inf when one is not finite.
        velocity_dtype: dtype to which the input of ``func`` is rounded; None: the autocast dtype where autocast
            is on, else the dtype of each leaf of y0. Complex leaves keep theirs.
        checkpoint: what is kept for the backward pass: "step" the rounded state of each step (stages are evaluated
            again, one step's graphs at a time), "none" the graph of every stage (nothing is evaluated again),
            "tape" what plain autograd keeps (forward mode; slower; parameter gradients are summed by autograd).
            Second derivatives work with all of them; for the first two the solve is then repeated on the tape.
        progress: show a progress bar (needs tqdm).
        compensated: sum the state with compensation for rounding (Kahan), at 8 more bytes per element and step.

    Returns:
        The states at ``t``: (T, *shape) for each tensor of y0, in the dtype of y0 and the structure of y0. With
        ``event_fn`` a pair of the event's time, 0-dim, and the states (2, *shape) at ``t[0]`` and at the event.

    Raises:
        TypeError, ValueError: an argument that is not as described; the message says what was given.
        RuntimeError: the steps became too small or too many, the message says where and what to do; f or the state
            is not finite.

    Warns:
        RuntimeWarning: the state left the range of float16; the message names the step and the time.
        UserWarning: an unknown option; tolerances that the precision of the velocity cannot reach.

    The scheme is that of Celledoni, Owren, Ruthotto, Yang, Mixed Precision Training of Neural ODEs,
    arXiv 2510.23498.
    """
    if not callable(func):
        raise TypeError(f"func is a {type(func).__name__}, expected a callable func(t, y)")
    if event_fn is not None and not callable(event_fn):
        raise TypeError(f"event_fn is {event_fn!r}, expected a callable event_fn(t, y) or None")
    spec = StateSpec(y0)
    tolerance = read_tolerance(spec, rtol, atol)
    chosen = get_method(method)
    name = method if isinstance(method, str) else DEFAULT if method is None else "the given tableau"
    _check_time_tensor(t)
    if event_fn is not None and len(t) != 2:
        raise ValueError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    options = _check_options(options)
    family = family_of(chosen)
    adaptive = family is EMBEDDED
    warn_of_unknown(options, family.options, name)
    fixed = FixedOptions() if adaptive else FixedOptions.read(options)
    control: AdaptiveOptions | EqualOptions | None = AdaptiveOptions.read(options) if adaptive else None
    if velocity_dtype is not None and velocity_dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise _bad("velocity_dtype", velocity_dtype, "a torch floating point dtype of 16, 32 or 64 bits, or None")
    if not isinstance(checkpoint, str):
        raise TypeError(f"checkpoint is {checkpoint!r}, expected one of {named(POLICIES)}")
    if checkpoint not in POLICIES:
        raise ValueError(f'checkpoint is "{checkpoint}", expected one of {named(POLICIES)}')
    for flag, value in (("compensated", compensated), ("progress", progress)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag} is {value!r}, expected True or False")
    scaler, poison = _scaler(loss_scaler)
    if event_fn is not None and not adaptive:
        if fixed.step_size is None:
            raise ValueError(
                "event_fn was given to a method with fixed steps without options['step_size'], expected a step"
                " size: the end of the solve is not known"
            )
        if family.steps_on_the_way:
            control = EqualOptions(fixed.step_size)

    leaves = spec.flatten(y0)
    values = _read_host(spec, leaves, t)
    if t.device != spec.device:
        t = t.to(spec.device)
    stats = new_solve(name)
    bar = Progress(values[0], values[-1]) if progress else None
    observer = Observer(func, spec, family.callbacks, name, stats, bar)
    problem = Problem(
        velocity=Velocity(func, spec, velocity_dtype, stats),
        method=chosen,
        tolerance=tolerance,
        options=options,
        grid=_time_grid(func, y0, t, values, fixed, adaptive or event_fn is not None, spec.device),
        checkpoint=checkpoint,
        compensated=compensated,
        perturb=fixed.perturb,
        scaler=scaler,
        scaler_given=isinstance(loss_scaler, DynamicScaler),
        poison=poison,
        output_dtypes=[leaf.real_dtype for leaf in spec.leaves],
        closed=_closed(chosen, fixed) if control is not None else None,
        control=control,
        search=None if event_fn is None else EventSearch(event_fn, spec, tolerance),
        output_times=values,
        observer=observer if observer.listening else None,
        stats=stats,
    )
    try:
        if control is not None:
            states = family.solve(problem, leaves)
        elif event_fn is not None:
            states = solve_until_event(problem, leaves, fixed, family.solve)
        else:
            if any(output.inside for output in problem.grid.outputs):
                # between steps the states are interpolated before they are rounded
                problem.output_dtypes = [leaf.state_dtype for leaf in spec.leaves]
            states = interpolate(problem, family.solve(problem, leaves), t, fixed.interp)
    finally:
        observer.close()
    solution = spec.unflatten(states)
    if event_fn is None:
        return solution
    assert problem.event_time is not None
    return torch.tensor(problem.event_time, dtype=t.dtype, device=t.device), solution


def _closed(method: object, fixed: FixedOptions) -> ClosedTableau:
    """The method with the interpolant that outputs and events need."""
    if isinstance(method, EmbeddedTableau):
        return method.closed
    assert isinstance(method, ButcherTableau)
    return close(method, linear=fixed.interp == "linear")


def _bad(name: str, value: object, expected: str) -> TypeError | ValueError:
    kind = ValueError if isinstance(value, torch.dtype) else TypeError
    return kind(f"{name} is {value!r}, expected {expected}")


def _check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(f"options is a {type(options).__name__}, expected a dict")
    return dict(options)


def _check_time_tensor(t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"t is a {type(t).__name__}, expected a one-dimensional floating point tensor")
    if not t.is_floating_point():
        raise TypeError(f"t has dtype {t.dtype}, expected a floating point dtype")
    if t.layout != torch.strided or t.device.type == "meta":
        raise TypeError(f"t is a tensor of layout {t.layout} on {t.device}, expected a dense tensor with data")
    if t.dim() != 1:
        raise ValueError(f"t has shape {list(t.shape)}, expected one dimension")


def _scaler(loss_scaler: object) -> tuple[DynamicScaler | None, bool]:
    """The scaler, and whether one non-finite gradient is to make all of them infinite."""
    if loss_scaler is None:
        return automatic_scaler(), False
    if isinstance(loss_scaler, DynamicScaler):
        return loss_scaler, False
    if isinstance(loss_scaler, type):
        raise TypeError(f"loss_scaler is the class {loss_scaler.__name__}, expected an instance, None or False")
    if loss_scaler is True or (isinstance(loss_scaler, str | int | float | Tensor) and loss_scaler is not False):
        raise TypeError(f"loss_scaler is {loss_scaler!r}, expected None, False, a DynamicScaler or a GradScaler")
    return None, True


def _read_host(spec: StateSpec, leaves: list[Tensor], t: Tensor) -> list[float]:
    """The output times as floats, checked, and y0 checked to be finite: the one look at the device of a solve."""
    # a sum is finite only where all terms are: one pass, and a closer look only where it is not
    sums = [leaf.detach().sum() for leaf in leaves]
    if t.device == spec.device and spec.device.type != "cpu":
        dtype = grids.time_dtype(t.device)
        with switched_off(spec.device):
            numbers = torch.cat([t.detach().to(dtype), torch.stack([total.to(dtype) for total in sums])]).tolist()
        values, totals = numbers[: len(t)], numbers[len(t) :]
    else:
        if t.device != spec.device:
            warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
        values, totals = t.detach().to("cpu", torch.float64).tolist(), [total.item() for total in sums]
    grids.check_times(values)
    for leaf, values_of_leaf, total in zip(spec.leaves, leaves, totals, strict=True):
        if not math.isfinite(total) and not bool(torch.isfinite(values_of_leaf).all()):
            raise ValueError(f"{leaf.name} has elements that are not finite, expected a finite initial state")
    return values


def _time_grid(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    values: list[float],
    options: FixedOptions,
    on_the_way: bool,
    device: torch.device,
) -> grids.TimeGrid:
    if on_the_way:
        return grids.TimeGrid(t.to(grids.time_dtype(device)), values[:1], [])
    if options.step_size is not None:
        grid = grids.grid_of_step_size(t, values, options.step_size, device)
    elif options.grid_constructor is not None:
        grid = grids.grid_of_points(options.grid_constructor(func, y0, t), t, values, device)
    else:
        return grids.grid_of_outputs(t, values, device)
    if options.interp == "cubic" and t.requires_grad:
        # the slope of the interpolant is the derivative with respect to t, at the ends of steps too
        return grid.with_outputs_inside()
    return grid
