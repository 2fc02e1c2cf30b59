"""Whole solves on a GPU: against float64 on the CPU, and without waiting for the device inside a step."""

import copy

import pytest
import torch

from rampde import DynamicScaler, odeint

pytestmark = pytest.mark.cuda

BARS = {torch.float16: (1e-4, 2e-4, 6e-4), torch.bfloat16: (8e-4, 1e-3, 4e-3), None: (2e-6, 2e-6, 4e-6)}


class Net(torch.nn.Module):
    """An MLP that can forbid waiting for the device between two of its evaluations."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(64, 16))
        self.evaluations = 0
        self.forbid = None  # the evaluations after which waiting is an error, and after which it is not

    def forward(self, t, y):
        self.evaluations += 1
        if self.forbid is not None and self.evaluations in self.forbid:
            torch.cuda.set_sync_debug_mode("error" if self.evaluations == self.forbid[0] else "default")
        return self.layers(y)


def run(net, y0, c, steps, precision=None, checkpoint="step", loss_factor=1.0, scaler=None):
    y0 = y0.clone().requires_grad_()
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=y0.device)
    with torch.autocast("cuda", precision, enabled=precision is not None):
        y = odeint(net, y0, t, method="rk4_classic", checkpoint=checkpoint, loss_scaler=scaler)[-1]
    ((c * y).mean(dtype=torch.float64) * loss_factor).backward()
    parameters = torch.cat([p.grad.flatten() for p in net.parameters()])
    return [
        result.detach().double().cpu() / factor
        for result, factor in ((y, 1), (y0.grad, loss_factor), (parameters, loss_factor))
    ]


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("loss_factor", [1.0, 1e-7, 1e7])
@pytest.mark.parametrize("precision", BARS)
def test_errors_are_within_the_bar(precision, loss_factor, checkpoint):
    net, y0, c = Net(), torch.randn(128, 16), torch.randn(128, 16)
    exact = run(copy.deepcopy(net).double(), y0.double(), c.double(), 64)
    found = run(net.cuda(), y0.cuda(), c.cuda(), 64, precision, checkpoint, loss_factor)
    for mine, theirs, bar in zip(found, exact, BARS[precision], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) <= bar


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_no_step_waits_for_the_device(precision, checkpoint):
    """From the second evaluation on, and in the sweep from its second step on, waiting raises."""
    net, y0 = Net().cuda(), torch.randn(32, 16, device="cuda", requires_grad=True)
    t = torch.linspace(0, 1, 9, device="cuda")
    try:
        with torch.autocast("cuda", precision, enabled=precision is not None):
            odeint(net, y0, t, method="rk4", checkpoint=checkpoint)[-1].sum().backward()  # compiles the kernels
            net.evaluations, net.forbid = 0, (2, 32)
            y = odeint(net, y0, t, method="rk4", checkpoint=checkpoint)
        if checkpoint == "step":
            # the scaled sweep looks once after its first step; here its evaluations are numbers 33 to 64
            net.forbid = (38, 64)
        y[-1].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(y0.grad).all()


def test_overflow_freezes_and_resumes_on_the_device():
    net, y0, c = Net(), torch.randn(128, 16), torch.randn(128, 16)
    exact = run(copy.deepcopy(net).double(), y0.double(), c.double(), 16)
    scaler = DynamicScaler(torch.float16, target_factor=2.0**20)
    found = run(net.cuda(), y0.cuda(), c.cuda(), 16, torch.float16, "step", scaler=scaler)
    assert any(kind == "overflow" for kind, _ in scaler.scale_history)
    for mine, theirs, bar in zip(found, exact, BARS[torch.float16], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) <= bar


@pytest.mark.parametrize("precision", BARS)
def test_same_bits_on_every_run(precision):
    net, y0, c = Net().cuda(), torch.randn(128, 16).cuda(), torch.randn(128, 16).cuda()
    first, second = (run(copy.deepcopy(net), y0, c, 8, precision) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_exact_trace_of_a_flow():
    """f differentiates inside itself; its graph is partly built by the device's backward thread."""

    class Flow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, t, state):
            y, _ = state
            with torch.enable_grad():
                y = y.requires_grad_()
                k = self.net(t, y)
                columns = [torch.autograd.grad(k[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(16)]
            return k, -sum(columns)[:, None]

    gradients = {}
    torch.manual_seed(0)
    flow, y0 = Flow(), torch.randn(8, 16)
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        own, start = copy.deepcopy(flow).to(device, dtype), y0.to(device, dtype)
        zero = torch.zeros(8, 1, device=device, dtype=dtype)
        t = torch.linspace(0, 1, 5, device=device, dtype=dtype)
        y, log_density = odeint(own, (start, zero), t, method="rk4")
        (y[-1].square().mean() + log_density[-1].mean()).backward()
        gradients[device] = torch.cat([p.grad.double().cpu().flatten() for p in own.parameters()])
    error = (gradients["cuda"] - gradients["cpu"]).norm() / gradients["cpu"].norm()
    assert float(error) < 1e-5
