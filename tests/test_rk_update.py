"""End of a Runge-Kutta step, on every backend."""

import pytest
import torch
from operands import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Backend,
    assert_deterministic,
    exact_step,
    mixed,
    random,
    same_bits,
    scalar,
)
from tolerance import assert_within_budget
from torch import Tensor

from rampde import eager, fp8_blocks, ops

WEIGHTS = [1 / 6, 1 / 3, -0.7, 0.2, 1.5, -0.4, 0.9, 0.05] * 2


def composed(y: Tensor, k: list[Tensor], h: Tensor, b: list[float], dtype: torch.dtype) -> Tensor:
    """Another order of the same operations: the velocities are summed first."""
    accumulate = eager.accumulation_dtype(y.dtype)
    slope = torch.zeros(y.shape, dtype=accumulate, device=y.device)
    for term, weight in zip(k, b, strict=True):
        slope = slope + term.to(accumulate) * weight
    return (y.to(accumulate) + h.to(accumulate) * slope).to(dtype)


@pytest.mark.parametrize("stages", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_precision(backend: Backend, state: torch.dtype, saved: torch.dtype, stages: int) -> None:
    y = random((777,), state, backend.device)
    k, b, h = mixed(stages, y), WEIGHTS[:stages], scalar(-0.1, backend.device)
    y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=saved)
    backend.rk_update(y, k, h, b, y_next, checkpoint)
    accumulation = eager.accumulation_dtype(state)
    for result in (y_next, checkpoint):
        assert_within_budget(result, composed(y, k, h, b, result.dtype), exact_step(y, k, h, b), accumulation)


@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(backend: Backend, shape: tuple[int, ...], velocity: torch.dtype) -> None:
    y = random(shape, torch.float32, backend.device)
    k, b, h = mixed(4, y, [velocity]), WEIGHTS[:4], scalar(0.1, backend.device)
    y_next = torch.empty_like(y)
    backend.rk_update(y, k, h, b, y_next)
    assert_within_budget(y_next, composed(y, k, h, b, torch.float32), exact_step(y, k, h, b))


@pytest.mark.parametrize("velocity_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, velocity_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, velocity_layout) else LAYOUTS[layout]
    y = random(shape, torch.float32, backend.device, layout)
    k, b, h = mixed(3, y, layout=velocity_layout), WEIGHTS[:3], scalar(0.1, backend.device)
    y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=torch.float16)
    backend.rk_update(y, k, h, b, y_next, checkpoint)
    assert_within_budget(y_next, composed(y, k, h, b, torch.float32), exact_step(y, k, h, b))
    assert_within_budget(checkpoint, composed(y, k, h, b, torch.float16), exact_step(y, k, h, b))


@pytest.mark.parametrize("state", DTYPES)
def test_in_place(backend: Backend, state: torch.dtype) -> None:
    y = random((1001,), state, backend.device)
    k, b, h = [*mixed(3, y), y], WEIGHTS[:4], scalar(0.1, backend.device)
    expected = torch.empty_like(y)
    backend.rk_update(y, k, h, b, expected)
    backend.rk_update(y, k, h, b, y)
    assert same_bits([y], [expected])


def test_term_with_zero_weight_is_not_read(backend: Backend) -> None:
    y = random((100,), torch.float32, backend.device)
    k, h = [torch.full_like(y, torch.nan), *mixed(2, y)], scalar(0.1, backend.device)
    first, second, never = torch.empty_like(y), torch.empty_like(y), scalar(9, backend.device, torch.int64)
    backend.rk_update(y, k, h, [0.0, 0.5, 0.25], first, None, None, never, 3)
    backend.rk_update(y, k[1:], h, [0.5, 0.25], second)
    assert same_bits([first], [second])
    assert never == 9


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_compensation_keeps_what_the_sum_loses(backend: Backend, state: torch.dtype) -> None:
    """A thousand steps each below the roundoff of 1: plain summation loses them all."""
    y = torch.ones(50, dtype=state, device=backend.device)
    k, h = (
        [torch.full_like(y, 0.7, dtype=torch.float32)],
        scalar(0.1 * torch.finfo(state).eps, backend.device),
    )
    compensation, plain, steps = torch.zeros_like(y), y.clone(), 1000
    for _ in range(steps):
        backend.rk_update(y, k, h, [1.0], y, None, compensation)
        backend.rk_update(plain, k, h, [1.0], plain)
    increment = steps * h.double() * k[0].double()
    error = ((y - 1).double() + compensation.double() - increment).abs().max() / increment.max()
    assert error < 1e-5
    assert (plain == 1).all()


@pytest.mark.parametrize("state", DTYPES)
def test_two_sum_is_exact(backend: Backend, state: torch.dtype) -> None:
    """Sum and compensation together are the exact sum, whichever operand is the larger."""
    size = torch.logspace(-6, 6, 501, base=2, dtype=torch.float64).to(state)
    y = (random((501,), state) * size).to(backend.device)
    error = random((501,), torch.float32, backend.device)
    y_next, compensation = torch.empty_like(y, dtype=torch.float32), error.clone()
    backend.rk_update(y, [], scalar(0.1, backend.device), [], y_next, None, compensation)
    # 24 and 53 bits: the sum of two float32 is exact in float64 for these exponents
    base = y.float().double()
    assert torch.equal(y_next.double() + compensation.double(), base + error.double())
    assert torch.equal(y_next, (base + error.double()).float())


@pytest.mark.parametrize(("value", "seen"), [(torch.nan, True), (-torch.inf, True), (1e6, True), (6e4, False)])
@pytest.mark.parametrize("position", [0, 17, 40_000])
def test_overflow_step(backend: Backend, value: float, seen: bool, position: int) -> None:
    """The first step after which the state, as the checkpoint holds it, is not finite."""
    y = random((40_001,), torch.float32, backend.device)
    y[position] = value
    checkpoint, h = torch.empty_like(y, dtype=torch.float16), scalar(0.0, backend.device)
    for before, step, after in ((99, 5, 5), (3, 5, 3)):
        overflow_step = scalar(before, backend.device, torch.int64)
        backend.rk_update(y, [y.bfloat16()], h, [0.0], torch.empty_like(y), checkpoint, None, overflow_step, step)
        assert overflow_step == (after if seen else before)
    overflow_step = scalar(99, backend.device, torch.int64)
    backend.rk_update(y, [], h, [], torch.empty_like(y), None, None, overflow_step, 5)
    assert overflow_step == (99 if abs(value) < torch.inf else 5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("state", DTYPES)
def test_cpu_agrees_with_the_oracle_to_the_last_bit(state: torch.dtype, compensated: bool) -> None:
    y, h = random((5000,), state), scalar(0.37, "cpu")
    k, error = mixed(7, y), random((5000,), eager.accumulation_dtype(state)) * 1e-7
    outcomes = []
    for rk_update in (ops.rk_update, eager.rk_update):
        y_next, checkpoint = torch.empty_like(y), torch.empty_like(y, dtype=torch.bfloat16)
        compensation, overflow_step = error.clone() if compensated else None, torch.tensor(7)
        rk_update(y, k, h, WEIGHTS[:7], y_next, checkpoint, compensation, overflow_step, 2)
        outcomes.append([y_next, checkpoint, overflow_step, *([compensation] if compensated else [])])
    assert same_bits(*outcomes)


def test_deterministic(backend: Backend) -> None:
    y, h = random((100_003,), torch.float32, backend.device), scalar(0.1, backend.device)
    k = mixed(4, y)

    def call() -> list[Tensor]:
        y_next, compensation, quantised = torch.empty_like(y), torch.zeros_like(y), fp8_blocks.empty_like(y)
        backend.rk_update(y, k, h, WEIGHTS[:4], y_next, None, compensation, None, 0, *quantised, 5)
        before = torch.empty_like(y)
        backend.rk_update(quantised[0], [y_next], h, [10.0], before, block_scales=quantised[1])
        return [y_next, compensation, *quantised, before]

    assert_deterministic(call)


@pytest.mark.parametrize("complete", [False, True])
def test_opcheck(complete: bool) -> None:
    y = random(LAYOUTS["channels_last"], torch.float32, layout="channels_last")
    arguments = [y, mixed(3, y), scalar(0.1, "cpu"), WEIGHTS[:3], torch.zeros_like(y)]
    if complete:
        arguments += [torch.zeros_like(y).half(), torch.zeros_like(y), torch.tensor(9), 4]
    torch.library.opcheck(ops.rk_update, tuple(arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(y: Tensor, k: Tensor, h: Tensor) -> list[Tensor]:
        y_next, checkpoint, compensation = torch.empty_like(y), k.clone(), torch.zeros_like(y)
        codes, scales = fp8_blocks.empty_like(y)
        arguments = (y, [k, k + 1], h, [0.5, 0.25], y_next, checkpoint, compensation, None, 0)
        ops.rk_update(*arguments, codes, scales, 5)
        before = torch.empty_like(y)
        ops.rk_update(codes, [y_next], h, [10.0], before, block_scales=scales)
        return [y_next + 1, checkpoint, compensation, codes, scales * 2, before]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    arguments = (random((12,), torch.float32), random((12,), torch.float16), scalar(0.1, "cpu"))
    assert same_bits(compiled(*arguments), step(*arguments))


def test_meta_tensors() -> None:
    y, h = torch.empty(4, 3, device="meta"), torch.empty((), device="meta")
    assert ops.rk_update(y, [y], h, [1.0], torch.empty_like(y), torch.empty_like(y).half()) is None
    codes, scales = fp8_blocks.empty_like(y)
    assert ops.rk_update(y, [y], h, [1.0], torch.empty_like(y), quantised=codes, block_scales=scales, seed=1) is None
    assert ops.rk_update(codes, [y], h, [1.0], torch.empty_like(y), block_scales=scales) is None


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_next": torch.ones(4)}, "y_next has shape [4], expected that of y, [4, 2]"),
        ({"y_next": torch.ones(2, 4).t()}, "y_next is laid out in memory differently than y"),
        ({"checkpoint": torch.ones(4, 2).int()}, "checkpoint has dtype int32, expected float64"),
        ({"compensation": torch.ones(())}, "compensation has shape [], expected that of y, [4, 2]"),
        ({"overflow_step": torch.ones(1)}, "overflow_step has shape [1], expected a 0-dim tensor"),
        ({"overflow_step": torch.ones(())}, "overflow_step has dtype float32, expected int64"),
        ({"b": [1.0]}, "k has 2 tensors, but b has 1 coefficients"),
        ({"k": [torch.ones(4, 2), torch.ones(2)]}, "k[1] has shape [2], expected that of y, [4, 2]"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_name_argument_found_and_expected(change: dict, message: str) -> None:
    y = torch.ones(4, 2)
    valid = {"y": y, "k": [y, y], "h": torch.tensor(0.1), "b": [1.0, 1.0], "y_next": torch.zeros(4, 2)}
    with pytest.raises(RuntimeError) as error:
        ops.rk_update(**(valid | change))
    assert str(error.value).startswith("rampde::rk_update: " + message)


CODES, SCALES = torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.zeros(1)


STATE, LARGE = torch.zeros(4, 2), torch.zeros(300).to(CODES.dtype)
