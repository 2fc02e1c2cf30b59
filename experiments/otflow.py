"""The published OT-Flow on tabular data, in every precision.

    python -m experiments.otflow [--dataset bsds300|power|gas|hepmass|miniboone] [--size small|full] [--synthetic]
                                 [--folder DIR] [--weights L,H,C] [--compare] [--seeds N] [--precision fp32] ...
                                 [--quick]

A potential's gradient (:mod:`experiments.otflow_model`) moves data at t = 0 to a Gaussian at t = 1. The loss is the
weighted sum of transport cost, violation of the Hamilton-Jacobi-Bellman equation, and negative log-likelihood, in the
order of ``--weights``. Of BSDS300 the sizes are those of arXiv 2510.23498, of the others those that OT-Flow's authors
give (arXiv 2006.00104), with the widths and batches of the former. Weights are each where their authors have them: the
former's 2000 belong to the equation and 800 to the likelihood; OT-Flow's larger number is the likelihood's.

The data are read from the archive in ``--folder`` (see :mod:`experiments.tabular`); with ``--synthetic``, or with
``--quick`` where there is no archive, they are generated in the same shape. The table's figures are of rows held out
for tests:

    NLL               mean -log p, in nats, with the run's own solver and precision
    likelihood error, transport error, HJB error
                      relative difference of the loss's terms from those of the same network in float64
    gradient error    relative error of the trained network's gradient against float64
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.curves import draw_curves
from experiments.files import Absent
from experiments.options import ROOT
from experiments.otflow_model import OTFlow, Potential, Terms, terms
from experiments.reference import gradient_error, reference
from experiments.run import Batches, Options, Precision, Run, print_table, program, sweep, train
from experiments.tabular import SOURCES, Splits, generated, load

ERRORS = ("likelihood error", "transport error", "HJB error", "gradient error")
COLUMNS = ("NLL", "validation loss", *ERRORS, "seconds forward", "seconds backward", "peak MiB")
# parameters are kept within these bounds, and the gradient's norm below that one
BOUND, CLIP = 1.5, 2.0
# whose gradient is held against float64: autograd keeps every stage of the reference
REFERENCE_ROWS = 64
# of a data set that is generated
SYNTHETIC_ROWS = 20_000


@dataclass(frozen=True)
class Size:
    """How a data set is trained.

    Attributes:
        width: of the potential's network.
        batch: rows in a batch.
        steps: of rk4 in training.
        check_steps: of rk4 in validation and tests.
        iterations: of training.
        validate_every: iterations between validations.
        rate: of Adam.
        drop: what the rate is divided by when the validation loss has not fallen ``patience`` times; the third drop
            ends the training.
        patience: validations.
        weights: of transport cost, violation of the HJB equation, and likelihood.
        check_rows: rows that a validation sees, and of a block in the test.
        test_rows: rows of the test, at most.
    """

    width: int
    batch: int
    steps: int
    check_steps: int
    iterations: int
    validate_every: int
    rate: float
    drop: float
    patience: int
    weights: tuple[float, float, float]
    check_rows: int = 1024
    test_rows: int = 10**9


FULL = {
    "power": Size(128, 10_000, 10, 22, 36_000, 30, 0.03, 10, 20, (1, 5, 500)),
    "gas": Size(512, 2048, 10, 28, 60_000, 50, 0.01, 10, 20, (1, 40, 1200)),
    "hepmass": Size(256, 2000, 12, 24, 40_000, 50, 0.02, 10, 15, (1, 40, 500)),
    "miniboone": Size(256, 2000, 6, 10, 8000, 20, 0.02, 10, 15, (1, 15, 100)),
    "bsds300": Size(1024, 512, 15, 30, 10_000, 100, 1e-3, 3.3, 15, (1, 2000, 800)),
}


def size_of(dataset: str, size: str) -> Size:
    """The size of that name, "full", "small" or "quick", for a data set."""
    full = FULL[dataset]
    if size == "full":
        return full
    few = (8, 32, 2, 2, 4, 2) if size == "quick" else (32, 128, 6, 8, 200, 20)
    rows = 64 if size == "quick" else 1000
    return Size(*few, 1e-2, full.drop, full.patience, full.weights, rows, rows)


@dataclass(frozen=True)
class OTFlowOptions(Options):
    """Options of OT-Flow.

    Attributes:
        dataset: one of "power", "gas", "hepmass", "miniboone", "bsds300".
        size: "full" (as published) or "small"; empty: "full" on a GPU, "small" on the CPU. ``quick`` goes before it.
        synthetic: generated data of the same shape.
        folder: where the archive lies.
        weights: of transport cost, HJB equation and likelihood, with commas; empty: the data set's.
        iterations: of training; 0: those of the size.

    Raises:
        ValueError: also where these are not so.
    """

    dataset: str = "bsds300"
    size: str = ""
    synthetic: bool = False
    folder: str = str(ROOT / "data")
    weights: str = ""
    iterations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = "full" if self.device.startswith("cuda") else "small"
        object.__setattr__(self, "size", "quick" if self.quick else self.size or usual)
        if self.size not in ("full", "small", "quick"):
            raise ValueError(f"size is {self.size!r}, expected full or small")
        if self.dataset not in SOURCES:
            raise ValueError(f"dataset is {self.dataset!r}, expected one of {', '.join(SOURCES)}")
        size = size_of(self.dataset, self.size)
        if not self.weights:
            object.__setattr__(self, "weights", ",".join(f"{weight:g}" for weight in size.weights))
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}, expected at least 0")
        if not self.iterations:
            object.__setattr__(self, "iterations", size.iterations)
        if min(self.three_weights) < 0 or self.three_weights[0] == 0:
            raise ValueError(f"weights are {self.weights!r}, expected none negative, and the first positive")

    @property
    def three_weights(self) -> tuple[float, float, float]:
        """Of transport cost, HJB equation and likelihood."""
        try:
            transport, hjb, likelihood = (float(word) for word in self.weights.split(","))
        except ValueError:
            raise ValueError(f"weights are {self.weights!r}, expected three numbers, such as 1,2000,800") from None
        return transport, hjb, likelihood


def rows_of(options: OTFlowOptions) -> Splits:
    """The data set, or generated rows where that is asked for, or ``quick`` and it is not there.

    Raises:
        Absent: it is not there; the message says where it comes from.
        Refused: its files are not those published.
    """
    if not options.synthetic:
        try:
            return load(options.dataset, Path(options.folder))
        except Absent:
            if not options.quick:
                raise
    return generated(options.dataset, 1000 if options.quick else SYNTHETIC_ROWS, seed=0)


def run_one(options: OTFlowOptions, splits: Splits) -> Run:
    """Trains one flow, or takes up where it was left; draws and records it.

    Raises:
        Refused: the folder holds a run with other options.
    """
    size = size_of(options.dataset, options.size)
    transport, hjb, likelihood = options.three_weights
    options.prepare()
    name = options.named(options.dataset)
    with Run(options, "otflow", name, synthetic=splits.synthetic, recipe=asdict(size)) as run:
        if run.finished:
            return run
        precision = run.precision
        data, check, test = (
            rows.to(precision.device, precision.state_dtype)
            for rows in (splits.train, splits.validation[: size.check_rows], splits.test[: size.test_rows])
        )
        flow = OTFlow(Potential(data.shape[1], size.width), transport).to(precision.device, precision.state_dtype)
        optimizer = torch.optim.Adam(flow.parameters(), lr=size.rate)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=1 / size.drop, patience=size.patience, threshold=0
        )

        def loss_of(precision: Precision, flow: OTFlow, x: Tensor) -> Terms:
            return terms(precision, flow, x, size.steps, (hjb, likelihood))

        def loss_of_batch(batch: tuple[Tensor]) -> dict[str, Tensor]:
            found = loss_of(precision, flow, batch[0])
            return {"loss": found.loss, "NLL": found.likelihood, "transport": found.transport, "HJB": found.hjb}

        @torch.no_grad()
        def validate() -> dict[str, float]:
            found = terms(precision, flow, check, size.check_steps, (hjb, likelihood))
            return {"validation loss": found.loss.item(), "validation NLL": found.likelihood.item()}

        @torch.no_grad()
        def bound() -> None:
            for parameter in flow.parameters():
                parameter.clamp_(-BOUND, BOUND)

        train(
            run,
            flow,
            Batches(data, batch=size.batch, seed=options.seed),
            loss_of_batch,
            optimizer=optimizer,
            iterations=options.iterations,
            validate=validate,
            validate_every=size.validate_every,
            plateau=plateau,
            least_rate=size.rate / size.drop**2.5,
            clip=CLIP,
            after_step=bound,
        )
        draw_curves(run, ("NLL", "validation NLL"), "nats")
        run.finish(
            **validate(),
            **term_errors(precision, flow, check[: size.batch], size.check_steps),
            **{
                "NLL": held_out(precision, flow, test, size),
                "gradient error": gradient_error(
                    precision, flow, check[:REFERENCE_ROWS], lambda *of: loss_of(*of).loss
                ),
            },
        )
    return run


@torch.no_grad()
def held_out(precision: Precision, flow: OTFlow, test: Tensor, size: Size) -> float:
    """Mean -log p of rows (n, d), in nats, block by block."""
    blocks = test.split(size.check_rows)
    found = [terms(precision, flow, block, size.check_steps, (0, 1)).likelihood.double() for block in blocks]
    parts = zip(found, blocks, strict=True)
    return sum(value.item() * len(block) for value, block in parts) / len(test)


@torch.no_grad()
def term_errors(precision: Precision, flow: OTFlow, x: Tensor, steps: int) -> dict[str, float]:
    """Relative differences of the loss's terms from those of the same network in float64 on the same steps."""
    found = terms(precision, flow, x, steps, (0, 1))
    exact = terms(reference(precision), copy.deepcopy(flow).double(), x.double(), steps, (0, 1))
    pairs = {
        "likelihood error": (found.likelihood, exact.likelihood),
        "transport error": (found.transport, exact.transport),
        "HJB error": (found.hjb, exact.hjb),
    }
    # a term that is zero in both is right
    least = torch.finfo(torch.float64).tiny
    return {name: abs(mine.item() - its.item()) / max(abs(its.item()), least) for name, (mine, its) in pairs.items()}


def parse(arguments: Sequence[str] | None) -> OTFlowOptions:
    """The command line."""
    parser = OTFlowOptions.parser("otflow", (__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=list(SOURCES), default="bsds300")
    parser.add_argument("--size", choices=["small", "full"], default="", help="default: full on a GPU, else small")
    parser.add_argument("--synthetic", action="store_true", help="generated data of the same shape")
    parser.add_argument("--folder", default=OTFlowOptions.folder, help="where the archive lies (experiments/data)")
    parser.add_argument("--weights", default="", help="of transport, HJB equation, likelihood, such as 1,2000,800")
    parser.add_argument("--iterations", type=int, default=0, help="of training (default: the size's)")
    return OTFlowOptions.read(parser, arguments)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for, and prints the table; the exit status is 1 where the data are not there."""
    options = parse(arguments)
    splits = rows_of(options)
    runs = [run_one(one, splits) for one in sweep(options)]
    print_table(runs, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
