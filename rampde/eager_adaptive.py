"""The operators of steps that are decided on the device, in plain ATen: the oracle of their kernels.

They go with those of :mod:`rampde.eager`. The layout of ``control`` and ``record`` is in :mod:`rampde.step_state`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rampde import step_state as at
from rampde.control import GOOD_ENOUGH, KNOWN_TO_A_FACTOR
from rampde.precision import accumulation_dtype


def step_control(
    control: Tensor,
    record: Tensor,
    stage_times: Tensor,
    sums: Tensor,
    sizes: Tensor,
    output_times: Tensor,
    nodes: Sequence[float],
    parameters: Sequence[float],
) -> None:
    """Judges an attempted step by its error, and proposes the next one: :class:`rampde.control.AdaptiveSteps` without
    the host.

    ``control``, (11,) float64, holds the attempt, and the next one afterwards; ``record``, (6,) float64, receives
    whether the attempt stands, where it lies, and which outputs lie in it; ``stage_times``, (stages,) in any floating
    dtype, receives the times of the stages of the next attempt, at the ``nodes`` of the method. ``sums``, (leaves, 2)
    float64, are those of :func:`rampde.eager.rk_error`, of leaves with ``sizes`` elements, (leaves,) float64.
    ``output_times``, (T,) float64, the first of which is the start; ``parameters`` are
    :class:`rampde.step_state.Parameters`.

    A step that takes the solve to its last output ends it; so does what the host must raise an error for. After that
    nothing changes any more, but the records of further attempts say that these do not stand.
    """
    given = at.Parameters(*parameters)
    old = control.clone()
    running, step, hidden = old[at.STATUS] == at.RUNNING, old[at.H], old[at.HIDDEN_GROWTH]

    # the worst leaf; what rounding has in its error is taken off
    squares, shares = (sums / sizes[:, None]).unbind(1)
    ratio = (squares - shares).clamp(min=0).amax().sqrt()
    noise = shares.amax().sqrt()
    rounding = KNOWN_TO_A_FACTOR * noise
    allowed = rounding.clamp(min=1.0)
    good = ratio <= allowed
    accepted = good | (step.abs() <= given.min_step)
    seen = torch.where(accepted, torch.hypot(ratio, noise), ratio) / allowed
    seen = torch.where((noise > 0) & good, seen.clamp(max=GOOD_ENOUGH), seen)
    factor = _growth(seen, old, given)
    factor = torch.where(ratio < rounding, torch.maximum(factor, hidden), factor)
    guessed = ~accepted & (noise > 0) & (hidden > 1)
    factor = torch.where(guessed, torch.minimum(factor, hidden**-0.5), factor)
    size = (step.abs() * factor).clamp(given.min_step, given.max_step)

    stands = running & accepted & torch.isfinite(ratio)
    failed = running & accepted & ~stands
    time = torch.where(stands, old[at.END], old[at.TIME])
    reached = (given.sign * (time - output_times) >= 0).sum().to(old.dtype)
    due = torch.where(stands, torch.maximum(old[at.DUE], reached), old[at.DUE])
    attempts = torch.where(due > old[at.DUE], 0.0, old[at.ATTEMPTS])
    done = stands & (due == output_times.shape[0])

    proposed = torch.where(torch.isfinite(size), size, given.min_step).clamp(given.min_step, given.max_step)
    h = given.sign * proposed
    end = time + h
    wanted = running & ~failed & ~done
    too_many = wanted & (attempts >= given.max_num_steps)
    underflow = wanted & ~too_many & (end == time)
    goes_on = wanted & ~too_many & ~underflow

    remembered = stands & (seen > 0) & torch.isfinite(seen)
    status = old[at.STATUS]
    for reason, code in ((done, at.DONE), (underflow, at.UNDERFLOW), (too_many, at.TOO_MANY), (failed, at.NOT_FINITE)):
        status = torch.where(reason, float(code), status)
    new = [torch.empty(())] * at.CONTROL_SIZE
    new[at.TIME] = time
    new[at.SIZE] = torch.where(running, size, old[at.SIZE])
    new[at.H] = torch.where(goes_on, h, step)
    new[at.END] = torch.where(goes_on, end, old[at.END])
    new[at.PREVIOUS] = torch.where(remembered, seen, old[at.PREVIOUS])
    new[at.ONE_BEFORE] = torch.where(remembered, old[at.PREVIOUS], old[at.ONE_BEFORE])
    new[at.HIDDEN_GROWTH] = torch.where(running & ~accepted, hidden**0.5, hidden)
    new[at.WORST_NOISE] = torch.where(stands, torch.maximum(old[at.WORST_NOISE], noise), old[at.WORST_NOISE])
    new[at.ATTEMPTS] = torch.where(goes_on, attempts + 1, old[at.ATTEMPTS])
    new[at.DUE] = due
    new[at.STATUS] = status
    control.copy_(torch.stack(new))
    record.copy_(torch.stack([stands.to(old.dtype), old[at.TIME], step, old[at.END], old[at.DUE], due]))
    # that of a node of 1 is the end, as it was formed alike
    times = [time + node * h for node in nodes]
    stage_times.copy_(torch.where(goes_on, torch.stack(times).to(stage_times.dtype), stage_times))


def _growth(ratio: Tensor, control: Tensor, given: at.Parameters) -> Tensor:
    """As :class:`rampde.control.Growth`, but for what it remembers."""
    p, i, d = given.proportional, given.integral, given.derivative
    factor = given.safety * ratio ** (-(p + i + d) / given.order)
    smallest = torch.full_like(factor, given.dfactor)
    if p or d:
        memory = control[at.PREVIOUS] ** ((p + 2 * d) / given.order) * control[at.ONE_BEFORE] ** (-d / given.order)
        factor = factor * memory
    else:
        smallest = torch.where(ratio < 1, 1.0, smallest)
    factor = torch.maximum(factor, smallest).clamp(max=given.ifactor)
    factor = torch.where(torch.isfinite(ratio), factor, given.dfactor)
    return torch.where(ratio == 0, given.ifactor, factor)


def step_commit(
    record: Tensor,
    output_times: Tensor,
    y_next: Tensor,
    later: Sequence[Tensor],
    interpolant: Sequence[float],
    y: Tensor,
    first: Tensor,
    rows: Tensor,
    staged: Tensor | None = None,
) -> None:
    """Where an attempt stands, as ``record`` of :func:`step_control` says, takes one leaf of the state past it; else
    changes nothing.

    ``y`` becomes ``y_next``, and the velocity at the start of the step, ``first``, the one at its end, the last of
    ``later``, which are those of the stages after the first. ``staged`` receives ``y`` as it was before, rounded to its
    own dtype. ``rows``, (T, *shape), receives the outputs that lie in the step, at ``output_times``, (T,) float64:
    ``y_next`` for one at its end, for others ``y + h sum_i w_i(theta) k_i`` with the polynomials ``w_i`` of which
    ``interpolant`` holds the coefficients of ``theta, theta^2, ...``, as many for each stage, one stage after the
    other. Sums are formed as by :func:`rampde.eager.rk_stage`, and rounded to the dtype of ``rows``.

    All but the times in any floating dtype; the shape is that of ``y``, and its layout is that of all that is written.
    """
    accepted = record[at.ACCEPTED] != 0
    start, h, end = record[at.START], record[at.STEP], record[at.STEP_END]
    index = torch.arange(output_times.shape[0], device=y.device)
    due = accepted & (index >= record[at.FIRST_OUTPUT]) & (index < record[at.LAST_OUTPUT])
    at_end = output_times == end
    theta = (output_times - start) / (end - start)

    def by_row(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * y.dim())

    dtype = accumulation_dtype(y.dtype)
    total = torch.full_like(rows, -0.0, dtype=dtype)
    degree = len(interpolant) // (len(later) + 1)
    for stage, k in enumerate((first, *later)):
        coefficients = interpolant[stage * degree : (stage + 1) * degree]
        if not any(coefficients):
            continue
        weight = 0.0 * theta
        for coefficient in reversed(coefficients):
            weight = weight * theta + coefficient
        weight = theta * weight
        more = total + k.to(dtype) * by_row((h * weight).to(dtype))
        # what has no weight is not read: a nan in it does not spread
        total = torch.where(by_row(weight != 0), more, total)
    inside = total.add_(y).to(rows.dtype)
    values = torch.where(by_row(at_end), y_next.to(rows.dtype), inside)
    rows.copy_(torch.where(by_row(due), values, rows))
    if staged is not None:
        staged.copy_(torch.where(accepted, y.to(staged.dtype), staged))
    first.copy_(torch.where(accepted, later[-1].to(first.dtype), first))
    y.copy_(torch.where(accepted, y_next.to(y.dtype), y))
