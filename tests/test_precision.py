"""Errors in 16 bits against the float64 gradient of the same discretisation, and what compensation gains."""

import pytest
import torch

from rampde import odeint

# relative errors of state, dL/dy0 and dL/dtheta that DESIGN section 2 sets as the bar, for any number of steps
BARS = {torch.float16: (1e-4, 2e-4, 6e-4), torch.bfloat16: (8e-4, 1e-3, 4e-3)}
STEPS = (8, 64, 512)


class Solve:
    """MLP 16-64-64-16, batch 128, classical RK4, loss mean(c * y(1)); the problem of DESIGN section 2."""

    def __init__(self, steps, dtype, checkpoint="step", loss_factor=1.0, pure=False, batch=128):
        torch.manual_seed(1)
        layers = [torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
        net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 16))
        y0, c = torch.randn(batch, 16), torch.randn(batch, 16)
        if pure:
            # both sides start from the same 16-bit values
            net, y0 = net.to(pure), y0.to(pure)
        if dtype == torch.float64 or pure:
            net, y0, c = net.to(dtype), y0.to(dtype), c.to(dtype)
        y0.requires_grad_()
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        low = dtype in BARS and not pure
        with torch.autocast("cpu", dtype if low else torch.bfloat16, enabled=low):
            y = odeint(
                lambda t, y: net(y),
                y0,
                t,
                method="rk4_classic",
                options={"step_size": 1 / steps},
                checkpoint=checkpoint,
            )[-1]
        ((c * y).mean(dtype=torch.float64) * loss_factor).backward()
        parameters = torch.cat([p.grad.flatten() for p in net.parameters()])
        self.results = [y.detach().double(), y0.grad.double() / loss_factor, parameters.double() / loss_factor]

    def errors(self, exact):
        return [
            float((mine - theirs).norm() / theirs.norm())
            for mine, theirs in zip(self.results, exact.results, strict=True)
        ]


@pytest.fixture(scope="module")
def exact():
    return {steps: Solve(steps, torch.float64, "none") for steps in STEPS}


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("dtype", BARS)
def test_errors_are_within_the_bar_and_flat_in_steps_and_loss_scale(exact, dtype, checkpoint):
    errors = {}
    for steps in STEPS:
        for loss_factor in (1.0, 1e-7, 1e7) if steps < 512 else (1.0,):
            errors[steps, loss_factor] = Solve(steps, dtype, checkpoint, loss_factor).errors(exact[steps])
            for error, bar in zip(errors[steps, loss_factor], BARS[dtype], strict=True):
                assert error <= bar, (steps, loss_factor)
    # flat: no more than a quarter between any two of them
    for column in zip(*errors.values(), strict=True):
        assert max(column) <= 1.25 * min(column)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("loss_factor", [1e-7, 1e7])
def test_errors_at_512_steps_with_a_scaled_loss(exact, dtype, checkpoint, loss_factor):
    errors = Solve(512, dtype, checkpoint, loss_factor).errors(exact[512])
    for error, bar in zip(errors, BARS[dtype], strict=True):
        assert error <= bar


@pytest.mark.parametrize("dtype", BARS)
def test_a_pure_16_bit_model_accumulates_in_32_bits(dtype):
    """Parameters and y0 in 16 bits too: only the results are rounded, once, so errors stay flat in the steps."""
    errors = {}
    for steps in (8, 256):
        exact = Solve(steps, torch.float64, "none", pure=dtype)
        errors[steps] = Solve(steps, dtype, pure=dtype).errors(exact)
    rounding = torch.finfo(dtype).eps
    for few, many in zip(errors[8], errors[256], strict=True):
        assert many <= 1.25 * few + rounding / 2
    for error, bar in zip(errors[256], BARS[dtype], strict=True):
        assert error <= bar + rounding


def test_without_scaling_float16_loses_a_small_gradient(exact):
    """The scale is what keeps the gradient: the same sweep without it underflows."""
    with torch.autocast("cpu", torch.float16):
        w = torch.randn(16, 16, requires_grad=True)
        y = odeint(
            lambda t, y: y @ w,
            torch.randn(4, 16),
            torch.linspace(0, 1, 5),
            method="rk4",
            loss_scaler=False,
        )
    (y[-1].mean() * 1e-9).backward()
    assert torch.count_nonzero(w.grad) == 0


def test_increments_below_16_bits_are_not_lost():
    for dtype in BARS:
        for method in ("euler", "rk4"):
            y = odeint(
                lambda t, y: torch.full_like(y, 1e-5),
                torch.zeros(1),
                torch.tensor([0.0, 1.0], dtype=torch.float64),
                method=method,
                options={"step_size": 1e-3},
                velocity_dtype=dtype,
            )
            velocity = float(torch.tensor(1e-5, dtype=dtype))
            # a sum of 1000 float32 terms around the velocity as its dtype holds it
            assert abs(float(y[-1]) - velocity) <= 1000 * torch.finfo(torch.float32).eps * velocity
            assert abs(float(y[-1]) - 1e-5) <= 2e-8


def roundoff(steps, compensated, checkpoint=None):
    """Error of Euler for y' = -y on [0, 1] in float32 against the same steps in exact arithmetic."""
    with torch.no_grad():
        y = odeint(
            lambda t, y: -y,
            torch.ones(1),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            method="euler",
            options={"step_size": 1 / steps},
            compensated=compensated,
        )
    exact = (1 - 1 / steps) ** steps
    return abs(float(y[-1].double()) - exact)


def test_compensation_stops_the_growth_of_roundoff():
    plain = {steps: roundoff(steps, False) for steps in (1000, 100_000)}
    compensated = {steps: roundoff(steps, True) for steps in (1000, 100_000)}
    assert plain[100_000] > 1e-6 > plain[1000]
    assert max(compensated.values()) < 2e-7


@pytest.mark.slow
def test_compensation_over_a_million_steps():
    assert roundoff(1_000_000, True) < 2e-7
    assert roundoff(1_000_000, False) > 2e-6


def test_float64_time_arithmetic_under_float32_state():
    """A time-dependent f over many steps: the times do not drift."""
    seen = []

    def f(t, y):
        seen.append(float(t))
        return torch.cos(t) * torch.ones_like(y)

    with torch.no_grad():
        odeint(f, torch.zeros(1), torch.tensor([0.0, 1.0]), method="euler", options={"step_size": 1e-4})
    exact = [float(torch.tensor(n * 1e-4, dtype=torch.float64).float()) for n in range(10_000)]
    assert seen == exact


@pytest.mark.parametrize("scaler", [None, False])
def test_leaving_the_range_of_float16_is_named(scaler):
    y0 = torch.full((3,), 100.0, requires_grad=True)
    named = r"the state or its velocity left the range of float16 \(65504\) in step 6 of 10, between t = 6 "
    with pytest.warns(RuntimeWarning, match=named):
        odeint(
            lambda t, y: y,
            y0,
            torch.linspace(0, 10, 11),
            method="rk4",
            velocity_dtype=torch.float16,
            loss_scaler=scaler,
        )


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_a_solve_leaves_no_detached_casts_behind(checkpoint):
    """Layers that f reaches only later, used again by the caller in the same autocast region, with backward in it."""
    bank = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = odeint(
            lambda t, y: bank[int(t >= 0.5)](y),
            torch.randn(3, 4),
            torch.linspace(0, 1, 5),
            method="euler",
            checkpoint=checkpoint,
        )
        after = bank[1](y[-1])
        assert after.requires_grad
        after.sum().backward()
    for layer in bank:
        assert torch.count_nonzero(layer.weight.grad) > 0
