"""The changes of the state in eight bits: float8 (e4m3) with a scale for each block of 128 elements."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rampde import fp8_blocks
from rampde.checkpoint.policy import Checkpoint

# seeds of stochastic rounding must differ from step to step and from leaf to leaf
_LEAVES = 1 << 10
_STEPS = 1 << 32


class Quantised(NamedTuple):
    """A tensor in eight bits: ``codes`` times the scale of their block."""

    codes: Tensor
    scales: Tensor


class Fp8(Checkpoint):
    """Keeps the change of the state over each step in eight bits, half of what "step" keeps.

    The kernel that ends a step writes it, and in the backward pass one kernel makes of it the state at the start of the
    step and the input of the first stage: memory is not passed over once more. A change is known to a sixteenth of its
    size at worst, element by element, and the change of a step is a part of the state that becomes smaller with the
    steps; only gradients see the difference, the result of the solve does not. For the explicit methods.
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

    def empty_like(self, y: Tensor) -> Quantised:
        """Where the kernel writes the change of a state like ``y``."""
        return Quantised(*fp8_blocks.empty_like(y))

    def arguments(self, target: Quantised, step: int, leaf: int) -> tuple[Tensor, Tensor, int | None]:
        """What the operators take to write ``target``, the change from the state at the start of ``step`` to that
        before it."""
        if not self.stochastic:
            return *target, None
        return *target, ((self.seed * _STEPS + step) * _LEAVES + leaf) % (1 << 63)

    def store(self, state: Any) -> Any:
        return state

    def load(self, stored: Any) -> Any:
        return stored
