"""What a solve costs, in counts that are exact on any machine: operators, host reads, evaluations, bytes kept."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rampde import odeint

FEW, MANY = 6, 26  # counts per step are differences, which leaves out what a solve costs once

HOST_READS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero")


class Count(TorchDispatchMode):
    """Counts operators, and copies to another device, which wait for the first one."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def __sub__(self, other):
        difference = Counter(self.operators)
        difference.subtract(other.operators)
        return difference


class Net(torch.nn.Module):
    """Problem a of the baseline; counts its evaluations."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        sizes = [2, 64, 64, 2]
        layers = []
        for n_in, n_out in pairwise(sizes):
            layers += [torch.nn.Linear(n_in, n_out, dtype=dtype), torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*layers[:-1])
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        return self.layers(y)


def solve(net, steps, checkpoint, precision=None, dtype=torch.float32, method="rk4", scaler=None):
    """The result of a solve that returns every step."""
    y0 = torch.randn(16, 2, dtype=dtype)
    t = torch.linspace(0, 1, steps + 1)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        return odeint(net, y0, t, method=method, checkpoint=checkpoint, loss_scaler=scaler)


def count(steps, checkpoint, precision=None, grad=True, floor=False):
    """Operators of the forward and of the backward pass of one solve, or of its evaluations of f alone."""
    torch.manual_seed(0)
    net = Net()
    forward, backward = Count(), Count()
    parameters = list(net.parameters())
    if floor:
        x = torch.randn(16, 2, dtype=precision or torch.float32, requires_grad=True)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            for _ in range(4 * steps):
                with forward, torch.set_grad_enabled(grad):
                    k = net(None, x)
                if grad:
                    with backward:
                        torch.autograd.grad(k, [x, *parameters], torch.ones_like(k))
        return forward, backward
    with torch.set_grad_enabled(grad):
        with forward:
            y = solve(net, steps, checkpoint, precision)
        if grad:
            loss = y[-1].sum()
            with backward:
                loss.backward()
    return forward, backward


def per_step(*args, **kwargs):
    """Operators per step, forward and backward."""
    many, few = count(MANY, *args, **kwargs), count(FEW, *args, **kwargs)
    steps = MANY - FEW
    return tuple(
        {name: n / steps for name, n in (big - small).items() if n} for big, small in zip(many, few, strict=True)
    )


def of_rampde(operators):
    return {name.removeprefix("rampde::"): n for name, n in operators.items() if name.startswith("rampde::")}


def of_aten(operators):
    return sum(n for name, n in operators.items() if not name.startswith("rampde::"))


def test_rampde_operators_of_a_forward_step():
    forward, _ = per_step("step", grad=False)
    assert of_rampde(forward) == {"rk_stage": 3, "rk_update": 1}


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_rampde_operators_of_a_training_step(checkpoint, precision):
    forward, backward = per_step(checkpoint, precision)
    assert of_rampde(forward) == {"rk_stage": 3, "rk_update": 1}
    expected = {"adjoint_stage": 4, "adjoint_update": 1, "accumulate_gradients": 1}
    if checkpoint == "step":
        expected["rk_stage"] = 3
    assert of_rampde(backward) == expected


def test_scaling_costs_one_operator_a_step():
    _, backward = per_step("none", torch.float16)
    assert of_rampde(backward) == {
        "adjoint_stage": 4,
        "adjoint_update": 1,
        "accumulate_gradients": 1,
        "update_scale": 1,
    }


@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_aten_operators_beyond_those_of_f(checkpoint):
    floor_no_grad, _ = per_step(None, grad=False, floor=True)
    floor_forward, floor_backward = per_step(None, floor=True)
    forward, backward = per_step(checkpoint)
    own_forward = floor_forward if checkpoint == "none" else floor_no_grad
    assert of_aten(forward) - of_aten(own_forward) <= 2 * 4
    own_backward = of_aten(floor_backward) + (of_aten(floor_forward) if checkpoint == "step" else 0)
    assert of_aten(backward) - own_backward <= 2 * 4


def test_parameters_are_cast_once_for_a_solve_under_autocast():
    for checkpoint in ("none", "step"):
        forward, backward = count(MANY, checkpoint, torch.bfloat16)
        casts_of_parameters = 6
        # what is left of the casts does not grow with the steps in the forward pass; in the backward pass each
        # stage casts its parameter gradients back, and no parameter
        few_forward, few_backward = count(FEW, checkpoint, torch.bfloat16)
        assert (forward - few_forward)["aten::_to_copy"] == 0
        per_stage = (backward - few_backward)["aten::_to_copy"] / (4 * (MANY - FEW))
        assert per_stage == casts_of_parameters
        assert forward.operators["aten::_to_copy"] >= casts_of_parameters


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_no_host_reads_in_a_step(checkpoint, precision):
    for operators in per_step(checkpoint, precision):
        for name in operators:
            assert name.removeprefix("aten::") not in HOST_READS
    once = count(FEW, checkpoint, precision)
    # once for y0, under float16 once for an overflow and once after the first step of the sweep; t and the state of
    # the sweep are read as lists, and states of random generators lie on the host
    reads = sum(passes.operators[f"aten::{name}"] for passes in once for name in HOST_READS if name != "equal")
    assert reads == (3 if precision == torch.float16 else 1)


@pytest.mark.parametrize(("method", "stages"), [("euler", 1), ("heun3", 3), ("rk4", 4), ("rk4_classic", 4)])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("checkpoint", "again"), [("none", 0), ("step", 1), ("tape", 0)])
def test_evaluations_of_f(method, stages, precision, checkpoint, again):
    net = Net()
    y = solve(net, 5, checkpoint, precision, method=method)
    assert net.evaluations == 5 * stages
    y.sum().backward()
    assert net.evaluations == 5 * stages * (1 + again)


def test_evaluations_of_f_without_gradients():
    net = Net()
    with torch.no_grad():
        solve(net, 5, "step")
    assert net.evaluations == 20


@pytest.mark.parametrize(("precision", "share"), [(torch.bfloat16, 0.5), (torch.float16, 0.5), (None, 1.0)])
def test_bytes_kept_for_the_backward_pass(precision, share):
    def kept(steps):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            solve(Net(), steps, "step", precision)
        return total

    state = 16 * 2 * 4
    # the grid keeps one time a step besides
    assert (kept(MANY) - kept(FEW)) / (MANY - FEW) == share * state + 8


def test_graphs_alive_in_the_sweep():
    """With "step" the graphs of one step live at a time, and a stage's goes as soon as its product is taken."""
    alive = peak = 0

    class Tracked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)
            ctx.token = Token()
            return -y

        @staticmethod
        def backward(ctx, grad):
            return -grad

    class Token:
        def __del__(self):
            nonlocal alive
            alive -= 1

    peaks = {}
    for checkpoint in ("step", "none"):
        y0 = torch.randn(3, requires_grad=True)
        alive = peak = 0
        y = odeint(lambda t, y: Tracked.apply(y), y0, torch.linspace(0, 1, 11), method="rk4", checkpoint=checkpoint)
        if checkpoint == "step":
            # what is left of the forward solve: nothing
            assert alive == 0
        y.sum().backward()
        peaks[checkpoint] = peak
        del y
        assert alive == 0
    assert peaks == {"step": 4, "none": 40}


class Flow(torch.nn.Module):
    """A continuous flow with further integrals: of a state of any number of leaves it uses the first."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, t, state):
        k = self.net(t, state[0])
        return k, *[-k.square().sum(1, keepdim=True) for _ in state[1:]]


def count_flow(steps, leaves, checkpoint, precision, method):
    """Operators of the forward and of the backward pass of a solve with several leaves."""
    torch.manual_seed(0)
    flow, forward, backward = Flow(), Count(), Count()
    y0 = (torch.randn(16, 2), *[torch.zeros(16, 1) for _ in range(leaves - 1)])
    t = torch.linspace(0, 1, steps + 1)
    options = {"step_size": 1 / steps} if method == "rk4" else {"first_step": 1 / steps, "max_step": 1 / steps}
    with torch.autocast("cpu", precision, enabled=precision is not None), forward:
        y = odeint(flow, y0, t[[0, -1]], rtol=1e3, atol=1e3, method=method, options=options, checkpoint=checkpoint)
    loss = sum(leaf[-1].sum() for leaf in y)
    with backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("leaves", [2, 4, 9])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint", ["none", "step"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_all_leaves_of_a_state_take_one_operator(method, checkpoint, precision, leaves):
    """On a GPU each of them is one launch for up to eight leaves; f does not depend on all of them."""
    many, few = (count_flow(steps, leaves, checkpoint, precision, method) for steps in (MANY, FEW))
    forward, backward = (
        of_rampde({name: n / (MANY - FEW) for name, n in (big - small).items() if n})
        for big, small in zip(many, few, strict=True)
    )
    stages = 4 if method == "rk4" else 6
    end = {"rk_update_leaves": 1, "rk_stage_leaves": 3} if method == "rk4" else {"rk_error_leaves": 1}
    assert forward == {"rk_stage_leaves": 6, **end}
    expected = {"adjoint_stage_leaves": stages, "adjoint_update_leaves": 1, "accumulate_gradients": 1}
    if checkpoint == "step":
        expected["rk_stage_leaves"] = stages - 1
    if precision == torch.float16:
        expected["update_scale"] = 1
    assert backward == expected


def count_adaptive(steps, precision=None, checkpoint=None):
    """Operators of the forward and of the backward pass of that many equal dopri5 steps."""
    torch.manual_seed(0)
    net = Net()
    forward, backward = Count(), Count()
    y0 = torch.randn(16, 2)
    options = {"first_step": 1.0, "max_step": 1.0}
    grad = checkpoint is not None
    # the last output lies inside of the last step
    t = torch.tensor([0.0, steps - 0.5])
    with torch.set_grad_enabled(grad), torch.autocast("cpu", precision, enabled=precision is not None):
        with forward:
            y = odeint(net, y0, t, rtol=1e3, atol=1e3, options=options, checkpoint=checkpoint or "step")
        forward_evaluations, net.evaluations = net.evaluations, 0
        if grad:
            loss = y[-1].sum()
            with backward:
                loss.backward()
    return forward, backward, forward_evaluations, net.evaluations


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [None, "none", "step"])
def test_an_adaptive_step(checkpoint, precision):
    few, many = (count_adaptive(steps, precision, checkpoint) for steps in (FEW, MANY))
    steps = MANY - FEW
    forward, backward = ({name: n / steps for name, n in (many[i] - few[i]).items() if n} for i in (0, 1))
    # the input of the last stage is the state at the end of the step; the operator of the error completes the step
    assert of_rampde(forward) == {"rk_stage": 6, "rk_error": 1}
    # the times of the stages and the step size, made once a step, and the state detached from the last stage
    few_floor, many_floor = (count(n, "step", precision, checkpoint is not None, floor=True)[0] for n in (FEW, MANY))
    of_f = 6 / 4 * of_aten(many_floor - few_floor) / steps
    assert of_aten(forward) - of_f <= 12
    assert (many[2] - few[2]) / steps == 6
    assert (many[3] - few[3]) / steps == (6 if checkpoint == "step" else 0)
    if checkpoint is not None:
        expected = {"adjoint_stage": 6, "adjoint_update": 1, "accumulate_gradients": 1}
        if checkpoint == "step":
            expected["rk_stage"] = 5
        assert of_rampde(backward) == expected
        assert not any(name.endswith(HOST_READS) for name in backward)
