"""Values of the kernels for all leaves of a state, interpreted or on a GPU; ``test_values.py`` runs it.

Against the kernels for one leaf, to the bit, which ``value_suite.py`` holds against float64.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from operands import LAYOUTS, random, same_bits
from suites import INTERPRETED, coefficients, step_size
from torch import Tensor

from rampde import eager_leaves
from rampde.kernels import rk_error, rk_error_leaves, rk_stage, rk_stage_leaves, rk_update, rk_update_leaves
from rampde.kernels.launch import BLOCK
from rampde.ops import NUMBERS

pytestmark = pytest.mark.usefixtures("device_of_triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# all bfloat16 results, which the interpreter truncates, it truncates alike
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF = NUMBERS[torch.float16]
SIZES = (3 * BLOCK + 7, 17, 0, 1, BLOCK, 4, 1000, 2 * BLOCK, 33)


def leaves_of(count: int, terms: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """States of odd, even and no elements in different dtypes, and their velocities, in dtypes that differ too."""
    y = [random((SIZES[leaf],), DTYPES[leaf % 2], DEVICE) for leaf in range(count)]
    k = [[random(state.shape, DTYPES[(leaf + j) % 4], DEVICE) for j in range(terms)] for leaf, state in enumerate(y)]
    return y, k


def flat(k: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [term for of_leaf in k for term in of_leaf]


def poisoned(y: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.full_like(state, torch.nan, dtype=dtype) for state in y]


@pytest.mark.parametrize("terms", [0, 1, 4])
@pytest.mark.parametrize("count", range(1, 10))
def test_stage(count: int, terms: int) -> None:
    y, k = leaves_of(count, terms)
    a = [0.0 if j == 1 else weight for j, weight in enumerate(coefficients(terms))]
    dtypes = [DTYPES[(leaf + terms) % 3] for leaf in range(count)]
    found = rk_stage_leaves(y, flat(k), step_size(), a, [NUMBERS[dtype] for dtype in dtypes])
    leaves = zip(y, k, dtypes, strict=True)
    assert same_bits(found, [rk_stage(*leaf, step_size(), a, dtype) for *leaf, dtype in leaves])


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("saved", [None, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 9])
def test_update(count: int, saved: torch.dtype | None, compensated: bool) -> None:
    y, k = leaves_of(count, 3)
    b, results = coefficients(3), []
    lost = [1e-3 * random(state.shape, state.dtype, DEVICE) for state in y] if compensated else []
    for together in (True, False):
        y_next, checkpoints = poisoned(y), poisoned(y, saved) if saved else []
        compensations, overflow = [loss.clone() for loss in lost], torch.tensor(9)
        if together:
            rk_update_leaves(y, flat(k), step_size(), b, y_next, checkpoints, compensations, overflow, 4)
        else:
            for leaf, state in enumerate(y):
                outputs = [x[leaf] if x else None for x in (checkpoints, compensations)]
                rk_update(state, k[leaf], step_size(), b, y_next[leaf], *outputs, overflow, 4)
        results.append([*y_next, *checkpoints, *compensations, overflow])
    assert same_bits(*results)
    assert not any(x.isnan().any() for x in results[0])


@pytest.mark.parametrize("leaf", range(3))
def test_overflow_of_any_leaf(leaf: int) -> None:
    y = [torch.zeros(size) for size in (BLOCK + 3, 1, 17)]
    y[leaf][-1] = torch.inf
    overflow = torch.tensor(9)
    rk_update_leaves(y, [], step_size(), [], poisoned(y), [], [], overflow, 5)
    assert overflow.item() == 5


@pytest.mark.parametrize("written", ["nothing", "state", "all"])
@pytest.mark.parametrize("count", range(1, 10))
def test_error(count: int, written: str) -> None:
    y, k = leaves_of(count, 3)
    b, e, roundoffs = [0.3, 0.0, -0.7], [0.0, 0.2, 0.1], [2.0 ** -(8 + leaf) for leaf in range(count)]
    results, sums = [], []
    for together in (True, False):
        y_next, checkpoints, compensations = [], [], []
        if written != "nothing":
            y_next = poisoned(y)
        if written == "all":
            checkpoints, compensations = poisoned(y, torch.float16), [torch.full_like(state, 1e-3) for state in y]
        outputs = (y_next, checkpoints, compensations)
        if together:
            found = rk_error_leaves(y, flat(k), step_size(), b, e, 1e-3, 1e-5, roundoffs, *outputs)
        else:
            of_leaves = []
            for leaf, roundoff in enumerate(roundoffs):
                targets = [x[leaf] if x else None for x in outputs]
                arguments = (y[leaf], k[leaf], step_size(), b, e, 1e-3, 1e-5, roundoff, 1)
                of_leaves.append(rk_error(*arguments, *targets))
            found = torch.cat(of_leaves)
        sums.append(found)
        results.append([*y_next, *checkpoints, *compensations])
    assert same_bits(*results)
    assert sums[0].shape == (count, 2)
    # but for the order of the sums over blocks, of float64 of one sign
    assert bool(((sums[0] - sums[1]).abs() <= 4 * torch.finfo(torch.float64).eps * sums[1]).all())


def test_error_that_is_not_finite() -> None:
    y = [torch.randn(size) for size in (2 * BLOCK, 5, 0)]
    y[1][3] = torch.nan
    sums = rk_error_leaves(y, y, step_size(), [1.0], [1.0], 1e-3, 1e-5, [0.0] * 3, [], [], [])
    assert sums[:, 0].isinf().tolist() == [False, True, False]
    assert sums[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("k_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout: str, k_layout: str) -> None:
    shape = (2, 3, 5, 7)
    y = [random(shape, torch.float32, DEVICE, name) for name in (layout, "contiguous")]
    k = [[random(shape, torch.float16, DEVICE, name) for _ in range(2)] for name in (k_layout, layout)]
    a = coefficients(2)
    stages = rk_stage_leaves(y, flat(k), step_size(), a, [HALF] * 2)
    assert [x.stride() for x in stages] == [x.stride() for x in y]
    assert same_bits(stages, [rk_stage(*pair, step_size(), a, torch.float16) for pair in zip(y, k, strict=True)])


def test_in_place() -> None:
    y, k = leaves_of(3, 2)
    expected = poisoned(y)
    rk_update_leaves(y, flat(k), step_size(), [0.5, 0.25], expected, [], [])
    rk_update_leaves(y, flat(k), step_size(), [0.5, 0.25], y, [], [])
    assert same_bits(y, expected)


def test_errors_say_what_was_found_and_expected() -> None:
    y, h = [torch.randn(4), torch.randn(3)], step_size()
    cases: list[tuple[str, Callable[[], object]]] = [
        (r"rk_stage_leaves: k has 3 tensors", lambda: rk_stage_leaves(y, [*y, y[0]], h, [1.0], [HALF] * 2)),
        (r"rk_stage_leaves: k\[0\] is .*\(3,\)", lambda: rk_stage_leaves(y, y[::-1], h, [1.0], [HALF] * 2)),
        (r"rk_stage_leaves: dtypes has 1 numbers", lambda: rk_stage_leaves(y, y, h, [1.0], [HALF])),
        (r"rk_update_leaves: y_next has 1 tensors", lambda: rk_update_leaves(y, y, h, [1.0], y[:1], [], [])),
        (r"rk_update_leaves: checkpoints has 1 tensors", lambda: rk_update_leaves(y, y, h, [1.0], y, y[:1], [])),
        (
            r"rk_error_leaves: roundoffs has 1 numbers",
            lambda: rk_error_leaves(y, y, h, [1.0], [1.0], 1e-3, 1e-3, [0.0], [], [], []),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="rk_update_leaves: k has 3 tensors"):
        eager_leaves.rk_update_leaves(y, [*y, y[0]], h, [1.0], y, [], [])
