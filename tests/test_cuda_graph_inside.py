"""CUDA graphs of adaptive steps, and solves inside of a graph that the caller records; both emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from emulated_graph import EmulatedGraph
from recorded import GRID, Emulated, Net, assert_same, gradients, losses, replays
from torch import Tensor, nn

import rampde
from rampde import graph_cache
from rampde.capture import RECORDING
from rampde.grid import remember_times

pytestmark = pytest.mark.usefixtures("emulated_recorders")

ADAPTIVE = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-5}


class TestAdaptive:
    @pytest.mark.parametrize("policy", ["auto", "step"])
    def test_every_call_takes_the_same_steps_as_an_ordinary_solve(self, policy):
        torch.manual_seed(3)
        net = Net()
        for call in range(4):
            y0, t = torch.randn(5, 3), GRID * (1 + 0.3 * call)
            with torch.no_grad():
                net.last.weight.mul_(1.5)
            expected = gradients(net, y0, t, **ADAPTIVE, checkpoint="step")
            found = gradients(net, y0, t, **ADAPTIVE, checkpoint=policy, cuda_graph=True)
            for mine, its in zip(found, expected, strict=True):
                # the device and the host round the sizes of the steps in their own ways
                torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
            assert (replays() > 0) == (call > 0)
        assert graph_cache.CACHE.records() == 1

    def test_without_gradients(self):
        net = Net()
        with torch.no_grad():
            for _ in range(3):
                y0 = torch.randn(5, 3)
                found = rampde.odeint(net, y0, GRID, cuda_graph=True, **ADAPTIVE)
                torch.testing.assert_close(found, rampde.odeint(net, y0, GRID, **ADAPTIVE), rtol=1e-5, atol=1e-6)
        assert replays() > 0

    def test_new_tensors_in_every_call(self):
        net = Net()
        for _ in range(4):
            context = torch.randn(3)

            def func(t: Tensor, y: Tensor, context: Tensor = context) -> Tensor:
                return net(t, y) * context

            y0 = torch.randn(4, 3)
            with torch.no_grad():
                found = rampde.odeint(func, y0, GRID, cuda_graph=True, **ADAPTIVE)
                torch.testing.assert_close(found, rampde.odeint(func, y0, GRID, **ADAPTIVE), rtol=1e-5, atol=1e-6)
        assert graph_cache.CACHE.records() == 1

    def test_what_the_device_cannot_decide(self):
        with pytest.raises(ValueError, match="cannot be decided on the device"):
            rampde.odeint(Net(), torch.randn(4, 3), GRID, cuda_graph=True, options={"step_t": [0.5]})


class TestInsideOfARecording:
    """A whole training step is recorded by the caller: the solve, the loss, the sweep, the optimizer."""

    @pytest.fixture(autouse=True)
    def recording(self, monkeypatch):
        self.active = False
        monkeypatch.setitem(RECORDING, "cpu", lambda: self.active)
        # times on the host can be read in every recording but an emulated one
        remember_times(GRID, GRID.tolist())

    def record(self, work) -> Callable[[], None]:
        self.active = True
        try:
            return EmulatedGraph().record(work)
        finally:
            self.active = False

    @pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("policy", ["auto", "none", "step"])
    def test_training(self, policy, precision):
        torch.manual_seed(4)
        nets = [Net(), Net()]
        nets[1].load_state_dict(nets[0].state_dict())
        batch = torch.randn(5, 3)

        def train(net: nn.Module) -> Callable[[], None]:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cpu", precision, enabled=precision is not None, cache_enabled=False):
                    solution = rampde.odeint(net, batch, GRID, method="rk4", checkpoint=policy)
                losses(solution).backward()
                optimizer.step()

            return step

        ordinary, recorded = train(nets[0]), train(nets[1])
        for step in (ordinary, recorded):
            # momentum buffers exist before the recording
            step()
        replay = self.record(recorded)
        for _ in range(3):
            batch.copy_(torch.randn(5, 3))
            ordinary()
            replay()
        assert_same([*nets[1].parameters()], [*nets[0].parameters()])

    def test_an_overflow_shows_on_the_device(self):
        class Steep(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x: Tensor, gain: Tensor) -> Tensor:
                ctx.save_for_backward(gain)
                return x.clone()

            @staticmethod
            def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
                (gain,) = ctx.saved_tensors
                return gradient * gain, None

        net, gain = Net(), torch.ones((), dtype=torch.float16)
        scaler = rampde.DynamicScaler()
        batch = torch.randn(5, 3)
        parameters = [*net.parameters()]
        found: list[Tensor] = []

        def step() -> None:
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                solution = rampde.odeint(
                    lambda t, y: Steep.apply(net(t, y), gain), batch, GRID, method="euler", loss_scaler=scaler
                )
            found[:] = torch.autograd.grad(losses(solution), parameters)

        step()
        replay = self.record(step)
        replay()
        assert not scaler.overflowed
        assert all(torch.isfinite(gradient).all() for gradient in found)
        gain.fill_(2.0**9)
        replay()
        assert scaler.overflowed
        assert all(torch.isposinf(gradient).all() for gradient in found)
        # each overflow leaves less headroom to the next sweep, until the product fits
        for _ in range(20):
            replay()
        assert not scaler.overflowed
        assert all(torch.isfinite(gradient).all() for gradient in found)

    def test_random_numbers(self):
        class Dropped(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(t, y), 0.5)

        net, y0 = Dropped(), torch.randn(4, 3)
        with pytest.raises(RuntimeError, match="draws random numbers"):
            self.record(lambda: rampde.odeint(net, y0, GRID, method="rk4", checkpoint="step"))
        self.record(lambda: rampde.odeint(net, y0, GRID, method="rk4"))

    def test_steps_that_the_host_decides(self):
        for arguments in ({"method": "dopri5"}, {"method": "dopri5", "cuda_graph": True}, {"method": "radauIIA5"}):
            work = partial(rampde.odeint, Net(), torch.randn(4, 3), GRID, **arguments)
            with pytest.raises(RuntimeError, match="looks at the device on the way"):
                self.record(work)

    def test_cuda_graph_is_no_graph_in_the_graph(self):
        net, y0 = Net(), torch.randn(4, 3)
        results = []

        def step() -> None:
            results[:] = [rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True)]

        self.record(step)()
        assert torch.equal(results[0], rampde.odeint(net, y0, GRID, method="rk4"))
        assert not Emulated.instances
