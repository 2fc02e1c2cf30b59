"""Checkpoint policies by the gradients that they give, and solves under them, for the tests of policies."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import rampde
from rampde import Binomial, Checkpoint, Offload, odeint


class EveryThird(Checkpoint):
    """A user's own schedule."""

    def schedule(self, step, end, kept):
        return kept if step % 3 else (*kept, step)


class OnTheSide(Checkpoint):
    """A user's own store, which autograd does not see."""

    def store(self, state):
        return [state.clone()]

    def load(self, stored):
        return stored[0].clone()


# each gives the bits of "step": states are kept as f sees them, or reached again in full precision
AS_STEP = {
    "lean": "lean",
    "1": 1,
    "3": 3,
    "100": 100,
    "2 lean": Binomial(2, "lean"),
    "offload step": Offload("step"),
    "offload lean": Offload("lean"),
    "offload 2": Offload(2),
    "every third": EveryThird(),
    "every third lean": EveryThird("lean"),
    "on the side": OnTheSide(),
}

# each gives the bits of "none": what f saw on the road out is kept
AS_NONE = {
    "stage": "stage",
    "offload none": Offload("none"),
    "offload stage": Offload("stage"),
}


ALL = {**AS_STEP, **AS_NONE}


def policies(chosen):
    """Runs a test with each of the policies."""
    return pytest.mark.parametrize("policy", [pytest.param(policy, id=name) for name, policy in chosen.items()])


class Net(nn.Module):
    """A small time-dependent network that counts its evaluations."""

    def __init__(self, dtype=torch.float32, size=5):
        super().__init__()
        layers = []
        for n_in, n_out in pairwise([size, 16, size]):
            layers += [nn.Linear(n_in, n_out, dtype=dtype), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        return self.layers(y) * torch.cos(t)


def gradients(func, y0, t, checkpoint, precision=None, parameters=(), loss=None, **options):
    """Gradients of a loss of a solve with respect to y0, t if it requires one, and parameters; and statistics."""
    inputs = [leaf for leaf in torch.utils._pytree.tree_leaves(y0) if leaf.requires_grad]
    if t.requires_grad:
        inputs.append(t)
    with rampde.stats() as stats, torch.autocast("cpu", precision, enabled=precision is not None):
        y = odeint(func, y0, t, checkpoint=checkpoint, **options)
    total = loss(y) if loss is not None else y.square().sum()
    return torch.autograd.grad(total, [*inputs, *parameters]), stats.solves[0]


def same_bits(some, others):
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def check_bits(policy, func, y0, t, parameters, reference=None, **options):
    """The bits of "step" or "none", whichever the policy belongs to."""
    if reference is None:
        reference = "none" if policy in AS_NONE.values() else "step"
    expected, _ = gradients(func, y0, t, reference, parameters=parameters, **options)
    found, _ = gradients(func, y0, t, policy, parameters=parameters, **options)
    assert all(bool(torch.isfinite(g).all()) for g in expected)
    assert same_bits(found, expected)
