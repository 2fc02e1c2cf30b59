"""Dynamic scaling of the adjoint, decided on the device.

Before each step of the sweep the adjoint is multiplied by a power of two ``S`` so that its largest element lies
near ``target``, within the range of float16 and far from its underflow. ``S`` cancels exactly. When a step
overflows all the same, it and all later ones change nothing on the device; the host sees this once, at the end of
the sweep, lowers ``S`` and resumes at that step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# layout of the scale state, a float32 vector on the device that the operators read and write
SCALE = 0  # S of the step being swept, a power of two
SCALE_OF_STEP = 1  # S of the step just decided on; 0 when it overflowed
MAXIMUM = 2  # max|adjoint| gathered since the last decision
FINITE = 3  # 1 while everything gathered since the last decision is finite
HEADROOM = 4  # power of two by which overflows have lowered S
CLEAN_STEPS = 5  # steps without overflow since the last change of HEADROOM
COMMITTED_STEPS = 6  # steps whose result stands
INCREASED = 7  # how often HEADROOM grew
OVERFLOWED = 8  # 1 once a step overflowed: all later steps leave everything as it is
STATE_SIZE = 9

# clean steps after which an S lowered by an overflow is tried higher again, as in torch.amp.GradScaler
INCREASE_INTERVAL = 2000

# changes of the scale that an instance remembers, which may serve a whole training
HISTORY = 10_000


class DynamicScaler:
    """Dynamic loss scaling for the discrete adjoint.

    ``S = headroom * 2^floor(log2(target / (max|adjoint| + delta)))`` before every step, with
    ``target = target_factor / (eps * sqrt(d))``, ``d`` the state elements of one sample (Celledoni, Owren, Ruthotto,
    Yang, arXiv 2510.23498, with ``S`` renewed in every step). ``headroom`` starts at 1; each overflow multiplies
    it by ``decrease_factor``, 2000 clean steps by ``increase_factor`` up to 1. An instance that the caller keeps
    carries its headroom from solve to solve.

    Args:
        dtype_low: 16-bit dtype whose range is to be kept.
        target_factor: largest scaled adjoint times ``eps * sqrt(d)``; None for 1.
        increase_factor, decrease_factor: powers of two, above and below 1.
        max_attempts: how often one solve may lower ``S`` before it gives up.
        delta: added to the largest adjoint; not negative.
        verbose: print every change of ``S``.

    Attributes:
        S: scale of the first step of the latest sweep, None before it.
        scale_history: pairs (kind, S), kind "init", "overflow" or "increase", the latest 10,000.
        overflowed: 0-dim bool on the device, whether the latest sweep that ran in a CUDA graph overflowed, so that all
            its gradients are infinite; None before the first sweep. The host is not told.

    Raises:
        TypeError, ValueError: an argument outside of what is said above.
    """

    __name__ = "DynamicScaler"

    def __init__(
        self,
        dtype_low: torch.dtype = torch.float16,
        target_factor: float | None = None,
        increase_factor: float = 2.0,
        decrease_factor: float = 0.5,
        max_attempts: int = 50,
        delta: float = 0.0,
        verbose: bool = False,
    ) -> None:
        if not isinstance(dtype_low, torch.dtype) or not dtype_low.is_floating_point:
            raise TypeError(f"dtype_low is {dtype_low!r}, expected a floating point torch.dtype")
        for name, value in (("increase_factor", increase_factor), ("decrease_factor", decrease_factor)):
            _check_number(name, value)
            if not value > 0 or math.frexp(value)[0] != 0.5:
                raise ValueError(f"{name} is {value!r}, expected a power of two, so that scaling is exact")
        if increase_factor <= 1:
            raise ValueError(f"increase_factor is {increase_factor}, expected more than 1")
        if decrease_factor >= 1:
            raise ValueError(f"decrease_factor is {decrease_factor}, expected less than 1")
        if target_factor is not None:
            _check_number("target_factor", target_factor)
            if not 0 < target_factor < math.inf:
                raise ValueError(f"target_factor is {target_factor!r}, expected a positive number")
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int):
            raise TypeError(f"max_attempts is {max_attempts!r}, expected a positive integer")
        if max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts!r}, expected a positive integer")
        if not isinstance(verbose, bool):
            raise TypeError(f"verbose is {verbose!r}, expected True or False")
        _check_number("delta", delta)
        if not 0 <= delta < math.inf:
            raise ValueError(f"delta is {delta!r}, expected a number that is not negative")
        self.dtype_low = dtype_low
        self.eps = torch.finfo(dtype_low).eps
        self.target = (1.0 if target_factor is None else target_factor) / self.eps
        self.increase_factor = float(increase_factor)
        self.decrease_factor = float(decrease_factor)
        self.max_attempts = max_attempts
        self.delta = float(delta)
        self.verbose = verbose
        self.headroom = 1.0
        self.S: float | None = None
        self.scale_history: list[tuple[str, float]] = []
        self.overflowed: Tensor | None = None
        self._headroom_on: dict[torch.device, Tensor] = {}

    @property
    def is_initialized(self) -> bool:
        """Whether a sweep has chosen a scale."""
        return self.S is not None

    def new_state(self, device: torch.device) -> Tensor:
        """A scale state as it is before a sweep."""
        # before a graph is recorded, which would make it anew whenever it is repeated
        self._reserve(device)
        state = torch.zeros(STATE_SIZE, device=device)
        state[SCALE] = 1.0
        state[FINITE] = 1.0
        state[HEADROOM] = self.headroom
        return state

    def recorded_state(self, device: torch.device) -> Tensor:
        """As ``new_state``, for a sweep in a CUDA graph: the headroom is the one that the graph has left behind."""
        self._reserve(device)
        state = torch.zeros(STATE_SIZE, device=device)
        state[SCALE].fill_(1.0)
        state[FINITE].fill_(1.0)
        state[HEADROOM].copy_(self._headroom_on[device])
        return state

    def keep(self, state: Tensor) -> Tensor:
        """Leaves behind what a sweep in a CUDA graph has learned; whether it overflowed, 0-dim bool."""
        device = state.device
        self._headroom_on[device].copy_(state[HEADROOM])
        assert self.overflowed is not None
        self.overflowed.copy_(state[OVERFLOWED] != 0)
        return self.overflowed

    def _reserve(self, device: torch.device) -> None:
        # memory that stays where it is, as a graph knows addresses
        if device not in self._headroom_on:
            self._headroom_on[device] = torch.full((), self.headroom, device=device)
        if self.overflowed is None or self.overflowed.device != device:
            self.overflowed = torch.zeros((), dtype=torch.bool, device=device)

    def note(self, kind: str, scale: float) -> None:
        """Records a change of the scale."""
        self.scale_history.append((kind, scale))
        del self.scale_history[:-HISTORY]
        if self.verbose:
            print(f"DynamicScaler: {kind}, S = {scale:g}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number")


def power_of_two_below(value: Tensor) -> Tensor:
    """``2^floor(log2(value))``, exactly, between ``2^-96`` and ``2^96``; 1 where ``value`` is not positive."""
    usable = value > 0
    value = value.clamp(max=torch.finfo(value.dtype).max)
    # frexp is exact where log2 rounds: m * 2^e with m in [1/2, 1) has floor(log2) = e - 1
    exponent = torch.frexp(torch.where(usable, value, 1.0)).exponent - 1
    return torch.ldexp(torch.ones_like(value), exponent.clamp(-96, 96))


def automatic_scaler() -> DynamicScaler:
    """The scaler of ``loss_scaler=None`` in float16: gives up sooner than it underflows, and lowers S faster."""
    return DynamicScaler(torch.float16, decrease_factor=2.0**-4, max_attempts=10)
