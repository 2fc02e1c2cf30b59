"""What programs written for torchdiffeq rely on, beyond the numbers that test_drop_in.py compares."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from rampde import odeint, odeint_adjoint

F64 = torch.float64
Y = torch.tensor([1.0, -0.5, 2.0], dtype=F64)
V = torch.tensor([0.3, -1.0, 2.0], dtype=F64)
T = torch.linspace(0, 1, 5, dtype=F64)
RATES = torch.tensor([1.0, 0.5, 2.0], dtype=F64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -RATES * y * torch.cos(y) * (1 + t)


class TestNumbersOfNumPy:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("first_step", numpy.float32(0.125)),
            ("safety", numpy.float64(0.5)),
            ("min_step", numpy.float32(0.0625)),
            ("max_step", numpy.int64(1)),
            ("max_num_steps", numpy.int64(50)),
            ("max_num_steps", 50.0),
            ("max_num_steps", torch.tensor(50)),
        ],
    )
    def test_options_of_adaptive_methods(self, name: str, value: Any) -> None:
        expected = odeint(decay, Y, T, options={name: float(value)})
        assert odeint(decay, Y, T, options={name: value}).equal(expected)

    def test_step_size(self) -> None:
        expected = odeint(decay, Y, T, method="rk4", options={"step_size": 0.125})
        assert odeint(decay, Y, T, method="rk4", options={"step_size": numpy.float32(0.125)}).equal(expected)

    def test_tolerances(self) -> None:
        expected = odeint(decay, Y, T, rtol=0.125, atol=2.0**-10)
        assert odeint(decay, Y, T, rtol=numpy.float32(0.125), atol=numpy.float64(2.0**-10)).equal(expected)
        assert odeint(decay, Y, T, rtol=0.125, atol=[numpy.float32(2.0**-10)]).equal(expected)

    @pytest.mark.parametrize("value", [numpy.bool_(True), numpy.complex64(1), numpy.array([0.1, 0.2]), "1"])
    def test_others_are_errors(self, value: object) -> None:
        with pytest.raises((TypeError, ValueError), match="first_step"):
            odeint(decay, Y, T, options={"first_step": value})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"method": "euler"},
        {"method": "rk4", "options": {"step_size": 0.3, "interp": "cubic"}},
        {"method": "rk4", "compensated": True},
        {"method": "rk4", "checkpoint": "none"},
        {"method": "explicit_adams", "options": {"step_size": 0.125}},
        {"method": "dopri5", "rtol": 1e-6},
    ],
    ids=lambda kwargs: "-".join([kwargs["method"], *list(kwargs)[1:]]),
)
class TestTransforms:
    """Forward mode and ``torch.func`` see through a solve as if it were written in plain operations."""

    @staticmethod
    def end(y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        end: Tensor = odeint(decay, y, T, **kwargs)[-1]
        return end

    def jacobian(self, kwargs: dict[str, Any], y: Tensor = Y, create_graph: bool = False) -> Tensor:
        jacobian: Tensor = torch.autograd.functional.jacobian(lambda y: self.end(y, kwargs), y, create_graph)
        return jacobian

    def test_forward_mode(self, kwargs: dict[str, Any]) -> None:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(self.end(forward_ad.make_dual(Y, V), kwargs)).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, self.jacobian(kwargs) @ V, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
    def test_jacobians(self, kwargs: dict[str, Any], transform: Any) -> None:
        given = transform(lambda y: self.end(y, kwargs))(Y)
        torch.testing.assert_close(given, self.jacobian(kwargs), rtol=1e-12, atol=1e-12)

    def test_hessian(self, kwargs: dict[str, Any]) -> None:
        given = torch.func.hessian(lambda y: self.end(y, kwargs))(Y)
        expected = torch.autograd.functional.jacobian(lambda y: self.jacobian(kwargs, y, create_graph=True), Y)
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["implicit_midpoint", "scipy_solver"])
def test_methods_without_forward_mode_say_so(method: str) -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode"):
        odeint(decay, forward_ad.make_dual(Y, V), T, method=method)


@pytest.mark.parametrize("names", ["abcd", "dcba", "adcb", "bcd", "bd"])
def test_adjoint_params_that_were_computed_from_each_other(names: str) -> None:
    """As where the coefficients of a control path and its times are both named: no path is counted twice."""
    a, b = (torch.tensor(value, dtype=F64, requires_grad=True) for value in ([0.3, 0.5], [1.0, -0.4]))
    y0 = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    c = a * torch.sin(b) if "a" in names else torch.sin(b)
    d = c**2 + b
    parts = {"a": a, "b": b, "c": c, "d": d}
    used = {name: parts[name] if name in names else parts[name].detach() for name in parts}

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y * used["c"] + used["d"] * torch.cos(used["a"] * t) * used["b"]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        leaves = [y0, *(leaf for leaf, name in ((a, "a"), (b, "b")) if name in names)]
        return torch.autograd.grad((y[1:] ** 2).sum(), leaves, retain_graph=True)

    params = tuple(parts[name] for name in names)
    given = gradients(odeint_adjoint(func, y0, T, rtol=1e-10, atol=1e-11, adjoint_params=params))
    expected = gradients(odeint(func, y0, T, rtol=1e-10, atol=1e-11, checkpoint="tape"))
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
