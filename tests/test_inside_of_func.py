"""What people put into f works under every checkpoint policy, to the bit of the run that keeps all graphs."""

import copy

import pytest
import torch
from policies import ALL, AS_NONE, Net, gradients, policies, same_bits
from torch import nn

from rampde import odeint

TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}


class TestInsideOfFunc:
    class Block(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
            self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 5)
            self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.4)
            self.instance_norm = nn.InstanceNorm1d(4, track_running_stats=True)

        def inner(self, h):
            return torch.tanh(self.second(torch.tanh(h)))

        def forward(self, t, y):
            h = self.first(y)
            if self.kind == "batch norm":
                h = self.norm(h)
            if self.kind == "instance norm":
                h = self.instance_norm(h.view(-1, 4, 4)).flatten(1)
            if self.kind == "dropout":
                h = self.dropout(h)
            if self.kind == "checkpoint":
                return torch.utils.checkpoint.checkpoint(self.inner, h, use_reentrant=False)
            if self.kind == "checkpoint and dropout":
                dropped = torch.utils.checkpoint.checkpoint(self.dropout, h, use_reentrant=False)
                return torch.utils.checkpoint.checkpoint(self.inner, dropped, use_reentrant=False)
            if self.kind == "save on cpu":
                with torch.autograd.graph.save_on_cpu():
                    return self.inner(h)
            return self.inner(h)

    KINDS = ("batch norm", "instance norm", "dropout", "checkpoint", "checkpoint and dropout", "save on cpu")

    def run(self, block, policy, method, precision=None):
        block = copy.deepcopy(block)
        torch.manual_seed(7)
        y0 = torch.randn(8, 5, requires_grad=True)
        t = torch.linspace(0, 1, 5)
        options = {"method": method, "rtol": 1e-2, "atol": 1e-2, "precision": precision}
        parameters = [p for p in block.parameters() if p.requires_grad]
        used = [p for name, p in block.named_parameters() if name.split(".")[0] in ("first", "second")]
        used += [*block.norm.parameters()] if block.kind == "batch norm" else []
        assert parameters
        found, _ = gradients(block, y0, t, policy, parameters=used, **options)
        return found, dict(block.named_buffers()), torch.get_rng_state()

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @pytest.mark.parametrize("kind", KINDS)
    @policies({**ALL, "auto": "auto"})
    def test_training(self, policy, kind, method):
        block = self.Block(kind)
        expected, buffers, random = self.run(block, "none", method)
        found, own_buffers, own_random = self.run(block, policy, method)
        assert same_bits(found, expected)
        assert torch.equal(random, own_random)
        for name, buffer in buffers.items():
            assert torch.equal(own_buffers[name], buffer), name
        if kind == "batch norm" and method == "rk4":
            assert buffers["norm.num_batches_tracked"] == 16

    @pytest.mark.parametrize("kind", ["batch norm", "dropout"])
    @policies(ALL)
    def test_evaluation(self, policy, kind):
        block = self.Block(kind).eval()
        with torch.no_grad():
            block.norm.running_mean.uniform_()
        expected, buffers, _ = self.run(block, "none", "rk4")
        found, own_buffers, _ = self.run(block, policy, "rk4")
        assert same_bits(found, expected)
        for name, buffer in buffers.items():
            assert torch.equal(own_buffers[name], buffer)

    def test_buffers_are_unchanged_for_autograd(self):
        """A buffer that is restored may be saved in a graph outside of the solve."""
        block = self.Block("batch norm")
        y0 = torch.randn(8, 5, requires_grad=True)
        y = odeint(block, y0, torch.linspace(0, 1, 3), method="rk4", checkpoint="step")
        factor = torch.ones(16, requires_grad=True)
        outside = (factor * block.norm.running_mean).sum()
        y.sum().backward()
        outside.backward()
        assert torch.equal(factor.grad, block.norm.running_mean)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @policies({**ALL, "auto": "auto", "step": "step", "none": "none"})
    def test_hooks_around_the_solve(self, policy, method):
        """What autograd saves for the solve is packed as the user says, and no gradient is lost by that."""
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.linspace(0, 1, 5)
        expected, _ = gradients(net, y0, t, policy, parameters=[*net.parameters()], method=method, **TOLERANCES)
        with torch.autograd.graph.save_on_cpu():
            found, _ = gradients(net, y0, t, policy, parameters=[*net.parameters()], method=method, **TOLERANCES)
        assert same_bits(found, expected)

    def test_reentrant_checkpoint_goes_to_the_tape(self):
        """It refuses products with respect to chosen tensors, which the sweep consists of."""
        linear = nn.Linear(5, 5)

        def func(t, y):
            return torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(linear(y)), y, use_reentrant=True)

        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.linspace(0, 1, 4)
        with pytest.warns(UserWarning, match='use_reentrant=True.*falls back to checkpoint="tape"'):
            y = odeint(func, y0, t, method="rk4")
        y.sum().backward()
        found = linear.weight.grad
        linear.zero_grad()
        odeint(lambda t, y: torch.tanh(linear(y)), y0, t, method="rk4", checkpoint="tape").sum().backward()
        assert torch.equal(found, linear.weight.grad)

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
    @policies(ALL)
    def test_compiled(self, policy, precision):
        torch.compiler.reset()
        net = Net()
        compiled = torch.compile(net.layers)
        y0 = torch.randn(3, 5, requires_grad=True)
        reference = "none" if policy in AS_NONE.values() else "step"
        options = {"parameters": [*net.parameters()], "method": "rk4"}
        results = []
        for chosen in (policy, reference):
            t = torch.linspace(0, 1, 5)
            results.append(gradients(lambda t, y: compiled(y), y0, t, chosen, precision, **options)[0])
        if reference == "step":
            assert same_bits(*results)
            return
        # without a graph, and at another time, other code is compiled, which rounds in another way
        unit = torch.finfo(precision or torch.float32).eps
        for one, other in zip(*results, strict=True):
            assert (one - other).norm() <= 8 * unit * other.norm()

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @pytest.mark.parametrize("policy", ["none", "auto"])
    def test_compiled_and_scaled(self, policy, method):
        """A sweep under scaling may need its graphs twice, which compiled ones do not permit."""
        torch.compiler.reset()
        net = Net()
        compiled = torch.compile(net.layers)
        y0 = torch.randn(3, 5, requires_grad=True)
        options = {"method": method, "rtol": 1e-2, "atol": 1e-2}
        found, solve = gradients(
            lambda t, y: compiled(y), y0, torch.linspace(0, 1, 5), policy, torch.float16, [*net.parameters()], **options
        )
        assert solve.checkpoint == "stage"
        assert all(bool(torch.isfinite(g).all()) for g in found)
