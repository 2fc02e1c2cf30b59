"""The continuous adjoint in 16 bits: as accurate as odeint; scales, overflow, losses that are not finite."""

from typing import Any

import pytest
import torch
from adjoint_problems import EVEN, LOW, RK4, Net, reference, relative, start, weights
from torch import Tensor, nn

from rampde import DynamicScaler, odeint, odeint_adjoint

F64 = torch.float64


class TestPrecision:
    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_autocast(self, dtype: torch.dtype) -> None:
        """f runs under the caller's autocast on both roads; everything else is float32 and as accurate as odeint."""
        net, y0 = Net(torch.float32), start(torch.float32)
        with torch.autocast("cpu", dtype):
            y = odeint_adjoint(net, y0, EVEN, **RK4)
        assert y.dtype == torch.float32
        (y * weights(y)).sum().backward()
        assert net.seen == {(torch.float32, dtype, dtype)}
        exact, exact_y0 = Net(), start()
        expected = reference(exact, exact_y0, EVEN)
        (expected * weights(expected)).sum().backward()
        assert net.w.grad.dtype == torch.float32
        for ours, theirs in zip([y0, *net.wanted], [exact_y0, *exact.wanted], strict=True):
            assert relative(ours.grad, theirs.grad) < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_autocast_is_the_one_of_the_forward_call(self, dtype: torch.dtype) -> None:
        net = Net(torch.float32)
        y = odeint_adjoint(net, start(torch.float32), EVEN, **RK4)
        with torch.autocast("cpu", dtype):
            y.sum().backward()
        assert net.seen == {(torch.float32,) * 3}

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_casts_are_not_left_behind(self, dtype: torch.dtype) -> None:
        net = Net(torch.float32)
        with torch.autocast("cpu", dtype):
            y = odeint_adjoint(net, start(torch.float32), EVEN, **RK4)
            y.sum().backward()
            net.zero_grad()
            net(EVEN[0], start(torch.float32)).sum().backward()
        assert net.w.grad is not None

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.parametrize("steps", [8, 512])
    def test_pure_16_bit_model(self, dtype: torch.dtype, steps: int) -> None:
        """Errors do not grow with the number of steps: sums are in 32 bits."""
        net, y0 = Net(dtype), start(dtype)
        t = torch.linspace(0, 1, 3, dtype=F64)
        options = {"method": "rk4", "options": {"step_size": 2 / steps}}
        y = odeint_adjoint(net, y0, t, **options)
        assert y.dtype == dtype
        y[-1].sum().backward()
        # the numbers that the 16-bit tensors are, in float64
        exact, exact_y0 = Net(dtype).double(), start(dtype).detach().double().requires_grad_()
        reference(exact, exact_y0, t)[-1].sum().backward()
        assert net.seen == {(dtype,) * 3}
        for ours, theirs in zip([y0, *net.wanted], [exact_y0, *exact.wanted], strict=True):
            assert ours.grad.dtype == dtype
            assert relative(ours.grad.double(), theirs.grad) < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("factor", [1e-9, 1e6])
    def test_small_and_large_gradients_are_not_lost(self, factor: float) -> None:
        net, y0 = Net(torch.float32), start(torch.float32)

        def gradients(scale: float) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.float16):
                y = odeint_adjoint(net, y0, EVEN, **RK4)
            return torch.autograd.grad(scale * y[-1].sum(), [y0, *net.wanted])

        pairs = zip(gradients(factor), gradients(1.0), strict=True)
        assert all(relative(scaled / factor, one) < 8 * torch.finfo(torch.float16).eps for scaled, one in pairs)

    def test_without_scaling_they_are(self) -> None:
        net, y0 = Net(torch.float32), start(torch.float32)
        with torch.autocast("cpu", torch.float16):
            y = odeint_adjoint(net, y0, EVEN, loss_scaler=False, **RK4)
        found = torch.autograd.grad(1e-9 * y[-1].sum(), [net.w])
        assert torch.equal(found[0], torch.zeros_like(net.w))

    def test_velocity_dtype(self) -> None:
        net, y0 = Net(torch.float16), start(torch.float32)
        odeint_adjoint(net, y0, EVEN, velocity_dtype=torch.float16, **RK4).sum().backward()
        assert {dtypes[1] for dtypes in net.seen} == {torch.float16}
        assert y0.grad.dtype == torch.float32

    def test_overflow_lowers_the_scale(self) -> None:
        """A product that overflows float16 at the first scale: the interval is solved again with a smaller one."""

        class Steep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Parameter(torch.tensor(1.0, dtype=torch.float16))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                # the gradient of a sums 4096 times up to 1024 / sqrt(1)
                return -self.a * y

        net, scaler = Steep(), DynamicScaler()
        y0 = torch.ones(4096, 1, dtype=torch.float16, requires_grad=True)
        odeint_adjoint(net, y0, EVEN, loss_scaler=scaler, **RK4)[-1].sum().mul(1 / 4096).backward()
        kinds = [kind for kind, _ in scaler.scale_history]
        assert "overflow" in kinds
        assert "init" in kinds
        assert scaler.headroom < 1
        assert scaler.S is not None
        expected = -torch.tensor(-1.0).exp()
        assert abs(float(net.a.grad) - expected) < 8 * torch.finfo(torch.float16).eps

    @pytest.mark.parametrize("given", [True, False])
    def test_no_scale_helps(self, given: bool) -> None:
        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor) -> Tensor:
                return -y

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return grads[0] * torch.nan

        y0 = torch.ones(3, dtype=torch.float16, requires_grad=True)
        scaler = DynamicScaler(max_attempts=3) if given else None
        y = odeint_adjoint(lambda t, y: Broken.apply(y), y0, EVEN, adjoint_params=(), loss_scaler=scaler, **RK4)
        if given:
            with pytest.raises(RuntimeError, match="maximum number of 3 attempts"):
                y.sum().backward()
        else:
            with pytest.warns(RuntimeWarning, match="all gradients are set to inf"):
                y.sum().backward()
            assert torch.isinf(y0.grad).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_loss_that_is_not_finite(self, dtype: torch.dtype) -> None:
        net, y0 = Net(dtype), start(dtype)
        odeint_adjoint(net, y0, EVEN, **RK4).sum().mul(torch.inf).backward()
        assert all(not torch.isfinite(tensor.grad).any() for tensor in [y0, *net.wanted])

    def test_grad_scaler_of_the_caller(self) -> None:
        """One gradient that is not finite makes all so: torch.amp.GradScaler must skip the step."""
        net, y0 = Net(torch.float16), start(torch.float16)
        gradient = torch.zeros(5, 3, 4, dtype=torch.float16)
        gradient[-1, 0, 0] = 60000
        with torch.no_grad():
            net.w.mul_(16)
            net.v.mul_(16)
        y = odeint_adjoint(net, y0, EVEN, loss_scaler=object(), **RK4)
        y.backward(gradient)
        assert all(torch.isinf(tensor.grad).all() for tensor in [y0, net.w, net.v, net.b, net.unused])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_compensated(self, dtype: torch.dtype) -> None:
        net = Net(dtype)
        y = odeint_adjoint(net, start(dtype), EVEN, compensated=True, **RK4)
        y.sum().backward()
        assert relative(y.detach(), odeint(net, start(dtype), EVEN, compensated=True, **RK4).detach()) == 0
