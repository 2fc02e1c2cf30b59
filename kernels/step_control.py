"""``rampde::step_control`` on the GPU: judges an attempted step and proposes the next one, in one tiny program."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampde import control as host
from rampde import step_state as at
from rampde.kernels import operands
from rampde.kernels.elementwise import rounded
from rampde.kernels.launch import device_of

TIME = tl.constexpr(at.TIME)
SIZE = tl.constexpr(at.SIZE)
H = tl.constexpr(at.H)
END = tl.constexpr(at.END)
PREVIOUS = tl.constexpr(at.PREVIOUS)
ONE_BEFORE = tl.constexpr(at.ONE_BEFORE)
HIDDEN_GROWTH = tl.constexpr(at.HIDDEN_GROWTH)
WORST_NOISE = tl.constexpr(at.WORST_NOISE)
ATTEMPTS = tl.constexpr(at.ATTEMPTS)
DUE = tl.constexpr(at.DUE)
STATUS = tl.constexpr(at.STATUS)
RUNNING = tl.constexpr(at.RUNNING)
DONE = tl.constexpr(at.DONE)
UNDERFLOW = tl.constexpr(at.UNDERFLOW)
TOO_MANY = tl.constexpr(at.TOO_MANY)
NOT_FINITE = tl.constexpr(at.NOT_FINITE)
ACCEPTED = tl.constexpr(at.ACCEPTED)
START = tl.constexpr(at.START)
STEP = tl.constexpr(at.STEP)
STEP_END = tl.constexpr(at.STEP_END)
FIRST_OUTPUT = tl.constexpr(at.FIRST_OUTPUT)
LAST_OUTPUT = tl.constexpr(at.LAST_OUTPUT)
KNOWN_TO_A_FACTOR = tl.constexpr(host.KNOWN_TO_A_FACTOR)
GOOD_ENOUGH = tl.constexpr(host.GOOD_ENOUGH)

OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
"""One warp does what one thread could; products are rounded before they are added, as on the host."""

OUTPUTS_AT_ONCE = 128
"""Output times that are compared with the end of a step at once: more than lie in most steps."""


@triton.jit
def power(base, exponent):
    """``base ** exponent`` of a positive number."""
    return tl.exp(exponent * tl.log(base))


@triton.jit
def exact(number):
    """A number in float64: a bare one would become float32 where it meets no other of 64 bits."""
    return tl.full((), number, tl.float64)


@triton.jit
def worst_leaf(sums_ptr, sizes_ptr, leaves):
    """Error of a step without the rounding's share, and that share, of the worst leaf each."""
    largest, largest_share = exact(0.0), exact(0.0)
    for leaf in range(leaves):
        size = tl.load(sizes_ptr + leaf)
        square, share = tl.load(sums_ptr + 2 * leaf), tl.load(sums_ptr + 2 * leaf + 1)
        largest = tl.maximum(largest, square / size - share / size)
        largest_share = tl.maximum(largest_share, share / size)
    return tl.sqrt(largest), tl.sqrt(largest_share)


@triton.jit
def count_reached(times_ptr, due, count, end, sign, stands, AT_ONCE: tl.constexpr):
    """Index of the first output after ``end``, from ``due`` on; ``due`` itself where the step does not stand."""
    lane = tl.arange(0, AT_ONCE)
    found = stands.to(tl.int32) * AT_ONCE
    while found == AT_ONCE:
        index = due + lane
        inside = index < count
        times = tl.load(times_ptr + index, mask=inside, other=0.0)
        found = tl.sum((inside & (sign * (end - times) >= 0.0)).to(tl.int32), 0)
        due += found
    return due


# what changes from solve to solve must not make another kernel
@triton.jit(
    do_not_specialize=[
        "control_ptr", "record_ptr", "stage_times_ptr", "sums_ptr", "sizes_ptr", "output_times_ptr", "leaves", "count",
        "sign", "order", "safety", "ifactor", "dfactor", "min_step", "max_step", "max_num_steps", "p", "i", "d",
    ]
)  # fmt: skip
def step_control_kernel(
    control_ptr,
    record_ptr,
    stage_times_ptr,
    sums_ptr,  # [leaves, 2]
    sizes_ptr,  # [leaves]
    output_times_ptr,  # [count]
    leaves: tl.int64,
    count: tl.int64,
    sign: tl.float64,
    order: tl.float64,
    safety: tl.float64,
    ifactor: tl.float64,
    dfactor: tl.float64,
    min_step: tl.float64,
    max_step: tl.float64,
    max_num_steps: tl.float64,
    p: tl.float64,
    i: tl.float64,
    d: tl.float64,
    nodes: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    sign, order, safety = exact(sign), exact(order), exact(safety)
    ifactor, dfactor = exact(ifactor), exact(dfactor)
    min_step, max_step, max_num_steps = exact(min_step), exact(max_step), exact(max_num_steps)
    p, i, d = exact(p), exact(i), exact(d)
    time, step, end = tl.load(control_ptr + TIME), tl.load(control_ptr + H), tl.load(control_ptr + END)
    previous, one_before = tl.load(control_ptr + PREVIOUS), tl.load(control_ptr + ONE_BEFORE)
    hidden, worst_noise = tl.load(control_ptr + HIDDEN_GROWTH), tl.load(control_ptr + WORST_NOISE)
    attempts, first_due = tl.load(control_ptr + ATTEMPTS), tl.load(control_ptr + DUE)
    running = tl.load(control_ptr + STATUS) == RUNNING

    # the judgement
    ratio, noise = worst_leaf(sums_ptr, sizes_ptr, leaves)
    size = tl.abs(step)
    rounding = KNOWN_TO_A_FACTOR * noise
    allowed = tl.maximum(rounding, exact(1.0))
    good = ratio <= allowed
    accepted = good | (size <= min_step)
    seen = tl.where(accepted, tl.sqrt(ratio * ratio + noise * noise), ratio) / allowed
    seen = tl.where((noise > 0.0) & good, tl.minimum(seen, exact(GOOD_ENOUGH)), seen)

    # the controller
    regular = (seen > 0.0) & (seen < float("inf"))
    elementary = (p == 0.0) & (d == 0.0)
    factor = safety * power(tl.where(regular, seen, exact(1.0)), -(p + i + d) / order)
    factor *= power(previous, (p + 2.0 * d) / order) * power(one_before, -d / order)
    smallest = tl.where(elementary & (seen < 1.0), exact(1.0), dfactor)
    factor = tl.minimum(ifactor, tl.maximum(factor, smallest))
    factor = tl.where(regular, factor, tl.where(seen == 0.0, ifactor, dfactor))
    factor = tl.where(ratio < rounding, tl.maximum(factor, hidden), factor)
    guessed = (accepted == 0) & (noise > 0.0) & (hidden > 1.0)
    factor = tl.where(guessed, tl.minimum(factor, exact(1.0) / tl.sqrt(hidden)), factor)
    wanted_size = tl.minimum(tl.maximum(size * factor, min_step), max_step)

    # where that leaves the solve
    stands = running & accepted & (ratio < float("inf"))
    failed = running & accepted & (ratio == float("inf"))
    now = tl.where(stands, end, time)
    reached = count_reached(output_times_ptr, first_due.to(tl.int64), count, end, sign, stands, AT_ONCE)
    due = reached.to(tl.float64)
    since_output = tl.where(due > first_due, exact(0.0), attempts)
    done = stands & (reached == count)

    # the next attempt
    bounded = tl.where(wanted_size < float("inf"), wanted_size, min_step)
    h = sign * tl.minimum(tl.maximum(bounded, min_step), max_step)
    next_end = now + h
    wanted = running & (failed == 0) & (done == 0)
    too_many = wanted & (since_output >= max_num_steps)
    underflow = wanted & (too_many == 0) & (next_end == now)
    goes_on = wanted & (too_many == 0) & (underflow == 0)

    # after all that is read: the record is read by the step, and the control by the next attempt
    tl.debug_barrier()
    tl.store(record_ptr + ACCEPTED, stands.to(tl.float64))
    tl.store(record_ptr + START, time)
    tl.store(record_ptr + STEP, step)
    tl.store(record_ptr + STEP_END, end)
    tl.store(record_ptr + FIRST_OUTPUT, first_due)
    tl.store(record_ptr + LAST_OUTPUT, due)
    if running:
        remembered = stands & regular
        tl.store(control_ptr + TIME, now)
        tl.store(control_ptr + SIZE, wanted_size)
        tl.store(control_ptr + PREVIOUS, tl.where(remembered, seen, previous))
        tl.store(control_ptr + ONE_BEFORE, tl.where(remembered, previous, one_before))
        tl.store(control_ptr + HIDDEN_GROWTH, tl.where(accepted, hidden, tl.sqrt(hidden)))
        tl.store(control_ptr + WORST_NOISE, tl.where(stands, tl.maximum(worst_noise, noise), worst_noise))
        tl.store(control_ptr + DUE, due)
        status = tl.where(done, DONE, tl.where(failed, NOT_FINITE, RUNNING))
        status = tl.where(too_many, TOO_MANY, tl.where(underflow, UNDERFLOW, status))
        tl.store(control_ptr + STATUS, status.to(tl.float64))
    if goes_on:
        tl.store(control_ptr + H, h)
        tl.store(control_ptr + END, next_end)
        tl.store(control_ptr + ATTEMPTS, since_output + 1.0)
        for stage in tl.static_range(len(nodes)):
            # that of a node of 1 is the end, as it was formed alike
            at_stage = now + exact(nodes[stage]) * h
            tl.store(stage_times_ptr + stage, rounded(at_stage, stage_times_ptr.dtype.element_ty))


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
    """Judges and proposes; :func:`rampde.eager_adaptive.step_control` says what it means."""
    leaves = sizes.numel()
    expected = {
        "control": (control, (at.CONTROL_SIZE,)),
        "record": (record, (at.RECORD_SIZE,)),
        "sums": (sums, (leaves, 2)),
        "sizes": (sizes, (leaves,)),
        "output_times": (output_times, (output_times.numel(),)),
    }
    for name, (tensor, shape) in expected.items():
        operands.check_numbers("step_control", name, tensor, shape, torch.float64, control.device)
    operands.check_dtype("step_control", "stage_times has dtype", stage_times.dtype)
    operands.check_numbers("step_control", "stage_times", stage_times, (len(nodes),), stage_times.dtype, control.device)
    with device_of(control):
        step_control_kernel[(1,)](
            control, record, stage_times, sums, sizes, output_times, leaves, output_times.numel(), *parameters,
            tuple(nodes), OUTPUTS_AT_ONCE, **OPTIONS,
        )  # fmt: skip
