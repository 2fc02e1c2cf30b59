"""``cuda_graph=True``: which recorded solve serves a call, and when a call is recorded.

The first solve of its kind is an ordinary one, which decides what follows from the first evaluation of f; the second
one is recorded, and all later ones repeat it. A recorded solve serves one call at a time: from its forward to the end
of its backward pass, or until its result is forgotten. Another call of the same kind meanwhile has another record.
Records that are never needed at the same time share memory: they draw on the same pool.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import RLock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rampde.capture import RECORDERS, Recorder
from rampde.captured_solve import CapturedSolve, Held
from rampde.checkpoint import Binomial, Checkpoint, Fp8
from rampde.checkpoint.policy import Auto
from rampde.problem import Problem
from rampde.roads import Kept, Roads, differentiable_backward, travel
from rampde.sharded import any_sharded

S = TypeVar("S")

Settings = dict[tuple[int, str], Any]
"""Values of plain attributes, by the object that has them and their names."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))

CACHE_SIZE = 16
"""Kinds of solves that are remembered; beyond it the one that was not used for longest is forgotten."""


class Pool:
    """Memory of records of which one is in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorder: Recorder = RECORDERS[device.type](device)
        self.in_use = False


@dataclass
class Record(Generic[S]):
    """A recorded solve and the pool that its graphs lie in."""

    solve: S
    pool: Pool


@dataclass
class Kind(Generic[S]):
    """Solves that differ in the values of tensors alone.

    ``problem``: the first one of them, with all that its first evaluation has decided; ``settings``: what f has read
    then, less what it has changed by itself, such as a counter of its calls.
    """

    problem: Problem
    held: Held
    settings: Settings
    records: list[Record[S]] = field(default_factory=list)


class Lease(Generic[S]):
    """The use of a record by one call."""

    def __init__(self, record: Record[S]) -> None:
        self.solve, self._pool = record.solve, record.pool
        self.released = False
        record.pool.in_use = True

    def release(self) -> None:
        if not self.released:
            self.released = True
            self._pool.in_use = False

    def __del__(self) -> None:
        self.release()


class GraphCache:
    """The kinds of solves that were seen, and their records."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Any, Kind[Any]] = OrderedDict()
        self._pools: list[Pool] = []
        self._lock = RLock()

    def clear(self) -> None:
        """Forgets everything; graphs whose backward pass is yet to come live on."""
        with self._lock:
            self._kinds.clear()
            self._pools.clear()

    def __len__(self) -> int:
        return len(self._kinds)

    def records(self) -> int:
        """How many solves are recorded."""
        return sum(len(kind.records) for kind in self._kinds.values())

    def known(self, key: Any, held: Held, settings: Settings) -> Kind[Any] | None:
        """The kind of a solve; None where it is seen for the first time, or what f holds has moved or changed."""
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                return None
            same = all(settings.get(name) == value for name, value in kind.settings.items())
            if not same or not kind.held.looks_like(held):
                del self._kinds[key]
                return None
            self._kinds.move_to_end(key)
            return kind

    def remember(self, key: Any, kind: Kind[Any]) -> None:
        with self._lock:
            self._kinds[key] = kind
            while len(self._kinds) > CACHE_SIZE:
                self._kinds.popitem(last=False)

    def lease(self, kind: Kind[S], new_solve: Callable[[Recorder], S], device: torch.device) -> Lease[S]:
        """A record of this kind that nobody uses, made where there is none."""
        with self._lock:
            for record in kind.records:
                if not record.pool.in_use:
                    return Lease(record)
            pool = next((pool for pool in self._pools if pool.device == device and not pool.in_use), None)
            if pool is None:
                pool = Pool(device)
                self._pools.append(pool)
            record = Record(new_solve(pool.recorder), pool)
            kind.records.append(record)
            return Lease(record)


CACHE = GraphCache()


def clear_cuda_graphs() -> None:
    """Forgets all solves that ``cuda_graph=True`` has recorded, and frees their memory."""
    CACHE.clear()


def solve_recorded(new_roads: Callable[[], Roads[Any]], problem: Problem, y0: list[Tensor]) -> list[Tensor]:
    """As :func:`rampde.roads.travel`, by CUDA graphs from the second solve of its kind on.

    Raises:
        ValueError: a checkpoint policy that needs the host.
        RuntimeError: f cannot be recorded.
    """
    check_recordable(problem)
    held = Held.of(problem.velocity.original)
    key, settings = key_of(problem, y0), settings_of(problem)
    kind = CACHE.known(key, held, settings)
    if kind is None:
        decided = replace(problem)
        outputs = travel(new_roads(), decided, y0)
        _check_decided(decided)
        _tell(problem, decided, decided.captures)
        CACHE.remember(key, Kind(emptied(decided), held, lasting(settings, problem)))
        return outputs
    new_solve = partial(_captured, new_roads, kind.problem, problem, y0, held)
    lease: Lease[CapturedSolve] = CACHE.lease(kind, new_solve, problem.velocity.spec.device)
    solve = lease.solve
    captures = _captures_now(solve, held)
    _tell(problem, solve.problem, captures)
    points = problem.grid.points
    if not solve.wanted or not (captures or points.requires_grad or any(leaf.requires_grad for leaf in y0)):
        outputs = solve.run(y0, points, held)
        lease.release()
        return outputs
    return list(_Replayed.apply(lease, held, problem, new_roads, points, *y0, *captures))  # type: ignore[no-untyped-call]


def _captured(
    new_roads: Callable[[], Roads[Kept]],
    decided: Problem,
    problem: Problem,
    y0: Sequence[Tensor],
    held: Held,
    recorder: Recorder,
) -> CapturedSolve:
    # this call's func, which holds what ``held`` says
    return CapturedSolve(
        new_roads(), replace(decided, grid=problem.grid, velocity=problem.velocity), y0, held, recorder
    )


def _captures_now(solve: CapturedSolve, held: Held) -> list[Tensor]:
    """What the captures of the recorded solve are in this call."""
    before = {id(tensor): place for place, tensor in enumerate((*solve.held.fixed, *solve.held.moving))}
    now = [*held.fixed, *held.moving]
    return [now[before[id(capture)]] for capture in solve.captures]


class _Replayed(torch.autograd.Function):
    """A recorded solve, and its recorded sweep as its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        lease: Lease[CapturedSolve],
        held: Held,
        problem: Problem,
        new_roads: Callable[[], Roads[Any]],
        points: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        y0 = tensors[: len(problem.leaves)]
        ctx.lease, ctx.problem, ctx.new_roads = lease, problem, new_roads
        ctx.captures = tensors[len(y0) :]
        ctx.set_materialize_grads(False)
        # parameters that change before the backward pass make it another one: autograd says so
        ctx.save_for_backward(points, *tensors)
        return tuple(lease.solve.run(y0, points, held))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        lease: Lease[CapturedSolve] = ctx.lease
        problem: Problem = ctx.problem
        points, *saved = ctx.saved_tensors
        unused = (None, None, None, None)
        leaves = len(problem.leaves)
        if all(cotangent is None for cotangent in cotangents):
            return (*unused, None, *[None] * len(saved))
        if torch.is_grad_enabled():
            # a graph has no derivative: the solve is repeated as plain autograd sees it
            with problem.velocity.autocast.entered():
                gradients = differentiable_backward(
                    ctx.new_roads(), problem, points, saved[:leaves], ctx.captures, cotangents
                )
            return (*unused, *gradients)
        if lease.released:
            raise RuntimeError(
                "the recorded solve serves another call since its backward pass; give that one retain_graph=True, or"
                " solve without cuda_graph"
            )
        of_y0_and_more = lease.solve.run_back(cotangents)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            lease.release()
        of_y0, of_points = of_y0_and_more[:leaves], of_y0_and_more[leaves]
        return (*unused, of_points, *of_y0, *of_y0_and_more[leaves + 1 :])


def check_recordable(problem: Problem) -> None:
    """Raises ValueError where the host is needed on the way, whatever f does."""
    policy = problem.checkpoint
    if type(policy) not in (Checkpoint, Auto, Binomial, Fp8) or policy.is_tape:
        raise ValueError(
            f'checkpoint is {policy!r}, which needs the host, and cuda_graph is True; expected "auto", "none", "stage",'
            ' "step", "lean", a number of states or rampde.Fp8'
        )
    if any_sharded(_modules(problem)):
        raise ValueError(
            "cuda_graph is True, but func is sharded by FSDP, which moves its parameters between calls; shard what is"
            " around the solve, or solve without cuda_graph"
        )
    if problem.observer is not None:
        raise ValueError(
            "cuda_graph is True, but callbacks of func, progress or rampde.stats() need the host in every step;"
            " expected one without the other"
        )


def _check_decided(problem: Problem) -> None:
    """What the first evaluation of f has shown may rule a graph out."""
    if problem.checkpoint.is_tape or problem.opaque:
        raise RuntimeError(
            "cuda_graph=True: func uses tensors that require a gradient and that none of the objects it holds shows;"
            " hold them in a module, a closure or an attribute, or solve without cuda_graph"
        )
    if problem.random is not None and not problem.checkpoint.keeps_graphs:
        raise RuntimeError(
            "cuda_graph=True: func draws random numbers, which cannot be drawn again in a CUDA graph, as checkpoint="
            f'"{problem.checkpoint.name}" would have to; use checkpoint="none"'
        )


def _tell(problem: Problem, decided: Problem, captures: list[Tensor]) -> None:
    """What those need to know who interpolate between the states of the solve."""
    problem.captures, problem.scaler, problem.checkpoint = captures, decided.scaler, decided.checkpoint


def emptied(problem: Problem) -> Problem:
    """The decisions without the tensors of the solve that made them."""
    return replace(problem, first=None, step_times=None, captures=[], random=None)


def key_of(problem: Problem, y0: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the operations of a solve depend on, besides the values of tensors."""
    velocity, grid = problem.velocity, problem.grid
    func = velocity.original
    return (
        _identity(func), velocity.spec.structure, tuple(leaf.stride() for leaf in y0),
        tuple(velocity.dtypes), velocity.autocast, id(problem.method), repr(problem.checkpoint), problem.compensated,
        problem.perturb, id(problem.scaler) if problem.scaler_given else problem.scaler is None, problem.poison,
        grid.steps, tuple(grid.kept), grid.points.requires_grad, torch.is_grad_enabled(),
        tuple(leaf.requires_grad for leaf in y0), tuple(problem.output_dtypes),
    )  # fmt: skip


def settings_of(problem: Problem) -> Settings:
    """Numbers, flags and words that modules and other objects which make up f hold as attributes: a graph has them in
    it, as they were when it was recorded."""
    found: Settings = {}
    for part in _parts(problem.velocity.original):
        owners = part.modules() if isinstance(part, nn.Module) else [part]
        for owner in owners:
            if isinstance(owner, Tensor | types.FunctionType | types.CodeType) or not hasattr(owner, "__dict__"):
                continue
            for name, value in vars(owner).items():
                if type(value) in _PLAIN:
                    found[id(owner), name] = value
    return found


def lasting(settings: Settings, problem: Problem) -> Settings:
    """Those of ``settings`` that the solve has left as they were."""
    now = settings_of(problem)
    return {name: value for name, value in settings.items() if now.get(name) == value}


def _modules(problem: Problem) -> list[nn.Module]:
    return [value for value in _parts(problem.velocity.original) if isinstance(value, nn.Module)]


def _parts(func: object) -> list[object]:
    """The objects that make a func what it is: functions and methods are made anew where they are asked for."""
    if isinstance(func, types.MethodType):
        return [func.__self__, func.__func__]
    if isinstance(func, partial):
        return [*_parts(func.func), *func.args, *func.keywords.values()]
    if isinstance(func, types.FunctionType):
        cells = [cell.cell_contents for cell in func.__closure__ or () if cell != types.CellType()]
        return [func.__code__, *cells, *(func.__defaults__ or ()), *(func.__kwdefaults__ or {}).values()]
    return [func]


def _identity(func: object) -> tuple[object, ...]:
    """Equal for funcs that do the same with tensors that may differ."""
    return tuple("tensor" if isinstance(part, Tensor) else _Same(part) for part in _parts(func))


class _Same:
    """An object, compared by what it is; held, so that no other one takes its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value) if not isinstance(self.value, int | float | str) else hash(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        if isinstance(self.value, int | float | str):
            return type(self.value) is type(other.value) and self.value == other.value
        return self.value is other.value
