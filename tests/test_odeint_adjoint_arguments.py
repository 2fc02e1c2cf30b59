"""Arguments of the continuous adjoint: norms, tolerances of the augmented state, what is refused."""

from typing import Any

import pytest
import torch
from adjoint_problems import EVEN, PAIR, RK4, Net, Pair, start
from torch import Tensor

from rampde import odeint_adjoint
from rampde.augmented import augmented_tolerance
from rampde.state import StateSpec

F64 = torch.float64


class TestNorms:
    PARAMS = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))

    @staticmethod
    def rms(tensor: Tensor) -> Tensor:
        return tensor.square().mean().sqrt()

    @pytest.mark.parametrize("norm", [None, "seminorm"])
    def test_of_a_tensor(self, norm: Any) -> None:
        options = {} if norm is None else {"norm": norm}
        y = odeint_adjoint(
            lambda t, y: y, torch.ones(2, 2), EVEN, adjoint_params=self.PARAMS, adjoint_options=options, **RK4
        )
        found = y.grad_fn.adjoint_options["norm"]
        for largest in range(5):
            pieces = [torch.rand(()), torch.rand(2, 2), torch.rand(2, 2), torch.rand(7), torch.rand(())]
            pieces[largest] = pieces[largest] + 10
            counted = pieces if norm is None else pieces[:3]
            expected = max(self.rms(piece) for piece in counted)
            assert torch.allclose(found(tuple(pieces)), expected)

    def test_of_a_tuple(self) -> None:
        y0 = torch.tensor(1.0), torch.ones(2, 2)
        y = odeint_adjoint(lambda t, y: y, y0, EVEN, adjoint_params=self.PARAMS, **RK4)
        # a piece, a slice of all, all: the norm is read where torchdiffeq's users read it
        found = y[0].grad_fn.next_functions[0][0].next_functions[0][0].adjoint_options["norm"]
        pieces = (torch.rand(()), torch.rand(5), torch.rand(5), *self.PARAMS)
        tensors = [pieces[0], pieces[1][0], pieces[1][1:], pieces[2][0], pieces[2][1:], *self.PARAMS]
        assert torch.allclose(found(pieces), max(self.rms(tensor) for tensor in tensors))

    def test_of_the_forward_solve(self) -> None:
        y = odeint_adjoint(
            lambda t, y: y,
            torch.ones(3, requires_grad=True),
            EVEN,
            adjoint_params=(),
            method="rk4",
            options={"norm": lambda y: y.abs().max()},
        )
        found = y.grad_fn.adjoint_options["norm"]
        pieces = (torch.tensor(0.1), torch.tensor([0.0, 3.0, -5.0]), torch.zeros(3))
        assert float(found(pieces)) == 5.0

    def test_own_of_a_tuple(self) -> None:
        seen: list[list[tuple[int, ...]]] = []

        def norm(pieces: tuple[Tensor, ...]) -> Tensor:
            assert isinstance(pieces, tuple)
            seen.append([tuple(piece.shape) for piece in pieces])
            return pieces[0].abs()

        y0 = torch.tensor(1.0), torch.ones(2, 2)
        options: dict[str, Any] = {"norm": norm}
        y = odeint_adjoint(lambda t, y: y, y0, EVEN, adjoint_params=self.PARAMS, adjoint_options=options, **RK4)
        function = y[0].grad_fn.next_functions[0][0].next_functions[0][0]
        function.adjoint_options["norm"]((torch.rand(()), torch.rand(5), torch.rand(5), *self.PARAMS))
        assert seen == [[(), (), (2, 2), (), (2, 2), (7,), ()]]
        assert options == {"norm": norm}

    def test_frozen_parameter_is_not_passed(self) -> None:
        with pytest.warns(UserWarning, match="does not require a gradient"):
            odeint_adjoint(Net(), start(), EVEN, adjoint_options={"norm": torch.norm}, **RK4)


class TestArguments:
    def test_function_without_parameters(self) -> None:
        with pytest.raises(ValueError, match="func is a function and adjoint_params is None"):
            odeint_adjoint(lambda t, y: y, start(), EVEN, **RK4)

    def test_options_of_another_method(self) -> None:
        with pytest.raises(ValueError, match="adjoint_method is 'euler' and method is 'rk4'"):
            odeint_adjoint(Net(), start(), EVEN, adjoint_method="euler", **RK4)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"adjoint_params": [1.0]}, TypeError, r"adjoint_params\[0\] is a float"),
            ({"adjoint_params": torch.ones(3)}, TypeError, "adjoint_params is a Tensor"),
            ({"adjoint_params": 3}, TypeError, "adjoint_params is a int"),
            ({"adjoint_options": 3}, TypeError, "adjoint_options is a int, expected a dict"),
            ({"options": [1]}, TypeError, "options is a list, expected a dict"),
            ({"adjoint_options": {"norm": "seminrom"}}, TypeError, "'seminrom', expected a callable or \"seminorm\""),
            ({"loss_scaler": True}, TypeError, "loss_scaler is True"),
            ({"velocity_dtype": torch.int8}, ValueError, "velocity_dtype is torch.int8"),
            ({"y0": 1.0}, TypeError, "y0 is a float"),
            ({"adjoint_method": "foo", "adjoint_options": {}}, ValueError, "foo"),
            ({"adjoint_rtol": -1.0}, ValueError, "rtol is -1.0"),
            ({"adjoint_atol": [1.0, 2.0]}, ValueError, r"atol has shape \[2\]"),
        ],
        ids=str,
    )
    def test_wrong(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        given = {"func": Net(), "y0": start(), "t": EVEN, **RK4, **arguments}
        with pytest.raises(error, match=message):
            odeint_adjoint(given.pop("func"), given.pop("y0"), given.pop("t"), **given)

    def test_options_are_not_changed(self) -> None:
        options, adjoint_options = {"step_size": 0.1, "norm": torch.norm}, {"step_size": 0.2}
        y = odeint_adjoint(Net(), start(), EVEN, method="rk4", options=options, adjoint_options=adjoint_options)
        y.sum().backward()
        assert options == {"step_size": 0.1, "norm": torch.norm}
        assert adjoint_options == {"step_size": 0.2}

    @pytest.mark.parametrize(
        "tolerances",
        [
            {"rtol": torch.tensor(1e-3), "atol": [1e-3]},
            {"rtol": iter([1e-3, 1e-4, 1e-5, 1e-6]), "atol": torch.full((3, 4), 1e-3)},
            {"adjoint_rtol": [1e-3] * 7, "adjoint_atol": torch.tensor([1e-3])},
        ],
        ids=["one", "by element", "by piece"],
    )
    def test_tolerances_of_a_tensor(self, tolerances: dict[str, Any]) -> None:
        odeint_adjoint(Net(), start(), EVEN, **RK4, **tolerances).sum().backward()

    def test_tolerances_of_a_tuple(self) -> None:
        tolerances = {"rtol": iter([1e-3, 1e-4]), "atol": (1e-3, torch.tensor(1e-4))}
        odeint_adjoint(Pair(), PAIR, EVEN, **RK4, **tolerances)[0].sum().backward()


def test_tolerance_of_the_augmented_state() -> None:
    parameters = [torch.zeros(2), torch.zeros(1, dtype=torch.complex64)]
    spec = StateSpec((torch.zeros(2), torch.zeros(3, dtype=torch.complex64)))

    def read(forward: Any, given: Any) -> list[Any]:
        return augmented_tolerance("rtol", forward, given, spec, parameters)

    assert read(1e-3, None) == [1e-3] * 6
    assert read([1e-3, 1e-4], None) == [1e-4, 1e-3, 1e-4, 1e-3, 1e-4, 1e-4]
    assert read([1e-3, 1e-4], 1e-5) == [1e-5] * 6
    *head, vector = read(1e-3, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert head == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert torch.equal(vector, torch.tensor([4.0, 4.0, 5.0, 5.0]))
    by_element = augmented_tolerance("rtol", [1e-3, torch.tensor([1.0, 2.0, 3.0])], None, spec, ())
    assert len(by_element) == 5
    assert by_element[2].shape == (3, 1)
    with pytest.raises(ValueError, match="atol is -1"):
        augmented_tolerance("atol", 1e-3, -1, spec, ())
