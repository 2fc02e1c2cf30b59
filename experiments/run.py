"""A run: its folder, its log, its checkpoints, and the training loop that a killed run takes up again.

A run writes ``<out>/<experiment>/<name>/``:

    run.json        what was run, where, and what came of it
    log.csv         a row for each iteration
    checkpoint.pt   model, optimizer, schedule, scalers, batches and random numbers at the last save
    *.png           figures

The log is written with the checkpoint. A run that is started again with the same options goes on from there, and what
it then logs is what it would have logged, on a CPU to the bit; a run that is done is not run again.
"""

from __future__ import annotations

import csv
import json
import math
import random
import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.common import ORIGIN, machine, synchronize
from bench.common import print_table as show
from experiments.files import Refused, whole
from experiments.options import Options, Precision, solve, sweep
from rampde.meter import metered

__all__ = ["Batches", "Options", "Precision", "Run", "Stateful", "print_table", "program", "solve", "sweep", "train"]

# on the CPU memory is measured in one iteration, when everything has been used once; times then mean nothing
METERED = 2
MIB = 2**20


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, a schedule, batches."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Batches:
    """Batches of rows of tensors, in a new random order in each pass over them; the last of a pass may be smaller.

    Raises:
        ValueError: no tensors, tensors of different lengths or without rows, or a batch size below 1.
    """

    def __init__(self, *tensors: Tensor, batch: int, seed: int) -> None:
        lengths = sorted({len(tensor) for tensor in tensors})
        if len(lengths) != 1 or lengths[0] < 1:
            raise ValueError(f"tensors have {lengths or 'no'} rows, expected the same number of rows, at least 1")
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        self.tensors, self.batch = tensors, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._next = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        if self._next >= len(self._order):
            self._order = torch.randperm(len(self.tensors[0]), generator=self._generator)
            self._next = 0
        rows = self._order[self._next : self._next + self.batch]
        self._next += len(rows)
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """The order of this pass, the place in it, and the random numbers of the next ones."""
        return {"order": self._order, "next": self._next, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self._order, self._next = state["order"], state["next"]
        self._generator.set_state(state["generator"])


class OtherLoad:
    """How much others use from now on of the processors on which this process may run."""

    def __init__(self) -> None:
        affinity = getattr(psutil.Process(), "cpu_affinity", None)
        self._cores: list[int] = affinity() if affinity else list(range(psutil.cpu_count() or 1))
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        of_cores = psutil.cpu_times(percpu=True)
        used = 0.0
        for times in (of_cores[core] for core in self._cores):
            used += sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        return time.perf_counter(), used - time.process_time()

    def percent(self) -> float:
        """Of these processors' time since the start."""
        (before, used_before), (after, used_after) = self._start, self._now()
        return round(100 * max(0.0, used_after - used_before) / ((after - before) * len(self._cores)), 1)


class Run:
    """One run of an experiment, as a context in which it is computed.

    Numbers that are no longer finite (``FloatingPointError``), memory that did not suffice, and what a solver or
    PyTorch refuses to do (``RuntimeError``) are results, of which the table tells: leaving the context with one records
    it in ``run.json``, the last with a traceback on stderr, and it goes no further. With any other error, a full disk
    or a lost device among them, and interrupted, a run stays as it is and can be taken up again.

    Attributes:
        folder: where it writes.
        precision: its arithmetic.
        finished: whether it was done, or had failed, before; then there is nothing to do.

    Raises:
        Refused: the folder holds a run with other options.
    """

    def __init__(
        self,
        options: Options,
        experiment: str,
        name: str,
        *,
        synthetic: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            options: all that the run depends on.
            experiment: name of the module.
            name: of the run, and its folder's.
            synthetic: its data are generated in place of the published ones.
            recipe: what the options stand for: sizes, rates, numbers of steps; what JSON can hold.
        """
        self.options, self.name = options, name
        self.precision = Precision(options)
        self.folder = Path(options.out) / experiment / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, str]] = []
        self.record: dict[str, Any] = {
            "experiment": experiment,
            "name": name,
            "study": options.is_study,
            "config": options.config,
            # as it will be read again
            "recipe": json.loads(json.dumps(recipe or {})),
            "machine": machine(),
            "earlier": [],
            "command": shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]]),
            "synthetic": synthetic,
            "status": "running",
            "failure": None,
            "summary": {},
        }
        self.finished = False
        self._others = OtherLoad()
        if options.fresh:
            for path in (self._json, self._log, self._checkpoint, *self.folder.glob("*.png")):
                path.unlink(missing_ok=True)
        if self._json.exists():
            self._take_up(json.loads(self._json.read_text()))
        if not self.finished:
            self._write_record()

    @property
    def _json(self) -> Path:
        return self.folder / "run.json"

    @property
    def _log(self) -> Path:
        return self.folder / "log.csv"

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _take_up(self, before: dict[str, Any]) -> None:
        mine, its = ({**record["config"], **record["recipe"]} for record in (self.record, before))
        other = [
            f"{key} {its.get(key)!r}, now {mine.get(key)!r}" for key in mine | its if mine.get(key) != its.get(key)
        ]
        if other:
            raise Refused(
                f"{self.folder} holds a run with other options ({'; '.join(other)}): "
                "choose another folder with --out, or replace it with --fresh"
            )
        if before["status"] != "running":
            self.record, self.finished = before, True
            self._rows = self._read_log()
        elif self._checkpoint.exists():
            # what goes on elsewhere, or with other sources, says so
            segments = [*before["earlier"], before["machine"]]
            here = self.record["machine"]
            self.record["earlier"] = [one for one in segments if any(one.get(key) != here[key] for key in ORIGIN)]

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, FloatingPointError | RuntimeError) or isinstance(error, torch.AcceleratorError):
            return False
        self.record |= {"status": "failed", "failure": f"{type(error).__name__}: {error}"}
        self._write()
        if not isinstance(error, FloatingPointError | torch.OutOfMemoryError):
            traceback.print_exception(error)
        return True

    def finish(self, **summary: float) -> None:
        """Records the figures of the table: those given, the medians of the times, and the peak of the memory.

        Of a run that was done before nothing is computed again, and its record stays as it is.
        """
        if self.done:
            return
        self.record |= {"status": "done", "summary": {**summary, **self.costs()}}
        self.record["machine"]["cpu_used_by_others_percent"] = self._others.percent()
        self._write()

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return bool(self.record["status"] == "done")

    @property
    def summary(self) -> dict[str, float]:
        """The figures of the table; empty until they are there."""
        found: dict[str, float] = self.record["summary"]
        return found

    def costs(self) -> dict[str, float]:
        """Median seconds of an iteration forward and backward, and the peak in MiB; what was measured of them."""
        times = ("seconds forward", "seconds backward")
        found = {name: statistics.median(values) for name in times if (values := self.column(name)[1])}
        peaks = self.column("peak MiB")[1]
        return found | ({"peak MiB": max(peaks)} if peaks else {})

    def log(self, row: Mapping[str, float]) -> None:
        """Adds a row; it is written with the next checkpoint."""
        self._rows.append({name: repr(value) for name, value in row.items()})

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a column of the log, where there is one."""
        rows = [row for row in self._rows if row.get(name)]
        return [int(row["iteration"]) for row in rows], [float(row[name]) for row in rows]

    def save(self, iteration: int, parts: Mapping[str, Stateful]) -> None:
        """Writes the log, and a checkpoint of ``parts``, the scalers and all random numbers after ``iteration``."""
        self._write_log()
        state = {
            "iteration": iteration,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "precision": self.precision.state_dict(),
            "python": random.getstate(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.precision.device.type == "cuda" else [],
        }
        with whole(self._checkpoint) as part:
            torch.save(state, part)

    def resume(self, parts: Mapping[str, Stateful]) -> int:
        """Takes up the last checkpoint, and drops what was logged after it; its iteration, 0 where there is none.

        Raises:
            Refused: the checkpoint is of other parts.
        """
        if not self._checkpoint.exists():
            self._rows = []
            return 0
        state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        if set(state["parts"]) != set(parts):
            raise Refused(
                f"{self._checkpoint} holds {sorted(state['parts'])}, expected {sorted(parts)}: replace it with --fresh"
            )
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self.precision.load_state_dict(state["precision"])
        random.setstate(state["python"])
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        last: int = state["iteration"]
        self._rows = [row for row in self._read_log() if int(row["iteration"]) <= last]
        return last

    def _read_log(self) -> list[dict[str, str]]:
        if not self._log.exists():
            return []
        with self._log.open(newline="") as file:
            return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]

    def _write_log(self) -> None:
        if not self._rows:
            return
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with whole(self._log) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)

    def _write_record(self) -> None:
        with whole(self._json) as part:
            part.write_text(json.dumps(self.record, indent=1) + "\n")

    def _write(self) -> None:
        self._write_log()
        self._write_record()


def train(
    run: Run,
    model: nn.Module,
    batches: Any,
    loss_of_batch: Callable[[Any], Mapping[str, Tensor]],
    *,
    optimizer: torch.optim.Optimizer,
    iterations: int,
    validate: Callable[[], Mapping[str, float]] | None = None,
    validate_every: int = 100,
    save_every: int = 100,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None,
    least_rate: float = 0.0,
    clip: float | None = None,
    after_step: Callable[[], object] | None = None,
) -> None:
    """Trains from the last checkpoint on, if there is one; logs, validates and saves.

    Each row of the log has "iteration" (from 1), "loss" and what else ``loss_of_batch`` gives, "seconds forward" and
    "seconds backward" (the device has then done its work), and "peak MiB" (allocated beyond what was there before the
    iteration; on a GPU in each iteration, on the CPU in one that is not timed).

    Args:
        run: where it is logged; its precision scales the loss where its scaler is "grad".
        model: what is trained, to be saved; ``loss_of_batch`` knows it.
        batches: an iterator without end that is :class:`Stateful`, such as :class:`Batches`.
        loss_of_batch: from a batch to the 0-dim "loss", and to other 0-dim figures of the log.
        optimizer: steps after each batch.
        iterations: steps to take, those before the checkpoint among them.
        validate: gives figures of the log, "validation loss" among them where there is a ``plateau``.
        validate_every, save_every: iterations between; both happen after the last one too.
        schedule: steps after each iteration.
        plateau: lowers the rate where the validation loss no longer falls; training ends when the rate is below
            ``least_rate``.
        clip: largest norm of the gradient of all parameters.
        after_step: called after each step of the optimizer.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches}
    parts |= {"schedule": schedule} if schedule is not None else {}
    parts |= {"plateau": plateau} if plateau is not None else {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = run.precision.grad_scaler
    iteration = saved = run.resume(parts)
    with tqdm(desc=run.name, initial=iteration, total=iterations, unit=" iterations", mininterval=1) as progress:
        while iteration < iterations and (plateau is None or optimizer.param_groups[0]["lr"] >= least_rate):
            iteration += 1
            last = iteration == iterations
            row: dict[str, float] = {"iteration": iteration, **_gradient(run, next(batches), loss_of_batch, iteration)}
            if not math.isfinite(row["loss"]):
                run.log(row)
                raise FloatingPointError(f"the loss is {row['loss']} in iteration {iteration}")
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if after_step is not None:
                after_step()
            if schedule is not None:
                with warnings.catch_warnings():
                    # a step that the GradScaler left out is a step of the schedule all the same
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    schedule.step()
            if validate is not None and (last or iteration % validate_every == 0):
                row |= validate()
                if plateau is not None:
                    plateau.step(row["validation loss"])
            run.log(row)
            if iteration % save_every == 0:
                run.save(iteration, parts)
                saved = iteration
            progress.update()
            progress.set_postfix_str(f"loss {row['loss']:.4g}", refresh=False)
    if saved != iteration:
        run.save(iteration, parts)


def _gradient(
    run: Run, batch: Any, loss_of_batch: Callable[[Any], Mapping[str, Tensor]], iteration: int
) -> dict[str, float]:
    """The loss of a batch and its gradient, timed and measured."""
    device = run.precision.device

    def work() -> tuple[Mapping[str, Tensor], float, float]:
        synchronize(device)
        start = time.perf_counter()
        figures = loss_of_batch(batch)
        synchronize(device)
        middle = time.perf_counter()
        run.precision.grad_scaler.scale(figures["loss"]).backward()
        synchronize(device)
        return {name: value.detach() for name, value in figures.items()}, middle - start, time.perf_counter() - middle

    peak = None
    if device.type == "cuda" or iteration == METERED:
        measured = metered(work, device)
        (figures, forward, backward), peak = measured.result, measured.peak
    else:
        figures, forward, backward = work()
    row = {name: value.item() for name, value in figures.items()}
    if device.type == "cuda" or peak is None:
        row |= {"seconds forward": forward, "seconds backward": backward}
    return row | ({} if peak is None else {"peak MiB": peak / MIB})


def program(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A program's main function that prints what its user can put right (:class:`Refused`), and then returns 1."""

    @wraps(main)
    def told(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except Refused as error:
            print(error, file=sys.stderr)
            return 1

    return told


def print_table(runs: Sequence[Run], columns: Sequence[str]) -> None:
    """Prints the summaries of runs beside each other; a run that failed says how."""
    rows = []
    for run in runs:
        figures = {name: f"{run.summary[name]:.4g}" if name in run.summary else "" for name in columns}
        note = run.record["failure"] or ("synthetic data" if run.record["synthetic"] else "")
        rows.append({"": run.name, **figures, "note": note})
    show(rows)
