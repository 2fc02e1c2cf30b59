"""The fused operators: each declared once, with the ATen oracle behind it and the kernels that override it.

This module is the only caller of the backends. PyTorch's dispatcher is the backend table: the oracle of
:mod:`rampde.eager` is registered for every device (and for fake tensors), ``rampde._C`` overrides the CPU key
and the CUDA key of the adjoint sweep, :mod:`rampde.kernels` (Triton) the CUDA key of the forward operators.
The meaning, shapes and dtypes of each operator are in the docstring of its oracle.

A state of one leaf takes the plain operators; for the others, the functions at the end choose between the operator that
takes all leaves at once and a loop over the leaves.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rampde import _ext, eager, eager_adaptive, eager_leaves

MISSING = _ext.MISSING
"""Why the compiled operators are absent; empty when they are loaded."""

SCHEMAS = {
    "rk_stage": "(Tensor y, Tensor[] k, Tensor h, float[] a, ScalarType dtype) -> Tensor",
    "rk_update": (
        "(Tensor y, Tensor[] k, Tensor h, float[] b, Tensor(a!) y_next, Tensor(b!)? checkpoint=None,"
        " Tensor(c!)? compensation=None, Tensor(d!)? overflow_step=None, int step=0,"
        " Tensor(e!)? quantised=None, Tensor(f!)? block_scales=None, int? seed=None) -> ()"
    ),
    "rk_error": (
        "(Tensor y, Tensor[] k, Tensor h, float[] b, float[] e, float rtol, float atol, float roundoff, int rows=1,"
        " Tensor(a!)? y_next=None, Tensor(b!)? checkpoint=None, Tensor(c!)? compensation=None,"
        " Tensor(d!)? quantised=None, Tensor(e!)? block_scales=None, int? seed=None) -> Tensor"
    ),
    "adjoint_stage": (
        "(Tensor adjoint, Tensor[] vjps, Tensor h, float b, float[] a, ScalarType dtype,"
        " Tensor? scale_state=None) -> Tensor"
    ),
    "adjoint_update": (
        "(Tensor adjoint, Tensor[] vjps, Tensor h, Tensor? cotangent, Tensor(a!) adjoint_next,"
        " Tensor(b!)? scale_state=None) -> ()"
    ),
    "update_scale": (
        "(Tensor(a!) scale_state, Tensor?[] gradients, float target, float decrease_factor,"
        " float increase_factor, int increase_interval, float delta, int steps) -> ()"
    ),
    "accumulate_gradients": ("(Tensor(a!)[] totals, Tensor?[] gradients, Tensor h, Tensor? scale_state=None) -> ()"),
    "rk_stage_leaves": "(Tensor[] y, Tensor[] k, Tensor h, float[] a, int[] dtypes) -> Tensor[]",
    "rk_update_leaves": (
        "(Tensor[] y, Tensor[] k, Tensor h, float[] b, Tensor(a!)[] y_next, Tensor(b!)[] checkpoints,"
        " Tensor(c!)[] compensations, Tensor(d!)? overflow_step=None, int step=0) -> ()"
    ),
    "rk_error_leaves": (
        "(Tensor[] y, Tensor[] k, Tensor h, float[] b, float[] e, float rtol, float atol, float[] roundoffs,"
        " Tensor(a!)[] y_next, Tensor(b!)[] checkpoints, Tensor(c!)[] compensations) -> Tensor"
    ),
    "adjoint_stage_leaves": (
        "(Tensor[] adjoint, Tensor?[] vjps, Tensor h, float b, float[] a, int[] dtypes,"
        " Tensor? scale_state=None) -> Tensor[]"
    ),
    "adjoint_update_leaves": (
        "(Tensor[] adjoint, Tensor?[] vjps, Tensor h, Tensor?[] cotangents, Tensor(a!)[] adjoint_next,"
        " Tensor(b!)? scale_state=None) -> ()"
    ),
    "step_control": (
        "(Tensor(a!) control, Tensor(b!) record, Tensor(c!) stage_times, Tensor sums, Tensor sizes,"
        " Tensor output_times, float[] nodes, float[] parameters) -> ()"
    ),
    "step_commit": (
        "(Tensor record, Tensor output_times, Tensor y_next, Tensor[] later, float[] interpolant, Tensor(a!) y,"
        " Tensor(b!) first, Tensor(c!) rows, Tensor(d!)? staged=None) -> ()"
    ),
}

WITHOUT_CPU_KERNEL = ("step_control", "step_commit")
"""Operators that spare a device the wait for its host: on the CPU there is none, and the oracle will do."""


def oracle(name: str) -> Callable[..., Any]:
    """The function in plain ATen behind the operator of that name."""
    module = eager_leaves if name.endswith("_leaves") else eager_adaptive if name.startswith("step_") else eager
    function: Callable[..., Any] = getattr(module, name)
    return function


_library = torch.library.Library("rampde", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, oracle(_name), "CompositeExplicitAutograd")

TRITON_OPERATORS: tuple[str, ...] = ()
_triton = find_spec("triton")
# a mere folder of that name on the path has no origin
if _triton is not None and _triton.origin is not None:
    if find_spec("rampde.kernels") is None:
        raise ImportError("rampde is not installed: run `pip install --no-build-isolation -e .` in its source folder")
    from rampde import kernels  # type: ignore[attr-defined]

    TRITON_OPERATORS = tuple(kernels.OPERATORS)
    for _name, _launch in kernels.OPERATORS.items():
        _library.impl(_name, _launch, "CUDA")

# bound once: resolving torch.ops.rampde.<name> at every call costs a quarter of the call
rk_stage = torch.ops.rampde.rk_stage.default
rk_update = torch.ops.rampde.rk_update.default
rk_error = torch.ops.rampde.rk_error.default
adjoint_stage = torch.ops.rampde.adjoint_stage.default
adjoint_update = torch.ops.rampde.adjoint_update.default
update_scale = torch.ops.rampde.update_scale.default
accumulate_gradients = torch.ops.rampde.accumulate_gradients.default
rk_stage_leaves = torch.ops.rampde.rk_stage_leaves.default
rk_update_leaves = torch.ops.rampde.rk_update_leaves.default
rk_error_leaves = torch.ops.rampde.rk_error_leaves.default
adjoint_stage_leaves = torch.ops.rampde.adjoint_stage_leaves.default
adjoint_update_leaves = torch.ops.rampde.adjoint_update_leaves.default
step_control = torch.ops.rampde.step_control.default
step_commit = torch.ops.rampde.step_commit.default

NUMBERS = {dtype: number for number, dtype in enumerate(eager_leaves.DTYPES)}

# of one leaf: what some states have and others have not
Optional = Sequence[Tensor | None]


def stage_inputs(
    y: Sequence[Tensor], k: Sequence[Sequence[Tensor]], h: Tensor, a: Sequence[float], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Inputs of a Runge-Kutta stage, leaf by leaf, in ``dtypes``: :func:`rampde.eager.rk_stage`.

    ``k``: (leaves, terms) velocities, any floating dtype, as the leaf of ``y`` that they belong to.
    """
    if len(y) > 1:
        inputs: list[Tensor] = rk_stage_leaves(y, _flat(k), h, a, [NUMBERS[dtype] for dtype in dtypes])
        return inputs
    return [rk_stage(y[0], k[0], h, a, dtypes[0])]


def update_states(
    y: Sequence[Tensor],
    k: Sequence[Sequence[Tensor]],
    h: Tensor,
    b: Sequence[float],
    y_next: Sequence[Tensor],
    checkpoints: Optional,
    compensations: Optional,
    overflow_step: Tensor | None = None,
    step: int = 0,
) -> None:
    """End of a step of all leaves, written to ``y_next``: :func:`rampde.eager.rk_update`.

    ``k``: (leaves, terms) velocities; ``checkpoints`` and ``compensations``: leaf by leaf, None where there is none.
    """
    if len(y) > 1:
        saved, lost = _of_all(checkpoints), _of_all(compensations)
        if saved is not None and lost is not None:
            rk_update_leaves(y, _flat(k), h, b, y_next, saved, lost, overflow_step, step)
            return
    for state, of_leaf, target, checkpoint, compensation in zip(y, k, y_next, checkpoints, compensations, strict=True):
        rk_update(state, of_leaf, h, b, target, checkpoint, compensation, overflow_step, step)


def error_sums(
    y: Sequence[Tensor],
    k: Sequence[Sequence[Tensor]],
    h: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    rtol: Sequence[Any],
    atol: Sequence[Any],
    roundoffs: Sequence[float],
    y_next: Optional,
    checkpoints: Optional,
    compensations: Optional,
    quantised: Sequence[tuple[Any, ...]],
) -> Tensor:
    """End of an attempted step of all leaves, and the float64 sums of its error (leaves, 2):
    :func:`rampde.eager.rk_error`.

    ``k``: (leaves, terms) velocities; the tolerances and all that follows: leaf by leaf, None where there is none, and
    ``quantised`` the last three arguments of the operator, or no argument.
    """
    if len(y) > 1 and _same(rtol) and _same(atol) and not any(quantised):
        new, saved, lost = _of_all(y_next), _of_all(checkpoints), _of_all(compensations)
        if new is not None and saved is not None and lost is not None:
            sums: Tensor = rk_error_leaves(y, _flat(k), h, b, e, rtol[0], atol[0], roundoffs, new, saved, lost)
            return sums
    of_leaves = [
        rk_error(
            state,
            k[leaf],
            h,
            b,
            e,
            rtol[leaf],
            atol[leaf],
            roundoffs[leaf],
            1,
            y_next[leaf],
            checkpoints[leaf],
            compensations[leaf],
            *quantised[leaf],
        )
        for leaf, state in enumerate(y)
    ]
    return of_leaves[0] if len(of_leaves) == 1 else torch.cat(of_leaves)


def stage_cotangents(
    adjoint: Sequence[Tensor],
    vjps: Sequence[Optional],
    h: Tensor,
    b: float,
    a: Sequence[float],
    dtypes: Sequence[torch.dtype],
    scale_state: Tensor | None = None,
    sparse: bool = True,
) -> list[Tensor]:
    """Cotangents of the velocities of a stage, leaf by leaf, in their ``dtypes``: :func:`rampde.eager.adjoint_stage`.

    ``vjps``: (leaves, terms) vector-Jacobian products; where ``sparse``, some may be None, for zero.
    """
    if len(adjoint) > 1:
        numbers = [NUMBERS[dtype] for dtype in dtypes]
        cotangents: list[Tensor] = adjoint_stage_leaves(adjoint, _flat(vjps), h, b, a, numbers, scale_state)
        return cotangents
    terms = vjps[0]
    if sparse:
        a = [weight for vjp, weight in zip(terms, a, strict=True) if vjp is not None]
        terms = [vjp for vjp in terms if vjp is not None]
    return [adjoint_stage(adjoint[0], terms, h, b, a, dtypes[0], scale_state)]


def update_adjoints(
    adjoint: Sequence[Tensor],
    vjps: Sequence[Optional],
    h: Tensor,
    cotangents: Optional,
    adjoint_next: Sequence[Tensor],
    scale_state: Tensor | None = None,
    sparse: bool = True,
) -> None:
    """End of a step backwards of all leaves, written to ``adjoint_next``: :func:`rampde.eager.adjoint_update`.

    ``vjps``: (leaves, terms) vector-Jacobian products; where ``sparse``, some may be None, for zero, as may some of the
    ``cotangents``.
    """
    if len(adjoint) > 1:
        adjoint_update_leaves(adjoint, _flat(vjps), h, cotangents, adjoint_next, scale_state)
        return
    terms = [vjp for vjp in vjps[0] if vjp is not None] if sparse else vjps[0]
    adjoint_update(adjoint[0], terms, h, cotangents[0], adjoint_next[0], scale_state)


def _flat(items: Sequence[Sequence[Any]]) -> list[Any]:
    return list(chain.from_iterable(items))


def _same(items: Sequence[Any]) -> bool:
    return items.count(items[0]) == len(items)


def _of_all(items: Optional) -> list[Tensor] | None:
    """What all leaves have, or nothing where none has it; None where some have it and some have not."""
    present = [item for item in items if item is not None]
    return present if not present or len(present) == len(items) else None
