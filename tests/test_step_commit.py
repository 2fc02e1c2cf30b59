"""What an attempted step leaves behind where it stands, on every backend."""

from dataclasses import dataclass

import pytest
import torch
from operands import DTYPES, LAYOUTS, SHAPES, Backend, assert_deterministic, mixed, random, same_bits
from tolerance import assert_within_budget
from torch import Tensor

from rampde import ops
from rampde.methods import get_method
from rampde.precision import accumulation_dtype
from rampde.tableau import ClosedTableau, EmbeddedTableau

# of the outputs, the two before the step and the two after it are not its business; the last of it is its end
TIMES = (0.0, 0.1, 0.25, 0.5, 0.625, 0.75, 0.8, 0.9)
START, END, FIRST, LAST = 0.125, 0.75, 2, 6


def tableau(method: str = "dopri5") -> ClosedTableau:
    found = get_method(method)
    assert isinstance(found, EmbeddedTableau)
    return found.closed


@dataclass
class Step:
    """The operands of one call; ``rows`` and ``staged`` are NaN where nothing was written."""

    method: ClosedTableau
    record: Tensor
    times: Tensor
    y_next: Tensor
    later: list[Tensor]
    y: Tensor
    first: Tensor
    rows: Tensor
    staged: Tensor | None

    def call(self, backend: Backend) -> None:
        interpolant = [c for row in self.method.interpolant for c in row]
        outputs = (self.y, self.first, self.rows, self.staged)
        backend.step_commit(self.record, self.times, self.y_next, self.later, interpolant, *outputs)

    @property
    def written(self) -> list[Tensor]:
        return [x for x in (self.y, self.first, self.rows, self.staged) if x is not None]

    @property
    def k(self) -> list[Tensor]:
        return [self.first, *self.later]


def new_step(
    y: Tensor,
    velocity: torch.dtype = torch.float32,
    output: torch.dtype | None = None,
    staged: torch.dtype | None = None,
    accepted: bool = True,
    sign: float = 1.0,
    method: str = "dopri5",
    layout: str = "contiguous",
) -> Step:
    closed, numbers = tableau(method), {"dtype": torch.float64, "device": y.device}
    record = torch.tensor([accepted, sign * START, sign * (END - START), sign * END, FIRST, LAST], **numbers)

    def like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        target = torch.empty_strided(shape, (y.numel(), *y.stride())[-len(shape) :], dtype=dtype, device=y.device)
        return target.fill_(torch.nan)

    first = torch.empty_like(y, dtype=velocity).copy_(random(y.shape, velocity, y.device.type))
    return Step(
        closed,
        record,
        sign * torch.tensor(TIMES, **numbers),
        mixed(1, y, [y.dtype], layout)[0],
        mixed(closed.stages - 1, y, [velocity], layout),
        y.clone(),
        first,
        like((len(TIMES), *y.shape), y.dtype if output is None else output),
        None if staged is None else torch.full_like(y, torch.nan, dtype=staged),
    )


def interpolated(step: Step, y: Tensor, k: list[Tensor], index: int, dtype: torch.dtype) -> Tensor:
    """An output inside of the step, summed in ``dtype``, the velocities first."""
    start, h, end = step.record[1:4].tolist()
    weights = step.method.weights_at((step.times[index].item() - start) / (end - start))
    slope = torch.zeros_like(y, dtype=dtype)
    for weight, term in zip(weights, k, strict=True):
        slope += weight * term.to(dtype)
    return y.to(dtype) + h * slope


def assert_committed(step: Step, y: Tensor, first: Tensor) -> None:
    """All that was written is as defined, from what ``y`` and ``first`` were before."""
    k = [first, *step.later]
    assert same_bits([step.y, step.first], [step.y_next.to(y.dtype), step.later[-1].to(first.dtype)])
    if step.staged is not None:
        assert same_bits([step.staged], [y.to(step.staged.dtype)])
    for index, row in enumerate(step.rows.unbind(0)):
        if index == LAST - 1:
            assert same_bits([row], [step.y_next.to(row.dtype)])
        elif FIRST <= index < LAST:
            independent = interpolated(step, y, k, index, accumulation_dtype(y.dtype)).to(row.dtype)
            assert_within_budget(row, independent, interpolated(step, y, k, index, torch.float64))
        else:
            assert bool(row.isnan().all())


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_precision(backend: Backend, state: torch.dtype, velocity: torch.dtype, output: torch.dtype) -> None:
    y = random((777,), state, backend.device)
    step = new_step(y, velocity, output, velocity)
    first = step.first.clone()
    step.call(backend)
    assert_committed(step, y, first)


@pytest.mark.parametrize("staged", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), *SHAPES, (1024,), (2048,)], ids=str)
def test_sizes(backend: Backend, shape: tuple[int, ...], staged: torch.dtype | None) -> None:
    y = random(shape, torch.float32, backend.device)
    step = new_step(y, torch.float16, staged=staged)
    first = step.first.clone()
    step.call(backend)
    assert_committed(step, y, first)


@pytest.mark.parametrize("velocity_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, velocity_layout: str) -> None:
    shape = LAYOUTS["channels_last"] if "channels_last" in (layout, velocity_layout) else LAYOUTS[layout]
    y = random(shape, torch.float32, backend.device, layout)
    step = new_step(y, torch.bfloat16, staged=torch.bfloat16, layout=velocity_layout)
    strides = [x.stride() for x in step.written]
    first = step.first.clone()
    step.call(backend)
    assert_committed(step, y, first)
    assert [x.stride() for x in step.written] == strides


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun"])
@pytest.mark.parametrize("velocity", [torch.float64, torch.float32, torch.float16])
def test_outputs_are_those_of_the_host_to_the_bit(
    backend: Backend, velocity: torch.dtype, method: str, sign: float
) -> None:
    y = random((1025,), torch.float64 if velocity == torch.float64 else torch.float32, backend.device)
    step = new_step(y, velocity, sign=sign, method=method)
    start, _, end = step.record[1:4].tolist()
    expected = []
    for time in step.times[FIRST : LAST - 1].tolist():
        weights = step.method.weights_at((time - start) / (end - start))
        expected.append(ops.rk_stage(y, step.k, step.record[2], weights, y.dtype))
    step.call(backend)
    assert same_bits(step.rows[FIRST : LAST - 1].unbind(0), expected)


def test_a_rejected_step_changes_nothing(backend: Backend) -> None:
    y = random((1025,), torch.float32, backend.device)
    step = new_step(y, torch.float16, staged=torch.float16, accepted=False)
    # what is rejected is often not finite
    for tensor in (step.y_next, *step.later):
        tensor.fill_(torch.nan)
    before = [x.clone() for x in step.written]
    step.call(backend)
    assert same_bits(step.written, before)


def test_a_step_without_outputs(backend: Backend) -> None:
    y = random((1025,), torch.float32, backend.device)
    step = new_step(y, torch.float16, staged=torch.float16)
    step.record[4:] = FIRST
    step.call(backend)
    assert bool(step.rows.isnan().all())
    assert same_bits([step.y], [step.y_next])


def test_many_outputs_in_a_step(backend: Backend) -> None:
    y = random((33,), torch.float32, backend.device)
    step = new_step(y)
    # all but the first and the last
    step.times = torch.linspace(0, END, 1000, dtype=torch.float64, device=y.device)
    step.rows = torch.full((1000, 33), torch.nan, device=y.device)
    step.record[1:] = torch.tensor([0.0, END, END, 1, 999], dtype=torch.float64)
    first = step.first.clone()
    step.call(backend)
    assert bool(step.rows[[0, 999]].isnan().all())
    k = [first, *step.later]
    for index in (1, 500, 998):
        independent = interpolated(step, y, k, index, torch.float32)
        assert_within_budget(step.rows[index], independent, interpolated(step, y, k, index, torch.float64))
    assert bool(step.rows[1:999].isfinite().all())


def test_a_velocity_without_weight_is_not_read(backend: Backend) -> None:
    y = random((100,), torch.float32, backend.device)
    step = new_step(y)
    assert not any(step.method.interpolant[1])
    step.later[0].fill_(torch.nan)
    step.call(backend)
    assert bool(step.rows[FIRST:LAST].isfinite().all())


def test_deterministic(backend: Backend) -> None:
    y = random((70_001,), torch.float32, backend.device)
    step = new_step(y, torch.bfloat16, staged=torch.bfloat16)
    first = step.first.clone()

    def call() -> list[Tensor]:
        step.y.copy_(y)
        step.first.copy_(first)
        step.call(backend)
        return [x.clone() for x in step.written]

    assert_deterministic(call)


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("staged", [None, torch.bfloat16])
def test_opcheck(staged: torch.dtype | None, accepted: bool) -> None:
    step = new_step(random((4, 3), torch.float32), torch.bfloat16, staged=staged, accepted=accepted, method="bosh3")
    for tensor in (step.rows, *([] if step.staged is None else [step.staged])):
        tensor.zero_()
    interpolant = [c for row in step.method.interpolant for c in row]
    outputs = (step.y, step.first, step.rows, step.staged)
    torch.library.opcheck(ops.step_commit, (step.record, step.times, step.y_next, step.later, interpolant, *outputs))
