"""The comparison with other libraries: its models, who is wrong, what is counted, and how a run goes on."""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _repository_root_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tabulate", "psutil", "torchdiffeq", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the comparison on the first workload of a family, on a state of a few elements."""
    from bench import compare, compare_problems

    few = compare_problems.workloads
    monkeypatch.setattr(compare, "workloads", lambda *arguments: islice(few(*arguments), 1))
    threads = torch.get_num_threads()

    def run(folder: Path, *arguments: str, workloads: str = "linear") -> int:
        given = ["--quick", "--device", "cpu", "--rounds", "1", "--workloads", workloads, "--out", str(folder)]
        return compare.main([*given, *arguments])

    yield run
    torch.set_num_threads(threads)


def written(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of the table, by solver."""
    with (folder / "compare.csv").open() as file:
        return {row["solver"]: row for row in csv.DictReader(file)}


def test_it_is_measured_and_written(
    compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, "--solvers", "rampde,torchdiffeq*", "--precision", "fp16") == 0
    rows = written(tmp_path)
    scaled = ["torchdiffeq, GradScaler", "torchdiffeq adjoint, GradScaler"]
    assert list(rows) == ["rampde", "torchdiffeq", scaled[0], "torchdiffeq adjoint", scaled[1], "floor"]
    for name, row in rows.items():
        assert row["outcome"] == "measured"
        assert 0 < float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
        if name != "floor":
            assert float(row["peak_mib"]) > 0
            assert 0 < float(row["error of y(end)"]) < 0.01
            assert int(row["f_evaluations"]) == (64 if "adjoint" in name else 32)
    assert float(rows["torchdiffeq"]["over_torchdiffeq"]) == float(rows["floor"]["over_floor"]) == 1.0
    # the scaler asks whether gradients are finite
    assert int(rows[scaled[0]]["host_syncs"]) == int(rows["torchdiffeq"]["host_syncs"]) + 1
    assert int(rows["rampde"]["host_syncs"]) < int(rows["torchdiffeq"]["host_syncs"])
    assert int(rows["rampde"]["launches"]) < int(rows["torchdiffeq"]["launches"])
    record = json.loads((tmp_path / "compare.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert record["machine"]["sources"]
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert "linear 64, fp16: y [16, 64], 8 steps" in capsys.readouterr().out


def test_peers_that_are_absent_are_left_out(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import compare_solvers

    monkeypatch.setattr(compare_solvers, "find_spec", lambda module: None)
    assert compare(tmp_path, "--solvers", "torchdiffeq,diffrax*") == 0
    assert list(written(tmp_path)) == ["torchdiffeq", "floor"]
    assert "diffrax, jitted: left out, jax and diffrax not installed" in capsys.readouterr().out


def test_a_wrong_rampde_is_not_timed(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rampde

    right = rampde.odeint
    monkeypatch.setattr(rampde, "odeint", lambda *arguments, **options: 1.01 * right(*arguments, **options))
    assert compare(tmp_path, "--solvers", "rampde,torchdiffeq") == 1
    rows = written(tmp_path)
    assert rows["rampde"]["outcome"] == "wrong"
    assert rows["rampde"]["ms"] == ""
    assert rows["torchdiffeq"]["outcome"] == "measured"
    said = capsys.readouterr().err
    assert "rampde: wrong, not timed: y(end) is off by 0.01, dL/dy0 is off by 0.01, dL/dtheta is off by 0.01" in said


@pytest.mark.parametrize(
    ("solver", "fault", "status"),
    [
        ("torchode, own steps", "wrong", 0),
        ("torchode, own steps", "failed", 0),
        ("rampde, whole compiled", "failed", 0),
        ("rampde, whole compiled", "wrong", 1),
        ("rampde", "failed", 1),
    ],
)
def test_one_that_is_wrong_or_fails_does_not_keep_others_from_being_measured(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str, fault: str, status: int
) -> None:
    from bench import compare_measure
    from bench.compare_solvers import Candidate, candidates

    def with_one_more(*arguments: Any) -> Iterator[Candidate]:
        (right,) = candidates(*arguments)

        def step() -> Any:
            if fault == "failed":
                raise RuntimeError("no compiler here\nand more")
            found = right.step()
            return type(found)(found.ends, tuple(-gradient for gradient in found.gradients))

        yield Candidate(solver, step)
        yield right

    monkeypatch.setattr(compare_measure, "candidates", with_one_more)
    assert compare(tmp_path, "--solvers", "torchdiffeq") == status
    rows = written(tmp_path)
    assert rows[solver]["outcome"] == fault
    reason = "RuntimeError: no compiler here" if fault == "failed" else "dL/dy0 is off by 2, dL/dtheta is off by 2"
    assert rows[solver]["reason"] == reason
    assert rows["torchdiffeq"]["outcome"] == "measured"


def test_what_is_there_is_not_measured_again(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import common
    from bench import compare as module

    calls: list[str] = []

    def measure(workload: Any, precision: str, *_: Any, **__: Any) -> list[dict[str, Any]]:
        calls.append(precision)
        row = {"workload": workload.name, "precision": precision, "solver": "floor", "title": "", "outcome": "measured"}
        return [row | {"ms": 1.0, "ms_low": 1.0, "ms_high": 1.0}]

    monkeypatch.setattr(module, "measure", measure)
    assert compare(tmp_path, "--resume") == 0
    assert compare(tmp_path, "--resume", "--precision", "fp32,bf16") == 0
    assert calls == ["fp32", "bf16"]
    # of other candidates, without being asked to go on, and of other sources
    assert compare(tmp_path, "--resume", "--solvers", "rampde") == 0
    assert compare(tmp_path) == 0
    monkeypatch.setattr(common, "sources", lambda: "changed")
    assert compare(tmp_path, "--resume") == 0
    assert calls == ["fp32", "bf16", "fp32", "fp32", "fp32"]


def test_no_workload_begins_after_its_time(
    compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, "--seconds", "0") == 3
    assert "left out after 0 s: linear 64, fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--solvers", "nobody*"], "'nobody*' is none of rampde; rampde, CUDA graph"),
        (["--workloads", "mlp,nothing"], "'nothing' is none of compiled, mlp"),
        (["--device", "cpu", "--precision", "tf32"], "a CPU has none"),
    ],
)
def test_impossible_wishes_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import compare

    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 5])
def test_hyper_flow_keeps_account_of_its_divergence(batch: int) -> None:
    from bench.compare_problems import HyperFlow

    flow = HyperFlow(width=7, hidden=5).double()
    z, t = torch.randn(batch, 2, dtype=torch.float64), torch.rand((), dtype=torch.float64)
    velocity, density = flow(t, (z, torch.zeros(batch, 1)))
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: flow(t, (x[None], x))[0][0]))(z)
    assert velocity.shape == (batch, 2)
    torch.testing.assert_close(density[:, 0], -jacobians.diagonal(dim1=1, dim2=2).sum(1))


@pytest.mark.parametrize("batch", [1, 4])
def test_potential_has_the_derivatives_that_it_writes_out(batch: int) -> None:
    from bench.compare_problems import Potential

    d = 3
    flow = Potential(d, width=6, rank=2).double()

    def potential(s: Tensor) -> Tensor:
        hidden = flow.first(s)
        hidden = F.softplus(2 * hidden) - hidden
        last = flow.second(hidden)
        network = flow.out @ (hidden + F.softplus(2 * last) - last)
        return network + (flow.factor @ s).square().sum() / 2 + flow.slope @ s

    x, t = torch.randn(batch, d, dtype=torch.float64), torch.rand((), dtype=torch.float64)
    s = torch.cat([x, t.expand(batch, 1)], 1)
    gradient = torch.func.vmap(torch.func.grad(potential))(s)
    laplacian = torch.func.vmap(torch.func.hessian(potential))(s)[:, :d, :d].diagonal(dim1=1, dim2=2).sum(1)
    cost = gradient[:, :d].square().sum(1) / 2
    velocity, density, running, equation = flow(t, (x, *(torch.zeros(batch, 1),) * 3))
    torch.testing.assert_close(velocity, -gradient[:, :d])
    torch.testing.assert_close(density[:, 0], -laplacian)
    torch.testing.assert_close(running[:, 0], cost)
    torch.testing.assert_close(equation[:, 0], (cost - gradient[:, d]).abs())


@pytest.mark.parametrize("family", ["mlp", "linear", "cnf", "stl10", "otflow", "compiled"])
def test_reference_in_parts_is_that_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import compare_solvers
    from bench.compare_problems import workloads

    workload = next(workloads(family, CPU, quick=True))
    candidate = compare_solvers.Candidate("rampde", lambda: None)
    whole = compare_solvers.References(workload).of(candidate)
    monkeypatch.setattr(compare_solvers, "_on_gpu", lambda references: True)
    parts = compare_solvers.References(workload).of(candidate)
    assert all(off < 1e-12 for off in compare_solvers.errors(workload, parts, whole).values())
    assert [end.dtype for end in whole.ends] == [torch.float64] * len(workload.y0)


def test_floor_evaluates_as_often_as_the_method() -> None:
    from bench.compare_problems import floor, workloads
    from bench.counts import evaluations

    workload = next(workloads("cnf", CPU, quick=True))
    call = floor(workload, "bf16")
    with evaluations(workload.funcs[0]) as calls:
        call()
        assert calls["f"] == 4 * 8
        floor(workload, "fp32", evaluations=3)()
        # once to see what f returns
        assert calls["f"] == 4 * 8 + 1 + 3


def test_scaler_gives_the_gradients_of_the_loss_and_gives_way_to_overflow() -> None:
    import torchdiffeq

    from bench.compare_problems import Scaler, workloads

    workload = next(workloads("linear", CPU, quick=True))
    solver = partial(torchdiffeq.odeint, method="rk4")
    scaler = Scaler(CPU)
    before = scaler.scaler.get_scale()
    found, expected = workload.step(solver, "fp32", scaler), workload.step(solver, "fp32")
    # the scale is a power of two
    assert all(map(torch.equal, found.gradients, expected.gradients))
    assert scaler.scaler.get_scale() == before
    workload.cotangents[0].fill_(3e38)
    assert not workload.step(solver, "fp32", scaler).gradients[0].isfinite().all()
    assert scaler.scaler.get_scale() == before / 2


def test_what_a_gpu_was_given_is_told_from_its_events() -> None:
    from bench.compare_measure import launches_and_waits

    events = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    assert launches_and_waits([*events, "aten::mm", "cudaDeviceSynchronize", "gemm_kernel"]) == (4, 1)


def test_errors_of_gradients_that_are_missing_or_not_finite_are_infinite() -> None:
    from bench.compare_problems import Result
    from bench.compare_solvers import errors

    workload: Any = SimpleNamespace(y0=(torch.zeros(2),), training=True)
    one, ends = torch.ones(2, dtype=torch.float64), (torch.ones(2, dtype=torch.float64),)
    expected = Result(ends, (one, one, None))
    for gradients, off in {
        (one, one, None): 0.0,
        (one, 0 * one, None): 1.0,
        (one, None, None): float("inf"),
        (one, one, one): float("inf"),
        (one, one / 0, None): float("inf"),
    }.items():
        assert errors(workload, Result(ends, gradients), expected)["dL/dtheta"] == off


@pytest.mark.parametrize(("value", "met"), [(0.69, True), (0.71, False), (None, False)])
def test_bars_are_held_on_the_cpu(value: float | None, met: bool) -> None:
    from bench.compare import with_bar

    row = {"workload": "compiled, 8 steps", "solver": "rampde, f compiled", "precision": "fp32"}
    row["over_torchdiffeq_compiled"] = value
    assert with_bar(row, CPU) == row | {"bar": 0.7, "met": met}
    assert with_bar(row, torch.device("cuda"))["bar"] is None
    assert with_bar(row | {"solver": "torchdiffeq"}, CPU)["met"] is None


def test_every_solver_has_a_colour() -> None:
    from bench.compare_plot import COLOURS
    from bench.compare_solvers import SOLVERS

    assert set(COLOURS) == set(SOLVERS)


@pytest.mark.slow
def test_diffrax_solves_the_same() -> None:
    pytest.importorskip("diffrax")
    from bench.compare_jax import training_step
    from bench.compare_problems import workloads
    from bench.compare_solvers import Candidate, References, errors

    for family in ("mlp", "linear"):
        workload = next(workloads(family, CPU, quick=True))
        step = training_step(workload)
        off = errors(workload, step(), References(workload).of(Candidate("diffrax, jitted", step)))
        assert max(off.values()) < 1e-5


@pytest.mark.slow
def test_compiled_solves_are_measured(compare: Callable[..., int], tmp_path: Path) -> None:
    assert compare(tmp_path, "--solvers", "rampde*,torchdiffeq*", workloads="compiled") == 0
    rows = written(tmp_path)
    assert rows["rampde, f compiled"]["outcome"] == rows["torchdiffeq, f compiled"]["outcome"] == "measured"
    assert int(rows["rampde, f compiled"]["f_evaluations"]) == 8
    whole = rows["rampde, whole compiled"]
    assert whole["outcome"] == "measured" or whole["reason"]
