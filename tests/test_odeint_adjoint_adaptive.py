"""The continuous adjoint by adaptive and implicit methods: torchdiffeq's steps, norms and tolerances."""

from typing import Any

import pytest
import torch
from adjoint_problems import EVEN, LOW, PAIR, UNEVEN, Net, Pair, check, compare, reference, relative, start, weights
from torch import Tensor

from rampde import DynamicScaler, odeint_adjoint

F64 = torch.float64


class TestAdaptive:
    @pytest.mark.parametrize("method", [None, "dopri5"])
    @pytest.mark.parametrize("t", [EVEN, UNEVEN], ids=["even", "reverse"])
    def test_as_torchdiffeq(self, method: str | None, t: Tensor) -> None:
        compare(Net(), start().detach(), t, method=method, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("method", ["dopri8", "tsit5", "fehlberg2", "adaptive_heun"])
    def test_methods(self, method: str) -> None:
        # local errors of 1e-6 add up over some hundred steps of the methods of low order
        net = Net()
        check(net, net.wanted, bound=1e-3, method=method, options=None, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"adjoint_options": {"norm": "seminorm"}},
            pytest.param(
                {"adjoint_options": {"norm": lambda pieces: max(piece.abs().max() for piece in pieces[:3])}},
                marks=pytest.mark.filterwarnings("ignore:An adjoint parameter"),
            ),
            {"options": {"norm": lambda y: y.abs().max()}},
            {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-4},
            {"options": {"first_step": 0.01, "max_step": 0.1}},
            {"options": {"jump_t": torch.tensor([0.3], dtype=F64)}},
        ],
        ids=["seminorm", "own norm", "forward norm", "adjoint", "steps", "jump"],
    )
    def test_options(self, arguments: dict[str, Any]) -> None:
        compare(Net(), start().detach(), EVEN, **{"rtol": 1e-6, "atol": 1e-7, **arguments})

    def test_forward_solve_with_steps_for_each_sample(self) -> None:
        """The adjoint solve does not inherit them: its state is no batch."""
        net = Net()
        check(
            net,
            net.wanted,
            bound=1e-5,
            method="dopri5",
            options={"batch_axis": 0, "batch_tile": 2},
            rtol=1e-7,
            atol=1e-8,
        )

    @pytest.mark.parametrize("norm", [None, "seminorm"])
    def test_tuple(self, norm: str | None) -> None:
        options = {} if norm is None else {"norm": norm}
        compare(Pair(), PAIR, UNEVEN, adjoint_options=options, rtol=1e-6, atol=1e-7)
        compare(Pair(), PAIR, EVEN, rtol=(1e-6, 1e-7), adjoint_rtol=1e-5, atol=1e-7)

    def test_seminorm_saves_evaluations(self) -> None:
        def evaluations(options: dict[str, Any]) -> int:
            net = Net()
            y = odeint_adjoint(net, start(), EVEN, adjoint_options=options)
            net.evaluations = 0
            y.sum().backward()
            return net.evaluations

        assert evaluations({"norm": "seminorm"}) < evaluations({})

    def test_tolerances_decide_the_error(self) -> None:
        exact, y0 = Net(), start()
        expected = torch.autograd.grad(reference(exact, y0, EVEN, 128).sum(), exact.w)[0]
        for tolerance in (1e-4, 1e-7, 1e-10):
            net = Net()
            odeint_adjoint(net, start(), EVEN, rtol=tolerance, atol=tolerance).sum().backward()
            assert relative(net.w.grad, expected) < max(100 * tolerance, 1e-9)

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.filterwarnings("ignore:.*cannot be reached")
    def test_16_bits_do_not_shrink_the_steps(self, dtype: torch.dtype) -> None:
        """f returns 32 bits that were computed in 16: the step control must know it in the adjoint solve too."""

        class Widened(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y).float()

        net, y0 = Widened(torch.float32), start(torch.float32)
        with torch.autocast("cpu", dtype):
            y = odeint_adjoint(net, y0, EVEN, rtol=1e-6, atol=1e-6)
        net.evaluations = 0
        (y * weights(y)).sum().backward()
        assert net.evaluations < 1000
        exact, exact_y0 = Net(), start()
        expected = reference(exact, exact_y0, EVEN)
        (expected * weights(expected)).sum().backward()
        for ours, theirs in zip([y0, *net.wanted], [exact_y0, *exact.wanted], strict=True):
            # the steps are as long as the rounding lets the control see: their error is of its size
            assert relative(ours.grad, theirs.grad) < 16 * torch.finfo(dtype).eps

    def test_overflow_lowers_the_scale(self) -> None:
        a = torch.tensor(1.0, dtype=torch.float16, requires_grad=True)
        scaler, y0 = DynamicScaler(), torch.ones(4096, 1, dtype=torch.float16, requires_grad=True)
        arguments: dict[str, Any] = {"adjoint_params": [a], "loss_scaler": scaler, "rtol": 1e-2, "atol": 1e-2}
        odeint_adjoint(lambda t, y: -a * y, y0, EVEN, **arguments)[-1].sum().mul(1 / 4096).backward()
        assert scaler.headroom < 1
        assert abs(float(a.grad) + torch.tensor(-1.0).exp()) < 1e-2

    @pytest.mark.parametrize("method", ["trapezoid", "implicit_midpoint", "gl6"])
    def test_implicit(self, method: str) -> None:
        """Newton's method differentiates the augmented system: a second derivative of f."""
        bound = 1e-6 if method == "gl6" else 4e-3
        steps = {"method": method, "options": {"step_size": 2.0**-5}}
        net = Net()
        check(net, net.wanted, bound=bound, rtol=1e-9, atol=1e-9, **steps)
