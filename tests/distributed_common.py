"""What the cases of ``test_distributed`` have in common: a model, its gradients in one process and in several."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from rampde import odeint

CASES = {}
POLICIES = ("none", "step", "stage", "lean", "auto")
METHODS = ("rk4", "dopri5")
TIMES = torch.linspace(0, 1, 4, dtype=torch.float64)
TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}


def case(name):
    def add(function):
        assert name not in CASES, name
        CASES[name] = function
        return function

    return add


class Field(nn.Module):
    """A velocity that depends on time."""

    def __init__(self, dim=5):
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, 7), nn.Linear(7, dim)
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        return self.outer(torch.tanh(2 * self.inner(y))) * torch.cos(3 * t)

    # another name for it
    velocity = forward


class Model(nn.Module):
    """An encoder, a block that solves an ODE, and a head."""

    def __init__(self, solves=1, solver=odeint, closure=False, **options):
        super().__init__()
        self.encoder, self.func, self.head = nn.Linear(3, 5), Field(), nn.Linear(5, 2)
        self.solves, self.solver, self.closure, self.options = solves, solver, closure, TOLERANCES | options

    def forward(self, x):
        y = self.encoder(x)
        func = (lambda t, y: self.func(t, y)) if self.closure else self.func
        total = 0.0
        for _ in range(self.solves):
            # one from where the other ended, and one from where it began
            total = total + y
            y = self.solver(func, total, TIMES.to(y.device), **self.options)[-1]
        return self.head(y)


class Collectives(TorchDispatchMode):
    """Counts the collectives within."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0].strip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def rank():
    return dist.get_rank()


def batch(dtype=torch.float64):
    """The whole batch, the same in every process; it is harder to solve in its second half."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[4:] *= 4
    return x.to(dtype)


def own(whole):
    return whole.chunk(dist.get_world_size())[rank()]


def new_model(dtype=torch.float64, **options):
    torch.manual_seed(1)
    return Model(**options).to(dtype)


def backward(model, x, autocast=None):
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        out = model(x)
    out.double().square().mean().backward()


def gradients(model):
    """By name, whole and in float64; None where there is none."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        found[name.removeprefix("module.")] = None if gradient is None else gradient.double()
    return found


def reference(parts, autocast=None, dtype=torch.float64, **options):
    """The gradients of one process: the mean over ``parts`` of the batch, each solved by itself."""
    means = {}
    for part in parts:
        model = new_model(dtype, **options)
        backward(model, part.to(dtype), autocast)
        for name, gradient in gradients(model).items():
            means[name] = means.get(name, 0.0) + gradient / len(parts)
    return means


def parts_of(method, agreed):
    """What one process must solve by itself to take the steps of several: with steps that do not depend on the batch,
    or are agreed, all of it."""
    whole = batch()
    return [whole] if agreed or method == "rk4" else list(whole.chunk(dist.get_world_size()))


def error(found, expected):
    """The largest relative error of a parameter's gradient; None where one is missing."""
    if any(gradient is None for gradient in found.values()):
        return None
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def sharded(model, how, **kwargs):
    """FSDP2 around nothing but the whole, around f too, around layers of f too, or around every part."""
    inner = {
        "root": [],
        "func": [model.func],
        "layers": [model.func.inner, model.func.outer, model.func],
        "parts": [model.encoder, model.func, model.head],
        "layers alone": [model.func.inner, model.func.outer],
    }[how]
    for module in inner:
        fully_shard(module, **kwargs)
    return fully_shard(model, **kwargs)


def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as found:
        return {"type": type(found).__name__, "message": str(found)}
    return {"type": "", "message": ""}


def mean(model):
    """The gradients of a model that is not distributed, on average over the processes."""
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return found
