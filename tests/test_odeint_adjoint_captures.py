"""The continuous adjoint: gradients of all that f uses, wherever it comes from, or of the given parameters alone."""

import copy

import pytest
import torch
from adjoint_problems import BOUND, EVEN, RK4, Net, check, reference, relative, start
from torch import Tensor, nn

from rampde import odeint_adjoint

F64 = torch.float64


class TestCaptures:
    def test_closure_of_a_module(self) -> None:
        outside = torch.randn(4, dtype=F64, requires_grad=True)
        box = [[[[[[outside]]]]]]  # deeper than objects are searched: seen in the graph only

        class Closure(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) * box[0][0][0][0][0][0]

        net = Closure()
        check(net, [outside, *net.wanted])

    def test_result_of_a_computation_outside(self) -> None:
        encoder = nn.Linear(4, 4).double()

        class Conditional(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) + self.context

        net = Conditional()
        net.context = encoder(torch.randn(3, 4, dtype=F64))
        check(net, [net.context, encoder.weight, *net.wanted])

    @pytest.mark.parametrize("both", [False, True])
    def test_result_of_a_computation_from_a_parameter(self, both: bool) -> None:
        """Whether or not f uses the parameter besides, no path is counted twice."""

        class Hyper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p = nn.Parameter(torch.randn(4, dtype=F64))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return torch.tanh(y * self.scale) + (self.p if both else 0.0)

        net = Hyper()
        net.scale = net.p.exp()
        check(net, [net.p])

    def test_a_stale_result_in_a_module(self) -> None:
        class Recording(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                self.last = super().forward(t, y)
                return self.last

        net = Recording()
        net.last = net.w.square().sum()
        check(net, [*net.wanted])
        assert net.last.requires_grad

    def test_used_late(self) -> None:
        class Late(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) if t < 0.5 else super().forward(t, y) * self.late

        net = Late()
        net.late = torch.randn(4, dtype=F64, requires_grad=True)
        # the jump costs an error of the order of a step
        check(net, [net.late, *net.wanted], bound=3e-2)

    def test_used_late_and_nowhere_to_be_found(self) -> None:
        late = torch.randn(4, dtype=F64, requires_grad=True)
        box = [[[[[[late]]]]]]

        class Late(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) if t < 0.5 else super().forward(t, y) * box[0][0][0][0][0][0]

        y = odeint_adjoint(Late(), start(), EVEN, **RK4)
        with pytest.raises(RuntimeError, match=r"tensor of shape \[4\] that requires a gradient at t = 1"):
            y.sum().backward()

    def test_y0_is_captured(self) -> None:
        class Relaxing(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) - (y - self.y0)

        net, t, y0 = Relaxing(), EVEN, start()
        net.y0 = y0
        exact = torch.autograd.grad(reference(net, y0, t).square().sum(), y0)[0]
        found = torch.autograd.grad(odeint_adjoint(net, y0, t, **RK4).square().sum(), y0)[0]
        assert relative(found, exact) < 1e-6

    def test_given_parameters_only(self) -> None:
        net = Net()
        y = odeint_adjoint(net, start(), EVEN, adjoint_params=(p for p in [net.w, net.frozen, net.w]), **RK4)
        y.sum().backward()
        assert net.v.grad is None
        exact = Net()
        reference(exact, start(), EVEN).sum().backward()
        assert relative(net.w.grad, exact.w.grad) < 1e-6

    def test_given_parameters_behind_a_computation(self) -> None:
        w = torch.randn(4, 4, dtype=F64, requires_grad=True)
        computed = w.exp() / 8
        check(lambda t, y: torch.tanh(y @ computed), [w], adjoint_params=[w])
        check(lambda t, y: torch.tanh(y @ computed), [w], adjoint_params=[computed])

    def test_replica(self) -> None:
        """torch.nn.DataParallel: a replica has plain tensors as attributes, and no parameters."""
        net, expected = Net(), Net()
        replica = copy.copy(net)
        replica._parameters = {}
        replica._is_replica = True
        for name, parameter in net.named_parameters():
            object.__setattr__(replica, name, parameter * 1)
        assert not list(replica.parameters())
        odeint_adjoint(replica, start(), EVEN, **RK4).sum().backward()
        odeint_adjoint(expected, start(), EVEN, **RK4).sum().backward()
        for ours, theirs in zip(net.wanted, expected.wanted, strict=True):
            assert relative(ours.grad, theirs.grad) < BOUND

    def test_nothing_is_evaluated_for_it(self) -> None:
        net = Net()
        odeint_adjoint(net, start(), EVEN, method="rk4")
        assert net.evaluations == 16
