"""Which steps the samples of a batch take where each has its own: :mod:`rampde.control` on vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rampde.control import GOOD_ENOUGH, HIDDEN_GROWTH, KNOWN_TO_A_FACTOR
from rampde.options import AdaptiveOptions


class BatchControl:
    """Time and step size of every sample that is still in the batch, and the controller that changes them.

    Attributes:
        time: (R,) where each sample is.
        h: (R,) > 0, the size of its next step.
        worst_noise: (R,) what rounding brought into the estimated error of its worst step, in units of the tolerance.
    """

    VECTORS = ("time", "h", "worst_noise", "_previous", "_one_before", "_hidden_growth")

    def __init__(self, options: AdaptiveOptions, order: int, start: Tensor, h: Tensor, noisy: bool) -> None:
        """``noisy``: whether 16-bit velocities take part, whose rounding must not shrink the steps."""
        self._options, self._order, self._noisy = options, order, noisy
        self._bounded = options.min_step > 0 or math.isfinite(options.max_step)
        self.time, self.h = start, self._clamped(h)
        self.worst_noise = torch.zeros_like(start)
        self._previous = self._one_before = torch.ones_like(start)
        self._hidden_growth = torch.full_like(start, min(HIDDEN_GROWTH, options.ifactor))
        self._tiny = torch.finfo(start.dtype).tiny

    def _clamped(self, h: Tensor) -> Tensor:
        return h.clamp(self._options.min_step, self._options.max_step) if self._bounded else h

    def judge(self, ratio: Tensor, noise: Tensor) -> Tensor:
        """Which steps stand, by their errors; ``h`` is then that of the next ones."""
        size, options = self.h, self._options
        rounding = KNOWN_TO_A_FACTOR * noise
        allowed = rounding.clamp(min=1.0) if self._noisy else torch.ones_like(ratio)
        accepted = ratio <= allowed
        good = accepted
        if options.min_step > 0:
            accepted = accepted | (size <= options.min_step)
        if self._noisy:
            self.worst_noise = torch.where(accepted, torch.maximum(self.worst_noise, noise), self.worst_noise)
            hidden = accepted & (ratio < rounding)
            seen = torch.where(accepted, torch.hypot(ratio, noise), ratio) / allowed
            ratio = torch.where(good & (noise > 0), seen.clamp(max=GOOD_ENOUGH), seen)
        p, i, d = options.coefficients
        # an infinite error gives 0, which the smallest factor replaces
        error = ratio.clamp(min=self._tiny)
        factor = options.safety * error ** (-(p + i + d) / self._order)
        if p or d:
            factor = factor * self._previous ** ((p + 2 * d) / self._order) * self._one_before ** (-d / self._order)
            self._one_before = torch.where(accepted, self._previous, self._one_before)
            self._previous = torch.where(accepted, error, self._previous)
            factor = factor.clamp(options.dfactor, options.ifactor)
        else:
            smallest = torch.where(ratio < 1.0, 1.0, options.dfactor)
            factor = torch.maximum(factor, smallest).clamp(max=options.ifactor)
        if self._noisy:
            factor = torch.where(hidden, torch.maximum(factor, self._hidden_growth), factor)
            back = torch.minimum(factor, self._hidden_growth**-0.5)
            factor = torch.where(accepted | (noise == 0), factor, back)
            self._hidden_growth = torch.where(accepted, self._hidden_growth, self._hidden_growth**0.5)
        self.h = self._clamped(size * factor)
        return accepted

    def keep(self, indices: Tensor) -> None:
        """Drops all samples but those at ``indices``."""
        for name in self.VECTORS:
            setattr(self, name, getattr(self, name)[indices])
