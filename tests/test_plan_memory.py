"""plan_memory: its predictions beside what is then measured, and what it chooses."""

import pytest
import torch
from policies import Net
from torch import nn

import rampde
from rampde import Offload, odeint, plan_memory
from rampde.meter import metered

CPU = torch.device("cpu")


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        return self.layers(y)


def mlp():
    return Layers(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64)), torch.randn(256, 64, requires_grad=True)


def wide():
    """More parameters than activations."""
    return Layers(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)), torch.randn(16, 256, requires_grad=True)


def convolutions():
    layers = [nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    return Layers(*layers, *layers), torch.randn(4, 32, 16, 16, requires_grad=True)


class Flow(nn.Module):
    """Velocity of points and its divergence, by differentiating in f."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t, y):
        with torch.enable_grad():
            x = y[:, :2].detach().requires_grad_() if not y.requires_grad else y[:, :2]
            velocity = self.layers(x)
            rows = [torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return torch.cat([velocity, (rows[0] + rows[1])[:, None]], 1)


def test_memory_of_a_flow_within_ten_percent():
    """f records graphs for itself, which go where none are wanted."""
    func, y0 = Flow(), torch.randn(512, 3, requires_grad=True)
    t, options = SOLVES["rk4, last state"]
    plan = plan_memory(func, y0, t, budget=1 << 40, show=False, **options)
    for planned in plan.policies:
        # of offloaded graphs, what is loaded at once depends on the order in which f saved it
        if planned.name != "offload none":
            peak = measured(func, y0, t, planned.policy, None, **options)
            assert 0.9 <= planned.peak / peak <= 1.1, planned.name


def measured(func, y0, t, policy, precision, **options):
    """Peak bytes of a solve and its gradient."""
    parameters = [*func.parameters()]

    def call():
        with torch.autocast("cpu", precision, enabled=precision is not None):
            y = odeint(func, y0, t, checkpoint=policy, **options)
        return torch.autograd.grad(y, [y0, *parameters], torch.ones_like(y))

    call()
    return metered(call, CPU).peak


SOLVES = {
    "rk4, every state": (torch.linspace(0, 1, 9), {"method": "rk4"}),
    "rk4, last state": (torch.tensor([0.0, 1.0]), {"method": "rk4", "options": {"step_size": 0.125}}),
    "heun2, compensated": (torch.linspace(0, 1, 9), {"method": "heun2", "compensated": True}),
    "dopri5": (torch.tensor([0.0, 1.0]), {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}),
}


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("problem", [mlp, wide, convolutions])
def test_memory_within_ten_percent(problem, precision, solve):
    func, y0 = problem()
    t, options = SOLVES[solve]
    with torch.autocast("cpu", precision, enabled=precision is not None):
        plan = plan_memory(func, y0, t, budget=1 << 40, show=False, **options)
    assert plan.chosen.name == "none"
    wrong = {}
    for planned in plan.policies:
        peak = measured(func, y0, t, planned.policy, precision, **options)
        ratio = planned.peak / peak
        if not 0.9 <= ratio <= 1.1:
            wrong[planned.name] = f"{ratio:.3f} of {peak / 2**20:.2f} MiB"
    assert not wrong


def test_evaluations_are_those_that_are_made():
    func, y0 = mlp()
    t = torch.linspace(0, 1, 9)
    plan = plan_memory(func, y0, t, method="rk4", budget=3_000_000, show=False)
    assert plan.steps == 8
    assert {"none", "stage", "step", "lean", "fp8", "offload step", "offload none"} <= {p.name for p in plan.policies}
    assert any(p.name[0].isdigit() for p in plan.policies)
    for planned in plan.policies:
        before = func.evaluations
        odeint(func, y0, t, method="rk4", checkpoint=planned.policy).sum().backward()
        assert func.evaluations - before == planned.evaluations.plain + planned.evaluations.with_graph


def test_the_fastest_within_the_budget():
    func, y0 = mlp()
    t = torch.linspace(0, 1, 9)
    large = plan_memory(func, y0, t, method="rk4", budget=1 << 40, show=False)
    assert large.chosen.name == "none"
    assert large.policies == sorted(large.policies, key=lambda planned: (planned.seconds, planned.peak))
    peaks = sorted(p.peak for p in large.policies if p.name in ("stage", "step", "lean"))
    small = plan_memory(func, y0, t, method="rk4", budget=peaks[-1], show=False)
    assert small.chosen.peak <= peaks[-1]
    assert small.chosen.name in ("stage", "step")
    nothing = plan_memory(func, y0, t, method="rk4", budget=0, show=False)
    assert nothing.chosen.peak == min(
        p.peak for p in nothing.policies if p.policy.quantiser is None and not isinstance(p.policy, Offload)
    )


def test_table(capsys):
    func, y0 = mlp()
    plan = plan_memory(func, y0, torch.linspace(0, 1, 9), method="rk4", budget=4_000_000)
    table = capsys.readouterr().out
    assert str(plan) in table
    for planned in plan.policies:
        assert f"\n{planned.name} " in table
    assert table.count("<- chosen") == 1
    assert "over the budget" in table
    assert "8 steps, budget 3.81 MiB" in table
    assert plan["step"].name == "step"
    with pytest.raises(KeyError, match="'everything' is not among the planned policies"):
        plan["everything"]


def test_nothing_is_changed():
    """Neither the network, nor its buffers, nor the random numbers, nor the gradients."""
    net = Layers(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 8))
    y0 = torch.randn(4, 8, requires_grad=True)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    plan_memory(net, y0, torch.linspace(0, 1, 5), method="rk4", show=False)
    plan_memory(net, y0, torch.linspace(0, 1, 5), method="dopri5", rtol=1e-1, atol=1e-1, show=False)
    assert torch.equal(random, torch.get_rng_state())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in net.parameters())
    assert y0.grad is None


def test_a_plan_is_no_solve_of_the_user():
    func, y0 = mlp()
    told = []
    func.callback_step = lambda *arguments: told.append(arguments)
    with rampde.stats() as stats:
        plan_memory(func, y0, torch.tensor([0.0, 1.0]), rtol=1e-1, atol=1e-1, show=False)
    assert stats.solves == []
    assert told == []


def test_what_cannot_be_planned():
    y0, t = torch.randn(3, 5), torch.linspace(0, 1, 4)
    with pytest.raises(ValueError, match="plan_memory is for explicit Runge-Kutta methods"):
        plan_memory(Net(), y0, t, method="gl4")
    with pytest.raises(ValueError, match="nothing to plan"):
        plan_memory(Net(), y0, t, options={"batch_axis": 0})
    with pytest.raises(ValueError, match="t has one time only"):
        plan_memory(Net(), y0, t[:1], method="rk4")
    with pytest.raises(TypeError, match="y0 is"):
        plan_memory(Net(), 3.0, t)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="profiler, which is running already"),
    ):
        plan_memory(Net(), y0, t, method="rk4")


def test_meter():
    def call():
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first
        return torch.empty(500), second

    found = metered(call, CPU)
    assert found.peak == 16_000
    assert found.left == 14_000
    assert found.result[0].shape == (500,)
    with pytest.raises(TypeError, match="memory on meta cannot be measured"):
        metered(call, torch.device("meta"))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("problem", [mlp, wide, convolutions])
def test_memory_within_ten_percent_on_a_gpu(problem, precision):
    func, y0 = problem()
    func, y0 = func.to("cuda"), y0.detach().to("cuda").requires_grad_()
    t = torch.linspace(0, 1, 9, device="cuda")
    with torch.autocast("cuda", precision, enabled=precision is not None):
        plan = plan_memory(func, y0, t, method="rk4", budget=1 << 40, show=False)
    for planned in plan.policies:

        def call(policy=planned.policy):
            with torch.autocast("cuda", precision, enabled=precision is not None):
                y = odeint(func, y0, t, method="rk4", checkpoint=policy)
            return torch.autograd.grad(y, [y0, *func.parameters()], torch.ones_like(y))

        call()
        peak = metered(call, torch.device("cuda")).peak
        assert 0.9 <= planned.peak / peak <= 1.1, planned.name
