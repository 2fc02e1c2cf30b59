"""The front door."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rampde.arguments import read_arguments
from rampde.checkpoint import Checkpoint
from rampde.event_on_grid import solve_until_event
from rampde.graph_break import breaks_graph, is_held
from rampde.interpolation import interpolate
from rampde.scaling import DynamicScaler
from rampde.tableau import ButcherTableau


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: float | Tensor | Iterable[float] = 1e-7,
    atol: float | Tensor | Iterable[float] = 1e-9,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    loss_scaler: DynamicScaler | bool | object | None = None,
    velocity_dtype: torch.dtype | None = None,
    checkpoint: Checkpoint | str | int = "auto",
    memory_budget: int | None = None,
    compensated: bool = False,
    cuda_graph: bool = False,
    progress: bool = False,
) -> Any:
    """Solves ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, with 16-bit evaluations of ``func`` and 32-bit sums.

    A drop-in for ``torchdiffeq.odeint``. ``func`` runs under the caller's ``torch.autocast``; its input is rounded
    to ``velocity_dtype``, while state, adjoint and parameter gradients accumulate in float32 (float64 for a
    float64 state). Gradients flow to y0, t, and every tensor that ``func`` uses, by the discrete adjoint: they are
    the exact gradients of the discrete solution, up to rounding.

    Args:
        func: ``func(t, y)`` returns dy/dt in the structure, shapes and device of ``y0``. It receives ``t`` as a
            0-dim tensor of the real dtype of y0, and ``y`` with its floating point leaves in ``velocity_dtype``. Where
            it has attributes ``callback_step`` (before a step is attempted) and, for adaptive methods,
            ``callback_accept_step`` and ``callback_reject_step`` (after it), they are called with ``(t0, y0, dt)``:
            when the step starts, the state there, and the size of the step.
        y0: initial state: a floating point or complex tensor of any shape, or any nesting of tuples, lists and
            dicts of them.
        t: (T,) times, floating point, strictly increasing or decreasing, in the unit of ``func``'s time.
        rtol, atol: an element's error in a step may be ``atol + rtol * |y|``, for adaptive methods: numbers, tensors
            that broadcast to y0, or one of these for each tensor of y0.
        method: with adaptive steps "dopri5" (the default), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun";
            with fixed steps "euler", "midpoint", "heun2", "heun3", "ralston", "rk4" (the 3/8 rule, as in
            torchdiffeq), "rk4_classic", the multistep "explicit_adams" and "implicit_adams", the implicit
            "implicit_euler", "implicit_midpoint", "trapezoid", "gl4", "gl6", "radauIIA3", "radauIIA5", "sdirk2",
            "trbdf2"; "scipy_solver"; a name given to :func:`rampde.register_method`; a tableau
            (:class:`rampde.EmbeddedTableau`, :class:`rampde.ButcherTableau`, :class:`rampde.ImplicitTableau`).
        options: of adaptive methods those of :class:`rampde.options.AdaptiveOptions`, ``controller`` ("I", "PI",
            "PID") with ``pcoeff``, ``icoeff``, ``dcoeff``, and ``batch_axis`` (0: every sample has steps of its own;
            ``t`` may then be (batch, T), and f receives times of shape (batch, 1, ..., 1)), and ``process_group`` (its
            processes, each with a part of the batch, take the same steps, those of the whole batch); of fixed-step
            methods ``step_size`` (positive; default: the steps end on the points of t), ``grid_constructor``
            (``(func, y0, t) -> grid``), ``interp`` ("linear", the default, or "cubic", for outputs between steps),
            ``perturb`` (True: evaluate just inside the ends of a step), and those of
            :class:`rampde.newton.NewtonOptions` (implicit methods) and :class:`rampde.adams.AdamsOptions`; of
            "scipy_solver" those of :class:`rampde.scipy_solver.ScipyOptions`.
        event_fn: ``event_fn(t, y)`` returns a tensor. The solve ends where its least element, each taken with the
            sign that makes it positive at the start, becomes zero; of ``t``, which must have two times, the second
            only says in which direction to go. Methods with fixed steps need ``step_size``. The event's time has no
            gradient here: :func:`rampde.odeint_event` gives it.
        loss_scaler: None scales the adjoint dynamically where float16 takes part; False does not; a
            :class:`rampde.DynamicScaler` does at any precision. Any other object, such as a
            ``torch.amp.GradScaler``, means that the caller scales the loss: not scaled here, and gradients are all
            inf when one is not finite.
        velocity_dtype: dtype to which the input of ``func`` is rounded; None: the autocast dtype where autocast
            is on, else the dtype of each leaf of y0. Complex leaves keep theirs.
        checkpoint: what is kept for the backward pass. "auto": the fastest of the following that fits into
            ``memory_budget``, chosen once for each func, shape and method. "none": the graph of every stage, nothing is
            evaluated again. "step": the rounded state of each step, whose stages are evaluated again. "stage": the
            rounded input of each stage, evaluated again one at a time. "lean": as "step", but one stage at a time, for
            s - 1 evaluations more in a step of s stages. A number of states, or :class:`rampde.Binomial`: that many
            states, between which steps are taken again. :class:`rampde.Offload`: any of these in host memory.
            :class:`rampde.Fp8`: changes of the state in eight bits. "tape": what plain autograd keeps (forward mode;
            slower; parameter gradients are summed by autograd). Any :class:`rampde.Checkpoint` of one's own.
            Second derivatives work with all of them; but for "tape" the solve is then repeated on the tape.
        memory_budget: bytes that "auto" may take; None for a quarter of the device's free memory.
        cuda_graph: record the solve and its sweep as CUDA graphs at the second call of its kind, and repeat them at
            later ones, for new values of y0, t, parameters and whatever tensors ``func`` holds. For explicit methods
            on a CUDA device; of adaptive ones several attempts are one graph, and the host looks at the device once for
            each. y0 is not checked to be finite. ``func`` must do nothing that the host decides on, and what is in its
            graphs' memory is kept until :func:`rampde.clear_cuda_graphs`, or until 16 other kinds of solves were seen.
        progress: show a progress bar (needs tqdm).
        compensated: sum the state with compensation for rounding (Kahan), at 8 more bytes per element and step.

    Returns:
        The states at ``t``: (T, *shape) for each tensor of y0, in the dtype of y0 and the structure of y0. With
        ``event_fn`` a pair of the event's time, 0-dim, and the states (2, *shape) at ``t[0]`` and at the event.

    Raises:
        TypeError, ValueError: an argument that is not as described; the message says what was given.
        RuntimeError: the steps became too small or too many, the message says where and what to do; f or the state
            is not finite.
        torch.OutOfMemoryError: memory did not suffice, here or in the backward pass; the message names the policy and
            the next cheaper one, and nothing of the solve is left.

    Warns:
        RuntimeWarning: the state left the range of float16; the message names the step and the time.
        UserWarning: an unknown option; tolerances that the precision of the velocity cannot reach.

    The scheme is that of Celledoni, Owren, Ruthotto, Yang, Mixed Precision Training of Neural ODEs,
    arXiv 2510.23498.
    """
    arguments: dict[str, Any] = {
        "rtol": rtol,
        "atol": atol,
        "method": method,
        "options": options,
        "event_fn": event_fn,
        "loss_scaler": loss_scaler,
        "velocity_dtype": velocity_dtype,
        "checkpoint": checkpoint,
        "memory_budget": memory_budget,
        "compensated": compensated,
        "cuda_graph": cuda_graph,
        "progress": progress,
    }
    if torch.compiler.is_dynamo_compiling() and not is_held(method, event_fn):
        return _solve_outside(func, y0, t, **arguments)
    return _solve(func, y0, t, **arguments)


def _solve(func: Callable[[Tensor, Any], Any], y0: Any, t: Tensor, **arguments: Any) -> Any:
    request = read_arguments(func, y0, t, **arguments)
    problem, family, leaves, t = request.problem, request.family, request.leaves, request.t
    try:
        if problem.closed is not None:
            states = family.solve(problem, leaves)
        elif arguments["event_fn"] is not None:
            states = solve_until_event(problem, leaves, request.fixed, family.solve)
        else:
            if any(output.inside for output in problem.grid.outputs):
                # between steps the states are interpolated before they are rounded
                problem.output_dtypes = [leaf.state_dtype for leaf in problem.velocity.spec.leaves]
            states = interpolate(problem, family.solve(problem, leaves), t, request.fixed.interp)
    finally:
        if problem.observer is not None:
            problem.observer.close()
    solution = problem.velocity.spec.unflatten(states)
    if arguments["event_fn"] is None:
        return solution
    assert problem.event_time is not None
    return torch.tensor(problem.event_time, dtype=t.dtype, device=t.device), solution


_solve_outside = breaks_graph(_solve)
