"""Malformed tableaux, scalers and results of func: errors that name what was given and what is expected."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rampde import ButcherTableau, DynamicScaler, odeint, register_method
from rampde.methods import METHODS

NAN, INF = math.nan, math.inf
EULER = METHODS["euler"]


def check_error(call: Callable[[], object], argument: str, given: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert argument in message, message
    assert given in message, message
    assert "expected" in message, message
    assert len(message) < 500, message


def cases(*rows: tuple[Any, str]) -> Any:
    """Parameters (value, what the message says was given), with a readable id each."""
    return pytest.mark.parametrize(("value", "given"), rows, ids=[f"{i}-{row[1]}"[:40] for i, row in enumerate(rows)])


@cases(
    (None, "None"),
    ("float16", "float16"),
    (16, "16"),
    (torch.int8, "torch.int8"),
    (torch.complex64, "torch.complex64"),
    (torch.bool, "torch.bool"),
)
def test_dtype_low(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(value), "dtype_low", given)


@cases(
    (0, "0"),
    (-1.0, "-1.0"),
    (NAN, "nan"),
    (INF, "inf"),
    ("a", "'a'"),
    (1j, "1j"),
    ([1.0], "[1.0]"),
    (True, "True"),
)
def test_target_factor(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(target_factor=value), "target_factor", given)


@cases(
    (None, "None"),
    ("2", "'2'"),
    (0, "0"),
    (1, "1"),
    (1.0, "1.0"),
    (0.5, "0.5"),
    (3, "3"),
    (-2.0, "-2.0"),
    (2.5, "2.5"),
    (NAN, "nan"),
    (INF, "inf"),
    (True, "True"),
    ([2.0], "[2.0]"),
)
def test_increase_factor(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(increase_factor=value), "increase_factor", given)


@cases(
    (None, "None"),
    ("0.5", "'0.5'"),
    (0, "0"),
    (1, "1"),
    (2.0, "2.0"),
    (0.3, "0.3"),
    (-0.5, "-0.5"),
    (NAN, "nan"),
    (INF, "inf"),
    (False, "False"),
)
def test_decrease_factor(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(decrease_factor=value), "decrease_factor", given)


@cases((None, "None"), (0, "0"), (-1, "-1"), (1.5, "1.5"), ("x", "'x'"), (NAN, "nan"), (True, "True"))
def test_max_attempts(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(max_attempts=value), "max_attempts", given)


@cases((None, "None"), (-1.0, "-1.0"), (NAN, "nan"), (INF, "inf"), ("x", "'x'"), (1j, "1j"), ([], "[]"))
def test_delta(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(delta=value), "delta", given)


@cases((None, "None"), ("no", "'no'"), (1, "1"))
def test_verbose(value: Any, given: str) -> None:
    check_error(lambda: DynamicScaler(verbose=value), "verbose", given)


@pytest.mark.parametrize(
    ("argument", "given", "arguments"),
    [
        ("a", "None", {"a": None, "b": [1]}),
        ("a", "3", {"a": 3, "b": [1]}),
        ("a", "text", {"a": "text", "b": [1]}),
        ("a[0]", "0", {"a": [0], "b": [1]}),
        ("a[1]", "None", {"a": [[], None], "b": [0, 1]}),
        ("a[1][0]", "'x'", {"a": [[], ["x"]], "b": [0, 1]}),
        ("a[1][0]", "None", {"a": [[], [None]], "b": [0, 1]}),
        ("a[1][0]", "True", {"a": [[], [True]], "b": [0, 1]}),
        ("a[1][0]", "1j", {"a": [[], [1j]], "b": [0, 1]}),
        ("a[1][0]", "nan", {"a": [[], [NAN]], "b": [0, 1]}),
        ("a[1][0]", "inf", {"a": [[], [INF]], "b": [0, 1]}),
        ("a", "1 rows", {"a": [[]], "b": [0, 1]}),
        ("a", "3 rows", {"a": [[], [1], [0, 1]], "b": [0, 1]}),
        ("a", "0 rows", {"a": [], "b": [1]}),
        ("a[0]", "[1]", {"a": [[1]], "b": [1]}),
        ("a[1]", "[0, 1]", {"a": [[], [0, 1]], "b": [0, 1]}),
        ("a[0]", "[0, 1]", {"a": [[0, 1], [1]], "b": [0, 1]}),
        ("a[1]", "3 entries", {"a": [[], [1, 0, 0]], "b": [0, 1]}),
        ("b", "None", {"a": [[]], "b": None}),
        ("b", "1", {"a": [[]], "b": 1}),
        ("b", "1", {"a": [[]], "b": "1"}),
        ("b[0]", "'1'", {"a": [[]], "b": ["1"]}),
        ("b[0]", "True", {"a": [[]], "b": [True]}),
        ("b[0]", "nan", {"a": [[]], "b": [NAN]}),
        ("b[1]", "inf", {"a": [[], [1]], "b": [1, INF]}),
        ("b", "0 weights", {"a": [], "b": []}),
        ("b", "17 weights", {"a": [[]] * 17, "b": [1] + [0] * 16}),
        ("b", "0", {"a": [[]], "b": [0]}),
        ("b", "2", {"a": [[], [1]], "b": [1, 1]}),
        ("b", "1/2", {"a": [[], [1]], "b": [Fraction(1, 4), Fraction(1, 4)]}),
        ("b", "0.99", {"a": [[]], "b": [0.99]}),
        ("b", "-1", {"a": [[]], "b": [-1]}),
        ("c", "2", {"a": [[]], "b": [1], "c": 2}),
        ("c", "text", {"a": [[]], "b": [1], "c": "text"}),
        ("c", "0 nodes", {"a": [[]], "b": [1], "c": []}),
        ("c", "2 nodes", {"a": [[]], "b": [1], "c": [0, 1]}),
        ("c[0]", "None", {"a": [[]], "b": [1], "c": [None]}),
        ("c[0]", "nan", {"a": [[]], "b": [1], "c": [NAN]}),
        ("c[0]", "1", {"a": [[]], "b": [1], "c": [1]}),
        ("c[1]", "1/3", {"a": [[], [Fraction(1, 2)]], "b": [0, 1], "c": [0, Fraction(1, 3)]}),
        ("c[1]", "0.5001", {"a": [[], [0.5]], "b": [0, 1], "c": [0, 0.5001]}),
    ],
)
def test_tableau(argument: str, given: str, arguments: dict[str, Any]) -> None:
    check_error(lambda: ButcherTableau(**arguments), argument, given)


@pytest.mark.parametrize(
    ("argument", "given", "name", "tableau"),
    [
        ("name", "None", None, EULER),
        ("name", "3", 3, EULER),
        ("name", "b'euler'", b"euler", EULER),
        ("name", "['mine']", ["mine"], EULER),
        ("name", "empty", "", EULER),
        ("name", "rk4", "rk4", EULER),
        ("name", "dopri5", "dopri5", EULER),
        ("name", "tsit5", "tsit5", EULER),
        ("tableau", "None", "mine", None),
        ("tableau", "'euler'", "mine", "euler"),
        ("tableau", "([[]], [1])", "mine", ([[]], [1])),
        ("tableau", "ButcherTableau", "mine", ButcherTableau),
    ],
)
def test_register_method(argument: str, given: str, name: Any, tableau: Any) -> None:
    before = dict(METHODS)
    check_error(lambda: register_method(name, tableau), argument, given)
    assert before == METHODS


Y = torch.ones(2, 3)
PAIR = (torch.ones(2), torch.ones(3, 2))
TREE = {"a": torch.ones(2), "b": [torch.ones(3)]}
COMPLEX = torch.ones(2, dtype=torch.complex64)


@pytest.mark.parametrize("road", ["step", "none", "tape", "no_grad"])
@pytest.mark.parametrize(
    ("y0", "result", "given"),
    [
        (Y, None, "NoneType"),
        (Y, 1.0, "float"),
        (Y, numpy.ones((2, 3)), "ndarray"),
        (Y, (Y,), "tuple"),
        (Y, [Y, Y], "list"),
        (Y, {"y": Y}, "dict"),
        (Y, torch.tensor(1.0), "[]"),
        (Y, torch.ones(3), "[3]"),
        (Y, torch.ones(1, 3), "[1, 3]"),
        (Y, torch.ones(3, 2), "[3, 2]"),
        (Y, torch.ones(2, 3, 1), "[2, 3, 1]"),
        (Y, torch.ones(0, 3), "[0, 3]"),
        (Y, torch.ones(2, 3).long(), "int64"),
        (Y, torch.ones(2, 3).bool(), "bool"),
        (Y, torch.ones(2, 3) * 1j, "complex64"),
        (Y, torch.ones(2, 3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (Y, torch.ones(2, 3, device="meta"), "meta"),
        (Y, torch.ones(2, 3).to_sparse(), "sparse"),
        (torch.tensor(1.0), torch.ones(1), "[1]"),
        (PAIR, None, "NoneType"),
        (PAIR, Y, "Tensor"),
        (PAIR, PAIR[:1], "1 tensors"),
        (PAIR, (*PAIR, Y), "3 tensors"),
        (PAIR, {"a": PAIR[0], "b": PAIR[1]}, "dict"),
        (PAIR, (PAIR[0], None), "NoneType"),
        (PAIR, (PAIR[0], torch.ones(2, 3)), "[2, 3]"),
        (PAIR, (PAIR[0], torch.ones(3, 2, device="meta")), "meta"),
        (PAIR, (PAIR[0].int(), PAIR[1]), "int32"),
        (PAIR, PAIR[::-1], "[3, 2]"),
        (TREE, {"a": TREE["a"]}, "1 tensors"),
        (TREE, {"a": TREE["a"], "c": TREE["b"]}, "dict"),
        (TREE, [TREE["a"], TREE["b"]], "list"),
        (TREE, {"a": TREE["a"], "b": TREE["b"][0]}, "dict"),
        (TREE, {"a": TREE["a"], "b": [torch.ones(1)]}, "[1]"),
        (COMPLEX, torch.ones(3, dtype=torch.complex64), "[3]"),
        (COMPLEX, torch.ones(2, 2), "[2, 2]"),
    ],
)
def test_result_of_func(y0: Any, result: Any, given: str, road: str) -> None:
    calls = 0

    def func(t: Tensor, y: Any) -> Any:
        nonlocal calls
        calls += 1
        return result

    def call() -> object:
        start = tree_map(lambda leaf: leaf.clone().requires_grad_(road != "no_grad"), y0)
        checkpoint = "step" if road == "no_grad" else road
        with torch.set_grad_enabled(road != "no_grad"):
            return odeint(func, start, torch.linspace(0, 1, 3), method="rk4", checkpoint=checkpoint)

    check_error(call, "func", given)
    assert calls == 1


@pytest.mark.parametrize("road", ["step", "none", "tape", "no_grad"])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (3, 2), (2, 3, 1), ()])
def test_a_later_result_of_another_shape_never_passes(shape: tuple[int, ...], road: str) -> None:
    # only the first result is checked in words; a later one that broadcasts must not be taken silently
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -y if calls == 1 else y.new_ones(shape)

    checkpoint = "step" if road == "no_grad" else road
    t, y0 = torch.linspace(0, 1, 3), Y.clone().requires_grad_(road != "no_grad")
    with torch.set_grad_enabled(road != "no_grad"), pytest.raises((ValueError, TypeError, RuntimeError)):
        odeint(func, y0, t, method="rk4", checkpoint=checkpoint)
