"""``cuda_graph=True``: recorded solves give what ordinary ones give, whatever changes between the calls.

A graph is emulated on the CPU: operators are recorded once, and executed again on the same tensors.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from emulated_graph import HostRead
from recorded import GRID, Emulated, Net, assert_same, gradients, losses, replays
from torch import Tensor, nn

import rampde
from rampde import graph_cache
from rampde.capture import RECORDERS

pytestmark = pytest.mark.usefixtures("emulated_recorders")

POLICIES = ["auto", "none", "step", "stage", "lean", 2, rampde.Binomial(2, "lean"), rampde.Fp8()]


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_call_gives_the_bits_of_an_ordinary_solve(policy, precision):
    torch.manual_seed(0)
    net = Net()
    for call in range(4):
        y0 = torch.randn(5, 3)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = gradients(net, y0, GRID, precision, checkpoint=policy)
        found = gradients(net, y0, GRID, precision, checkpoint=policy, cuda_graph=True)
        assert_same(found, expected)
        assert (replays() > 0) == (call > 0)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rk4_classic"},
        {"method": "euler", "compensated": True},
        {"options": {"step_size": 0.3}},
        {"options": {"step_size": 0.3, "interp": "cubic"}},
        {"options": {"perturb": True}},
    ],
    ids=repr,
)
def test_methods_and_options(options):
    torch.manual_seed(1)
    net, t = Net(), torch.tensor([0.0, 0.4, 1.0])
    for _ in range(3):
        y0 = torch.randn(4, 3)
        assert_same(gradients(net, y0, t, cuda_graph=True, **options), gradients(net, y0, t, **options))
    assert replays() > 0


def test_times_are_inputs_and_have_gradients():
    net, y0 = Net(), torch.randn(4, 3)
    for call in range(3):
        t = (GRID * (1 + 0.1 * call)).requires_grad_()
        assert_same(gradients(net, y0, t, cuda_graph=True), gradients(net, y0, t))


def test_pytree_state():
    net = Net()

    def func(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": net(t, y["x"]), "z": -y["z"] * y["x"].sum()}

    for _ in range(3):
        results = []
        y0 = {"x": torch.randn(4, 3), "z": torch.randn(2)}
        for graph in (False, True):
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in y0.items()}
            solution = rampde.odeint(func, leaves, GRID, method="rk4", cuda_graph=graph)
            loss = losses(solution["x"]) + losses(solution["z"])
            found = torch.autograd.grad(loss, [*leaves.values(), *net.parameters()])
            results.append([solution["x"].detach(), solution["z"].detach(), *found])
        assert_same(*results)


def test_without_gradients_there_is_one_replay_a_call():
    net = Net()
    for call in range(3):
        y0 = torch.randn(4, 3)
        with torch.no_grad():
            before = replays()
            found = rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True)
            assert replays() - before == (call > 0)
            assert torch.equal(found, rampde.odeint(net, y0, GRID, method="rk4"))


def test_a_training_step_is_two_replays_and_reads_nothing():
    net = Net()
    for _ in range(2):
        gradients(net, torch.randn(4, 3), GRID, cuda_graph=True)
    before = replays()
    gradients(net, torch.randn(4, 3), GRID, cuda_graph=True)
    assert replays() - before == 2


class TestWhatIsRecordedAnew:
    def test_another_shape(self):
        net = Net()
        for size in (4, 4, 7, 7, 4, 7):
            y0 = torch.randn(size, 3)
            assert_same(gradients(net, y0, GRID, cuda_graph=True), gradients(net, y0, GRID))
        assert graph_cache.CACHE.records() == 2

    def test_parameters_elsewhere(self):
        net, y0 = Net(), torch.randn(4, 3)
        for _ in range(4):
            net.last.weight = nn.Parameter(torch.randn(3, 8))
            assert_same(gradients(net, y0, GRID, cuda_graph=True), gradients(net, y0, GRID))

    def test_frozen_parameters(self):
        net, y0 = Net(), torch.randn(4, 3)
        for frozen in (False, False, True, True, False):
            net.first.requires_grad_(not frozen)
            kept = [parameter for parameter in net.parameters() if parameter.requires_grad]
            results = []
            for graph in (False, True):
                leaf = y0.clone().requires_grad_()
                solution = rampde.odeint(net, leaf, GRID, method="rk4", cuda_graph=graph)
                results.append(list(torch.autograd.grad(losses(solution), [leaf, *kept])))
            assert_same(*results)

    def test_training_and_evaluation(self):
        class Switched(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) if self.training else -y

        net, y0 = Switched(), torch.randn(4, 3)
        with torch.no_grad():
            for training in (True, True, False, False, True):
                net.train(training)
                found = rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True)
                assert torch.equal(found, rampde.odeint(net, y0, GRID, method="rk4"))

    def test_numbers_that_a_module_holds(self):
        class Stretched(Net):
            rate = 1.0

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return self.rate * super().forward(t, y)

        net, y0 = Stretched(), torch.randn(4, 3)
        for rate in (1.0, 1.0, 2.0, 2.0, 2.0, 0.5):
            net.rate = rate
            assert_same(gradients(net, y0, GRID, cuda_graph=True), gradients(net, y0, GRID))

    def test_but_not_for_a_counter(self):
        class Counting(Net):
            def __init__(self) -> None:
                super().__init__()
                self.evaluations = 0

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                self.evaluations += 1
                return super().forward(t, y)

        net = Counting()
        for _ in range(4):
            gradients(net, torch.randn(4, 3), GRID, cuda_graph=True)
        assert graph_cache.CACHE.records() == 1
        assert replays() >= 6

    def test_the_cache_is_bounded(self):
        nets = [Net() for _ in range(graph_cache.CACHE_SIZE + 3)]
        for net in nets:
            for _ in range(2):
                gradients(net, torch.randn(2, 3), GRID, cuda_graph=True)
        assert len(graph_cache.CACHE) == graph_cache.CACHE_SIZE

    def test_clearing_frees_the_func(self):
        net = Net()
        gone = weakref.ref(net)
        for _ in range(3):
            gradients(net, torch.randn(2, 3), GRID, cuda_graph=True)
        del net
        rampde.clear_cuda_graphs()
        gc.collect()
        assert gone() is None


class TestTensorsThatFHolds:
    def test_new_ones_in_every_call(self):
        """A conditioned flow: another context for every batch, held by the module or by a closure made anew."""
        net = Net()
        y0 = torch.randn(4, 3)
        for _ in range(4):
            weight = torch.randn(3, requires_grad=True)
            results = []
            for graph in (False, True):
                context = weight * 2

                def func(t: Tensor, y: Tensor, context: Tensor = context) -> Tensor:
                    return net(t, y) * context

                solution = rampde.odeint(func, y0, GRID, method="rk4", cuda_graph=graph)
                results.append([solution.detach(), *torch.autograd.grad(losses(solution), [weight, *net.parameters()])])
            assert_same(*results)
        assert graph_cache.CACHE.records() == 1

    def test_attributes(self):
        class Conditioned(Net):
            context: Tensor

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) + self.context

        net, y0 = Conditioned(), torch.randn(4, 3)
        for _ in range(4):
            net.context = torch.randn(4, 3)
            before = net.context.clone()
            assert_same(gradients(net, y0, GRID, cuda_graph=True), gradients(net, y0, GRID))
            assert torch.equal(net.context, before)
            net.context.mul_(2)
            assert_same(gradients(net, y0, GRID, cuda_graph=True), gradients(net, y0, GRID))
        assert graph_cache.CACHE.records() == 1

    def test_buffers_change_once_a_solve(self):
        class Normalised(Net):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3)

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, self.norm(y))

        torch.manual_seed(2)
        nets = [Normalised(), Normalised()]
        nets[1].load_state_dict(nets[0].state_dict())
        for _ in range(4):
            y0 = torch.randn(6, 3)
            results = [
                gradients(net, y0, GRID, cuda_graph=graph, checkpoint="step")
                for net, graph in zip(nets, (False, True), strict=True)
            ]
            assert_same(*results)
            assert_same([*nets[1].buffers()], [*nets[0].buffers()])


class TestSeveralAtOnce:
    def test_two_solves_of_one_module_in_one_loss(self):
        net = Net()
        for _ in range(3):
            y0 = torch.randn(4, 3)
            results = []
            for graph in (False, True):
                leaf = y0.clone().requires_grad_()
                middle = rampde.odeint(net, leaf, GRID, method="rk4", cuda_graph=graph)[-1]
                end = rampde.odeint(net, middle, GRID, method="rk4", cuda_graph=graph)
                results.append(list(torch.autograd.grad(losses(end), [leaf, *net.parameters()])))
            assert_same(*results)

    def test_backward_in_any_order(self):
        nets = [Net(), Net(), Net()]
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]):
            y0 = torch.randn(4, 3)
            solutions = [rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True) for net in nets]
            for place in order:
                found = torch.autograd.grad(losses(solutions[place]), [*nets[place].parameters()])
                expected = gradients(nets[place], y0, GRID)[2:]
                assert_same(list(found), expected)

    def test_one_after_the_other_share_their_memory(self):
        nets = [Net(), Net(), Net()]
        for _ in range(3):
            for net in nets:
                gradients(net, torch.randn(4, 3), GRID, cuda_graph=True)
        assert len(Emulated.instances) == 1
        assert graph_cache.CACHE.records() == 3

    def test_a_result_that_is_forgotten_frees_its_record(self):
        net, y0 = Net(), torch.randn(4, 3)
        for _ in range(5):
            rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True)
            gc.collect()
        assert graph_cache.CACHE.records() == 1

    def test_threads(self):
        net = Net()
        starts = [torch.randn(4, 3) for _ in range(4)]
        expected = [rampde.odeint(net, y0, GRID, method="rk4").detach() for y0 in starts]
        with torch.no_grad():
            for _ in range(2):
                rampde.odeint(net, starts[0], GRID, method="rk4", cuda_graph=True)
        found: dict[int, Tensor] = {}

        def solve(place: int) -> None:
            with torch.no_grad():
                found[place] = rampde.odeint(net, starts[place], GRID, method="rk4", cuda_graph=True)

        threads = [threading.Thread(target=solve, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_same([found[place] for place in range(4)], expected)


class TestBackward:
    def solution(self, net: Net, y0: Tensor) -> Tensor:
        for _ in range(2):
            solution = rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True)
        return solution

    def test_gradients_accumulate(self):
        net, other = Net(), Net()
        other.load_state_dict(net.state_dict())
        for _ in range(3):
            y0 = torch.randn(4, 3)
            losses(rampde.odeint(net, y0, GRID, method="rk4", cuda_graph=True)).backward()
            losses(rampde.odeint(other, y0, GRID, method="rk4")).backward()
        for mine, its in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine.grad, its.grad)

    def test_twice(self):
        net, y0 = Net(), torch.randn(4, 3)
        loss = losses(self.solution(net, y0))
        first = torch.autograd.grad(loss, [*net.parameters()], retain_graph=True)
        rampde.odeint(net, torch.randn(4, 3), GRID, method="rk4", cuda_graph=True)
        assert_same(list(torch.autograd.grad(loss, [*net.parameters()])), list(first))
        with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
            torch.autograd.grad(loss, [*net.parameters()])

    def test_second_derivatives(self):
        net, y0 = Net().double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        results = []
        for graph in (False, True, True):
            solution = rampde.odeint(net, y0, GRID.double(), method="rk4", cuda_graph=graph)
            (gradient,) = torch.autograd.grad(losses(solution), [y0], create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum(), [*net.parameters()], allow_unused=True))
        for mine, its in zip(results[2], results[0], strict=True):
            assert mine is its is None or torch.allclose(mine, its)

    def test_parameters_that_change_before_it(self):
        net, y0 = Net(), torch.randn(4, 3)
        loss = losses(self.solution(net, y0))
        with torch.no_grad():
            net.last.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Steep(torch.autograd.Function):
    """The identity, with a derivative of 2^9."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2.0**9


class TestScaling:
    def replays_of_a_recorded_call(self, net: nn.Module, y0: Tensor) -> tuple[list[Tensor], int]:
        gradients(net, y0, GRID, torch.float16, method="euler", cuda_graph=True)
        before = replays()
        return gradients(net, y0, GRID, torch.float16, method="euler", cuda_graph=True), replays() - before

    def test_a_scale_that_is_too_large_is_lowered(self):
        """The product inside f overflows at the scale that the adjoint alone suggests."""

        class SteepNet(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return Steep.apply(super().forward(t, y))

        net, y0 = SteepNet(), torch.randn(4, 3)
        exact = gradients(copy.deepcopy(net).double(), y0.double(), GRID.double(), method="euler")
        eager = gradients(net, y0, GRID, torch.float16, method="euler")
        found, count = self.replays_of_a_recorded_call(net, y0)
        assert count > self.replays_of_a_recorded_call(Net(), y0)[1]
        for mine, its, truth in zip(found, eager, exact, strict=True):
            assert (mine - truth).norm() <= 2 * (its - truth).norm()

    def test_no_scale_serves(self):
        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx, gradient: Tensor) -> Tensor:
                return gradient * float("nan")

        class Net16(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return Broken.apply(super().forward(t, y))

        net = Net16()
        with pytest.warns(RuntimeWarning, match="not finite at any"):
            gradients(net, torch.randn(4, 3), GRID, torch.float16, cuda_graph=True)
        found = gradients(net, torch.randn(4, 3), GRID, torch.float16, cuda_graph=True)
        assert all(not torch.isfinite(gradient).any() for gradient in found[1:])


class TestErrors:
    def test_what_reads_the_device_is_named(self):
        net = Net()

        def func(t: Tensor, y: Tensor) -> Tensor:
            return net(t, y) * y.sum().item()

        y0 = torch.randn(4, 3)
        rampde.odeint(func, y0, GRID, method="rk4", cuda_graph=True)
        with pytest.raises(RuntimeError, match=r"aten::_local_scalar_dense.*y\.sum\(\)\.item\(\)") as caught:
            rampde.odeint(func, y0, GRID, method="rk4", cuda_graph=True)
        assert isinstance(caught.value.__cause__, HostRead)

    def test_random_numbers(self):
        class Dropped(Net):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(t, y), 0.5)

        with pytest.raises(RuntimeError, match='checkpoint="none"'):
            gradients(Dropped(), torch.randn(4, 3), GRID, cuda_graph=True, checkpoint="step")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "radauIIA5"}, "expected an explicit Runge-Kutta method"),
            ({"checkpoint": "tape"}, "needs the host"),
            ({"checkpoint": rampde.Offload()}, "needs the host"),
            ({"progress": True}, "need the host in every step"),
            ({"cuda_graph": 1}, "cuda_graph is 1"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises((TypeError, ValueError), match=message):
            rampde.odeint(Net(), torch.randn(4, 3), GRID, **{"method": "rk4", "cuda_graph": True, **arguments})

    def test_sharded_parameters(self, monkeypatch):
        monkeypatch.setattr(graph_cache, "any_sharded", lambda modules: True)
        with pytest.raises(ValueError, match="sharded by FSDP, which moves its parameters"):
            rampde.odeint(Net(), torch.randn(4, 3), GRID, method="rk4", cuda_graph=True)

    def test_device(self, monkeypatch):
        monkeypatch.delitem(RECORDERS, "cpu")
        with pytest.raises(ValueError, match="y0 is on cpu, expected y0 on a CUDA device"):
            rampde.odeint(Net(), torch.randn(4, 3), GRID, method="rk4", cuda_graph=True)
