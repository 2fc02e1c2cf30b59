"""Decision on the scale of the next step, on every backend, against the rule in Python's own arithmetic."""

import itertools
import math

import pytest
import torch
from operands import DTYPES, Backend, assert_deterministic, random, same_bits, scale_state
from torch import Tensor

from rampde import ops, scaling

NAMES = (
    "SCALE",
    "SCALE_OF_STEP",
    "MAXIMUM",
    "FINITE",
    "HEADROOM",
    "CLEAN_STEPS",
    "COMMITTED_STEPS",
    "INCREASED",
    "OVERFLOWED",
)
POLICY = {
    "target": 40.0,
    "decrease_factor": 0.25,
    "increase_factor": 2.0,
    "increase_interval": 10,
    "delta": 1e-3,
    "steps": 2,
}


def values(state: Tensor) -> dict[str, float]:
    return {name: float(state[getattr(scaling, name)]) for name in NAMES}


def decided(old: dict[str, float], finite: bool, policy: dict[str, float]) -> dict[str, float]:
    """The rule, in the words of the oracle's documentation."""
    if old["OVERFLOWED"] == 1:
        return old | {"SCALE_OF_STEP": 0.0}
    new = old | {"MAXIMUM": 0.0, "FINITE": 1.0}
    if not (finite and old["FINITE"] == 1):
        headroom = old["HEADROOM"] * policy["decrease_factor"]
        return new | {"SCALE_OF_STEP": 0.0, "OVERFLOWED": 1.0, "HEADROOM": headroom, "CLEAN_STEPS": 0.0}
    new["SCALE_OF_STEP"] = old["SCALE"]
    new["COMMITTED_STEPS"] += policy["steps"]
    new["CLEAN_STEPS"] += policy["steps"]
    if new["CLEAN_STEPS"] >= policy["increase_interval"] and old["HEADROOM"] < 1:
        new["HEADROOM"] = min(1.0, old["HEADROOM"] * policy["increase_factor"])
        new["CLEAN_STEPS"] = 0.0
        new["INCREASED"] += 1
    if old["MAXIMUM"] > 0:
        exponent = math.floor(math.log2(policy["target"] / (old["MAXIMUM"] + policy["delta"])))
        new["SCALE"] = new["HEADROOM"] * 2.0 ** max(-96, min(96, exponent))
    return new


def call(backend: Backend, state: Tensor, gradients: list[Tensor | None], **change: float) -> dict[str, float]:
    policy = POLICY | change
    backend.update_scale(state, gradients, *policy.values())
    return values(state)


@pytest.mark.parametrize("maximum", [0.0, 1e-30, 3e-5, 0.7, 39.0, 1e5, 3e38])
@pytest.mark.parametrize("clean_steps", [0.0, 7.0, 8.0, 100.0])
@pytest.mark.parametrize("headroom", [2.0**-9, 0.5, 1.0])
def test_every_branch_follows_the_rule(backend: Backend, maximum: float, clean_steps: float, headroom: float) -> None:
    for finite, overflowed, good in itertools.product((0.0, 1.0), (0.0, 1.0), (True, False)):
        entries = {"MAXIMUM": maximum, "FINITE": finite, "HEADROOM": headroom, "CLEAN_STEPS": clean_steps}
        state = scale_state(backend.device, 2.0**5, **entries, OVERFLOWED=overflowed, COMMITTED_STEPS=6, INCREASED=1)
        old = values(state)
        gradients = [torch.tensor([1.0, 2.0 if good else torch.inf], device=backend.device)]
        assert call(backend, state, gradients) == decided(old, good, POLICY)


@pytest.mark.parametrize("exponent", range(-40, 40, 7))
def test_powers_of_two_are_met_exactly(backend: Backend, exponent: int) -> None:
    """At a power of two the logarithm must not round to the wrong side."""
    for ratio, floor in ((2.0**exponent, exponent), (2.0**exponent * (1 - 2**-23), exponent - 1)):
        state = scale_state(backend.device, MAXIMUM=1.0)
        assert call(backend, state, [], target=ratio, delta=0.0)["SCALE"] == 2.0**floor


@pytest.mark.parametrize("maximum", [1e-34, 1e-37, 1e-42])
def test_tiny_adjoint_takes_the_largest_scale(backend: Backend, maximum: float) -> None:
    """Also where target / maximum is beyond the range of float32."""
    state = scale_state(backend.device, MAXIMUM=maximum)
    assert call(backend, state, [], delta=0.0)["SCALE"] == 2.0**96


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "misaligned", "strided"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_is_found(backend: Backend, dtype: torch.dtype, value: float, layout: str) -> None:
    for position in (0, 7, 4097):
        wide = random((3, 1366, 2), dtype, backend.device, "contiguous" if layout == "strided" else layout)
        gradient = wide[:, :, 0] if layout == "strided" else wide
        gradients = [
            random((5,), torch.float32, backend.device),
            None,
            gradient,
            torch.empty(0, device=backend.device),
        ]
        state = scale_state(backend.device)
        assert call(backend, state, gradients)["OVERFLOWED"] == 0
        gradient[position // 1366, position % 1366] = value
        assert call(backend, state, gradients)["OVERFLOWED"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_value_is_finite(backend: Backend, dtype: torch.dtype) -> None:
    gradient = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype, device=backend.device)
    assert call(backend, scale_state(backend.device), [gradient, -gradient])["OVERFLOWED"] == 0


def test_many_gradients(backend: Backend) -> None:
    gradients = [random((i % 5,), DTYPES[i % 4], backend.device) for i in range(700)]
    state = scale_state(backend.device)
    assert call(backend, state, gradients)["COMMITTED_STEPS"] == 2
    gradients[-1][-1] = torch.nan
    assert call(backend, state, gradients)["COMMITTED_STEPS"] == 2
    assert values(state)["OVERFLOWED"] == 1


def test_deterministic(backend: Backend) -> None:
    gradients = [random((100_003,), torch.float16, backend.device) for _ in range(3)]

    def decide() -> list[Tensor]:
        state = scale_state(backend.device, MAXIMUM=0.3)
        call(backend, state, gradients)
        return [state]

    assert_deterministic(decide)


def test_opcheck() -> None:
    gradients = [random((5,), torch.float32), None, random((3, 2), torch.bfloat16)]
    torch.library.opcheck(ops.update_scale, (scale_state("cpu", MAXIMUM=0.3), gradients, *POLICY.values()))


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()

    def decide(state: Tensor, gradient: Tensor) -> Tensor:
        state = state.clone()
        ops.update_scale(state, [gradient * 2, None], *POLICY.values())
        return state * 1

    compiled = torch.compile(decide, fullgraph=True, backend="aot_eager")
    arguments = (scale_state("cpu", MAXIMUM=0.3), random((12,), torch.float16))
    assert same_bits([compiled(*arguments)], [decide(*arguments)])


def test_meta_tensors() -> None:
    state = torch.empty(scaling.STATE_SIZE, device="meta")
    assert ops.update_scale(state, [torch.empty(3, device="meta"), None], *POLICY.values()) is None


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("state", "gradients", "message"),
    [
        (torch.ones(3), [], "scale_state has shape [3], expected [9]"),
        (torch.ones(9).half(), [], "scale_state has dtype float16, expected float32"),
        (torch.ones(9), [None, torch.ones(2).int()], "gradients[1] has dtype int32, expected float64"),
    ],
)
def test_errors_name_argument_found_and_expected(state: Tensor, gradients: list[Tensor | None], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        ops.update_scale(state, gradients, *POLICY.values())
    assert str(error.value).startswith("rampde::update_scale: " + message)
