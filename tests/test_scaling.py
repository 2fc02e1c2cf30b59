"""Dynamic scaling of the sweep: overflow, resumption, giving up, and the scaler's own state."""

import math
import warnings

import pytest
import torch

from rampde import DynamicScaler, odeint

STEPS = 12


class Amplify(torch.autograd.Function):
    """The identity, whose backward multiplies by ``gain`` in the cotangent's own dtype."""

    @staticmethod
    def forward(ctx, y, gain):
        ctx.gain = gain
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gain, None


class Field(torch.nn.Module):
    """A linear field whose backward needs ``range_needed`` times the range of the cotangent at step ``at``.

    The detour up and down again leaves the gradient itself as it is, unless it overflows on the way.
    """

    def __init__(self, range_needed=1.0, at=None):
        super().__init__()
        torch.manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(4, 4) / 4)
        self.range_needed, self.at = range_needed, at
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        k = y @ self.weight.to(y.dtype)
        if self.at is None or self.at <= float(t) * STEPS < self.at + 1:
            k = Amplify.apply(Amplify.apply(k, 1 / self.range_needed), self.range_needed)
        return k


def gradients(field, dtype, checkpoint="step", scaler=None, loss_factor=1.0):
    torch.manual_seed(4)
    y0 = torch.randn(8, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    field = field.to(y0.dtype)
    y = odeint(
        field,
        y0,
        torch.linspace(0, 1, STEPS + 1, dtype=y0.dtype),
        method="rk4",
        velocity_dtype=dtype,
        checkpoint=checkpoint,
        loss_scaler=scaler,
    )
    forward = field.evaluations
    (y[-1].sin().mean() * loss_factor).backward()
    return [y0.grad.double() / loss_factor, field.weight.grad.double() / loss_factor], field.evaluations - forward


def relative(mine, exact):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True))


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("at", [None, 0, 7, STEPS - 1])
def test_an_overflow_in_a_step_does_not_show_in_the_result(at, checkpoint):
    """The step that overflows, and the later ones of that attempt, leave no trace: the sweep resumes there."""
    exact, _ = gradients(Field(), torch.float64)
    plain, evaluations = gradients(Field(), torch.float16, checkpoint)
    scaler = DynamicScaler()
    resumed, more = gradients(Field(2.0**12, at), torch.float16, checkpoint, scaler)
    assert [kind for kind, _ in scaler.scale_history].count("overflow") >= 1
    # the scale is a power of two: resuming with a smaller one costs nothing but what underflows
    assert relative(resumed, exact) <= 2 * relative(plain, exact) + torch.finfo(torch.float16).eps
    if checkpoint == "step":
        assert evaluations == 4 * STEPS
        assert more > evaluations
    else:
        assert evaluations == more == 0


def test_an_overflow_at_the_start_costs_one_step_per_attempt():
    scaler = DynamicScaler()
    _, evaluations = gradients(Field(2.0**12, STEPS - 1), torch.float16, "step", scaler)
    overflows = [kind for kind, _ in scaler.scale_history].count("overflow")
    assert evaluations == 4 * (STEPS + overflows)


def test_headroom_is_carried_by_an_instance_that_is_kept():
    scaler = DynamicScaler()
    gradients(Field(2.0**12), torch.float16, scaler=scaler)
    assert scaler.headroom < 1
    first = scaler.S
    before = len(scaler.scale_history)
    _, evaluations = gradients(Field(2.0**12), torch.float16, scaler=scaler)
    assert evaluations == 4 * STEPS
    assert first >= scaler.S
    assert [kind for kind, _ in scaler.scale_history[before:]] == ["init"]


def test_attributes_of_the_scaler():
    scaler = DynamicScaler(torch.float16)
    assert scaler.eps == 2.0**-10
    assert scaler.target == 1024.0
    assert scaler.S is None
    assert not scaler.is_initialized
    assert scaler.__name__ == "DynamicScaler"
    gradients(Field(), torch.float16, scaler=scaler)
    assert scaler.is_initialized
    assert math.frexp(scaler.S)[0] == 0.5
    assert scaler.scale_history == [("init", scaler.S)]


def test_verbose_prints_the_scale(capsys):
    gradients(Field(), torch.float16, scaler=DynamicScaler(verbose=True))
    assert "DynamicScaler: init, S = " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_given_scaler_works_at_any_precision(dtype):
    scaler = DynamicScaler(dtype)
    exact, _ = gradients(Field(), torch.float64)
    scaled, _ = gradients(Field(), dtype, scaler=scaler)
    plain, _ = gradients(Field(), dtype, scaler=False)
    assert scaler.is_initialized
    assert relative(scaled, exact) <= 2 * relative(plain, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_when_no_scale_works_a_given_scaler_raises(checkpoint):
    field = Field(math.inf)
    with pytest.raises(RuntimeError, match=r"maximum number of 5 attempts at step 11 of 12, t = 0\.916667"):
        gradients(field, torch.float16, checkpoint, DynamicScaler(max_attempts=5))
    assert field.weight.grad is None
    assert field.weight.dtype == torch.float32


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_when_no_scale_works_automatic_scaling_returns_infinite_gradients(checkpoint):
    with pytest.warns(RuntimeWarning, match="all gradients are set to inf"):
        found, _ = gradients(Field(math.inf), torch.float16, checkpoint)
    assert all(bool(torch.isinf(gradient).all()) for gradient in found)


@pytest.mark.parametrize("scaler", [False, torch.amp.GradScaler("cpu")])
def test_without_scaling_one_overflow_makes_all_gradients_infinite(scaler):
    """So that a GradScaler skips the step."""
    found, _ = gradients(Field(2.0**12), torch.float16, scaler=scaler, loss_factor=2.0**18)
    assert all(bool(torch.isinf(gradient).all()) for gradient in found)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_gradient_that_is_not_finite_is_passed_on_without_a_word(bad):
    """It is what a GradScaler with too large a scale produces, and it skips the step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, evaluations = gradients(Field(), torch.float16, loss_factor=bad)
    assert not any(bool(torch.isfinite(gradient).any()) for gradient in found)
    assert evaluations == 4


def test_a_zero_gradient_needs_no_scale():
    y0 = torch.randn(8, 4, requires_grad=True)
    y = odeint(Field(), y0, torch.linspace(0, 1, 5), method="rk4", velocity_dtype=torch.float16)
    (0 * y.sum()).backward()
    assert torch.count_nonzero(y0.grad) == 0


def test_grad_scaler_trains_through_a_solve():
    """The usual loop of torch.amp, with rampde in it: too large a scale is skipped and lowered, then it trains."""
    field = Field()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
    y0 = torch.randn(8, 4)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = odeint(field, y0, torch.linspace(0, 1, 5), method="rk4", loss_scaler=scaler)
        loss = (y[-1] - 1).square().mean()
        losses.append(float(loss.detach()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)
