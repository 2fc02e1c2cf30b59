"""Sums of the parameters' gradients, on every backend."""

import pytest
import torch
from operands import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Backend,
    assert_deterministic,
    random,
    same_bits,
    scalar,
    scale_state,
)
from tolerance import assert_within_budget
from torch import Tensor

from rampde import eager, ops
from rampde.scaling import SCALE_OF_STEP

SCALE = 2.0**7


def exact(total: Tensor, gradients: list[Tensor | None], h: Tensor, scale: float) -> Tensor:
    result = total.double()
    for gradient in gradients:
        if gradient is not None:
            result = result + h.double() / scale * gradient.double()
    return result


def composed(total: Tensor, gradients: list[Tensor | None], h: Tensor, scale: float) -> Tensor:
    """Another order of the same operations: the gradients are summed first."""
    summed = torch.zeros_like(total)
    for gradient in gradients:
        if gradient is not None:
            summed = summed + gradient.to(total.dtype)
    return total + summed * (h / scale).to(total.dtype)


def assert_right(
    backend: Backend, totals: list[Tensor], gradients: list[Tensor | None], scale: float | None = None
) -> None:
    h = scalar(-0.1, backend.device)
    before = [total.clone() for total in totals]
    state = None if scale is None else scale_state(backend.device, scale)
    backend.accumulate_gradients(totals, gradients, h, state)
    for p, (total, old) in enumerate(zip(totals, before, strict=True)):
        operands = (old, gradients[p :: len(totals)], h, scale or 1.0)
        assert_within_budget(total, composed(*operands), exact(*operands))


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("stages", [0, 1, 4, 6, 16, 33])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_precision(backend: Backend, wide: torch.dtype, stages: int, scale: float | None) -> None:
    shapes = [(777,), (3, 5), (), (64, 64)]
    dtypes = DTYPES if wide == torch.float64 else DTYPES[1:]
    totals = [random(shape, wide, backend.device) for shape in shapes]
    gradients = [
        random(shape, dtypes[(i + p) % len(dtypes)], backend.device)
        for i in range(stages)
        for p, shape in enumerate(shapes)
    ]
    assert_right(backend, totals, gradients, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(backend: Backend, dtype: torch.dtype) -> None:
    shapes = [*SHAPES, (20_001,)]
    totals = [random(shape, torch.float64, backend.device) for shape in shapes]
    gradients = [random(shape, dtype, backend.device) for _ in range(4) for shape in shapes]
    assert_right(backend, totals, gradients)


@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, gradient_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, gradient_layout) else LAYOUTS[layout]
    totals = [random(shape, torch.float32, backend.device, layout) for _ in range(2)]
    gradients = [random(shape, torch.bfloat16, backend.device, gradient_layout) for _ in range(6)]
    assert_right(backend, totals, gradients, SCALE)


def test_absent_gradients_are_zero(backend: Backend) -> None:
    totals = [random((10,), torch.float32, backend.device) for _ in range(3)]
    untouched = totals[1].clone()
    one, two = random((10,), torch.float16, backend.device), random((10,), torch.float32, backend.device)
    assert_right(backend, totals, [one, None, None, None, None, two])
    assert same_bits([totals[1]], [untouched])


def test_many_parameters(backend: Backend) -> None:
    """More than fit into the arguments of one launch, in number of parameters and of gradients."""
    shapes = [(i % 7,) for i in range(900)]
    totals = [random(shape, torch.float32, backend.device) for shape in shapes]
    gradients = [random(shape, DTYPES[1 + i], backend.device) for i in range(3) for shape in shapes]
    assert_right(backend, totals, gradients, SCALE)


def test_many_gradients_of_one_parameter(backend: Backend) -> None:
    total, ones = torch.zeros(5, device=backend.device), torch.ones(5, device=backend.device)
    gradients = [ones * (i % 3) for i in range(5000)]
    backend.accumulate_gradients([total], gradients, scalar(2.0, backend.device))
    assert (total == 2 * sum(i % 3 for i in range(5000))).all()


def test_broadcast_gradient(backend: Backend) -> None:
    total = random((8, 6), torch.float32, backend.device)
    assert_right(backend, [total], [random((6,), torch.float32, backend.device).expand(8, 6)])


def test_after_an_overflow_nothing_is_added(backend: Backend) -> None:
    totals = [random((100,), torch.float32, backend.device)]
    before, state = [totals[0].clone()], scale_state(backend.device, SCALE_OF_STEP=0.0)
    assert state[SCALE_OF_STEP] == 0
    gradients = [torch.full((100,), torch.nan, device=backend.device)]
    backend.accumulate_gradients(totals, gradients, scalar(0.1, backend.device), state)
    assert same_bits(totals, before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_cpu_agrees_with_the_oracle_to_the_last_bit(wide: torch.dtype, scaled: bool) -> None:
    totals = [random((5000,), wide), random((3, 4), wide)]
    gradients = [random(totals[i % 2].shape, DTYPES[1 + i // 2 % 3]) for i in range(14)]
    state = scale_state("cpu", SCALE) if scaled else None
    outcomes = []
    for accumulate_gradients in (ops.accumulate_gradients, eager.accumulate_gradients):
        outcome = [total.clone() for total in totals]
        accumulate_gradients(outcome, gradients, scalar(0.37, "cpu"), state)
        outcomes.append(outcome)
    assert same_bits(*outcomes)


def test_deterministic(backend: Backend) -> None:
    totals = [random((100_003,), torch.float32, backend.device), random((3,), torch.float32, backend.device)]
    gradients = [random(total.shape, torch.float16, backend.device) for _ in range(4) for total in totals]

    def call() -> list[Tensor]:
        sums = [total.clone() for total in totals]
        backend.accumulate_gradients(sums, gradients, scalar(0.1, backend.device))
        return sums

    assert_deterministic(call)


def test_opcheck() -> None:
    totals = [random((5,), torch.float32), random((2, 3), torch.float32)]
    gradients = [
        random((5,), torch.float16),
        None,
        random((5,), torch.float32),
        random((2, 3), torch.bfloat16),
    ]
    for state in (None, scale_state("cpu")):
        torch.library.opcheck(ops.accumulate_gradients, (totals, gradients, scalar(0.1, "cpu"), state))


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()

    def accumulate(total: Tensor, gradient: Tensor, h: Tensor) -> Tensor:
        total = total.clone()
        ops.accumulate_gradients([total], [gradient, None, gradient * 2], h)
        return total * 1

    compiled = torch.compile(accumulate, fullgraph=True, backend="aot_eager")
    arguments = (random((12,), torch.float32), random((12,), torch.float16), scalar(0.1, "cpu"))
    assert same_bits([compiled(*arguments)], [accumulate(*arguments)])


def test_meta_tensors() -> None:
    total, h = torch.empty(3, device="meta"), torch.empty((), device="meta")
    assert ops.accumulate_gradients([total], [total, None], h) is None


def test_no_parameters(backend: Backend) -> None:
    backend.accumulate_gradients([], [], scalar(0.1, "cpu"))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("totals", "gradients", "message"),
    [
        (
            [torch.ones(2)] * 2,
            [torch.ones(2)] * 3,
            "gradients has 3 tensors, expected a multiple of the number",
        ),
        ([], [torch.ones(2)], "gradients has 1 tensors, expected a multiple of the number of totals, 0"),
        ([torch.ones(2).half()], [], "totals[0] has dtype float16, expected float32 or float64"),
        ([torch.ones(4)[::2]], [], "totals[0] of shape [2] has gaps or overlaps in memory"),
        ([torch.ones(2)], [torch.ones(3)], "gradients[0] has shape [3], expected that of its total, [2]"),
        ([torch.ones(2)], [None, torch.ones(2).int()], "gradients[1] has dtype int32, expected float64"),
    ],
)
def test_errors_name_argument_found_and_expected(
    totals: list[Tensor], gradients: list[Tensor | None], message: str
) -> None:
    with pytest.raises(RuntimeError) as error:
        ops.accumulate_gradients(totals, gradients, torch.tensor(0.1))
    assert str(error.value).startswith("rampde::accumulate_gradients: " + message)
