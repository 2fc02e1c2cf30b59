"""Fp8: gradients from changes of the state in eight bits."""

import pytest
import torch
from policies import Net, gradients, same_bits
from torch import nn

import rampde
from rampde import Fp8, Offload

# of a code, relative to the number: half of 2^-3
HALF_QUANTUM = 2.0**-4
T = torch.linspace(0, 1, 9)


class Flow(nn.Module):
    """Velocity of points in the plane and its divergence."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t, state):
        with torch.enable_grad():
            x = state[0].requires_grad_()
            velocity = self.layers(x)
            rows = [torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return velocity, rows[0] + rows[1]


class Convolutions(nn.Module):
    """Two rounds of normalisation, ReLU and convolution."""

    def __init__(self, channels=32):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, t, y):
        return self.layers(y)


def error(found, exact):
    """Of all gradients together, relative."""
    pairs = list(zip(found, exact, strict=True))
    wrong = sum(float((one - other).abs().square().sum()) for one, other in pairs)
    return (wrong / sum(float(other.abs().square().sum()) for _, other in pairs)) ** 0.5


@pytest.mark.parametrize("policy", [Fp8(), Fp8(stochastic=True), Fp8("lean"), Offload(Fp8())], ids=repr)
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_gradient_of_a_flow(method, precision, policy):
    flow = Flow()
    x = torch.randn(256, 2, requires_grad=True)

    def loss(y):
        return (0.5 * y[0][-1].square().sum(1) - y[1][-1]).mean()

    options = {"method": method, "loss": loss, "parameters": [*flow.parameters()], "rtol": 1e-2, "atol": 1e-2}
    state = x, torch.zeros(256)
    exact, _ = gradients(flow, state, torch.linspace(0, 1, 17), "step", precision, **options)
    found, _ = gradients(flow, state, torch.linspace(0, 1, 17), policy, precision, **options)
    assert 0 < error(found, exact) < 2e-2


@pytest.mark.parametrize("policy", [Fp8(), Fp8(stochastic=True), Fp8("lean"), Offload(Fp8())], ids=repr)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_gradient_of_convolutions(precision, policy):
    """A block of four steps, as in image models."""
    block = Convolutions()
    y0 = torch.randn(4, 32, 16, 16, requires_grad=True)
    cotangent = torch.randn(4, 32, 16, 16)
    options = {
        "method": "rk4",
        "loss": lambda y: (y[-1] * cotangent).mean(),
        "parameters": [*block.parameters()],
        "options": {"step_size": 0.25},
    }
    t = torch.tensor([0.0, 1.0])
    exact, _ = gradients(block, y0, t, "step", precision, **options)
    found, _ = gradients(block, y0, t, policy, precision, **options)
    assert 0 < error(found, exact) < 2e-2


class Watched(nn.Module):
    """Notes the states that f sees at the beginning of steps, on both roads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) * 0.5)
        self.seen = []

    def forward(self, t, y):
        self.seen.append(y.detach().clone())
        return torch.tanh(y @ self.weight)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_states_are_within_the_sum_of_half_quanta(stochastic, compensated):
    """Going back from the last state, each step adds at most half a quantum of its change, a whole one at random."""
    func = Watched()
    y0 = torch.randn(200, 5, requires_grad=True)
    policy = Fp8(stochastic=stochastic)
    gradients(func, y0, T, policy, method="euler", compensated=compensated)
    forward, backward = func.seen[:8], func.seen[8:][::-1]
    assert torch.equal(forward[-1], backward[-1])
    bound = torch.zeros_like(y0)
    for step in reversed(range(7)):
        change = (forward[step + 1] - forward[step]).abs()
        # of a number below the smallest of its block that has three bits, the quantum is that of the block
        least = change.max() * 2.0**-14
        bound = bound + torch.maximum(change, least) * HALF_QUANTUM * (2 if stochastic else 1)
        wrong = (backward[step] - forward[step]).abs()
        assert bool((wrong <= bound * (1 + 1e-3) + 1e-6).all())
    assert float((backward[0] - forward[0]).abs().max()) > 0


def test_smaller_steps_are_kept_better():
    """The change of a step is a part of the state that becomes smaller with the steps."""
    net = Net()
    y0 = torch.randn(64, 5, requires_grad=True)
    errors = []
    for steps in (4, 16, 64):
        t = torch.linspace(0, 1, steps + 1)
        exact, _ = gradients(net, y0, t, "step", method="rk4", parameters=[*net.parameters()])
        found, _ = gradients(net, y0, t, Fp8(), method="rk4", parameters=[*net.parameters()])
        errors.append(error(found, exact))
    # independent errors of a step's size h, of which there are 1 / h: as the root of h, which falls by four
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 2 * errors[2]


def test_same_bits_every_time_and_whatever_comes_with_it():
    net = Net()
    y0 = torch.randn(64, 5, requires_grad=True)

    def run(policy, method="rk4"):
        options = {"method": method, "rtol": 1e-3, "atol": 1e-3, "parameters": [*net.parameters()]}
        return gradients(net, y0, T, policy, torch.bfloat16, **options)[0]

    for method in ("rk4", "dopri5", "bosh3"):
        for stochastic in (False, True):
            first = run(Fp8(stochastic=stochastic), method)
            assert same_bits(first, run(Fp8(stochastic=stochastic), method))
            assert same_bits(first, run(Fp8("lean", stochastic=stochastic), method))
            assert same_bits(first, run(Offload(Fp8(stochastic=stochastic)), method))
    assert not same_bits(run(Fp8(stochastic=True)), run(Fp8(stochastic=True, seed=1)))
    assert not same_bits(run(Fp8(stochastic=True)), run(Fp8()))


def test_random_rounding_is_right_in_the_mean():
    """The mean over seeds of the state that is reached from the changes."""
    func = Watched()
    y0 = torch.randn(50, 5, requires_grad=True)
    total, squares, count = torch.zeros(50, 5, dtype=torch.float64), torch.zeros(50, 5, dtype=torch.float64), 200
    for seed in range(count):
        func.seen.clear()
        gradients(func, y0, torch.linspace(0, 1, 4), Fp8(stochastic=True, seed=seed), method="euler")
        wrong = (func.seen[-1] - func.seen[0]).double()
        total, squares = total + wrong, squares + wrong.square()
    deviation = (squares / count).sqrt().clamp(min=1e-9)
    # a mean of so many is wrong by more than six of its standard deviations nowhere
    assert bool(((total / count).abs() <= 6 * deviation / count**0.5 + 1e-7).all())


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_nested_and_complex_states(method):
    y0 = {
        "real": torch.randn(7, 4, requires_grad=True),
        "complex": torch.randn(3, dtype=torch.complex64, requires_grad=True),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.0),
    }

    def func(t, y):
        return {
            "real": torch.sin(y["real"]),
            "complex": 1j * y["complex"],
            "empty": y["empty"],
            "scalar": -y["scalar"] * t,
        }

    def loss(y):
        return y["real"].square().sum() + y["complex"].abs().square().sum() + y["scalar"].sum()

    options = {"method": method, "loss": loss, "rtol": 1e-3, "atol": 1e-3}
    exact, _ = gradients(func, y0, T, "step", **options)
    found, _ = gradients(func, y0, T, Fp8(), **options)
    assert error(found, exact) < 2e-2


def test_channels_last_and_double_precision():
    convolution = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    y0 = torch.randn(2, 4, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    options = {"method": "rk4", "parameters": [*convolution.parameters()]}

    def func(t, y):
        return torch.tanh(convolution(y))

    exact, _ = gradients(func, y0, T.double(), "step", **options)
    found, _ = gradients(func, y0, T.double(), Fp8(), **options)
    assert 0 < error(found, exact) < 2e-2


def test_resumed_after_an_overflow():
    """The sweep goes back to a later step, from the last state again."""
    weight = torch.diag(torch.linspace(50.0, 400.0, 4)).requires_grad_()
    y0 = torch.full((2, 4), 1e-3, requires_grad=True)
    t = torch.linspace(0, 0.004, 8)

    def run(target_factor):
        scaler = rampde.DynamicScaler(target_factor=target_factor)
        found = gradients(
            lambda t, y: y @ weight, y0, t, Fp8(), torch.float16, [weight], method="rk4", loss_scaler=scaler
        )[0]
        return found, [kind for kind, _ in scaler.scale_history]

    resumed, history = run(64.0)
    assert "overflow" in history
    straight, history = run(2.0**-4)
    assert "overflow" not in history
    for one, other in zip(resumed, straight, strict=True):
        assert (one - other).norm() <= 4 * torch.finfo(torch.float16).eps * other.norm()


def test_two_backward_passes():
    net = Net()
    y0 = torch.randn(3, 5, requires_grad=True)
    loss = rampde.odeint(net, y0, T, method="rk4", checkpoint=Fp8()).square().sum()
    first = torch.autograd.grad(loss, [y0, *net.parameters()], retain_graph=True)
    assert same_bits(first, torch.autograd.grad(loss, [y0, *net.parameters()]))


def test_dropout_is_replayed():
    dropout, net = nn.Dropout(0.4), Net()
    y0 = torch.randn(64, 5, requires_grad=True)

    def run(policy):
        torch.manual_seed(3)
        options = {"method": "rk4", "parameters": [*net.parameters()]}
        return gradients(lambda t, y: net(t, dropout(y)), y0, T, policy, **options)[0]

    assert error(run(Fp8()), run("step")) < 2e-2


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps):
    """One step needs no change at all."""
    net = Net()
    y0 = torch.randn(3, 5, requires_grad=True)
    t = torch.linspace(0, 1, steps + 1)
    exact, _ = gradients(net, y0, t, "step", method="rk4", parameters=[*net.parameters()])
    found, _ = gradients(net, y0, t, Fp8(), method="rk4", parameters=[*net.parameters()])
    assert same_bits(found, exact) == (steps == 1)
