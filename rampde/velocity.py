"""The user's f: how it is called, in which precision, and its vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from rampde.state import State, StateSpec

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AutocastState:
    """The caller's autocast on one device type, to be entered again where f is evaluated later."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @staticmethod
    def current(device_type: str) -> AutocastState:
        if not torch.amp.is_autocast_available(device_type):
            return AutocastState(device_type, False, torch.float32, True)
        return AutocastState(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This autocast state; one entry for a whole sweep, so that parameters are cast once and not per call."""
        if not torch.amp.is_autocast_available(self.device_type):
            yield
            return
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            yield
            return
        with torch.autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled):
            yield


class Velocity:
    """``f(t, y)`` on real leaves.

    Attributes:
        spec: structure of the state.
        dtypes: dtype to which the input of each leaf is rounded before f sees it.
        autocast: autocast state of the solve.
        half: whether any 16-bit float with a narrow exponent (float16) takes part in f.
    """

    def __init__(
        self, func: Callable[[Tensor, State], State], spec: StateSpec, velocity_dtype: torch.dtype | None
    ) -> None:
        self.func = func
        self.spec = spec
        self.autocast = AutocastState.current(spec.device.type)
        self.dtypes = [self._input_dtype(leaf.dtype, velocity_dtype) for leaf in spec.leaves]
        self.half = torch.float16 in self.dtypes or (self.autocast.enabled and self.autocast.dtype == torch.float16)
        self.evaluate = self._plain_call() if spec.is_tensor else self._structured_call()

    def _input_dtype(self, dtype: torch.dtype, velocity_dtype: torch.dtype | None) -> torch.dtype:
        if dtype.is_complex:
            # there is no 16-bit complex arithmetic to speak of
            return dtype.to_real()
        if velocity_dtype is not None:
            return velocity_dtype
        return self.autocast.dtype if self.autocast.enabled else dtype

    def _plain_call(self) -> Callable[[Tensor, list[Tensor]], list[Tensor]]:
        func, spec = self.func, self.spec
        if spec.leaves[0].dtype.is_complex:
            return self._structured_call()
        return lambda time, x: [func(time, x[0])]  # type: ignore[list-item]  # checked at the first call

    def _structured_call(self) -> Callable[[Tensor, list[Tensor]], list[Tensor]]:
        func, assemble, velocity_leaves = self.func, self.spec.assemble, self.spec.velocity_leaves
        return lambda time, x: velocity_leaves(func(time, assemble(x)))

    def evaluate_first(self, time: Tensor, x: list[Tensor]) -> list[Tensor]:
        """As ``evaluate``, with what f returned checked against the state."""
        k = self.func(time, self.spec.assemble(x))
        self.spec.check_velocity(k)
        return self.spec.velocity_leaves(k)

    def evaluate_with_graph(self, time: Tensor, x: list[Tensor]) -> list[Tensor]:
        """As ``evaluate``, recording the graph; ``x`` become leaves of it."""
        for leaf in x:
            leaf.requires_grad_()
        with torch.enable_grad():
            return self.evaluate(time, x)


def vector_jacobian_product(
    k: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], retain_graph: bool
) -> Sequence[Tensor | None]:
    """Gradients of ``sum_l <k_l, cotangents_l>`` with respect to ``inputs``; None where k does not depend on one.

    ``cotangents[l]`` has the shape and dtype of ``k[l]``; what has no graph in ``k`` is left out.
    """
    for value in k:
        if not value.requires_grad:
            pairs = [(value, c) for value, c in zip(k, cotangents, strict=True) if value.requires_grad]
            if not pairs:
                return [None] * len(inputs)
            k, cotangents = [value for value, _ in pairs], [c for _, c in pairs]
            break
    # what torch.autograd.grad calls, without its checks of arguments that are right by construction: they cost
    # as much as the engine itself for a small f
    return _engine_run_backward(
        tuple(k),
        tuple(cotangents),
        retain_graph,
        False,  # create_graph
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
