"""The continuous adjoint: gradients from a second differential equation, solved backwards in time.

With ``a`` the gradient of the loss with respect to the state, the augmented system

``d/dt (a_t, y, a, a_theta) = (-a^T df/dt, f, -a^T df/dy, -a^T df/dtheta)``

is solved from each output time to the one before, where y is set to the stored output and the loss gradient of that
output is added to ``a`` (Chen, Rubanova, Bettencourt, Duvenaud, arXiv 1806.07366). Only outputs are stored, so memory
does not grow with the steps. The gradients are those of the exact solution up to the tolerances of both solves, not
those of the computed one: :func:`rampde.odeint` gives these.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rampde.augmented import (
    AugmentedProblem,
    AugmentedSystem,
    Parameters,
    adjoint_norm,
    augmented_tolerance,
    joined,
    split,
)
from rampde.autocast import switched_off
from rampde.captures import Captures, any_related, hooks_muted, own_shares, reachable_tensors, record
from rampde.graph_break import breaks_graph
from rampde.methods import get_method
from rampde.odeint import odeint
from rampde.scaling import DynamicScaler, automatic_scaler
from rampde.sharded import Hold
from rampde.state import State, StateSpec
from rampde.statistics import new_solve
from rampde.tableau import ButcherTableau
from rampde.velocity import Velocity

# options of the state's solve that mean nothing for the augmented state
NOT_INHERITED = ("norm", "batch_axis", "batch_tile", "process_group")


@breaks_graph
def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: float | Tensor | Iterable[float] = 1e-7,
    atol: float | Tensor | Iterable[float] = 1e-9,
    method: str | ButcherTableau | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: float | Tensor | Iterable[float] | None = None,
    adjoint_atol: float | Tensor | Iterable[float] | None = None,
    adjoint_method: str | ButcherTableau | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    velocity_dtype: torch.dtype | None = None,
    loss_scaler: DynamicScaler | bool | object | None = None,
    compensated: bool = False,
) -> Any:
    """As :func:`rampde.odeint`, with gradients by the continuous adjoint: memory independent of the steps.

    A drop-in for ``torchdiffeq.odeint_adjoint``. The adjoint solve holds time gradient, state, adjoint and parameter
    gradients in float32 (float64 for 64-bit tensors); in it too, ``func`` runs under the autocast of the caller of
    this function, with its input rounded to ``velocity_dtype``. It is evaluated at other points than in the forward
    solve: a ``func`` that draws random numbers (dropout) has no continuous adjoint, as nothing can be replayed.

    Args:
        func: as in :func:`rampde.odeint`; a ``torch.nn.Module`` unless ``adjoint_params`` is given. Its attributes
            ``callback_step_adjoint``, ``callback_accept_step_adjoint``, ``callback_reject_step_adjoint`` are the
            callbacks of the adjoint solve, called with the time, the tuple (t, y, adj_y, *params), and the step.
        y0, t, rtol, atol, method, options, event_fn, velocity_dtype, compensated: as in :func:`rampde.odeint`. With
            ``event_fn`` the gradients are those of integrating up to a given time: none flow through the event time.
        adjoint_rtol, adjoint_atol, adjoint_method: of the adjoint solve; None: those of the forward solve. A list of
            tolerances may have one for each of (t, y, adj_y, *params).
        adjoint_options: options of the adjoint solve, in which all samples share the steps; None: ``options`` without
            "norm", "batch_axis", "batch_tile" and "process_group". Its "norm" is a function of the tuple
            (t, y, adj_y, *params), or (t, *y, *adj_y, *params) where y0 is no tensor, or "seminorm", the default norm
            without params. The default is the largest of ``|t|``, the norms of y and adj_y (that of ``options``, else
            root mean square), and the root mean squares of params.
        adjoint_params: tensors to differentiate with respect to, besides y0 and t. None: the parameters of ``func``,
            and whatever else it was seen to use. Those that do not require a gradient are left out.
        loss_scaler: as in :func:`rampde.odeint`: None scales each cotangent of ``func`` where float16 takes part.

    Returns:
        As :func:`rampde.odeint`. Parameters that ``func`` does not use have gradients of zero, as in torchdiffeq.

    Raises:
        TypeError, ValueError: an argument that is not as described; the message says what was given.
        RuntimeError: in the backward pass, where ``func`` uses a tensor whose gradient would be missing, where the
            result is differentiated twice, and where a given ``loss_scaler`` finds no scale.

    Warns:
        UserWarning: a parameter that does not require a gradient will not be passed to a norm of the caller.
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            f"func is a {type(func).__name__} and adjoint_params is None, expected func to be a torch.nn.Module, whose"
            " parameters are known, or adjoint_params to hold the tensors to differentiate with respect to; () if none"
        )
    if adjoint_method is None:
        adjoint_method = method
    if adjoint_method != method and options is not None and adjoint_options is None:
        raise ValueError(
            f"adjoint_method is {adjoint_method!r} and method is {method!r}, so that adjoint_options cannot be taken"
            " from options, but adjoint_options is None, expected a dict; {} for the defaults"
        )
    for name, value in (("options", options), ("adjoint_options", adjoint_options)):
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a dict")
    options = {} if options is None else options
    if adjoint_options is None:
        adjoint_options = {name: value for name, value in options.items() if name not in NOT_INHERITED}
    elif adjoint_options.get("process_group") is not None:
        raise ValueError(
            "adjoint_options has process_group, expected it in options alone: in the adjoint solve each process has"
            " steps of its own"
        )
    # read once: they may be generators, and both solves need them
    rtol, atol, adjoint_rtol, adjoint_atol = (_listed(tol) for tol in (rtol, atol, adjoint_rtol, adjoint_atol))
    get_method(adjoint_method)  # a wrong name is an error now, and not in the backward pass
    spec = StateSpec(y0)
    norm = adjoint_norm(adjoint_options.get("norm"), options.get("norm"), spec)
    given = None if adjoint_params is None else _given_parameters(func, adjoint_params)
    forward: dict[str, Any] = {"rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn}
    forward |= {"velocity_dtype": velocity_dtype, "loss_scaler": loss_scaler, "compensated": compensated}
    if not torch.is_grad_enabled():
        return odeint(func, y0, t, **forward)

    velocity = Velocity(func, spec, velocity_dtype)
    recorder = _Recorder(velocity)
    leaves = spec.flatten(y0)
    with Hold(leaves, lambda: recorder.found is not None) as hold:
        with torch.no_grad():
            result = odeint(recorder if given is None else func, y0, t, **forward)
        event_time, solution = ([], result) if event_fn is None else ([result[0]], result[1])
        if given is not None:
            hold.check_parameters(given.tensors)
        parameters = _found_parameters(func, recorder.found) if given is None else given
        if parameters.any_excluded and callable(adjoint_options.get("norm")):
            warnings.warn(
                "An adjoint parameter does not require a gradient: it is left out of the adjoint solve and will not be"
                ' passed to adjoint_options["norm"]',
                UserWarning,
                stacklevel=2,
            )
        problem = AugmentedProblem(
            velocity=velocity,
            parameters=parameters,
            method=adjoint_method,
            rtol=augmented_tolerance("rtol", rtol, adjoint_rtol, spec, parameters.tensors),
            atol=augmented_tolerance("atol", atol, adjoint_atol, spec, parameters.tensors),
            options=adjoint_options | {"norm": norm},
            compensated=compensated,
            time_needs_grad=t.requires_grad,
            until_event=event_fn is not None,
            scaler=_scaler(loss_scaler),
            scaler_given=isinstance(loss_scaler, DynamicScaler),
            poison=loss_scaler is not None,
            stats=new_solve("adjoint"),
        )
        solution, *event_time = _ContinuousAdjoint.apply(  # type: ignore[no-untyped-call]
            problem, [joined(spec, solution), *event_time], t, *leaves, *parameters.tensors
        )
        hold.release([solution])
    if not spec.is_tensor:
        leaves = [leaf.to(own.real_dtype) for leaf, own in zip(split(spec, solution), spec.leaves, strict=True)]
        solution = spec.unflatten(leaves)
    return (event_time[0], solution) if event_time else solution


def _listed(tolerance: Any) -> Any:
    if isinstance(tolerance, Iterable) and not isinstance(tolerance, str | bytes | Tensor):
        return list(tolerance)
    return tolerance


def _scaler(loss_scaler: object) -> DynamicScaler | None:
    if loss_scaler is None:
        return automatic_scaler()
    return loss_scaler if isinstance(loss_scaler, DynamicScaler) else None


def _given_parameters(func: object, given: Iterable[Tensor]) -> Parameters:
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"adjoint_params is a {type(given).__name__}, expected an iterable of tensors")
    candidates = list(given)
    for index, tensor in enumerate(candidates):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"adjoint_params[{index}] is a {type(tensor).__name__}, expected a tensor")
    tensors = _differentiable(candidates)
    related = any_related(tensors)
    excluded = any(not tensor.requires_grad for tensor in candidates)
    known = {id(tensor) for tensor in tensors}
    # only then, as compiled code cannot keep its graph
    computed_outside = any(
        not tensor.is_leaf and id(tensor) not in known for tensor in reachable_tensors(func).requiring
    )
    return Parameters(
        tensors, len(tensors), excluded, checked=False, retain_graph=computed_outside or related, related=related
    )


def _found_parameters(func: Any, found: Captures | None) -> Parameters:
    """The parameters of the module ``func``, then what else it was found to use."""
    candidates = _module_parameters(func)
    excluded = any(not tensor.requires_grad for tensor in candidates)
    own = _differentiable(candidates)
    if found is None:
        return Parameters(own, len(own), excluded)
    if found.problem:
        # gradients with respect to the parameters are whole if they also run through what was computed from these
        return Parameters(own, len(own), excluded, opaque=found.opaque, retain_graph=True)
    # a parameter from which another capture was computed is not among them: autograd passes its gradient on
    captured = {id(tensor) for tensor in found.tensors}
    own = [tensor for tensor in own if id(tensor) in captured]
    known = {id(tensor) for tensor in own}
    used = own + [tensor for tensor in found.tensors[: found.observed] if id(tensor) not in known]
    unused = [tensor for tensor in found.tensors[found.observed :] if id(tensor) not in known]
    return Parameters(used + unused, len(used), excluded, opaque=found.opaque)


def _module_parameters(module: nn.Module) -> list[Tensor]:
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    # torch.nn.DataParallel gives its replicas plain tensors in the place of parameters
    values = [value for part in module.modules() for value in vars(part).values()]
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _differentiable(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())


class _Recorder:
    """``f``, whose first evaluation is searched for what it captures; its attributes are those of f."""

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self._func: Any = velocity.original
        self.found: Captures | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)

    def __call__(self, time: Tensor, y: State) -> State:
        if self.found is not None:
            return self._func(time, y)
        spec = self._velocity.spec
        x = [leaf.detach().requires_grad_() for leaf in spec.flatten(y)]
        k, self.found = record(self._func, self._velocity.evaluate_first, time, x)
        return spec.unflatten([value.detach() for value in k])


class _ContinuousAdjoint(torch.autograd.Function):
    """The solution as it is, and the adjoint solve as its backward."""

    @staticmethod
    def forward(
        ctx: Any, problem: AugmentedProblem, outputs: list[Tensor], t: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        parameters = tensors[len(problem.velocity.spec.leaves) :]
        used = problem.parameters.used
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        # read when the gradients are taken, and changed by some before
        ctx.adjoint_options = problem.options
        # only what f is taken to use is checked for changes in place: the rest may be no business of the solve
        ctx.unused = parameters[used:]
        # an output must not be a view, of y0 or of a buffer
        outputs = [output.clone() if output._is_view() else output for output in outputs]
        ctx.save_for_backward(t, *outputs, *parameters[:used])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: AugmentedProblem = ctx.problem
        leaves = problem.velocity.spec.leaves
        cotangent = cotangents[0]
        if cotangent is None:
            return (None,) * len(ctx.needs_input_grad)
        t, solution, *saved = ctx.saved_tensors
        times = t.detach().to(solution.device)
        if problem.until_event:
            event_time, *saved = saved
            times = torch.stack([times[0], event_time.to(times)])
        parameters = [*saved, *ctx.unused]
        norm = ctx.adjoint_options["norm"]
        with torch.no_grad(), problem.velocity.autocast.entered(), hooks_muted(parameters):
            system = AugmentedSystem(problem, parameters, norm)
            with switched_off(solution.device):
                of_y0, of_times, of_parameters = system.solve(times, solution, cotangent)
            if problem.parameters.related:
                # autograd passes on what comes to one of them through another one
                of_parameters = own_shares(parameters, of_parameters)
            gradients: list[Tensor | None] = [
                None if of_times is None else of_times.to(t),
                *(gradient.to(leaf.real_dtype) for gradient, leaf in zip(of_y0, leaves, strict=True)),
                # a gradient is kept for long: it must not hold the memory of all others
                *(own.to(p, copy=True) for own, p in zip(of_parameters, parameters, strict=True)),
            ]
        if of_times is not None and problem.until_event:
            # the second time only says where to look for the event
            gradients[0] = torch.cat([of_times[:1], torch.zeros_like(of_times[1:])]).to(t)
        if torch.is_grad_enabled():
            gradients = _differentiated_once(gradients, solution)
        return (None, None, *gradients)


def _differentiated_once(gradients: list[Tensor | None], solution: Tensor) -> list[Tensor | None]:
    """The gradients with a graph that says, to whoever differentiates them, that they cannot be."""
    present = iter(_Once.apply(solution, *(gradient for gradient in gradients if gradient is not None)))  # type: ignore[no-untyped-call]
    return [None if gradient is None else next(present) for gradient in gradients]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solution: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the gradients of odeint_adjoint were differentiated, expected first derivatives only: the continuous"
            " adjoint has no second ones. Use rampde.odeint, whose gradients can be differentiated"
        )
