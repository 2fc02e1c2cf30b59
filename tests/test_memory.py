"""How memory grows with the steps, and what is left when it does not suffice."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from policies import Net
from torch import nn

from rampde import Binomial, Fp8, odeint
from rampde.fp8_blocks import BLOCK
from rampde.meter import metered

CPU = torch.device("cpu")
FEW, MANY = 16, 48
SHAPE = (64, 256)
ELEMENTS = SHAPE[0] * SHAPE[1]
# of the grid in each step: a point, a step size and the times of four stages, of the widest dtype
GRID = 6 * 8


def peak(policy, steps, precision=None, func=None):
    """Peak bytes of a solve with two outputs, and its gradient."""
    linear = nn.Linear(SHAPE[1], SHAPE[1])
    y0 = torch.randn(*SHAPE, requires_grad=True)
    t = torch.tensor([0.0, 1.0])

    def call():
        with torch.autocast("cpu", precision, enabled=precision is not None):
            y = odeint(
                lambda t, y: torch.tanh(linear(y)), y0, t, method="rk4", options={"step_size": 1 / steps},
                checkpoint=policy,
            )  # fmt: skip
        return torch.autograd.grad(y, [y0, linear.weight], torch.ones_like(y))

    call()
    return metered(call, CPU).peak


def growth(policy, precision):
    """Bytes a step, without those of the grid."""
    steps = MANY - FEW
    found = (peak(policy, MANY, precision) - peak(policy, FEW, precision)) / steps
    return found if found > GRID else 0


@pytest.mark.parametrize(("precision", "width"), [(None, 4), (torch.bfloat16, 2)])
class TestGrowth:
    @pytest.mark.parametrize("policy", ["step", "lean"])
    def test_states(self, policy, precision, width):
        """The state as f sees it, and nothing of the network."""
        assert 0 <= growth(policy, precision) - ELEMENTS * width <= GRID

    def test_stages(self, precision, width):
        assert 0 <= growth("stage", precision) - 4 * ELEMENTS * width <= GRID

    @pytest.mark.parametrize("policy", [Fp8(), Fp8("lean"), Fp8(stochastic=True)], ids=repr)
    def test_eight_bits(self, policy, precision, width):
        """A byte an element and a scale for each block."""
        stored = ELEMENTS + 4 * ELEMENTS // BLOCK
        assert 0 <= growth(policy, precision) - stored <= GRID

    @pytest.mark.parametrize("policy", [1, 4, 8, Binomial(3, "lean")], ids=repr)
    def test_a_number_of_states(self, policy, precision, width):
        assert growth(policy, precision) == 0

    def test_graphs(self, precision, width):
        """At least input and output of the hyperbolic tangent in each stage."""
        assert growth("none", precision) >= 4 * 2 * ELEMENTS * width


def test_online_checkpoints_do_not_grow():
    """Where steps are decided on the way, as many states are kept as were asked for, however many steps there are."""
    alive = weakref.WeakSet()

    class Watched(Binomial):
        def store(self, state):
            alive.add(state)
            most[0] = max(most[0], len(alive))
            return state

    for end in (2.0, 20.0):
        most = [0]
        y0 = torch.randn(3, 5, requires_grad=True)
        y = odeint(Net(), y0, torch.tensor([0.0, end]), rtol=1e-6, atol=1e-6, checkpoint=Watched(4))
        y[-1].sum().backward()
        # one more while it is decided which of them goes
        assert 4 <= most[0] <= 5


class Tracked(torch.autograd.Function):
    """Tensors that it saves, and graphs, are told by weak references."""

    graphs: ClassVar = weakref.WeakSet()

    @staticmethod
    def forward(ctx, y, tensors):
        Tracked.graphs.add(ctx)
        result = -y
        tensors.append(weakref.ref(result))
        return result

    @staticmethod
    def backward(ctx, grad):
        return -grad, None


class Failing(nn.Module):
    """Asks for more memory than there is at evaluation ``fails``."""

    def __init__(self, fails, how):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5))
        self.fails, self.how = fails, how
        self.evaluations = 0
        self.tensors = []

    def forward(self, t, y):
        self.evaluations += 1
        self.tensors.append(weakref.ref(y))
        result = Tracked.apply(y @ self.weight, self.tensors)
        if self.evaluations == self.fails:
            if self.how == "allocator":
                torch.empty(1 << 58)
            elif self.how == "python":
                raise MemoryError("no memory")
            else:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 EiB")
        return result


ROADS = [("forward", 11), ("backward", 7)]
CHEAPER = {
    "none": 'checkpoint="step"',
    "step": 'checkpoint="lean"',
    "stage": 'checkpoint="lean"',
    "lean": "rampde.Binomial",
    "3": 'rampde.Binomial(3, "lean")',
    "fp8": 'rampde.Fp8("lean")',
}


@pytest.mark.parametrize("how", ["allocator", "cuda", "python"])
@pytest.mark.parametrize("policy", ["step", "stage", "lean", "none", 3, Fp8()], ids=repr)
@pytest.mark.parametrize(("road", "fails"), ROADS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_out_of_memory(method, road, fails, policy, how):
    """The error names the policy and the next cheaper one, and even while it is held nothing of the solve is alive."""
    if policy == "none" and road == "backward":
        pytest.skip("f is not evaluated again")
    func = Failing(fails, how)
    y0 = torch.randn(3, 5, requires_grad=True)
    t = torch.linspace(0, 1, 6)
    options = {"method": method, "rtol": 1e-3, "atol": 1e-3, "checkpoint": policy}
    if method == "dopri5":
        options["options"] = {"first_step": 0.2, "max_step": 0.2, "min_step": 0.2}
        t = torch.tensor([0.0, 2.0])
    before = [p.clone() for p in func.parameters()]
    if road == "forward":
        with pytest.raises(torch.OutOfMemoryError) as caught:
            odeint(func, y0, t, **options)
    else:
        func.fails = 0
        y = odeint(func, y0, t, **options)
        func.fails = func.evaluations + fails
        with pytest.raises(torch.OutOfMemoryError) as caught:
            y[-1].sum().backward()
    name = "fp8" if isinstance(policy, Fp8) else str(policy)
    assert f'out of memory in the {road} pass of a solve with checkpoint "{name}"' in str(caught.value)
    assert CHEAPER[name] in str(caught.value)
    assert caught.value.__context__ is None
    gc.collect()
    assert not Tracked.graphs
    if road == "backward":
        with pytest.raises(RuntimeError, match=r"freed by an earlier backward pass|second time"):
            y[-1].sum().backward()
        # what autograd saved for the solve goes with its result
        del y
    assert not [tensor for tensor in func.tensors if tensor() is not None]
    # the model is as it was, and works
    assert all(torch.equal(p, q) for p, q in zip(func.parameters(), before, strict=True))
    assert func.weight.grad is None
    func.fails = 0
    odeint(func, y0, t, **options)[-1].sum().backward()
    assert bool(torch.isfinite(func.weight.grad).all())


def test_other_errors_are_left_alone():
    def func(t, y):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        odeint(func, torch.randn(3), torch.linspace(0, 1, 3), method="rk4")
