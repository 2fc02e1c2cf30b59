"""Which steps a solve takes: proposes them, and judges them by their error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rampde.options import AdaptiveOptions

# the rounding of f is measured at one point, relative to its velocity, and known to such a factor on the way from there
KNOWN_TO_A_FACTOR = 4.0
# growth of steps whose error is hidden by rounding; its root after each that was too large
HIDDEN_GROWTH = 4.0
# the largest error after which a step does not become smaller
GOOD_ENOUGH = math.nextafter(1.0, 0.0)


class Attempt(NamedTuple):
    """One attempted step, in the user's time: ``h`` is negative in reverse time.

    ``after_jump`` and ``before_jump``: f jumps at the start, or at the end, and is evaluated just inside of it.
    """

    start: float
    end: float
    h: float
    after_jump: bool = False
    before_jump: bool = False


class Control(Protocol):
    """What decides on the steps."""

    def propose(self) -> Attempt:
        """The next step to attempt."""

    def judge(self, attempt: Attempt, ratio: float, noise: float) -> bool:
        """Whether the attempt stands; ``ratio`` is its error and ``noise`` the share of rounding that was taken off it,
        both in units of the tolerance."""

    def new_interval(self) -> None:
        """An output time was reached."""


class Replay:
    """Repeats steps that were decided before."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self._attempts = iter(attempts)

    def propose(self) -> Attempt:
        return next(self._attempts)

    def judge(self, attempt: Attempt, ratio: float, noise: float) -> bool:
        return True

    def new_interval(self) -> None:
        pass


class EqualSteps:
    """Steps of one size, until the solve has what it wants."""

    def __init__(self, start: float, h: float, max_num_steps: int) -> None:
        self._start, self._h, self._max_num_steps = start, h, max_num_steps
        self._count = 0

    def propose(self) -> Attempt:
        if self._count >= self._max_num_steps:
            raise no_event(self._count, abs(self._h), self._start + self._count * self._h)
        start = self._start + self._count * self._h
        end = self._start + (self._count + 1) * self._h
        return Attempt(start, end, self._h)

    def judge(self, attempt: Attempt, ratio: float, noise: float) -> bool:
        self._count += 1
        return True

    def new_interval(self) -> None:
        pass


@dataclass
class Growth:
    """Factor from one step size to the next: a PID controller on the logarithm of the error.

    ``safety r_n^-(p+i+d)/k r_{n-1}^(p+2d)/k r_{n-2}^-d/k`` with the errors ``r`` of the last steps in units of the
    tolerance and ``k`` the order of the error in the step size (G. Soederlind, ACM Trans. Math. Softw. 29, 2003);
    ``p = d = 0`` is the elementary controller (Hairer, Norsett, Wanner I, II.4, eq. 4.13).
    """

    options: AdaptiveOptions
    order: int
    previous: float = 1.0
    one_before: float = 1.0

    def factor(self, ratio: float, accepted: bool) -> float:
        """The factor after a step whose error is ``ratio``, which is remembered where the step stands."""
        options = self.options
        if ratio == 0.0:
            return options.ifactor
        if not math.isfinite(ratio):
            return options.dfactor
        p, i, d = options.coefficients
        factor = options.safety * ratio ** (-(p + i + d) / self.order)
        if p or d:
            factor *= self.previous ** ((p + 2 * d) / self.order) * self.one_before ** (-d / self.order)
        # the elementary controller does not take smaller steps after one that was good enough
        smallest = 1.0 if ratio < 1.0 and not (p or d) else options.dfactor
        if accepted:
            self.previous, self.one_before = ratio, self.previous
        return float(min(options.ifactor, max(factor, smallest)))


class AdaptiveSteps:
    """Steps as large as the tolerance allows.

    Where velocities have 16 bits their rounding shows in the estimated error. Smaller steps do not lower it by more
    than their size, and gain nothing: the rounding that enters the state itself is larger still (with independent
    roundings by ``|b| / |e|``). So an error is good enough that is no more than this rounding may be, and a step whose
    error may be nothing but rounding is followed by a much larger one, by less after each that was too large.
    """

    def __init__(self, options: AdaptiveOptions, order: int, start: float, sign: float, h: float) -> None:
        """``start`` in the user's time, ``sign`` -1 in reverse time; ``h`` > 0 is the size of the first step."""
        self._options = options
        self._growth = Growth(options, order)
        self._sign = sign
        self.time = start
        self.h = h
        self._after_jump = False
        self._attempts = 0
        self._step_times = options.stops(options.step_t, start, sign)
        self._jump_times = options.stops(options.jump_t, start, sign)
        # what rounding brought into the estimated error of the worst step so far
        self.worst_noise = 0.0
        self._hidden_growth = min(HIDDEN_GROWTH, options.ifactor)

    def propose(self) -> Attempt:
        options, sign, start = self._options, self._sign, self.time
        if self._attempts >= options.max_num_steps:
            raise too_many(self._attempts, options.max_num_steps, start, self.h)
        self._attempts += 1
        size = bounded(self.h, options)
        end = options.rounded(start + sign * size)
        if end == start:
            raise underflow(size, start)
        before_jump = False
        stop = self._next(self._step_times, start, end)
        jump = self._next(self._jump_times, start, end if stop is None else stop)
        if jump is not None:
            end, before_jump = jump, True
        elif stop is not None:
            end = stop
        h = end - start if before_jump or stop is not None else sign * size
        return Attempt(start, end, h, self._after_jump, before_jump)

    def _next(self, times: list[float], start: float, end: float) -> float | None:
        """The first of ``times`` strictly between ``start`` and ``end``; those that are past are dropped."""
        while times and self._sign * (times[-1] - start) <= 0:
            times.pop()
        return times[-1] if times and self._sign * (end - times[-1]) > 0 else None

    def judge(self, attempt: Attempt, ratio: float, noise: float) -> bool:
        options, size = self._options, abs(attempt.h)
        rounding = KNOWN_TO_A_FACTOR * noise
        allowed = max(rounding, 1.0)
        accepted = ratio <= allowed or size <= options.min_step
        seen = (math.hypot(ratio, noise) if accepted else ratio) / allowed
        if noise > 0.0 and ratio <= allowed:
            seen = min(seen, GOOD_ENOUGH)
        factor = self._growth.factor(seen, accepted)
        if accepted and ratio < rounding:
            factor = max(factor, self._hidden_growth)
        elif not accepted and noise > 0.0 and self._hidden_growth > 1.0:
            # the growth was a guess: half way back
            factor = min(factor, self._hidden_growth**-0.5)
        self.h = min(max(size * factor, options.min_step), options.max_step)
        if accepted:
            self.worst_noise = max(self.worst_noise, noise)
            self.time = attempt.end
            self._after_jump = attempt.before_jump
        else:
            self._hidden_growth **= 0.5
        return accepted

    def new_interval(self) -> None:
        self._attempts = 0


def no_event(steps: int, size: float, end: float) -> RuntimeError:
    """The error of a search with fixed steps that found nothing."""
    return RuntimeError(
        f"no event in {steps} steps of size {size:g}, up to t = {end:.6g}; expected event_fn to change its sign"
    )


def bounded(size: float, options: AdaptiveOptions) -> float:
    """The size of the next step where ``size`` is wanted."""
    return min(max(size if math.isfinite(size) else options.min_step, options.min_step), options.max_step)


def underflow(size: float, start: float) -> RuntimeError:
    """The error of a step that is too small."""
    return RuntimeError(
        f"underflow in the step size: it fell to {size:.3g} at t = {start:.6g}, where time no longer moves."
        " Either func is not finite or has a singularity here, or the tolerances are below what its precision"
        " can reach, or it jumps: name such times in options['jump_t']"
    )


def not_finite(end: float, size: float) -> RuntimeError:
    """The error of a step that ``min_step`` forced and whose end, ``end``, is not finite."""
    return RuntimeError(
        f"non-finite values in the state at t = {end:.6g}, after a step of {size:.3g}"
        " that min_step forced; expected a func that stays finite, or a smaller min_step"
    )


class TooManySteps(RuntimeError):
    """More steps than ``max_num_steps``."""


def too_many(attempts: int, allowed: int, start: float, size: float) -> TooManySteps:
    """The error of more attempts between two outputs than are allowed."""
    return TooManySteps(
        f"max_num_steps exceeded ({attempts} >= {allowed}) between two output times: at t ="
        f" {start:.6g} with steps of {size:.3g}"
    )
