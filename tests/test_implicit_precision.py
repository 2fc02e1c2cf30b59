"""Implicit methods with velocities in 16 bits and leaves of several dtypes."""

import math

import pytest
import torch
from implicit_problems import L_STABLE, net_and_state, no_warnings
from torch import Tensor

from rampde import odeint
from rampde.implicit_tableau import IMPLICIT_METHODS

F64 = torch.float64


@pytest.mark.parametrize(
    ("method", "linear_solver"),
    [*((method, "dense") for method in IMPLICIT_METHODS), ("gl6", "krylov"), ("trbdf2", "krylov")],
)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_sixteen_bit_velocities(precision: torch.dtype, linear_solver: str, method: str) -> None:
    """State and gradients are off by the rounding of the velocities, at 8 steps and at 32, and the iterations end."""
    roundoff = torch.finfo(precision).eps / 2
    for steps in (8, 32):
        results = []
        for dtype in (F64, torch.float32):
            net, y0 = net_and_state(dtype)
            evaluations = 0

            def f(t: Tensor, y: Tensor, net: torch.nn.Module = net) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                return net(y)

            t = torch.linspace(0, 1, steps + 1, dtype=dtype)
            with no_warnings(), torch.autocast("cpu", precision, enabled=dtype == torch.float32):
                y = odeint(f, y0, t, method=method, options={"linear_solver": linear_solver})[-1]
            assert y.dtype == dtype
            spent = evaluations
            # as small as a loss in 16 bits would lose without the scale
            gradients = torch.autograd.grad((1e-6 * y.square()).sum(), [y0, *net.parameters()])
            results.append([y, *gradients])
        stages = IMPLICIT_METHODS[method].stages
        assert spent <= 6 * stages * steps
        for exact, found in zip(*results, strict=True):
            assert (found - exact).norm() < 4 * roundoff * exact.norm()


@pytest.mark.parametrize("method", L_STABLE)
def test_sixteen_bit_velocities_of_a_stiff_problem(method: str) -> None:
    """What is rounded is the input of f; its error is not multiplied by the stiffness, 1e4."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -1e4 * (y.float() - torch.cos(t)).to(y.dtype)

    t = torch.linspace(0, 2, 21)
    y0 = torch.ones(3)
    with no_warnings():
        y = odeint(f, y0, t, method=method, velocity_dtype=torch.bfloat16)
    assert (y[:, 0] - torch.cos(t)).abs().max() < 4 * torch.finfo(torch.bfloat16).eps


def test_mixed_leaves_and_what_f_sees() -> None:
    """A dict of a float32, a complex128 and an empty tensor; f gets each as y0 has it."""
    y0 = {"a": torch.ones(3), "z": torch.tensor([1.0 + 0j], dtype=torch.complex128), "none": torch.zeros(0, 2)}

    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        assert t.dim() == 0
        assert {name: value.dtype for name, value in y.items()} == {name: value.dtype for name, value in y0.items()}
        return {"a": -y["a"], "z": 1j * y["z"], "none": y["none"]}

    y = odeint(f, y0, torch.linspace(0, 1, 6, dtype=F64), method="gl4")
    assert {name: (value.dtype, value.shape) for name, value in y.items()} == {
        name: (value.dtype, (6, *value.shape)) for name, value in y0.items()
    }
    assert (y["a"][-1] - math.exp(-1)).abs().max() < 1e-6
    assert abs(complex(y["z"][-1, 0]) - complex(math.cos(1), math.sin(1))) < 1e-5
