"""The road back of implicit methods: the discrete adjoint by the implicit function theorem."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rampde.adjoint import Gradients, Sweep, TimeGradient
from rampde.autocast import switched_off
from rampde.checkpoint.keeper import Checkpoints
from rampde.checkpoint.recomputed import StageList
from rampde.checkpoint.stored import StoredSteps
from rampde.implicit_tableau import Block
from rampde.linear import DenseSystem, Derivative, KrylovSystem, scaled_product
from rampde.newton import MAX_PRODUCTS, StageSolver
from rampde.ops import adjoint_stage, adjoint_update
from rampde.problem import Problem, Stage
from rampde.randomness import RandomState

PRODUCTS = 3 * MAX_PRODUCTS  # of GMRES for one system: nothing corrects its solution later


class StageStates(StoredSteps, Checkpoints):
    """The checkpoint of implicit methods: the rounded inputs of all stages of each step, where f is evaluated again."""

    def __init__(self, problem: Problem, stages: int) -> None:
        super().__init__(problem.checkpoint)
        self.problem = problem
        self.stages = stages
        self.random: list[dict[int, RandomState]] = []
        self.dense = False  # whether the road out ended with Jacobians as matrices

    def keep(self, x: Sequence[Tensor], random: dict[int, RandomState]) -> None:
        """Keeps the leaves ``x`` of all stage inputs of a step."""
        self.append(x)
        self.random.append(random)

    def load(self, step: int, h: Tensor, times: Sequence[Tensor]) -> StageList:
        """The stages of a step with their graphs, at every call anew."""
        velocity, leaves = self.problem.velocity, len(self.problem.leaves)
        inputs = self.loaded(step)
        stages = []
        for i in range(self.stages):
            # an alias: becoming a leaf of the graph must not show on the checkpoint
            x = [leaf.detach() for leaf in inputs[i * leaves : (i + 1) * leaves]]
            time = times[i].detach().requires_grad_() if self.problem.time_needs_grad else times[i]
            if i in self.random[step]:
                self.random[step][i].restore()
            stages.append(Stage(time, x, velocity.evaluate_with_graph(time, x)))
        return StageList(stages)


class ImplicitSweep(Sweep):
    """One sweep of the discrete adjoint of an implicit method.

    The velocities ``k_i = f(tau_i, y + h sum_j a_ij k_j)`` are functions of ``y``, ``h``, ``tau`` and the parameters by
    the implicit function theorem; nothing is differentiated through the iterations that found them. With ``lam`` the
    gradient with respect to the state at the end of a step, their cotangents are ``h w_i``,

    ``w_i = b_i lam + h sum_j a_ji v_j``,  ``v_j = J_j^T w_j``,  ``theta += h VJP_theta(f, X_i)[w_i]``

    and ``lam + h sum_i v_i`` is the gradient at its start (Hager, Numer. Math. 87, 2000). The system is solved for the
    ``v_i``: as with the velocities on the road out, the result follows from the unknowns and not from products that
    would multiply their error, and the rounding of 16-bit products, by the stiffness.
    """

    def __init__(
        self,
        problem: Problem,
        points: Tensor,
        checkpoints: StageStates,
        captures: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        retain_graph: bool,
    ) -> None:
        super().__init__(problem, points, checkpoints, captures, cotangents, retain_graph)
        # the products of implicit stages are needed in the state's precision: each is scaled by itself
        self.scaler, self.scale_state = None, None
        self.target = None
        if problem.scaler is not None:
            self.target = problem.scaler.target / math.sqrt(problem.velocity.spec.elements_per_sample)
        self.solver = StageSolver(problem)
        self.solver.dense = checkpoints.dense
        self.layout = self.solver.layout
        rtol = min(float(torch.as_tensor(bound).min()) for bound in problem.tolerance.rtol)
        # beyond the rounding of its products GMRES cannot go
        self.tolerance = max(self.solver.options.newton_tolerance * rtol, self.solver.roundoff)
        self.allowed = max(10 * self.tolerance, 100 * torch.finfo(self.layout.dtype).eps)
        self.residual = 0.0

    def run(self, y0: Sequence[Tensor]) -> tuple[Gradients, Tensor | None, Gradients]:
        """As :meth:`rampde.adjoint.Sweep.run`.

        Raises:
            RuntimeError: the equations of a step are singular, so that its solution has no gradient.

        Warns:
            UserWarning: GMRES did not solve the equations of a step.
        """
        with switched_off(self.layout.device):
            results = super().run(y0)
        if self.residual > self.allowed:
            warnings.warn(
                f"the equations of the adjoint were solved to a relative residual of {self.residual:.3g} only, expected"
                f" {self.allowed:.3g}, so gradients may be inaccurate; use smaller steps or"
                ' options={"linear_solver": "dense"}',
                UserWarning,
                stacklevel=2,
            )
        return results

    def _sweep_step(self, step: int, adjoint: list[Tensor], adjoint_next: list[Tensor]) -> None:
        """Takes ``adjoint`` from the end of ``step`` to its start."""
        h, times = self.step_times[step]
        tableau, layout = self.solver.tableau, self.layout
        with self.problem.velocity.autocast.entered():
            loaded = self.checkpoints.load(step, h, times)
        stages = [loaded.take(i) for i in range(tableau.stages)]
        lam = layout.pack(adjoint)
        v: list[Tensor] = [lam] * tableau.stages
        gradients: Gradients = []
        time_gradient = TimeGradient(self, h) if self.problem.time_needs_grad else None
        # where f shows what it holds, a look at the last and at a middle step is enough to see that it does
        watched = step + 1 == self.steps or step == self.steps // 2
        if watched or self.problem.opaque:
            for stage in stages if self.problem.opaque else stages[-1:]:
                self._check_captures(stage)
        for block in reversed(tableau.blocks):
            known = range(block.stages.stop, tableau.stages)
            w = [self._cotangent(i, lam, v, h, known) for i in block.stages]
            if not block.explicit:
                solution = self._solve(step, block, h, [stages[i] for i in block.stages], w)
                for i, row in zip(block.stages, solution, strict=True):
                    v[i] = row
                known = range(block.stages.start, tableau.stages)
                w = [self._cotangent(i, lam, v, h, known) for i in block.stages]
            for i, cotangent in zip(block.stages, w, strict=True):
                products = self._products(stages[i], cotangent, block.explicit, time_gradient, tableau.nodes[i])
                if block.explicit:
                    v[i] = layout.pack(products[: len(adjoint)])
                    products = products[len(adjoint) :]
                gradients.extend(products)
        dtypes = [leaf.dtype for leaf in adjoint]
        unpacked = [layout.unpack(row, dtypes) for row in v]
        for leaf, state in enumerate(adjoint):
            of_leaf = [row[leaf] for row in unpacked]
            adjoint_update(state, of_leaf, h, self.cotangents[leaf].get(step), adjoint_next[leaf], None)
        if gradients:
            self._accumulate(gradients, h)
        if time_gradient is not None:
            self.time_gradients[step] = time_gradient.ends()

    def _cotangent(self, i: int, lam: Tensor, v: Sequence[Tensor], h: Tensor, known: range) -> Tensor:
        """``b_i lam + h sum_j a_ji v_j`` over the stages ``j`` in ``known``."""
        tableau = self.solver.tableau
        pairs = [(v[j], float(tableau.a[j][i])) for j in known if tableau.a[j][i] != 0]
        w: Tensor = adjoint_stage(
            lam, [p for p, _ in pairs], h, float(tableau.b[i]), [a for _, a in pairs], self.layout.dtype, None
        )
        return w

    def _solve(self, step: int, block: Block, h: Tensor, stages: Sequence[Stage], w: Sequence[Tensor]) -> Tensor:
        """(m, n) products ``v`` of a block, ``w`` being what is known of its cotangents."""
        velocity = self.problem.velocity
        derivatives = [Derivative(stage, self.layout, velocity, self.target) for stage in stages]
        coupling = self.solver.coupling(block).T
        if not self.solver.dense:
            operators = [derivative.transposed_product for derivative in derivatives]
            r = torch.stack([product(row) for product, row in zip(operators, w, strict=True)])
            system = KrylovSystem(operators, (), coupling, h, self.tolerance, PRODUCTS)
            v = system.solve(r)
            if system.residual <= self.allowed or not self.solver.turn_dense(len(stages)):
                self.residual = max(self.residual, system.residual)
        if self.solver.dense:
            transposed = torch.stack([derivative.matrix().T for derivative in derivatives])
            r = torch.stack([(matrix * row).sum(1) for matrix, row in zip(transposed, w, strict=True)])
            v = DenseSystem(transposed, coupling, h).solve(r)
        if not bool(torch.isfinite(v).all()) and bool(torch.isfinite(r).all()):
            times = self.problem.grid.times
            raise RuntimeError(
                f"the stage equations of step {step} from t = {times[step]:.6g} to {times[step + 1]:.6g} are singular,"
                " so the solution has no gradient there; use other steps"
            )
        return v

    def _products(
        self, stage: Stage, w: Tensor, with_state: bool, time_gradient: TimeGradient | None, node: float
    ) -> Gradients:
        """Products of ``w`` for the stage's input, where asked for, and for the captures."""
        cotangents = self.layout.unpack(w, [leaf.state_dtype for leaf in self.problem.velocity.spec.leaves])
        inputs = [*(stage.x if with_state else ()), *self.captures]
        if time_gradient is not None:
            inputs.append(stage.time)
            time_gradient.add_velocity(stage.k, cotangents)
        if not inputs:
            return []
        products = list(scaled_product(stage, inputs, cotangents, self.target, self.retain_graph))
        if time_gradient is not None:
            time_gradient.add_time(products.pop(), node)
        return products
