"""Runs of experiments: options, batches, scalers, records, and that a killed run goes on with the same curve."""

import json
import math
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("psutil")
pytest.importorskip("tabulate")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tqdm")

import rampde
from experiments.files import Refused
from experiments.options import PRECISIONS, published_variants, read_checkpoint
from experiments.reference import gradient_error
from experiments.run import Batches, Options, OtherLoad, Precision, Run, print_table, program, solve, sweep, train

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS, SAVE_EVERY = 9, 3
KINDS = {
    "torchdiffeq fp32": {"solver": "torchdiffeq", "precision": "fp32"},
    "torchdiffeq fp16 grad": {"solver": "torchdiffeq", "precision": "fp16"},
    "rampde bf16": {"precision": "bf16"},
    "rampde fp16 dynamic": {"precision": "fp16"},
    "rampde fp64": {"precision": "fp64"},
}


class Velocity(nn.Module):
    """A tanh network with dropout, whose random numbers a checkpoint must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


def options(out: Path, **given: Any) -> Options:
    return Options(**({"out": str(out)} | given))


def interrupt_after(iteration: int, error: type[BaseException]) -> Callable[[], None]:
    """What raises when it is called the ``iteration``-th time."""
    calls = []

    def call() -> None:
        calls.append(None)
        if len(calls) == iteration:
            raise error("the end")

    return call


def train_small(run: Run, after_step: Callable[[], object] | None = None, clip: float | None = None) -> nn.Module:
    """A run with all parts that a checkpoint holds; the model after it."""
    run.options.prepare()
    precision = run.precision
    model = Velocity().to(precision.state_dtype)
    data = torch.randn(25, 3, generator=torch.Generator().manual_seed(3)).to(precision.state_dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    t = torch.linspace(0, 1, 3, dtype=data.dtype)

    def loss_of_batch(batch: tuple[Tensor]) -> dict[str, Tensor]:
        loss = (solve(precision, model, batch[0], t)[-1] - 1).square().mean()
        return {"loss": loss, "double": 2 * loss}

    def validate() -> dict[str, float]:
        return {"validation loss": sum(parameter.detach().double().sum().item() for parameter in model.parameters())}

    train(
        run,
        model,
        Batches(data, batch=10, seed=1),
        loss_of_batch,
        optimizer=optimizer,
        iterations=ITERATIONS,
        validate=validate,
        validate_every=4,
        save_every=SAVE_EVERY,
        schedule=torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
        plateau=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
        clip=clip,
        after_step=after_step,
    )
    return model


def curve(run: Run) -> list[tuple[list[int], list[float]]]:
    return [run.column(name) for name in ("loss", "double", "validation loss")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, 3, 8])
def test_interrupted_run_goes_on_with_the_same_curve(kind: str, stop: int, tmp_path: Path) -> None:
    whole = Run(options(tmp_path / "whole", **KINDS[kind]), "small", "one")
    expected = train_small(whole)
    whole.finish()
    assert len(whole.column("loss")[0]) == ITERATIONS
    assert whole.column("validation loss")[0] == [4, 8, 9]
    again = options(tmp_path / "parts", **KINDS[kind])
    with pytest.raises(KeyboardInterrupt), Run(again, "small", "one") as run:
        train_small(run, interrupt_after(stop, KeyboardInterrupt))
    assert json.loads((run.folder / "run.json").read_text())["status"] == "running"
    with Run(again, "small", "one") as run:
        assert not run.finished
        found = train_small(run)
        run.finish()
    assert curve(run) == curve(whole)
    for mine, its in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert json.loads((run.folder / "run.json").read_text())["status"] == "done"


def test_killed_process_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    """As a machine that goes down leaves it: nothing of the process gets to write anything more."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from test_experiments_run import Run, options, train_small\n"
        "calls = []\n"
        "def kill():\n"
        "    calls.append(None)\n"
        "    if len(calls) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_small(Run(options(Path(sys.argv[1]), precision='bf16'), 'small', 'one'), kill)\n"
    )
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "parts")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = Run(options(tmp_path / "whole", precision="bf16"), "small", "one")
    train_small(whole)
    run = Run(options(tmp_path / "parts", precision="bf16"), "small", "one")
    train_small(run)
    assert curve(run) == curve(whole)


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    run = Run(options(tmp_path, precision="fp32"), "small", "one")
    with pytest.raises(KeyboardInterrupt):
        train_small(run, interrupt_after(5, KeyboardInterrupt))
    log = run.folder / "log.csv"
    head, *rows = log.read_text().splitlines()
    assert len(rows) == SAVE_EVERY
    # as when it went down between the log and its checkpoint, and then in the middle of a row
    extra = [",".join("4" if name == "iteration" else "77.0" for name in head.split(",")), "5,7"]
    log.write_text("\n".join([head, *rows, *extra]))
    run = Run(options(tmp_path, precision="fp32"), "small", "one")
    train_small(run)
    assert run.column("iteration")[0] == list(range(1, ITERATIONS + 1))
    assert 77.0 not in run.column("loss")[1]
    assert [line.split(",")[0] for line in log.read_text().splitlines()[1:]] == [str(n) for n in range(1, 10)]


def test_costs_are_of_the_run_itself(tmp_path: Path) -> None:
    run = Run(options(tmp_path, precision="bf16"), "small", "one")
    train_small(run)
    # the iteration under the eyes of the profiler is not timed
    assert run.column("peak MiB")[0] == [2]
    assert run.column("seconds forward")[0] == [1, *range(3, ITERATIONS + 1)]
    run.finish(NLL=1.5)
    assert list(run.summary) == ["NLL", "seconds forward", "seconds backward", "peak MiB"]
    assert all(value > 0 for value in run.summary.values())
    # a batch of 10 rows of 3 is kept at least
    assert run.summary["peak MiB"] * 2**20 >= 10 * 3 * 4


@pytest.mark.parametrize("clip", [None, 0.01])
def test_scaled_loss_trains_as_the_loss_itself(clip: float | None, tmp_path: Path) -> None:
    # a power of two changes no bit of a gradient in bf16, and clipping sees the gradient without it
    models = []
    for scaler in ("none", "grad"):
        given = options(tmp_path / scaler, solver="torchdiffeq", precision="bf16", scaler=scaler)
        models.append(train_small(Run(given, "small", "one"), clip=clip))
    for mine, its in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, its)


def test_failure_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, precision="fp32")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails_in_the_third(batch: tuple[Tensor]) -> dict[str, Tensor]:
        factor = math.nan if len(run.column("loss")[0]) == 2 else 1.0
        return {"loss": factor * model(batch[0]).sum()}

    with Run(given, "small", "one") as run:
        train(
            run,
            model,
            Batches(torch.ones(4, 1), batch=2, seed=0),
            fails_in_the_third,
            optimizer=optimizer,
            iterations=5,
        )
        pytest.fail("went on with a loss that is not a number")
    record = json.loads((run.folder / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["failure"] == "FloatingPointError: the loss is nan in iteration 3"
    assert [math.isnan(value) for value in run.column("loss")[1]] == [False, False, True]
    # a failure is a result: it is not tried again
    assert Run(given, "small", "one").finished
    print_table([run], ["NLL"])
    assert "the loss is nan in iteration 3" in capsys.readouterr().out


def test_refusal_of_a_solver_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, precision="fp16")

    def no_slope(t: Tensor, y: Tensor) -> Tensor:
        return (0 * y).sqrt()

    with Run(given, "small", "one") as run:
        y0 = torch.ones(2, requires_grad=True)
        # f is zero, and its vector-Jacobian product not a number at any scale
        solve(run.precision, no_slope, y0, torch.linspace(0, 1, 2)).sum().backward()
    record = json.loads((run.folder / "run.json").read_text())
    assert record["failure"].startswith("RuntimeError: reached the maximum number of 10 attempts")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("wrong"), OSError("No space left on device"), ValueError("a bug")])
def test_error_of_the_program_is_no_result(error: Exception, tmp_path: Path) -> None:
    """It goes on, and the run is taken up again."""
    given = options(tmp_path, precision="fp32")
    run = Run(given, "small", "one")

    def fail() -> None:
        raise error

    with pytest.raises(type(error)), run:
        train_small(run, fail)
    assert json.loads((run.folder / "run.json").read_text())["status"] == "running"
    again = Run(given, "small", "one")
    assert not again.finished
    train_small(again)
    assert again.column("iteration")[0] == list(range(1, ITERATIONS + 1))


def test_lost_device_is_no_result(tmp_path: Path) -> None:
    """All that comes after it fails too, whatever it is."""
    with pytest.raises(torch.AcceleratorError), Run(options(tmp_path), "small", "one") as run:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert json.loads((run.folder / "run.json").read_text())["status"] == "running"


def test_memory_that_does_not_suffice_is_a_result(tmp_path: Path) -> None:
    with Run(options(tmp_path), "small", "one") as run:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert run.record["status"] == "failed"
    assert not run.done


def test_other_sources_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(tmp_path, precision="fp32")
    with pytest.raises(KeyboardInterrupt), Run(given, "small", "one", recipe={"steps": 3}) as run:
        train_small(run, interrupt_after(5, KeyboardInterrupt))
    with pytest.raises(Refused, match="steps 3, now 4"):
        Run(given, "small", "one", recipe={"steps": 4})
    before = run.record["machine"]
    assert Run(given, "small", "one", recipe={"steps": 3}).record["earlier"] == []
    monkeypatch.setattr("experiments.run.machine", lambda: before | {"sources": "others"})
    again = Run(given, "small", "one", recipe={"steps": 3})
    assert [found["sources"] for found in again.record["earlier"]] == [before["sources"]]
    assert again.record["machine"]["sources"] == "others"


def test_a_program_says_what_its_user_can_put_right(capsys: pytest.CaptureFixture[str]) -> None:
    @program
    def main(arguments: Sequence[str] | None = None) -> int:
        if arguments:
            raise Refused("take another folder")
        raise ValueError("a bug")

    assert main(["--fresh"]) == 1
    assert capsys.readouterr().err == "take another folder\n"
    with pytest.raises(ValueError, match="a bug"):
        main()


def test_compare_takes_no_precision(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Options.parser("small", "one")
    with pytest.raises(SystemExit):
        Options.read(parser, ["--device", "cpu", "--compare", "--precision", "fp16", "--solver", "torchdiffeq"])
    assert "--compare runs every precision: leave out --precision and --solver" in capsys.readouterr().err


def test_load_of_others_is_a_part_of_the_processors_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three processors for 10 s, of which others use 3 + 4 s, and this process 2 s of the first."""
    times = namedtuple("times", ["user", "system", "idle"])
    now, mine = [100.0], [50.0]
    cores = [times(1.0, 2.0, 3.0), times(4.0, 5.0, 6.0), times(7.0, 8.0, 9.0)]
    monkeypatch.setattr("experiments.run.psutil.cpu_times", lambda percpu: cores)
    monkeypatch.setattr("experiments.run.psutil.Process", lambda: SimpleNamespace(cpu_affinity=lambda: [0, 2]))
    clocks = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: mine[0])
    monkeypatch.setattr("experiments.run.time", clocks)
    load = OtherLoad()
    now[0], mine[0] = 110.0, 52.0
    cores[:] = [times(5.0, 3.0, 8.0), times(14.0, 5.0, 6.0), times(10.0, 9.0, 15.0)]
    assert load.percent() == pytest.approx(100 * (3 + 4) / 20)


def test_a_run_that_is_done_keeps_its_record(tmp_path: Path) -> None:
    given = options(tmp_path, precision="fp32")
    with Run(given, "small", "one") as run:
        run.finish(NLL=1.5)
    before = (run.folder / "run.json").read_text()
    with Run(given, "small", "one") as again:
        again.finish(NLL=7.5)
    assert again.finished
    assert (run.folder / "run.json").read_text() == before


def test_run_with_other_options_is_not_overwritten(tmp_path: Path) -> None:
    given = options(tmp_path, precision="fp32")
    train_small(Run(given, "small", "one"))
    (tmp_path / "small" / "one" / "curve.png").write_bytes(b"of the seed before")
    with pytest.raises(Refused, match="seed 0, now 4") as caught:
        Run(replace(given, seed=4), "small", "one")
    assert "--fresh" in str(caught.value)
    run = Run(replace(given, seed=4, fresh=True), "small", "one")
    assert {path.name for path in run.folder.iterdir()} == {"run.json"}
    assert json.loads((run.folder / "run.json").read_text())["config"]["seed"] == 4


def test_checkpoint_of_other_parts_is_refused(tmp_path: Path) -> None:
    run = Run(options(tmp_path, precision="fp32"), "small", "one")
    train_small(run)
    with pytest.raises(ValueError, match="batches"):
        run.resume({"model": Velocity()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp8"}, "expected one of fp64, fp32"),
        ({"solver": "euler"}, "solver is 'euler'"),
        ({"scaler": "static"}, "expected one of none, grad, dynamic, both"),
        ({"solver": "torchdiffeq", "scaler": "dynamic"}, "belongs to rampde"),
        ({"solver": "torchdiffeq", "scaler": "both"}, "belongs to rampde"),
        ({"precision": "fp32", "scaler": "grad"}, "is for bf16 and fp16"),
        ({"precision": "tf32"}, "on a GPU only"),
        ({"solver": "torchdiffeq", "checkpoint": "step"}, "belongs to rampde"),
        ({"checkpoint": "0"}, "positive number"),
        ({"checkpoint": "all"}, "expected one of auto"),
        ({"device": "mps"}, "expected cpu or cuda"),
        ({"threads": 0}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    given: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**given)
    if not {"precision": "fp8"}.items() & given.items():
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        with pytest.raises(SystemExit):
            Options.read(Options.parser("small", "one"), ["--device", "cpu", *words])
        assert "error" in capsys.readouterr().err


def test_defaults_and_labels() -> None:
    read = Options.parser("small", "one")
    cpu = ["--device", "cpu"]
    assert Options.read(read, [*cpu, "--precision", "fp16"]).label == "rampde-fp16-dynamic"
    assert Options.read(read, [*cpu, "--precision", "fp16", "--solver", "torchdiffeq"]).label == "torchdiffeq-fp16-grad"
    assert Options.read(read, [*cpu, "--precision", "fp32", "--checkpoint", "step"]).label == "rampde-fp32-step"
    assert not {"out", "fresh", "seeds"} & set(Options().config)
    # what JSON holds is what is compared when a run is taken up
    assert json.loads(json.dumps(Options().config)) == Options().config


def test_published_variants() -> None:
    labels = [variant.label for variant in published_variants(Options(checkpoint="step"))]
    assert labels == [
        "torchdiffeq-fp32",
        "rampde-fp32-step",
        "torchdiffeq-bf16-none",
        "rampde-bf16-none-step",
        "torchdiffeq-fp16-none",
        "torchdiffeq-fp16-grad",
        "rampde-fp16-none-step",
        "rampde-fp16-grad-step",
        "rampde-fp16-dynamic-step",
    ]
    runs = sweep(Options(compare=True, seeds=2, seed=5))
    assert len(runs) == 2 * len(labels)
    assert {run.seed for run in runs} == {5, 6}
    assert sweep(Options(seed=5)) == [Options(seed=5)]


@pytest.mark.parametrize("name", ["auto", "none", "step", "stage", "lean", "tape", "fp8", "offload", "2"])
def test_every_checkpoint_policy_solves(name: str) -> None:
    precision = Precision(Options(precision="fp32", checkpoint=name))
    model, x = Velocity().eval(), torch.randn(5, 3)
    t = torch.linspace(0, 1, 5)
    (found,) = torch.autograd.grad(solve(precision, model, x.requires_grad_(), t).sum(), x)
    other = Precision(Options(precision="fp32", solver="torchdiffeq"))
    (expected,) = torch.autograd.grad(solve(other, model, x, t).sum(), x)
    # a change of the state is known to a sixteenth in eight bits, everything else to rounding
    torch.testing.assert_close(found, expected, rtol=1 / 16 if name == "fp8" else 1e-4, atol=1e-5)
    assert read_checkpoint("2") == 2


@pytest.mark.parametrize("method", ["rk4", "euler", "midpoint"])
def test_both_solvers_take_the_same_steps(method: str) -> None:
    model, x, t = Velocity().eval().double(), torch.randn(4, 3).double(), torch.linspace(0, 1, 4).double()
    found, expected = (
        solve(Precision(Options(precision="fp64", solver=solver)), model, x, t, method=method)
        for solver in ("rampde", "torchdiffeq")
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_scalers() -> None:
    assert Precision(Options(precision="fp16", scaler="none")).loss_scaler() is False
    grad = Precision(Options(precision="fp16", scaler="grad"))
    assert grad.loss_scaler("a") is grad.grad_scaler
    assert grad.grad_scaler.is_enabled()
    dynamic = Precision(Options(precision="fp16"))
    assert not dynamic.grad_scaler.is_enabled()
    first, second = dynamic.loss_scaler("a"), dynamic.loss_scaler("b")
    assert isinstance(first, rampde.DynamicScaler)
    assert first is dynamic.loss_scaler("a")
    assert first is not second
    first.headroom = 0.25
    other = Precision(Options(precision="fp16"))
    other.load_state_dict(dynamic.state_dict())
    assert [other.loss_scaler(block).headroom for block in ("a", "b")] == [0.25, 1.0]
    both = Precision(Options(precision="fp16", scaler="both"))
    assert both.grad_scaler.is_enabled()
    assert both.loss_scaler("a") is None


@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16", "fp16"])
def test_velocity_sees_its_precision(name: str) -> None:
    precision = Precision(Options(precision=name))
    seen = []

    def velocity(t: Tensor, y: Tensor) -> Tensor:
        seen.append(y.dtype)
        return -y

    y0 = torch.ones(2, dtype=precision.state_dtype)
    found = solve(precision, velocity, y0, torch.linspace(0, 1, 3, dtype=y0.dtype))
    assert set(seen) == {PRECISIONS[name]}
    assert found.dtype == y0.dtype


def test_gradient_error() -> None:
    model, data = Velocity().eval(), torch.randn(8, 3)

    def loss(precision: Precision, model: nn.Module, data: Tensor) -> Tensor:
        t = torch.linspace(0, 1, 4, dtype=data.dtype)
        return solve(precision, model, data, t)[-1].square().sum()

    errors = {}
    for name in ("fp64", "fp32", "bf16", "fp16"):
        precision = Precision(Options(precision=name))
        dtype = precision.state_dtype
        errors[name] = gradient_error(precision, model.to(dtype), data.to(dtype), loss)
    assert errors["fp64"] < 1e-13 < errors["fp32"] < 1e-5 < errors["fp16"] < errors["bf16"] < 0.1


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 1.0), (3.0, 2.0), (math.nan, math.inf)])
def test_gradient_error_of_another_loss(factor: float, expected: float) -> None:
    mine = Precision(Options(precision="fp32"))

    def loss(precision: Precision, model: nn.Module, data: Tensor) -> Tensor:
        return (factor if precision is mine else 1.0) * model(data).sum()

    assert gradient_error(mine, nn.Linear(3, 2), torch.randn(8, 3), loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (1, 5), (7, 3), (8, 4), (5, 5)])
def test_batches_pass_over_all_rows(rows: int, batch: int) -> None:
    x = torch.arange(rows)
    batches = Batches(x, 10 * x, batch=batch, seed=2)
    passes = [[next(batches) for _ in range(math.ceil(rows / batch))] for _ in range(3)]
    for one in passes:
        assert all(torch.equal(10 * a, b) for a, b in one)
        assert sorted(torch.cat([a for a, _ in one]).tolist()) == list(range(rows))
    other = Batches(x, 10 * x, batch=batch, seed=3)
    other.load_state_dict(batches.state_dict())
    for _ in range(5):
        assert torch.equal(next(other)[0], next(batches)[0])


@pytest.mark.parametrize(
    ("tensors", "batch"), [((), 1), ((torch.ones(0),), 1), ((torch.ones(2), torch.ones(3)), 1), ((torch.ones(2),), 0)]
)
def test_batches_refuse_what_is_empty(tensors: tuple[Tensor, ...], batch: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Batches(*tensors, batch=batch, seed=0)
