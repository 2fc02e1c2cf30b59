"""States in eight bits: float8 (e4m3) with a scale for each block of 128 elements."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rampde.checkpoint.policy import Checkpoint
from rampde.ops import rk_stage, rk_update

BLOCK = 128
"""Elements that share a scale, consecutive in memory."""

# seeds of stochastic rounding must differ from step to step and from leaf to leaf
_LEAVES = 1 << 10
_STEPS = 1 << 32


class Quantised(NamedTuple):
    """A tensor in eight bits: ``values`` times the scale of their block, to be loaded in ``dtype``."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


class Fp8(Checkpoint):
    """Keeps the state of each step in eight bits, half of what "step" keeps.

    The kernel that ends a step writes it, and the kernel that makes the input of the first stage reads it: memory is
    not passed over once more. An element is known to a sixteenth of its size at worst, so that gradients are accurate to
    some percent of what the state is worth to them; the result of the solve is not affected. For the explicit methods.
    """

    def __init__(self, stages: str = "step", stochastic: bool = False, seed: int = 0) -> None:
        """
        Args:
            stages: "step" or "lean": how the stages of a step come back from its state.
            stochastic: round up or down at random, so that the mean is right; else to the nearest number.
            seed: of the random numbers; the same seed gives the same bits.

        Raises:
            TypeError, ValueError: an argument that is not as described.
        """
        if stages not in ("step", "lean"):
            raise ValueError(f'stages is {stages!r}, expected "step" or "lean"')
        if not isinstance(stochastic, bool):
            raise TypeError(f"stochastic is {stochastic!r}, expected True or False")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}, expected an integer")
        super().__init__(stages)
        self.stochastic, self.seed = stochastic, seed

    @property
    def name(self) -> str:
        return "fp8" if self.stages == "step" else f"fp8 {self.stages}"

    @property
    def quantiser(self) -> Fp8:
        return self

    @property
    def cheaper(self) -> str:
        if self.stages == "step":
            return 'rampde.Fp8("lean")'
        return f"rampde.Offload({self!r})"

    def __repr__(self) -> str:
        return f"Fp8({self.stages!r}, stochastic={self.stochastic})"

    def empty_like(self, x: Tensor, dtype: torch.dtype | None = None) -> Quantised:
        """Where the kernel writes a state like ``x``, to be loaded in ``dtype``, else that of ``x``."""
        values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-x.numel() // BLOCK), dtype=torch.float32, device=x.device)
        return Quantised(values, scales, x.dtype if dtype is None else dtype)

    def arguments(self, target: Quantised, step: int, leaf: int) -> tuple[Tensor, Tensor, int | None]:
        """What the operators take to write ``target``, the state at the start of ``step``."""
        seed = (self.seed * _STEPS + step) * _LEAVES + leaf if self.stochastic else None
        return target.values, target.scales, None if seed is None else seed % (1 << 63)

    def store(self, state: Tensor | Quantised) -> Quantised:
        if isinstance(state, Quantised):
            return state
        # only the initial state comes here; all others were written with the step before
        target = self.empty_like(state)
        rk_update(
            state, [], _zero(state), [], torch.empty_like(state), None, None, None, 0, *self.arguments(target, 0, 0)
        )
        return target

    def load(self, stored: Quantised) -> Tensor:
        result: Tensor = rk_stage(stored.values, [], _zero(stored.values), [], stored.dtype, stored.scales)
        return result


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)
