"""The ``options`` of each family of methods: names, defaults, checks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rampde.agreement import read_process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

INTERPOLATIONS = ("linear", "cubic")

CONTROLLERS = {
    "I": (0.0, 1.0, 0.0),
    # G. Soederlind, ACM Trans. Math. Softw. 29, 2003, table III: PI.4.2 and H312 PID
    "PI": (0.2, 0.4, 0.0),
    "PID": (-2 / 9, 2 / 9, 1 / 18),
}
"""Proportional, integral and derivative coefficient of the step size controllers."""

MAX_NUM_STEPS = 100_000
"""Attempts between two output times, by default: minutes for a small func, never for ever."""


@dataclass(frozen=True)
class FixedOptions:
    """Options of the fixed-step methods."""

    step_size: float | None = None
    grid_constructor: Callable[..., object] | None = None
    interp: str = "linear"
    perturb: bool = False

    @staticmethod
    def read(options: dict[str, Any]) -> FixedOptions:
        """Raises TypeError or ValueError where an option is not as expected."""
        step_size, constructor = options.get("step_size"), options.get("grid_constructor")
        if step_size is not None and constructor is not None:
            raise ValueError(
                "step_size and grid_constructor are mutually exclusive arguments, but options has both; expected one"
            )
        if step_size is not None:
            step_size = _positive("step_size", step_size)
        if constructor is not None and not callable(constructor):
            raise TypeError(f"grid_constructor is {constructor!r}, expected a callable (func, y0, t) -> grid")
        interp = options.get("interp", "linear")
        if interp not in INTERPOLATIONS:
            raise ValueError(f"Unknown interpolation method {interp!r}, expected one of {named(INTERPOLATIONS)}")
        return FixedOptions(step_size, constructor, interp, _flag("perturb", options.get("perturb", False)))


@dataclass(frozen=True)
class EqualOptions:
    """Steps of one size until an event."""

    step_size: float
    max_num_steps: int = MAX_NUM_STEPS


@dataclass(frozen=True)
class AdaptiveOptions:
    """Options of the adaptive methods.

    Attributes:
        first_step: size of the first step; None: chosen from the problem.
        safety, ifactor, dfactor: safety factor of the controller, and how much a step may grow or shrink at once.
        min_step, max_step: bounds of the step size; a step of ``min_step`` is always accepted.
        max_num_steps: attempts between two output times before the solve is given up.
        step_t, jump_t: times at which a step must end; at those of ``jump_t`` f jumps.
        norm: of the error in units of the tolerance, in the structure of the state; None: root mean square, the
            largest of the tensors of the state.
        dtype: to which the ends of the steps are rounded.
        batch_axis: 0: each sample has its own steps; None: all have the same.
        batch_tile: samples that leave a solve with steps of their own together, once all of them are done.
        coefficients: proportional, integral and derivative coefficient of the controller.
        process_group: processes that take the same steps, each with its part of the batch; None: each steps by itself.
    """

    first_step: float | None = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = MAX_NUM_STEPS
    step_t: tuple[float, ...] = ()
    jump_t: tuple[float, ...] = ()
    norm: Callable[[Any], Any] | None = None
    dtype: torch.dtype = torch.float64
    batch_axis: int | None = None
    batch_tile: int | None = 64
    coefficients: tuple[float, float, float] = CONTROLLERS["I"]
    process_group: ProcessGroup | None = None

    @staticmethod
    def read(options: dict[str, Any]) -> AdaptiveOptions:
        """Raises TypeError or ValueError where an option is not as expected."""
        values: dict[str, Any] = {}
        for name in ("first_step", "max_step"):
            if options.get(name) is not None:
                values[name] = _positive(name, options[name], finite=name == "first_step")
        for name in ("safety", "ifactor", "dfactor"):
            if name in options:
                values[name] = _positive(name, options[name])
        if "min_step" in options:
            values["min_step"] = number = _number("min_step", options["min_step"])
            if not 0 <= number < math.inf:
                raise ValueError(f"min_step is {options['min_step']!r}, expected a number that is not negative")
        if "max_num_steps" in options:
            count = _number("max_num_steps", options["max_num_steps"])
            if count < 1 or not count.is_integer():
                raise ValueError(f"max_num_steps is {count:g}, expected a positive integer")
            values["max_num_steps"] = int(count)
        for name in ("step_t", "jump_t"):
            if options.get(name) is not None:
                values[name] = _times(name, options[name])
        if options.get("norm") is not None:
            if not callable(options["norm"]):
                raise TypeError(f"norm is {options['norm']!r}, expected a callable")
            values["norm"] = options["norm"]
        if "dtype" in options:
            dtype = options["dtype"]
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"dtype is {dtype!r}, expected a floating point torch.dtype for the time")
            values["dtype"] = dtype
        values.update(_batch_options(options))
        values["coefficients"] = _coefficients(options)
        if options.get("process_group") is not None:
            values["process_group"] = read_process_group(options["process_group"])
        read = AdaptiveOptions(**values)
        if read.min_step > read.max_step:
            raise ValueError(f"min_step is {read.min_step} and max_step {read.max_step}, expected min_step <= max_step")
        if read.ifactor < 1 or read.dfactor > 1:
            raise ValueError(
                f"ifactor is {read.ifactor} and dfactor {read.dfactor}, expected ifactor >= 1 and dfactor <= 1"
            )
        both = sorted([*read.step_t, *read.jump_t])
        if len(set(both)) < len(both):
            raise ValueError(f"step_t and jump_t must not have any repeated elements between them, but are {both}")
        return read

    def rounded(self, time: float) -> float:
        """``time`` in the time's dtype."""
        return time if self.dtype == torch.float64 else float(torch.tensor(time, dtype=self.dtype))

    @staticmethod
    def stops(times: Sequence[float], start: float, sign: float) -> list[float]:
        """The ``times`` after ``start``, the nearest last."""
        ahead = [time for time in times if sign * (time - start) > 0]
        return sorted(ahead, key=lambda time: -sign * time)


@dataclass(frozen=True)
class OptionNames:
    """Names that a family of methods knows."""

    known: tuple[str, ...]
    # accepted without effect, as other families of methods use them
    ignored: tuple[str, ...] = field(default=())

    def with_known(self, names: tuple[str, ...]) -> OptionNames:
        """These names and further ones."""
        return OptionNames((*self.known, *names), self.ignored)


FIXED = OptionNames(("step_size", "grid_constructor", "interp", "perturb"), ("norm",))
ADAPTIVE = OptionNames(
    (
        "first_step", "safety", "ifactor", "dfactor", "min_step", "max_step", "max_num_steps", "step_t", "jump_t",
        "norm", "dtype", "batch_axis", "batch_tile", "controller", "pcoeff", "icoeff", "dcoeff",
        "process_group",
    )
)  # fmt: skip


def warn_of_unknown(options: dict[str, Any], names: OptionNames, method: str) -> None:
    """Warns of options that the method does not know, and so ignores."""
    unknown = {name: value for name, value in options.items() if name not in (*names.known, *names.ignored)}
    if unknown:
        warnings.warn(f"{method}: Unexpected arguments {unknown}; known are {named(names.known)}", stacklevel=4)


def named(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected a single number")
        value = value.item()
    # NumPy's numbers are real ones too
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a positive number")
    return float(value)


def _positive(name: str, value: object, finite: bool = True) -> float:
    number = _number(name, value)
    if not number > 0 or (finite and number == math.inf):
        raise ValueError(f"{name} is {number}, expected a positive{', finite' if finite else ''} number")
    return number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return value


def _times(name: str, value: object) -> tuple[float, ...]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} cannot require gradient, but requires_grad is True")
        value = value.detach().to("cpu", torch.float64).flatten().tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}, expected a tensor or a sequence of times")
    times = tuple(_number(name, item) for item in value)
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{name} is {times}, expected finite times")
    return times


def _batch_options(options: dict[str, Any]) -> dict[str, Any]:
    axis, tile = options.get("batch_axis"), options.get("batch_tile", AdaptiveOptions.batch_tile)
    if axis is not None and (isinstance(axis, bool) or axis != 0):
        raise ValueError(f"batch_axis is {axis!r}, expected 0, the first dimension of every tensor of y0, or None")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"batch_tile is {tile!r}, expected a positive integer or None")
    return {"batch_axis": axis, "batch_tile": tile}


def _coefficients(options: dict[str, Any]) -> tuple[float, float, float]:
    name = options.get("controller", "I")
    if name not in CONTROLLERS:
        raise ValueError(f"controller is {name!r}, expected one of {named(CONTROLLERS)}")
    p, i, d = CONTROLLERS[name]
    return (
        _number("pcoeff", options.get("pcoeff", p)),
        _number("icoeff", options.get("icoeff", i)),
        _number("dcoeff", options.get("dcoeff", d)),
    )
