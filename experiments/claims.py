"""What is claimed of 16 bits, and what the runs say of it.

A claim is judged by all runs of its experiment that are not short ones; it is open until those that it needs are there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report_runs import Group, Recorded, groups
from experiments.roundoff import ROUNDOFF

# relative difference of the likelihood from fp32's, of a mean over the seeds
NLL_WITHIN = 0.01
# percent of the test's digits, and between the best and the worst precision
ACCURACY, ACCURACY_SPREAD = 97.0, 0.7
GRADIENT_WITHIN = 1e-3
TERMS = ("likelihood error", "transport error", "HJB error")
PEER = ("torchdiffeq", "fp32", "none")
OURS = (("rampde", "bf16", "none"), ("rampde", "fp16", "dynamic"))
UNSCALED = (("torchdiffeq", "fp16", "none"), ("rampde", "fp16", "none"))


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
        *[likelihood(group) for group in of["cnf"]],
        *([] if of["cnf"] else [likelihood(None)]),
        unscaled(runs),
        accuracy(digits[0] if digits else None),
        damped(runs),
        loss_terms(of["otflow"]),
    ]


def _values(group: Group, variant: tuple[str, str, str], column: str) -> list[float]:
    """Of a variant, over its seeds."""
    return [value for line in group.line(*variant) for value in line.values(column)]


def _name(variant: tuple[str, str, str]) -> str:
    return " ".join(word for word in variant if word != "none")


def likelihood(group: Group | None) -> Claim:
    """16 bits learn a density as well as fp32 does."""
    text = "The flow learns {} in 16 bits as in fp32 with torchdiffeq"
    bar = "held-out NLL, mean over the seeds, within 1 % of fp32's"
    if group is None:
        return Claim(text.format("its densities"), bar)
    text = text.format(group.subject)
    found = {variant: values for variant in (PEER, *OURS) if (values := _values(group, variant, "NLL"))}
    if len(found) < 1 + len(OURS):
        return Claim(text, bar)
    theirs = statistics.fmean(found[PEER])
    differences = {_name(variant): statistics.fmean(found[variant]) / theirs - 1 for variant in OURS}
    scatter = [value / theirs - 1 for value in found[PEER]]
    said = [f"{name} {difference:+.2%}" for name, difference in differences.items()]
    said.append(f"fp32's own seeds {min(scatter):+.2%} to {max(scatter):+.2%}")
    seeds = min(len(values) for values in found.values())
    met = all(abs(difference) <= NLL_WITHIN for difference in differences.values())
    return Claim(text, bar, f"{'; '.join(said)} ({seeds} seeds)", met)


def unscaled(runs: Sequence[Recorded]) -> Claim:
    """fp16 needs its scale."""
    text = "fp16 without scaling fails or loses accuracy, with dynamic scaling it does not"
    bar = (
        "the published flow's gradient, untrained, at its most steps: with scaling within 1e-3 of float64, "
        "without at least 4 times as far"
    )
    studies = [run for run in runs if run.experiment == "cnf_gradients" and run.summary]
    if not studies:
        return Claim(text, bar)
    said, met = [], True
    for run in studies:
        errors = {_name(variant): _of(run, _name(variant)) for variant in (*UNSCALED, ("rampde", "fp16", "dynamic"))}
        said += [f"{name} {error:.1e}" for name, error in errors.items()]
        *without, scaled = errors.values()
        met &= scaled <= GRADIENT_WITHIN and all(error >= 4 * scaled for error in without)
    return Claim(text, bar, ", ".join(said), met)


def _of(run: Recorded, variant: str) -> float:
    start = f"gradient error, {variant}, "
    return next((value for name, value in run.summary.items() if name.startswith(start)), math.nan)


def accuracy(group: Group | None) -> Claim:
    """Digits are told apart in every precision."""
    text = "The digits are told apart as well in every precision"
    bar = f"test accuracy at least {ACCURACY:g} %, spread of the means below {ACCURACY_SPREAD:g} points"
    scaled = [] if group is None else [line for line in group.lines if line.values("test accuracy")]
    scaled = [line for line in scaled if line.variant[:3] not in UNSCALED]
    if not scaled:
        return Claim(text, bar)
    means = {_name(line.variant[:3]): statistics.fmean(line.values("test accuracy")) for line in scaled}
    spread = max(means.values()) - min(means.values())
    seeds = min(len(line.done) for line in scaled)
    least = min(value for line in scaled for value in line.values("test accuracy"))
    said = (
        f"means {min(means.values()):.2f} to {max(means.values()):.2f} %, the worst run {least:.2f} % ({seeds} seeds)"
    )
    return Claim(text, bar, said, least >= ACCURACY and spread < ACCURACY_SPREAD)


def damped(runs: Sequence[Recorded]) -> Claim:
    """The adjoint stays in range."""
    text = "Gradients of an ODE whose adjoint float16 cannot hold"
    bar = "fp16 with dynamic scaling within 1e-3 of float64 (published: 1e-2)"
    name = "gradient error, dynamic"
    errors = [run.summary[name] for run in runs if run.experiment == "adjoint_scaling" and name in run.summary]
    if not errors:
        return Claim(text, bar)
    return Claim(text, bar, f"{max(errors):.1e}", max(errors) <= GRADIENT_WITHIN)


def loss_terms(found: Sequence[Group]) -> Claim:
    """The terms of OT-Flow's loss are those of float64."""
    text = "OT-Flow's likelihood, transport cost and HJB term in 16 bits are those of a float64 run"
    bar = "relative difference at most the velocity's unit roundoff: 2^-8 in bf16, 2^-11 in fp16"
    ratios: dict[str, list[float]] = {}
    for line in (line for group in found for variant in OURS for line in group.line(*variant)):
        precision = line.variant[1]
        errors = (error for term in TERMS for error in line.values(term))
        ratios.setdefault(precision, []).extend(error / ROUNDOFF[precision] for error in errors)
    worst = {
        name: max(values, key=lambda ratio: (math.isnan(ratio), ratio)) for name, values in ratios.items() if values
    }
    if not worst:
        return Claim(text, bar)
    said = ", ".join(f"{precision} {ratio:.2f} of it at most" for precision, ratio in worst.items())
    subjects = ", ".join(dict.fromkeys(group.subject for group in found))
    return Claim(text, bar, f"{said} ({subjects})", all(ratio <= 1 for ratio in worst.values()))
