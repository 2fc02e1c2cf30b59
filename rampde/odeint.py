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
from rampde.interpolation import METHODS as INTERPOLATIONS
from rampde.interpolation import interpolate
from rampde.methods import get_tableau
from rampde.problem import Problem
from rampde.scaling import DynamicScaler, automatic_scaler
from rampde.solve import solve
from rampde.state import State, StateSpec
from rampde.tableau import ButcherTableau
from rampde.tolerance import read_tolerance
from rampde.velocity import Velocity

OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "norm")


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
        rtol, atol: tolerances of adaptive methods; the fixed-step methods do not use them.
        method: "euler", "midpoint", "heun2", "heun3", "ralston", "rk4" (the 3/8 rule, as in torchdiffeq),
            "rk4_classic", a name given to :func:`rampde.register_method`, or a :class:`rampde.ButcherTableau`.
        options: ``step_size`` (positive; default: the steps end on the points of t), ``grid_constructor``
            (``(func, y0, t) -> grid``), ``interp`` ("linear" or "cubic", for outputs between steps), ``perturb``
            (evaluate just inside the ends of a step).
        event_fn: not supported by fixed-step methods.
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
        compensated: sum the state with compensation for rounding (Kahan), at 8 more bytes per element and step.

    Returns:
        The states at ``t``: (T, *shape) for each tensor of y0, in the dtype of y0 and the structure of y0.

    Raises:
        TypeError, ValueError: an argument that is not as described; the message says what was given.

    Warns:
        RuntimeWarning: the state left the range of float16; the message names the step and the time.
        UserWarning: an unknown option.

    The scheme is that of Celledoni, Owren, Ruthotto, Yang, Mixed Precision Training of Neural ODEs,
    arXiv 2510.23498.
    """
    if not callable(func):
        raise TypeError(f"func is a {type(func).__name__}, expected a callable func(t, y)")
    if event_fn is not None:
        raise ValueError("event_fn was given, but event handling is not part of this release; expected None")
    spec = StateSpec(y0)
    tolerance = read_tolerance(spec, rtol, atol)
    tableau = get_tableau(method)
    _check_time_tensor(t)
    chosen = _check_options(options, method)
    if velocity_dtype is not None and velocity_dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise _bad("velocity_dtype", velocity_dtype, "a torch floating point dtype of 16, 32 or 64 bits, or None")
    if not isinstance(checkpoint, str):
        raise TypeError(f"checkpoint is {checkpoint!r}, expected one of {_list(POLICIES)}")
    if checkpoint not in POLICIES:
        raise ValueError(f'checkpoint is "{checkpoint}", expected one of {_list(POLICIES)}')
    if not isinstance(compensated, bool):
        raise TypeError(f"compensated is {compensated!r}, expected True or False")
    scaler, poison = _scaler(loss_scaler)

    leaves = spec.flatten(y0)
    values = _read_host(spec, leaves, t)
    if t.device != spec.device:
        t = t.to(spec.device)
    time_grid = _time_grid(func, y0, t, values, chosen, spec.device)
    own_grid = chosen["step_size"] is None and chosen["grid_constructor"] is None
    if chosen["interp"] == "cubic" and t.requires_grad and not own_grid:
        # the slope of the interpolant is the derivative with respect to t, at the ends of steps too
        time_grid = time_grid.with_outputs_inside()
    inside = any(output.inside for output in time_grid.outputs)
    problem = Problem(
        velocity=Velocity(func, spec, velocity_dtype),
        method=tableau,
        tolerance=tolerance,
        options=chosen,
        grid=time_grid,
        checkpoint=checkpoint,
        compensated=compensated,
        perturb=chosen["perturb"],
        scaler=scaler,
        scaler_given=isinstance(loss_scaler, DynamicScaler),
        poison=poison,
        # between steps the states are interpolated before they are rounded
        output_dtypes=[leaf.state_dtype if inside else leaf.real_dtype for leaf in spec.leaves],
    )
    states = solve(problem, leaves)
    return spec.unflatten(interpolate(problem, states, t, chosen["interp"]))


def _bad(name: str, value: object, expected: str) -> TypeError | ValueError:
    kind = ValueError if isinstance(value, torch.dtype) else TypeError
    return kind(f"{name} is {value!r}, expected {expected}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _check_time_tensor(t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"t is a {type(t).__name__}, expected a one-dimensional floating point tensor")
    if not t.is_floating_point():
        raise TypeError(f"t has dtype {t.dtype}, expected a floating point dtype")
    if t.layout != torch.strided or t.device.type == "meta":
        raise TypeError(f"t is a tensor of layout {t.layout} on {t.device}, expected a dense tensor with data")
    if t.dim() != 1:
        raise ValueError(f"t has shape {list(t.shape)}, expected one dimension")


def _check_options(options: dict[str, Any] | None, method: object) -> dict[str, Any]:
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise TypeError(f"options is a {type(options).__name__}, expected a dict")
    unknown = {name: value for name, value in options.items() if name not in OPTIONS}
    if unknown:
        name = method if isinstance(method, str) else "the given tableau"
        warnings.warn(f"{name}: Unexpected arguments {unknown}; known are {_list(OPTIONS)}", stacklevel=3)
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise ValueError(
            "step_size and grid_constructor are mutually exclusive arguments, but options has both; expected one"
        )
    if step_size is not None:
        step_size = _step_size(step_size)
    if constructor is not None and not callable(constructor):
        raise TypeError(f"grid_constructor is {constructor!r}, expected a callable (func, y0, t) -> grid")
    interp = options.get("interp", "linear")
    if interp not in INTERPOLATIONS:
        raise ValueError(f"Unknown interpolation method {interp!r}, expected one of {_list(INTERPOLATIONS)}")
    perturb = options.get("perturb", False)
    if not isinstance(perturb, bool):
        raise TypeError(f"perturb is {perturb!r}, expected True or False")
    return {"step_size": step_size, "grid_constructor": constructor, "interp": interp, "perturb": perturb}


def _step_size(value: object) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"step_size has shape {list(value.shape)}, expected a single number")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"step_size is {value!r}, expected a positive number")
    if not 0 < value < math.inf:
        raise ValueError(f"step_size is {value!r}, expected a positive, finite number")
    return float(value)


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
    options: dict[str, Any],
    device: torch.device,
) -> grids.TimeGrid:
    if options["step_size"] is not None:
        return grids.grid_of_step_size(t, values, options["step_size"], device)
    if options["grid_constructor"] is not None:
        return grids.grid_of_points(options["grid_constructor"](func, y0, t), t, values, device)
    return grids.grid_of_outputs(t, values, device)
