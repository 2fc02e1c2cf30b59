"""The change of the state in eight bits, written at the end of a step and read on the way back, on every backend."""

import pytest
import torch
from operands import (
    DTYPES,
    LAYOUTS,
    OPCHECKS_IN_8_BITS,
    Backend,
    exact_step,
    mixed,
    random,
    same_bits,
    scalar,
)
from torch import Tensor

from rampde import eager, fp8_blocks, ops

SEEDS = (None, 0, -1, 2**40 + 3)
WEIGHTS = [1 / 6, 1 / 3, -0.7, 0.2, 1.5, -0.4, 0.9, 0.05] * 2
QUANTISED_SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (1000,), (1025,), (40_001,)]
CODES, SCALES = torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.zeros(1)
STATE, LARGE = torch.zeros(4, 2), torch.zeros(300).to(CODES.dtype)


def backwards(
    backend: Backend, y: Tensor, k: list[Tensor], h: Tensor, b: list[float], compensation: Tensor | None = None
) -> Tensor:
    """The step taken backwards, not rounded: minus the one that starts at minus zero, where there is nothing else."""
    lost = None if compensation is None else compensation.clone()
    step = torch.empty_like(y, dtype=eager.accumulation_dtype((y if lost is None else lost).dtype))
    backend.rk_update(torch.full_like(y, -0.0), k, h, b, step, None, lost)
    return -step


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", QUANTISED_SHAPES, ids=str)
def test_quantised_sizes(backend: Backend, shape: tuple[int, ...], seed: int | None) -> None:
    y = random(shape, torch.float32, backend.device)
    k, b, h = mixed(4, y), WEIGHTS[:4], scalar(0.1, backend.device)
    y_next, (codes, scales) = torch.empty_like(y), fp8_blocks.empty_like(y)
    backend.rk_update(y, k, h, b, y_next, quantised=codes, block_scales=scales, seed=seed)
    assert same_bits([codes, scales], fp8_blocks.quantise(backwards(backend, y, k, h, b), seed))
    plain = torch.empty_like(y)
    backend.rk_update(y, k, h, b, plain)
    assert same_bits([y_next], [plain])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("state", DTYPES)
def test_quantised_is_all_that_is_added_and_rounded_by_no_other_output(
    backend: Backend, state: torch.dtype, compensated: bool, seed: int | None
) -> None:
    y, h = random((1001,), state, backend.device), scalar(0.1, backend.device)
    k, accumulation = mixed(5, y), eager.accumulation_dtype(state)
    lost = random((1001,), accumulation, backend.device) * 1e-2 if compensated else None
    expected = fp8_blocks.quantise(backwards(backend, y, k, h, WEIGHTS[:5], lost), seed)
    outcomes = []
    for dtype in (accumulation, state):
        y_next, checkpoint = torch.empty_like(y, dtype=dtype), torch.empty_like(y, dtype=torch.float16)
        compensation, (codes, scales) = None if lost is None else lost.clone(), fp8_blocks.empty_like(y)
        backend.rk_update(y, k, h, WEIGHTS[:5], y_next, checkpoint, compensation, None, 0, codes, scales, seed)
        outcomes.append([codes, scales, checkpoint, *([compensation] if compensation is not None else [])])
        assert same_bits([codes, scales], expected)
    assert same_bits(*outcomes)


def test_quantised_includes_what_compensation_carried(backend: Backend) -> None:
    y, lost = (random((300,), torch.float32, backend.device) for _ in range(2))
    codes, scales = fp8_blocks.empty_like(y)
    arguments = (y, [], scalar(0.1, backend.device), [], torch.empty_like(y), None, lost.clone(), None, 0)
    backend.rk_update(*arguments, codes, scales)
    assert same_bits([codes, scales], fp8_blocks.quantise(-lost))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quantised_does_not_depend_on_the_state(backend: Backend, value: float) -> None:
    y, h = random((300,), torch.float32, backend.device), scalar(0.1, backend.device)
    k, outcomes = mixed(3, y), []
    for state in (y, torch.full_like(y, value)):
        outcomes.append(fp8_blocks.empty_like(y))
        backend.rk_update(state, k, h, WEIGHTS[:3], torch.empty_like(y), None, None, None, 0, *outcomes[-1])
    assert same_bits(*outcomes)
    # but on the velocities, element by element
    k[1][17], (codes, scales) = value, fp8_blocks.empty_like(y)
    backend.rk_update(y, k, h, WEIGHTS[:3], torch.empty_like(y), None, None, None, 0, codes, scales)
    assert codes.float().isnan().nonzero().tolist() == [[17]]
    assert bool(scales.isfinite().all())


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_layouts(backend: Backend, layout: str, seed: int | None) -> None:
    """Codes as the state in memory, codes and scales at any offset."""
    y = random(LAYOUTS[layout], torch.float32, backend.device, layout)
    k, b, h = mixed(3, y), WEIGHTS[:3], scalar(0.1, backend.device)
    expected, y_next = fp8_blocks.empty_like(y), torch.empty_like(y)
    backend.rk_update(y, k, h, b, y_next, quantised=expected[0], block_scales=expected[1], seed=seed)
    assert same_bits(expected, fp8_blocks.quantise(backwards(backend, y, k, h, b), seed))
    moved = [torch.empty(x.numel() + 3, dtype=x.dtype, device=x.device) for x in expected]
    codes = moved[0][3:].as_strided(y.shape, y.stride())
    backend.rk_update(y, k, h, b, y_next, quantised=codes, block_scales=moved[1][3:], seed=seed)
    assert same_bits([codes, moved[1][3:]], expected)
    untouched = moved[0][:3].float(), moved[1][:3]
    assert all(bool(x.isnan().all()) for x in untouched)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_quantised_special_values(backend: Backend, state: torch.dtype, seed: int | None) -> None:
    """Zeros, what is not finite, the smallest and largest numbers, halves of a quantum, any bits at all."""
    block = fp8_blocks.BLOCK
    normal = torch.randn(block, dtype=torch.float64).clamp(-3, 3)
    bits = torch.randint(-(2**31), 2**31, (100 * block,)).to(torch.int32).view(torch.float32)
    special = [normal * 0.0, normal * 2.0**-140, normal * 2.0**-120, normal * 2.0**126, bits.double()]
    special += [torch.full((block,), value, dtype=torch.float64) for value in (torch.nan, torch.inf, -torch.inf)]
    for value in (torch.nan, torch.inf, -torch.inf, 1e300):
        special.append(torch.where(torch.rand(block) < 0.5, normal, value))
    special.append((torch.arange(2 * block) + 0.5) / 2**9)
    special.append(448 * torch.arange(3, dtype=torch.float64))
    change = torch.cat(special).to(device=backend.device, dtype=state)
    y, h = torch.ones_like(change), scalar(1.0, backend.device)
    codes, scales = fp8_blocks.empty_like(y)
    backend.rk_update(y, [change], h, [-1.0], torch.empty_like(y), quantised=codes, block_scales=scales, seed=seed)
    assert same_bits([codes, scales], fp8_blocks.quantise(change, seed))


def test_nothing_in_8_bits_is_zero(backend: Backend) -> None:
    y = random((300,), torch.float32, backend.device)
    codes, scales = fp8_blocks.empty_like(y)
    arguments = (y, [], scalar(0.1, backend.device), [], torch.empty_like(y))
    backend.rk_update(*arguments, quantised=codes, block_scales=scales)
    assert not codes.view(torch.uint8).any()
    assert bool((scales == 1).all())


@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("shape", QUANTISED_SHAPES, ids=str)
def test_a_step_in_8_bits_is_read(backend: Backend, shape: tuple[int, ...], result: torch.dtype) -> None:
    """As the numbers that it stands for, in the dtype in which sums with the result are formed."""
    codes, scales = fp8_blocks.quantise(random(shape, torch.float64, backend.device))
    h, y = scalar(0.1, backend.device), fp8_blocks.dequantise(codes, scales, eager.accumulation_dtype(result))
    for stages in (0, 1, 5):
        k, b, outcomes = mixed(stages, y), WEIGHTS[:stages], []
        for base, of_blocks in ((codes, scales), (y, None)):
            y_next, checkpoint = torch.empty_like(y, dtype=result), torch.empty_like(y, dtype=torch.float16)
            backend.rk_update(base, k, h, b, y_next, checkpoint, block_scales=of_blocks)
            outcomes.append([y_next, checkpoint])
        assert same_bits(*outcomes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_in_8_bits_of_any_layout_is_read(backend: Backend, layout: str) -> None:
    state = random(LAYOUTS[layout], torch.float32, backend.device, layout)
    codes, scales = fp8_blocks.quantise(random(LAYOUTS[layout], torch.float32, backend.device, layout))
    # at offsets that no allocation has
    memory = torch.empty(codes.numel() + 3, dtype=codes.dtype, device=backend.device)[3:]
    codes = memory.as_strided(state.shape, state.stride()).copy_(codes)
    scales = torch.empty(len(scales) + 1, device=backend.device)[1:].copy_(scales)
    one, y = scalar(1.0, backend.device), fp8_blocks.dequantise(codes, scales, torch.float32)
    for terms in ([state], [state.contiguous()]):
        y_next, checkpoint = torch.empty_like(state), torch.empty_like(state, dtype=torch.float16)
        backend.rk_update(codes, terms, one, [1.0], y_next, checkpoint, block_scales=scales)
        assert same_bits([y_next, checkpoint], [y + state, (y + state).half()])
    # in place
    backend.rk_update(codes, [state], one, [1.0], state, block_scales=scales)
    assert same_bits([state], [y_next])


@pytest.mark.parametrize("result", [torch.float32, torch.float64])
def test_every_code_and_scale(backend: Backend, result: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(247).view(torch.float8_e4m3fn)
    # a product beyond float32 is infinite there
    scales = torch.ones(2 * 247).ldexp(torch.arange(-126, 121).repeat_interleave(2))
    exact = codes.to(result) * scales.to(result).repeat_interleave(128)
    codes, scales, h = codes.to(backend.device), scales.to(backend.device), scalar(0.1, backend.device)
    found = torch.empty_like(codes, dtype=result)
    backend.rk_update(codes, [], h, [], found, block_scales=scales)
    assert torch.equal(found.isnan().cpu(), exact.isnan())
    assert int(exact.isnan().sum()) == 2 * 247
    assert bool(exact.isinf().any()) == (result == torch.float32)
    assert same_bits([found.cpu().nan_to_num(nan=0.0)], [exact.nan_to_num(nan=0.0)])


@pytest.mark.parametrize(("value", "seen"), [(torch.nan, True), (1e6, True), (6e4, False)])
def test_overflow_step_of_a_step_that_is_read(backend: Backend, value: float, seen: bool) -> None:
    state = random((3001,), torch.float32, backend.device)
    codes, scales = fp8_blocks.quantise(random((3001,), torch.float32, backend.device))
    state[2500] = value
    overflow_step, one = scalar(99, backend.device, torch.int64), scalar(1.0, backend.device)
    y_next, checkpoint = torch.empty_like(state), torch.empty_like(state, dtype=torch.float16)
    backend.rk_update(codes, [state], one, [1.0], y_next, checkpoint, None, overflow_step, 5, block_scales=scales)
    assert overflow_step == (5 if seen else 99)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("result", DTYPES)
def test_cpu_reads_as_the_oracle_to_the_last_bit(result: torch.dtype) -> None:
    codes, scales = fp8_blocks.quantise(random((5000,), torch.float64))
    outcomes, k = [], mixed(7, torch.empty(5000))
    for rk_update in (ops.rk_update, eager.rk_update):
        y_next, checkpoint = torch.empty(5000, dtype=result), torch.empty(5000, dtype=torch.bfloat16)
        rk_update(codes, k, scalar(0.37, "cpu"), WEIGHTS[:7], y_next, checkpoint, block_scales=scales)
        outcomes.append([y_next, checkpoint])
    assert same_bits(*outcomes)


class Solve:
    """Steps whose velocities are known before: the states, exactly and as they were computed, and what is kept."""

    def __init__(
        self, backend: Backend, y: Tensor, velocities: list[list[Tensor]], compensated: bool, seed: int | None = None
    ) -> None:
        self.backend, self.states, self.kept = backend, [y], []
        b, h = WEIGHTS[: len(velocities[0])], scalar(0.01, backend.device)
        lost = torch.zeros_like(y) if compensated else None
        self.exact, self.quanta, self.rounding = [y.double()], [], []
        eps = torch.finfo(y.dtype).eps
        for index, k in enumerate(velocities):
            quantised, y_next = fp8_blocks.empty_like(y), torch.empty_like(y)
            of_step = None if seed is None else 1000 * seed + index
            backend.rk_update(self.states[-1], k, h, b, y_next, None, lost, None, 0, *quantised, of_step)
            self.states.append(y_next)
            self.kept.append(quantised)
            self.exact.append(exact_step(self.exact[-1], k, h, b))
            terms = sum(abs(weight) * h * term.double().abs() for weight, term in zip(b, k, strict=True))
            change = fp8_blocks.in_memory_order(self.exact[-1] - self.exact[-2]).abs()
            scales = quantised[1].double().repeat_interleave(fp8_blocks.BLOCK)[: y.numel()]
            # neighbouring codes are an eighth of their binade apart, below 2^-6 as far as there
            exponent = (torch.frexp(change / scales).exponent - 1).clamp(min=-6) - 3
            quantum = torch.empty_like(self.exact[0])
            fp8_blocks.in_memory_order(quantum).copy_(scales.ldexp(exponent))
            self.quanta.append(quantum)
            # of the sum of the terms and of adding it to the state, out and back; and on the way to 8 bits
            largest = torch.maximum(self.exact[-1].abs(), self.exact[-2].abs()) + terms
            of_state = eps * ((2 * len(k) + 2) * terms + 2 * largest)
            self.rounding.append(of_state + torch.finfo(torch.float32).eps * terms)

    def back(self, checkpoint: torch.dtype) -> list[Tensor]:
        """The states again, from the last one on, the first one last."""
        one, states = scalar(1.0, self.backend.device), [self.states[-1]]
        for codes, scales in reversed(self.kept):
            before, rounded = torch.empty_like(states[-1]), torch.empty_like(codes, dtype=checkpoint)
            self.backend.rk_update(codes, [states[-1]], one, [1.0], before, rounded, block_scales=scales)
            assert same_bits([rounded], [before.to(checkpoint)])
            states.append(before)
        return states


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_way_back_is_exact_to_half_a_quantum_a_step(
    backend: Backend, layout: str, state: torch.dtype, compensated: bool, seed: int | None
) -> None:
    """A whole one where rounding is random; and what rounding in the dtype of the state costs."""
    y = random(LAYOUTS[layout], state, backend.device, layout)
    velocities = [mixed(4, y) for _ in range(9)]
    solve = Solve(backend, y, velocities, compensated, seed)
    allowed, found = sum(solve.rounding), solve.back(torch.bfloat16)
    for step in reversed(range(9)):
        allowed = allowed + solve.quanta[step] * (0.5 if seed is None else 1.0)
        assert bool(((found[9 - step].double() - solve.exact[step]).abs() <= allowed).all())
        assert found[9 - step].stride() == y.stride()
    # a state in 8 bits would be farther off than all of its steps
    of_state = fp8_blocks.dequantise(*fp8_blocks.quantise(y), torch.float64)
    assert (found[-1].double() - y.double()).abs().mean() < (of_state - y.double()).abs().mean()


def test_the_way_back_is_right_on_average(backend: Backend) -> None:
    """Over seeds, to six standard deviations of a mean, where rounding is random."""
    seeds, y = 300, random((130,), torch.float64, backend.device)
    velocities = [mixed(2, y) for _ in range(3)]
    solves = [Solve(backend, y, velocities, False, seed) for seed in range(seeds)]
    mean = torch.stack([solve.back(torch.float16)[-1] for solve in solves]).mean(0)
    # what is rounded to a quantum has half of it as its largest standard deviation; random numbers have 20 bits
    deviation = 0.5 * sum(quantum.square() for quantum in solves[0].quanta).sqrt()
    allowed = 6 * deviation / seeds**0.5 + 2.0**-20 * sum(solves[0].quanta) + sum(solves[0].rounding)
    assert bool(((mean - y).abs() <= allowed).all())


@pytest.mark.parametrize("seed", [None, 5])
def test_opcheck_quantised(seed: int | None) -> None:
    y = random(LAYOUTS["channels_last"], torch.float32, layout="channels_last")
    outputs = torch.zeros_like(y), None, torch.zeros_like(y), None, 0, *fp8_blocks.quantise(y), seed
    arguments = (y, mixed(3, y), scalar(0.1, "cpu"), WEIGHTS[:3], *outputs)
    torch.library.opcheck(ops.rk_update, arguments, test_utils=OPCHECKS_IN_8_BITS)
    codes, scales = fp8_blocks.quantise(y)
    arguments = (codes, mixed(3, y), scalar(0.1, "cpu"), WEIGHTS[:3], torch.zeros_like(y))
    outputs = (torch.zeros_like(y).half(), None, torch.tensor(9), 4, None, scales)
    torch.library.opcheck(ops.rk_update, (*arguments, *outputs), test_utils=OPCHECKS_IN_8_BITS)


@pytest.mark.parametrize(
    ("quantised", "block_scales", "message"),
    [
        (CODES, None, "block_scales is None, expected the scales of quantised"),
        (None, SCALES, "quantised is None, expected a .*float8_e4m3fn tensor"),
        (torch.zeros(4, 2), SCALES, "quantised has dtype .*float32, expected .*float8_e4m3fn"),
        (CODES[:3], SCALES, r"quantised has shape .3, 2.*, expected .*y, .4, 2."),
        (CODES.view(2, 4).t(), SCALES, "quantised .*expected .*(layout of y|same strides)"),
        (torch.zeros(4, 4).to(CODES.dtype)[:, ::2], SCALES, "quantised .*expected a dense tensor"),
        (CODES, SCALES.double(), "block_scales .*float64.*, expected .*float32"),
        (CODES, torch.zeros(2), r"block_scales .*shape .2.*, expected .*1.*, one for each 128 elements"),
        (CODES, torch.zeros(()), r"block_scales .*shape .*, expected .*1.*, one for each 128 elements"),
        (torch.zeros(40, 8).to(CODES.dtype), torch.zeros(6)[::2], "block_scales .*expected it contiguous"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_of_quantised_outputs(
    backend: Backend, quantised: Tensor | None, block_scales: Tensor | None, message: str
) -> None:
    large = quantised is not None and quantised.numel() > 300
    y = torch.ones((40, 8) if large else (4, 2), device=backend.device)
    y_next, h = torch.zeros_like(y), scalar(0.1, backend.device)
    quantised, block_scales = (None if x is None else x.to(backend.device) for x in (quantised, block_scales))
    with pytest.raises((RuntimeError, ValueError), match="rk_update: " + message):
        backend.rk_update(y, [y], h, [1.0], y_next, quantised=quantised, block_scales=block_scales)
    # nothing was written
    assert not y_next.any()


@pytest.mark.parametrize(
    ("y", "others", "message"),
    [
        (CODES, {}, "block_scales is None, expected the scales of y, which is in .*float8_e4m3fn"),
        (CODES[:, ::2], {"block_scales": SCALES}, "y .*expected a dense tensor"),
        (CODES, {"block_scales": SCALES.half()}, "block_scales .*float16.*, expected .*float32"),
        (CODES, {"block_scales": torch.zeros(2)}, r"block_scales .*shape .2.*, expected .*1.*, one for each 128"),
        (CODES, {"block_scales": torch.zeros(1, 1)}, r"block_scales .*shape .1, 1.*, expected .*1.*, one for each"),
        (LARGE, {"block_scales": torch.zeros(6)[::2]}, "block_scales .*expected it contiguous"),
        (CODES, {"block_scales": SCALES, "quantised": CODES}, "quantised is given, expected None where y has dtype"),
        (CODES, {"block_scales": SCALES, "compensation": STATE}, "compensation is given, expected None where y has"),
        (CODES, {"block_scales": SCALES, "seed": 5}, "seed is given, expected None where y has dtype"),
        (CODES.view(torch.uint8), {"block_scales": SCALES}, "(y has dtype|quantised is None)"),
        (STATE, {"seed": 5}, "seed is 5, expected None without quantised"),
        (STATE, {"seed": 0}, "seed is 0, expected None without quantised"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_of_what_is_read_in_8_bits(backend: Backend, y: Tensor, others: dict, message: str) -> None:
    y, y_next = y.to(backend.device), torch.zeros(y.shape, device=backend.device)
    others = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in others.items()}
    with pytest.raises((RuntimeError, ValueError), match="rk_update: " + message):
        backend.rk_update(y, [torch.ones_like(y_next)], scalar(0.1, backend.device), [1.0], y_next, **others)
    # nothing was written
    assert not y_next.any()
