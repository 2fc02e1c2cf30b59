"""Newton's method for the stage equations of implicit Runge-Kutta methods.

The unknowns are the velocities ``K_i`` of a block of stages, in the state's precision:
``K_i = f(t + c_i h, lo(y + h sum_j a_ij K_j))``. The solution of a step is taken from them and not from one more
evaluation of f, which would multiply their error, and the rounding to 16 bits, by the stiffness.

What an evaluation of f costs decides the rest. A Jacobian costs as much as several evaluations (dense: a product for
each element of the state; Krylov: one product, and then each of its uses), so it is kept from step to step for as long
as the iteration with it ends in a few evaluations, and taken anew at the current iterate, for each stage, when it does
not: Newton's method in full where the problem asks for it. Each evaluation records its graph, so that a new Jacobian
needs none. Whether an iterate is better than the last is judged by the corrections, as the natural monotonicity test
has it (Deuflhard, Newton Methods for Nonlinear Problems, section 3.3), not by residuals, whose size says little in a
stiff problem.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rampde.implicit_tableau import Block, ImplicitTableau
from rampde.linear import RESTART, DenseSystem, Derivative, KrylovSystem, Layout, System, combined
from rampde.ops import rk_stage
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState
from rampde.tolerance import Bound

LINEAR_SOLVERS = ("auto", "dense", "krylov")
DENSE_SIZE = 128  # elements of the state up to which "auto" forms the Jacobian at once
LARGEST_MATRIX = 4096  # rows of the equations up to which "auto" forms it where GMRES is slow or fails

FORCING = 1e-2  # how well a correction is solved for by GMRES: better would cost more products than it saves
FAILED = 0.1  # residual of a correction with which Newton's method does not converge quickly
MAX_PRODUCTS = 300  # of GMRES for one correction
SLOW = 5  # further iterations, predicted from the last two corrections, that are worth a new Jacobian
CONTRACTION = 0.75  # of an undamped correction by the next one, where the iterate is taken
LEAST_DAMPING = 2.0**-12
NOISE = 8.0  # roundings of f within which corrections that stop getting smaller mean that there is no more to get
CONTINUED = 0.1  # by how much, relatively, the velocity at a start may miss the extrapolation of the step before
START = -1  # stands for the start of a step among the stages whose random numbers are kept
SAME_STEP = 1e-3  # relative change of h that a factored matrix is used for


@dataclass(frozen=True)
class NewtonOptions:
    """Options of the implicit methods.

    Attributes:
        max_iters: evaluations of a step's stages before the iteration gives up.
        linear_solver: "dense" (the Jacobian as a matrix), "krylov" (products with it, GMRES, for states of any size
            whose equations are not too stiff) or "auto": dense for states of up to 128 elements, else krylov, and
            dense again where GMRES is slow or fails and the matrix is not too large.
        newton_tolerance: largest last correction, as a part of what rtol and atol allow.
    """

    max_iters: int = 100
    linear_solver: str = "auto"
    newton_tolerance: float = 1e-2


def read_options(options: dict[str, object]) -> NewtonOptions:
    """The options of the implicit methods among ``options``; others, and None, are left alone.

    Raises:
        TypeError, ValueError: an option that is not as :class:`NewtonOptions` says.
    """
    default = NewtonOptions()
    max_iters, linear_solver, tolerance = (
        getattr(default, name) if options.get(name) is None else options[name]
        for name in ("max_iters", "linear_solver", "newton_tolerance")
    )
    if isinstance(max_iters, bool) or not isinstance(max_iters, int):
        raise TypeError(f"max_iters is {max_iters!r}, expected a positive integer")
    if max_iters < 1:
        raise ValueError(f"max_iters is {max_iters}, expected a positive integer")
    if linear_solver not in LINEAR_SOLVERS:
        known = ", ".join(f'"{name}"' for name in LINEAR_SOLVERS)
        raise ValueError(f"linear_solver is {linear_solver!r}, expected one of {known}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise TypeError(f"newton_tolerance is {tolerance!r}, expected a positive number up to 1")
    if not 0 < tolerance <= 1:
        raise ValueError(f"newton_tolerance is {tolerance!r}, expected a positive number up to 1")
    return NewtonOptions(max_iters, str(linear_solver), float(tolerance))


@dataclass
class Iterate:
    """Velocities of a block and f at the inputs they make."""

    velocities: Tensor  # (m, n)
    stages: list[Stage]
    residual: Tensor  # (m, n), f less the velocities


@dataclass
class Failure:
    """A step whose iteration did not converge."""

    step: int
    size: float
    iterations: int


def start_time(problem: Problem, step: int) -> Tensor:
    """The time at the start of a step as f receives it."""
    points, dtype = problem.grid.points, problem.velocity.spec.time_dtype
    time = points[step].detach().to(dtype)
    return torch.nextafter(time, points[step + 1].detach().to(dtype)) if problem.perturb else time


class Linearization:
    """The derivative of the equations of a block, with the Jacobian at each of its stages."""

    def __init__(self, derivatives: Sequence[Derivative], dense: bool) -> None:
        self._jacobians = torch.stack([derivative.matrix() for derivative in derivatives]) if dense else None
        # with matrices the graphs are not needed any more
        self._derivatives = [] if dense else derivatives
        self._factored: tuple[float, Block, System] | None = None

    def system(self, block: Block, coupling: Tensor, h: Tensor, length: float, forcing: float) -> System:
        """Newton's equations of ``block``, with ``coupling``, for a step ``h``, about ``length`` on the host."""
        if self._factored is not None:
            factored, of_block, system = self._factored
            if of_block.coupling == block.coupling and abs(length - factored) <= SAME_STEP * abs(factored):
                return system
        if self._jacobians is not None:
            system = DenseSystem(self._jacobians, coupling, h)
        else:
            products = [derivative.product for derivative in self._derivatives]
            transposed = [derivative.transposed_product for derivative in self._derivatives]
            system = KrylovSystem(products, transposed, coupling, h, forcing, MAX_PRODUCTS)
        self._factored = (length, block, system)
        return system


class StageSolver:
    """Evaluates f on flat states and solves the stage equations of one step after the other.

    Attributes:
        dense: whether Jacobians are matrices.
        linearizations: the latest derivative for each number of stages in a block.
        forcing: relative residual to which GMRES solves.
        random: where f draws random numbers, the generators' state at each stage of the latest step: all
            evaluations of a stage see the same numbers.
    """

    def __init__(self, problem: Problem, forcing: float = FORCING) -> None:
        assert isinstance(problem.method, ImplicitTableau)
        self.problem = problem
        self.tableau = problem.method
        self.options = read_options(problem.options)
        self.layout = Layout(problem.velocity.spec)
        chosen = self.options.linear_solver
        self.dense = chosen == "dense" or (chosen == "auto" and self.layout.size <= DENSE_SIZE)
        self._may_turn_dense = chosen == "auto"
        self.forcing = forcing
        self.random: dict[int, RandomState] = {}
        self.roundoff = self._roundoff()
        self.failures: list[Failure] = []
        self._couplings: dict[Block, Tensor] = {}
        self._weights: dict[Block, Tensor] = {}
        self._rtol, self._atol = (self._bounds(b) for b in (problem.tolerance.rtol, problem.tolerance.atol))
        self.linearizations: dict[int, Linearization] = {}
        self._previous: tuple[float, list[Tensor]] | None = None

    def _roundoff(self) -> float:
        """Unit roundoff of f: of the coarsest dtype among its input, its result and autocast."""
        velocity, first = self.problem.velocity, self.problem.first
        dtypes = [*velocity.dtypes, *(k.dtype for k in (first.k if first is not None else ()))]
        if velocity.autocast.enabled:
            dtypes.append(velocity.autocast.dtype)
        return max(torch.finfo(dtype).eps for dtype in dtypes) / 2

    def _bounds(self, bounds: Sequence[Bound]) -> Tensor:
        """(n,) tolerances, element by element."""
        layout, leaves = self.layout, self.problem.velocity.spec.leaves
        full = []
        for bound, leaf in zip(bounds, leaves, strict=True):
            values = torch.as_tensor(bound, dtype=layout.dtype, device=layout.device).expand(leaf.shape)
            # a complex element's bound is that of both its parts
            full.append(torch.stack([values, values], -1) if leaf.dtype.is_complex else values)
        return layout.pack(full)

    def coupling(self, block: Block) -> Tensor:
        """(m, m) coefficients within ``block``."""
        if block not in self._couplings:
            self._couplings[block] = torch.tensor(block.coupling, dtype=self.layout.dtype, device=self.layout.device)
        return self._couplings[block]

    def weights(self, block: Block) -> Tensor:
        """(s + 1, m) coefficients by which the block's velocities enter the stage inputs and the result."""
        if block not in self._weights:
            rows = [*self.tableau.a, self.tableau.b]
            weights = [[float(row[j]) for j in block.stages] for row in rows]
            self._weights[block] = torch.tensor(weights, dtype=self.layout.dtype, device=self.layout.device)
        return self._weights[block]

    def stage_input(self, i: int, y: Tensor, h: Tensor, velocities: Sequence[Tensor]) -> Tensor:
        """(n,) input of stage ``i``, not yet rounded."""
        inputs = self.tableau.stage_inputs[i]
        if not inputs.stages:
            return y
        x: Tensor = rk_stage(y, [velocities[j] for j in inputs.stages], h, inputs.weights, self.layout.dtype)
        return x

    def evaluate(self, i: int, time: Tensor, x: Tensor) -> Stage:
        """f at stage ``i``, with its graph."""
        velocity = self.problem.velocity
        leaves = [leaf.detach() for leaf in self.layout.unpack(x, velocity.dtypes)]
        if self.problem.random is not None:
            if i in self.random:
                self.random[i].restore()
            else:
                self.random[i] = RandomState.current(self.layout.device)
        with velocity.autocast.entered():
            return Stage(time, leaves, velocity.evaluate_with_graph(time, leaves))

    def turn_dense(self, stages: int) -> bool:
        """Goes over to matrices, as GMRES failed for a block of ``stages``; False where that is not to be."""
        if self.dense or not self._may_turn_dense or stages * self.layout.size > LARGEST_MATRIX:
            return False
        self.dense = True
        self.linearizations = {}
        return True

    def linearize(self, stages: Sequence[Stage]) -> Linearization:
        """The derivative of the stage equations at ``stages``, which carry their graphs."""
        velocity = self.problem.velocity
        return Linearization([Derivative(stage, self.layout, velocity) for stage in stages], self.dense)

    def system(self, linearization: Linearization, block: Block, h: Tensor, length: float) -> System:
        """Newton's equations of ``block`` for a step ``h``, about ``length`` on the host."""
        return linearization.system(block, self.coupling(block), h, length, self.forcing)

    def solve(self, step: int, y: Tensor, h: Tensor, times: Sequence[Tensor]) -> list[Tensor]:
        """(n,) velocities of all stages of ``step`` from the state ``y``; a failure is noted in ``failures``."""
        ends = self.problem.grid.times
        length = ends[step + 1] - ends[step]
        first = self.problem.first if step == 0 else None
        starts_explicitly = self.tableau.blocks[0].explicit
        self.random = {}
        if first is not None and self.problem.random is not None:
            self.random[0 if starts_explicitly else START] = self.problem.random
        start: Tensor | None = None
        if not starts_explicitly:
            start, first = self._start(step, y, first), None
        velocities = self._guess(y, length, start)
        for block in self.tableau.blocks:
            equations = _Equations(self, step, block, y, h, length, times, velocities, first)
            if not block.explicit:
                equations.solve()
            else:
                i = block.stages[0]
                velocities[i] = equations.evaluate(y.new_empty(0)).velocities[0]
            first = None
        self._previous = (length, velocities)
        return velocities

    def _start(self, step: int, y: Tensor, first: Stage | None) -> Tensor | None:
        """(n,) velocity at the start of a step, where it tells more than the last stage of the step before does."""
        if first is not None:
            return self.layout.pack(first.k).detach()
        if self.tableau.stiffly_accurate:
            return None
        start = start_time(self.problem, step)
        return self.layout.pack(self.evaluate(START, start, y).k).detach()

    def _guess(self, y: Tensor, length: float, start: Tensor | None) -> list[Tensor]:
        """Velocities to begin with: those of the previous step and that at the ``start``, extrapolated; at the very
        start that one, or zero where it is stiff."""
        stages = self.tableau.stages
        if self._previous is None:
            if start is None or not self._is_moderate(start, y, length):
                return [torch.zeros_like(y)] * stages
            return [start] * stages
        previous, velocities = self._previous
        ratio, nodes = length / previous, self.tableau.nodes
        if start is not None and self._belongs(start, velocities):
            nodes, velocities = (*nodes, 1.0), [*velocities, start]
        if ratio > 2:
            return [velocities[-1]] * stages
        return [_extrapolated(nodes, velocities, 1 + ratio * c) for c in self.tableau.nodes]

    def _belongs(self, start: Tensor, velocities: list[Tensor]) -> bool:
        """Whether the velocity at the start continues those of the step before; in a stiff problem the error of the
        state makes it anything."""
        expected = _extrapolated(self.tableau.nodes, velocities, 1.0)
        if start.numel() == 0:
            return False
        return bool((start - expected).abs().amax() <= CONTINUED * expected.abs().amax())

    def _is_moderate(self, velocity: Tensor, y: Tensor, length: float) -> bool:
        """Whether a step along ``velocity`` stays near ``y``: the state itself is a point where f is sound."""
        if y.numel() == 0:
            return False
        return bool(abs(length) * velocity.abs().amax() <= y.abs().amax())

    def warn(self) -> None:
        """One warning for all steps that did not converge."""
        if not self.failures:
            return
        worst, times = self.failures[0], self.problem.grid.times
        warnings.warn(
            "Functional iteration did not converge. Solution may be incorrect."
            f" {len(self.failures)} of {self.problem.grid.steps} steps are concerned, first step {worst.step} from"
            f" t = {times[worst.step]:.6g} to {times[worst.step + 1]:.6g}: after {worst.iterations} iterations its"
            f" residual is {worst.size:.3g} times the allowed one (inf: f is not finite or its equations are singular);"
            " use smaller steps there, wider rtol and atol, or a larger max_iters",
            UserWarning,
            stacklevel=_callers_level(),
        )


class _Equations:
    """The stage equations of one block in one step."""

    def __init__(
        self,
        solver: StageSolver,
        step: int,
        block: Block,
        y: Tensor,
        h: Tensor,
        length: float,
        times: Sequence[Tensor],
        velocities: list[Tensor],
        first: Stage | None,
    ) -> None:
        """``velocities``: those of the blocks before, and guesses from there on; ``first``: the first stage at ``y``,
        where it is known."""
        self.solver, self.step, self.block = solver, step, block
        self.y, self.h, self.length, self.times = y, h, length, times
        self.velocities = velocities
        self.first = first
        self.iterations = 0

    def evaluate(self, velocities: Tensor) -> Iterate:
        """f at the inputs that the (m, n) ``velocities`` make, or of an explicit block."""
        solver, block = self.solver, self.block
        for i, row in zip(block.stages, velocities, strict=False):
            self.velocities[i] = row
        stages = []
        for i in block.stages:
            if self.first is not None:
                stages.append(self.first)
                self.first = None
                continue
            x = solver.stage_input(i, self.y, self.h, self.velocities)
            stages.append(solver.evaluate(i, self.times[i], x))
        self.iterations += 1
        k = torch.stack([solver.layout.pack(stage.k).detach() for stage in stages])
        if block.explicit:
            return Iterate(k, stages, k)
        return Iterate(velocities, stages, k - velocities)

    def solve(self) -> None:
        """Writes the solution into ``velocities``."""
        solver, options = self.solver, self.solver.options
        largest = self.y.abs().amax() if self.y.numel() else self.y.new_zeros(())
        allowed = options.newton_tolerance * (solver._atol + solver._rtol * self.y.abs())
        # what the state cannot resolve; never zero, so that zero over it is zero
        self.allowed = allowed + (torch.finfo(self.y.dtype).eps * largest).clamp(min=torch.finfo(self.y.dtype).tiny)
        self.largest = largest
        guess = torch.stack([self.velocities[i] for i in self.block.stages])
        m = len(self.block.stages)
        solution, size = self._iterate(guess)
        if not size <= 1 and bool((guess != 0).any()):
            # the guess may have been the fault: the state itself is a point where f is sound
            solver.linearizations.pop(m, None)
            again, size_again = self._iterate(torch.zeros_like(guess))
            if not size <= size_again:
                solution, size = again, size_again
        if not size <= 1:
            solver.linearizations.pop(m, None)
            if not solver.failures or solver.failures[-1].step != self.step:
                solver.failures.append(Failure(self.step, size, self.iterations))
        for i, row in zip(self.block.stages, solution, strict=True):
            self.velocities[i] = row

    def _measure(self, correction: Tensor, velocities: Tensor) -> tuple[float, float]:
        """How far a correction moves the stage inputs and the result of the step: relative to what is allowed, and to
        the rounding of f."""
        if correction.numel() == 0:
            return 0.0, 0.0
        weights = self.solver.weights(self.block)
        moved = (self.h * combined(weights, correction)).abs()
        increment = (self.h * combined(weights, velocities)).abs().amax()
        roundoff = self.solver.roundoff
        size = (moved / (self.allowed + roundoff * increment)).amax()
        noise = moved.amax() / (roundoff * torch.maximum(self.largest, increment) + torch.finfo(moved.dtype).tiny)
        # the one look at the device of an iteration
        size_, noise_ = torch.stack([size, noise]).tolist()
        return size_, noise_

    def _correct(self, iterate: Iterate, anew: bool = False) -> tuple[Tensor, float, float]:
        """Newton's correction of ``iterate``, with the derivative there where it is taken ``anew``; its measures."""
        solver, m = self.solver, len(self.block.stages)
        if anew or m not in solver.linearizations:
            solver.linearizations[m] = solver.linearize(iterate.stages)
        system = solver.system(solver.linearizations[m], self.block, self.h, self.length)
        correction = system.solve(iterate.residual)
        if isinstance(system, KrylovSystem):
            # a product costs about as much as ten of those that form a matrix, and is needed again and again
            slow = system.products > max(RESTART, correction.numel() / 10)
            if (slow or system.residual > FAILED) and solver.turn_dense(m):
                return self._correct(iterate, anew=True)
        return (correction, *self._measure(correction, iterate.velocities))

    def _iterate(self, start: Tensor) -> tuple[Tensor, float]:
        """Newton's iteration from ``start``; velocities, and the size of their last correction (converged: up to 1)."""
        stop = self.iterations + self.solver.options.max_iters
        fresh = len(self.block.stages) not in self.solver.linearizations
        current = self.evaluate(start)
        correction, size, noise = self._correct(current)
        damping = 1.0
        while size > 1 and self.iterations < stop and damping >= LEAST_DAMPING:
            trial = self.evaluate(current.velocities + damping * correction)
            next_correction, next_size, next_noise = self._correct(trial)
            if next_size <= (1 - damping * (1 - CONTRACTION)) * size:
                slow = damping < 1 or _remaining(size, next_size) > SLOW
                current, correction, size, noise = trial, next_correction, next_size, next_noise
                damping = min(1.0, 2 * damping)
                fresh = slow and size > 1
            elif fresh and damping == 1 and min(noise, next_noise) <= NOISE:
                # f cannot tell better iterates from worse ones any more
                best = current.velocities if noise <= next_noise else trial.velocities
                return best, 1.0
            elif fresh:
                damping /= 2
                continue
            else:
                fresh, damping = True, 1.0
            if fresh:
                correction, size, noise = self._correct(current, anew=True)
        if size <= 1:
            return current.velocities + correction, size
        if not math.isfinite(size):
            # a singular matrix, or f is not finite: f itself is what shows which
            return current.velocities + current.residual, math.inf
        return current.velocities, size


def _extrapolated(nodes: Sequence[float], values: Sequence[Tensor], c: float) -> Tensor:
    """The polynomial through ``values`` at ``nodes``, at ``c``."""
    total: Tensor | None = None
    for node, value in zip(nodes, values, strict=True):
        weight = math.prod((c - other) / (node - other) for other in nodes if other != node)
        total = weight * value if total is None else total + weight * value
    assert total is not None
    return total


def _callers_level() -> int:
    """For a warning by the caller of this: how many frames away its user is, through autograd or not."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rampde", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _remaining(size: float, next_size: float) -> float:
    """Iterations until the corrections are small enough, if they go on as from ``size`` to ``next_size``."""
    if next_size <= 1:
        return 0.0
    return math.log(next_size) / math.log(size / next_size)
