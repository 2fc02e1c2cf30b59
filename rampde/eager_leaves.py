"""The operators on all leaves of a state at once, in plain ATen: each is its namesake of :mod:`rampde.eager`, leaf
after leaf, and means what that one says.

On a GPU each of them is one launch for up to eight leaves. What a leaf has several of, its velocities or their
vector-Jacobian products, comes in one list, one leaf after the other, and as many for each leaf; what only some states
have, such as a checkpoint, is an empty list for the others.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rampde import eager

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""In the order of ``DType`` of the C++ sources. Lists of dtypes are lists of places here: those of a ``ScalarType[]``
would reach Python as other integers before torch 2.12 (pytorch/pytorch#178645)."""

_Item = TypeVar("_Item")


def _by_leaf(op: str, name: str, items: Sequence[_Item], leaves: int) -> list[Sequence[_Item]]:
    """The items of each leaf."""
    count, rest = divmod(len(items), leaves)
    if rest:
        raise ValueError(
            f"{op}: {name} has {len(items)} tensors, expected a multiple of the number of leaves, {leaves}"
        )
    return [items[leaf * count : (leaf + 1) * count] for leaf in range(leaves)]


def _or_none(items: Sequence[Tensor], leaves: int) -> Sequence[Tensor | None]:
    return items or [None] * leaves


def rk_stage_leaves(
    y: Sequence[Tensor], k: Sequence[Tensor], h: Tensor, a: Sequence[float], dtypes: Sequence[int]
) -> list[Tensor]:
    """Inputs of a Runge-Kutta stage; ``dtypes`` are places in ``DTYPES``."""
    terms = _by_leaf("rk_stage_leaves", "k", k, len(y))
    return [
        eager.rk_stage(state, of_leaf, h, a, DTYPES[place])
        for state, of_leaf, place in zip(y, terms, dtypes, strict=True)
    ]


def rk_update_leaves(
    y: Sequence[Tensor],
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    y_next: Sequence[Tensor],
    checkpoints: Sequence[Tensor],
    compensations: Sequence[Tensor],
    overflow_step: Tensor | None = None,
    step: int = 0,
) -> None:
    """End of a step; ``checkpoints`` and ``compensations`` are given for all leaves or for none."""
    leaves = len(y)
    terms = _by_leaf("rk_update_leaves", "k", k, leaves)
    outputs = (_or_none(checkpoints, leaves), _or_none(compensations, leaves))
    for state, of_leaf, target, checkpoint, compensation in zip(y, terms, y_next, *outputs, strict=True):
        eager.rk_update(state, of_leaf, h, b, target, checkpoint, compensation, overflow_step, step)


def rk_error_leaves(
    y: Sequence[Tensor],
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    rtol: float,
    atol: float,
    roundoffs: Sequence[float],
    y_next: Sequence[Tensor],
    checkpoints: Sequence[Tensor],
    compensations: Sequence[Tensor],
) -> Tensor:
    """End of an attempted step: float64 sums of shape (leaves, 2), for each leaf those of all its elements.

    The last three are given for all leaves or for none.
    """
    leaves = len(y)
    terms = _by_leaf("rk_error_leaves", "k", k, leaves)
    outputs = [_or_none(items, leaves) for items in (y_next, checkpoints, compensations)]
    sums = [
        eager.rk_error(state, of_leaf, h, b, e, rtol, atol, roundoff, 1, *targets)
        for state, of_leaf, roundoff, *targets in zip(y, terms, roundoffs, *outputs, strict=True)
    ]
    return torch.cat(sums)


def adjoint_stage_leaves(
    adjoint: Sequence[Tensor],
    vjps: Sequence[Tensor | None],
    h: Tensor,
    b: float,
    a: Sequence[float],
    dtypes: Sequence[int],
    scale_state: Tensor | None = None,
) -> list[Tensor]:
    """Cotangents of a stage's velocities; ``dtypes`` are places in ``DTYPES``, an absent product (None) is zero."""
    cotangents = []
    products = _by_leaf("adjoint_stage_leaves", "vjps", vjps, len(adjoint))
    for lam, of_leaf, place in zip(adjoint, products, dtypes, strict=True):
        pairs = [(vjp, weight) for vjp, weight in zip(of_leaf, a, strict=True) if vjp is not None]
        present, weights = [vjp for vjp, _ in pairs], [weight for _, weight in pairs]
        cotangents.append(eager.adjoint_stage(lam, present, h, b, weights, DTYPES[place], scale_state))
    return cotangents


def adjoint_update_leaves(
    adjoint: Sequence[Tensor],
    vjps: Sequence[Tensor | None],
    h: Tensor,
    cotangents: Sequence[Tensor | None],
    adjoint_next: Sequence[Tensor],
    scale_state: Tensor | None = None,
) -> None:
    """End of a step backwards; a product or a loss gradient that is absent (None) is zero."""
    products = _by_leaf("adjoint_update_leaves", "vjps", vjps, len(adjoint))
    for lam, of_leaf, cotangent, target in zip(adjoint, products, cotangents, adjoint_next, strict=True):
        present = [vjp for vjp in of_leaf if vjp is not None]
        eager.adjoint_update(lam, present, h, cotangent, target, scale_state)
