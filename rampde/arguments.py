"""From the arguments of a solve to the problem it is: defaults, checks, and the one look at the device before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rampde import grid as grids
from rampde.agreement import Agreement
from rampde.autocast import switched_off
from rampde.capture import can_record, is_recorded
from rampde.checkpoint import Checkpoint
from rampde.checkpoint.policy import Auto
from rampde.checkpoint.read import read_checkpoint
from rampde.compilation import as_written
from rampde.events import EventSearch
from rampde.families import EMBEDDED, EXPLICIT, Family, family_of, solves_equations
from rampde.methods import DEFAULT, get_method
from rampde.observer import Observer
from rampde.options import AdaptiveOptions, EqualOptions, FixedOptions, warn_of_unknown
from rampde.problem import Problem
from rampde.scaling import DynamicScaler, automatic_scaler
from rampde.state import State, StateSpec
from rampde.statistics import Progress, new_solve
from rampde.tableau import ButcherTableau, ClosedTableau, EmbeddedTableau, close
from rampde.tape import tape_is_needed
from rampde.tolerance import read_tolerance
from rampde.traced import times_while_compiling
from rampde.velocity import Velocity


@dataclass
class Request:
    """A solve as it was asked for.

    ``leaves``: y0, real and dense; ``t``: the output times on the state's device.
    """

    problem: Problem
    family: Family
    leaves: list[Tensor]
    t: Tensor
    fixed: FixedOptions


def read_arguments(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: object,
    atol: object,
    method: object,
    options: dict[str, Any] | None,
    loss_scaler: object,
    velocity_dtype: torch.dtype | None,
    compensated: bool,
    checkpoint: object,
    memory_budget: object = None,
    cuda_graph: bool = False,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    progress: bool = False,
) -> Request:
    """Checks the arguments, which mean what :func:`rampde.odeint` says, and makes the problem of them."""
    if not callable(func):
        raise TypeError(f"func is a {type(func).__name__}, expected a callable func(t, y)")
    if event_fn is not None and not callable(event_fn):
        raise TypeError(f"event_fn is {event_fn!r}, expected a callable event_fn(t, y) or None")
    spec = StateSpec(y0)
    tolerance = read_tolerance(spec, rtol, atol)
    chosen = get_method(method)
    name = method if isinstance(method, str) else DEFAULT if method is None else "the given tableau"
    _check_time_tensor(t, batched=isinstance(options, dict) and options.get("batch_axis") is not None)
    if event_fn is not None and len(t) != 2:
        raise ValueError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    options = _check_options(options)
    family = family_of(chosen)
    adaptive = family is EMBEDDED
    if solves_equations(chosen):
        # many products are taken of one evaluation, and compiled graphs serve for one
        func = as_written(func)
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
    policy = read_checkpoint(checkpoint, memory_budget)
    if tape_is_needed():
        if not family.has_tape:
            raise RuntimeError(
                f'method "{name}" has no forward mode and no torch.func transforms, expected another one'
            )
        policy = Checkpoint("tape")
    elif torch.compiler.is_dynamo_compiling() and isinstance(policy, Auto):
        # what is measured and what is free are nothing that a compiled function could hold
        policy = Checkpoint("none")
    family.check_policy(policy, name)
    for flag, value in (("compensated", compensated), ("progress", progress), ("cuda_graph", cuda_graph)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag} is {value!r}, expected True or False")
    scaler, poison = _scaler(loss_scaler)
    if isinstance(control, AdaptiveOptions) and control.batch_axis is not None:
        _check_batch(spec, t, control, event_fn, policy, compensated)
    if event_fn is not None and not adaptive:
        if fixed.step_size is None:
            raise ValueError(
                "event_fn was given to a method with fixed steps without options['step_size'], expected a step"
                " size: the end of the solve is not known"
            )
        if family.steps_on_the_way:
            control = EqualOptions(fixed.step_size)

    leaves = spec.flatten(y0)
    agreement = _agreement(control, spec, leaves, t, event_fn)
    if cuda_graph:
        _check_recordable(spec, name, family, event_fn)
    being_recorded = is_recorded(spec.device)
    if being_recorded and (family is not EXPLICIT or event_fn is not None):
        until = " until an event" if event_fn is not None else ""
        raise RuntimeError(
            f'a solve with method "{name}"{until} looks at the device on the way, and a CUDA graph is being recorded;'
            ' expected an explicit method with fixed steps, such as method="rk4", or the solve outside of the graph'
        )
    if torch.compiler.is_dynamo_compiling():
        t, values = times_while_compiling(t, fixed)
    elif cuda_graph or being_recorded:
        needed = adaptive or fixed.step_size is not None or fixed.grid_constructor is not None
        values = _times_unread(t, needed, being_recorded)
    else:
        values = _read_host(spec, leaves, t)
    if t.device != spec.device:
        t = t.to(spec.device)
    stats = new_solve(name)
    bar = Progress(values[0], values[-1]) if progress else None
    own_steps = isinstance(control, AdaptiveOptions) and control.batch_axis is not None
    # a sample's steps are not the solve's, and the tapes of methods with a past or an equation tell nobody
    unheard = own_steps or (policy.is_tape and not family.steps_again)
    observer = Observer(func, spec, () if unheard else family.callbacks, name, stats, bar)
    problem = Problem(
        velocity=Velocity(func, spec, velocity_dtype, stats),
        method=chosen,
        tolerance=tolerance,
        options=options,
        grid=_time_grid(func, y0, t, values, fixed, adaptive or event_fn is not None, spec.device),
        checkpoint=policy,
        compensated=compensated,
        perturb=fixed.perturb,
        scaler=scaler,
        scaler_given=isinstance(loss_scaler, DynamicScaler),
        poison=poison,
        output_dtypes=[leaf.real_dtype for leaf in spec.leaves],
        closed=_closed(chosen, fixed) if control is not None else None,
        control=control,
        agreement=agreement,
        cuda_graph=cuda_graph and not being_recorded,
        recorded=being_recorded,
        search=None if event_fn is None else EventSearch(event_fn, spec, tolerance),
        output_times=values,
        observer=observer if observer.listening else None,
        stats=stats,
    )
    return Request(problem, family, leaves, t, fixed)


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


def _check_batch(
    spec: StateSpec, t: Tensor, control: AdaptiveOptions, event_fn: object, policy: Checkpoint, compensated: bool
) -> None:
    """What a solve must be for each sample to have its own steps."""
    shapes = [list(leaf.shape) for leaf in spec.leaves]
    if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"y0 has shapes {shapes}, expected the same first dimension in all of them, the batch of"
            " options['batch_axis']"
        )
    if t.dim() == 2 and t.shape[0] != shapes[0][0]:
        raise ValueError(f"t has shape {list(t.shape)}, expected (T,) or ({shapes[0][0]}, T), a row for each sample")
    given = [
        name
        for name, present in (
            ("options['norm']", control.norm is not None),
            ("options['step_t']", bool(control.step_t)),
            ("options['jump_t']", bool(control.jump_t)),
            ("options['process_group']", control.process_group is not None),
            ("event_fn", event_fn is not None),
            ("compensated", compensated),
            (
                f"checkpoint={policy.name!r}",
                policy.stages not in ("step", "tape") or not policy.keeps_every_step or policy.quantiser is not None,
            ),
        )
        if present
    ]
    if given:
        raise ValueError(f"options['batch_axis'] was given with {', '.join(given)}, expected one without the other")


def _agreement(control: object, spec: StateSpec, leaves: list[Tensor], t: Tensor, event_fn: object) -> Agreement | None:
    """With the other processes that take the same steps; all of them meet here."""
    if not isinstance(control, AdaptiveOptions) or control.process_group is None:
        return None
    if event_fn is not None:
        raise ValueError(
            "options['process_group'] was given with event_fn, expected one without the other: each process has an"
            " event of its own, after which it takes no more steps"
        )
    return Agreement(control.process_group, leaves, [leaf.shape.numel() for leaf in spec.leaves], t)


def _check_time_tensor(t: object, batched: bool) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"t is a {type(t).__name__}, expected a one-dimensional floating point tensor")
    if not t.is_floating_point():
        raise TypeError(f"t has dtype {t.dtype}, expected a floating point dtype")
    if t.layout != torch.strided or t.device.type == "meta":
        raise TypeError(f"t is a tensor of layout {t.layout} on {t.device}, expected a dense tensor with data")
    if t.dim() != 1 and not (batched and t.dim() == 2):
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


def _check_recordable(spec: StateSpec, method: str, family: Family, event_fn: object) -> None:
    """Whether a solve can be made of CUDA graphs."""
    if not can_record(spec.device):
        raise ValueError(f"cuda_graph is True and y0 is on {spec.device}, expected y0 on a CUDA device")
    if family not in (EXPLICIT, EMBEDDED):
        raise ValueError(f'cuda_graph is True with method "{method}", expected an explicit Runge-Kutta method')
    if event_fn is not None:
        raise ValueError("cuda_graph is True with event_fn, which the host evaluates in every step; expected one alone")
    if tape_is_needed():
        raise RuntimeError("cuda_graph is True in forward mode or a torch.func transform, which see no graph")


def _times_unread(t: Tensor, needed: bool, being_recorded: bool) -> list[float]:
    """The output times, without a look at the device where that can be: nan where they are not ``needed``."""
    if t.device.type != "cpu" and not needed:
        return [math.nan] * len(t)
    values = grids.known_times(t)
    if values is None:
        if being_recorded and t.device.type != "cpu":
            raise RuntimeError(
                "the values of t decide on the steps, and t is on a device that cannot be read while a CUDA graph is"
                " recorded; keep t on the CPU, solve once with the same t before recording, or let t hold every step"
            )
        values = grids.read_times(t)
        grids.check_times(values)
        grids.remember_times(t, values)
    return values


def _read_host(spec: StateSpec, leaves: list[Tensor], t: Tensor) -> list[float]:
    """The output times as floats, checked, and y0 checked to be finite: the one look at the device of a solve."""
    # a sum is finite only where all terms are: one pass, and a closer look only where it is not
    sums = [leaf.detach().sum() for leaf in leaves]
    if t.device == spec.device and spec.device.type != "cpu":
        dtype = grids.time_dtype(t.device)
        with switched_off(spec.device):
            totals_together = torch.stack([total.to(dtype) for total in sums])
            numbers = torch.cat([t.detach().to(dtype).flatten(), totals_together]).tolist()
        values, totals = numbers[: t.numel()], numbers[t.numel() :]
        grids.remember_times(t, values)
    else:
        if t.device != spec.device:
            warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
        values = t.detach().to("cpu", torch.float64).flatten().tolist()
        totals = [total.item() for total in sums]
    if t.dim() == 1:
        grids.check_times(values)
    else:
        values = _check_rows(values, t.shape[1])
    for leaf, values_of_leaf, total in zip(spec.leaves, leaves, totals, strict=True):
        if not math.isfinite(total) and not bool(torch.isfinite(values_of_leaf).all()):
            raise ValueError(f"{leaf.name} has elements that are not finite, expected a finite initial state")
    return values


def _check_rows(values: list[float], times: int) -> list[float]:
    """The first row of times, where each sample has its own and all go in the same direction."""
    rows = [values[start : start + times] for start in range(0, len(values), times)] if times else [[]]
    for row in rows or [[]]:
        grids.check_times(row)
        if times > 1 and (row[1] > row[0]) != (rows[0][1] > rows[0][0]):
            raise ValueError(
                f"t has a row from {rows[0][0]} to {rows[0][-1]} and one from {row[0]} to {row[-1]}, expected the same"
                " direction in all of them"
            )
    return rows[0]


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
