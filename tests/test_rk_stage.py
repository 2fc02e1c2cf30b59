"""Input of a Runge-Kutta stage, on every backend."""

import pytest
import torch
from operands import DTYPES, LAYOUTS, SHAPES, Backend, assert_deterministic, mixed, random, same_bits, scalar
from tolerance import assert_within_budget
from torch import Tensor

from rampde import eager, ops

COEFFICIENTS = [0.5, -1.25, 0.1, 1 / 3, 2.0, -0.7, 0.01, 1.1] * 2


def exact(y: Tensor, k: list[Tensor], h: Tensor, a: list[float]) -> Tensor:
    total = y.double()
    for term, coefficient in zip(k, a, strict=True):
        if coefficient != 0.0:
            total = total + h.double() * coefficient * term.double()
    return total


def composed(y: Tensor, k: list[Tensor], h: Tensor, a: list[float], dtype: torch.dtype) -> Tensor:
    """Another order of the same operations: the velocities are summed first."""
    accumulate = eager.accumulation_dtype(y.dtype)
    slope = torch.zeros(y.shape, dtype=accumulate, device=y.device)
    for term, coefficient in zip(k, a, strict=True):
        slope = slope + term.to(accumulate) * coefficient
    return (y.to(accumulate) + h.to(accumulate) * slope).to(dtype)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 13, 16])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_precision(backend: Backend, state: torch.dtype, result: torch.dtype, stages: int) -> None:
    y = random((777,), state, backend.device)
    k, a = mixed(stages, y), COEFFICIENTS[:stages]
    accumulation = eager.accumulation_dtype(state)
    for h in (scalar(-0.1, backend.device), scalar(0.1, backend.device, accumulation)):
        x = backend.rk_stage(y, k, h, a, result)
        assert_within_budget(x, composed(y, k, h, a, result), exact(y, k, h, a), accumulation)


@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(backend: Backend, shape: tuple[int, ...], velocity: torch.dtype) -> None:
    y = random(shape, torch.float32, backend.device)
    k, a, h = mixed(3, y, [velocity]), COEFFICIENTS[:3], scalar(0.1, backend.device)
    x = backend.rk_stage(y, k, h, a, torch.bfloat16)
    assert_within_budget(x, composed(y, k, h, a, torch.bfloat16), exact(y, k, h, a))


@pytest.mark.parametrize("velocity_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, velocity_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, velocity_layout) else LAYOUTS[layout]
    y = random(shape, torch.float32, backend.device, layout)
    k, a, h = mixed(3, y, layout=velocity_layout), COEFFICIENTS[:3], scalar(0.1, backend.device)
    x = backend.rk_stage(y, k, h, a, torch.float16)
    assert x.stride() == y.stride()
    assert_within_budget(x, composed(y, k, h, a, torch.float16), exact(y, k, h, a))


def test_broadcast_and_sliced_velocities(backend: Backend) -> None:
    y = random((8, 6), torch.float32, backend.device)
    k = [
        random((6,), torch.float32, backend.device).expand(8, 6),
        random((8, 12), torch.float16, backend.device)[:, ::2],
    ]
    h, a = scalar(0.1, backend.device), [1.0, 2.0]
    assert_within_budget(
        backend.rk_stage(y, k, h, a, torch.float32), composed(y, k, h, a, torch.float32), exact(y, k, h, a)
    )


def test_step_size_keeps_its_precision(backend: Backend) -> None:
    y, k = random((100,), torch.float64, backend.device), random((100,), torch.float64, backend.device)
    h = scalar(0.1, backend.device)
    error = (backend.rk_stage(y, [k], h, [1 / 3], torch.float64) - (y + 0.1 / 3 * k)).abs().max()
    assert error < 1e-15


def test_term_with_zero_coefficient_is_not_read(backend: Backend) -> None:
    y = random((100,), torch.float32, backend.device)
    k = [torch.full_like(y, torch.nan), *mixed(2, y)]
    h, a = scalar(0.1, backend.device), [0.0, 0.5, 0.25]
    x = backend.rk_stage(y, k, h, a, torch.float32)
    assert same_bits([x], [backend.rk_stage(y, k[1:], h, a[1:], torch.float32)])
    assert same_bits([y], [backend.rk_stage(y, k, h, [0.0] * 3, torch.float32)])


def test_more_terms_than_coefficients_that_count(backend: Backend) -> None:
    y = random((50,), torch.float32, backend.device)
    k, a, h = mixed(20, y), [0.0] * 10 + COEFFICIENTS[:10], scalar(0.1, backend.device)
    x = backend.rk_stage(y, k, h, a, torch.float32)
    assert_within_budget(x, composed(y, k, h, a, torch.float32), exact(y, k, h, a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_pytorch(backend: Backend, dtype: torch.dtype) -> None:
    """To nearest even, overflow to infinity, NaN preserved, subnormals kept."""
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, largest * (1 + 2**-8), tiny / 3]
    halfway = 1 + torch.finfo(dtype).eps * (torch.arange(64) + 0.5)
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    y = torch.cat([torch.tensor(special), halfway, -halfway * tiny / 16, bits, torch.randn(10_000) * tiny]).to(
        backend.device
    )
    h = scalar(1.0, backend.device)
    for state in (y, y.double()):
        x = backend.rk_stage(state, [], h, [], dtype)
        expected = state.to(dtype)
        assert torch.equal(x.isnan(), expected.isnan())
        assert same_bits([x.nan_to_num(nan=0.0)], [expected.nan_to_num(nan=0.0)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widening_is_exact(backend: Backend, dtype: torch.dtype) -> None:
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(backend.device)
    x = backend.rk_stage(y, [], scalar(1.0, backend.device), [], torch.float32)
    assert torch.equal(x.isnan(), y.isnan())
    assert same_bits([x.nan_to_num(nan=0.0)], [y.float().nan_to_num(nan=0.0)])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("state", DTYPES)
def test_cpu_agrees_with_the_oracle_to_the_last_bit(state: torch.dtype) -> None:
    y = random((5000,), state)
    k, h = mixed(7, y), scalar(0.37, "cpu")
    for result in DTYPES:
        assert same_bits(
            [ops.rk_stage(y, k, h, COEFFICIENTS[:7], result)],
            [eager.rk_stage(y, k, h, COEFFICIENTS[:7], result)],
        )


def test_velocity_may_be_the_state(backend: Backend) -> None:
    y, h = random((333,), torch.float32, backend.device), scalar(0.1, backend.device)
    x = backend.rk_stage(y, [y, y], h, [1.0, 2.0], torch.float32)
    assert_within_budget(x, composed(y, [y, y], h, [1.0, 2.0], torch.float32), exact(y, [y, y], h, [1.0, 2.0]))


def test_deterministic(backend: Backend) -> None:
    y, h = random((100_003,), torch.float32, backend.device), scalar(0.1, backend.device)
    k = mixed(4, y)
    assert_deterministic(lambda: [backend.rk_stage(y, k, h, COEFFICIENTS[:4], torch.bfloat16)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str) -> None:
    y = random(LAYOUTS["channels_last"], torch.float32, layout=layout)
    arguments = (y, mixed(3, y), scalar(0.1, "cpu"), COEFFICIENTS[:3], torch.float16)
    torch.library.opcheck(ops.rk_stage, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(y: Tensor, k: Tensor, h: Tensor) -> Tensor:
        return ops.rk_stage(y * 2, [k, k + 1], h, [0.5, 0.25], torch.bfloat16) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y, k, h = random((12,), torch.float32), random((12,), torch.float16), scalar(0.1, "cpu")
    assert same_bits([compiled(y, k, h)], [step(y, k, h)])


def test_meta_tensors_show_shape_strides_and_dtype() -> None:
    y = torch.empty(LAYOUTS["channels_last"], device="meta").to(memory_format=torch.channels_last)
    x = ops.rk_stage(y, [y], torch.empty((), device="meta"), [1.0], torch.float16)
    assert (x.shape, x.stride(), x.dtype, x.device.type) == (y.shape, y.stride(), torch.float16, "meta")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": [torch.ones(4, 2), torch.ones(3, 2)]}, "k[1] has shape [3, 2], expected that of y, [4, 2]"),
        ({"k": [torch.ones(4, 2)]}, "k has 1 tensors, but a has 2 coefficients"),
        (
            {"k": [torch.ones(4, 2), torch.ones(4, 2).int()]},
            "k[1] has dtype int32, expected float64, float32",
        ),
        ({"y": torch.ones(4, 4)[:, ::2]}, "y of shape [4, 2] has gaps or overlaps in memory"),
        ({"y": torch.ones(2).expand(4, 2)}, "y of shape [4, 2] has gaps or overlaps in memory"),
        ({"y": torch.ones(4, 2, dtype=torch.complex64)}, "y has dtype complex64, expected float64, float32"),
        ({"h": torch.ones(1)}, "h has shape [1], expected a 0-dim tensor"),
        ({"h": torch.tensor(1)}, "h has dtype int64, expected float64 or float32"),
        ({"dtype": torch.int64}, "the result has dtype int64, expected float64, float32"),
        ({"k": [torch.ones(4, 2)] * 17, "a": [1.0] * 17}, "k[16] is one too many, expected at most 16 terms"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_name_argument_found_and_expected(change: dict, message: str) -> None:
    y = torch.ones(4, 2)
    arguments = {
        "y": y,
        "k": [y, y],
        "h": torch.tensor(0.1),
        "a": [1.0, 1.0],
        "dtype": torch.float16,
    } | change
    with pytest.raises(RuntimeError) as error:
        ops.rk_stage(**arguments)
    assert str(error.value).startswith("rampde::rk_stage: " + message)
