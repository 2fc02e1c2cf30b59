"""Why the flow's gradient is scaled and summed in 32 bits: its error before training, in every precision.

    python -m experiments.cnf_gradients [--density checkerboard] [--quick] [--device cpu] [--out DIR]

One network of the published size (:mod:`experiments.cnf_model`, width 128, untrained) and one batch: the gradient of
the negative log-likelihood in each precision, with each solver and scaler, against float64. The loss is a mean, so that
a sample's cotangent is one over the batch: the larger the batch, the more of it lies below what float16 can hold. And
the gradient is a sum over steps: what adds it up in 16 bits loses more, the more steps there are.

The published training has batches of 1024 and 127 steps (arXiv 2510.23498). Trained networks say less about arithmetic:
their gradients are small sums of large terms, and of another network in each precision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bench.common import machine, machine_line, print_table
from experiments.cnf_model import HIDDEN, HyperFlow, negative_log_likelihood
from experiments.densities import DENSITIES, Samples
from experiments.options import Options, Precision, published_variants
from experiments.reference import distance, gradient, reference
from experiments.run import Run, program
from experiments.study import Row, Study, StudyOptions
from experiments.style import COLOURS, in_words, picture

STYLES = {"none": "-", "grad": "--", "dynamic": "-."}


@dataclass(frozen=True)
class Setting:
    """Points of which the loss is the mean, and steps of rk4."""

    batch: int
    steps: int

    @property
    def column(self) -> str:
        """Its name in the table."""
        return f"{self.steps} steps, batch {self.batch}"


@dataclass(frozen=True)
class Sizes:
    """The width of the network, and the two ways through settings, along the batch and along the steps."""

    width: int
    along_batch: tuple[Setting, ...]
    along_steps: tuple[Setting, ...]

    @property
    def settings(self) -> list[Setting]:
        """All of them, each once."""
        return list(dict.fromkeys((*self.along_batch, *self.along_steps)))


FULL = Sizes(
    128,
    tuple(Setting(batch, 8) for batch in (64, 256, 1024, 4096, 16_384)),
    tuple(Setting(1024, steps) for steps in (8, 16, 32, 64, 127)),
)
QUICK = Sizes(16, tuple(Setting(batch, 4) for batch in (32, 128)), tuple(Setting(32, steps) for steps in (4, 8)))


@dataclass(frozen=True)
class GradientOptions(StudyOptions):
    """Options of the study.

    Attributes:
        density: one of DENSITIES.

    Raises:
        ValueError: also where it is none.
    """

    density: str = "checkerboard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density not in DENSITIES:
            raise ValueError(f"density is {self.density!r}, expected one of {', '.join(DENSITIES)}")

    @property
    def sizes(self) -> Sizes:
        """What is measured."""
        return QUICK if self.quick else FULL


def variants(study: GradientOptions) -> list[Options]:
    """Those of the published tables, as far as the study takes them."""
    common = Options(device=study.device, threads=study.threads, seed=study.seed)
    return [chosen for chosen in published_variants(common) if study.takes(chosen)]


class Problem:
    """The network, its batches, and their gradients in float64, which are computed once."""

    def __init__(self, study: GradientOptions) -> None:
        torch.manual_seed(study.seed)
        self.study, self.device = study, torch.device(study.device)
        self.model = HyperFlow(HIDDEN, study.sizes.width).to(self.device)
        self._exact = cache(self._reference)

    def points(self, batch: int) -> Tensor:
        """The batch, (batch, 2), float32."""
        return next(Samples(self.study.density, batch, self.study.seed, self.device, torch.float32))

    def _gradient(self, precision: Precision, setting: Setting) -> Tensor:
        model = HyperFlow(HIDDEN, self.study.sizes.width).to(self.device, precision.state_dtype)
        model.load_state_dict(self.model.state_dict())
        points = self.points(setting.batch).to(precision.state_dtype)
        return gradient(precision, model, points, partial(negative_log_likelihood, steps=setting.steps))

    def _reference(self, setting: Setting) -> Tensor:
        return self._gradient(reference(Precision(Options(device=self.study.device))), setting)

    def errors(self, options: Options) -> dict[str, float]:
        """A variant's relative error in each setting."""
        # tf32 is a setting of the process
        options.prepare()
        found = {}
        for setting in self.study.sizes.settings:
            mine = self._gradient(Precision(options), setting)
            found[setting.column] = distance(mine, self._exact(setting))
        return found


def draw(path: Path, rows: Sequence[Row], sizes: Sizes) -> None:
    """Errors against the batch and against the steps."""
    with picture(path, panels=2, width=5.4, height=4.6) as panels:
        ways = ((sizes.along_batch, "batch"), (sizes.along_steps, "steps"))
        for panel, (settings, along) in zip(panels, ways, strict=True):
            fixed = "steps" if along == "batch" else "batch"
            for row in rows:
                errors = [min(row[setting.column], 10) for setting in settings]
                style = {"color": COLOURS[row["precision"]], "linestyle": STYLES[row["scaler"]]}
                # curves that coincide are seen around each other
                style |= {"marker": "x"} if row["solver"] == "torchdiffeq" else {"marker": "o"}
                style |= {"markerfacecolor": "none", "markersize": 9 if row["scaler"] == "dynamic" else 6}
                panel.loglog([getattr(setting, along) for setting in settings], errors, label=row["variant"], **style)
            panel.set_xscale("log", base=2)
            panel.set_xlabel(along)
            panel.set_title(f"relative error of the gradient, {fixed} {getattr(settings[0], fixed)}", fontsize=10)
        figure = panels[0].figure
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, draws and writes; the exit status is 1 where a variant was refused."""
    parser = GradientOptions.parser("cnf_gradients", (__doc__ or "").splitlines()[0])
    parser.add_argument("--density", choices=list(DENSITIES), default="checkerboard")
    options = GradientOptions.read(parser, arguments, variants)
    options.prepare()
    print(machine_line(machine()))
    with Run(options, "cnf_gradients", f"{options.density}-{options.run_name}") as run:
        study, problem = Study(run.folder / "study.csv", options.fresh), Problem(options)
        for chosen in variants(options):
            key = {"solver": chosen.solver, "precision": chosen.precision, "scaler": chosen.scaler}
            study.row({"variant": in_words(**key), **key}, partial(problem.errors, chosen))
        columns = [setting.column for setting in options.sizes.settings]
        table = [{"": row["variant"], **{name: f"{row[name]:.1e}" for name in columns}} for row in study.rows]
        print_table(table, "relative errors of the gradient against float64")
        draw(run.folder / "gradients.png", study.rows, options.sizes)
        last = options.sizes.along_steps[-1].column
        run.finish(**{f"gradient error, {row['variant']}, {last}": row[last] for row in study.rows})
    return 0 if run.done else 1


if __name__ == "__main__":
    sys.exit(main())
