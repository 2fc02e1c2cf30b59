"""The augmented system of the continuous adjoint, and its solves from each output time to the one before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from rampde.autocast import switched_off
from rampde.captures import find_unknown_leaf
from rampde.grid import time_dtype
from rampde.observer import CALLBACKS
from rampde.odeint import odeint
from rampde.ops import accumulate_gradients
from rampde.precision import accumulation_dtype
from rampde.scaling import INCREASE_INTERVAL, DynamicScaler, power_of_two_below
from rampde.state import State, StateSpec
from rampde.statistics import SolveStats, stats
from rampde.tableau import ButcherTableau
from rampde.tolerance import Bound, read_tolerance
from rampde.velocity import Velocity, vector_jacobian_product

# what a record of a solve says of its steps
STEPS = ("starts", "step_sizes", "error_ratios", "rejected_starts", "rejected_sizes", "rejected_ratios")

Norm = Callable[[Any], Any]
Gradients = tuple[list[Tensor], Tensor | None, list[Tensor]]


@dataclass
class Parameters:
    """The tensors to differentiate with respect to, besides the state and the times.

    Attributes:
        tensors: each requires a gradient and occurs once.
        used: how many of them, from the first, f is taken to use.
        any_excluded: whether others were left out as they do not require a gradient.
        checked: whether it is an error when f uses a further tensor that requires a gradient.
        opaque: whether f keeps tensors where they cannot be found but by evaluating it.
        retain_graph: whether the way from f to one of them may lead through what was computed outside of f.
        related: whether one of them was computed from another one.
    """

    tensors: list[Tensor]
    used: int
    any_excluded: bool
    checked: bool = True
    opaque: bool = False
    retain_graph: bool = False
    related: bool = False


@dataclass
class AugmentedProblem:
    """One solve with its adjoint solve: what the road back must know.

    Attributes:
        velocity: f, its precision and the structure of its state.
        parameters: the tensors to differentiate with respect to.
        method, rtol, atol, options, compensated: of the adjoint solve; tolerances by :func:`augmented_tolerance`.
        time_needs_grad: whether the output times require a gradient.
        until_event: whether an event ended the solve.
        scaler: dynamic scaling of the cotangents of f; None for none.
        scaler_given: whether the caller gave the scaler, and is told by an error when it fails.
        poison: without a scaler, whether one non-finite gradient makes all of them infinite.
        stats: what the adjoint solve costs is noted here; None where nobody asks.
    """

    velocity: Velocity
    parameters: Parameters
    method: str | ButcherTableau | None
    rtol: list[Any]
    atol: list[Any]
    options: dict[str, Any]
    compensated: bool
    time_needs_grad: bool
    until_event: bool
    scaler: DynamicScaler | None
    scaler_given: bool
    poison: bool
    stats: SolveStats | None


class AugmentedSystem:
    """``d/dt (a_t, y, a, a_theta) = (-a^T df/dt, f, -a^T df/dy, -a^T df/dtheta)``, as :func:`rampde.odeint` solves it.

    Its state is a tuple: the time gradient, a scalar; the real leaves of y; those of a; the gradients of all parameters
    as one vector, where there are any; and where f is known to work in 16 bits an empty tensor, whose slope has their
    dtype: by this the step control of odeint knows what it cannot reach, though f may return 32 bits. All else is wide.
    y is rounded when f sees it, a when it enters the product with the Jacobian, then multiplied by a power of two that
    keeps it in the range of float16.
    """

    def __init__(self, problem: AugmentedProblem, parameters: Sequence[Tensor], norm: Norm) -> None:
        """``norm``: of (t, y, adj_y, *params), as :meth:`pieces` makes them."""
        self.problem, self.parameters = problem, parameters
        self.velocity, self.spec = problem.velocity, problem.velocity.spec
        self.norm = norm
        self.shapes = [(*p.shape, 2) if p.is_complex() else tuple(p.shape) for p in parameters]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.one = torch.ones((), dtype=time_dtype(self.spec.device), device=self.spec.device)
        autocast = self.velocity.autocast
        dtypes = [*self.velocity.dtypes, *([autocast.dtype] if autocast.enabled else [])]
        self.witness = next((torch.empty(0, dtype=d, device=self.spec.device) for d in dtypes if d.itemsize == 2), None)
        self.watched = False  # whether the next evaluation is searched for tensors that are not known
        self.half = self.velocity.half  # whether float16 takes part
        self.first_scale: Tensor | None = None  # of the sweep
        self.finite: Tensor | None = None  # whether all products since the last look were, where they are scaled
        self.evaluations = 0  # with scaled products, since the headroom last changed

    def __getattr__(self, name: str) -> Any:
        # callbacks, looked up and not kept: what holds itself stays in memory until the garbage collector runs
        if name not in CALLBACKS:
            raise AttributeError(name)
        callback = getattr(self.velocity.original, name + "_adjoint")
        return lambda time, state, step: callback(time, self.pieces(state), step)

    def pieces(self, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The state as norms and callbacks take it: (t, y, adj_y, *params), y and adj_y as :func:`joined` has them."""
        halves = (self.spec.unflatten(half) for half in self._halves(state))
        return (state[0], *(joined(self.spec, half) for half in halves), *self._by_parameter(state))

    def _halves(self, state: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The leaves of y and those of a."""
        leaves = len(self.spec.leaves)
        return state[1 : 1 + leaves], state[1 + leaves : 1 + 2 * leaves]

    def _by_parameter(self, state: Sequence[Tensor]) -> list[Tensor]:
        if not self.parameters:
            return []
        return [
            torch.complex(part[..., 0], part[..., 1]) if parameter.is_complex() else part
            for part, parameter in zip(self._parts(self._vector(state)), self.parameters, strict=True)
        ]

    def _vector(self, state: Sequence[Tensor]) -> Tensor:
        """The gradients of all parameters, where there are any."""
        return state[1 + 2 * len(self.spec.leaves)]

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """Views of the gradients of all parameters, complex ones as pairs."""
        return [part.view(shape) for part, shape in zip(vector.split(self.sizes), self.shapes, strict=True)]

    def __call__(self, time: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, adjoint = self._halves(state)
        time, x, k = self._evaluate(time, y)
        scale = self._scale(adjoint, k)
        cotangents = [
            (-lam if scale is None else -scale * lam).to(value.dtype) for lam, value in zip(adjoint, k, strict=True)
        ]
        arguments = [*x, time] if self.problem.time_needs_grad else x
        products = self._products(k, [*arguments, *self.parameters], cotangents)
        of_arguments, of_parameters = products[: len(arguments)], products[len(arguments) :]
        likes = [*adjoint, state[0]]
        slopes = [
            torch.zeros_like(like) if product is None else product.to(like.dtype)
            for like, product in zip_longest(likes, of_arguments)
        ]
        if self.parameters:
            slopes.append(self._slope_of_vector(self._vector(state), of_parameters))
        if scale is not None:
            slopes = self._unscaled(slopes, scale)
        witness = () if self.witness is None else (self.witness,)
        velocities = k if torch.is_grad_enabled() else [value.detach() for value in k]
        return (slopes[len(x)], *velocities, *slopes[: len(x)], *slopes[len(x) + 1 :], *witness)

    def _products(
        self, k: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Vector-Jacobian products; with a graph of their own for an implicit method, which differentiates them."""
        if not torch.is_grad_enabled():
            return vector_jacobian_product(k, inputs, cotangents, self.problem.parameters.retain_graph)
        pairs = [(value, cotangent) for value, cotangent in zip(k, cotangents, strict=True) if value.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        values, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(values, inputs, weights, create_graph=True, allow_unused=True)

    def _slope_of_vector(self, vector: Tensor, products: Sequence[Tensor | None]) -> Tensor:
        gradients = [
            torch.view_as_real(product.resolve_conj()) if product is not None and product.is_complex() else product
            for product in products
        ]
        slope = torch.zeros_like(vector)
        if not torch.is_grad_enabled():
            accumulate_gradients(self._parts(slope), gradients, self.one)
            return slope
        parts = [
            zero if gradient is None else gradient.to(zero.dtype).reshape(-1)
            for zero, gradient in zip(slope.split(self.sizes), gradients, strict=True)
        ]
        return torch.cat(parts)

    def _evaluate(self, time: Tensor, y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """f with its graph, and its arguments."""
        time = time.detach().to(self.spec.time_dtype)
        if self.problem.time_needs_grad:
            # odeint may hold the tensor that it gave
            time = time.clone().requires_grad_()
        x = [leaf.to(dtype) for leaf, dtype in zip(y, self.velocity.dtypes, strict=True)]
        x = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in x]
        if self.problem.stats is not None:
            self.problem.stats.evaluations_backward += 1
        with self.velocity.autocast.entered(), torch.enable_grad():
            k = self.velocity.evaluate(time, x)
        parameters = self.problem.parameters
        if parameters.checked and (self.watched or parameters.opaque):
            self.watched = False
            unknown = find_unknown_leaf(k, [*x, time, *self.parameters])
            if unknown is not None:
                raise RuntimeError(
                    f"func used a tensor of shape {list(unknown.shape)} that requires a gradient at t ="
                    f" {float(time):.6g} of the adjoint solve, which was not found in the forward solve: its gradient"
                    " would be missing. Pass adjoint_params, or detach it"
                )
        return time, x, k

    def _scale(self, adjoint: Sequence[Tensor], k: Sequence[Tensor]) -> Tensor | None:
        """What the cotangents are multiplied by: a power of two, renewed for each product."""
        scaler, problem = self.problem.scaler, self.problem
        self.half = self.half or any(value.dtype == torch.float16 for value in k)
        if scaler is None or not (self.half or problem.scaler_given):
            return None
        target = scaler.target / math.sqrt(self.spec.elements_per_sample)
        largest = largest_of([lam.detach().abs().amax() for lam in adjoint if lam.numel() > 0] or [self.one])
        scale = power_of_two_below(target / (largest + scaler.delta)) * scaler.headroom
        self.first_scale = scale if self.first_scale is None else self.first_scale
        self.evaluations += 1
        return scale

    def _unscaled(self, slopes: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
        """The slopes without ``scale``; zeros, and a note to solve again, where one is not finite."""
        finite = _all_finite(slopes)
        self.finite = finite if self.finite is None else self.finite & finite
        return [torch.where(finite, slope / scale.to(slope.dtype), 0.0) for slope in slopes]

    def solve(self, times: Tensor, solution: Tensor, cotangent: Tensor) -> Gradients:
        """Gradients with respect to the real leaves of y0, to ``times`` where they need it, and to the parameters.

        ``times``: (T,); ``solution``: the states there as :func:`joined` has them; ``cotangent``: the gradient of the
        loss with respect to ``solution``.
        """
        spec = self.spec
        state_dtypes = [leaf.state_dtype for leaf in spec.leaves]
        widest = max(state_dtypes, key=lambda dtype: dtype.itemsize)

        def at(values: Tensor, index: int) -> list[Tensor]:
            return [leaf.to(dtype) for leaf, dtype in zip(split(spec, values[index]), state_dtypes, strict=True)]

        last = len(times) - 1
        state = [times.new_zeros((), dtype=widest), *at(solution, last), *at(cotangent, last)]
        if self.parameters:
            dtypes = [accumulation_dtype(parameter.dtype) for parameter in self.parameters]
            state.append(state[0].new_zeros(sum(self.sizes), dtype=max(dtypes, key=lambda dtype: dtype.itemsize)))
        if self.witness is not None:
            state.append(state[0].new_empty(0))
        rates = []
        for index in range(last, 0, -1):
            y, _ = self._halves(state)
            if not bool(_all_finite(state)):
                # not an initial state: an overflow of the loss or on the way, for a GradScaler to see
                state = [torch.full_like(value, math.inf) for value in state]
                rates += [state[0]] * index
                break
            if self.problem.time_needs_grad:
                rates.append(self._rate(times[index], y, at(cotangent, index)))
                state[0] = state[0] - rates[-1]
            ended = self._solve_interval(tuple(state), times[index - 1 : index + 1].flip(0))
            if ended is None:
                state = [torch.full_like(value, math.inf) for value in state]
                rates += [state[0]] * (index - 1)
                break
            _, adjoint = self._halves(ended)
            added = [lam + own for lam, own in zip(adjoint, at(cotangent, index - 1), strict=True)]
            state = [ended[0], *at(solution, index - 1), *added, *ended[1 + 2 * len(added) :]]
        self._note_scale()
        if self.problem.poison and self.half:
            finite = _all_finite([*state, *rates])
            state, rates = ([torch.where(finite, g, math.inf) for g in gradients] for gradients in (state, rates))
        times_gradient = torch.stack([state[0], *reversed(rates)]) if self.problem.time_needs_grad else None
        return list(self._halves(state)[1]), times_gradient, self._by_parameter(state)

    def _rate(self, time: Tensor, y: Sequence[Tensor], cotangent: Sequence[Tensor]) -> Tensor:
        """How the loss changes with one output time: the state there moves with f."""
        _, _, k = self._evaluate(time, y)
        products = [(own * value.detach().to(own.dtype)).sum() for own, value in zip(cotangent, k, strict=True)]
        return torch.stack(products).sum()

    def _solve_interval(self, state: tuple[Tensor, ...], times: Tensor) -> list[Tensor] | None:
        """The state at ``times[1]`` from that at ``times[0]``; None where products are not finite at any scale."""
        scaler = self.problem.scaler
        attempts = 0
        while True:
            self.watched, self.finite = True, None
            with switched_off(self.spec.device):
                ended = self._integrate(state, times)
            if scaler is None or self.finite is None or bool(self.finite):
                break
            attempts += 1
            if attempts > scaler.max_attempts:
                self._give_up(float(times[0]), scaler)
                return None
            self._change_headroom("overflow", scaler.decrease_factor)
        if scaler is not None and scaler.headroom < 1 and self.evaluations >= INCREASE_INTERVAL:
            self._change_headroom("increase", scaler.increase_factor)
        return ended

    def _integrate(self, state: tuple[Tensor, ...], times: Tensor) -> list[Tensor]:
        problem = self.problem
        rtol, atol = problem.rtol, problem.atol
        if self.witness is not None:
            rtol, atol = [*rtol, rtol[0]], [*atol, atol[0]]
        with nullcontext() if problem.stats is None else stats() as inner:
            solution = odeint(
                self,
                state,
                times,
                rtol=rtol,
                atol=atol,
                method=problem.method,
                options=problem.options | {"norm": lambda state: self.norm(self.pieces(state))},
                compensated=problem.compensated,
            )
        if problem.stats is not None and inner is not None:
            for solve in inner.solves:
                for name in STEPS:
                    getattr(problem.stats, name).extend(getattr(solve, name))
        return [leaf[1] for leaf in solution]

    def _give_up(self, time: float, scaler: DynamicScaler) -> None:
        message = (
            f"reached the maximum number of {scaler.max_attempts} attempts at the adjoint solve from t = {time:.6g}:"
            " the vector-Jacobian product of func is not finite at any scale of its cotangent; use bfloat16 or look"
            " for NaN in func"
        )
        if self.problem.scaler_given:
            raise RuntimeError(message)
        warnings.warn(message + "; all gradients are set to inf", RuntimeWarning, stacklevel=2)

    def _change_headroom(self, kind: str, factor: float) -> None:
        scaler = self.problem.scaler
        assert scaler is not None
        self.evaluations = 0
        scaler.headroom *= factor
        self._note(kind, scaler.headroom)

    def _note_scale(self) -> None:
        if self.problem.scaler is not None and self.first_scale is not None:
            self.problem.scaler.S = float(self.first_scale)
            self._note("init", self.problem.scaler.S)

    def _note(self, kind: str, scale: float) -> None:
        assert self.problem.scaler is not None
        self.problem.scaler.note(kind, scale)
        if self.problem.stats is not None:
            self.problem.stats.scale_history.append((kind, scale))


def _all_finite(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.isfinite(value).all() for value in values]).all()


def joined(spec: StateSpec, y: State) -> Tensor:
    """A state, or states with one more dimension in front, as one tensor: (..., n) where y0 is not a tensor."""
    if isinstance(y, Tensor):
        return y
    with switched_off(spec.device):
        return torch.cat(
            [
                value.reshape(*value.shape[: value.dim() - len(leaf.shape)], leaf.shape.numel())
                for value, leaf in zip(tree_flatten(y)[0], spec.leaves, strict=True)
            ],
            dim=-1,
        )


def split(spec: StateSpec, y: Tensor) -> list[Tensor]:
    """The inverse of :func:`joined`: views of ``y`` as real leaves, in its dtype."""
    values: Sequence[Tensor] = [y]
    if not spec.is_tensor:
        pieces = y.split([leaf.shape.numel() for leaf in spec.leaves], dim=-1)
        values = [piece.view(y.shape[:-1] + leaf.shape) for piece, leaf in zip(pieces, spec.leaves, strict=True)]
    return [_real(value, leaf.dtype.is_complex) for value, leaf in zip(values, spec.leaves, strict=True)]


def _real(value: Tensor, as_pairs: bool) -> Tensor:
    if as_pairs:
        return torch.view_as_real(value.resolve_conj())
    return value.real if value.is_complex() else value


def augmented_tolerance(
    name: str, forward: object, given: object, spec: StateSpec, parameters: Sequence[Tensor]
) -> list[Any]:
    """The tolerances of the adjoint solve for (t, *y, *adj_y, params), one for each tensor.

    ``given``, or where it is None ``forward``, that of the forward solve, holds for y and adj_y, and the least of it
    for t and the parameters; ``given`` may also be a list, one for each of (t, y, adj_y, *params). ``name``: "rtol" or
    "atol", for errors.

    Raises:
        TypeError, ValueError: it fits neither.
    """
    value = forward if given is None else given
    leaves = len(spec.leaves)
    if isinstance(given, list) and len(given) == 3 + len(parameters):
        time, y, adj_y, *others = given
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        vector = [torch.full((size,), float(other)) for size, other in zip(sizes, others, strict=True)]
        return [time, *[y] * leaves, *[adj_y] * leaves, *([torch.cat(vector).to(spec.device)] if vector else [])]
    bounds: list[Bound] = [
        bound[..., None] if isinstance(bound, Tensor) and leaf.dtype.is_complex else bound
        for bound, leaf in zip(
            getattr(read_tolerance(spec, **{"rtol": 0.0, "atol": 0.0, name: value}), name), spec.leaves, strict=True
        )
    ]
    least = min(float(bound.min()) if isinstance(bound, Tensor) else bound for bound in bounds)
    return [least, *bounds, *bounds, *([least] if parameters else [])]


def adjoint_norm(given: object, state_norm: Norm | None, spec: StateSpec) -> Norm:
    """The norm of (t, y, adj_y, *params), y and adj_y as :func:`joined` has them.

    ``given``: the one of ``adjoint_options``; ``state_norm``: that of ``options``; None where there is none.
    """

    def of_state(y: Tensor) -> Any:
        state = y if spec.is_tensor else spec.unflatten(split(spec, y))
        return largest_of([_rms(leaf) for leaf in tree_flatten(state)[0]]) if state_norm is None else state_norm(state)

    def default(augmented: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *parameters = augmented
        return largest_of([t.abs(), of_state(y), of_state(adj_y), *(_rms(parameter) for parameter in parameters)])

    if given is None:
        return default
    if isinstance(given, str) and given == "seminorm":
        return lambda augmented: default(augmented[:3])
    if not callable(given):
        raise TypeError(f'adjoint_options["norm"] is {given!r}, expected a callable or "seminorm"')
    if spec.is_tensor:
        return given

    def of_tensors(augmented: tuple[Tensor, ...]) -> Any:
        t, y, adj_y, *parameters = augmented
        states = [tree_flatten(spec.unflatten(split(spec, half)))[0] for half in (y, adj_y)]
        return given((t, *states[0], *states[1], *parameters))

    return of_tensors


def _rms(tensor: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(tensor)
    return length / math.sqrt(max(tensor.numel(), 1))


def largest_of(norms: Sequence[Any]) -> Tensor:
    """The largest of scalars, the first of them a tensor; ``max`` would look at values on the device."""
    first: Tensor = norms[0]
    tensors = [torch.as_tensor(norm, dtype=first.dtype, device=first.device) for norm in norms]
    return torch.stack(tensors).amax()
