"""Images classified by neural ODEs of convolutions, in every precision: STL-10 as published, or small digits.

    python -m experiments.stl10 [--data stl10|digits] [--folder FOLDER] [--epochs N] [--batch N]
                                [--compare] [--seeds N] [--precision fp32] [--solver torchdiffeq] ... [--quick]

The network (:mod:`experiments.conv_model`) solves an ODE in each block, by rk4 with equal steps. On STL-10 it is the
published one (12.6 million parameters, 128 x 128 pixels, batches of 16, 160 epochs, arXiv 2510.23498) and trained as
there, by SGD with momentum and a rate that falls along a cosine; it is for a GPU. The digits are 8 x 8 pixels and the
network has 8,650 parameters: real images, for a CPU and without a download. A fifth of STL-10's training images, and
205 digits, are held out to watch the training. The table:

    test accuracy, test loss              of the test's images: percent, and cross entropy in nats
    validation accuracy, validation loss  of those held out

Each run draws its training curves. Losses and accuracies are those of the run's own solver and precision. A dynamic
scaler keeps the adjoint in range inside of its block; between the blocks gradients are as small as the loss makes them,
unless ``--scaler both`` scales the loss as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.conv_model import DIGITS, STL10, ConvolutionalOde, Sizes
from experiments.curves import draw_curves
from experiments.images import Dataset, Labelled, load_small_digits, load_stl10
from experiments.run import Batches, Options, Precision, Run, print_table, program, solve, sweep, train

COLUMNS = ("test accuracy", "validation accuracy", "test loss", "seconds forward", "seconds backward", "peak MiB")
DATA = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        sizes: of the network.
        batch: images in a batch.
        epochs: passes over the training images.
        rate, last_rate: learning rate at the start and at the end of the cosine.
        momentum, decay: of SGD.
        clip: largest norm of the gradient; None for no limit.
        shown_at_once: images in a batch that is only evaluated.
    """

    sizes: Sizes
    batch: int
    epochs: int
    rate: float
    last_rate: float = 1e-4
    momentum: float = 0.9
    decay: float = 1e-4
    clip: float | None = None
    shown_at_once: int = 100


RECIPES = {
    "stl10": Recipe(STL10, batch=16, epochs=160, rate=0.05),
    "digits": Recipe(DIGITS, batch=32, epochs=30, rate=0.05, decay=3e-3, clip=1.0),
}
# with so few and small channels and images that a CPU needs seconds
QUICK = {
    "stl10": replace(RECIPES["stl10"], sizes=replace(STL10, channels=(4, 8, 16), steps=2), epochs=1, batch=16),
    "digits": replace(RECIPES["digits"], sizes=replace(DIGITS, channels=(4, 8)), epochs=2),
}
QUICK_SIDE = 32


@dataclass(frozen=True)
class ImageOptions(Options):
    """Options of the classification of images.

    Attributes:
        data: "stl10" or "digits".
        folder: where STL-10 lies.
        epochs, batch: passes over the training images, images in a batch; 0: those of the recipe.

    Raises:
        ValueError: also where these are not so.
    """

    data: str = "stl10"
    folder: str = str(DATA)
    epochs: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in RECIPES:
            raise ValueError(f"data is {self.data!r}, expected one of {', '.join(RECIPES)}")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(self._usual, name))

    @property
    def _usual(self) -> Recipe:
        return (QUICK if self.quick else RECIPES)[self.data]

    @property
    def recipe(self) -> Recipe:
        """How the network is trained."""
        return replace(self._usual, epochs=self.epochs, batch=self.batch)


def load(options: ImageOptions) -> Dataset:
    """The images, on the run's device.

    Raises:
        Refused: STL-10 is not there, or not as published; the message says what to do.
    """
    if options.data == "digits":
        images = load_small_digits(options.quick)
    else:
        images = load_stl10(Path(options.folder), options.quick)
        if options.quick:
            images = replace(images, side=QUICK_SIDE)
    return images.to(torch.device(options.device))


def make_model(precision: Precision, sizes: Sizes) -> ConvolutionalOde:
    """The untrained network, solved as the run's options say; each block has a scaler of its own."""
    return ConvolutionalOde(sizes, partial(solve, precision)).to(precision.device, precision.state_dtype)


@torch.no_grad()
def judge(
    precision: Precision, model: ConvolutionalOde, images: Dataset, part: Labelled, at_once: int
) -> tuple[float, float]:
    """Accuracy in percent and mean cross entropy in nats of images, as they are, in the run's precision."""
    right = torch.zeros((), dtype=torch.int64, device=precision.device)
    loss = torch.zeros((), dtype=torch.float64, device=precision.device)
    for batch, labels in zip(part.images.split(at_once), part.labels.split(at_once), strict=True):
        with precision.context():
            logits = model(images.shown(batch).to(precision.state_dtype))
        right += (logits.argmax(1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
    return 100 * right.item() / len(part), loss.item() / len(part)


def run_one(options: ImageOptions, images: Dataset) -> Run:
    """Trains one network on images, or takes up where it was left; draws and records it.

    Raises:
        Refused: the folder holds a run with other options.
    """
    recipe = options.recipe
    options.prepare()
    name = options.named(options.data)
    with Run(options, "stl10", name, synthetic=images.synthetic, recipe=asdict(recipe)) as run:
        if run.finished:
            return run
        precision = run.precision
        model = make_model(precision, recipe.sizes)
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.rate, momentum=recipe.momentum, weight_decay=recipe.decay
        )
        epoch = ceil(len(images.train) / recipe.batch)
        iterations = recipe.epochs * epoch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, recipe.last_rate)

        def loss_of_batch(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            pixels, labels = batch
            with precision.context():
                logits = model(images.augmented(pixels).to(precision.state_dtype))
            return {"loss": F.cross_entropy(logits, labels)}

        def validate() -> dict[str, float]:
            accuracy, loss = judge(precision, model, images, images.validation, recipe.shown_at_once)
            return {"validation accuracy": accuracy, "validation loss": loss}

        train(
            run,
            model,
            Batches(images.train.images, images.train.labels, batch=recipe.batch, seed=options.seed),
            loss_of_batch,
            optimizer=optimizer,
            iterations=iterations,
            validate=validate,
            validate_every=epoch,
            save_every=epoch,
            schedule=schedule,
            clip=recipe.clip,
        )
        draw_curves(run, ("loss", "validation loss"), "nats")
        accuracy, loss = judge(precision, model, images, images.test, recipe.shown_at_once)
        run.finish(**{"test accuracy": accuracy, "test loss": loss, **validate()})
    return run


def parse(arguments: Sequence[str] | None) -> ImageOptions:
    """The command line."""
    parser = ImageOptions.parser("stl10", (__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=list(RECIPES), default="stl10")
    parser.add_argument("--folder", default=str(DATA), help="where STL-10 lies (default: experiments/data)")
    parser.add_argument(
        "--epochs", type=int, default=0, help="passes over the training images (default: 160, digits 30)"
    )
    parser.add_argument("--batch", type=int, default=0, help="images in a batch (default: 16, digits 32)")
    return ImageOptions.read(parser, arguments)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for and prints the table; the exit status is 1 where there are no images."""
    options = parse(arguments)
    images = load(options)
    print_table([run_one(one, images) for one in sweep(options)], COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
