"""The user's f: how it is called, in which precision, and its vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node

from rampde.autocast import AutocastState
from rampde.precision import real_dtype
from rampde.state import State, StateSpec
from rampde.statistics import SolveStats

_run_backward: Callable[..., tuple[Tensor | None, ...]] = Variable._execution_engine.run_backward


class Velocity:
    """``f(t, y)`` on real leaves.

    Attributes:
        original: f as the user gave it.
        func: f, which counts its evaluations where that is asked for.
        spec: structure of the state.
        dtypes: dtype to which the input of each leaf is rounded before f sees it.
        autocast: autocast state of the solve.
        is_plain: whether the state is one real tensor, which f takes and returns as it is.
        origin: where it is given, inputs of graphs are results of an operation on it, and not leaves: a leaf lives as
            long as the graph does.
        half: whether any 16-bit float with a narrow exponent (float16) takes part in f.
    """

    def __init__(
        self,
        func: Callable[[Tensor, State], State],
        spec: StateSpec,
        velocity_dtype: torch.dtype | None,
        stats: SolveStats | None = None,
    ) -> None:
        self.original = func
        self.func = func if stats is None else _counted(func, stats)
        self.spec = spec
        self.autocast = AutocastState.current(spec.device.type)
        self.dtypes = [self._input_dtype(leaf.dtype, velocity_dtype) for leaf in spec.leaves]
        self.half = torch.float16 in self.dtypes or (self.autocast.enabled and self.autocast.dtype == torch.float16)
        self.origin: Tensor | None = None
        self.is_plain = spec.is_tensor and not spec.leaves[0].dtype.is_complex
        self.evaluate = self._plain_call() if self.is_plain else self._structured_call()

    def _input_dtype(self, dtype: torch.dtype, velocity_dtype: torch.dtype | None) -> torch.dtype:
        if dtype.is_complex:
            # there is no 16-bit complex arithmetic to speak of
            return real_dtype(dtype)
        if velocity_dtype is not None:
            return velocity_dtype
        return self.autocast.dtype if self.autocast.enabled else dtype

    def _plain_call(self) -> Callable[[Tensor, list[Tensor]], list[Tensor]]:
        func = self.func
        return lambda time, x: [func(time, x[0])]  # type: ignore[list-item]  # checked at the first call

    def _structured_call(self) -> Callable[[Tensor, list[Tensor]], list[Tensor]]:
        func, assemble, velocity_leaves = self.func, self.spec.assemble, self.spec.velocity_leaves
        return lambda time, x: velocity_leaves(func(time, assemble(x)))

    def evaluate_first(self, time: Tensor, x: list[Tensor]) -> list[Tensor]:
        """As ``evaluate``, with what f returned checked against the state."""
        k = self.func(time, self.spec.assemble(x))
        self.spec.check_velocity(k)
        return self.spec.velocity_leaves(k)

    def evaluate_without_graph(self, time: Tensor, x: list[Tensor]) -> list[Tensor]:
        """As ``evaluate``; a graph that f recorded for itself, as a flow does for its divergence, goes."""
        return [value.detach() if value.requires_grad else value for value in self.evaluate(time, x)]

    def call_with_graph(self, time: Tensor, x: Tensor) -> State:
        """f on a state of one real tensor, recording the graph; ``x`` becomes a leaf of it, unless it has an origin."""
        if self.origin is None:
            x.requires_grad_()
        torch._C._set_grad_enabled(True)
        try:
            if self.origin is not None:
                # minus zero stays as it is
                x.sub_(self.origin)
            return self.func(time, x)
        finally:
            torch._C._set_grad_enabled(False)

    def evaluate_with_graph(self, time: Tensor, x: list[Tensor]) -> list[Tensor]:
        """As ``evaluate``, recording the graph; ``x`` become leaves of it, unless they have an origin. Called where no
        graph is recorded."""
        if self.origin is None:
            for leaf in x:
                leaf.requires_grad_()
        # what torch.enable_grad does, at a third of its price
        torch._C._set_grad_enabled(True)
        try:
            if self.origin is not None:
                for leaf in x:
                    leaf.sub_(self.origin)
            return self.evaluate(time, x)
        finally:
            torch._C._set_grad_enabled(False)


def _counted(func: Callable[[Tensor, State], State], stats: SolveStats) -> Callable[[Tensor, State], State]:
    def counted(time: Tensor, y: State) -> State:
        stats.note_evaluation()
        return func(time, y)

    return counted


class Root(GradientEdge):
    """The result of an operation without its values: its place in the graph, which is all that a product needs."""

    dtype: torch.dtype
    requires_grad = True

    @property
    def grad_fn(self) -> Node:
        return self.node


def root(result: Tensor) -> Tensor | Root:
    """The place of ``result`` in the graph; itself, where it is no result of an operation."""
    node = result.grad_fn
    if node is None:
        return result
    found = Root(node, result.output_nr)
    found.dtype = result.dtype
    return found


def vector_jacobian_product(
    k: Sequence[Tensor | Root],
    inputs: Sequence[Tensor | Root],
    cotangents: Sequence[Tensor | None],
    retain_graph: bool,
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
    return _run_backward(
        tuple(k),
        tuple(cotangents),
        retain_graph,
        False,  # create_graph
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
