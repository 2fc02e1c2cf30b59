"""The state of a solve whose steps are decided on the device: where its numbers lie, and what they are at the start."""

from __future__ import annotations

from typing import NamedTuple

from rampde.control import HIDDEN_GROWTH as LARGEST_HIDDEN_GROWTH
from rampde.control import Attempt
from rampde.options import AdaptiveOptions

# layout of the control, a float64 vector on the device that the operators read and write
TIME = 0  # t, where the attempt starts
SIZE = 1  # size that the controller wants, before it is bounded
H = 2  # signed step size of the attempt
END = 3  # where it ends
PREVIOUS = 4  # error of the last accepted step in units of the tolerance, for the controller, and
ONE_BEFORE = 5  # of the one before
HIDDEN_GROWTH = 6  # growth of steps whose error is hidden by rounding
WORST_NOISE = 7  # what rounding brought into the estimated error of the worst step so far
ATTEMPTS = 8  # since the last output, the present one included
DUE = 9  # index of the next output
STATUS = 10
CONTROL_SIZE = 11

# what the status may be; once it is not RUNNING, nothing else changes
RUNNING = 0
DONE = 1  # every output is written
UNDERFLOW = 2  # the next step is so small that time does not move
TOO_MANY = 3  # as many attempts as are allowed between two outputs
NOT_FINITE = 4  # min_step forced a step whose end is not finite

# layout of the record of one attempt, which is float64, too
ACCEPTED = 0  # 1 where the step stands; else the rest says nothing
START = 1
STEP = 2  # signed step size
STEP_END = 3
FIRST_OUTPUT = 4  # the outputs in the step are those from here
LAST_OUTPUT = 5  # to the one before this one
RECORD_SIZE = 6


class Parameters(NamedTuple):
    """What the controller is told of the options, all numbers; ``sign`` is -1 in reverse time, and ``order`` that of
    the estimated error in the step size."""

    sign: float
    order: float
    safety: float
    ifactor: float
    dfactor: float
    min_step: float
    max_step: float
    max_num_steps: float
    proportional: float
    integral: float
    derivative: float

    @staticmethod
    def of(options: AdaptiveOptions, order: int, sign: float) -> Parameters:
        return Parameters(
            sign,
            order,
            options.safety,
            options.ifactor,
            options.dfactor,
            options.min_step,
            options.max_step,
            options.max_num_steps,
            *options.coefficients,
        )


def initial_control(options: AdaptiveOptions, attempt: Attempt, size: float) -> list[float]:
    """The control before the first ``attempt``, with a step of ``size``; the output at the start is written."""
    control = [0.0] * CONTROL_SIZE
    control[TIME], control[SIZE], control[H], control[END] = attempt.start, size, attempt.h, attempt.end
    control[PREVIOUS] = control[ONE_BEFORE] = 1.0
    control[HIDDEN_GROWTH] = min(LARGEST_HIDDEN_GROWTH, options.ifactor)
    control[ATTEMPTS] = control[DUE] = 1.0
    control[STATUS] = RUNNING
    return control
