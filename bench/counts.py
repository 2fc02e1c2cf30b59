"""Exact counts of a solve, which do not depend on the machine: operators, host reads, evaluations, bytes kept."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.problems import SOLVERS, STAGES, Work, as_leaves

COUNTS = (
    "rampde ops forward",
    "rampde ops backward",
    "ATen beyond f forward",
    "ATen beyond f backward",
    "host reads forward",
    "host reads backward",
    "f forward",
    "f backward",
    "kept, fp32 states",
)


class Operators(TorchDispatchMode):
    """Counts what is dispatched: rampde's operators, ATen's, and those that bring a value to the host."""

    READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        self.counts["rampde" if name.startswith("rampde::") else "aten"] += 1
        to_host = name == "aten::_to_copy" and args[0].device.type != "cpu" and result.device.type == "cpu"
        self.counts["reads"] += name in self.READS or to_host
        return result


class Kept:
    """Bytes that autograd keeps alive, each storage once and those of ``known`` tensors not at all."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: weakref.WeakSet[_Box] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> "_Box":
        box = _Box(tensor.detach())
        self.alive.add(box)
        return box

    def bytes(self) -> int:
        storages = [box.tensor.untyped_storage() for box in self.alive]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self.known}.values())


class _Box:
    """What stands for a saved tensor in the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def evaluations(func: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of f."""
    counts: Counter[str] = Counter()
    handle = func.register_forward_pre_hook(lambda *_: counts.update(["f"]))
    try:
        yield counts
    finally:
        handle.remove()


def count_training(work: Work, name: str, steps: int) -> Counter[str]:
    """What one training step of ``steps`` steps dispatches, evaluates and keeps."""
    problem = work.problem
    inputs = [*problem.y0, *work.parameters]
    # in a solve of its own, because the hooks dispatch operators themselves
    kept = Kept([*inputs, *problem.cotangents])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda box: box.tensor):
        loss = work.forward(name, steps)
    found = Counter(bytes=kept.bytes())
    with evaluations(problem.func) as calls:
        with Operators() as out:
            loss = work.forward(name, steps)
        evaluated = calls["f"]
        with Operators() as back:
            torch.autograd.grad(loss, inputs, allow_unused=True)
    found.update({f"{kind} forward": value for kind, value in out.counts.items()})
    found.update({f"{kind} backward": value for kind, value in back.counts.items()})
    found.update({"f forward": evaluated, "f backward": calls["f"] - evaluated})
    return found


def count_f(work: Work) -> tuple[int, int, int]:
    """ATen operators of f: a call without a graph, a call with one, and its vector-Jacobian product."""
    problem = work.problem
    time = torch.zeros((), device=work.device)
    found = 0, 0, 0
    with work.autocast():
        # of two calls the second counts: the first casts the weights
        for _ in range(2):
            y = [leaf.detach() for leaf in work.rounded()]
            with torch.no_grad(), Operators() as bare:
                problem.func(time, problem.state(y))
            y = [leaf.detach().requires_grad_() for leaf in work.rounded()]
            with Operators() as forward:
                k = as_leaves(problem.func(time, problem.state(y)))
            cotangents = [torch.ones_like(velocity) for velocity in k]
            with Operators() as backward:
                torch.autograd.grad(k, [*y, *work.parameters], cotangents, allow_unused=True)
            found = bare.counts["aten"], forward.counts["aten"], backward.counts["aten"]
    return found


def count_solvers(work: Work) -> Iterator[tuple[str, str, float]]:
    """Exact counts a step: solver, quantity (one of COUNTS), count."""
    problem, short, long = work.problem, 4, 8
    bare, with_graph, product = count_f(work)
    state_bytes = 4 * sum(leaf.numel() for leaf in problem.y0)
    for name in SOLVERS:
        first, second = count_training(work, name, short), count_training(work, name, long)
        step = {key: (second[key] - first[key]) / (long - short) for key in first | second}
        again = step.get("f backward", 0.0)
        figures = (
            step.get("rampde forward", 0.0),
            step.get("rampde backward", 0.0),
            step["aten forward"] - step["f forward"] * (bare if again else with_graph),
            step["aten backward"] - again * with_graph - STAGES * product,
            step.get("reads forward", 0.0),
            step.get("reads backward", 0.0),
            step["f forward"],
            again,
            step.get("bytes", 0.0) / state_bytes,
        )
        for quantity, value in zip(COUNTS, figures, strict=True):
            yield name, quantity, value
