"""Malformed arguments of ``odeint``: an error names the argument, what was given and what is expected."""

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import rampde
from rampde import ButcherTableau, DynamicScaler, odeint

T = torch.tensor([0.0, 0.5, 1.0])
Y = torch.ones(2, 3)
PAIR = (torch.ones(2), torch.ones(3, 2))
NAN, INF = math.nan, math.inf


class Counting:
    """``y' = -y`` that counts its evaluations."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        return torch.utils._pytree.tree_map(torch.neg, y)


def check_message(error: BaseException, argument: str, given: str) -> None:
    message = str(error)
    assert argument in message, message
    assert given in message, message
    assert any(word in message for word in ("expected", "must", "Must be", "cannot")), message
    # one sentence that a person reads, not a dump of a tensor
    assert len(message) < 500, message


def check_odeint(argument: str, given: str, **changes: Any) -> None:
    func = Counting()
    arguments: dict[str, Any] = {"func": func, "y0": Y, "t": T, "method": "rk4", **changes}
    with pytest.raises((ValueError, TypeError)) as caught:
        odeint(**arguments)
    check_message(caught.value, argument, given)
    assert func.calls == 0


def cases(*rows: tuple[Any, str]) -> Any:
    """Parameters (value, what the message says was given), with a readable id each."""
    return pytest.mark.parametrize(("value", "given"), rows, ids=[f"{i}-{row[1]}"[:40] for i, row in enumerate(rows)])


@cases((None, "NoneType"), (3, "int"), ("rk4", "str"), (torch.ones(2), "Tensor"), ([abs], "list"), ({}, "dict"))
def test_func(value: object, given: str) -> None:
    check_odeint("func", given, func=value)


@cases(
    (None, "None"),
    (1.0, "float"),
    (3, "int"),
    ("y", "str"),
    (numpy.ones(3), "ndarray"),
    (torch.ones(2).int(), "int32"),
    (torch.ones(2).long(), "int64"),
    (torch.ones(2).bool(), "bool"),
    (torch.ones(2, dtype=torch.uint8), "uint8"),
    (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    (torch.ones(2, dtype=torch.complex32), "complex32"),
    (torch.eye(2).to_sparse(), "sparse"),
    ((), "()"),
    ([], "[]"),
    ({}, "{}"),
    (((), []), "((), [])"),
    ([1.0, 2.0], "float"),
    ((torch.ones(2), 1.0), "float"),
    ((torch.ones(2), None), "None"),
    ({"a": "text"}, "str"),
    (torch.tensor([1.0, NAN]), "not finite"),
    (torch.tensor([1.0, INF]), "not finite"),
    (torch.tensor([-INF]), "not finite"),
    (torch.tensor(NAN), "not finite"),
    (torch.tensor([1.0, NAN], dtype=torch.float64), "not finite"),
    (torch.tensor([1.0, INF], dtype=torch.float16), "not finite"),
    (torch.tensor([complex(1, NAN)]), "not finite"),
    (torch.tensor([complex(INF, 1)]), "not finite"),
    (torch.ones(2, device="meta"), "meta"),
)
def test_y0(value: object, given: str) -> None:
    check_odeint("y0", given, y0=value)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("y0[1]", "int64", (torch.ones(2), torch.ones(2).long())),
        ("y0[0]", "bool", [torch.ones(2).bool(), torch.ones(2)]),
        ("y0['b'][0]", "int", {"a": torch.ones(2), "b": [3]}),
        ("y0[1]", "not finite", (torch.ones(2), torch.tensor([NAN]))),
        ("y0['x']", "not finite", {"x": torch.tensor([INF])}),
        ("y0[1]", "meta", (torch.ones(2), torch.ones(2, device="meta"))),
        ("y0['a'][1]", "cpu", {"a": [torch.ones(2, device="meta"), torch.ones(2)]}),
    ],
)
def test_piece_of_y0_is_named(name: str, given: str, value: object) -> None:
    check_odeint(name, given, y0=value)


@cases(
    (None, "NoneType"),
    (1.0, "float"),
    (3, "int"),
    ("t", "str"),
    ([0.0, 1.0], "list"),
    ((0.0, 1.0), "tuple"),
    (range(3), "range"),
    (numpy.linspace(0, 1, 3), "ndarray"),
    (torch.arange(3), "int64"),
    (torch.arange(3).int(), "int32"),
    (torch.tensor([False, True]), "bool"),
    (torch.tensor([0j, 1j]), "complex64"),
    (torch.tensor(1.0), "[]"),
    (torch.ones(2, 2), "[2, 2]"),
    (torch.ones(1, 1, 3), "[1, 1, 3]"),
    (torch.empty(0), "empty"),
    (torch.empty(0, dtype=torch.float64), "empty"),
    (torch.empty(2, 0), "[2, 0]"),
    (torch.tensor([0.0, NAN]), "nan"),
    (torch.tensor([NAN]), "nan"),
    (torch.tensor([0.0, 1.0, INF]), "inf"),
    (torch.tensor([-INF, 0.0]), "-inf"),
    (torch.tensor([0.0, 0.0]), "t[0] is 0.0"),
    (torch.tensor([0.0, 1.0, 1.0]), "t[1] is 1.0"),
    (torch.tensor([0.0, 1.0, 0.5]), "t[2] is 0.5"),
    (torch.tensor([1.0, 0.0, 0.5]), "t[2] is 0.5"),
    (torch.tensor([1.0, 0.5, 0.5]), "t[2] is 0.5"),
    (torch.tensor([1.0, 1.0 + 1e-9]), "t[1] is 1.0"),
    (torch.tensor([2.0, 2.0 - 2.0**-12, 1.0], dtype=torch.float16), "t[1] is 2.0"),
    (torch.ones(3, device="meta"), "meta"),
    (torch.tensor([0.0, 1.0]).to_sparse(), "sparse"),
)
def test_t(value: object, given: str) -> None:
    check_odeint("t", given, t=value)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@cases(
    (None, "None"),
    ("small", "small"),
    (b"1", "b'1'"),
    (True, "True"),
    (1j, "1j"),
    (-1e-3, "-0.001"),
    (NAN, "nan"),
    ([1e-3, -1.0], "-1.0"),
    ([1e-3, "x"], "x"),
    ([1e-3, None], "None"),
    ([], "0 values"),
    ([1e-3], "1 values"),
    ((1e-3, 1e-3, 1e-3), "3 values"),
    (torch.tensor(1e-3, requires_grad=True), "requires_grad is True"),
)
def test_tolerance(name: str, value: object, given: str) -> None:
    check_odeint(name, given, y0=PAIR, **{name: value})


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerance_that_does_not_broadcast(name: str) -> None:
    check_odeint(name, "4", y0=Y, **{name: [1e-3] * 4})


@cases(
    ("foo", "foo"),
    ("", '""'),
    ("RK4", "RK4"),
    ("rk4 ", "rk4 "),
    ("dopri", "dopri"),
    (4, "4"),
    (4.0, "4.0"),
    (True, "True"),
    (b"rk4", "b'rk4'"),
    (["rk4"], "['rk4']"),
    ({"rk4": 1}, "{'rk4': 1}"),
    (([[]], [1]), "([[]], [1])"),
    (ButcherTableau, "ButcherTableau"),
)
def test_method(value: object, given: str) -> None:
    check_odeint("method", given, method=value)


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="rk5") as caught:
        odeint(Counting(), Y, T, method="rk5")
    assert all(f'"{name}"' in str(caught.value) for name in rampde.METHODS)


@cases(
    (3, "int"),
    ("step_size", "str"),
    ([("step_size", 0.1)], "list"),
    (("a", 1), "tuple"),
    (torch.ones(1), "Tensor"),
)
def test_options(value: object, given: str) -> None:
    check_odeint("options", given, options=value)


@cases(
    (0, "0"),
    (0.0, "0.0"),
    (-0.1, "-0.1"),
    (NAN, "nan"),
    (INF, "inf"),
    (-INF, "-inf"),
    ("0.1", "'0.1'"),
    (True, "True"),
    (0.1j, "0.1j"),
    ([0.1], "[0.1]"),
    ({}, "{}"),
    (torch.tensor([0.1, 0.2]), "[2]"),
    (torch.empty(0), "[0]"),
    (torch.tensor(-1.0), "-1.0"),
    (torch.tensor(NAN), "nan"),
    (torch.tensor(0), "0"),
    (torch.tensor(True), "True"),
    # the number of steps is not a number
    (1e-45, "1e-45"),
)
def test_step_size(value: object, given: str) -> None:
    check_odeint("step_size", given, options={"step_size": value})


def test_step_size_and_grid_constructor() -> None:
    options = {"step_size": 0.1, "grid_constructor": lambda func, y0, t: t}
    check_odeint("step_size and grid_constructor", "both", options=options)


@cases((3, "3"), ("linspace", "linspace"), (T, "tensor"), ([0.0, 1.0], "[0.0, 1.0]"))
def test_grid_constructor(value: object, given: str) -> None:
    check_odeint("grid_constructor", given, options={"grid_constructor": value})


@cases(
    (None, "NoneType"),
    (0.5, "float"),
    ([0.0, 1.0], "list"),
    (numpy.linspace(0, 1, 3), "ndarray"),
    (torch.arange(2), "int64"),
    (torch.tensor([0j, 1]), "complex64"),
    (torch.tensor(0.0), "[]"),
    (torch.tensor([[0.0, 1.0]]), "[1, 2]"),
    (torch.empty(0), "nothing"),
    (torch.tensor([0.5, 1.0]), "0.5 to 1.0"),
    (torch.tensor([0.0, 0.5]), "0.0 to 0.5"),
    (torch.tensor([1.0, 0.0]), "1.0 to 0.0"),
    (torch.tensor([0.0]), "0.0 to 0.0"),
    (torch.tensor([0.0, 0.5, 0.5, 1.0]), "0.5"),
    (torch.tensor([0.0, 0.75, 0.5, 1.0]), "0.75"),
    (torch.tensor([0.0, 2.0, 1.0]), "2.0"),
    (torch.tensor([0.0, NAN, 1.0]), "nan"),
    (torch.tensor([NAN, 0.5, 1.0]), "nan"),
    (torch.tensor([0.0, 0.5, NAN]), "nan"),
    (torch.tensor([0.0, INF, 1.0]), "inf"),
    (torch.tensor([0.0, 1.0], device="meta"), "meta"),
)
def test_grid(value: object, given: str) -> None:
    check_odeint("grid_constructor", given, options={"grid_constructor": lambda func, y0, t: value})


@cases(("foo", "foo"), (None, "None"), (3, "3"), (["linear"], "['linear']"), ("Linear", "Linear"), (True, "True"))
def test_interp(value: object, given: str) -> None:
    check_odeint("interp", given, options={"interp": value})


@cases((1, "1"), (0, "0"), ("yes", "yes"), (None, "None"), (torch.tensor(True), "tensor(True)"), ([], "[]"))
def test_perturb(value: object, given: str) -> None:
    check_odeint("perturb", given, options={"perturb": value})


@cases((3, "3"), ("event", "'event'"), (Y, "tensor"))
def test_event_fn(value: object, given: str) -> None:
    check_odeint("event_fn", given, event_fn=value)


def test_event_fn_with_fixed_steps_needs_their_size() -> None:
    check_odeint("step_size", "event_fn", event_fn=lambda t, y: y.sum(), t=T[:2])


def test_event_fn_needs_two_times() -> None:
    func = Counting()
    with pytest.raises(ValueError, match=r"len\(t\) == 2 when in event handling mode, but got len\(t\)=3"):
        odeint(func, Y, T, method="rk4", event_fn=lambda t, y: y.sum(), options={"step_size": 0.1})
    assert func.calls == 0


@cases(
    (True, "True"),
    ("auto", "auto"),
    (1, "1"),
    (0, "0"),
    (1024.0, "1024.0"),
    (torch.tensor(2.0), "tensor(2.)"),
    # the parentheses forgotten
    (DynamicScaler, "DynamicScaler"),
)
def test_loss_scaler(value: object, given: str) -> None:
    check_odeint("loss_scaler", given, loss_scaler=value)


@cases(
    ("bfloat16", "bfloat16"),
    (16, "16"),
    (float, "float"),
    (True, "True"),
    (torch.ones(1), "tensor"),
    (torch.int16, "torch.int16"),
    (torch.bool, "torch.bool"),
    (torch.complex64, "torch.complex64"),
    (torch.float8_e5m2, "torch.float8_e5m2"),
)
def test_velocity_dtype(value: object, given: str) -> None:
    check_odeint("velocity_dtype", given, velocity_dtype=value)


@cases(
    (None, "None"),
    ("", '""'),
    ("Step", "Step"),
    (0, "0"),
    (True, "True"),
    (b"step", "b'step'"),
    (["step"], "['step']"),
)
def test_checkpoint(value: object, given: str) -> None:
    check_odeint("checkpoint", given, checkpoint=value)


@cases((1, "1"), (0, "0"), ("yes", "yes"), (None, "None"), (torch.tensor(True), "tensor(True)"))
def test_compensated(value: object, given: str) -> None:
    check_odeint("compensated", given, compensated=value)


@pytest.mark.parametrize("position", range(4))
def test_the_first_wrong_argument_is_told_whatever_the_others_are(position: int) -> None:
    wrong: dict[str, Any] = {"y0": "y", "method": "foo", "t": [0.0], "checkpoint": "foo"}
    kept = dict(list(wrong.items())[position:])
    check_odeint(next(iter(kept)), "", **kept)
