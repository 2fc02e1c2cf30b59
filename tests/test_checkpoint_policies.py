"""Checkpoint policies: bits of the gradients, evaluations of f, graphs alive, whatever f and the state are."""

import pytest
import torch
from policies import ALL, Net, check_bits, gradients, policies, same_bits
from torch import nn

import rampde
from rampde import Binomial, Fp8, Offload, odeint
from rampde.checkpoint.binomial import recomputed_steps
from rampde.methods import METHODS, get_method
from rampde.tableau import ButcherTableau, EmbeddedTableau

FIXED = [n for n in METHODS if isinstance(m := get_method(n), ButcherTableau) and not isinstance(m, EmbeddedTableau)]
ADAPTIVE = [name for name in METHODS if isinstance(get_method(name), EmbeddedTableau)]
TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}


class TestBits:
    @pytest.mark.parametrize("method", FIXED)
    @policies(ALL)
    def test_fixed_steps_in_float32(self, policy, method):
        """In one precision there is one answer."""
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        for reference in ("step", "none"):
            check_bits(policy, net, y0, torch.linspace(0, 1, 9), [*net.parameters()], reference, method=method)

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    @policies(ALL)
    def test_fixed_steps_in_16_bits(self, policy, precision):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        check_bits(policy, net, y0, torch.linspace(0, 1, 9), [*net.parameters()], method="rk4", precision=precision)

    @pytest.mark.parametrize("method", ADAPTIVE)
    @policies(ALL)
    def test_adaptive_steps_in_float32(self, policy, method):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.tensor([0.0, 0.3, 2.0])
        for reference in ("step", "none"):
            check_bits(policy, net, y0, t, [*net.parameters()], reference, method=method, **TOLERANCES)

    @pytest.mark.parametrize("method", ["dopri5", "bosh3"])
    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    @policies(ALL)
    def test_adaptive_steps_in_16_bits(self, policy, precision, method):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.tensor([0.0, 0.3, 2.0])
        check_bits(policy, net, y0, t, [*net.parameters()], method=method, precision=precision, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
    @pytest.mark.parametrize("precision", [None, torch.bfloat16])
    @policies(ALL)
    def test_compensated_sums(self, policy, precision, method):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        options = {"method": method, "compensated": True, "precision": precision, **TOLERANCES}
        check_bits(policy, net, y0, torch.tensor([0.0, 0.2, 0.4, 0.8, 2.0]), [*net.parameters()], **options)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @policies(ALL)
    def test_gradient_of_times_in_float64(self, policy, method):
        net = Net(torch.float64)
        y0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        for reference in ("step", "none"):
            check_bits(policy, net, y0, t, [*net.parameters()], reference, method=method, **TOLERANCES)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @policies(ALL)
    def test_nested_and_complex_states(self, policy, method):
        matrix = (0.3 * torch.randn(4, 4)).requires_grad_()
        y0 = {
            "real": torch.randn(2, 4, requires_grad=True),
            "complex": torch.randn(2, 4, dtype=torch.complex64, requires_grad=True),
            "unused": torch.randn(3),
        }

        def func(t, y):
            mixed = y["real"] @ matrix
            return {"real": torch.tanh(mixed), "complex": 1j * y["complex"] * t + mixed, "unused": torch.ones(3)}

        def loss(y):
            return y["real"].square().sum() + y["complex"].abs().square().sum() + y["unused"].sum()

        t = torch.linspace(0, 1, 5)
        for reference in ("step", "none"):
            check_bits(policy, func, y0, t, [matrix], reference, method=method, loss=loss, **TOLERANCES)

    @policies(ALL)
    def test_outputs_at_some_steps_and_reverse_time(self, policy):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.tensor([2.0, 1.1, 0.0])
        check_bits(policy, net, y0, t, [*net.parameters()], method="rk4", options={"step_size": 0.25})

    @policies(ALL)
    def test_jumps_and_step_times(self, policy):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        options = {"jump_t": [0.4, 1.1], "step_t": [0.7]}
        check_bits(policy, net, y0, torch.tensor([0.0, 2.0]), [*net.parameters()], options=options, **TOLERANCES)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @policies(ALL)
    def test_until_an_event(self, policy, method):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)

        def event_fn(t, y):
            return 0.9 - t

        options = {"options": {"step_size": 0.125}} if method == "rk4" else {}

        def loss(result):
            return result[1].square().sum()

        check_bits(
            policy, net, y0, torch.tensor([0.0, 1.0]), [*net.parameters()], method=method, event_fn=event_fn,
            loss=loss, **TOLERANCES, **options,
        )  # fmt: skip

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @policies(ALL)
    def test_channels_last(self, policy, method):
        convolution = nn.Conv2d(4, 4, 3, padding=1)
        y0 = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        t = torch.linspace(0, 1, 4)
        parameters = [*convolution.parameters()]
        check_bits(policy, lambda t, y: torch.tanh(convolution(y)), y0, t, parameters, method=method, **TOLERANCES)

    @pytest.mark.parametrize("policy", [3, Offload("step"), "stage", "lean", Offload("none")])
    def test_solve_that_is_resumed_after_an_overflow(self, policy):
        """The sweep goes back to the step that overflowed, and gives what "step" gives."""
        weight = torch.diag(torch.linspace(50.0, 400.0, 4)).requires_grad_()
        y0 = torch.full((2, 4), 1e-3, requires_grad=True)
        t = torch.linspace(0, 0.004, 8)

        def grad(checkpoint):
            scaler = rampde.DynamicScaler(target_factor=64.0)
            found = gradients(
                lambda t, y: y @ weight, y0, t, checkpoint, torch.float16, [weight], method="rk4", loss_scaler=scaler
            )[0]
            assert any(kind == "overflow" for kind, _ in scaler.scale_history)
            return found

        expected = grad("none" if policy in ("stage",) or getattr(policy, "stages", "") == "none" else "step")
        assert all(bool(torch.isfinite(g).all()) for g in expected)
        assert same_bits(grad(policy), expected)

    @policies(ALL)
    def test_two_backward_passes(self, policy):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        loss = odeint(net, y0, torch.linspace(0, 1, 9), method="rk4", checkpoint=policy).square().sum()
        first = torch.autograd.grad(loss, [y0, *net.parameters()], retain_graph=True)
        second = torch.autograd.grad(loss, [y0, *net.parameters()], retain_graph=True)
        third = torch.autograd.grad(loss, [y0, *net.parameters()])
        assert same_bits(first, second)
        assert same_bits(first, third)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(loss, [y0])

    @policies(ALL)
    def test_second_derivatives(self, policy):
        net = Net(torch.float64, size=2)
        y0 = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
        t = torch.linspace(0, 1, 4, dtype=torch.float64)

        def solve(y0):
            return odeint(net, y0, t, method="rk4", checkpoint=policy)

        assert torch.autograd.gradgradcheck(solve, (y0,))

    @policies(ALL)
    def test_result_may_be_changed_in_place(self, policy):
        """What is kept is not the result that the user holds."""
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.linspace(0, 1, 9)
        expected, _ = gradients(net, y0, t, policy, method="rk4", loss=lambda y: (y * 2).sum())
        found, _ = gradients(net, y0, t, policy, method="rk4", loss=lambda y: y.mul_(2).sum())
        assert same_bits(found, expected)

    @policies(ALL)
    def test_no_gradients_wanted(self, policy):
        net = Net()
        y0 = torch.randn(3, 5)
        with torch.no_grad():
            expected = odeint(net, y0, torch.linspace(0, 1, 9), method="rk4")
            assert torch.equal(odeint(net, y0, torch.linspace(0, 1, 9), method="rk4", checkpoint=policy), expected)
        with torch.inference_mode():
            odeint(net, y0, torch.linspace(0, 1, 9), method="rk4", checkpoint=policy)


def stages_of(method):
    """How many stages are swept, and up to which one a step needs them."""
    tableau = get_method(method)
    tableau = tableau.closed if isinstance(tableau, EmbeddedTableau) else tableau
    return tableau.cotangents[0].stage + 1, tableau.update.stages[-1] + 1


class TestEvaluations:
    """As many evaluations of f as the table in the documentation of Checkpoint says."""

    STEPS = 7

    def count(self, method, policy):
        net = Net()
        y0 = torch.randn(2, 5, requires_grad=True)
        options = {}
        t = torch.linspace(0, 1, self.STEPS + 1)
        if method in ADAPTIVE:
            # equal steps, which end on the outputs
            size = 0.125
            options = {"first_step": size, "max_step": size, "min_step": size, "step_t": [size * self.STEPS]}
            t = torch.tensor([0.0, size * self.STEPS])
        with rampde.stats() as stats:
            y = odeint(net, y0, t, method=method, checkpoint=policy, options=options, rtol=1.0, atol=1.0)
        before = net.evaluations
        y[-1].sum().backward()
        (solve,) = stats.solves
        assert solve.evaluations_forward == before
        assert solve.evaluations_backward == net.evaluations - before
        assert len(solve.step_sizes) == self.STEPS
        return net.evaluations - before, solve.steps_again

    @pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
    def test_every_step(self, method):
        stages, _ = stages_of(method)
        assert self.count(method, "none") == (0, 0)
        assert self.count(method, "tape") == (0, 0)
        assert self.count(method, "step") == (self.STEPS * stages, 0)
        assert self.count(method, "stage") == (self.STEPS * stages, 0)
        assert self.count(method, "lean") == (self.STEPS * (2 * stages - 1), 0)
        assert self.count(method, Offload("lean")) == (self.STEPS * (2 * stages - 1), 0)

    @pytest.mark.parametrize("states", [1, 2, 3, 7, 9])
    @pytest.mark.parametrize("method", FIXED)
    def test_binomial(self, method, states):
        stages, needed = stages_of(method)
        again = recomputed_steps(self.STEPS, states)
        assert self.count(method, states) == (self.STEPS * stages + again * needed, again)
        lean = self.STEPS * (2 * stages - 1) + again * needed
        assert self.count(method, Binomial(states, "lean")) == (lean, again)

    @pytest.mark.parametrize("states", [1, 2, 3, 7, 9])
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_online(self, method, states):
        stages, needed = stages_of(method)
        found, again = self.count(method, states)
        assert found == self.STEPS * stages + again * needed
        # with as many states as steps nothing is taken again; with one, no less than the optimum can be
        assert (again == 0) == (states >= self.STEPS)
        assert again >= recomputed_steps(self.STEPS, states)

    @pytest.mark.parametrize("policy", ["none", "step", "stage", "lean", 2, Offload("none"), Fp8()])
    def test_forward_evaluations_are_those_of_the_method(self, policy):
        net = Net()
        odeint(net, torch.randn(2, 5, requires_grad=True), torch.linspace(0, 1, 8), method="rk4", checkpoint=policy)
        assert net.evaluations == 28


class Token:
    """Lives as long as the graph that holds it; counts how many do."""

    alive = peak = 0

    def __init__(self):
        Token.alive += 1
        Token.peak = max(Token.peak, Token.alive)

    def __del__(self):
        Token.alive -= 1


class Tracked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.token = Token()
        return -y

    @staticmethod
    def backward(ctx, grad):
        return -grad


@pytest.mark.parametrize(
    ("policy", "alive"),
    [
        ("none", 40),
        ("step", 4),
        ("stage", 1),
        ("lean", 1),
        (3, 4),
        (Binomial(3, "lean"), 1),
        (Offload("none"), 40),
        (Offload("step"), 4),
        (Offload("stage"), 1),
        (Fp8(), 4),
        (Fp8("lean"), 1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("retain", [False, True])
def test_graphs_alive_at_once(policy, alive, leaves, retain):
    y0 = tuple(torch.randn(3, requires_grad=True) for _ in range(leaves))

    def func(t, y):
        return Tracked.apply(y) if leaves == 1 else (Tracked.apply(y[0]), y[1])

    Token.alive = Token.peak = 0
    y = odeint(func, y0[0] if leaves == 1 else y0, torch.linspace(0, 1, 11), method="rk4", checkpoint=policy)
    forward_peak, kept = Token.peak, Token.alive
    assert kept == (40 if "none" in (policy, getattr(policy, "stages", "")) else 0)
    loss = y.sum() if leaves == 1 else y[0].sum()
    loss.backward(retain_graph=retain)
    assert max(forward_peak, Token.peak) == alive
    del y, loss
    assert Token.alive == 0


def test_graph_of_a_swept_step_is_freed_with_none():
    """Whose memory is what "none" takes: it shrinks while the sweep goes on."""
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.token = Token()
            return -y

        @staticmethod
        def backward(ctx, grad):
            alive.append(Token.alive)
            return -grad

    Token.alive = 0
    y0 = torch.randn(3, requires_grad=True)
    y = odeint(lambda t, y: Watched.apply(y), y0, torch.linspace(0, 1, 6), method="euler", checkpoint="none")
    y.sum().backward()
    assert alive == [5, 4, 3, 2, 1]


class TestOtherFamilies:
    @pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "implicit_midpoint", "gl4", "trbdf2"])
    @pytest.mark.parametrize(
        "policy",
        ["none", "stage", "step", "lean", "auto", Offload("step"), Offload("stage"), Offload("none")],
        ids=repr,
    )
    def test_policies_that_keep_every_step(self, policy, method):
        net = Net(torch.float64)
        y0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        check_bits(policy, net, y0, t, [*net.parameters()], "step", method=method)

    @pytest.mark.parametrize("method", ["explicit_adams", "gl4"])
    @pytest.mark.parametrize("policy", [3, Binomial(2, "lean"), Fp8(), Offload(2)], ids=repr)
    def test_others_are_refused(self, policy, method):
        with pytest.raises(ValueError, match=f'with which method "{method}" cannot be differentiated'):
            odeint(Net(), torch.randn(3, 5), torch.linspace(0, 1, 9), method=method, checkpoint=policy)

    @pytest.mark.parametrize("policy", ["step", "auto", Offload("step")], ids=repr)
    def test_steps_for_each_sample(self, policy):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        options = {"batch_axis": 0}
        check_bits(policy, net, y0, torch.linspace(0, 1, 3), [*net.parameters()], options=options, **TOLERANCES)

    @pytest.mark.parametrize("policy", ["none", "stage", "lean", 3, Fp8()], ids=repr)
    def test_steps_for_each_sample_refuse(self, policy):
        options = {"batch_axis": 0}
        with pytest.raises(ValueError, match=r"batch_axis.*was given with checkpoint"):
            odeint(Net(), torch.randn(3, 5), torch.linspace(0, 1, 3), options=options, checkpoint=policy)


@pytest.mark.parametrize("policy", ["step", "stage", "lean", 3, Fp8("lean")], ids=repr)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "explicit_adams"])
@pytest.mark.parametrize("leaves", [1, 2])
def test_graphs_that_func_records_for_itself(leaves, method, policy):
    """A flow differentiates in f: where no graph is wanted, what it records goes with the evaluation."""
    if method == "explicit_adams" and not isinstance(policy, str):
        pytest.skip("not for this method")
    y0 = tuple(torch.rand(3, requires_grad=True) for _ in range(leaves))

    def func(t, y):
        with torch.enable_grad():
            x = (y if leaves == 1 else y[0]).requires_grad_()
            k = Tracked.apply(x) * x
        return k if leaves == 1 else (k, torch.zeros_like(y[1]))

    Token.alive = Token.peak = 0
    y = odeint(func, y0[0] if leaves == 1 else y0, torch.linspace(0, 1, 11), method=method, checkpoint=policy)
    assert Token.alive == 0
    # the graph of an evaluation, and the one that is being made
    assert Token.peak <= 2
    (y.sum() if leaves == 1 else y[0].sum()).backward()
    if policy in ("stage", "lean") and method != "explicit_adams":
        assert Token.peak <= 2
