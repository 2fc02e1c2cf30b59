"""Solves whose f has parameters sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``).

FSDP gathers the parameters of a module before each forward call and frees them after it, and it sums up and shards
their gradients as soon as the backward pass has left the call. In a solve f is called again and again, and a sweep
takes a product for each call: the parameters would be gathered for every evaluation, and the gradients, which the
sweep returns as a whole, would come after FSDP has looked for them and be lost.

To FSDP a solve is therefore one forward call of each module that f runs: the parameters are gathered where f calls the
module first, and held; the module is told that its call is over when the solve is; its gradients are summed up after
the sweep. Evaluations and products contain no communication then, so that ranks may take different steps.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

_FSDP = "torch.distributed.fsdp"


def may_be_sharded() -> bool:
    """Whether there can be a sharded module: FSDP, which is not imported for that, makes a class for each kind."""
    if torch.compiler.is_dynamo_compiling() or not torch.distributed.is_available():
        return False
    return torch.distributed.is_initialized() and _FSDP in sys.modules and bool(_sharded_class().__subclasses__())


def _sharded_class() -> Any:
    return sys.modules[_FSDP].FSDPModule


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether one of ``modules``, or of those in them, is sharded."""
    if not may_be_sharded():
        return False
    kind = _sharded_class()
    return any(isinstance(part, kind) for module in modules for part in module.modules())


class Hold:
    """For a solve as a context: holds the parameters of sharded modules that f calls within it.

    In the terms of FSDP a module is in forward from its first call to the end of the solve. Meanwhile its state is the
    one that FSDP has for recomputation in the backward pass, in which calls neither gather, nor free, nor watch.
    """

    def __init__(self, y0: Sequence[Tensor], is_late: Callable[[], bool]) -> None:
        """``y0``: the leaves that the solve begins with; ``is_late``: whether the gradients of a module that f calls
        now, for the first time, would be missing."""
        self._y0, self._is_late = y0, is_late
        self._outputs: Sequence[Tensor] = ()
        self._entered: list[tuple[Any, nn.Module]] = []
        self._thread = threading.get_ident()
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Hold:
        if may_be_sharded():
            self._handle = register_module_forward_pre_hook(self._before_call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._leave()

    def release(self, outputs: list[Tensor]) -> list[Tensor]:
        """The results of the solve, as they are: where their gradients arrive, parameters are gathered again."""
        self._outputs = outputs
        return outputs

    def check_parameters(self, given: Sequence[Tensor]) -> None:
        """Raises ValueError where ``given`` holds shards instead of the parameters that f has within the solve."""
        if self._entered and any(is_traceable_wrapper_subclass(tensor) for tensor in given):
            raise ValueError(
                "adjoint_params holds shards of parameters, expected None where func calls a module that fully_shard"
                " was called on: its parameters are found"
            )

    def _before_call(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, _sharded_class()) and threading.get_ident() == self._thread:
            self._enter(module)

    def _enter(self, module: Any) -> None:
        state = module._get_fsdp_state()
        states = type(state._training_state)
        # what surrounds the solve holds its parameters already, and in a backward pass FSDP does
        if state._training_state != states.IDLE:
            return
        if self._is_late() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"func calls the sharded module {type(module).__name__} only after its first evaluation, so that the"
                " gradients of its parameters would be missing. Call fully_shard on the module that calls odeint and"
                ' not on this one, or use checkpoint="tape"'
            )
        state._pre_forward(module, (), {})
        state._training_state = states.PRE_BACKWARD
        self._entered.append((state, module))

    def _leave(self) -> None:
        outputs, self._outputs = self._outputs, ()
        for state, module in reversed(self._entered):
            state._training_state = type(state._training_state).FORWARD
            # it watches the results; what it casts is of no interest
            state._post_forward(module, (), outputs)
        source = next((leaf for leaf in self._y0 if leaf.requires_grad and leaf.grad_fn is not None), None)
        self._y0 = ()
        if self._entered and outputs and source is not None and torch.is_grad_enabled():
            states = [state for state, _ in reversed(self._entered)]
            # the sweep is over where the gradient of its start is known; else FSDP ends it with the backward pass
            source.register_hook(lambda _: _end_backward(states))


def _end_backward(states: Sequence[Any]) -> None:
    """Gradients are summed up and sharded, and the parameters are freed."""
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is not None:
                group.post_backward()
