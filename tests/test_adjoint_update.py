"""End of a step backwards, on every backend."""

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
from rampde.scaling import FINITE, MAXIMUM

SCALE = 2.0**7


def exact(adjoint: Tensor, vjps: list[Tensor], h: Tensor, cotangent: Tensor | None, scale: float) -> Tensor:
    total = adjoint.double()
    for term in vjps:
        total = total + h.double() / scale * term.double()
    return total if cotangent is None else total + cotangent.double()


def composed(adjoint: Tensor, vjps: list[Tensor], h: Tensor, cotangent: Tensor | None, scale: float) -> Tensor:
    """Another order of the same operations: the products of stages are summed first."""
    accumulate = eager.accumulation_dtype(adjoint.dtype)
    total = torch.zeros(adjoint.shape, dtype=accumulate, device=adjoint.device)
    for term in vjps:
        total = total + term.to(accumulate)
    total = total * (h / scale).to(accumulate)
    if cotangent is not None:
        total = total + cotangent.to(accumulate)
    return (total + adjoint.to(accumulate)).to(adjoint.dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("stages", [0, 1, 4, 16])
@pytest.mark.parametrize("loss", [None, *DTYPES])
@pytest.mark.parametrize("state", DTYPES)
def test_precision(backend: Backend, state: torch.dtype, loss: torch.dtype | None, stages: int, scaled: bool) -> None:
    adjoint = random((777,), state, backend.device)
    vjps, h = mixed(stages, adjoint), scalar(-0.1, backend.device)
    cotangent = None if loss is None else random((777,), loss, backend.device)
    scale, scaling = (SCALE, scale_state(backend.device, SCALE)) if scaled else (1.0, None)
    adjoint_next = torch.empty_like(adjoint)
    backend.adjoint_update(adjoint, vjps, h, cotangent, adjoint_next, scaling)
    expected = exact(adjoint, vjps, h, cotangent, scale)
    assert_within_budget(adjoint_next, composed(adjoint, vjps, h, cotangent, scale), expected)
    if scaling is not None:
        assert scaling[FINITE] == 1
        assert float(scaling[MAXIMUM]) == pytest.approx(float(expected.abs().max()), rel=1e-6)


@pytest.mark.parametrize("product", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(backend: Backend, shape: tuple[int, ...], product: torch.dtype) -> None:
    adjoint, h = random(shape, torch.float32, backend.device), scalar(0.1, backend.device)
    vjps, scaling = mixed(5, adjoint, [product]), scale_state(backend.device, SCALE)
    adjoint_next = torch.empty_like(adjoint)
    backend.adjoint_update(adjoint, vjps, h, None, adjoint_next, scaling)
    assert_within_budget(adjoint_next, composed(adjoint, vjps, h, None, SCALE), exact(adjoint, vjps, h, None, SCALE))
    if adjoint.numel() == 0:
        assert same_bits([scaling], [scale_state("cpu", SCALE)])


@pytest.mark.parametrize("product_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, product_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, product_layout) else LAYOUTS[layout]
    adjoint, h = random(shape, torch.float32, backend.device, layout), scalar(0.1, backend.device)
    *vjps, cotangent = mixed(4, adjoint, layout=product_layout)
    adjoint_next = torch.empty_like(adjoint)
    backend.adjoint_update(adjoint, vjps, h, cotangent, adjoint_next)
    operands = (adjoint, vjps, h, cotangent, 1.0)
    assert_within_budget(adjoint_next, composed(*operands), exact(*operands))


def test_in_place(backend: Backend) -> None:
    adjoint, h = random((1001,), torch.float32, backend.device), scalar(0.1, backend.device)
    vjps, expected = mixed(3, adjoint), torch.empty_like(adjoint)
    backend.adjoint_update(adjoint, vjps, h, None, expected)
    backend.adjoint_update(adjoint, vjps, h, None, adjoint)
    assert same_bits([adjoint], [expected])


def test_maximum_is_kept_when_larger(backend: Backend) -> None:
    adjoint, h = random((1001,), torch.float32, backend.device), scalar(0.1, backend.device)
    scaling = scale_state(backend.device, MAXIMUM=1e6)
    backend.adjoint_update(adjoint, [], h, None, torch.empty_like(adjoint), scaling)
    assert scaling[MAXIMUM] == 1e6


@pytest.mark.parametrize("position", [0, 17, 40_000])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_one_value_that_is_not_finite_is_noted(
    backend: Backend, state: torch.dtype, value: float, position: int
) -> None:
    adjoint = random((40_001,), state, backend.device)
    product = random((40_001,), torch.float16, backend.device)
    product[position] = value
    scaling, adjoint_next = scale_state(backend.device), torch.empty_like(adjoint)
    backend.adjoint_update(adjoint, [product], scalar(0.1, backend.device), None, adjoint_next, scaling)
    assert scaling[FINITE] == 0
    assert scaling[MAXIMUM].isfinite()
    assert adjoint_next.isfinite().sum() == 40_000


def test_after_an_overflow_nothing_is_written(backend: Backend) -> None:
    adjoint, h = random((1001,), torch.float32, backend.device), scalar(0.1, backend.device)
    adjoint_next, scaling = (
        random((1001,), torch.float32, backend.device),
        scale_state(backend.device, OVERFLOWED=1),
    )
    before = [adjoint_next.clone(), scaling.clone()]
    backend.adjoint_update(adjoint, [torch.full_like(adjoint, torch.nan)], h, None, adjoint_next, scaling)
    assert same_bits([adjoint_next, scaling], before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("state", DTYPES)
def test_cpu_agrees_with_the_oracle_to_the_last_bit(state: torch.dtype, scaled: bool) -> None:
    adjoint = random((5000,), state)
    operands = (adjoint, mixed(7, adjoint), scalar(0.37, "cpu"), random((5000,), torch.bfloat16))
    outcomes = []
    for adjoint_update in (ops.adjoint_update, eager.adjoint_update):
        adjoint_next, scaling = torch.empty_like(adjoint), scale_state("cpu", SCALE)
        adjoint_update(*operands, adjoint_next, scaling if scaled else None)
        outcomes.append([adjoint_next, scaling])
    assert same_bits(*outcomes)


def test_deterministic(backend: Backend) -> None:
    adjoint, h = random((100_003,), torch.float32, backend.device), scalar(0.1, backend.device)
    vjps = mixed(4, adjoint)

    def call() -> list[Tensor]:
        adjoint_next, scaling = torch.empty_like(adjoint), scale_state(backend.device)
        backend.adjoint_update(adjoint, vjps, h, None, adjoint_next, scaling)
        return [adjoint_next, scaling]

    assert_deterministic(call)


@pytest.mark.parametrize("complete", [False, True])
def test_opcheck(complete: bool) -> None:
    adjoint = random(LAYOUTS["channels_last"], torch.float32, layout="channels_last")
    cotangent, scaling = (random(adjoint.shape, torch.float16), scale_state("cpu")) if complete else (None, None)
    arguments = (
        adjoint,
        mixed(3, adjoint),
        scalar(0.1, "cpu"),
        cotangent,
        torch.zeros_like(adjoint),
        scaling,
    )
    torch.library.opcheck(ops.adjoint_update, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()

    def update(adjoint: Tensor, product: Tensor, h: Tensor, scaling: Tensor) -> list[Tensor]:
        adjoint_next, scaling = torch.empty_like(adjoint), scaling.clone()
        ops.adjoint_update(adjoint, [product, product], h, None, adjoint_next, scaling)
        return [adjoint_next + 1, scaling]

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    adjoint, product = random((12,), torch.float32), random((12,), torch.float16)
    arguments = (adjoint, product, scalar(0.1, "cpu"), scale_state("cpu"))
    assert same_bits(compiled(*arguments), update(*arguments))


def test_meta_tensors() -> None:
    adjoint, h = torch.empty(4, 3, device="meta"), torch.empty((), device="meta")
    scaling = torch.empty(9, device="meta")
    assert ops.adjoint_update(adjoint, [adjoint], h, adjoint, torch.empty_like(adjoint), scaling) is None


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vjps": [torch.ones(3, 2)]}, "vjps[0] has shape [3, 2], expected that of adjoint, [4, 2]"),
        ({"cotangent": torch.ones(2)}, "cotangent has shape [2], expected that of adjoint, [4, 2]"),
        ({"cotangent": torch.ones(4, 2).bool()}, "cotangent has dtype bool, expected float64"),
        ({"adjoint_next": torch.ones(2, 4).t()}, "adjoint_next is laid out in memory differently"),
        ({"scale_state": torch.ones(8)}, "scale_state has shape [8], expected [9]"),
        ({"h": torch.ones(2)}, "h has shape [2], expected a 0-dim tensor"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_name_argument_found_and_expected(change: dict, message: str) -> None:
    adjoint = torch.ones(4, 2)
    valid = {"adjoint": adjoint, "vjps": [adjoint], "h": torch.tensor(0.1), "cotangent": None}
    with pytest.raises(RuntimeError) as error:
        ops.adjoint_update(**(valid | {"adjoint_next": torch.ones(4, 2)} | change))
    assert str(error.value).startswith("rampde::adjoint_update: " + message)
