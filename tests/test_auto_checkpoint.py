"""checkpoint="auto": which policy it becomes, that it is chosen once, and what it costs."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from policies import Net, gradients, same_bits
from torch import nn

import rampde
from rampde import odeint
from rampde.checkpoint.auto import CHOICES, SavedBytes, choose, saved_bytes
from rampde.checkpoint.costs import Sizes
from rampde.free_memory import free_memory

T = torch.linspace(0, 1, 9)


def chosen(func, y0=None, budget=None, t=T, precision=None, **options):
    """The name of the policy that a solve used."""
    y0 = torch.randn(64, 5, requires_grad=True) if y0 is None else y0
    options = {"method": "rk4", **options}
    found, solve = gradients(func, y0, t, "auto", precision, memory_budget=budget, **options)
    assert all(bool(torch.isfinite(g).all()) for g in found)
    return solve.checkpoint


def test_it_is_the_default():
    net = Net()
    y0 = torch.randn(3, 5, requires_grad=True)
    with rampde.stats() as stats:
        y = odeint(net, y0, T, method="rk4")
    assert stats.solves[0].checkpoint == "none"
    assert net.evaluations == 32
    y.sum().backward()
    assert net.evaluations == 32


def test_everything_is_kept_where_it_fits():
    assert chosen(Net()) == "none"
    assert chosen(Net(), budget=1 << 30) == "none"


def test_less_is_kept_the_smaller_the_budget():
    """Always the fastest that fits; the bytes are those of this network, (5 + 16 + 16 + 5) x 64 x 4 a graph."""
    graph, state = 64 * 4 * (5 + 16 + 5), 64 * 4 * 5
    names = []
    for budget in (33 * graph, 4 * graph + 9 * state, graph + 12 * state, graph + 6 * state, 0):
        names.append(chosen(Net(), budget=budget))
    assert names[0] == "none"
    assert names[1] == "step"
    assert names[2] == "lean"
    assert names[3].endswith("lean")
    assert names[3] != "lean"
    assert names[4].endswith("lean")


def test_gradients_are_those_of_the_policy():
    net = Net()
    y0 = torch.randn(64, 5, requires_grad=True)
    for budget in (0, 10_000, 50_000, 1 << 30):
        found, solve = gradients(net, y0, T, "auto", parameters=[*net.parameters()], method="rk4", memory_budget=budget)
        expected, _ = gradients(net, y0, T, "step", parameters=[*net.parameters()], method="rk4")
        assert same_bits(found, expected), solve.checkpoint


def test_it_is_chosen_once(monkeypatch):
    """The choice costs one look at what the first evaluation saves, and nothing on later calls."""
    looks = []
    note = SavedBytes.note
    monkeypatch.setattr(SavedBytes, "note", lambda self, tensor: (looks.append(1), note(self, tensor)))
    net = Net()
    assert chosen(net) == "none"
    first = len(looks)
    assert first > 0
    evaluations = net.evaluations
    assert chosen(net) == "none"
    assert len(looks) == first
    assert net.evaluations == 2 * evaluations
    # another shape, number of steps or precision is another choice
    chosen(net, y0=torch.randn(3, 5, requires_grad=True))
    assert len(looks) == 2 * first
    chosen(net, t=torch.linspace(0, 1, 7))
    assert len(looks) == 3 * first
    chosen(net, precision=torch.bfloat16)
    assert len(looks) > 3 * first


def test_func_is_not_kept_alive():
    net = Net()
    chosen(net)
    assert net in CHOICES._of_func
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_func_that_cannot_be_remembered():
    class Slotted:
        __slots__ = ()

        def __call__(self, t, y):
            return -y

    assert chosen(Slotted()) == "none"


def test_not_more_evaluations_or_operators_than_the_policy_itself():
    net = Net()
    y0 = torch.randn(64, 5, requires_grad=True)
    gradients(net, y0, T, "auto", method="rk4")
    counts = []
    for policy in ("auto", "none"):
        calls = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gradients(net, y0, T, policy, method="rk4")
        calls = sorted((event.key, event.count) for event in profile.key_averages() if "::" in event.key)
        counts.append(calls)
    assert counts[0] == counts[1]


def test_callers_who_treat_saved_tensors_themselves_keep_little():
    net = Net()
    with torch.autograd.graph.save_on_cpu():
        assert chosen(net) == "step"
    # without them it is another matter, and with them again
    assert chosen(net) == "none"
    with torch.autograd.graph.save_on_cpu():
        assert chosen(net) == "step"


def test_casts_of_parameters_are_no_part_of_a_graph():
    """Autocast makes them once for all evaluations."""
    linear = nn.Linear(256, 256)
    x = torch.randn(2, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), saved_bytes() as saved:
        y = torch.tanh(linear(x))
    assert saved.beyond([*linear.parameters()]) <= 2 * 256 * (4 + 2 + 2)
    y.sum().backward()


class TestAdaptive:
    """The number of steps is not known: graphs are kept as long as they fit."""

    OPTIONS: ClassVar = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}

    def test_all_fit(self):
        net = Net()
        y0 = torch.randn(64, 5, requires_grad=True)
        t = torch.tensor([0.0, 3.0])
        assert chosen(net, y0, t=t, **self.OPTIONS) == "none"
        forward = net.evaluations
        chosen(net, y0, t=t, **self.OPTIONS)
        assert net.evaluations == 2 * forward

    @pytest.mark.parametrize("precision", [None, torch.float16])
    def test_some_fit(self, precision):
        net = Net()
        y0 = torch.randn(64, 5, requires_grad=True)
        t = torch.tensor([0.0, 1.1, 3.0])
        size = 64 * (16 + 5 + 5) * (4 if precision is None else 2)
        rtol = 1e-5 if precision is None else 1e-4
        found, solve = gradients(
            net, y0, t, "auto", precision, [*net.parameters()], memory_budget=14 * size, method="dopri5", rtol=rtol,
            atol=rtol,
        )  # fmt: skip
        steps = len(solve.step_sizes)
        assert steps > 2
        assert solve.checkpoint.startswith("none for ")
        kept = int(solve.checkpoint.split()[2])
        assert 0 < kept < steps
        # each of the others evaluates its six stages again, the one with an output a seventh
        assert 6 * (steps - kept) <= solve.evaluations_backward <= 6 * (steps - kept) + 2
        expected, _ = gradients(
            net, y0, t, "step", precision, [*net.parameters()], method="dopri5", rtol=rtol, atol=rtol
        )
        if precision is None:
            assert same_bits(found, expected)
        else:
            for one, other in zip(found, expected, strict=True):
                assert (one - other).norm() <= 2 * torch.finfo(precision).eps * other.norm() * steps

    def test_none_fits(self):
        assert chosen(Net(), budget=10, t=torch.tensor([0.0, 3.0]), **self.OPTIONS) == "step"

    def test_second_backward_pass(self):
        net = Net()
        y0 = torch.randn(64, 5, requires_grad=True)
        options = {**self.OPTIONS, "checkpoint": "auto", "memory_budget": 14 * 64 * 26 * 4}
        loss = odeint(net, y0, torch.tensor([0.0, 3.0]), **options).sum()
        first = torch.autograd.grad(loss, [y0, *net.parameters()], retain_graph=True)
        assert same_bits(first, torch.autograd.grad(loss, [y0, *net.parameters()]))
        with pytest.raises(RuntimeError, match=r"freed by an earlier backward pass|second time"):
            torch.autograd.grad(loss, [y0])

    def test_dropout(self):
        """Both parts see the random numbers of the way out."""
        dropout = nn.Dropout(0.3)
        net = Net()
        y0 = torch.randn(64, 5, requires_grad=True)
        t = torch.tensor([0.0, 1.0])
        options = {"first_step": 0.125, "max_step": 0.125, "min_step": 0.125}
        results = []
        for policy, budget in (("none", None), ("auto", 14 * 64 * 31 * 4)):
            torch.manual_seed(3)
            found, solve = gradients(
                lambda t, y: net(t, dropout(y)), y0, t, policy, parameters=[*net.parameters()], memory_budget=budget,
                rtol=1.0, atol=1.0, options=options,
            )  # fmt: skip
            results.append(found)
        assert solve.checkpoint.startswith("none for ")
        assert same_bits(*results)


def test_other_families():
    y0 = torch.randn(64, 5, requires_grad=True)
    assert chosen(Net(), y0, method="explicit_adams") == "none"
    assert chosen(Net(), y0, method="explicit_adams", budget=100) == "step"
    assert chosen(Net(), y0, method="implicit_midpoint") == "step"
    assert chosen(Net(), y0, method="dopri5", options={"batch_axis": 0}) == "step"


def test_nothing_is_chosen_where_no_gradient_is_wanted():
    net = Net()
    with torch.no_grad(), rampde.stats() as stats:
        odeint(net, torch.randn(3, 5), T, method="rk4")
    assert stats.solves[0].checkpoint == ""
    assert net not in CHOICES._of_func


def test_choice_by_work_then_by_memory():
    sizes = Sizes(steps=10, stages=4, graph=1000, rounded=10, state=20, elements=5)
    from rampde import Checkpoint

    policies = [Checkpoint(name) for name in ("none", "stage", "step", "lean")]
    assert choose(sizes, 40_000, policies).stages == "none"
    # as fast as "step", in less memory: 10 x 4 x 10 + 1000 against 10 x 10 + 4 x 1000
    assert choose(sizes, 39_999, policies).stages == "stage"
    assert choose(sizes, 1_399, policies).stages == "lean"
    assert choose(sizes, 10, policies).stages == "lean"


@pytest.mark.parametrize(
    ("budget", "checkpoint", "error", "message"),
    [
        (1.5, "auto", TypeError, "memory_budget is 1.5, expected a number of bytes or None"),
        (True, "auto", TypeError, "memory_budget is True"),
        (-1, "auto", ValueError, "memory_budget is -1, expected a number of bytes that is not negative"),
        (100, "step", ValueError, "memory_budget was given with checkpoint='step', expected it with \"auto\" alone"),
    ],
)
def test_bad_budget(budget, checkpoint, error, message):
    with pytest.raises(error, match=message):
        odeint(Net(), torch.randn(3, 5), T, method="rk4", checkpoint=checkpoint, memory_budget=budget)


def test_free_memory_is_some():
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50
