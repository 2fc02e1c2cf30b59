"""Dense output: a solution that can be asked for at any time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rampde.adaptive import Loop, Rows, new_norm, run_loop
from rampde.arguments import Request, read_arguments
from rampde.attempts import Arithmetic, Trial
from rampde.control import Attempt, Replay
from rampde.families import EMBEDDED, family_of
from rampde.graph_break import breaks_graph, outside
from rampde.grid import Output
from rampde.methods import get_method
from rampde.problem import Stage
from rampde.scaling import DynamicScaler
from rampde.state import StateSpec
from rampde.tableau import ButcherTableau, ClosedTableau, close
from rampde.tape_adaptive import TapedArithmetic


@dataclass(frozen=True)
class _Piece:
    """One step: ``y(start + theta h) = y + sum_p coefficients[p] theta^(p + 1)``, leaf by leaf."""

    y: list[Tensor]
    coefficients: list[list[Tensor]]


class DenseSolution:
    """The solution between ``t0`` and ``t1``: call it with times.

    Attributes:
        times: where the steps end, monotone, from ``t0`` on; the last one may lie beyond ``t1``.
    """

    def __init__(self, spec: StateSpec, times: list[float], pieces: list[_Piece], end: float) -> None:
        self.times = times
        self._spec, self._pieces, self._end = spec, pieces, end
        self._sign = -1.0 if end < times[0] else 1.0
        self._ascending = [self._sign * time for time in times]

    @partial(outside, reason="the step of a solution in which a time lies follows from the value of the time")
    def __call__(self, t: Tensor | float) -> Any:
        """The states at ``t``: for each tensor of y0 (*t.shape, *shape), in its dtype; differentiable.

        Raises:
            ValueError: a time that is not between ``t0`` and ``t1``.
        """
        times = torch.as_tensor(t, dtype=torch.float64 if not isinstance(t, Tensor) else None)
        values = times.detach().to("cpu", torch.float64).flatten().tolist()
        rows = [self._at(value, time) for value, time in zip(values, times.flatten().unbind(0), strict=True)]
        leaves = []
        for leaf, spec in enumerate(self._spec.leaves):
            stacked = torch.stack([row[leaf] for row in rows]) if rows else self._pieces[0].y[leaf].new_empty(0)
            leaves.append(stacked.to(spec.real_dtype).reshape(*times.shape, *self._pieces[0].y[leaf].shape))
        return self._spec.unflatten(leaves)

    def _at(self, value: float, time: Tensor) -> list[Tensor]:
        first, last = sorted((self.times[0], self._end))
        # a time in another precision may miss the ends by its rounding
        slack = 4 * torch.finfo(time.dtype).eps * max(abs(first), abs(last))
        if not first - slack <= value <= last + slack:
            raise ValueError(f"t is {value}, expected a time from {first} to {last}")
        step = min(max(bisect_right(self._ascending, self._sign * value) - 1, 0), len(self._pieces) - 1)
        start, end = self.times[step : step + 2]
        piece = self._pieces[step]
        results = []
        for y, coefficients in zip(piece.y, piece.coefficients, strict=True):
            theta = (time.to(y.device, torch.promote_types(y.dtype, time.dtype)) - start) / (end - start)
            total = torch.zeros_like(y)
            for coefficient in reversed(coefficients):
                total = (total + coefficient) * theta.to(y.dtype)
            results.append(y + total)
        return results


@breaks_graph
def odeint_dense(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: float | Tensor | Iterable[float] = 1e-7,
    atol: float | Tensor | Iterable[float] = 1e-9,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    loss_scaler: DynamicScaler | bool | object | None = None,
    velocity_dtype: torch.dtype | None = None,
    compensated: bool = False,
) -> DenseSolution:
    """Solves from ``t0`` to ``t1`` and gives the solution as a function of time.

    For adaptive methods by their own interpolants, for all others by the cubic Hermite interpolant, or by lines with
    ``options={"interp": "linear"}``. Gradients go through plain autograd, as with ``checkpoint="tape"``: under autocast
    it sums those of 16-bit velocities in 16 bits, and float16 is not scaled. Differentiate dense solutions in float32.

    Args:
        func, y0, rtol, atol, method, options, loss_scaler, velocity_dtype, compensated: as of :func:`rampde.odeint`.
        t0, t1: the ends; ``t1 < t0`` solves in reverse time.

    Returns:
        A :class:`DenseSolution`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`rampde.odeint`.
    """
    options = {"interp": "cubic", **(options or {})} if _is_fixed(method) else options
    request = read_arguments(
        func,
        y0,
        _ends(t0, t1),
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        loss_scaler=loss_scaler,
        velocity_dtype=velocity_dtype,
        compensated=compensated,
        checkpoint="tape",
    )
    problem = request.problem
    if problem.closed is None and isinstance(problem.method, ButcherTableau):
        problem.closed = close(problem.method, linear=request.fixed.interp == "linear")
    if problem.closed is None:
        return _between_grid_points(request)
    return _by_steps(request, problem.closed)


def _by_steps(request: Request, tableau: ClosedTableau) -> DenseSolution:
    """The solution of an explicit method, step by step."""
    problem, leaves = request.problem, request.leaves
    spec = problem.velocity.spec
    graphs = torch.is_grad_enabled()
    problem.time_needs_grad = graphs and problem.grid.points.requires_grad
    y = [leaf.to(of_leaf.state_dtype) for leaf, of_leaf in zip(leaves, spec.leaves, strict=True)]
    x = [leaf.to(dtype) for leaf, dtype in zip(leaves, problem.velocity.dtypes, strict=True)]
    time = problem.grid.points[0].to(spec.time_dtype)
    first = Stage(time, x, problem.velocity.evaluate_first(time, x))
    norm = new_norm(problem, first)
    arithmetic = TapedArithmetic(problem, problem.grid.points, norm) if graphs else Arithmetic(problem, norm)
    recorder = _Recorder(tableau, problem.output_dtypes)
    if problem.control is not None:
        run_loop(problem, y, first, arithmetic, recorder, norm)
    else:
        attempts = [Attempt(start, end, end - start) for start, end in pairwise(problem.grid.times)]
        Loop(problem, Replay(attempts), arithmetic, recorder).run(y, first)
        problem.grid = replace(problem.grid, times=arithmetic.steps.points)
    return DenseSolution(spec, problem.grid.times, recorder.pieces, problem.output_times[-1])


def _between_grid_points(request: Request) -> DenseSolution:
    """The solution of a method that gives states at grid points alone."""
    problem = request.problem
    velocity, linear = problem.velocity, request.fixed.interp == "linear"
    times, points = problem.grid.times, problem.grid.points
    everywhere = [Output(step, inside=False) for step in range(-1, len(times) - 1)]
    dtypes = [leaf.state_dtype for leaf in velocity.spec.leaves]
    whole = replace(problem, grid=replace(problem.grid, outputs=everywhere), output_dtypes=dtypes)
    states = list(zip(*(leaf.unbind(0) for leaf in request.family.solve(whole, request.leaves)), strict=True))

    def slopes(point: int) -> list[Tensor]:
        if linear:
            return []
        x = [leaf.to(dtype) for leaf, dtype in zip(states[point], velocity.dtypes, strict=True)]
        k = velocity.evaluate(points[point].to(velocity.spec.time_dtype), x)
        return [value.to(leaf.dtype) for value, leaf in zip(k, states[point], strict=True)]

    pieces = []
    before = slopes(0)
    for step in range(len(times) - 1):
        after = slopes(step + 1)
        h = points[step + 1] - points[step]
        of_leaves = []
        for leaf, (y, y_next) in enumerate(zip(states[step], states[step + 1], strict=True)):
            change = y_next - y
            if linear:
                of_leaves.append([change])
                continue
            first, last = h.to(y.dtype) * before[leaf], h.to(y.dtype) * after[leaf]
            # cubic Hermite interpolation (Hairer, Norsett, Wanner I, II.6, eq. 6.7) in powers of theta
            of_leaves.append([first, 3 * change - 2 * first - last, first + last - 2 * change])
        pieces.append(_Piece(list(states[step]), of_leaves))
        before = after
    return DenseSolution(velocity.spec, times, pieces, problem.output_times[-1])


def _is_fixed(method: object) -> bool:
    return family_of(get_method(method)) is not EMBEDDED


def _ends(t0: Tensor | float, t1: Tensor | float) -> Tensor:
    for name, value in (("t0", t0), ("t1", t1)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected a single element")
        if not isinstance(value, Tensor | float | int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected a number or a tensor with one element")
    tensors = [value.reshape(()) if isinstance(value, Tensor) else None for value in (t0, t1)]
    like = next((tensor for tensor in tensors if tensor is not None), torch.zeros((), dtype=torch.float64))
    if not like.is_floating_point():
        raise TypeError(f"t0 has dtype {like.dtype}, expected a floating point dtype")
    return torch.stack([torch.as_tensor(value).reshape(()).to(like) for value in (t0, t1)])


class _Recorder(Rows):
    """Keeps the steps instead of outputs."""

    def __init__(self, tableau: ClosedTableau, dtypes: list[torch.dtype]) -> None:
        self.dtypes = dtypes
        self.tableau = tableau
        self.pieces: list[_Piece] = []

    def put(self, index: int, values: Sequence[Tensor]) -> None:
        pass

    def step(self, arithmetic: Arithmetic, y: list[Tensor], trial: Trial) -> None:
        arithmetic.finish(trial)
        degree = len(self.tableau.interpolant[0])
        coefficients = []
        for state, k in zip(y, trial.k, strict=True):
            of_leaf = []
            for power in range(degree):
                total = torch.zeros_like(state)
                for row, value in zip(self.tableau.interpolant, k, strict=True):
                    if row[power] != 0.0:
                        total = total + (row[power] * trial.h).to(state.dtype) * value.to(state.dtype)
                of_leaf.append(total)
            coefficients.append(of_leaf)
        self.pieces.append(_Piece(y, coefficients))
