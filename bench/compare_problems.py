"""What is compared: the workloads, as large as a GPU, a CPU or a quick look asks for, and the floor below each."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.adaptive import Swirl
from bench.memory_cases import Block, Case, Solver, Transition
from bench.problems import PRECISIONS as AUTOCAST
from bench.problems import STAGES, Mlp, State, as_leaves

FAMILIES = ("compiled", "mlp", "linear", "cnf", "stl10", "otflow", "adaptive")
# those which are compared in fp32 alone: the compiler takes its time, and tolerances ask for it
IN_FP32 = ("compiled", "adaptive")
# tf32 is fp32 but for the matrix products, of whose factors the GPU takes the first 10 bits of the mantissa
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Result:
    """What a training step gives: the state at the end, and gradients with respect to y(0) and the parameters."""

    ends: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class Workload(Case):
    """A case on a grid.

    Attributes:
        family: what ``--workloads`` calls it.
        grid: the times, on the device; a step between each two.
        training: whether gradients are taken, or the solve alone is compared.
        kinks: how many derivatives in a solve jump, those of ReLU.
    """

    family: str = ""
    grid: Tensor | None = None
    training: bool = True
    kinks: int = 0

    @property
    def times(self) -> Tensor:
        assert self.grid is not None
        return self.grid

    @property
    def evaluations(self) -> int:
        """Of each function, in a solve with rk4."""
        return STAGES * (len(self.times) - 1)

    def autocast(self, precision: str) -> torch.autocast:
        return super().autocast("fp32" if precision == "tf32" else precision)

    def step(self, solver: Solver, precision: str, scaler: "Scaler | None" = None) -> Result:
        """A training step without the optimizer: the loss is <cotangent, y(end)>."""
        if not self.training:
            with torch.no_grad():
                return Result(tuple(self.forward(solver, precision)))
        ends = self.forward(solver, precision)
        cotangents = scaler.scaled(self.cotangents) if scaler else self.cotangents
        gradients = torch.autograd.grad(ends, self.inputs, cotangents, allow_unused=True)
        return Result(tuple(ends), scaler.unscaled(self.inputs, gradients) if scaler else gradients)

    def in_double(self) -> "Workload":
        """The same in float64, with parameters of its own."""
        return replace(
            self,
            funcs=tuple(deepcopy(func).double() for func in self.funcs),
            between=tuple(deepcopy(layer).double() for layer in self.between),
            y0=tuple(leaf.detach().double().requires_grad_() for leaf in self.y0),
            cotangents=tuple(cotangent.double() for cotangent in self.cotangents),
            grid=self.times.double(),
        )

    def parts(self, number: int) -> "Iterator[Workload]":
        """The workload, its batch cut into about ``number`` parts: the samples do not know of each other."""
        rows = -(-len(self.y0[0]) // number)
        for y0, cotangents in zip(
            zip(*(leaf.detach().split(rows) for leaf in self.y0), strict=True),
            zip(*(cotangent.split(rows) for cotangent in self.cotangents), strict=True),
            strict=True,
        ):
            yield replace(self, y0=tuple(leaf.requires_grad_() for leaf in y0), cotangents=cotangents)


class Scaler:
    """PyTorch's GradScaler around a training step, with an optimizer that does nothing."""

    class _NoOptimizer(torch.optim.Optimizer):
        def step(self, closure: object = None) -> None:
            """Leaves the parameters as they are."""

    def __init__(self, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(device.type)

    def scaled(self, cotangents: tuple[Tensor, ...]) -> list[Tensor]:
        """The gradient of the scaled loss."""
        return self.scaler.scale(list(cotangents))

    def unscaled(self, inputs: list[Tensor], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients over the scale, which is halved where one of them is not finite; the host waits for that."""
        optimizer = self._NoOptimizer(inputs, {})
        for leaf, gradient in zip(inputs, gradients, strict=True):
            leaf.grad = gradient
        self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()
        found = tuple(leaf.grad for leaf in inputs)
        optimizer.zero_grad()
        return found


class HyperFlow(nn.Module):
    """A flow z' = mean over w of u_w tanh(<z, a_w> + b_w) whose weights are a network of t, and its log density."""

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.width = width
        self.network = Mlp(1, hidden, hidden, 3 * 2 * width + width)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights = self.network(t, t.reshape(1, 1))[0]
        a, u, gate = weights[: 6 * self.width].view(3, self.width, 2)
        u = u * torch.sigmoid(gate)
        h = torch.tanh(F.linear(state[0], a, weights[6 * self.width :]))
        trace = F.linear(1 - h * h, (a * u).sum(1)[None]) / self.width
        return h @ u / self.width, -trace


class Potential(nn.Module):
    """An optimal transport flow x' = -grad Phi(x, t), of whose Laplacian and Hamilton-Jacobi-Bellman equation it keeps
    account; Phi(s) = <w, u_1 + sigma(K_1 u_1 + b_1)> + |A s|^2 / 2 + <b, s> with u_1 = sigma(K_0 s + b_0), s = (x, t),
    and sigma' = tanh. Its derivatives are written out."""

    def __init__(self, dimension: int, width: int, rank: int = 10) -> None:
        super().__init__()
        self.dimension = dimension
        self.first, self.second = nn.Linear(dimension + 1, width), nn.Linear(width, width)
        self.out = nn.Parameter(torch.full((width,), 1 / width))
        self.factor = nn.Parameter(torch.randn(min(rank, dimension), dimension + 1) / dimension)
        self.slope = nn.Parameter(torch.randn(dimension + 1) / dimension)

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, d = state[0], self.dimension
        s = torch.cat([x, t.to(x.dtype).expand(len(x), 1)], 1)
        before = self.first(s)
        after = self.second(F.softplus(2 * before) - before)
        first, second = torch.tanh(before), torch.tanh(after)
        # the adjoint of u_1, then of s
        back = self.out + F.linear(second * self.out, self.second.weight.t())
        gradient = F.linear(first * back, self.first.weight.t())
        gradient = gradient + F.linear(F.linear(s, self.factor), self.factor.t()) + self.slope
        # the trace of the second derivative: of each layer, then of the quadratic part
        columns = self.first.weight[:, :d]
        trace = F.linear((1 - first * first) * back, columns.square().sum(1)[None])
        # K_1 times the derivative of u_1, for each sample: (batch, d, width)
        chain = F.linear(first[:, None, :] * columns.t(), self.second.weight)
        trace = trace + F.linear((1 - second * second) * chain.square().sum(1), self.out[None])
        trace = trace + self.factor[:, :d].square().sum()
        cost = gradient[:, :d].square().sum(1, keepdim=True) / 2
        return -gradient[:, :d], -trace, cost, (cost - gradient[:, d:]).abs()


class Matrix(nn.Module):
    """y' = A y."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(dimension, dimension) / dimension**0.5 - torch.eye(dimension))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return F.linear(y, self.matrix)


def workloads(family: str, device: torch.device, quick: bool) -> Iterator[Workload]:
    """The workloads of that name: as published on a GPU, smaller ones on a CPU, small ones where it is to be quick."""
    large = device.type == "cuda"
    size = 2 if quick else 0 if large else 1
    torch.manual_seed(0)

    def make(
        name: str,
        func: nn.Module | list[nn.Module],
        shapes: list[tuple[int, ...]],
        points: int,
        start: float = 0.0,
        end: float = 1.0,
        training: bool = True,
    ) -> Workload:
        funcs = nn.ModuleList(func if isinstance(func, list) else [func]).to(device)
        channels = [block.bias.shape[1] for block in funcs] if family == "stl10" else []
        between = nn.ModuleList(Transition(c, 2 * c) for c in channels[:-1]).to(device)
        first, *rest = (torch.randn(shape) if n == 0 else torch.zeros(shape) for n, shape in enumerate(shapes))
        batch, grid = shapes[0][0], torch.linspace(start, end, points, device=device)
        halvings = len(between)
        ends = [(s[0], s[1] << halvings, *(side >> halvings for side in s[2:])) for s in shapes]
        # of a mean over the batch, as losses are
        cotangents = tuple((torch.randn(shape) / batch).to(device) for shape in ends)
        y0 = tuple(leaf.to(device).requires_grad_() for leaf in (first, *rest))
        length = f"{points - 1} steps" if family != "adaptive" else f"t to {end:g}"
        title = f"y {', '.join(str([*shape]) for shape in shapes)}, {length}"
        if not training:
            title += ", solve alone"
        # each block of the network has half the activations of the one before
        kinks = STAGES * (points - 1) * sum(first.numel() >> n for n in range(len(channels)))
        arguments = (name, title, tuple(funcs), tuple(between), y0, cotangents, (points - 1,))
        return Workload(*arguments, family=family, grid=grid, training=training, kinks=kinks)

    if family == "compiled":
        few = 2 if quick else 8
        for steps in (few,) if quick else (few, 32):
            yield make(f"compiled, {steps} steps", Mlp(2, 64, 64, 2), [(256, 2)], steps + 1)
        yield make(f"compiled, {few} steps, solve", Mlp(2, 64, 64, 2), [(256, 2)], few + 1, training=False)
    elif family == "mlp":
        for width in ((64, 256, 1024, 4096), (64, 256), (64,))[size]:
            yield make(f"mlp {width}", Mlp(width, width, width), [((4096, 256, 64)[size], width)], 9)
    elif family == "linear":
        for dimension in ((2048, 4096), (256, 512), (64, 128))[size]:
            yield make(f"linear {dimension}", Matrix(dimension), [((256, 64, 16)[size], dimension)], 9)
    elif family == "cnf":
        batch, width, points = ((1024, 128, 128), (256, 128, 17), (64, 16, 9))[size]
        yield make("cnf", HyperFlow(width), [(batch, 2), (batch, 1)], points, 1.0, 0.0)
    elif family == "stl10":
        batch, side, channels = ((16, 128, (128, 256, 512)), (4, 32, (32,)), (2, 16, (8,)))[size]
        yield make("stl10", [Block(number) for number in channels], [(batch, channels[0], side, side)], 5)
    elif family == "otflow":
        batch, width, points = ((512, 1024, 16), (64, 64, 9), (16, 16, 5))[size]
        yield make("otflow", Potential(63, width), [(batch, 63), (batch, 1), (batch, 1), (batch, 1)], points)
    elif family == "adaptive":
        for batch in (1,) if quick else (1, 4096 if large else 256):
            yield make(f"adaptive, batch {batch}", Swirl(64), [(batch, 2)], 2, 0.0, 2.0 if quick else 10.0)
    else:
        raise ValueError(f"workload is {family!r}, expected one of {', '.join(FAMILIES)}")


def floor(workload: Workload, precision: str, evaluations: int | None = None) -> Callable[[], None]:
    """What no solver can go below: so many evaluations of f, with their graphs and a vector-Jacobian product of each;
    where no gradients are taken, without."""
    dtype = torch.float32 if precision == "tf32" else AUTOCAST[precision]
    time, number = workload.times[0], evaluations or workload.evaluations
    blocks: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []
    with torch.no_grad(), workload.autocast(precision):
        state = workload.state
        for index, func in enumerate(workload.funcs):
            state = workload.between[index - 1](state) if index > 0 else state
            leaves = [leaf.detach().to(dtype) for leaf in as_leaves(state)]
            blocks.append((func, leaves, [torch.ones_like(k) for k in as_leaves(func(time, _state(leaves)))]))

    def call() -> None:
        with workload.autocast(precision), torch.set_grad_enabled(workload.training):
            for func, leaves, cotangents in blocks:
                for _ in range(number):
                    y = [leaf.detach().requires_grad_(workload.training) for leaf in leaves]
                    k = as_leaves(func(time, _state(y)))
                    if workload.training:
                        torch.autograd.grad(k, [*y, *func.parameters()], cotangents, allow_unused=True)

    return call


def _state(leaves: list[Tensor]) -> State:
    return leaves[0] if len(leaves) == 1 else tuple(leaves)
