"""Trains a continuous normalizing flow on a 2-D density in 32 and in 16 bits, side by side.

A flow moves each data point x along dx/dt = f(t, x) until, at t = 1, the points look like a Gaussian. How
much f stretches space on the way, the integral of its divergence, gives the density of the data exactly:

    log p(x(0)) = log N(x(1); 0, I) + integral of div f(t, x(t)) from 0 to 1.

Maximizing it is the training; following f backwards from Gaussian noise makes new samples. The same network
is trained four ways on the same batches: by torchdiffeq in fp32, and by rampde in bf16, in fp16 (there with
dynamic scaling of the adjoint, which rampde adds by itself), and in bf16 with 8-bit checkpoints, where memory is
short. What changes is the import and an autocast:

    with torch.autocast("cuda", torch.bfloat16):
        x, log_volume = rampde.odeint(field, (data, zeros), times, method="rk4")

    python examples/cnf.py --density checkerboard

At the end a table compares the ways, and a picture shows the densities they learned.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torchdiffeq
from torch import Tensor, nn
from tqdm import trange

import rampde
from rampde.meter import metered

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EXTENT = 4.5  # the picture shows the square [-EXTENT, EXTENT]^2


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians of width 0.35 on a circle of radius 2.8."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre = 2.8 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.35 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Every other square, of side 2, of a board on [-4, 4]^2."""
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    corner = 2.0 * torch.stack([column, row], dim=1) - 4
    return corner + 2 * torch.rand(n, 2, generator=generator)


def two_spirals(n: int, generator: torch.Generator) -> Tensor:
    """Two arms of one and a half turns, opposite each other, blurred by 0.1."""
    turn = torch.rand(n, generator=generator).sqrt()
    angle = 3 * math.pi * turn + math.pi * torch.randint(2, (n,), generator=generator)
    arm = 4 * turn.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return arm + 0.1 * torch.randn(n, 2, generator=generator)


DENSITIES = {"8gaussians": eight_gaussians, "checkerboard": checkerboard, "2spirals": two_spirals}


class Field(nn.Module):
    """Velocity f(t, x) = sum_i u_i tanh(w_i . x + b_i), where a small network turns t into all w, b and u.

    Its divergence is a formula, sum_i (1 - tanh^2) u_i . w_i, and needs no second derivative.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5 * width))
        self.scale = 1 / math.sqrt(width)
        self.evaluations = 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocity (n, 2) of the points and divergence (n, 1) at them."""
        self.evaluations += 1
        x, _ = state
        w, b, u = self.hyper(t.reshape(1, 1)).view(5, -1).split([2, 1, 2])
        # the products are in 16 bits; 1 - tanh^2 is formed in 32, where it does not cancel
        units = torch.addmm(b, x, w).float().tanh()
        velocity = self.scale * (units @ u.T)
        traces = self.scale * (w.float() * u.float()).sum(0)
        divergence = ((1 - units.square()) * traces).sum(1, keepdim=True)
        return velocity, divergence


@dataclass
class Way:
    """One way to solve and train: a solver, a precision, and what was measured of it."""

    name: str
    odeint: Callable[..., tuple[Tensor, Tensor]]
    precision: torch.dtype
    model: Field
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    loss: float = math.nan
    forward_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)
    evaluations: tuple[int, int] = (0, 0)
    peak_mib: float = math.nan
    nll: float = math.nan


def make_ways(args: argparse.Namespace) -> list[Way]:
    """The four ways, each with its own copy of the same untrained network."""
    ways = []
    for name, odeint, precision in (
        ("torchdiffeq fp32", torchdiffeq.odeint, torch.float32),
        ("rampde bf16", rampde.odeint, torch.bfloat16),
        ("rampde fp16", rampde.odeint, torch.float16),
        ("rampde bf16+fp8", partial(rampde.odeint, checkpoint=rampde.Fp8("lean")), torch.bfloat16),
    ):
        torch.manual_seed(args.seed)
        model = Field(args.width).to(args.device)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, args.iterations, pct_start=0.1)
        ways.append(Way(name, odeint, precision, model, optimizer, schedule))
    return ways


def flow(way: Way, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Where the points x (n, 2) are at the last of ``times``, and the divergence (n,) gathered on the way."""
    low = way.precision != torch.float32
    with torch.autocast(x.device.type, way.precision if low else None, enabled=low):
        points, log_volume = way.odeint(way.model, (x, x.new_zeros(len(x), 1)), times, method="rk4")
    return points[-1], log_volume[-1, :, 0]


def gaussian_log_density(x: Tensor) -> Tensor:
    """log N(x; 0, I) of points (n, 2)."""
    return -0.5 * x.square().sum(1) - math.log(2 * math.pi)


def negative_log_likelihood(way: Way, x: Tensor, times: Tensor) -> Tensor:
    """The loss: -log p of the points x (n, 2), on average."""
    end, log_volume = flow(way, x, times)
    return -(gaussian_log_density(end) + log_volume).mean()


def train_once(way: Way, x: Tensor, times: Tensor) -> None:
    """One optimizer step on a batch, with both halves timed and the evaluations of f counted."""
    way.optimizer.zero_grad()
    clock, evaluations = [now(x.device)], [way.model.evaluations]
    loss = negative_log_likelihood(way, x, times)
    clock.append(now(x.device))
    evaluations.append(way.model.evaluations)
    loss.backward()
    clock.append(now(x.device))
    evaluations.append(way.model.evaluations)
    way.optimizer.step()
    way.schedule.step()
    way.loss = loss.item()
    way.forward_seconds.append(clock[1] - clock[0])
    way.backward_seconds.append(clock[2] - clock[1])
    way.evaluations = evaluations[1] - evaluations[0], evaluations[2] - evaluations[1]


def one_gradient(way: Way, x: Tensor, times: Tensor) -> None:
    """The loss of a batch and its gradient, without a step of the optimizer."""
    negative_log_likelihood(way, x, times).backward()


def now(device: torch.device) -> float:
    """Seconds, once the device has done all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def log_density(model: Field, x: Tensor, steps: int) -> Tensor:
    """log p (n,) of points (n, 2): one judge for all ways, torchdiffeq in fp32 on a grid four times finer."""
    zeros = x.new_zeros(len(x), 1)
    times = torch.linspace(0, 1, 4 * steps + 1, device=x.device)
    points, log_volume = torchdiffeq.odeint(model, (x, zeros), times, method="rk4")
    return gaussian_log_density(points[-1]) + log_volume[-1, :, 0]


@torch.no_grad()
def draw(ways: Sequence[Way], data: Tensor, args: argparse.Namespace) -> None:
    """Saves the picture: a row for each way, with the data, the learned density and samples of the flow."""
    pixels = 60 if args.quick else 120
    bins, extent = pixels // 2, (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axis = (torch.arange(pixels, device=args.device) + 0.5) * (2 * EXTENT / pixels) - EXTENT
    grid = torch.cartesian_prod(axis, axis)
    times = torch.linspace(1, 0, args.steps + 1, device=args.device)
    noise = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(args.seed)).to(args.device)

    def histogram(points: Tensor) -> Tensor:
        counts, _ = torch.histogramdd(points.cpu(), [bins, bins], range=extent)
        return counts / (len(points) * (2 * EXTENT / bins) ** 2)

    panels = [
        [
            histogram(data),
            log_density(way.model, grid, args.steps).exp().view(pixels, pixels).cpu(),
            # from Gaussian noise back to t = 0, with the way's own solver and precision
            histogram(flow(way, noise, times)[0]),
        ]
        for way in ways
    ]
    top = torch.stack([row[1] for row in panels]).quantile(0.995).item()
    figure, axes = plt.subplots(len(ways), 3, figsize=(9, 2.7 * len(ways)), layout="constrained", squeeze=False)
    for way, row, images in zip(ways, axes, panels, strict=True):
        for plot, image in zip(row, images, strict=True):
            shown = plot.imshow(image.T, "magma", origin="lower", extent=extent, vmin=0, vmax=top)
            plot.set(xticks=[], yticks=[])
            plot.spines[:].set_visible(False)
        row[0].set_ylabel(f"{way.name}\nNLL {way.nll:.3f}", fontsize=12)
    for plot, title in zip(axes[0], ("data", "learned density", "samples"), strict=True):
        plot.set_title(title, fontsize=13)
    figure.colorbar(shown, ax=axes, shrink=0.4, aspect=24, pad=0.02, label="density", extend="max")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=140)


def print_table(ways: Sequence[Way], gaussian_nll: float, device: torch.device) -> None:
    """The ways beside each other; NLL is the mean negative log-likelihood of held-out points, in nats."""
    print(
        f"\n{'':<18}{'NLL':>7}{'against fp32':>14}{'forward':>11}{'backward':>11}{'peak memory':>13}"
        f"{'f forward':>11}{'f backward':>12}"
    )
    for way in ways:
        forward, backward = statistics.median(way.forward_seconds), statistics.median(way.backward_seconds)
        print(
            f"{way.name:<18}{way.nll:7.3f}{100 * (way.nll / ways[0].nll - 1):+12.2f} %"
            f"{1e3 * forward:8.1f} ms{1e3 * backward:8.1f} ms{way.peak_mib:9.1f} MiB"
            f"{way.evaluations[0]:11}{way.evaluations[1]:12}"
        )
    print(
        f"\nNLL: held-out points, judged in fp32 on a grid four times finer; an untrained Gaussian has"
        f" {gaussian_nll:.3f}.\nTimes, evaluations of f: of one training iteration (median).\n"
        f"Peak memory: the most bytes of tensors alive at once in it, on {device.type}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures, prints and draws."""
    parser = argparse.ArgumentParser(description="trains a 2-D flow in 32 and in 16 bits, side by side")
    parser.add_argument("--density", choices=DENSITIES, default="8gaussians")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8, help="RK4 steps from t = 0 to t = 1")
    parser.add_argument("--width", type=int, default=64, help="tanh units of the velocity field")
    parser.add_argument("--rate", type=float, default=1e-2, help="largest learning rate")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--output", type=Path, help="the picture (examples/output/cnf_<density>.png)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few small iterations, to see that it runs")
    args = parser.parse_args(arguments)
    args.output = args.output or Path(__file__).parent / "output" / f"cnf_{args.density}.png"
    if args.quick:
        args.iterations, args.batch, args.steps = 5, 64, 4
    # the tensors are too small to share, and threads that wait for each other stall on a busy machine
    torch.set_num_threads(args.threads)

    density = DENSITIES[args.density]
    generator = torch.Generator().manual_seed(args.seed)
    held_out = density(1_000 if args.quick else 10_000, generator).to(args.device)
    times = torch.linspace(0, 1, args.steps + 1, device=args.device)
    ways = make_ways(args)

    progress = trange(args.iterations, desc=args.density, unit=" steps")
    for iteration in progress:
        batch = density(args.batch, generator).to(args.device)
        # the ways take turns, so that whatever else the machine does slows all of them alike
        for way in ways:
            train_once(way, batch, times)
        if iteration % 5 == 0:
            losses = ", ".join(f"{way.name.split()[1]} {way.loss:.3f}" for way in ways)
            progress.set_postfix_str(f"loss {losses}")

    batch = density(args.batch, generator).to(args.device)
    for way in ways:
        way.nll = -log_density(way.model, held_out, args.steps).mean().item()
        way.optimizer.zero_grad()
        work = partial(one_gradient, way, batch, times)
        way.peak_mib = metered(work, args.device).peak / 2**20
    draw(ways, density(2_000 if args.quick else 40_000, generator).to(args.device), args)
    print_table(ways, -gaussian_log_density(held_out).mean().item(), args.device)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
