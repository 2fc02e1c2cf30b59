"""Gradients of adaptive solves: those of the steps that were taken, with outputs inside of steps, in every policy."""

import warnings
from collections.abc import Callable

import pytest
import torch
from steps import equal_steps
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import rampde
from rampde import odeint
from rampde.methods import ADAPTIVE

F64 = torch.float64
POLICIES = ["step", "none", "tape"]
# steps of 0.3 whatever finite differences do to the problem: outputs inside of steps, several in one, on the last end
STEPS = equal_steps(0.3)
TIMES = (0.0, 0.07, 0.21, 0.5, 1.0)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def times(values: tuple[float, ...] = TIMES) -> Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_y0_parameters_closures_and_times(method: str, checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def f(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ weight) * torch.cos(3 * t) + bias * t

        return odeint(f, y0, t, method=method, checkpoint=checkpoint, options=STEPS)

    assert gradcheck(run, (double(2, 2), times(), double(2, 2), double(2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_reverse_time(method: str, checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return odeint(
            lambda t, y: torch.sin(y @ weight) * t, y0, t, method=method, checkpoint=checkpoint, options=STEPS
        )

    assert gradcheck(run, (double(2, 2), times((1.0, 0.5, 0.4, -0.2)), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
def test_tuple_states(method: str, checkpoint: str) -> None:
    """Pieces of other shapes, one of which f ignores and one that nothing depends on."""

    def run(y0: Tensor, log_density: Tensor, passive: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        def f(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            k = torch.tanh(state[0] @ weight)
            return k * t, -(k * k).sum(1, keepdim=True), torch.ones_like(passive)

        y, density, _ = odeint(f, (y0, log_density, passive), t, method=method, checkpoint=checkpoint, options=STEPS)
        return y, density

    assert gradcheck(run, (double(2, 2), double(2, 1), double(3), times(), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_complex_states_and_parameters(checkpoint: str) -> None:
    def complex_double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex128, requires_grad=True)

    def run(y0: Tensor, real: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        def f(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            y, r = state
            return (y @ weight) * torch.exp(1j * t) + r, (y.conj() * y).real.sum(0)

        return odeint(f, (y0, real), t, method="dopri5", checkpoint=checkpoint, options=STEPS)

    assert gradcheck(run, (complex_double(2, 2), double(2), times((0.0, 0.2, 0.5)), complex_double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("option", ["step_t", "jump_t"])
def test_steps_that_end_where_the_options_say(option: str, checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        # min_step bounds what is proposed, not what is cut
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t,
            y0,
            t,
            method="dopri5",
            checkpoint=checkpoint,
            options=STEPS | {option: [0.4, 0.9]},
        )

    # without t[0]: the named times stay where they are while the steps before them move
    y0, t, weight = double(2, 2), times().detach(), double(2, 2)
    assert gradcheck(run, (y0, t, weight))


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_compensated_sums(checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor) -> Tensor:
        return odeint(lambda t, y: torch.sin(y) * t, y0, t, options=STEPS, compensated=True, checkpoint=checkpoint)

    assert gradcheck(run, (double(3), times()))


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_a_scaled_sweep_in_float64(checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t,
            y0,
            t,
            checkpoint=checkpoint,
            options=STEPS,
            loss_scaler=rampde.DynamicScaler(F64),
        )

    assert gradcheck(run, (double(2, 2), times(), double(2, 2)))


@pytest.mark.parametrize("checkpoint", POLICIES)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_second_derivatives(method: str, checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t, y0, t, method=method, checkpoint=checkpoint, options=STEPS
        )

    inputs = (double(1, 2), times((0.1, 0.2, 0.6)), double(2, 2))
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_second_derivatives_where_all_is_computed_from_one_tensor(checkpoint: str) -> None:
    """y0 and t computed from what f uses: no path is counted twice."""

    def run(weight: Tensor) -> Tensor:
        return odeint(
            lambda t, y: torch.tanh(y @ weight) * t,
            weight[:1].sin(),
            weight.abs().sum().sigmoid() * torch.linspace(0, 1, 4, dtype=F64),
            checkpoint=checkpoint,
            options=STEPS,
        )

    weight = double(2, 2)
    assert gradcheck(run, (weight,))
    assert gradgradcheck(run, (weight,))


class Net(nn.Module):
    def __init__(self, width: int = 3, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.first = nn.Linear(width, 16, dtype=dtype)
        self.second = nn.Linear(16, width, dtype=dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(y) + t))


OUTPUTS: dict[str, tuple[float, ...]] = {"ends": (0.0, 1.0), "inside": (0.0, 0.11, 0.13, 0.7, 1.0)}


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_policies_agree_on_free_steps(outputs: str, method: str) -> None:
    net, start = Net(), torch.randn(5, 3, dtype=F64)
    generator = torch.Generator().manual_seed(1)

    def solve(checkpoint: str) -> list[Tensor]:
        y0, t = start.clone().requires_grad_(), times(OUTPUTS[outputs])
        y = odeint(net, y0, t, method=method, rtol=1e-4, atol=1e-5, checkpoint=checkpoint)
        weights = torch.rand(y.shape, dtype=F64, generator=generator.manual_seed(1))
        return [y.detach(), *torch.autograd.grad((weights * y.square()).sum(), [y0, t, *net.parameters()])]

    step, none, tape = (solve(checkpoint) for checkpoint in POLICIES)
    for a, b, c in zip(step, none, tape, strict=True):
        assert torch.isfinite(c).all()
        assert c.abs().max() > 1e-3
        # the same steps up to the rounding of the error's norm, of which the tape has its own
        assert (a - b).abs().max() <= 1e-13 * c.abs().max()
        assert (a - c).abs().max() <= 1e-9 * c.abs().max()


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_gradients_of_free_steps_are_those_of_the_solution(method: str) -> None:
    """At tight tolerances the gradient of the discrete solution is that of the differential equation."""
    a = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.4, -1.1], dtype=F64, requires_grad=True)
    t = times((0.0, 0.31, 1.3))
    y = odeint(lambda t, y: a * torch.cos(t) * y, y0, t, method=method, rtol=1e-9, atol=1e-11)
    exact = y0 * torch.exp(a * (torch.sin(t) - torch.sin(t[0])))[:, None]
    found = torch.autograd.grad(y.square().sum(), [a, y0, t])
    expected = torch.autograd.grad(exact.square().sum(), [a, y0, t])
    # outputs inside of steps are of order 4, also of the large steps of dopri8, and their slopes of order 3
    bound = 1e-3 if method == "dopri8" else 1e-5
    assert all((g - e).abs().max() <= bound for g, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_evaluations_of_the_backward_pass(outputs: str, method: str) -> None:
    """ "step" evaluates the new stages of each accepted step, and no more; "none" and "tape" nothing."""
    net, tableau = Net(), ADAPTIVE[method]
    t = times(OUTPUTS[outputs]).detach()
    for checkpoint in POLICIES:
        y0 = double(4, 3)
        with rampde.stats() as stats:
            y = odeint(net, y0, t, method=method, rtol=1e-4, atol=1e-5, checkpoint=checkpoint)
        calls: list[float] = []
        handle = net.register_forward_pre_hook(lambda _, arguments, calls=calls: calls.append(float(arguments[0])))
        y.square().sum().backward()
        handle.remove()
        solve = stats.solves[0]
        assert solve.evaluations_backward == len(calls)
        if checkpoint != "step":
            assert len(calls) == 0
            continue
        # the last stage that the state at the end depends on; with outputs inside, the last that these depend on
        plain = max(i for i, b in enumerate(tableau.closed.b) if b != 0) + 1
        whole = tableau.closed.stages
        ends = [start + size for start, size in zip(solve.starts, solve.step_sizes, strict=True)]
        inside = [any(s < time < e for time in t.tolist()) for s, e in zip(solve.starts, ends, strict=True)]
        assert ends[-1] >= 1.0
        assert len(calls) == sum(whole if holds else plain for holds in inside)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_retained_graph_gives_the_same_gradients_twice(checkpoint: str) -> None:
    net, y0, t = Net(), double(4, 3), times()
    y = odeint(net, y0, t, rtol=1e-4, atol=1e-4, checkpoint=checkpoint)
    wanted = [y0, t, *net.parameters()]
    first = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(y.square().sum(), wanted)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(y.square().sum(), wanted)


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_frozen_parameters_and_what_is_not_asked_for(checkpoint: str) -> None:
    net, y0 = Net(), double(4, 3)
    net.first.weight.requires_grad_(False)
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
    doubled = 2 * scale
    y = odeint(lambda t, y: doubled * net(t, y), y0.detach(), times().detach(), checkpoint=checkpoint)
    assert y.requires_grad
    y[1:3].sum().backward()
    assert net.first.weight.grad is None
    assert net.first.bias.grad is not None
    assert scale.grad is not None
    # the gradients that a solve with plain autograd gives
    expected = torch.autograd.grad(
        odeint(lambda t, y: 2 * scale * net(t, y), y0.detach(), times().detach(), checkpoint="tape")[1:3].sum(),
        [scale, net.first.bias],
    )
    for found, reference in zip([scale.grad, net.first.bias.grad], expected, strict=True):
        assert (found - reference).abs().max() <= 1e-9 * reference.abs().max()


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_a_loss_on_some_outputs_only(checkpoint: str) -> None:
    def run(y0: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = odeint(lambda t, y: torch.tanh(y @ weight), y0, t, checkpoint=checkpoint, options=STEPS)
        return y[1], y[3, 0]

    assert gradcheck(run, (double(2, 2), times(), double(2, 2)))


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_dropout_is_replayed(checkpoint: str) -> None:
    """The masks of every evaluation, rejected steps included, are those of the forward pass."""
    net, dropout, y0 = Net(), nn.Dropout(0.4), double(4, 3)

    def gradients(policy: str) -> list[Tensor]:
        torch.manual_seed(3)
        y = odeint(
            lambda t, y: dropout(net(t, y)),
            y0,
            times((0.0, 0.2, 1.0)).detach(),
            rtol=1e-1,
            atol=1e-1,
            options={"min_step": 0.05, "first_step": 0.1},
            checkpoint=policy,
        )
        torch.manual_seed(4)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])]

    for found, expected in zip(gradients(checkpoint), gradients("tape"), strict=True):
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_float16_gradients_are_as_good_as_their_precision_however_small_the_loss(scale: float, checkpoint: str) -> None:
    """Outputs inside steps; a loss 1e-7 times as large leaves the relative error where it is."""
    net, start, t = Net(8, torch.float32), torch.randn(64, 8), torch.tensor([0.0, 0.13, 0.4, 0.41, 1.0])
    options = equal_steps(0.25)

    def gradients(module: nn.Module, y0: Tensor) -> list[Tensor]:
        y0 = y0.clone().requires_grad_()
        y = odeint(module, y0, t.to(y0.dtype), rtol=1.0, atol=1.0, options=options, checkpoint=checkpoint)
        found = torch.autograd.grad(scale * y.double().square().mean(), [y0, *module.parameters()])
        return [gradient.double() / scale for gradient in found]

    with torch.autocast("cpu", torch.float16):
        low = gradients(net, start)
    wide = Net(8)
    wide.load_state_dict(net.state_dict())
    exact = gradients(wide, start.double())
    # a few roundings of float16 in each of 24 products of a sweep, of which none adds up over the steps
    roundoff = torch.finfo(torch.float16).eps / 2
    for found, expected in zip(low, exact, strict=True):
        assert (found - expected).norm() <= 16 * roundoff * expected.norm()


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_float16_sweep_survives_an_output_inside_whose_gradient_is_the_largest(checkpoint: str) -> None:
    """The scale of a step suits the gradients of the outputs inside of it, too."""
    net, start = Net(8, torch.float32), torch.randn(16, 8)
    t = torch.tensor([0.0, 0.37, 1.0])
    weights = torch.tensor([0.0, 1e6, 1e-3])[:, None, None]
    y0 = start.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = odeint(net, y0, t, rtol=1.0, atol=1.0, options=equal_steps(0.25), checkpoint=checkpoint)
        found = torch.autograd.grad((weights * y).sum(), [y0, *net.parameters()])
    wide = Net(8)
    wide.load_state_dict(net.state_dict())
    reference = start.double().requires_grad_()
    exact = odeint(wide, reference, t.double(), options=equal_steps(0.25))
    expected = torch.autograd.grad((weights.double() * exact).sum(), [reference, *wide.parameters()])
    roundoff = torch.finfo(torch.float16).eps / 2
    for gradient, correct in zip(found, expected, strict=True):
        assert torch.isfinite(gradient).all()
        assert (gradient.double() - correct).norm() <= 16 * roundoff * correct.norm()


@pytest.mark.parametrize("checkpoint", POLICIES)
def test_same_input_same_bits(checkpoint: str) -> None:
    net, start = Net(3, torch.float32), torch.randn(40, 3)

    def run() -> list[Tensor]:
        y0 = start.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = odeint(net, y0, torch.linspace(0, 1, 5), rtol=1e-2, atol=1e-2, checkpoint=checkpoint)
        return [y.detach(), *torch.autograd.grad(y.sum(), [y0, *net.parameters()])]

    first = run()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, run(), strict=True))


def test_second_derivatives_of_a_random_func_are_refused() -> None:
    net, y0 = Net(), double(4, 3)
    dropout: Callable[[Tensor], Tensor] = nn.Dropout(0.4)
    y = odeint(lambda t, y: dropout(net(t, y)), y0, times((0.0, 1.0)).detach(), options=equal_steps(0.25))
    with pytest.raises(RuntimeError, match="draws random numbers"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)
