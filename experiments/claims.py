"""What is claimed of 16 bits, and what the runs say of it.

A claim is judged by all runs of its experiment that are not short ones. It is open until those that it needs are there,
and missed where one of these failed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report_runs import Group, Line, Recorded, groups
from experiments.roundoff import ROUNDOFF

# relative difference of the likelihood from fp32's, of a mean over the seeds
NLL_WITHIN = 0.01
# percent of the test's digits, and between the best and the worst precision
ACCURACY, ACCURACY_SPREAD = 97.0, 0.7
GRADIENT_WITHIN = 1e-3
TERMS = ("likelihood error", "transport error", "HJB error")
Variant = tuple[str, str, str]
PEER = ("torchdiffeq", "fp32", "none")
OURS = (("rampde", "bf16", "none"), ("rampde", "fp16", "dynamic"))


@dataclass(frozen=True)
class Claim:
    """A claim with its bar.

    Attributes:
        text: what is claimed.
        bar: what must be reached.
        reached: what was; empty where nothing was run.
        met: whether that is enough.
    """

    text: str
    bar: str
    reached: str = ""
    met: bool = False

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not run" if not self.reached else "met" if self.met else "missed"


def claims(runs: Sequence[Recorded]) -> list[Claim]:
    """All claims, judged."""
    runs = [run for run in runs if not run.config.get("quick")]
    found = groups(runs)
    of = {name: [group for group in found if group.experiment == name] for name in ("cnf", "stl10", "otflow")}
    digits = [group for group in of["stl10"] if group.subject == "digits"]
    return [
        *[likelihood(group) for group in of["cnf"] or [None]],
        unscaled(runs),
        *[accuracy(group) for group in digits or [None]],
        damped(runs),
        *[loss_terms(group) for group in of["otflow"] or [None]],
    ]


def _lines(group: Group | None, variants: Sequence[Variant]) -> list[Line]:
    """The rows of variants, none where one is missing or has no run that came to an end."""
    found = [line for variant in variants if group is not None and (line := group.line_of(variant)) is not None]
    return found if len(found) == len(variants) and all(line.done or line.failed for line in found) else []


def _failures(lines: Sequence[Line]) -> str:
    """Which variants failed how often; empty where none did."""
    return ", ".join(
        f"{line.name} failed in {len(line.failed)} of {len(line.runs)} runs" for line in lines if line.failed
    )


def likelihood(group: Group | None) -> Claim:
    """16 bits learn a density as well as fp32 does."""
    subject = "its densities" if group is None else group.subject
    text = f"The flow learns {subject} in 16 bits as in fp32 with torchdiffeq"
    bar = "held-out NLL, mean over the seeds, within 1 % of fp32's"
    lines = _lines(group, (PEER, *OURS))
    if not lines or _failures(lines):
        return Claim(text, bar, _failures(lines))
    seeds = set.intersection(*({run.seed for run in line.done} for line in lines))
    theirs, *ours = ([*line.values("NLL", seeds)] for line in lines)
    if not theirs:
        return Claim(text, bar)
    mean = statistics.fmean(theirs)
    differences = [statistics.fmean(values) / mean - 1 for values in ours]
    said = [f"{line.name} {difference:+.2%}" for line, difference in zip(lines[1:], differences, strict=True)]
    said.append(f"fp32's own seeds {min(theirs) / mean - 1:+.2%} to {max(theirs) / mean - 1:+.2%}")
    met = all(abs(difference) <= NLL_WITHIN for difference in differences)
    return Claim(text, bar, f"{'; '.join(said)} ({len(seeds)} seeds)", met)


def unscaled(runs: Sequence[Recorded]) -> Claim:
    """fp16 needs its scale."""
    text = "fp16 without scaling fails or loses accuracy, with dynamic scaling it does not"
    bar = (
        "the published flow's gradient, untrained, at its most steps: with scaling within 1e-3 of float64, "
        "without at least 4 times as far"
    )
    names = ["torchdiffeq fp16", "rampde fp16", "rampde fp16 dynamic"]
    said, met = [], True
    for run in (run for run in runs if run.experiment == "cnf_gradients"):
        found = {
            name: [value for column, value in run.summary.items() if column.startswith(f"gradient error, {name}, ")]
            for name in names
        }
        if not all(found.values()):
            continue
        *without, scaled = (values[0] for values in found.values())
        said += [f"{name} {values[0]:.1e}" for name, values in found.items()]
        met &= scaled <= GRADIENT_WITHIN and all(error >= 4 * scaled for error in without)
    return Claim(text, bar, ", ".join(said), bool(said) and met)


def accuracy(group: Group | None) -> Claim:
    """Digits are told apart in every precision."""
    text = "The digits are told apart as well in every precision"
    bar = f"test accuracy at least {ACCURACY:g} %, spread of the means below {ACCURACY_SPREAD:g} points"
    lines = _lines(group, (PEER, ("rampde", "fp32", "none"), *OURS))
    if not lines or _failures(lines):
        return Claim(text, bar, _failures(lines))
    values = [line.values("test accuracy") for line in lines]
    means = [statistics.fmean(of_line) for of_line in values]
    least, seeds = min(map(min, values)), min(map(len, values))
    said = f"means {min(means):.2f} to {max(means):.2f} %, the worst run {least:.2f} % ({seeds} seeds)"
    return Claim(text, bar, said, least >= ACCURACY and max(means) - min(means) < ACCURACY_SPREAD)


def damped(runs: Sequence[Recorded]) -> Claim:
    """The adjoint stays in range."""
    text = "Gradients of an ODE whose adjoint float16 cannot hold"
    bar = "fp16 with dynamic scaling within 1e-3 of float64 (published: 1e-2)"
    name = "gradient error, dynamic"
    studies = [run for run in runs if run.experiment == "adjoint_scaling"]
    errors = [run.summary[name] for run in studies if name in run.summary]
    if any(run.status == "failed" for run in studies):
        return Claim(text, bar, "the study failed")
    return Claim(text, bar, f"{max(errors):.1e}" if errors else "", bool(errors) and max(errors) <= GRADIENT_WITHIN)


def loss_terms(group: Group | None) -> Claim:
    """The terms of OT-Flow's loss are those of float64."""
    kind = "" if group is None else f" ({group.subject}{', synthetic data' if group.synthetic else ''})"
    text = (
        f"OT-Flow's likelihood, transport cost and HJB term in 16 bits are those of the same network in float64{kind}"
    )
    bar = "relative difference at most the velocity's unit roundoff: 2^-8 in bf16, 2^-11 in fp16"
    lines = _lines(group, OURS)
    if not lines or _failures(lines):
        return Claim(text, bar, _failures(lines))
    worst = {}
    for line in lines:
        precision = line.variant[1]
        ratios = [error / ROUNDOFF[precision] for term in TERMS for error in line.values(term)]
        worst[precision] = max(ratios, key=lambda ratio: (math.isnan(ratio), ratio))
    said = ", ".join(f"{precision} {ratio:.2f} of it at most" for precision, ratio in worst.items())
    return Claim(text, bar, said, all(ratio <= 1 for ratio in worst.values()))
