"""The ``rampde::`` operators in plain ATen: the oracle of every kernel, and the fallback of every device.

Each function says in a few lines what an operator means. It is registered under
``CompositeExplicitAutograd``, so it also serves as the fake (meta) kernel and runs wherever no compiled
kernel exists: MPS, XPU, an install without a compiler.

Conventions shared by all operators:

==================  ===========================  ======================================================
name                shape, dtype                 meaning
==================  ===========================  ======================================================
``y``, ``adjoint``  any dense, floating          state, and gradient of the loss with respect to it
``k``               as ``y``, any floating       velocities ``f(t, y)`` of the stages
``vjps``            as ``y``, any floating       vector-Jacobian products of the stages, times the scale
``h``               0-dim, float64 or float32    step size, negative in reverse time, on ``y``'s device
``scale_state``     (9,), float32                state of the loss scale, see :mod:`rampde.scaling`
``quantised``       as ``y``, float8_e4m3fn      a step in 8 bits, see :mod:`rampde.fp8_blocks`, and
``block_scales``    (ceil(numel/128),), float32  its scales; always given together
==================  ===========================  ======================================================

Sums are formed in ``accumulation_dtype``: float64 for a float64 operand ``y``, else float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde import fp8_blocks
from rampde.precision import accumulation_dtype
from rampde.scaling import (
    CLEAN_STEPS,
    COMMITTED_STEPS,
    FINITE,
    HEADROOM,
    INCREASED,
    MAXIMUM,
    OVERFLOWED,
    SCALE,
    SCALE_OF_STEP,
    power_of_two_below,
)

# elements of a sum that one thread forms
BLOCK = 1024


def _combine(base: Tensor, terms: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """``base + sum_j factors[j] * terms[j]``, a new tensor in the accumulation dtype and layout of ``base``."""
    total = torch.empty_like(base, dtype=accumulation_dtype(base.dtype)).copy_(base)
    for term, factor in zip(terms, factors, strict=True):
        total.add_(term.to(total.dtype) * factor.to(total.dtype))
    return total


def _nothing(like: Tensor) -> Tensor:
    """Minus zero: what added to anything leaves it as it is."""
    return torch.full_like(like, -0.0)


def _advanced(base: Tensor, terms: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """As ``_combine``, the terms summed first: what is accumulated from step to step is rounded once in a step."""
    return _combine(_nothing(base), terms, factors).add_(base)


def _wide(x: Tensor) -> Tensor:
    """In float64, in which weights are formed, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def _weights(h: Tensor, coefficients: Sequence[float]) -> list[Tensor]:
    return [_wide(h) * coefficient for coefficient in coefficients]


def _used(terms: Sequence[Tensor], coefficients: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    """Drops the terms whose coefficient is zero: they are not read, so a NaN in them does not spread."""
    kept = [(term, c) for term, c in zip(terms, coefficients, strict=True) if c != 0.0]
    return [term for term, _ in kept], [c for _, c in kept]


def rk_stage(y: Tensor, k: Sequence[Tensor], h: Tensor, a: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Input of a Runge-Kutta stage: ``X_i = round(y + h * sum_j a_ij k_j)`` in ``dtype``."""
    k, a = _used(k, a)
    return _advanced(y, k, _weights(h, a)).to(dtype)


def _step(
    y: Tensor,
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    compensation: Tensor | None,
    written: tuple[Tensor, Tensor] | None,
    seed: int | None,
) -> Tensor:
    """``y + h * sum_i b_i k_i``, not rounded; ``compensation`` and ``written``, 8 bits, as :func:`rk_update` says."""
    k, b = _used(k, b)
    increment = _combine(_nothing(y) if compensation is None else compensation, k, _weights(h, b))
    if written is not None:
        backwards = torch.empty_like(written[0], dtype=torch.float32).copy_(increment).neg_()
        for target, source in zip(written, fp8_blocks.quantise(backwards, seed), strict=True):
            target.copy_(source)
    if compensation is None:
        return increment.add_(y)
    base = y.to(increment.dtype)
    total = base + increment
    shifted = total - base
    compensation.copy_((base - (total - shifted)) + (increment - shifted))
    return total


def rk_update(
    y: Tensor,
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    y_next: Tensor,
    checkpoint: Tensor | None = None,
    compensation: Tensor | None = None,
    overflow_step: Tensor | None = None,
    step: int = 0,
    quantised: Tensor | None = None,
    block_scales: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """End of a step: ``y_next = y + h * sum_i b_i k_i``; ``y_next`` may be ``y`` itself.

    ``checkpoint``, when given, receives ``y_next`` rounded to its own dtype. ``compensation`` carries the
    rounding error of the running sum from step to step (Kahan summation with Knuth's exact two-sum, TAOCP 2,
    4.2.2, theorem B). ``overflow_step``, a 0-dim int64, becomes ``min(overflow_step, step)`` when any element
    of ``y_next``, or of ``checkpoint``, is not finite.

    ``quantised`` and ``block_scales`` receive the step taken backwards, minus all that is added to ``y``, what
    ``compensation`` carried included, in 8 bits: to nearest even, or with a ``seed`` at random. ``y`` may be what was
    written so, with its ``block_scales``: it is read as the numbers that it stands for, so that the state after a step
    as the one term, with a weight of 1, gives the state before it. Then sums have the dtype that belongs to
    ``y_next``, and neither ``compensation`` nor ``quantised`` is given.
    """
    written = None
    if y.dtype == fp8_blocks.CODES:
        others = {"compensation": compensation, "quantised": quantised, "seed": seed}
        codes, scales = fp8_blocks.check_read("rk_update", y, block_scales, **others)
        y = fp8_blocks.dequantise(codes, scales, accumulation_dtype(y_next.dtype))
    else:
        written = fp8_blocks.check_written("rk_update", y, quantised, block_scales, seed)
    total = _step(y, k, h, b, compensation, written, seed)
    y_next.copy_(total)
    if checkpoint is not None:
        checkpoint.copy_(total)
    if overflow_step is not None:
        finite = torch.isfinite(y_next if checkpoint is None else checkpoint).all()
        overflow_step.copy_(torch.where(finite, overflow_step, overflow_step.clamp(max=step)))


def rk_error(
    y: Tensor,
    k: Sequence[Tensor],
    h: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    rtol: float,
    atol: float,
    roundoff: float,
    rows: int = 1,
    y_next: Tensor | None = None,
    checkpoint: Tensor | None = None,
    compensation: Tensor | None = None,
    quantised: Tensor | None = None,
    block_scales: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """End of an attempted step: ``y_next`` and the others as in :func:`rk_update`, and the size of its error.

    With ``error = h * sum_i e_i k_i`` and ``tolerance = atol + rtol * max(|y|, |y_next|)``, returns float64 sums
    of shape (rows, 2), a row for all of ``y`` or for each of its slices along dimension 0: the sum of
    ``(error / tolerance)^2``, and what velocities rounded to a relative ``roundoff`` have in it, the sum of
    ``roundoff^2 * sum_i (h e_i k_i / tolerance)^2``. The first is infinite, never NaN, when ``y_next`` or the error
    is not finite; an element that would not be finite adds nothing to the second. ``quantised`` needs ``rows`` of 1.
    """
    written = fp8_blocks.check_written("rk_error", y, quantised, block_scales, seed)
    if written is not None and rows != 1:
        raise ValueError(f"rk_error: rows is {rows}, expected 1 where quantised is given")
    total = _step(y, k, h, b, compensation, written, seed)
    # the smallest normal number makes every weight finite, and 0 of 0 / 0
    smallest = torch.finfo(total.dtype).tiny
    weight = 1 / (rtol * torch.maximum(y.to(total.dtype).abs(), total.abs()) + (atol + smallest))
    # zero, or nan where the step is not finite
    ratio, share = total - total, torch.zeros_like(total)
    k, e = _used(k, e)
    for term, factor in zip(k, _weights(h, e), strict=True):
        part = term.to(total.dtype) * factor.to(total.dtype) * weight
        ratio.add_(part)
        share.add_(part.square())
    if y_next is not None:
        y_next.copy_(total)
    if checkpoint is not None:
        checkpoint.copy_(total)
    squares = _wide(ratio).square().nan_to_num(torch.inf, torch.inf)
    parts = _wide(share).nan_to_num(0.0, 0.0) * roundoff**2
    return torch.stack([_row_sums(x.reshape(rows, y.numel() // max(rows, 1))) for x in (squares, parts)], 1)


def _row_sums(x: Tensor) -> Tensor:
    """Sums of the rows of a matrix, by blocks: no sum is long enough for several threads to share it, whose number
    would show."""
    while x.shape[1] > BLOCK:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
        x = x.reshape(x.shape[0], -1, BLOCK).sum(2)
    return x.sum(1)


def adjoint_stage(
    adjoint: Tensor,
    vjps: Sequence[Tensor],
    h: Tensor,
    b: float,
    a: Sequence[float],
    dtype: torch.dtype,
    scale_state: Tensor | None = None,
) -> Tensor:
    """Cotangent of a stage's velocity: ``round(S * b_i * adjoint + h * sum_j a_ji vjps_j)`` in ``dtype``.

    ``vjps_j`` carries the scale ``S`` already, and ``S`` is a power of two: the sum is ``S * w_i`` of the
    discrete adjoint exactly. ``h`` itself stays outside the cotangent. ``adjoint`` is not read when ``b`` is 0.
    """
    vjps, a = _used(vjps, a)
    scaled = torch.zeros_like(adjoint)
    if b != 0.0:
        factor = torch.full_like(_wide(h), b) if scale_state is None else b * _wide(scale_state[SCALE])
        scaled = _combine(scaled, [adjoint], [factor])
    return _combine(scaled, vjps, _weights(h, a)).to(dtype)


def adjoint_update(
    adjoint: Tensor,
    vjps: Sequence[Tensor],
    h: Tensor,
    cotangent: Tensor | None,
    adjoint_next: Tensor,
    scale_state: Tensor | None = None,
) -> None:
    """End of a step backwards: ``adjoint_next = adjoint + h / S * sum_i vjps_i + cotangent``.

    ``cotangent`` is the loss gradient with respect to an output at this point of the grid. Without
    ``scale_state`` ``S`` is 1 and ``adjoint_next`` may be ``adjoint`` itself. With it, ``max|adjoint_next|``
    and whether all of it is finite are gathered there; after an overflow nothing is written.
    """
    factor = h if scale_state is None else _wide(h) / _wide(scale_state[SCALE])
    total = _advanced(adjoint, vjps, [factor] * len(vjps))
    if cotangent is not None:
        total.add_(cotangent)
    if scale_state is None:
        adjoint_next.copy_(total)
        return
    running = scale_state[OVERFLOWED] == 0
    adjoint_next.copy_(torch.where(running, total, adjoint_next))
    if total.numel() == 0:
        return
    largest = total.abs().amax()
    finite = torch.isfinite(largest)
    # a non-finite maximum would say nothing: the flag says it instead
    maximum = torch.maximum(scale_state[MAXIMUM], torch.where(finite, largest, 0.0).to(torch.float32))
    scale_state[MAXIMUM] = torch.where(running, maximum, scale_state[MAXIMUM])
    scale_state[FINITE] = torch.where(running & ~finite, 0.0, scale_state[FINITE])


def update_scale(
    scale_state: Tensor,
    gradients: Sequence[Tensor | None],
    target: float,
    decrease_factor: float,
    increase_factor: float,
    increase_interval: int,
    delta: float,
    steps: int,
) -> None:
    """Decides on the device whether the step just swept counts, and sets the scale of the next one.

    The step counts when the adjoint and all ``gradients`` are finite: then ``SCALE_OF_STEP = S``,
    ``COMMITTED_STEPS += steps`` and ``S = HEADROOM * 2^floor(log2(target / (max|adjoint| + delta)))``,
    unchanged where the adjoint is zero. Otherwise ``OVERFLOWED`` is set, ``SCALE_OF_STEP = 0`` (so that nothing is
    accumulated) and ``HEADROOM *= decrease_factor``. After ``increase_interval`` clean steps ``HEADROOM`` grows by
    ``increase_factor`` up to 1. Once ``OVERFLOWED`` is set nothing changes but ``SCALE_OF_STEP = 0``.
    """
    old = scale_state.clone()
    running = old[OVERFLOWED] == 0
    finite = old[FINITE] != 0
    for gradient in gradients:
        if gradient is not None:
            finite = finite & torch.isfinite(gradient).all()
    clean = running & finite

    clean_steps = torch.where(clean, old[CLEAN_STEPS] + steps, 0.0)
    grows = clean & (clean_steps >= increase_interval) & (old[HEADROOM] < 1)
    headroom = torch.where(grows, (old[HEADROOM] * increase_factor).clamp(max=1.0), old[HEADROOM])
    headroom = torch.where(running & ~finite, old[HEADROOM] * decrease_factor, headroom)
    scale = headroom * power_of_two_below(target / (old[MAXIMUM] + delta))
    scale = torch.where(old[MAXIMUM] > 0, scale, old[SCALE])

    scale_state[SCALE_OF_STEP] = torch.where(clean, old[SCALE], 0.0)
    scale_state[SCALE] = torch.where(clean, scale, old[SCALE])
    scale_state[HEADROOM] = torch.where(running, headroom, old[HEADROOM])
    scale_state[CLEAN_STEPS] = torch.where(running, torch.where(grows, 0.0, clean_steps), old[CLEAN_STEPS])
    scale_state[COMMITTED_STEPS] = old[COMMITTED_STEPS] + torch.where(clean, float(steps), 0.0)
    scale_state[INCREASED] = old[INCREASED] + torch.where(grows, 1.0, 0.0)
    scale_state[OVERFLOWED] = torch.where(clean, 0.0, 1.0)
    scale_state[MAXIMUM] = torch.where(running, 0.0, old[MAXIMUM])
    scale_state[FINITE] = torch.where(running, 1.0, old[FINITE])


def accumulate_gradients(
    totals: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    h: Tensor,
    scale_state: Tensor | None = None,
) -> None:
    """``totals[p] += h / S * sum_i gradients[i * len(totals) + p]`` for every parameter ``p`` at once.

    ``gradients`` holds the parameters' gradients stage after stage; an absent one (None) is zero. With a
    ``scale_state``, ``S`` is ``SCALE_OF_STEP``; where that is 0, the step overflowed and nothing is added.
    """
    count = len(totals)
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = totals[index % count]
        if scale_state is None:
            total.add_(gradient.to(total.dtype) * h.to(total.dtype))
            continue
        scale = _wide(scale_state[SCALE_OF_STEP])
        added = total + gradient.to(total.dtype) * (_wide(h) / scale).to(total.dtype)
        total.copy_(torch.where(scale != 0, added, total))
