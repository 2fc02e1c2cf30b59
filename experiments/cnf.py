"""The published continuous normalizing flow in the plane, in every precision.

    python -m experiments.cnf [--density checkerboard|8gaussians|2spirals|all] [--size small|full] [--iterations N]
                              [--compare] [--seeds N] [--precision fp32] [--solver torchdiffeq] ... [--quick]

A hyper-network's field (:mod:`experiments.cnf_model`) is trained to map a density at t = 1 to the standard Gaussian at
t = 0, with rk4 on equal steps, Adam at 1e-2, and a rate that falls to a tenth halfway. The full size is the published
one (width 128, batches of 1024, 127 steps, 2000 iterations, arXiv 2510.23498); the small one is for a CPU. Held-out
points give the figures of the table:

    NLL             mean -log p of held-out points, in nats, with the run's own solver and precision
    NLL in fp64     the same network, judged in float64 by torchdiffeq on the same steps
    gradient error  relative error of the trained network's gradient against float64

Each run draws its density and samples, and its training curve.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from experiments.cnf_figure import draw_density
from experiments.cnf_model import HIDDEN, HyperFlow, negative_log_likelihood
from experiments.curves import draw_curves
from experiments.densities import DENSITIES, Samples
from experiments.reference import gradient_error, reference
from experiments.run import Options, Precision, Run, print_table, program, sweep, train

RATE = 1e-2
COLUMNS = ("NLL", "NLL in fp64", "gradient error", "seconds forward", "seconds backward", "peak MiB")


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        width: tanh units of the velocity.
        batch: points in a batch.
        steps: of rk4.
        iterations: of training.
        validate_every: iterations between validations.
        held_out: points that give the table's figures.
        samples: points in the picture.
    """

    width: int
    batch: int
    steps: int
    iterations: int
    validate_every: int
    held_out: int
    samples: int


SIZES = {
    "full": Size(128, 1024, 127, 2000, 20, 30_000, 30_000),
    "small": Size(64, 512, 8, 1200, 50, 20_000, 20_000),
    "quick": Size(16, 64, 4, 6, 3, 500, 500),
}


@dataclass(frozen=True)
class CnfOptions(Options):
    """Options of the flow in the plane.

    Attributes:
        density: one of DENSITIES, or "all" on the command line.
        size: "full" (as published) or "small"; empty: "full" on a GPU, "small" on the CPU. ``quick`` goes before it.
        iterations: of training; 0: those of the size.

    Raises:
        ValueError: also where these are not so.
    """

    density: str = "checkerboard"
    size: str = ""
    iterations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = "full" if self.device.startswith("cuda") else "small"
        object.__setattr__(self, "size", "quick" if self.quick else self.size or usual)
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}, expected one of {', '.join(SIZES)}")
        if self.density not in (*DENSITIES, "all"):
            raise ValueError(f"density is {self.density!r}, expected one of {', '.join(DENSITIES)}, all")
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}, expected at least 0")
        if not self.iterations:
            object.__setattr__(self, "iterations", SIZES[self.size].iterations)


def run_one(options: CnfOptions) -> Run:
    """Trains one flow, or takes up where it was left; draws and records it.

    Raises:
        Refused: the folder holds a run with other options.
    """
    size = SIZES[options.size]
    options.prepare()
    name = options.named(options.density)
    with Run(options, "cnf", name, recipe=asdict(size)) as run:
        if run.finished:
            return run
        precision = run.precision
        model = HyperFlow(HIDDEN, size.width).to(precision.device, precision.state_dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, options.iterations // 2), 0.1)
        draw = partial(Samples, options.density, device=precision.device, dtype=precision.state_dtype)
        batches = draw(batch=size.batch, seed=options.seed)
        # validation points and held-out points are the same for all seeds
        check, held_out = next(draw(batch=1000, seed=2**31)), next(draw(batch=size.held_out, seed=2**31 + 1))
        loss = partial(negative_log_likelihood, steps=size.steps)

        def loss_of_batch(batch: Tensor) -> dict[str, Tensor]:
            return {"loss": loss(precision, model, batch)}

        def validate() -> dict[str, float]:
            return {"validation loss": _judge(precision, model, check, size.steps)}

        train(
            run,
            model,
            batches,
            loss_of_batch,
            optimizer=optimizer,
            iterations=options.iterations,
            validate=validate,
            validate_every=size.validate_every,
            schedule=schedule,
        )
        draw_curves(run, ("loss", "validation loss"), "nats")
        draw_density(precision, model, held_out[: size.samples], size.steps, run.folder / "density.png", name)
        wide = copy.deepcopy(model).double()
        run.finish(
            **{
                "NLL": _judge(precision, model, held_out, size.steps),
                "NLL in fp64": _judge(reference(precision), wide, held_out.double(), size.steps),
                "gradient error": gradient_error(precision, model, check[: size.batch], loss),
            }
        )
    return run


@torch.no_grad()
def _judge(precision: Precision, model: HyperFlow, points: Tensor, steps: int) -> float:
    return negative_log_likelihood(precision, model, points, steps).item()


def parse(arguments: Sequence[str] | None) -> CnfOptions:
    """The command line."""
    parser = CnfOptions.parser("cnf", (__doc__ or "").splitlines()[0])
    parser.add_argument("--density", choices=[*DENSITIES, "all"], default="checkerboard")
    parser.add_argument("--size", choices=["small", "full"], default="", help="default: full on a GPU, else small")
    parser.add_argument("--iterations", type=int, default=0, help="of training (default: the size's)")
    return CnfOptions.read(parser, arguments)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for, and prints the table of each density; the exit status is 0."""
    options = parse(arguments)
    for density in list(DENSITIES) if options.density == "all" else [options.density]:
        runs = [run_one(one) for one in sweep(replace(options, density=density))]
        print_table(runs, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
