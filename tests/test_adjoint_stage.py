"""Cotangent of a stage's velocity, on every backend."""

import pytest
import torch
from operands import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Backend,
    assert_deterministic,
    mixed,
    random,
    same_bits,
    scalar,
    scale_state,
)
from tolerance import assert_within_budget
from torch import Tensor

from rampde import eager, ops

COEFFICIENTS = [0.5, -1.25, 0.1, 1 / 3, 2.0, -0.7, 0.01, 1.1] * 2
SCALE = 2.0**7


def exact(adjoint: Tensor, vjps: list[Tensor], h: Tensor, b: float, a: list[float], scale: float) -> Tensor:
    total = scale * b * adjoint.double() if b != 0.0 else torch.zeros_like(adjoint, dtype=torch.float64)
    for term, coefficient in zip(vjps, a, strict=True):
        if coefficient != 0.0:
            total = total + h.double() * coefficient * term.double()
    return total


def composed(
    adjoint: Tensor, vjps: list[Tensor], h: Tensor, b: float, a: list[float], scale: float, dtype: torch.dtype
) -> Tensor:
    """Another order of the same operations: the products of stages are summed first."""
    accumulate = eager.accumulation_dtype(adjoint.dtype)
    total = torch.zeros(adjoint.shape, dtype=accumulate, device=adjoint.device)
    for term, coefficient in zip(vjps, a, strict=True):
        total = total + term.to(accumulate) * coefficient
    return (h.to(accumulate) * total + adjoint.to(accumulate) * b * scale).to(dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("stages", [0, 1, 3, 16])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_precision(backend: Backend, state: torch.dtype, result: torch.dtype, stages: int, scaled: bool) -> None:
    adjoint = random((777,), state, backend.device)
    vjps, a, h = mixed(stages, adjoint), COEFFICIENTS[:stages], scalar(-0.1, backend.device)
    scale, scaling = (SCALE, scale_state(backend.device, SCALE)) if scaled else (1.0, None)
    cotangent = backend.adjoint_stage(adjoint, vjps, h, 1 / 6, a, result, scaling)
    assert_within_budget(
        cotangent,
        composed(adjoint, vjps, h, 1 / 6, a, scale, result),
        exact(adjoint, vjps, h, 1 / 6, a, scale),
        eager.accumulation_dtype(state),
    )


@pytest.mark.parametrize("product", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(backend: Backend, shape: tuple[int, ...], product: torch.dtype) -> None:
    adjoint = random(shape, torch.float32, backend.device)
    operands = (adjoint, mixed(5, adjoint, [product]), scalar(0.1, backend.device), 0.3, COEFFICIENTS[:5])
    cotangent = backend.adjoint_stage(*operands, torch.float16, scale_state(backend.device, SCALE))
    assert_within_budget(cotangent, composed(*operands, SCALE, torch.float16), exact(*operands, SCALE))


@pytest.mark.parametrize("product_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, product_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, product_layout) else LAYOUTS[layout]
    adjoint = random(shape, torch.float32, backend.device, layout)
    vjps = mixed(3, adjoint, layout=product_layout)
    operands = (adjoint, vjps, scalar(0.1, backend.device), 0.3, COEFFICIENTS[:3])
    cotangent = backend.adjoint_stage(*operands, torch.float16)
    assert cotangent.stride() == adjoint.stride()
    assert_within_budget(cotangent, composed(*operands, 1.0, torch.float16), exact(*operands, 1.0))


def test_operands_with_zero_coefficient_are_not_read(backend: Backend) -> None:
    adjoint = torch.full((100,), torch.nan, device=backend.device)
    vjps = [torch.full_like(adjoint, torch.nan), *mixed(2, adjoint)]
    operands = (adjoint, vjps, scalar(0.1, backend.device), 0.0, [0.0, 0.5, 0.25])
    cotangent = backend.adjoint_stage(*operands, torch.float32, scale_state(backend.device))
    clean = (torch.ones_like(adjoint), vjps[1:], operands[2], 0.0, [0.5, 0.25])
    assert_within_budget(cotangent, composed(*clean, 1.0, torch.float32), exact(*clean, 1.0))
    nothing = backend.adjoint_stage(adjoint, vjps, operands[2], 0.0, [0.0] * 3, torch.float32)
    assert (nothing == 0).all()


def test_scale_is_exact(backend: Backend) -> None:
    """A power of two: the scaled cotangent is the unscaled one to the last bit."""
    adjoint, h = random((1000,), torch.float32, backend.device), scalar(0.1, backend.device)
    vjps = mixed(3, adjoint, [torch.float32])
    plain = backend.adjoint_stage(adjoint, vjps, h, 0.3, COEFFICIENTS[:3], torch.float32)
    for scale in (2.0**-20, 2.0**40):
        scaled = [product * scale for product in vjps]
        state = scale_state(backend.device, scale)
        cotangent = backend.adjoint_stage(adjoint, scaled, h, 0.3, COEFFICIENTS[:3], torch.float32, state)
        assert same_bits([cotangent / scale], [plain])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("state", DTYPES)
def test_cpu_agrees_with_the_oracle_to_the_last_bit(state: torch.dtype) -> None:
    adjoint, scaling = random((5000,), state), scale_state("cpu", SCALE)
    operands = (adjoint, mixed(7, adjoint), scalar(0.37, "cpu"), 0.3, COEFFICIENTS[:7])
    for result in DTYPES:
        for state_of_scale in (None, scaling):
            arguments = (*operands, result, state_of_scale)
            assert same_bits([ops.adjoint_stage(*arguments)], [eager.adjoint_stage(*arguments)])


def test_deterministic(backend: Backend) -> None:
    adjoint = random((100_003,), torch.float32, backend.device)
    operands = (adjoint, mixed(4, adjoint), scalar(0.1, backend.device), 0.3, COEFFICIENTS[:4])
    assert_deterministic(lambda: [backend.adjoint_stage(*operands, torch.bfloat16)])


@pytest.mark.parametrize("scaling", [None, scale_state("cpu")], ids=["unscaled", "scaled"])
def test_opcheck(scaling: Tensor | None) -> None:
    adjoint = random(LAYOUTS["channels_last"], torch.float32, layout="channels_last")
    vjps = mixed(3, adjoint, layout="channels_last")
    arguments = (adjoint, vjps, scalar(0.1, "cpu"), 0.3, COEFFICIENTS[:3], torch.float16, scaling)
    torch.library.opcheck(ops.adjoint_stage, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()

    def stage(adjoint: Tensor, product: Tensor, h: Tensor, scaling: Tensor) -> Tensor:
        return ops.adjoint_stage(adjoint * 2, [product], h, 0.5, [0.25], torch.bfloat16, scaling) + 1

    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    adjoint, product = random((12,), torch.float32), random((12,), torch.float16)
    arguments = (adjoint, product, scalar(0.1, "cpu"), scale_state("cpu"))
    assert same_bits([compiled(*arguments)], [stage(*arguments)])


def test_meta_tensors_show_shape_strides_and_dtype() -> None:
    adjoint = torch.empty(LAYOUTS["channels_last"], device="meta").to(memory_format=torch.channels_last)
    h = torch.empty((), device="meta")
    cotangent = ops.adjoint_stage(adjoint, [adjoint], h, 1.0, [1.0], torch.float16)
    assert (cotangent.shape, cotangent.stride()) == (adjoint.shape, adjoint.stride())
    assert (cotangent.dtype, cotangent.device.type) == (torch.float16, "meta")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vjps": [torch.ones(3, 2)]}, "vjps[0] has shape [3, 2], expected that of adjoint, [4, 2]"),
        ({"a": []}, "vjps has 1 tensors, but a has 0 coefficients"),
        ({"adjoint": torch.ones(8, 2)[::2]}, "adjoint of shape [4, 2] has gaps or overlaps in memory"),
        ({"scale_state": torch.ones(8)}, "scale_state has shape [8], expected [9]"),
        ({"scale_state": torch.ones(18)[::2]}, "scale_state is not contiguous"),
        ({"scale_state": torch.ones(9).double()}, "scale_state has dtype float64, expected float32"),
        ({"dtype": torch.int32}, "the result has dtype int32, expected float64"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_name_argument_found_and_expected(change: dict, message: str) -> None:
    adjoint = torch.ones(4, 2)
    valid = {"adjoint": adjoint, "vjps": [adjoint], "h": torch.tensor(0.1), "b": 1.0, "a": [1.0]}
    with pytest.raises(RuntimeError) as error:
        ops.adjoint_stage(**(valid | {"dtype": torch.float16} | change))
    assert str(error.value).startswith("rampde::adjoint_stage: " + message)
