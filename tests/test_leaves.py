"""The operators on all leaves of a state at once, and what chooses between them and the loop, on every backend."""

from collections.abc import Callable, Sequence

import pytest
import torch
from operands import DTYPES, LAYOUTS, Backend, assert_deterministic, exact_step, mixed, random, same_bits, scale_state
from operands import scalar as number
from tolerance import assert_within_budget
from torch import Tensor

from rampde import eager, ops

SIZES = (1000, 17, 0, 4099, 1, 128, 3, 2048, 5)
HALF = ops.NUMBERS[torch.float16]
WEIGHTS = [0.5, 0.0, -1.25, 1 / 3]
SCALE = 2.0**7


def leaves_of(
    count: int, device: str, terms: int = 4, dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """States of several sizes and dtypes, and tensors like them in all dtypes."""
    y = [random((SIZES[leaf],), dtypes[leaf % len(dtypes)], device) for leaf in range(count)]
    return y, [mixed(terms, state) for state in y]


def ops_dtype(place: int) -> torch.dtype:
    return next(dtype for dtype, number_of_dtype in ops.NUMBERS.items() if number_of_dtype == place)


def flat(items: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [item for of_leaf in items for item in of_leaf]


def empty_like(y: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """As operators find them: filled with NaN."""
    return [torch.full_like(state, torch.nan, dtype=dtype) for state in y]


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("count", range(1, 10))
def test_stage_is_that_of_each_leaf(backend: Backend, count: int, first: int) -> None:
    y, k = leaves_of(count, backend.device)
    h, places = number(0.1, backend.device), [(first + leaf) % 4 for leaf in range(count)]
    found = backend.rk_stage_leaves(y, flat(k), h, WEIGHTS, places)
    leaves = zip(y, k, places, strict=True)
    assert same_bits(found, [backend.rk_stage(*leaf, h, WEIGHTS, ops_dtype(place)) for *leaf, place in leaves])


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("saved", [None, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_update_is_that_of_each_leaf(
    backend: Backend, count: int, saved: torch.dtype | None, compensated: bool
) -> None:
    y, k = leaves_of(count, backend.device, dtypes=DTYPES[:2])
    h, lost = number(0.1, backend.device), [1e-3 * random(x.shape, x.dtype, backend.device) for x in y]
    results = []
    for together in (True, False):
        y_next, checkpoints = empty_like(y), empty_like(y, saved) if saved else []
        compensations = [loss.clone() for loss in lost] if compensated else []
        overflow = torch.tensor(9, device=backend.device)
        if together:
            backend.rk_update_leaves(y, flat(k), h, WEIGHTS, y_next, checkpoints, compensations, overflow, 4)
        else:
            for leaf, state in enumerate(y):
                outputs = [x[leaf] if x else None for x in (checkpoints, compensations)]
                backend.rk_update(state, k[leaf], h, WEIGHTS, y_next[leaf], *outputs, overflow, 4)
        results.append([*y_next, *checkpoints, *compensations, overflow])
    assert same_bits(*results)


@pytest.mark.parametrize("leaf", range(3))
def test_overflow_of_any_leaf_is_noted(backend: Backend, leaf: int) -> None:
    y, _ = leaves_of(4, backend.device, 0, [torch.float32])
    del y[2]  # the empty one
    y[leaf][-1] = torch.inf
    for before, expected in ((9, 5), (2, 2)):
        overflow = torch.tensor(before, device=backend.device)
        backend.rk_update_leaves(y, [], number(0.1, backend.device), [], empty_like(y), [], [], overflow, 5)
        assert overflow.item() == expected


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("count", range(1, 10))
def test_error_is_that_of_each_leaf(backend: Backend, count: int, written: bool) -> None:
    y, k = leaves_of(count, backend.device, dtypes=DTYPES[:2])
    h, e, roundoffs = number(0.1, backend.device), WEIGHTS[::-1], [2.0 ** -(8 + leaf) for leaf in range(count)]
    results, sums = [], []
    for together in (True, False):
        outputs: list[list[Tensor]] = [[], [], []]
        if written:
            outputs = [empty_like(y), empty_like(y, torch.float16), [torch.full_like(x, 1e-3) for x in y]]
        if together:
            found = backend.rk_error_leaves(y, flat(k), h, WEIGHTS, e, 1e-3, 1e-5, roundoffs, *outputs)
        else:
            of_leaves = []
            for leaf, roundoff in enumerate(roundoffs):
                targets = [x[leaf] if x else None for x in outputs]
                of_leaves.append(backend.rk_error(y[leaf], k[leaf], h, WEIGHTS, e, 1e-3, 1e-5, roundoff, 1, *targets))
            found = torch.cat(of_leaves)
        sums.append(found)
        results.append(flat(outputs))
    assert same_bits(*results)
    assert sums[0].shape == (count, 2)
    # but for the order of the sums over blocks, of float64 of one sign
    assert bool(((sums[0] - sums[1]).abs() <= 4 * torch.finfo(torch.float64).eps * sums[1]).all())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("b", [0.0, 1 / 6])
@pytest.mark.parametrize("count", range(1, 10))
def test_cotangents_are_those_of_each_leaf(backend: Backend, count: int, b: float, scaled: bool) -> None:
    adjoint, vjps = leaves_of(count, backend.device)
    scaling, h = scale_state(backend.device, SCALE) if scaled else None, number(-0.1, backend.device)
    places = [-leaf % 4 for leaf in range(count)]
    found = backend.adjoint_stage_leaves(adjoint, flat(vjps), h, b, WEIGHTS, places, scaling)
    expected = [
        backend.adjoint_stage(lam, of_leaf, h, b, WEIGHTS, ops_dtype(place), scaling)
        for lam, of_leaf, place in zip(adjoint, vjps, places, strict=True)
    ]
    assert same_bits(found, expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", range(1, 10))
def test_adjoints_are_those_of_each_leaf(backend: Backend, count: int, scaled: bool, in_place: bool) -> None:
    adjoint, vjps = leaves_of(count, backend.device)
    # every other leaf has a loss gradient, in another dtype than its state
    rows = [random(lam.shape, torch.float32, backend.device) if leaf % 2 else None for leaf, lam in enumerate(adjoint)]
    h, results = number(-0.1, backend.device), []
    for together in (True, False):
        state = scale_state(backend.device, SCALE) if scaled else None
        lam = [leaf.clone() for leaf in adjoint]
        target = lam if in_place and not scaled else empty_like(adjoint)
        if together:
            backend.adjoint_update_leaves(lam, flat(vjps), h, rows, target, state)
        else:
            for arguments in zip(lam, vjps, [h] * count, rows, target, strict=True):
                backend.adjoint_update(*arguments, state)
        results.append([*target, *([] if state is None else [state])])
    assert same_bits(*results)


def test_absent_products_are_zero(backend: Backend) -> None:
    adjoint, vjps = leaves_of(3, backend.device, 3, [torch.float32])
    holes: list[Tensor | None] = [*vjps[0], None, vjps[1][1], None, None, None, None]
    kept, weights = [vjps[0], vjps[1][1:2], []], [WEIGHTS[1:], WEIGHTS[2:3], []]
    h, state = number(0.1, backend.device), scale_state(backend.device, SCALE)
    updated = empty_like(adjoint)
    found = backend.adjoint_stage_leaves(adjoint, holes, h, 0.5, WEIGHTS[1:], [HALF] * 3, state)
    backend.adjoint_update_leaves(adjoint, holes, h, [None] * 3, updated)
    for leaf, lam in enumerate(adjoint):
        cotangent = backend.adjoint_stage(lam, kept[leaf], h, 0.5, weights[leaf], torch.float16, state)
        expected = torch.empty_like(lam)
        backend.adjoint_update(lam, kept[leaf], h, None, expected)
        assert same_bits([found[leaf], updated[leaf]], [cotangent, expected])


def test_after_an_overflow_no_leaf_changes(backend: Backend) -> None:
    adjoint, vjps = leaves_of(3, backend.device, 2, [torch.float32])
    target, state = [torch.ones_like(lam) for lam in adjoint], scale_state(backend.device, OVERFLOWED=1.0)
    before = state.clone()
    backend.adjoint_update_leaves(adjoint, flat(vjps), number(0.1, backend.device), [None] * 3, target, state)
    assert all((x == 1).all() for x in target)
    assert same_bits([state], [before])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_within_twice_the_error_of_plain_pytorch(backend: Backend, dtype: torch.dtype) -> None:
    y, k = leaves_of(4, backend.device, dtypes=[torch.float32, torch.float64])
    h = number(0.1, backend.device)
    found = backend.rk_stage_leaves(y, flat(k), h, WEIGHTS, [ops.NUMBERS[dtype]] * 4)
    for stage, state, of_leaf in zip(found, y, k, strict=True):
        total = torch.zeros_like(state)
        for term, weight in zip(of_leaf, WEIGHTS, strict=True):
            total += weight * term.to(total.dtype)
        independent = (state + h.to(total.dtype) * total).to(dtype)
        assert_within_budget(stage, independent, exact_step(state, of_leaf, h, WEIGHTS), state.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_leaf_keeps_its_layout(backend: Backend, layout: str) -> None:
    shape = LAYOUTS[layout]
    y = [random(shape, torch.float32, backend.device, layout), random(shape, torch.float32, backend.device)]
    k = [mixed(3, y[0]), mixed(3, y[1], layout=layout)]
    h, weights = number(0.1, backend.device), WEIGHTS[1:]
    stages = backend.rk_stage_leaves(y, flat(k), h, weights, [HALF] * 2)
    assert [x.stride() for x in stages] == [x.stride() for x in y]
    assert same_bits(stages, [backend.rk_stage(*leaf, h, weights, torch.float16) for leaf in zip(y, k, strict=True)])
    cotangents = backend.adjoint_stage_leaves(y, flat(k), h, 0.5, weights, [HALF] * 2)
    expected = [backend.adjoint_stage(*leaf, h, 0.5, weights, torch.float16) for leaf in zip(y, k, strict=True)]
    assert same_bits(cotangents, expected)


def test_deterministic(backend: Backend) -> None:
    y = [random((size,), torch.float32, backend.device) for size in (100_003, 7)]
    k, h = [mixed(4, state) for state in y], number(0.1, backend.device)
    assert_deterministic(lambda: backend.rk_stage_leaves(y, flat(k), h, WEIGHTS, [HALF] * 2))
    arguments = (y, flat(k), h, WEIGHTS, WEIGHTS, 1e-3, 1e-5, [0.1, 0.2], [], [], [])
    assert_deterministic(lambda: [backend.rk_error_leaves(*arguments)])


def calls(y: list[Tensor], k: list[list[Tensor]], h: Tensor, state: Tensor) -> dict[str, tuple[object, ...]]:
    """Arguments of each operator, by name."""
    x, later = flat(k), empty_like(y)
    return {
        "rk_stage_leaves": (y, x, h, WEIGHTS, [HALF] * len(y)),
        "rk_update_leaves": (y, x, h, WEIGHTS, later, empty_like(y, torch.half), empty_like(y), torch.tensor(9), 3),
        "rk_error_leaves": (y, x, h, WEIGHTS, WEIGHTS, 1e-3, 1e-5, [0.1] * len(y), later, [], empty_like(y)),
        "adjoint_stage_leaves": (y, [None, *x[1:]], h, 0.5, WEIGHTS, [HALF] * len(y), state),
        "adjoint_update_leaves": (y, [None, *x[1:]], h, [None, *y[1:]], later, state),
    }


OPERATORS = [name for name in ops.SCHEMAS if name.endswith("_leaves")]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    layouts = ("contiguous", "channels_last")
    y = [random(LAYOUTS["channels_last"], torch.float32, layout=layout) for layout in layouts]
    arguments = calls(y, [mixed(4, state) for state in y], number(0.1, "cpu"), scale_state("cpu"))[name]
    torch.library.opcheck(getattr(ops, name), arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(y: list[Tensor], k: list[list[Tensor]], h: Tensor, scaling: Tensor) -> list[Tensor]:
        y = [state * 2 for state in y]
        x = ops.stage_inputs(y, k, h, WEIGHTS, [torch.float16, torch.float32])
        later, saved = [torch.empty_like(state) for state in y], [torch.empty_like(leaf) for leaf in x]
        none: list[Tensor | None] = [None] * 2
        ops.update_states(y, k, h, WEIGHTS, later, saved, none)
        bounds = ([1e-3] * 2, [1e-5] * 2, [0.0] * 2)
        sums = ops.error_sums(later, k, h, WEIGHTS, WEIGHTS, *bounds, none, none, none, [()] * 2)
        cotangents = ops.stage_cotangents(later, k, h, 0.5, WEIGHTS, [torch.float16, torch.float32], scaling)
        ops.update_adjoints(later, k, h, [None, later[1]], y)
        return [*x, *later, *saved, sums, *cotangents, *y]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y = [random((12,), torch.float32), random((7,), torch.float32)]
    arguments = (y, [mixed(4, state) for state in y], number(0.1, "cpu"), scale_state("cpu"))
    assert same_bits(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_tensors_show_what_comes(name: str) -> None:
    shapes = [(3, 4), (5,)]
    y = [torch.empty(shape, device="meta") for shape in shapes]
    k = [[torch.empty(shape, device="meta", dtype=torch.float16) for _ in range(4)] for shape in shapes]
    arguments = calls(y, k, torch.empty((), device="meta"), torch.empty(9, device="meta"))[name]
    on_meta = [torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in arguments]
    returned = getattr(ops, name)(*on_meta)
    if name in ("rk_stage_leaves", "adjoint_stage_leaves"):
        assert [(x.shape, x.dtype, x.device.type) for x in returned] == [(s.shape, torch.half, "meta") for s in y]
    elif name == "rk_error_leaves":
        assert (returned.shape, returned.dtype) == ((2, 2), torch.float64)
    else:
        assert returned is None


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("rk_stage_leaves", 1, [torch.ones(4, 2)], "k has 1 tensors, expected a multiple of the number of leaves, 2"),
        ("rk_update_leaves", 4, [torch.ones(4, 2)], "y_next has 1 elements, expected one for each of 2 leaves"),
        ("rk_update_leaves", 5, [torch.ones(4, 2)], "checkpoints has 1 elements, expected one for each of 2 leaves"),
        ("rk_error_leaves", 0, [], "y is empty, expected at least one leaf"),
        ("rk_error_leaves", 7, [0.1], "roundoffs has 1 elements, expected one for each of 2 leaves"),
        ("adjoint_stage_leaves", 4, [0.5], "vjps has 8 elements, expected one for each of 1 coefficients and 2 leaves"),
        ("adjoint_stage_leaves", 5, [0], "dtypes has 1 elements, expected one for each of 2 leaves"),
        ("rk_stage_leaves", 4, [0, 4], "dtypes has 4, expected a place among float64, float32, float16 and bfloat16"),
        ("adjoint_update_leaves", 3, [None], "cotangents has 1 elements, expected one for each of 2 leaves"),
        ("adjoint_update_leaves", 4, [torch.ones(4, 2)], "adjoint_next has 1 elements, expected one for each of 2"),
    ],
    ids=str,
)
def test_errors_name_argument_found_and_expected(name: str, place: int, value: object, message: str) -> None:
    y = [torch.ones(4, 2), torch.ones(3)]
    arguments = list(calls(y, [mixed(4, state) for state in y], number(0.1, "cpu"), scale_state("cpu"))[name])
    arguments[place] = value
    with pytest.raises(RuntimeError) as error:
        getattr(ops, name)(*arguments)
    assert str(error.value).startswith(f"rampde::{name}: {message}")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that the choosing functions call, which do as they did."""
    names: list[str] = []

    def noting(name: str, operator: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            names.append(name)
            return operator(*arguments)

        return call

    for name in ops.SCHEMAS:
        monkeypatch.setattr(ops, name, noting(name, getattr(ops, name)))
    return names


NONE: list[Tensor | None] = [None, None]


def test_unusual_leaves_are_taken_one_by_one(called: list[str]) -> None:
    """What one leaf has and another has not, or has differently, is for the operators on one leaf."""
    y, k = leaves_of(2, "cpu", dtypes=[torch.float32])
    h = number(0.1, "cpu")
    y_next = empty_like(y)
    ops.update_states(y, k, h, WEIGHTS, y_next, [torch.empty_like(y[0]), None], NONE)
    assert called == ["rk_update"] * 2
    assert same_bits(y_next, [eager.rk_stage(*leaf, h, WEIGHTS, torch.float32) for leaf in zip(y, k, strict=True)])
    for rtol, new, quantised in (
        ([1e-3, 1e-2], NONE, [()] * 2),
        ([1e-3, 1e-3], [y_next[0], None], [()] * 2),
        ([1e-3, 1e-3], NONE, [(None, None, None)] * 2),
    ):
        called.clear()
        sums = ops.error_sums(y, k, h, WEIGHTS, WEIGHTS, rtol, [1e-5] * 2, [0.1] * 2, new, NONE, NONE, quantised)
        assert called == ["rk_error"] * 2
        rk_error = torch.ops.rampde.rk_error.default
        expected = [rk_error(y[leaf], k[leaf], h, WEIGHTS, WEIGHTS, rtol[leaf], 1e-5, 0.1) for leaf in range(2)]
        assert same_bits([sums], [torch.cat(expected)])


@pytest.mark.parametrize("count", [1, 2])
def test_usual_leaves_are_taken_together(called: list[str], count: int) -> None:
    y, k = leaves_of(count, "cpu", dtypes=[torch.float32])
    h, none = number(0.1, "cpu"), NONE[:count]
    for saved, lost in ((none, none), (empty_like(y), [torch.zeros_like(x) for x in y])):
        called.clear()
        ops.stage_inputs(y, k, h, WEIGHTS, [torch.float16] * count)
        ops.update_states(y, k, h, WEIGHTS, empty_like(y), saved, lost)
        bounds = ([1e-3] * count, [1e-5] * count, [0.0] * count)
        ops.error_sums(y, k, h, WEIGHTS, WEIGHTS, *bounds, empty_like(y), saved, lost, [()] * count)
        ops.stage_cotangents(y, [[None, *terms[1:]] for terms in k], h, 0.5, WEIGHTS, [torch.float16] * count)
        ops.update_adjoints(y, [[None, *terms[1:]] for terms in k], h, none, empty_like(y))
        names = ["rk_stage", "rk_update", "rk_error", "adjoint_stage", "adjoint_update"]
        assert called == [name + "_leaves" * (count > 1) for name in names]
