"""Solves by the integrators of SciPy, which run in float64 on the host and have no gradient."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rampde.captures import Captures, record
from rampde.problem import Problem, Stage
from rampde.state import Leaf
from rampde.tolerance import Bound

SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")

ADVICE = (
    'method "scipy_solver" has no gradient; use odeint_adjoint, which solves a differential equation for the gradient,'
    " another method, or torch.no_grad() where none is wanted"
)


@dataclass(frozen=True)
class ScipySolver:
    """``scipy.integrate.solve_ivp`` as a method; its options are those of :class:`ScipyOptions`."""


SCIPY_METHODS: dict[str, ScipySolver] = {"scipy_solver": ScipySolver()}


@dataclass(frozen=True)
class ScipyOptions:
    """Options of :class:`ScipySolver`.

    Attributes:
        solver: name of an integrator of SciPy, or a class derived from ``scipy.integrate.OdeSolver``.
        min_step, max_step: bounds of the step size; only LSODA has a lower one.
    """

    solver: Any = "LSODA"
    min_step: float = 0.0
    max_step: float = math.inf


def read_options(options: dict[str, Any]) -> ScipyOptions:
    """The options of :class:`ScipySolver` among ``options``; others, and None, are left alone.

    Raises:
        TypeError, ValueError: an option that is not as :class:`ScipyOptions` says.
    """
    given = {name: options.get(name) for name in ("solver", "min_step", "max_step")}
    read = ScipyOptions(**{name: value for name, value in given.items() if value is not None})
    if isinstance(read.solver, str):
        if read.solver not in SOLVERS:
            known = ", ".join(f'"{name}"' for name in SOLVERS)
            raise ValueError(f'solver is "{read.solver}", expected one of {known}')
    elif not isinstance(read.solver, type):
        raise TypeError(f"solver is {read.solver!r}, expected a name or a class derived from scipy.integrate.OdeSolver")
    for name in ("min_step", "max_step"):
        value = getattr(read, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 <= read.min_step < math.inf:
        raise ValueError(f"min_step is {read.min_step}, expected a number that is not negative")
    if not read.max_step > 0:
        raise ValueError(f"max_step is {read.max_step}, expected a positive number")
    return read


def solve_with_scipy(problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """States at the grid points, leaf by leaf, as :func:`rampde.roads.travel` returns them, by SciPy.

    Where anything requires a gradient, the result does too, so that taking it raises an error.

    Raises:
        ImportError: SciPy is not installed.
        TypeError, ValueError: an option that is not as expected.
        RuntimeError: the integration failed, or f returned something that is not finite; the message says where.

    Warns:
        UserWarning: something requires a gradient, which there will not be.
    """
    options = read_options(problem.options)
    try:
        integrate = importlib.import_module("scipy.integrate")
    except ImportError as error:
        raise ImportError('method "scipy_solver" needs SciPy: pip install scipy') from error
    velocity, grid = problem.velocity, problem.grid
    if grid.steps == 0:
        return [leaf[None].to(dtype) for leaf, dtype in zip(y0, problem.output_dtypes, strict=True)]
    time = grid.points[0].detach().to(velocity.spec.time_dtype)
    x = [leaf.detach().to(dtype) for leaf, dtype in zip(y0, velocity.dtypes, strict=True)]
    captures = Captures()
    if torch.is_grad_enabled():
        k, captures = record(velocity.original, velocity.evaluate_first, time, x)
    else:
        k = velocity.evaluate_first(time, x)
    problem.first = Stage(time, x, [value.detach() for value in k])
    problem.captures = captures.tensors
    with torch.no_grad():
        outputs = _integrate(integrate, problem, y0, options)
    if not torch.is_grad_enabled():
        return outputs
    tensors = [tensor for tensor in (grid.points, *y0, *captures.tensors) if tensor.requires_grad]
    if captures.problem:
        # what is used could not be found, but that it is
        tensors.append(torch.zeros((), device=velocity.spec.device, requires_grad=True))
    if not tensors:
        return outputs
    warnings.warn(f"y0, t or a tensor that func uses requires a gradient, but {ADVICE}", UserWarning, stacklevel=3)
    return list(_WithoutGradient.apply(len(outputs), *outputs, *tensors))  # type: ignore[no-untyped-call]


def _integrate(integrate: Any, problem: Problem, y0: list[Tensor], options: ScipyOptions) -> list[Tensor]:
    function = _HostFunction(problem)
    times = problem.grid.times
    spec, tolerance = problem.velocity.spec, problem.tolerance
    arguments: dict[str, Any] = {"max_step": options.max_step}
    if options.solver == "LSODA" or options.min_step > 0:
        arguments["min_step"] = options.min_step
    solution = integrate.solve_ivp(
        function,
        (times[0], times[-1]),
        _flat(y0).numpy(),
        method=options.solver,
        t_eval=times,
        rtol=_flat_bounds(tolerance.rtol, spec.leaves),
        atol=_flat_bounds(tolerance.atol, spec.leaves),
        **arguments,
    )
    if problem.velocity.autocast.enabled:
        # casts made here without a graph would detach these parameters in the rest of the caller's region
        torch.clear_autocast_cache()
    if not solution.success:
        raise RuntimeError(
            f"solver {options.solver} of SciPy failed near t = {function.latest:.6g} on its way from {times[0]:.6g} to"
            f" {times[-1]:.6g}, expected to reach the end: {solution.message}"
        )
    states = torch.from_numpy(solution.y).T[problem.kept]
    pieces = states.split([leaf.numel() for leaf in y0], dim=1)
    return [
        piece.reshape(len(problem.kept), *leaf.shape).to(spec.device, dtype)
        for piece, leaf, dtype in zip(pieces, y0, problem.output_dtypes, strict=True)
    ]


class _HostFunction:
    """f on a flat float64 array of NumPy."""

    def __init__(self, problem: Problem) -> None:
        self.velocity = problem.velocity
        assert problem.first is not None
        self.first: Stage | None = problem.first
        self.shapes = [leaf.shape for leaf in problem.first.x]
        self.latest = problem.grid.times[0]

    def __call__(self, t: float, y: Any) -> Any:
        velocity = self.velocity
        if self.first is not None:
            # an integrator looks at the initial velocity first, which is known
            k, self.first = self.first.k, None
        else:
            pieces = torch.as_tensor(y, dtype=torch.float64).split([shape.numel() for shape in self.shapes])
            x = [
                piece.reshape(shape).to(velocity.spec.device, dtype, copy=True)
                for piece, shape, dtype in zip(pieces, self.shapes, velocity.dtypes, strict=True)
            ]
            time = torch.tensor(t, dtype=velocity.spec.time_dtype, device=velocity.spec.device)
            k = velocity.evaluate(time, x)
        self.latest = float(t)
        flat = _flat(k)
        if not bool(torch.isfinite(flat).all()):
            # some of SciPy's integrators never end when they meet nan
            raise RuntimeError(
                f"func returned values that are not finite at t = {self.latest:.6g}, expected finite ones"
            )
        return flat.numpy()


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.detach().to("cpu", torch.float64).reshape(-1) for leaf in leaves])


def _flat_bounds(bounds: Sequence[Bound], leaves: Sequence[Leaf]) -> Any:
    """A tolerance as SciPy takes it: one number, or one for each element."""
    if all(bound == bounds[0] for bound in bounds if not isinstance(bound, Tensor)) and not any(
        isinstance(bound, Tensor) for bound in bounds
    ):
        return bounds[0]
    pieces = []
    for bound, leaf in zip(bounds, leaves, strict=True):
        piece = torch.as_tensor(bound, dtype=torch.float64).cpu().expand(leaf.shape)
        # the real and the imaginary part of an element are held to the same tolerance
        pieces.append(piece[..., None].expand(*leaf.shape, 2) if leaf.dtype.is_complex else piece)
    return _flat(pieces).numpy()


class _WithoutGradient(torch.autograd.Function):
    """The identity on the first ``count`` tensors, whose gradient with respect to the others is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(ADVICE)
