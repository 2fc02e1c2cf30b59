"""The interface of checkpoint policies: which states of a solve are kept for its backward pass, and in which form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rampde.checkpoint.fp8 import Fp8

T = TypeVar("T")

STAGES = ("none", "stage", "step", "lean", "tape")


class Checkpoint:
    """What of a solve is kept for its backward pass; ``checkpoint=`` of :func:`rampde.odeint` takes one.

    A policy answers three questions. Subclass it to answer some of them in another way::

        class EveryFourth(rampde.Checkpoint):
            def schedule(self, step, end, kept):
                return kept if step % 4 else (*kept, step)


        class InEightBits(rampde.Checkpoint):
            def store(self, state):
                return state.to(torch.float8_e5m2), state.dtype

            def load(self, stored):
                state, dtype = stored
                return state.to(dtype)

    1. ``stages``: how the evaluations of f in a step come back, with their graphs, when the step is swept. With N steps
       of s stages each:

       ======  ==============================  =======================  =======================
       stages  kept                            evaluations in backward  of which alive at once
       ======  ==============================  =======================  =======================
       "none"  the graph of every stage        0                        N s
       "stage" the rounded input of each one   N s                      1
       "step"  the rounded state of each step  N s                      s
       "lean"  the rounded state of each step  N (2 s - 1)              1
       "tape"  what plain autograd keeps       0                        N s
       ======  ==============================  =======================  =======================

    2. :meth:`schedule`: the states of which steps are kept. Between them, steps are taken again.
    3. :meth:`store` and :meth:`load`: in which form, and where, what is kept lies.

    One instance may serve any number of solves, at the same time too: what belongs to one of them goes into what
    ``store`` returns.
    """

    def __init__(self, stages: str = "step") -> None:
        """
        Args:
            stages: one of the above.

        Raises:
            ValueError: another word.
        """
        if stages not in STAGES:
            raise ValueError(f"stages is {stages!r}, expected one of {_named(STAGES)}")
        self.stages = stages

    @property
    def name(self) -> str:
        """The policy in words, for messages, tables and statistics."""
        return self.stages if type(self) is Checkpoint else f"{type(self).__name__}({self.stages})"

    def schedule(self, step: int, end: int | None, kept: Sequence[int]) -> Sequence[int]:
        """Of which steps the initial states are to be kept, decided before each ``step`` is taken: some of ``kept``,
        where they are now, and ``step`` itself or not, in ascending order.

        ``end`` is where the solve, or a part of it that is taken again, will arrive; None where it is not known. All
        steps before ``end`` are swept from there on, in reverse order. The first state of all is always to be kept.
        """
        return (*kept, step)

    def store(self, state: Tensor) -> Any:
        """What is kept of a tensor, which nobody else will change: the tensor itself, or anything that :meth:`load`
        makes it of. Where all steps are kept it is in the dtype in which f sees it, else in that of the state."""
        return state

    def load(self, stored: Any) -> Tensor:
        """The tensor again, in the dtype that it had, on its device."""
        tensor: Tensor = stored
        return tensor

    def prefetch(self, stored: Any) -> None:
        """Says that ``stored`` will be loaded next."""

    def recording(self) -> AbstractContextManager[Any]:
        """Entered where the graphs of f are recorded that "none" keeps."""
        return nullcontext()

    @property
    def releases_inputs(self) -> bool:
        """Whether the inputs of graphs that are kept are to go, as what the graphs save of them is kept elsewhere."""
        return False

    @property
    def quantiser(self) -> Fp8 | None:
        """Makes that form in which the kernel that ends a step writes the change of the state, if it is to."""
        return None

    @property
    def keeps_every_step(self) -> bool:
        """Whether the schedule leaves no step out."""
        return type(self).schedule is Checkpoint.schedule

    @property
    def keeps_graphs(self) -> bool:
        """Whether graphs that the road out makes are kept for the road back, of some steps at least."""
        return self.stages == "none"

    @property
    def is_tape(self) -> bool:
        return self.stages == "tape"

    @property
    def cheaper(self) -> str:
        """What to try when memory did not suffice."""
        return {
            "none": 'checkpoint="step"',
            "tape": 'checkpoint="step"',
            "step": 'checkpoint="lean"',
            "stage": 'checkpoint="lean"',
            "lean": 'rampde.Binomial(states, "lean") with few states',
        }[self.stages]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.stages!r})"


class Auto(Checkpoint):
    """ "auto": which policy it will be is decided after the first evaluation of f."""

    def __init__(self, budget: int | None) -> None:
        """``budget``: bytes that the solve may take for its gradient; None for a quarter of what is free."""
        super().__init__("step")
        self.budget = budget

    @property
    def name(self) -> str:
        return "auto"


class NoneWhileItFits(Checkpoint):
    """What "auto" becomes where the number of steps is not known: "none" for as many steps as fit, then "step".

    It goes by the name "none"; the statistics of a solve say from where on it was not."""

    def __init__(self, budget: int, bytes_of_stage: int) -> None:
        """``budget``: bytes for graphs; ``bytes_of_stage``: what each of them takes."""
        super().__init__("step")
        self.budget, self.bytes_of_stage = budget, bytes_of_stage

    @property
    def name(self) -> str:
        return "none"

    @property
    def keeps_graphs(self) -> bool:
        return True


def untraced(function: Callable[..., T]) -> Callable[..., T]:
    """A hook that a compiled f may call, which is not to be compiled with it."""
    if "torch._dynamo" not in sys.modules:
        return function  # nothing is compiled, and to ask for the compiler takes seconds
    found: Callable[..., T] = torch._dynamo.disable(function)
    return found


def _named(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
