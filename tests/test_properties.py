"""Random tableaus, grids, shapes, dtypes and structures: solutions and gradients against float64.

Every expectation is a plain loop written here. In low precision the same loop, run in the same dtypes by separate
PyTorch operations, says what rounding costs anyone: rampde may err twice as much, see ``tolerance``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tolerance import assert_within_budget, largest_error
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rampde import ButcherTableau, odeint

F64 = torch.float64
POLICIES = ["step", "none", "tape"]
# what float64 can judge; float64 itself is compared by a bound of its own
NARROWER = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]

# the fixtures that surround a test are those of all its examples; with CI set, hypothesis derandomises by itself
checked = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
# how the rounding of one run compares with that of another is a matter of luck in one of some thousand examples:
# always the same examples, so that a failure means a change
compared = settings(checked, derandomize=True)


def coefficients(bound: float) -> st.SearchStrategy[float]:
    """Zeros are as likely as all else: they take another road through every kernel."""
    return st.one_of(st.just(0.0), st.integers(-16, 16).map(lambda n: bound * n / 16))


@st.composite
def tableaus(draw: st.DrawFn) -> ButcherTableau:
    """Explicit, consistent, bounded so that errors are not amplified by the method itself."""
    stages = draw(st.integers(1, 6))
    a = [[draw(coefficients(1.0)) for _ in range(i)] for i in range(stages)]
    b = [draw(coefficients(0.5)) for _ in range(stages)]
    # any stage may be the one that makes the sum 1, so that the last may be unused
    last = draw(st.integers(0, stages - 1))
    b[last] = 0.0
    b[last] = 1.0 - sum(b)
    return ButcherTableau(a=a, b=b)


@st.composite
def grids(draw: st.DrawFn) -> Tensor:
    """Non-uniform times in sixteenths, exact in every dtype, increasing or decreasing, from any start."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    times = torch.tensor([0, *lengths], dtype=F64).cumsum(0) / 16 + draw(st.integers(-2, 2))
    return times.flip(0) if draw(st.booleans()) else times


SHAPES = st.one_of(
    st.sampled_from([(), (0,), (3, 0, 2), (1,), (17,), (64,)]),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
)


@dataclass
class Piece:
    """A leaf of the state: its initial value, and coefficients that f uses, in the leaf's dtype."""

    y0: Tensor
    rate: Tensor


@st.composite
def pieces(draw: st.DrawFn, dtype: torch.dtype) -> Piece:
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    wide = torch.complex128 if dtype.is_complex else F64
    y0 = torch.randn(shape, dtype=wide, generator=generator).to(dtype)
    rate = torch.randn(shape[-1:], dtype=wide, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["dense", "channels_last", "transposed", "sliced"]))
    if layout == "channels_last" and y0.dim() == 4:
        y0 = y0.to(memory_format=torch.channels_last)
    elif layout == "transposed" and y0.dim() >= 2:
        y0 = y0.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced" and y0.dim() >= 1:
        y0 = torch.cat([y0, y0], dim=-1)[..., ::2]
        rate = torch.cat([rate, rate])[::2]
    return Piece(y0, rate)


STRUCTURES: list[Callable[[list[Piece]], Any]] = [
    lambda leaves: leaves[0],
    tuple,
    list,
    lambda leaves: {f"piece {index}": leaf for index, leaf in enumerate(leaves)},
    lambda leaves: {"first": leaves[0], "rest": [(leaf,) for leaf in leaves[1:]]},
]


@st.composite
def states(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Any:
    """A pytree of pieces of one dtype."""
    dtype = draw(st.sampled_from(dtypes))
    leaves = draw(st.lists(pieces(dtype), min_size=1, max_size=3))
    return draw(st.sampled_from(STRUCTURES))(leaves)


def velocity(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    """Bounded slope, couples neighbours along the last dimension, depends on time; ``rate`` is captured."""
    neighbour = y.roll(1, -1) if y.dim() else y
    wave = y / (1 + (y * y.conj()).real) if y.is_complex() else torch.sin(y)
    return rate * wave - t * neighbour / 2


def integrate(
    func: Any, y0: Tensor, t: Tensor, tableau: ButcherTableau, narrow: torch.dtype, state_first: bool
) -> Tensor:
    """The method, step by step: f sees ``narrow``; sums, in 32 bits or more, begin with the state or end with it."""
    wide = torch.promote_types(y0.dtype, torch.float32)
    a, b, c = tableau.a, tableau.b, tableau.nodes
    times = t.to(F64)
    y = y0.to(wide)
    outputs = [y]
    for n in range(len(times) - 1):
        h = times[n + 1] - times[n]
        k: list[Tensor] = []
        for i in range(tableau.stages):
            terms = [(h * float(a[i][j])).to(wide) * k[j].to(wide) for j in range(i)]
            x = sum([y, *terms] if state_first else [*terms, y])
            k.append(func((times[n] + c[i] * h).to(y0.real.dtype), x.to(narrow)))
        terms = [(h * float(weight)).to(wide) * value.to(wide) for weight, value in zip(b, k, strict=True)]
        y = sum([y, *terms] if state_first else [*terms, y])
        outputs.append(y)
    return torch.stack(outputs).to(y0.dtype)


def is_piece(value: object) -> bool:
    return isinstance(value, Piece)


def solve(
    state: Any, t: Tensor, tableau: ButcherTableau, velocity_dtype: torch.dtype | None, checkpoint: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Solutions of all leaves and the gradients of their sum of squares, by rampde, as one pytree."""
    leaves, tree = tree_flatten(state, is_leaf=is_piece)
    y0 = tree_unflatten([leaf.y0.detach().requires_grad_() for leaf in leaves], tree)
    rates = tree_unflatten([leaf.rate.detach().requires_grad_() for leaf in leaves], tree)

    def func(time: Tensor, y: Any) -> Any:
        return tree_map(lambda leaf, rate: velocity(time, leaf, rate.to(leaf.dtype)), y, rates)

    y = odeint(func, y0, t, method=tableau, velocity_dtype=velocity_dtype, checkpoint=checkpoint, loss_scaler=None)
    assert tree_flatten(y)[1] == tree
    results, inputs = tree_flatten(y)[0], [*tree_flatten(y0)[0], *tree_flatten(rates)[0]]
    return [leaf.detach() for leaf in results], gradients_of(results, inputs)


def gradients_of(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = sum((leaf.abs().double().square().sum() for leaf in results), start=torch.zeros((), dtype=F64))
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def by_hand(
    state: Any,
    t: Tensor,
    tableau: ButcherTableau,
    narrow: torch.dtype | None,
    exact: bool,
    state_first: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """The same leaf by leaf in plain PyTorch, in float64 from the same (rounded) inputs when ``exact``."""
    results, y0s, rates = [], [], []
    for leaf in tree_flatten(state, is_leaf=is_piece)[0]:
        dtype = torch.promote_types(leaf.y0.dtype, F64) if exact else leaf.y0.dtype
        y0, rate = (x.detach().to(dtype).requires_grad_() for x in (leaf.y0, leaf.rate))
        inside = dtype if exact or narrow is None else narrow

        def func(time: Tensor, x: Tensor, rate: Tensor = rate) -> Tensor:
            return velocity(time, x, rate.to(x.dtype))

        results.append(integrate(func, y0, t, tableau, inside, state_first))
        y0s.append(y0)
        rates.append(rate)
    return [y.detach() for y in results], gradients_of(results, [*y0s, *rates])


def compare(
    found: tuple[list[Tensor], list[Tensor]], state: Any, t: Tensor, tableau: ButcherTableau, *narrow: torch.dtype
) -> None:
    """As good as the worse of two computations by hand, which differ in the order of their sums alone: the rounding of
    a single number may happen to cancel in one."""
    inside = narrow[0] if narrow else None
    exact = by_hand(state, t, tableau, inside, True)
    low = [by_hand(state, t, tableau, inside, False, state_first) for state_first in (True, False)]
    for part in (0, 1):
        for ours, first, second, true in zip(found[part], low[0][part], low[1][part], exact[part], strict=True):
            parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (ours, first, second, true)]
            worse = max(parts[1:3], key=lambda x, true=parts[3]: largest_error(x, true))
            assert_within_budget(parts[0], worse, parts[3], *narrow)


@pytest.mark.parametrize("checkpoint", POLICIES)
@compared
@given(state=states(NARROWER), t=grids(), tableau=tableaus())
def test_solution_and_gradients(checkpoint: str, state: Any, t: Tensor, tableau: ButcherTableau) -> None:
    compare(solve(state, t, tableau, None, checkpoint), state, t, tableau)


@pytest.mark.parametrize("checkpoint", POLICIES)
@compared
@given(
    state=states([torch.float64, torch.float32]),
    t=grids(),
    tableau=tableaus(),
    narrow=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_16_bit_velocities(
    checkpoint: str, state: Any, t: Tensor, tableau: ButcherTableau, narrow: torch.dtype
) -> None:
    compare(solve(state, t, tableau, narrow, checkpoint), state, t, tableau, narrow)


@checked
@given(state=states([torch.float64, torch.complex128]), t=grids(), tableau=tableaus())
def test_policies_agree_in_float64(state: Any, t: Tensor, tableau: ButcherTableau) -> None:
    """To 1e-12: some hundred operations of numbers of order one to a hundred, at 2e-16 each."""
    step, none, tape = (solve(state, t, tableau, None, checkpoint) for checkpoint in POLICIES)
    exact = by_hand(state, t, tableau, None, True)
    for other in (none, tape, exact):
        for a, b in zip([*step[0], *step[1]], [*other[0], *other[1]], strict=True):
            assert a.shape == b.shape
            assert a.numel() == 0 or (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))


@checked
@given(state=states([torch.float64]), t=grids(), tableau=tableaus(), parts=st.integers(1, 4))
def test_a_finer_grid_is_the_composition_of_its_parts(
    state: Any, t: Tensor, tableau: ButcherTableau, parts: int
) -> None:
    """Solving on all of t and solving on from each state are the same steps: the same bits."""
    leaves, tree = tree_flatten(state, is_leaf=is_piece)
    rates = tree_unflatten([leaf.rate for leaf in leaves], tree)
    y = tree_unflatten([leaf.y0 for leaf in leaves], tree)

    def func(time: Tensor, y: Any) -> Any:
        return tree_map(lambda leaf, rate: velocity(time, leaf, rate), y, rates)

    whole = tree_flatten(odeint(func, y, t, method=tableau))[0]
    for n in range(len(t) - 1):
        y = tree_map(lambda leaf: leaf[-1], odeint(func, y, t[n : n + 2], method=tableau))
        for leaf, expected in zip(tree_flatten(y)[0], whole, strict=True):
            assert torch.equal(leaf, expected[n + 1])
