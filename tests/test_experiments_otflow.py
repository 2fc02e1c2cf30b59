"""OT-Flow: its potential's derivatives, the rates of its state, the terms of its loss in 16 bits, and the program."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rounded_products import RoundedProducts
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("tabulate")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tqdm")

from experiments import otflow
from experiments.options import PRECISIONS, Options, Precision, solve
from experiments.otflow_model import OTFlow, Potential, antiderivative_of_tanh, terms
from experiments.run import Run
from experiments.tabular import generated

FP64 = Precision(Options(precision="fp64"))
# alpha, and the weights of the HJB equation and of the likelihood
ALPHA, WEIGHTS = 1.5, (3.0, 5.0)


def random_potential(d: int, width: int, layers: int = 2, rank: int = 3) -> Potential:
    """A potential in float64 none of whose parts is zero."""
    potential = Potential(d, width, layers, rank).double()
    with torch.no_grad():
        potential.w.copy_(torch.randn(width) / math.sqrt(width))
        potential.linear.weight.normal_(std=0.3)
    return potential


def test_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in Potential(63, 1024).parameters()) == 1_117_889


def test_antiderivative_of_tanh() -> None:
    x = torch.tensor([-1e4, -30.0, -1.0, -1e-3, 0.0, 0.5, 20.0, 1e4], dtype=torch.float64, requires_grad=True)
    value = antiderivative_of_tanh(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    # at zero the derivative of |x| is taken as zero, and that of the rest vanishes
    torch.testing.assert_close(slope, x.tanh(), rtol=1e-14, atol=1e-14)
    small = x[2:6].detach()
    torch.testing.assert_close(value[2:6], (small.exp() + (-small).exp()).log(), rtol=1e-14, atol=1e-14)
    assert value[-1] == value[0] == 1e4


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize(("n", "d", "width"), [(0, 2, 3), (1, 1, 1), (5, 3, 7), (4, 6, 5)])
def test_gradient_and_laplacian_are_those_of_autograd(layers: int, n: int, d: int, width: int) -> None:
    potential = random_potential(d, width, layers)
    s = torch.randn(n, d + 1, dtype=torch.float64, requires_grad=True)
    gradient, laplacian = potential.derivatives(s)
    (expected,) = torch.autograd.grad(potential(s).sum(), s, create_graph=True)
    assert gradient.shape == (n, d + 1)
    assert laplacian.shape == (n,)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    # of x alone: the time is the last column
    rows = [torch.autograd.grad(expected[:, i].sum(), s, retain_graph=True)[0][:, i] for i in range(d)]
    torch.testing.assert_close(laplacian, torch.stack(rows).sum(0), rtol=1e-12, atol=1e-12)


def test_rates_of_the_state() -> None:
    n, d = 5, 3
    flow = OTFlow(random_potential(d, 6), ALPHA)
    x, t = torch.randn(n, d, dtype=torch.float64), torch.rand((), dtype=torch.float64)
    s = torch.cat([x, t.expand(n, 1)], 1).requires_grad_()
    (slope,) = torch.autograd.grad(flow.potential(s).sum(), s)
    nothing = x.new_zeros(n, 1)
    velocity, volume, cost, violation = flow(t, (x, nothing, nothing, nothing))
    torch.testing.assert_close(velocity, -slope[:, :d] / ALPHA)
    torch.testing.assert_close(volume, -flow.potential.derivatives(s)[1].unsqueeze(1) / ALPHA)
    torch.testing.assert_close(cost.squeeze(1), (slope[:, :d] / ALPHA).square().sum(1) / 2)
    # -d_t Phi + |grad Phi|^2 / (2 alpha) is zero where Phi solves the equation
    torch.testing.assert_close(violation.squeeze(1), (slope[:, d] - slope[:, :d].square().sum(1) / (2 * ALPHA)).abs())


def test_likelihood_follows_the_map_of_the_flow() -> None:
    d, steps, variance = 3, 20, 0.1
    flow = OTFlow(random_potential(d, 6), ALPHA)
    x = torch.randn(1, d, dtype=torch.float64)

    def end(x: Tensor) -> Tensor:
        nothing = x.new_zeros(1, 1)
        t = torch.linspace(0, 1, steps + 1, dtype=x.dtype)
        return solve(FP64, flow, (x.view(1, d), nothing, nothing, nothing), t)[0][-1].view(d)

    jacobian = torch.autograd.functional.jacobian(end, x.view(d))
    normal = torch.distributions.MultivariateNormal(torch.zeros(d).double(), variance * torch.eye(d).double())
    expected = normal.log_prob(end(x)) + jacobian.det().abs().log()
    found = terms(FP64, flow, x, steps, WEIGHTS, variance)
    # the log-determinant is integrated beside the map: both have the error of rk4, h^4
    torch.testing.assert_close(-found.likelihood, expected, rtol=0, atol=50 * steps**-4)
    total = WEIGHTS[1] * found.likelihood + ALPHA * found.transport + WEIGHTS[0] * found.hjb
    torch.testing.assert_close(found.loss, total)


@pytest.mark.parametrize("solver", ["rampde", "torchdiffeq"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@torch.no_grad()
def test_terms_agree_with_float64_to_unit_roundoff(name: str, solver: str) -> None:
    d, steps, dtype = 8, 8, PRECISIONS[name]
    flow = OTFlow(random_potential(d, 64, rank=10), ALPHA)
    # weights and points that float32 holds, so that the velocity alone is rounded
    flow = flow.float().double()
    x = generated("gas", 300, seed=int(torch.randint(1000, ()))).train.double()
    exact = terms(FP64, flow, x, steps, WEIGHTS)
    with RoundedProducts(dtype):
        other = terms(FP64, flow, x, steps, WEIGHTS)
    mine = terms(Precision(Options(precision=name, solver=solver)), flow.float(), x.float(), steps, WEIGHTS)
    unit = torch.finfo(dtype).eps / 2
    for term in ("likelihood", "transport", "hjb", "loss"):
        found, reference, rounded = (float(getattr(one, term)) for one in (mine, exact, other))
        # the mode has rounded something, and no more than a velocity loses
        assert 0 < abs(rounded - reference) < unit * abs(reference)
        assert abs(found - reference) <= unit * abs(reference), term


def test_potential_and_weight_that_make_no_sense_are_refused() -> None:
    for sizes in ((3, 4, 1, 2), (0, 4, 2, 2), (3, 0, 2, 2), (3, 4, 2, 0)):
        with pytest.raises(ValueError, match="expected at least 1, and 2 layers"):
            Potential(*sizes)
    with pytest.raises(ValueError, match="alpha is 0"):
        OTFlow(Potential(2, 3), 0)


def run_quick(out: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    command = ["--quick", "--device", "cpu", "--out", str(out), "--folder", str(out / "no data")]
    status = otflow.main([*command, *more])
    return status, [json.loads(path.read_text()) for path in sorted(out.glob("otflow/*/run.json"))]


def test_program_trains_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (record,) = run_quick(tmp_path, "--precision", "fp16", "--dataset", "miniboone")
    assert status == 0
    assert record["status"] == "done"
    assert record["synthetic"]
    assert "synthetic data" in capsys.readouterr().out
    assert set(otflow.COLUMNS) < set(record["summary"])
    assert all(math.isfinite(value) for value in record["summary"].values())
    assert all(record["summary"][name] > 0 for name in ("seconds forward", "seconds backward", "peak MiB"))
    # the terms to the velocity's unit roundoff; the gradient is a sum of larger terms, some of which cancel
    *terms, gradient = (record["summary"][name] for name in otflow.ERRORS)
    assert max(terms) <= 2**-11
    assert 0 < gradient < 16 * 2**-11
    assert (tmp_path / "otflow" / record["name"] / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_parameters_stay_within_their_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otflow, "BOUND", 0.01)
    status, (record,) = run_quick(tmp_path, "--precision", "fp32", "--dataset", "power")
    assert status == 0
    folder = tmp_path / "otflow" / record["name"]
    model = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["model"]
    assert max(parameter.abs().max().item() for parameter in model.values()) <= 0.01


def test_missing_data_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert otflow.main(["--device", "cpu", "--out", str(tmp_path), "--folder", str(tmp_path)]) == 1
    assert "Download https://zenodo.org" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_training_ends_when_the_rate_has_fallen_thrice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no validation is better than the one before, where every parameter is put back
    monkeypatch.setattr(otflow, "BOUND", 0.0)
    _, (record,) = run_quick(tmp_path, "--iterations", "400", "--precision", "fp32", "--dataset", "power")
    size = otflow.size_of("power", "quick")
    # the first validation is the best; then three times patience is lost
    expected = size.validate_every * (1 + 3 * (size.patience + 1))
    options = otflow.OTFlowOptions(**record["config"], out=str(tmp_path))
    run = Run(options, "otflow", record["name"], synthetic=True, recipe=record["recipe"])
    assert run.column("iteration")[0][-1] == expected < 400


def test_held_out_is_the_mean_over_all_rows() -> None:
    size = otflow.Size(8, 8, 2, 3, 1, 1, 1e-3, 10, 1, (1, 1, 1), check_rows=4, test_rows=10)
    flow = OTFlow(random_potential(3, 5), ALPHA)
    x = torch.randn(10, 3, dtype=torch.float64)
    # blocks of 4, 4 and 2 rows
    expected = terms(FP64, flow, x, 3, WEIGHTS).likelihood.item()
    assert otflow.held_out(FP64, flow, x, size) == pytest.approx(expected, rel=1e-12)


def test_options() -> None:
    given = otflow.parse(["--device", "cpu"])
    assert (given.size, given.weights, given.dataset) == ("small", "1,2000,800", "bsds300")
    assert otflow.parse(["--device", "cpu", "--weights", "2,0,3"]).three_weights == (2, 0, 3)
    for weights in ("1,2", "1,2,x", "0,1,1", "1,-1,1"):
        with pytest.raises(ValueError, match=weights):
            otflow.OTFlowOptions(weights=weights)
    for name in otflow.FULL:
        assert otflow.size_of(name, "full").width >= 128
    assert otflow.size_of("bsds300", "full").steps == 15
    for wrong in ({"dataset": "mnist"}, {"size": "huge"}, {"iterations": -1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            otflow.OTFlowOptions(**wrong)
