"""The calls that are timed: every operator as a solver calls it, and the check that must pass before."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rampde import fp8_blocks, ops, scaling, step_state
from rampde.control import Attempt
from rampde.methods import get_method
from rampde.options import AdaptiveOptions
from rampde.tableau import EmbeddedTableau

PARAMETERS = 16
LEAVES = 4
# elements compared with the oracle: the whole operand up to here, its end beyond
CHECKED = 2**20


@dataclass(frozen=True)
class Case:
    """One call of one operator: its arguments, which of them it writes, and the bytes that it must move.

    ``reduces``: whether what it returns is a sum over all elements. ``quantised``: where its codes and block scales
    are, which it reads where ``codes_are_read``, else writes as the last of its arguments.
    """

    name: str
    operator: str
    arguments: tuple[Any, ...]
    written: tuple[int, ...]
    bytes: int
    scale_state: Tensor | None = None
    reduces: bool = False
    quantised: tuple[int, int] | None = None
    codes_are_read: bool = False


def _state(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(n, dtype=torch.float32, device=device).to(dtype)


def _size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def cases(n: int, velocity: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every operator as rk4_classic or dopri5 calls it, with ``n`` state elements or parameters."""
    y = _state(n, torch.float32, device)
    k = [_state(n, velocity, device) for _ in range(4)]
    h = torch.full((), 0.01, dtype=torch.float64, device=device)
    v = _size(velocity)
    rounded = v < 4

    scale = torch.zeros(scaling.STATE_SIZE, device=device)
    scale[[scaling.SCALE, scaling.SCALE_OF_STEP]] = 256.0
    scale[[scaling.FINITE, scaling.HEADROOM]] = 1.0

    # the last stage: two of three coefficients are zero and cost nothing
    yield Case("rk_stage", "rk_stage", (y, k[:3], h, (0.0, 0.0, 1.0), velocity), (), (4 + 2 * v) * n)

    b = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    after = torch.empty_like(y)
    checkpoint = torch.empty_like(k[0]) if rounded else None
    overflow = torch.full((), 2**62, dtype=torch.int64, device=device) if velocity == torch.float16 else None
    moved = (8 + 4 * v + (v if rounded else 0)) * n
    yield Case("rk_update", "rk_update", (y, k, h, b, after, checkpoint, None, overflow), (4, 5, 7), moved)
    compensation = torch.zeros_like(y)
    arguments: tuple[Any, ...] = (y, k, h, b, after, checkpoint, compensation, overflow)
    yield Case("rk_update, compensated", "rk_update", arguments, (4, 5, 6, 7), moved + 8 * n)
    del compensation

    # the step in 8 bits instead: written to nearest and at random, and read on the way back from the state after it
    codes, scales = fp8_blocks.quantise(y)
    in_8_bits = n + 4 * len(scales)
    arguments = (y, k, h, b, after, None, None, overflow, 0, codes, scales)
    moved_in_8_bits = (8 + 4 * v) * n + in_8_bits
    yield Case("rk_update, 8 bits", "rk_update", arguments, (4, 7), moved_in_8_bits, quantised=(9, 10))
    name = "rk_update, 8 bits at random"
    yield Case(name, "rk_update", (*arguments, 1), (4, 7), moved_in_8_bits, quantised=(9, 10))
    arguments = (codes, [y], torch.ones_like(h), (1.0,), after, checkpoint, None, overflow, 0, None, scales)
    moved_back = (8 + (v if rounded else 0)) * n + in_8_bits
    name = "rk_update, from 8 bits"
    yield Case(name, "rk_update", arguments, (4, 5, 7), moved_back, quantised=(0, 10), codes_are_read=True)
    del codes, scales

    # dopri5, of whose seven velocities the second is in neither sum, and the last in that of the error alone
    b = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
    e = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
    seven = [*k, *(_state(n, velocity, device) for _ in range(3))]
    arguments = (y, seven, h, b, e, 1e-5, 1e-6, torch.finfo(velocity).eps / 2, 1, after, checkpoint)
    yield Case("rk_error", "rk_error", arguments, (9, 10), moved + 2 * v * n, reduces=True)
    yield from _steps(y.clone(), after, seven)
    del seven, checkpoint

    # the second stage backwards: b_2 = 1/3, and of the later stages only the third has a coefficient
    arguments = (y, k[:2], h, 1 / 3, (0.5, 0.0), velocity, scale)
    yield Case("adjoint_stage", "adjoint_stage", arguments, (), (4 + 2 * v) * n, scale)

    arguments = (y, k, h, None, after, scale)
    yield Case("adjoint_update", "adjoint_update", arguments, (4, 5), (8 + 4 * v) * n, scale)
    del after
    yield from _leaves(y, k, h, scale)

    # a network of PARAMETERS tensors: the state above, cut up
    totals = list(y.tensor_split(PARAMETERS))
    gradients = [piece for stage in k for piece in stage.tensor_split(PARAMETERS)]
    arguments = (totals, gradients, h, scale)
    yield Case("accumulate_gradients", "accumulate_gradients", arguments, (0,), (8 + 4 * v) * n, scale)

    arguments = (scale, gradients, 4.0, 0.5, 2.0, 1000, 0.0, 1)
    yield Case("update_scale", "update_scale", arguments, (0,), 4 * v * n, scale)


def _leaves(y: Tensor, k: list[Tensor], h: Tensor, scale: Tensor) -> Iterator[Case]:
    """The operators on all leaves of a state at once: the state above, cut up into ``LEAVES``."""
    n, v, velocity = y.numel(), k[0].element_size(), k[0].dtype
    states = [piece.clone() for piece in y.tensor_split(LEAVES)]
    # one leaf after the other
    velocities = [
        piece.clone() for pieces in zip(*(x.tensor_split(LEAVES) for x in k), strict=True) for piece in pieces
    ]
    after = [torch.empty_like(state) for state in states]
    checkpoints = [torch.empty_like(state, dtype=velocity) for state in states] if v < 4 else []
    places = [ops.NUMBERS[velocity]] * LEAVES
    b, e, roundoffs = (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.1, -0.2, 0.2, -0.1), [torch.finfo(velocity).eps / 2] * LEAVES
    moved = (8 + 4 * v + (v if checkpoints else 0)) * n

    arguments: tuple[Any, ...] = (states, velocities, h, (0.0, 0.0, 0.0, 1.0), places)
    yield Case("rk_stage_leaves", "rk_stage_leaves", arguments, (), (4 + 2 * v) * n)
    arguments = (states, velocities, h, b, after, checkpoints, [])
    yield Case("rk_update_leaves", "rk_update_leaves", arguments, (4, 5), moved)
    arguments = (states, velocities, h, b, e, 1e-5, 1e-6, roundoffs, after, checkpoints, [])
    yield Case("rk_error_leaves", "rk_error_leaves", arguments, (8, 9), moved, reduces=True)
    arguments = (states, velocities, h, 1 / 3, (0.5, 0.0, 0.0, 0.0), places, scale)
    yield Case("adjoint_stage_leaves", "adjoint_stage_leaves", arguments, (), (4 + 2 * v) * n, scale)
    arguments = (states, velocities, h, [None] * LEAVES, after, scale)
    yield Case("adjoint_update_leaves", "adjoint_update_leaves", arguments, (4, 5), (8 + 4 * v) * n, scale)


def _steps(y: Tensor, after: Tensor, k: list[Tensor]) -> Iterator[Case]:
    """The operators of steps that are decided on the device, at a step of dopri5 that stands."""
    n, v, device = y.numel(), k[0].element_size(), y.device
    method = get_method("dopri5")
    assert isinstance(method, EmbeddedTableau)
    tableau = method.closed
    numbers = {"dtype": torch.float64, "device": device}
    # steps of one size, so that all calls are alike, and no output in reach
    options = AdaptiveOptions(min_step=0.01, max_step=0.01, max_num_steps=10**15)
    parameters = step_state.Parameters.of(options, method.control_order, 1.0)
    control = torch.tensor(step_state.initial_control(options, Attempt(0.0, 0.01, 0.01), 0.01), **numbers)
    record, stage_times = torch.zeros(step_state.RECORD_SIZE, **numbers), torch.zeros(tableau.stages, device=device)
    sums, sizes = torch.full((1, 2), 0.5 * n, **numbers), torch.full((1,), float(n), **numbers)
    times = torch.tensor([0.0, 1e30], **numbers)
    moved = 2 * control.nbytes + record.nbytes + stage_times.nbytes + sums.nbytes + sizes.nbytes + times.nbytes
    arguments: tuple[Any, ...] = (control, record, stage_times, sums, sizes, times, tableau.nodes, tuple(parameters))
    yield Case("step_control", "step_control", arguments, (0, 1, 2), moved)

    first, *later = k
    first, staged = first.clone(), torch.empty_like(first)
    rows = torch.zeros(2, n, device=device)
    interpolant = tuple(c for row in tableau.interpolant for c in row)
    for name, outputs in (("step_commit", 0), ("step_commit, with an output", 1)):
        record = torch.tensor([1.0, 0.0, 0.01, 0.01, 1.0, 1.0 + outputs], **numbers)
        times = torch.tensor([0.0, 0.003], **numbers)
        arguments = (record, times, after, later, interpolant, y, first, rows, staged)
        # of the seven velocities the second is not in the output; the last one is read in any case
        yield Case(name, "step_commit", arguments, (5, 6, 7, 8), (12 + 3 * v) * n + outputs * (4 + 5 * v) * n)


def _convert(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_convert(item, change) for item in value]
    return value


def _end(tensor: Tensor) -> Tensor:
    return tensor[..., -CHECKED:] if tensor.ndim else tensor


def _of_oracle(case: Case) -> tuple[Any, ...]:
    """The arguments without 8 bits: the numbers that codes stand for where they are read, else nothing."""
    if case.quantised is None:
        return case.arguments
    codes, scales = case.quantised
    if not case.codes_are_read:
        return case.arguments[:codes]
    arguments = list(case.arguments)
    arguments[codes] = fp8_blocks.dequantise(arguments[codes], arguments[scales], torch.float32)
    arguments[scales] = None
    return tuple(arguments)


def _check_codes(case: Case) -> None:
    """Raises RuntimeError unless codes and scales that were written are those of minus the step, to the bit."""
    if case.quantised is None or case.codes_are_read:
        return
    codes, scales, *seed = case.arguments[case.quantised[0] :]
    y, k, h, b = case.arguments[:4]
    # random numbers belong to offsets: the end alone has others
    start = 0 if seed else max(0, y.numel() - CHECKED) // fp8_blocks.BLOCK * fp8_blocks.BLOCK
    # from minus zero there is nothing but the step
    step = torch.full_like(y[start:], -0.0)
    getattr(ops, case.operator)(step, [term[start:] for term in k], h, b, step)
    expected, of_blocks = fp8_blocks.quantise(-step, *seed)
    same = torch.equal(codes[start:].view(torch.uint8), expected.view(torch.uint8))
    if not same or not torch.equal(scales[start // fp8_blocks.BLOCK :], of_blocks):
        raise RuntimeError(f"{case.name} is wrong: its codes or scales are not those of its step")


def _names_dtypes(argument: Any) -> bool:
    """Whether it is a dtype, or the numbers of some."""
    numbers = isinstance(argument, list) and all(isinstance(item, int) for item in argument)
    return isinstance(argument, torch.dtype) or (numbers and bool(argument))


def _float64(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) else [ops.NUMBERS[torch.float64]] * len(argument)


def _results(returned: Any, arguments: Sequence[Any], written: Sequence[int]) -> list[Tensor]:
    found = [] if returned is None else _tensors(returned)
    for index in written:
        found += _tensors(arguments[index])
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def verify(case: Case) -> float:
    """Largest error of the operator against the float64 oracle, as a fraction of what is allowed.

    Allowed is twice the sum of the error that plain ATen makes at the same precision and one unit in the last
    place of the largest element. Raises RuntimeError when the error is larger. Operands of more than
    ``CHECKED`` elements are compared at their end, where a wrapped index would show, and without the scale's
    state and sums, which depend on all of them.
    """

    def double(tensor: Tensor) -> Tensor:
        # the state of the scale is float32 in any precision
        if tensor is case.scale_state or not tensor.is_floating_point():
            return tensor.clone()
        return _end(tensor).double()

    arguments = _of_oracle(case)
    plain = [_convert(argument, lambda tensor: _end(tensor).clone()) for argument in arguments]
    exact = [_convert(argument, double) for argument in arguments]
    exact = [_float64(argument) if _names_dtypes(argument) else argument for argument in exact]
    compiled, oracle = getattr(ops, case.operator), ops.oracle(case.operator)
    mine = _results(compiled(*case.arguments), case.arguments, case.written)
    _check_codes(case)
    theirs = _results(oracle(*plain), plain, case.written)
    truth = _results(oracle(*exact), exact, case.written)

    whole = all(tensor.numel() <= CHECKED for tensor in _tensors(case.arguments))
    worst = 0.0
    for got, reference, expected in zip(mine, theirs, truth, strict=True):
        of_all = got is case.scale_state or (case.reduces and got is mine[0])
        if (of_all and not whole) or got.numel() == 0:
            continue
        if not expected.isfinite().all():
            raise RuntimeError(f"{case.name}: the float64 oracle is not finite, so it can check nothing")
        unit = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
        expected = expected.double()
        allowed = 2 * (_distance(reference, expected) + unit * expected.abs().max().item())
        error = _distance(_end(got), expected)
        # a NaN compares as false with everything, so ask for what is right, not for what is wrong
        if not error <= allowed:
            raise RuntimeError(f"{case.name} is wrong: error {error:.3g} against float64, allowed {allowed:.3g}")
        worst = max(worst, error / allowed if allowed else 0.0)
    return worst


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other).abs().max().item()
