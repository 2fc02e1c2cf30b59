"""The two studies of errors: their oracles, their bars, and that they go on where they were cut off."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _repository_root_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tabulate", "psutil", "matplotlib", "tqdm", "torchdiffeq"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT))


def case_of(solver: str, precision: str, scaler: str, round_time: bool = False) -> Any:
    from experiments.adjoint_scaling import Case
    from experiments.options import Options

    checkpoint = "step" if solver == "rampde" else "auto"
    return Case(Options(precision, solver, scaler, checkpoint), round_time)


def test_dynamic_scaling_brings_float16_within_the_bar() -> None:
    from experiments import adjoint_scaling as study

    t = study.grid()
    exact = study.exact_solution(t)
    dynamic = study.measure(case_of("rampde", "fp16", "dynamic"), t, exact)
    assert dynamic["worst gradient"] <= study.BAR
    assert dynamic["worst gradient, ODE"] <= study.BAR
    # without a scale the adjoint is lost
    assert study.measure(case_of("rampde", "fp16", "none"), t, exact)["worst gradient"] > 0.5
    # the constant that GradScaler begins with keeps a part of it
    constant = study.measure(case_of("rampde", "fp16", "grad"), t, exact)
    assert constant["constant"] == study.INITIAL_SCALE
    assert study.BAR < constant["worst gradient"] < 0.5
    rounded = study.measure(case_of("rampde", "fp16", "dynamic", round_time=True), t, exact)
    assert rounded["worst gradient"] <= study.PUBLISHED_BAR


def test_rounding_the_time_is_another_ode() -> None:
    """In float64 with nothing but the coefficient computed in float16, gradients move by more than the bar."""
    from torchdiffeq import odeint

    from experiments import adjoint_scaling as study

    t = study.grid()
    parameters = torch.tensor(study.COEFFICIENTS, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([study.START], dtype=torch.float64, requires_grad=True)

    def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        powers = torch.stack((t**2, t, torch.ones_like(t)))
        low = t.half()
        a, b, c = parameters.detach().half()
        rounded = (a * low**2 + b * low + c).double()
        exact = (parameters * powers).sum()
        return -(exact + (rounded - exact).detach()) * y

    (0.5 * odeint(func, y0, t, method="rk4")[-1].square().sum()).backward()
    found = torch.cat((y0.grad, parameters.grad))
    assert study.relative(found, study.exact_solution(t).gradients).max() > study.BAR


def test_the_oracles_of_the_damped_ode_agree_to_fourth_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import adjoint_scaling as study

    distances = []
    for points in (201, 401):
        monkeypatch.setattr(study, "POINTS", points)
        t = study.grid()
        exact, analytic = study.exact_solution(t), study.analytic_solution(t)
        distances.append(study.relative(exact.gradients, analytic.gradients).max().item())
    assert 12 < distances[0] / distances[1] < 20


def test_the_adjoint_at_the_start_is_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import adjoint_scaling as study

    monkeypatch.setattr(study, "POINTS", 50)
    t, case = study.grid(), case_of("rampde", "fp16", "dynamic")
    first, last = study.adjoints(case, t, [0, 48])
    assert first == study.differentiate(case, t).gradients[0]
    # f is linear in y: y dL/dy is the same at all times, y(T)²
    states = study.exact_solution(t).states
    assert last * states[48] / states[-1] ** 2 == pytest.approx(1, rel=4 * 2.0**-11)


def test_adjoint_scaling_is_written_and_fails_on_a_missed_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import adjoint_scaling as study

    monkeypatch.setattr(study, "POINTS", 40)
    monkeypatch.setattr(study, "BAR", 1.0)
    arguments = ["--quick", "--solver", "rampde", "--precision", "fp16", "--device", "cpu", "--out", str(tmp_path)]
    assert study.main(arguments) == 0
    folder = tmp_path / "adjoint_scaling" / "quick-rampde-fp16"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    assert set(record["summary"]) >= {"gradient error, none", "gradient error, dynamic"}
    assert {path.stem for path in folder.glob("*.png")} == {"range", "errors", "constants"}
    for name in ("draw_range", "draw_errors", "draw_constants"):
        monkeypatch.setattr(study, name, lambda *arguments: None)
    monkeypatch.setattr(study, "BAR", 0.0)
    assert study.main(arguments) == 1
    assert "allowed is 0" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1], ids=["rotation", "network"])
def test_exact_is_what_torchdiffeq_gives_in_float64(place: int) -> None:
    from experiments.options import Options
    from experiments.roundoff import exact, numeric, problems

    problem = problems(seed=int(torch.randint(1000, ())))[place]
    for solver in ("torchdiffeq", "rampde"):
        found, _, _ = numeric(problem, Options("fp64", solver, "none"), steps=37)
        assert max(found.errors(exact(problem, 37)).values()) < 1e-12


def test_fp32_errors_grow_with_the_steps_and_compensated_ones_stay() -> None:
    from experiments.options import Options
    from experiments.roundoff import OF_SUMS, exact, numeric, problems

    options = Options("fp32", "rampde", "none", "step")
    seeds = range(3)
    errors: dict[bool, list[float]] = {}
    for compensated in (False, True):
        # the mean over problems: a single sum of roundings may come out small by chance
        of_steps = []
        for steps in (16, 1024):
            found = [(problem := problems(seed)[0], numeric(problem, options, steps, compensated)[0]) for seed in seeds]
            of_steps.append(sum(of.errors(exact(problem, steps))["state error"] for problem, of in found) / len(seeds))
        errors[compensated] = of_steps
    coarse, fine = errors[False]
    # 64 times the roundings: half of what a random walk would make of them, at least, and at most their sum
    assert 64**0.5 / 2 * coarse < fine < 1024 * OF_SUMS
    # the last state is rounded to fp32, and so is the velocity: a few units
    assert errors[True][1] < 2 * max(errors[True][0], OF_SUMS)
    assert errors[True][1] < fine / 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_errors_do_not_grow_with_the_steps(precision: str) -> None:
    from experiments.options import Options
    from experiments.roundoff import QUANTITIES, ROUNDOFF, exact, numeric, problems

    options = Options(precision, "rampde", "", "step")
    for problem in problems(seed=0):
        for steps in (16, 512):
            errors = numeric(problem, options, steps)[0].errors(exact(problem, steps))
            assert max(errors[f"{quantity} error"] for quantity in QUANTITIES) < 2 * ROUNDOFF[precision]


def test_8_bit_checkpoints_leave_the_state_as_it_is() -> None:
    from experiments.options import Options
    from experiments.roundoff import exact, numeric, problems

    problem = problems(seed=0)[1]
    step, fp8 = (numeric(problem, Options("fp16", "rampde", "", policy), 32)[0] for policy in ("step", "fp8"))
    assert torch.equal(step.state, fp8.state)
    before, after = (found.errors(exact(problem, 32))["gradient error"] for found in (step, fp8))
    # the change over a step is known to a sixteenth, and is less than an eighth of a state in steps of 1/32
    assert before < after < 2**-4 / 8


SHORT = ("--finest", "4", "--finest-network", "3", "--finest-torchdiffeq", "3", "--device", "cpu")


def test_a_study_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import roundoff
    from experiments.study import read_rows

    measure, count = roundoff.measure, 0

    def cut_off_after(most: int) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal count
            if count == most:
                raise KeyboardInterrupt
            count += 1
            return measure(*arguments)

        return counted

    arguments = [*SHORT, "--out", str(tmp_path)]
    monkeypatch.setattr(roundoff, "measure", cut_off_after(20))
    with pytest.raises(KeyboardInterrupt):
        roundoff.main(arguments)
    folder = tmp_path / "roundoff" / "full-2^-4"
    before = read_rows(folder / "study.csv")
    assert len(before) == 20
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    monkeypatch.setattr(roundoff, "measure", cut_off_after(1000))
    assert roundoff.main(arguments) == 0
    rows = read_rows(folder / "study.csv")
    assert rows[:20] == before
    # 3 curves of torchdiffeq and 8 of rampde at 2^-3, those of rampde also at 2^-4
    assert len(rows) == count == (3 + 8) + 8 + (3 + 8)
    assert {path.stem for path in folder.glob("*.png")} == {"rotation", "network"}
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    # nothing is left to measure, and what was measured is the same in one go
    monkeypatch.setattr(roundoff, "draw", lambda *arguments: None)
    monkeypatch.setattr(roundoff, "measure", cut_off_after(count))
    assert roundoff.main(arguments) == 0
    monkeypatch.setattr(roundoff, "measure", measure)
    assert roundoff.main([*arguments, "--fresh"]) == 0
    again = read_rows(folder / "study.csv")
    assert [row["state error"] for row in again] == [row["state error"] for row in rows]
    assert [row["gradient error"] for row in again] == [row["gradient error"] for row in rows]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    from experiments.study import Study

    path = tmp_path / "study.csv"
    first = Study(path)
    rows = [
        first.row({"n": n, "on": n > 1}, lambda n=n: {"x": 0.1 * n, "y": float("inf"), "text": "a, b"}) for n in (1, 2)
    ]
    again = Study(path)
    assert [again.row({"n": n, "on": n > 1}, lambda: pytest.fail("measured again")) for n in (1, 2)] == rows
    assert Study(path, fresh=True).row({"n": 1, "on": False}, lambda: {"x": 7.0})["x"] == 7.0


def test_a_study_keeps_to_what_is_given() -> None:
    from experiments.roundoff import RoundoffOptions, variants

    options = RoundoffOptions(only=(("solver", "rampde"), ("precision", "fp16")))
    chosen = variants(options)
    assert {variant.options.precision for variant in chosen} == {"fp16"}
    assert {variant.options.checkpoint for variant in chosen} == {"step", "fp8"}
    assert options.run_name == "full-rampde-fp16"
    assert len(variants(replace(options, only=()))) == 3 + 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "2"], "one seed"),
        (["--compare"], "by itself"),
        (["--finest", "2"], "finest is 2, expected 3 to 24"),
        (
            ["--scaler", "both", "--precision", "fp16"],
            "nothing with precision fp16, scaler both: leave one of these out",
        ),
    ],
)
def test_a_study_says_what_is_wrong(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import roundoff

    with pytest.raises(SystemExit):
        roundoff.main([*arguments, "--device", "cpu"])
    assert said in capsys.readouterr().err
