"""What the solver benchmark solves: the problems, the solvers compared, and the floors below them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torchdiffeq
from torch import Tensor, nn

import rampde

State = Tensor | tuple[Tensor, ...]
STAGES = 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Mlp(nn.Module):
    """A tanh network of the state."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs in pairwise(widths):
            layers += [nn.Linear(ins, outs), nn.Tanh()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


class Flow(nn.Module):
    """Velocity of points in the plane, and its divergence by differentiating inside f."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.velocity = Mlp(2, width, width, 2)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].requires_grad_()
            velocity = self.velocity(t, x)
            rows = [torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i : i + 1] for i in range(2)]
        return velocity, rows[0] + rows[1]


class Convolutions(nn.Module):
    """Two rounds of normalization, ReLU and convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(16, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


class Linear(nn.Module):
    """y' = A y in the plane: nothing but the cost of the solver."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix


@dataclass(frozen=True)
class Problem:
    """y' = f(t, y) from y0, in ``steps`` steps to t = 1, with the cotangent of y(1)."""

    letter: str
    title: str
    func: nn.Module
    y0: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    steps: int

    def state(self, leaves: Sequence[Tensor]) -> State:
        """What f and the solvers take: a tuple only where there is more than one leaf."""
        return leaves[0] if len(leaves) == 1 else tuple(leaves)

    def times(self, steps: int) -> Tensor:
        """The grid; all states on it are returned."""
        return torch.linspace(0, 1, steps + 1, device=self.y0[0].device)

    def loss(self, solution: State) -> Tensor:
        """<cotangent, y(1)>."""
        ends = [states[-1] for states in as_leaves(solution)]
        products = [(end * c).sum() for end, c in zip(ends, self.cotangents, strict=True)]
        return products[0] if len(products) == 1 else torch.stack(products).sum()


def as_leaves(state: State) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def make_problem(letter: str, device: torch.device, quick: bool) -> Problem:
    """The problem of that letter; on a GPU with states and networks that give it work."""
    large, share = device.type == "cuda", 8 if quick else 1
    torch.manual_seed(0)
    func: nn.Module
    shapes: list[tuple[int, ...]]
    if letter == "a":
        batch = (1 << 16 if large else 256) // share
        title, func, shapes, steps = "MLP 2-64-64-2", Mlp(2, 64, 64, 2), [(batch, 2)], 32
    elif letter == "b":
        batch = (1 << 15 if large else 1024) // share
        title, func, shapes, steps = "flow, exact trace by autograd", Flow(64), [(batch, 2), (batch, 1)], 16
    elif letter == "c":
        batch, width = ((1 << 13) // share, 1024) if large else (1024 // share, 64)
        title, func, shapes, steps = (
            f"MLP {width}-{8 * width}-{width}",
            Mlp(width, 8 * width, width),
            [(batch, width)],
            8,
        )
    elif letter == "d":
        batch, channels, side = (64 // share, 128, 64) if large else (16 // share, 64, 32)
        title, func, shapes, steps = (
            "two convolutions",
            Convolutions(channels),
            [(batch, channels, side, side)],
            4,
        )
    else:
        title, func, shapes, steps = "linear 2x2", Linear(), [(1, 2)], 256
    y0 = [torch.randn(shape) for shape in shapes]
    if letter == "b":
        y0[1].zero_()
    cotangents = tuple(torch.randn(shape).to(device) for shape in shapes)
    # N(0, 1) cotangents of a thousand rows add up: the gradients of all problems have a like size
    leaves = tuple(leaf.to(device).requires_grad_() for leaf in y0)
    return Problem(letter, title, func.to(device), leaves, cotangents, steps)


def hand_written(func: nn.Module, y0: State, t: Tensor) -> State:
    """The method as one would write it without a library."""
    steps = (t[1:] - t[:-1]).tolist()
    y = as_leaves(y0)
    states = [y]

    def f(time: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return as_leaves(func(time, leaves[0] if isinstance(y0, Tensor) else tuple(leaves)))

    for n, h in enumerate(steps):
        start = t[n]
        k1 = f(start, y)
        k2 = f(start + h / 3, [a + h / 3 * b for a, b in zip(y, k1, strict=True)])
        k3 = f(start + h * 2 / 3, [a + h * (c - b / 3) for a, b, c in zip(y, k1, k2, strict=True)])
        k4 = f(t[n + 1], [a + h * (b - c + d) for a, b, c, d in zip(y, k1, k2, k3, strict=True)])
        y = tuple(a + h / 8 * (b + 3 * (c + d) + e) for a, b, c, d, e in zip(y, k1, k2, k3, k4, strict=True))
        states.append(y)
    solution = tuple(torch.stack(leaf) for leaf in zip(*states, strict=True))
    return solution[0] if isinstance(y0, Tensor) else solution


SOLVERS: dict[str, Callable[[nn.Module, State, Tensor], State]] = {
    "rampde none": partial(rampde.odeint, method="rk4", checkpoint="none"),
    "rampde step": partial(rampde.odeint, method="rk4", checkpoint="step"),
    "torchdiffeq": partial(torchdiffeq.odeint, method="rk4"),
    "torchdiffeq adjoint": partial(torchdiffeq.odeint_adjoint, method="rk4"),
    "hand-written": hand_written,
}


class Work:
    """A problem at a precision: the solves, training steps and floors that are timed and counted."""

    def __init__(self, problem: Problem, precision: str) -> None:
        self.problem = problem
        self.precision = precision
        self.dtype = PRECISIONS[precision]
        self.device = problem.y0[0].device
        self.parameters = list(problem.func.parameters())

    def autocast(self) -> torch.autocast:
        """The caller's autocast: on for the 16-bit precisions."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=low)

    @torch.no_grad()
    def solve(self, name: str, steps: int | None = None) -> State:
        """A solve without a graph."""
        problem = self.problem
        times = problem.times(steps or problem.steps)
        with self.autocast():
            return SOLVERS[name](problem.func, problem.state(problem.y0), times)

    def forward(self, name: str, steps: int | None = None) -> Tensor:
        """The loss, ready for the backward pass."""
        problem = self.problem
        times = problem.times(steps or problem.steps)
        with self.autocast():
            return problem.loss(SOLVERS[name](problem.func, problem.state(problem.y0), times))

    def train(self, name: str, steps: int | None = None) -> tuple[Tensor | None, ...]:
        """A training step without the optimizer: gradients with respect to y0 and the parameters."""
        inputs = [*self.problem.y0, *self.parameters]
        return torch.autograd.grad(self.forward(name, steps), inputs, allow_unused=True)

    def rounded(self) -> list[Tensor]:
        """The state as a solver hands it to f."""
        return [leaf.detach().to(self.dtype) for leaf in self.problem.y0]

    @torch.no_grad()
    def floor_forward(self, evaluations: int | None = None) -> None:
        """F."""
        problem, leaves = self.problem, self.rounded()
        time = torch.zeros((), device=self.device)
        with self.autocast():
            for _ in range(evaluations or STAGES * problem.steps):
                problem.func(time, problem.state([leaf.detach() for leaf in leaves]))

    def floor_backward(self, evaluations: int | None = None) -> None:
        """FB."""
        problem, leaves = self.problem, self.rounded()
        time = torch.zeros((), device=self.device)
        cotangents: list[Tensor] = []
        with self.autocast():
            for _ in range(evaluations or STAGES * problem.steps):
                y = [leaf.detach().requires_grad_() for leaf in leaves]
                k = as_leaves(problem.func(time, problem.state(y)))
                cotangents = cotangents or [
                    c.to(velocity.dtype) for c, velocity in zip(problem.cotangents, k, strict=True)
                ]
                torch.autograd.grad(k, [*y, *self.parameters], cotangents, allow_unused=True)

    def disagreement(self) -> tuple[float, str]:
        """The largest relative difference of a solution or gradient from torchdiffeq's in fp32, and where."""
        exact = Work(self.problem, "fp32")
        expected = [*as_leaves(exact.solve("torchdiffeq")), *exact.train("torchdiffeq")]
        worst = 0.0, "nothing"
        # without a library the parameters' gradients are summed in 16 bits, and lost
        others = ["hand-written"] if self.precision == "fp32" else []
        for name in ("rampde none", "rampde step", *others):
            found = [*as_leaves(self.solve(name)), *self.train(name)]
            for index, (mine, its) in enumerate(zip(found, expected, strict=True)):
                if mine is None or its is None:
                    continue
                distance = ((mine - its).norm() / its.norm().clamp_min(1e-30)).item()
                # a difference that is not a number is the worst there is
                if not distance <= worst[0]:
                    worst = distance, f"result {index} of {name}"
        return worst
