"""The road out with steps that are decided on the device: the host looks at it once in a number of attempts.

What a step of :mod:`rampde.adaptive` asks the host for, its error, lies on the device, and so does all that follows
from it: whether the step stands, the next size, the times at which f is evaluated, the outputs in the step. An attempt
that is rejected runs to its end like any other, and changes nothing. So a number of attempts is one piece of work
without a decision in it, on tensors that stay where they are: it can be recorded once, as a CUDA graph, and repeated.

Attempts after the one that ends the solve are made in vain, up to ``ATTEMPTS_A_POLL - 1`` of them; and a method whose
error does not need the velocity at the end of a step evaluates that of a rejected one, too. So f is evaluated more
often than by the loop of the host, at the last state or at states that do not stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rampde import step_state as at
from rampde.adaptive import Course, Rows, adaptive_steps, advice, conclude
from rampde.attempts import Arithmetic, AttemptedSteps, Trial, stiffness_of
from rampde.capture import Work
from rampde.checkpoint.every_step import EveryStep
from rampde.checkpoint.keeper import Checkpoints, StepStart
from rampde.control import Attempt, bounded, not_finite, too_many, underflow
from rampde.error_norm import ErrorNorm, unit_of_rounding
from rampde.grid import Output
from rampde.ops import step_commit, step_control
from rampde.options import AdaptiveOptions
from rampde.problem import Problem, Stage
from rampde.tableau import EmbeddedTableau

Record = Callable[[Work], Work]
"""Makes of a piece of work what repeats it on the same tensors; may run it, or not."""

# with a look, of duration P, after every K of N attempts, of duration A each, a solve takes N / K looks and about K / 2
# attempts in vain: least for K = sqrt(2 N P / A). It has some fifty attempts; a look, which waits for the device, reads
# it and launches again, takes about half as long as an attempt with a small f, and less than that with a large one
ATTEMPTS_A_POLL = 8


def plainly(work: Work) -> Work:
    """Records nothing: the work is done again, in Python."""
    return work


class _UnreadNorm(ErrorNorm):
    """Leaves the sums of the last step on the device."""

    def __init__(self, problem: Problem, first: Stage) -> None:
        super().__init__(problem, None, unit_of_rounding(problem, first.k))
        self.sums: Tensor | None = None

    def fused_update(
        self,
        y: Sequence[Tensor],
        k: Sequence[Sequence[Tensor]],
        h: Tensor,
        y_next: Sequence[Tensor | None],
        rounded: Sequence[Tensor | None] | None,
        compensation: Sequence[Tensor | None],
        quantised: Sequence[tuple[object, ...]],
    ) -> tuple[float, float]:
        self.sums = self.fused_sums(y, k, h, y_next, rounded, compensation, quantised)
        return 0.0, 0.0


class Resident:
    """A solve whose steps are decided on the device, by the rules of :class:`rampde.control.AdaptiveSteps`.

    The rounding of 16-bit velocities is measured at the start alone, where the loop of the host measures it again when
    a step fails.

    Attributes:
        leaves: the result, for each leaf (T, *shape).
        course: how it went, as far as the host has seen it.
    """

    def __init__(
        self,
        problem: Problem,
        y: list[Tensor],
        checkpoints: Checkpoints | None = None,
        attempts: int = ATTEMPTS_A_POLL,
    ) -> None:
        """Allocates all that must stay in its place.

        Args:
            problem: a solve that is served; its ``first`` stage is used, not evaluated again.
            y: leaves of y0 in the state's dtype.
            checkpoints: where gradients are wanted, keeps the start of every accepted step.
            attempts: how many there are between two looks of the host, at least 1.
        """
        first, options, method = problem.first, problem.control, problem.method
        assert first is not None
        assert isinstance(options, AdaptiveOptions)
        assert isinstance(method, EmbeddedTableau)
        self.options = options
        self.norm = _UnreadNorm(problem, first)
        self.arithmetic = Arithmetic(problem, self.norm, checkpoints)
        tableau, spec = self.arithmetic.tableau, problem.velocity.spec
        device = spec.device
        self._nodes = list(tableau.nodes)
        self._interpolant = [c for row in tableau.interpolant for c in row]
        self._parameters = list(at.Parameters.of(options, method.control_order, problem.sign))
        # what one look of the host has to see
        self._seen = torch.zeros(at.CONTROL_SIZE + attempts * at.RECORD_SIZE, dtype=torch.float64, device=device)
        self._control = self._seen[: at.CONTROL_SIZE]
        self._records = self._seen[at.CONTROL_SIZE :].view(attempts, at.RECORD_SIZE).unbind(0)
        self._h = self._control[at.H]
        self._stage_times = torch.zeros(len(self._nodes), dtype=spec.time_dtype, device=device)
        self._times = self._stage_times.unbind(0)
        self._output_times = torch.zeros(len(problem.output_times), dtype=torch.float64, device=device)
        self._sizes = torch.tensor(self.norm.sizes, dtype=torch.float64, device=device)
        self._y = [torch.empty_like(leaf) for leaf in y]
        self._k = [torch.empty_like(leaf, dtype=k.dtype) for leaf, k in zip(y, first.k, strict=True)]
        self._rows = Rows(y, len(problem.output_times), problem.output_dtypes)
        # of each attempt what f sees of the state at its start, leaf by leaf; copied where it stands
        self._staged: list[tuple[Tensor, ...]] = []
        if checkpoints is not None:
            self._staged = [rows.unbind(0) for rows in Rows(y, attempts, problem.velocity.dtypes).leaves]
        self._latest: Trial | None = None
        self.aim(problem, y, checkpoints)

    def aim(self, problem: Problem, y: list[Tensor], checkpoints: Checkpoints | None) -> None:
        """Makes ready for another solve that differs in the values of tensors alone; the arguments are those of it."""
        assert problem.first is not None
        self.problem, self.checkpoints, self._start = problem, checkpoints, y
        self.norm.problem = problem
        steps = adaptive_steps(problem, y, problem.first, self.norm)
        self._attempt = steps.propose()
        self._initial = at.initial_control(self.options, self._attempt, steps.h)
        self._output_times.copy_(torch.tensor(problem.output_times, dtype=torch.float64))
        spec = problem.velocity.spec
        self.course = Course(AttemptedSteps(self.arithmetic.tableau.nodes, spec.time_dtype, spec.device))

    @property
    def leaves(self) -> list[Tensor]:
        return self._rows.leaves

    @staticmethod
    def serves(problem: Problem, checkpoints: Checkpoints | None) -> bool:
        """Whether the steps can be decided on the device: those of an embedded pair by the default norm of real leaves
        with one tolerance each, where nobody wants to know of a step before the next one, and nothing but the time and
        the state says how it goes; of checkpoints, where it keeps the start of every step."""
        options = problem.control
        if not isinstance(problem.method, EmbeddedTableau) or not isinstance(options, AdaptiveOptions):
            return False
        alone = problem.search is None and problem.observer is None and problem.agreement is None
        plain = problem.norm_is_fused and not problem.compensated and not problem.time_needs_grad
        plain = plain and problem.random is None and not problem.per_sample
        free = not options.step_t and not options.jump_t and options.dtype == torch.float64
        # there is no float64 on mps
        wide = problem.velocity.spec.device.type != "mps"
        return alone and plain and free and wide and (checkpoints is None or isinstance(checkpoints, EveryStep))

    def run(self, record: Record = plainly) -> None:
        """Takes steps until every output is written, in pieces of work that ``record`` makes repeatable.

        Raises:
            RuntimeError: what :class:`rampde.adaptive.Loop` raises, for the same reasons.
        """
        self._begin()
        self.repeat(record(self._attempts))

    def repeat(self, repeat: Callable[[], None]) -> None:
        """As :meth:`run`, by what an earlier run has recorded."""
        # whatever recording has changed
        self._begin()
        while True:
            repeat()
            if self._look():
                break
        conclude(self.problem, self.course)

    def _begin(self) -> None:
        """Sets everything to the start, with the first attempt proposed."""
        first = self.problem.first
        assert first is not None
        self._control.copy_(torch.tensor(self._initial, dtype=torch.float64))
        self._stage_times.copy_(torch.stack(tuple(self.course.steps.tensors(self._attempt)[1])))
        self._rows.put(0, self._start)
        for target, source in zip((*self._y, *self._k), (*self._start, *first.k), strict=True):
            target.copy_(source.detach())

    def _attempts(self) -> None:
        """A number of attempts, without a look of the host: what each is, only the device knows."""
        nothing: list[Tensor | None] = [None] * len(self._y)
        for index, record in enumerate(self._records):
            first = Stage(self._times[0], self._y, [*self._k])
            trial = self.arithmetic.attempt_at(self._y, first, nothing, self._attempt, self._h, self._times)
            self.arithmetic.finish(trial)
            assert self.norm.sums is not None
            step_control(
                self._control,
                record,
                self._stage_times,
                self.norm.sums,
                self._sizes,
                self._output_times,
                self._nodes,
                self._parameters,
            )
            for leaf, y in enumerate(self._y):
                step_commit(
                    record,
                    self._output_times,
                    trial.y_next[leaf],
                    trial.k[leaf][1:],
                    self._interpolant,
                    y,
                    self._k[leaf],
                    self._rows.leaves[leaf],
                    self._staged[leaf][index] if self._staged else None,
                )
            self._latest = trial

    def _look(self) -> bool:
        """Reads what the attempts have come to; whether they have come to the end."""
        values: list[float] = self._seen.tolist()
        control = values[: at.CONTROL_SIZE]
        for index in range(len(self._records)):
            begin = at.CONTROL_SIZE + index * at.RECORD_SIZE
            record = values[begin : begin + at.RECORD_SIZE]
            if record[at.ACCEPTED]:
                self._note(record, index)
        status = control[at.STATUS]
        if status == at.DONE:
            self.norm.warn_of_rounding(control[at.WORST_NOISE])
        elif status != at.RUNNING:
            raise self._failure(control)
        return status == at.DONE

    def _note(self, record: list[float], index: int) -> None:
        """A step that stands, the attempt ``index`` of those that the host looks at."""
        course, times = self.course, self.problem.output_times
        start, end = record[at.START], record[at.STEP_END]
        for due in range(int(record[at.FIRST_OUTPUT]), int(record[at.LAST_OUTPUT])):
            inside = times[due] != end
            theta = (times[due] - start) / (end - start) if inside else 1.0
            course.outputs.append(Output(len(course.steps), inside, theta))
        course.steps.attempts.append(Attempt(start, end, record[at.STEP]))
        if self.checkpoints is not None:
            x = [staged[index].clone() for staged in self._staged]
            # the state itself is not kept
            self.checkpoints.store(StepStart(x, x, [None] * len(x)), None)

    def _failure(self, control: list[float]) -> RuntimeError:
        """Why the device has stopped."""
        time, size = control[at.TIME], control[at.SIZE]
        if control[at.STATUS] == at.NOT_FINITE:
            return not_finite(control[at.END], abs(control[at.H]))
        if control[at.STATUS] == at.UNDERFLOW:
            return underflow(bounded(size, self.options), time)
        assert self._latest is not None
        error = too_many(int(control[at.ATTEMPTS]), self.options.max_num_steps, time, size)
        return RuntimeError(f"{error}{advice(stiffness_of(self.arithmetic.tableau, self._y, self._latest))}")


def integrate_resident(
    problem: Problem,
    y0: Sequence[Tensor],
    checkpoints: Checkpoints | None,
    record: Record = plainly,
    attempts: int = ATTEMPTS_A_POLL,
) -> list[Tensor]:
    """As :func:`rampde.adaptive.integrate_adaptive`, of a solve that :meth:`Resident.serves`.

    ``record`` makes a piece of work repeatable, such as a CUDA graph does; ``attempts`` are in one piece.
    """
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)]
    resident = Resident(problem, y, checkpoints, attempts)
    resident.run(record)
    return resident.leaves
