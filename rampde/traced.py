"""A solve inside of ``torch.compile``: plain arithmetic on a grid, which the compiler fuses with f.

The compiler differentiates what it holds: there is no sweep, no scaling of the adjoint, and nothing that would have to
ask the host. Sums are formed as the operators form them, in 32 bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as evaluate_again

from rampde.autocast import switched_off
from rampde.grid import check_times, constants, read_times, stage_times
from rampde.options import FixedOptions
from rampde.precision import accumulation_dtype
from rampde.problem import Problem
from rampde.tableau import ButcherTableau, Combination

CHANGED = (
    "t has other values than those that the number of steps was compiled with, which options['step_size'] and"
    " options['grid_constructor'] make depend on them; expected the same t, or a t that holds every step"
)


_THIS = sys.modules[__name__]


def _call(function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> tuple[Tensor, ...]:
    return function(*arguments)


def __getattr__(name: str) -> Callable[..., Any]:
    """``repeated(function, *arguments)`` calls a function that is compiled once, however often it is called; made when
    a compiler asks for it, as importing the compiler takes seconds."""
    if name != "repeated":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Callable[..., Any] = torch.compiler.nested_compile_region(_call)
    globals()[name] = found
    return found


def integrate_traced(problem: Problem, y0: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`rampde.forward.integrate`, in operations that ``torch.compile`` sees through."""
    velocity, tableau = problem.velocity, problem.tableau
    points = problem.grid.points
    h_all, times_all = stage_times(points, tableau.nodes, velocity.spec.time_dtype, problem.perturb)
    weights_all = step_weights(h_all, tableau, [leaf.state_dtype for leaf in velocity.spec.leaves])
    leaves = len(y0)
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, velocity.spec.leaves, strict=True)]
    compensation = [torch.zeros_like(leaf) for leaf in y] if problem.compensated else []
    kept = set(problem.grid.kept)
    results = [y] if 0 in kept else []
    for step in range(problem.grid.steps):
        arguments = (weights_all[step], times_all[step], *y, *compensation)
        advance = _advance(problem, first=step == 0)
        if problem.checkpoint.stages in ("none", "tape"):
            state = advance(*arguments) if step == 0 else _THIS.repeated(advance, *arguments)
        else:
            state = evaluate_again(advance, *arguments, use_reentrant=False)
        y, compensation = list(state[:leaves]), list(state[leaves:])
        if step + 1 in kept:
            results.append(y)
    with switched_off(points.device):
        return [torch.stack([state[n] for state in results]).to(dtype) for n, dtype in enumerate(problem.output_dtypes)]


def times_while_compiling(t: Tensor, options: FixedOptions) -> tuple[Tensor, list[float]]:
    """``t``, and its values where the number of steps follows from them, nan elsewhere: no value of a tensor can be
    compiled in, unless it is seen to be the same whenever the compiled solve runs.

    Where it is not, the CPU raises RuntimeError, and elsewhere, where only the device would know, the times become nan.
    """
    if options.step_size is None and options.grid_constructor is None:
        return t, [math.nan] * len(t)
    values = read_times(t)
    check_times(values)
    same = (t == torch.tensor(values, dtype=torch.float64).to(t.device, t.dtype)).all()
    if t.device.type == "cpu":
        torch.ops.aten._assert_async.msg(same, CHANGED)
        return t, values
    return torch.where(same, t, math.nan), values


def _advance(problem: Problem, first: bool) -> Callable[..., tuple[Tensor, ...]]:
    """One step, from its weights, the times of its stages, the state and what the compensated sum carries."""
    velocity, tableau = problem.velocity, problem.tableau

    def advance(row: Tensor, times: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, compensation = state[: len(velocity.dtypes)], state[len(velocity.dtypes) :]
        evaluate = velocity.evaluate_first if first else velocity.evaluate
        weights = weights_by_coefficient(row, tableau)
        k = stage_velocities(tableau, velocity.dtypes, evaluate, weights, times, y)
        if not compensation:
            return tuple([advanced(leaf, weights, tableau.update, of_leaf) for leaf, of_leaf in zip(y, k, strict=True)])
        totals, carried = [], []
        for leaf, lost, of_leaf in zip(y, compensation, k, strict=True):
            increment = advanced(lost, weights, tableau.update, of_leaf)
            total = leaf + increment
            # constants for the derivative, as the increments are what moves the state
            with torch.no_grad():
                shifted = total - leaf
                carried.append((leaf - (total - shifted)) + (increment - shifted))
            totals.append(total)
        return (*totals, *carried)

    return advance


def coefficients(tableau: ButcherTableau) -> tuple[float, ...]:
    """The different weights of the stages' inputs and of the update."""
    weights: dict[float, None] = {}
    for inputs in (*tableau.stage_inputs, tableau.update):
        weights.update(dict.fromkeys(inputs.weights))
    return tuple(weights)


def step_weights(h: Tensor, tableau: ButcherTableau, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Step sizes (N,) times each of the n ``coefficients``: (N, n), rounded once to the widest of ``dtypes``, those
    of the sums."""
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return (h[:, None] * constants(coefficients(tableau), h.dtype, h.device)).to(dtype)


def weights_by_coefficient(row: Tensor, tableau: ButcherTableau) -> dict[float, Tensor]:
    """0-dim ``h a`` for each coefficient ``a``, from a row of :func:`step_weights`."""
    # not row.unbind(): what has several results cannot be evaluated again in a compiled graph
    return {coefficient: row[index] for index, coefficient in enumerate(coefficients(tableau))}


def stage_velocities(
    tableau: ButcherTableau,
    dtypes: Sequence[torch.dtype],
    evaluate: Callable[[Tensor, list[Tensor]], Sequence[Tensor]],
    weights: dict[float, Tensor],
    times: Tensor,
    y: Sequence[Tensor],
) -> list[list[Tensor]]:
    """Velocities of the step from the state ``y``, as ``[leaf][stage]``; f sees it in ``dtypes``.

    ``weights``: :func:`weights_by_coefficient`; ``times``: (s,) those of the stages.
    """
    k: list[list[Tensor]] = [[] for _ in y]
    for stage, inputs in enumerate(tableau.stage_inputs):
        x = [
            advanced(leaf, weights, inputs, of_leaf).to(dtype)
            for leaf, of_leaf, dtype in zip(y, k, dtypes, strict=True)
        ]
        for of_leaf, value in zip(k, evaluate(times[stage], x), strict=True):
            of_leaf.append(value)
    return k


def advanced(base: Tensor, weights: dict[float, Tensor], inputs: Combination, velocities: list[Tensor]) -> Tensor:
    """``base + sum_j (h a_j) k_j`` in the accumulation dtype, the terms summed first."""
    dtype = accumulation_dtype(base.dtype)
    total: Tensor | None = None
    for a, k in zip(inputs.weights, inputs.pick(velocities), strict=True):
        term = weights[a].to(dtype) * k.to(dtype)
        total = term if total is None else total + term
    return base.to(dtype) if total is None else base.to(dtype) + total
