"""CUDA graphs on a GPU: what is recorded gives the bits of ordinary solves, waits for nothing, and launches little."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import rampde
from rampde.capture import CudaRecorder, recorded

pytestmark = pytest.mark.cuda

GRID = torch.linspace(0, 1, 9)
PRECISIONS = [None, torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.layers(y) * (1 + t)


@pytest.fixture(autouse=True)
def forget():
    rampde.clear_cuda_graphs()
    yield
    rampde.clear_cuda_graphs()


def train(net, y0, t, precision=None, **options):
    y0 = y0.clone().requires_grad_()
    with torch.autocast("cuda", precision, enabled=precision is not None):
        solution = rampde.odeint(net, y0, t, **{"method": "rk4", **options})
    loss = (solution * torch.linspace(-1, 2, solution.numel(), device="cuda").view_as(solution)).sum()
    return [solution.detach(), *torch.autograd.grad(loss, [y0, *net.parameters()])]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("policy", ["auto", "none", "step", "stage", "lean", 3, rampde.Fp8()], ids=repr)
def test_bits_of_ordinary_solves(policy, precision):
    net, t = Net().cuda(), GRID.cuda()
    for _ in range(4):
        y0 = torch.randn(32, 16, device="cuda")
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        expected = train(net, y0, t, precision, checkpoint=policy)
        found = train(net, y0, t, precision, checkpoint=policy, cuda_graph=True)
        for mine, its in zip(found, expected, strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_nothing_waits(precision):
    net, t, y0 = Net().cuda(), GRID.cuda(), torch.randn(32, 16, device="cuda")
    for _ in range(2):
        train(net, y0, t, precision, cuda_graph=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(net, y0, t, precision, cuda_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_several_at_once_and_in_any_order():
    nets, t = [Net().cuda() for _ in range(3)], GRID.cuda()
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        y0 = torch.randn(32, 16, device="cuda")
        solutions = [rampde.odeint(net, y0, t, method="rk4", cuda_graph=True) for net in nets]
        for place in order:
            found = torch.autograd.grad(solutions[place].sum(), [*nets[place].parameters()])
            solution = rampde.odeint(nets[place], y0, t, method="rk4")
            for mine, its in zip(found, torch.autograd.grad(solution.sum(), [*nets[place].parameters()]), strict=True):
                assert torch.equal(mine, its)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_adaptive_steps_are_those_of_the_host(precision):
    net, t = Net().cuda(), GRID.cuda()
    options = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-4, "checkpoint": "step"}
    for _ in range(4):
        y0 = torch.randn(32, 16, device="cuda")
        expected = train(net, y0, t, precision, **options)
        found = train(net, y0, t, precision, **options, cuda_graph=True)
        # the rounding of 16 bits is measured once where steps are recorded, so that steps may differ by it
        allowed = 1e-4 if precision is None else 2e-2
        for mine, its in zip(found, expected, strict=True):
            assert (mine - its).norm() <= allowed * its.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_training_step_is_recorded_by_the_caller(precision):
    torch.manual_seed(0)
    nets, t, batch = [Net().cuda(), Net().cuda()], GRID.cuda(), torch.randn(32, 16, device="cuda")
    nets[1].load_state_dict(nets[0].state_dict())

    def training(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", precision, enabled=precision is not None, cache_enabled=False):
                solution = rampde.odeint(net, batch, t, method="rk4")
            solution[-1].square().mean().backward()
            optimizer.step()

        return step

    ordinary, own = training(nets[0]), training(nets[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            own()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        ordinary()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own()
    for _ in range(3):
        batch.copy_(torch.randn(32, 16))
        ordinary()
        graph.replay()
    for mine, its in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_recorded_is_named():
    net, y0, t = Net().cuda(), torch.randn(4, 16, device="cuda"), GRID.cuda()

    def func(t, y):
        return net(t, y) * y.sum().item()

    rampde.odeint(func, y0, t, method="rk4", cuda_graph=True)
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense.*y\.sum\(\)\.item\(\)"):
        rampde.odeint(func, y0, t, method="rk4", cuda_graph=True)
    # the device is as it was
    assert torch.isfinite(rampde.odeint(net, y0, t, method="rk4")).all()


def test_a_recorder_repeats_on_the_same_memory():
    source, target = torch.zeros(1000, device="cuda"), torch.empty(1000, device="cuda")

    def work() -> None:
        target.copy_(source * 2)

    repeat = recorded(CudaRecorder(source.device), work)
    source.fill_(3.0)
    repeat()
    assert torch.equal(target, torch.full_like(target, 6.0))


def launches(call) -> int:
    """Kernels that a call launches, from the profiler's record."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)


@pytest.mark.parametrize("leaves", [1, 2, 5])
def test_launches_of_a_step(leaves):
    """Four combinations beside the kernels of f, whatever the number of leaves."""
    rates = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(leaves)]).cuda()

    def func(t, y):
        return tuple(leaf * rate for leaf, rate in zip(y, rates, strict=True))

    y0 = tuple(torch.randn(4, 8, device="cuda") for _ in range(leaves))

    def solve(steps: int):
        t = torch.linspace(0, 1, steps + 1, device="cuda")
        return lambda: rampde.odeint(func, y0, t, method="rk4", checkpoint="none")

    with torch.no_grad():
        forward = (launches(solve(16)) - launches(solve(8))) / 8
    assert forward == 4 + 4 * leaves
