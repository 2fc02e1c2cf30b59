"""Adaptive solves with ``cuda_graph=True``: a number of attempted steps is one CUDA graph, repeated by later solves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rampde.buffers import unchanged
from rampde.capture import Recorder, Work
from rampde.captured_solve import Held, Moving, recorded_with_casts
from rampde.checkpoint.keeper import Checkpoints
from rampde.graph_cache import CACHE, Kind, check_recordable, emptied, key_of, lasting, settings_of
from rampde.problem import Problem
from rampde.resident import Resident, integrate_resident


class RecordedAttempts:
    """Steps in memory that stays where it is; one solve at a time takes them.

    What 16-bit velocities round off is measured by the solve that is recorded, and taken to be the same later.
    """

    def __init__(
        self, problem: Problem, y: list[Tensor], checkpoints: Checkpoints | None, held: Held, recorder: Recorder
    ) -> None:
        self._resident = Resident(problem, y, checkpoints)
        self._moving = Moving(held)
        self._buffers = problem.buffers
        self._recorder = recorder
        self._repeat: Work | None = None

    def run(self, problem: Problem, y: list[Tensor], checkpoints: Checkpoints | None, held: Held) -> list[Tensor]:
        """The states that the solve returns."""
        resident = self._resident
        resident.aim(problem, y, checkpoints)
        try:
            if self._repeat is None:
                resident.run(self._record)
            else:
                self._moving.update(held)
                resident.repeat(self._repeat)
        finally:
            # what is kept for gradients is the solve's own
            resident.checkpoints = None
        return [leaf.clone() for leaf in resident.leaves]

    def _record(self, work: Work) -> Work:
        # warming up evaluates f, which shall not show
        with self._moving.in_place(), unchanged(self._buffers):
            self._repeat = recorded_with_casts(self._recorder, work)
        return self._repeat


def integrate_recorded(problem: Problem, y0: Sequence[Tensor], checkpoints: Checkpoints | None) -> list[Tensor]:
    """As :func:`rampde.adaptive.integrate_adaptive`, by a CUDA graph from the second solve of its kind on.

    Raises:
        ValueError: the host is needed between the steps.
        RuntimeError: as there, and where f cannot be recorded.
    """
    check_recordable(problem)
    if not Resident.serves(problem, checkpoints):
        raise ValueError(
            "cuda_graph is True, but the steps of this solve cannot be decided on the device: expected float64 times"
            " without step_t, jump_t, norm, batch_axis or process_group, tolerances that are numbers, real states,"
            ' checkpoint "auto" or "step", no compensated sum, no gradient of t, no callbacks, and a func that draws no'
            " random numbers"
        )
    assert problem.first is not None
    y = [leaf.to(spec.state_dtype) for leaf, spec in zip(y0, problem.velocity.spec.leaves, strict=True)]
    held = Held.of(problem.velocity.original)
    tolerance = problem.tolerance
    key = (
        "attempts", *key_of(problem, y0), problem.control, tuple(tolerance.rtol), tuple(tolerance.atol),
        len(problem.output_times), problem.sign, checkpoints is None, tuple(k.dtype for k in problem.first.k),
    )  # fmt: skip
    settings = settings_of(problem)
    kind: Kind[RecordedAttempts] | None = CACHE.known(key, held, settings)
    if kind is None:
        leaves = integrate_resident(problem, y0, checkpoints)
        CACHE.remember(key, Kind(emptied(problem), held, lasting(settings, problem)))
        return leaves
    new = partial(RecordedAttempts, problem, y, checkpoints, held)
    lease = CACHE.lease(kind, new, problem.velocity.spec.device)
    try:
        return lease.solve.run(problem, y, checkpoints, held)
    finally:
        lease.release()
