"""What the memory benchmark solves: the problems, and the solvers and policies compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, log2
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rampde
from bench.problems import PRECISIONS, Mlp, State, as_leaves, make_problem
from rampde.checkpoint import Binomial, Checkpoint, Fp8, Offload

PROBLEMS = ("mlp", "flow", "stl128", "stl256", "stl512", "stl10")
REFERENCE = "torchdiffeq"
ADJOINT = "torchdiffeq adjoint"
HAND_WRITTEN = "checkpoint by hand"
# with as few steps as the blocks of STL-10 take these are other names for "step", "none" and "none"
OTHER_NAMES = ("rampde 4", "rampde tape", "rampde auto")

Solver = Callable[[nn.Module, State, Tensor], State]


class Block(nn.Module):
    """f = -A^T(norm(ReLU(A y))), A a convolution whose weights are piecewise constant in t."""

    PIECES = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = (9 * channels) ** -0.5
        self.bank = nn.Parameter(torch.empty(self.PIECES, channels, channels, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(self.PIECES, channels).uniform_(-bound, bound))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # a lookup on the device, for which the host does not wait as it would for t.item()
        piece = (self.PIECES * t).long().clamp(max=self.PIECES - 1).reshape(1)
        weight, bias = self.bank.index_select(0, piece)[0], self.bias.index_select(0, piece)[0]
        z = F.instance_norm(F.relu(F.conv2d(y, weight, bias, padding=1)))
        return -F.conv_transpose2d(z, weight, padding=1)


class Transition(nn.Module):
    """From one block of the network to the next: more channels, fewer pixels."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        # without the bias, which the norm takes away
        convolution = nn.Conv2d(ins, outs, 1, bias=False)
        self.layers = nn.Sequential(convolution, nn.InstanceNorm2d(outs), nn.ReLU(), nn.AvgPool2d(2))

    def forward(self, y: Tensor) -> Tensor:
        return self.layers(y)


@dataclass(frozen=True)
class Case:
    """y' = f(t, y) from t = 0 to 1; of several functions one after another, with a layer between each two.

    Attributes:
        steps: the numbers of steps that are measured.
        brief: whether it takes too long to be repeated, and to be solved in fp32 by all.
    """

    name: str
    title: str
    funcs: tuple[nn.Module, ...]
    between: tuple[nn.Module, ...]
    y0: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    steps: tuple[int, ...]
    brief: bool = False

    @property
    def device(self) -> torch.device:
        return self.y0[0].device

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are taken with respect to."""
        return [*self.y0, *(parameter for part in (*self.funcs, *self.between) for parameter in part.parameters())]

    @property
    def state(self) -> State:
        return self.y0[0] if len(self.y0) == 1 else self.y0

    @property
    def times(self) -> Tensor:
        return torch.tensor([0.0, 1.0], device=self.device)

    def autocast(self, precision: str) -> torch.autocast:
        """The caller's autocast: on for the 16-bit precisions."""
        dtype = PRECISIONS[precision]
        low = dtype != torch.float32
        return torch.autocast(self.device.type, dtype if low else None, enabled=low)

    def forward(self, solver: Solver, precision: str) -> list[Tensor]:
        """y(1), ready for the backward pass."""
        state, times = self.state, self.times
        with self.autocast(precision):
            for index, func in enumerate(self.funcs):
                if index > 0:
                    state = self.between[index - 1](state)
                ends = [states[-1] for states in as_leaves(solver(func, state, times))]
                state = ends[0] if len(ends) == 1 else tuple(ends)
        return ends

    def backward(self, ends: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients with respect to y(0) and the parameters."""
        return torch.autograd.grad(ends, self.inputs, self.cotangents, allow_unused=True)

    def train(self, solver: Solver, precision: str) -> None:
        """A training step without the optimizer."""
        self.backward(self.forward(solver, precision))


def make_case(name: str, device: torch.device, quick: bool) -> Case:
    """The case of that name; of STL-10 with fewer images on the CPU, and small ones where it is to be quick."""
    steps = (2, 4) if quick else (2, 8, 32)
    if name == "flow":
        steps = (2, 4) if quick else (1, 4, 16)
        problem = make_problem("b", device, quick)
        return Case(name, problem.title, (problem.func,), (), problem.y0, problem.cotangents, steps)
    torch.manual_seed(0)
    if name == "mlp":
        batch = 128 if quick else 1024
        return _case(name, "MLP 64-512-64", [Mlp(64, 512, 64)], [], (batch, 64), steps, device)
    on_cpu = device.type == "cpu"
    batch, share = 1 if on_cpu else 16, 4 if quick else 1
    channels = [128, 256, 512] if name == "stl10" else [int(name.removeprefix("stl"))]
    side = 128 * 128 // channels[0] // share
    channels = [number // share for number in channels]
    blocks = [Block(number) for number in channels]
    between = [Transition(ins, 2 * ins) for ins in channels[:-1]]
    title = "three STL-10 blocks" if between else f"STL-10 block of {channels[0]} channels"
    return _case(name, title, blocks, between, (batch, channels[0], side, side), (4,), device, on_cpu and not quick)


def _case(
    name: str,
    title: str,
    funcs: Sequence[nn.Module],
    between: Sequence[nn.Module],
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    device: torch.device,
    brief: bool = False,
) -> Case:
    """A case whose state is a tensor of ``shape``."""
    y0 = torch.randn(shape)
    halvings = len(between)
    end = (shape[0], shape[1] << halvings, *(side >> halvings for side in shape[2:]))
    cotangent = torch.randn(end).to(device)
    parts = [nn.ModuleList(funcs).to(device), nn.ModuleList(between).to(device)]
    return Case(
        name, title, tuple(parts[0]), tuple(parts[1]), (y0.to(device).requires_grad_(),), (cotangent,), steps, brief
    )


def by_hand(func: nn.Module, y0: State, t: Tensor, steps: int) -> State:
    """The method without a library, each step under PyTorch's checkpoint; from 0 to 1."""
    h = 1 / steps
    times = torch.linspace(0, 1, steps + 1, device=t.device)
    y = as_leaves(y0)

    def f(now: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return as_leaves(func(now, leaves[0] if isinstance(y0, Tensor) else tuple(leaves)))

    def step(start: Tensor, end: Tensor, *y: Tensor) -> tuple[Tensor, ...]:
        k1 = f(start, y)
        k2 = f(start + h / 3, [a + h / 3 * b for a, b in zip(y, k1, strict=True)])
        k3 = f(start + h * 2 / 3, [a + h * (c - b / 3) for a, b, c in zip(y, k1, k2, strict=True)])
        k4 = f(end, [a + h * (b - c + d) for a, b, c, d in zip(y, k1, k2, k3, strict=True)])
        return tuple(a + h / 8 * (b + 3 * (c + d) + e) for a, b, c, d, e in zip(y, k1, k2, k3, k4, strict=True))

    for n in range(steps):
        y = checkpoint(step, times[n], times[n + 1], *y, use_reentrant=False)
    ends = tuple(leaf[None] for leaf in y)
    return ends[0] if isinstance(y0, Tensor) else ends


def policies(steps: int) -> dict[str, Checkpoint | str | int]:
    """What ``checkpoint=`` is given, by its name in the tables."""
    few = ceil(log2(steps)) + 1
    return {
        "none": "none",
        "tape": "tape",
        "stage": "stage",
        "step": "step",
        "lean": "lean",
        "4": 4,
        "log2 N + 1": few,
        "log2 N + 1, lean": Binomial(few, "lean"),
        "offload none": Offload("none"),
        "offload step": Offload("step"),
        "fp8": Fp8(),
        "auto": "auto",
    }


def make_solvers(steps: int) -> dict[str, Solver]:
    """What is compared, in that many steps."""
    options: dict[str, Any] = {"method": "rk4", "options": {"step_size": 1 / steps}}
    found: dict[str, Solver] = {
        REFERENCE: partial(torchdiffeq.odeint, **options),
        ADJOINT: partial(torchdiffeq.odeint_adjoint, **options),
        HAND_WRITTEN: partial(by_hand, steps=steps),
    }
    for name, policy in policies(steps).items():
        found[f"rampde {name}"] = partial(rampde.odeint, **options, checkpoint=policy)
    return found


def solvers_of(case: Case, steps: int, precision: str) -> dict[str, Solver]:
    """What is compared in this case at this precision."""
    found = make_solvers(steps)
    if case.brief and precision == "fp32":
        return {REFERENCE: found[REFERENCE]}
    left_out = OTHER_NAMES if case.name.startswith("stl") else ()
    return {name: solver for name, solver in found.items() if name not in left_out}
