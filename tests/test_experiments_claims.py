"""What the report says of the claims: met, missed or not run, judged from made-up runs on both sides of each bar."""

from pathlib import Path
from typing import Any

import pytest
from experiment_runs import write_run

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("tabulate")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tqdm")

from experiments.claims import Claim, claims
from experiments.report_runs import collect

LIKELIHOOD, UNSCALED, DIGITS, DAMPED, TERMS = "The flow", "fp16 without", "The digits", "Gradients", "OT-Flow"
FP16 = ("rampde", "fp16", "dynamic")


def judged(folder: Path, start: str) -> list[Claim]:
    return [claim for claim in claims(collect(folder)) if claim.text.startswith(start)]


def write_flows(runs: Path, bf16: float, fp16: float, density: str = "2spirals") -> None:
    """fp32 has 2.0 on average over two seeds, the others what is given."""
    variants = {("torchdiffeq", "fp32", "none"): 2.0, ("rampde", "bf16", "none"): bf16, FP16: fp16}
    for (solver, precision, scaler), mean in variants.items():
        for seed, away in enumerate((-0.05, 0.05)):
            write_run(runs, "cnf", density, solver, precision, scaler, seed, summary={"NLL": mean + away})


def test_nothing_is_claimed_without_runs(tmp_path: Path) -> None:
    found = claims(collect(tmp_path))
    assert [claim.verdict for claim in found] == ["not run"] * 5


@pytest.mark.parametrize(
    ("bf16", "fp16", "verdict"),
    [(2.019, 1.981, "met"), (2.021, 2.0, "missed"), (2.0, 1.979, "missed"), (2.0, float("nan"), "missed")],
)
def test_likelihood(bf16: float, fp16: float, verdict: str, tmp_path: Path) -> None:
    write_flows(tmp_path, bf16, fp16)
    (claim,) = judged(tmp_path, LIKELIHOOD)
    assert claim.verdict == verdict
    assert "2spirals" in claim.text
    assert f"rampde bf16 {bf16 / 2 - 1:+.2%}" in claim.reached
    assert "seeds -2.50% to +2.50% (2 seeds)" in claim.reached


def test_each_density_is_a_claim_and_needs_all_its_variants(tmp_path: Path) -> None:
    write_flows(tmp_path, 2.0, 2.0)
    write_run(tmp_path, "cnf", "checkerboard", summary={"NLL": 3.0})
    assert [claim.verdict for claim in judged(tmp_path, LIKELIHOOD)] == ["met", "not run"]


def test_short_runs_do_not_count(tmp_path: Path) -> None:
    summary = {"gradient error, dynamic": 1e-5}
    config = {"solver": "rampde", "quick": True}
    folder = write_run(tmp_path, "adjoint_scaling", "quick", summary=summary, config=config)
    (folder / "study.csv").write_text("case\n")
    assert judged(tmp_path, DAMPED)[0].verdict == "not run"


def test_a_failed_seed_is_a_missed_claim(tmp_path: Path) -> None:
    write_flows(tmp_path, 2.0, 2.0)
    failed = {"status": "failed", "failure": "FloatingPointError: the loss is nan"}
    write_run(tmp_path, "cnf", "2spirals", *FP16, seed=2, **failed)
    (claim,) = judged(tmp_path, LIKELIHOOD)
    assert (claim.verdict, claim.reached) == ("missed", "rampde fp16 dynamic failed in 1 of 3 runs")


def test_seeds_that_not_all_variants_have_do_not_count(tmp_path: Path) -> None:
    write_flows(tmp_path, 2.0, 2.0)
    write_run(tmp_path, "cnf", "2spirals", "torchdiffeq", "fp32", seed=2, summary={"NLL": 9.0})
    (claim,) = judged(tmp_path, LIKELIHOOD)
    assert claim.verdict == "met"
    assert "(2 seeds)" in claim.reached


@pytest.mark.parametrize(("error", "verdict"), [(9e-4, "met"), (1.1e-3, "missed"), (float("inf"), "missed")])
def test_damped(error: float, verdict: str, tmp_path: Path) -> None:
    write_run(tmp_path, "adjoint_scaling", "full", summary={"gradient error, dynamic": error})
    assert judged(tmp_path, DAMPED)[0].verdict == verdict


@pytest.mark.parametrize(
    ("torchdiffeq", "rampde", "dynamic", "verdict"),
    [
        (0.8, 4e-3, 4e-4, "met"),
        (float("inf"), 4e-3, 4e-4, "met"),
        # without a scale it is as good, or with one as bad
        (0.8, 1e-3, 4e-4, "missed"),
        (0.8, 8e-3, 1.5e-3, "missed"),
    ],
)
def test_unscaled(torchdiffeq: float, rampde: float, dynamic: float, verdict: str, tmp_path: Path) -> None:
    errors = {"torchdiffeq fp16": torchdiffeq, "rampde fp16": rampde, "rampde fp16 dynamic": dynamic}
    summary = {f"gradient error, {name}, 127 steps, batch 1024": error for name, error in errors.items()}
    write_run(tmp_path, "cnf_gradients", "checkerboard", summary=summary)
    (claim,) = judged(tmp_path, UNSCALED)
    assert claim.verdict == verdict
    assert f"rampde fp16 dynamic {dynamic:.1e}" in claim.reached


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ({"fp32": (99.0, 98.4), "bf16": (98.0, 98.4), "fp16": (98.5, 98.7)}, "met"),
        # one run is below, or the means are apart, or a precision is not there
        ({"fp32": (97.2, 97.2), "bf16": (96.9, 97.5), "fp16": (97.2, 97.2)}, "missed"),
        ({"fp32": (99.0, 99.0), "bf16": (98.2, 98.2), "fp16": (98.7, 98.7)}, "missed"),
        ({"fp32": (99.0, 99.0), "bf16": (99.0, 99.0)}, "not run"),
    ],
)
def test_digits(accuracies: dict[str, tuple[float, ...]], verdict: str, tmp_path: Path) -> None:
    for precision, values in accuracies.items():
        scaler = "dynamic" if precision == "fp16" else "none"
        for seed, value in enumerate(values):
            summary = {"test accuracy": value}
            write_run(tmp_path, "stl10", "digits", "rampde", precision, scaler, seed, summary=summary)
    for seed in (0, 1):
        write_run(tmp_path, "stl10", "digits", "torchdiffeq", "fp32", seed=seed, summary={"test accuracy": 98.5})
    # fp16 without its scale is there to be worse
    write_run(tmp_path, "stl10", "digits", "rampde", "fp16", "none", summary={"test accuracy": 10.0})
    (claim,) = judged(tmp_path, DIGITS)
    assert claim.verdict == verdict
    assert ("(2 seeds)" in claim.reached) == (verdict != "not run")


@pytest.mark.parametrize(
    ("changed", "verdict"), [({}, "met"), ({"HJB error": 2**-10.9}, "missed"), ({"HJB error": float("nan")}, "missed")]
)
def test_loss_terms(changed: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    good = {"likelihood error": 2**-13, "transport error": 2**-11.1, "HJB error": 0.0}
    write_run(tmp_path, "otflow", "power", *FP16, summary=good | changed, synthetic=True)
    write_run(tmp_path, "otflow", "power", summary={name: 4 * error for name, error in good.items()}, synthetic=True)
    (claim,) = judged(tmp_path, TERMS)
    assert claim.verdict == verdict
    assert "(power, synthetic data)" in claim.text
    if verdict == "met":
        assert claim.reached == "bf16 0.47 of it at most, fp16 0.93 of it at most"


def test_loss_terms_need_both_precisions_and_no_failure(tmp_path: Path) -> None:
    write_run(tmp_path, "otflow", "power", *FP16, summary=dict.fromkeys(("likelihood error", "HJB error"), 0.0))
    assert judged(tmp_path, TERMS)[0].verdict == "not run"
    write_run(tmp_path, "otflow", "power", status="failed", failure="RuntimeError: no")
    assert judged(tmp_path, TERMS)[0].verdict == "missed"
