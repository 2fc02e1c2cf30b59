"""The linear algebra of implicit methods: states as vectors, derivatives of f at a stage, coupled systems, GMRES."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rampde.precision import accumulation_dtype
from rampde.problem import Stage
from rampde.scaling import power_of_two_below
from rampde.state import StateSpec
from rampde.velocity import Velocity, vector_jacobian_product

Product = Callable[[Tensor], Tensor]

RESTART = 30  # vectors that GMRES keeps
ROWS = 64  # of a Jacobian that are taken at once: as many copies of what f's backward pass works on


class Layout:
    """A state as one vector, in the widest of the dtypes in which its leaves are summed.

    Called where autocast is off, which would change what ``torch.cat`` returns.
    """

    def __init__(self, spec: StateSpec) -> None:
        self.shapes = [(*leaf.shape, 2) if leaf.dtype.is_complex else tuple(leaf.shape) for leaf in spec.leaves]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.size = sum(self.sizes)
        self.dtype = torch.float32
        for leaf in spec.leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.state_dtype)
        self.device = spec.device

    def pack(self, leaves: Sequence[Tensor | None]) -> Tensor:
        """(size,) vector of the leaves; None is zero. One leaf alone is not copied where its dtype is that of the
        vector."""
        flat = [
            torch.zeros(size, dtype=self.dtype, device=self.device) if leaf is None else leaf.to(self.dtype).reshape(-1)
            for leaf, size in zip(leaves, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def unpack(self, vector: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The leaves of a (size,) vector, in ``dtypes``; a leaf of several is copied, so that it starts anew."""
        several = len(self.sizes) > 1
        return [
            part.reshape(shape).to(dtype, copy=several)
            for part, shape, dtype in zip(vector.split(self.sizes), self.shapes, dtypes, strict=True)
        ]

    def rows(self, matrix: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """As :meth:`unpack` for the rows of an (m, size) matrix: leaves of shape (m, *shape)."""
        return [
            part.reshape(matrix.shape[0], *shape).to(dtype).contiguous()
            for part, shape, dtype in zip(matrix.split(self.sizes, dim=1), self.shapes, dtypes, strict=True)
        ]

    def stack(self, vectors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The leaves of several vectors: (len(vectors), *shape) each, in ``dtypes``, sharing no memory."""
        return [torch.stack(leaves) for leaves in zip(*(self.unpack(v, dtypes) for v in vectors), strict=True)]


def scaled_product(
    stage: Stage,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    target: float | None,
    retain_graph: bool,
) -> Sequence[Tensor | None]:
    """Gradients of ``sum_l <k_l, cotangents_l>`` with respect to ``inputs``, the cotangents given in the state's dtype.

    With ``target`` they pass through f's backward pass multiplied by a power of two that takes the largest element
    to at most ``target``; the products are then float32 or wider.
    """
    scale = None
    largest = [c.abs().amax() for c in cotangents if c.numel()]
    if target is not None and largest:
        scale = power_of_two_below(target / torch.stack(largest).amax())
        cotangents = [c * scale for c in cotangents]
    cotangents = [c.to(k.dtype) for c, k in zip(cotangents, stage.k, strict=True)]
    products = vector_jacobian_product(stage.k, inputs, cotangents, retain_graph)
    if scale is None:
        return products
    # 16 bits would not hold what the scale kept in range; complex dtypes are wide enough
    return [p if p is None else (p if p.is_complex() else p.to(accumulation_dtype(p.dtype))) / scale for p in products]


class Derivative:
    """The Jacobian of f at one stage, as a matrix or as products with it and its transpose, on vectors.

    ``stage`` carries its graph, which lives as long as this does.
    """

    def __init__(self, stage: Stage, layout: Layout, velocity: Velocity, target: float | None = None) -> None:
        self.stage = stage
        self.layout = layout
        self.velocity = velocity
        half = any(tensor.dtype == torch.float16 for tensor in (*stage.x, *stage.k))
        self.target = target if target is not None or not half else 1.0
        self._dtypes = [layout.dtype] * len(stage.x)
        # cotangents, the products with them, and the inputs that these are for
        self._linear: tuple[list[Tensor], list[Tensor], list[int]] | None = None
        self._attempt = 0  # which way of taking products with the Jacobian has not failed yet

    def matrix(self) -> Tensor:
        """The (size, size) Jacobian, row by row from products with its transpose."""
        size, layout, stage = self.layout.size, self.layout, self.stage
        depends = [value.requires_grad for value in stage.k]
        if size == 0 or not any(depends):
            return torch.zeros(size, size, dtype=layout.dtype, device=layout.device)
        identity = torch.eye(size, dtype=layout.dtype, device=layout.device)
        k = [value for value, has_graph in zip(stage.k, depends, strict=True) if has_graph]
        blocks = []
        for rows in identity.split(ROWS):
            cotangents = layout.rows(rows, [value.dtype for value in stage.k])
            cotangents = [c for c, has_graph in zip(cotangents, depends, strict=True) if has_graph]
            products = _batched_products(k, stage.x, cotangents)
            for product, width in zip(products, layout.sizes, strict=True):
                if product is None:
                    product = torch.zeros(len(rows), width, dtype=layout.dtype, device=layout.device)
                blocks.append(product.to(layout.dtype).reshape(len(rows), width))
        across = len(stage.x)
        return torch.cat([torch.cat(blocks[i : i + across], dim=1) for i in range(0, len(blocks), across)])

    def transposed_product(self, w: Tensor) -> Tensor:
        """The transpose times ``w``: a vector-Jacobian product of f."""
        cotangents = self.layout.unpack(w, self._dtypes)
        return self.layout.pack(scaled_product(self.stage, self.stage.x, cotangents, self.target, retain_graph=True))

    def product(self, v: Tensor) -> Tensor:
        """The Jacobian times ``v``.

        The derivative of the vector-Jacobian product, which is linear in its cotangent, where f can be differentiated
        twice: it costs no evaluation of f, and holds the random numbers fixed. Else forward mode; else a difference.
        """
        while self._attempt < 2:
            # not the method itself, which would keep this and its graphs alive until a garbage collection
            method = self._forward_product if self._attempt else self._double_product
            try:
                return method(v)
            except (RuntimeError, NotImplementedError):
                self._attempt += 1
        return self._difference(v)

    def _double_product(self, v: Tensor) -> Tensor:
        stage, layout = self.stage, self.layout
        if self._linear is None:
            k = [value for value in stage.k if value.requires_grad]
            with torch.enable_grad():
                w = [torch.zeros_like(value, requires_grad=True) for value in k]
                found = torch.autograd.grad(k, stage.x, w, create_graph=True, allow_unused=True) if k else ()
            used = [i for i, g in enumerate(found) if g is not None and g.requires_grad]
            self._linear = w, [g for g in found if g is not None and g.requires_grad], used
        w, products, used = self._linear
        if not products:
            return torch.zeros_like(v)
        scale = None
        if self.target is not None:
            scale = power_of_two_below(self.target / v.abs().amax())
            v = v * scale
        tangents = layout.unpack(v, [x.dtype for x in stage.x])
        found = torch.autograd.grad(products, w, [tangents[i] for i in used], retain_graph=True, allow_unused=True)
        k_dot = iter(found)
        result = layout.pack([next(k_dot) if value.requires_grad else None for value in stage.k])
        return result if scale is None else result / scale

    def _forward_product(self, v: Tensor) -> Tensor:
        stage = self.stage
        tangents = self.layout.unpack(v, [x.dtype for x in stage.x])

        def evaluate(*x: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.velocity.evaluate(stage.time.detach(), list(x)))

        with self.velocity.autocast.entered():
            k_dot = torch.func.jvp(evaluate, tuple(x.detach() for x in stage.x), tuple(tangents))[1]
        return self.layout.pack(k_dot)

    def _difference(self, v: Tensor) -> Tensor:
        stage, layout = self.stage, self.layout
        x = layout.pack([leaf.detach() for leaf in stage.x])
        roundoff = max(torch.finfo(value.dtype).eps for value in (*stage.x, *stage.k))
        # balances the error of the difference with the rounding of f
        step = math.sqrt(roundoff) * (1 + x.norm()) / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
        moved = layout.unpack(x + step * v, self.velocity.dtypes)
        with self.velocity.autocast.entered():
            k = self.velocity.evaluate(stage.time.detach(), moved)
        difference: Tensor = (layout.pack(k) - layout.pack([value.detach() for value in stage.k])) / step
        return difference


def _batched_products(k: list[Tensor], x: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor | None]:
    """Vector-Jacobian products for each of the rows in ``cotangents``."""
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            k, x, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return found
    except (RuntimeError, NotImplementedError):
        # f has an operation without a batching rule; where the fault is f's own, it shows again
        rows = [
            vector_jacobian_product(k, x, [c[row] for c in cotangents], retain_graph=True)
            for row in range(cotangents[0].shape[0])
        ]
        return [None if columns[0] is None else torch.stack(columns) for columns in zip(*rows, strict=True)]


class System(Protocol):
    """The equations ``u_i - h L_i sum_j c_ij u_j = r_i`` of the stages of a block, with ``L_i`` linear on the state.

    With the Jacobians of f and ``c = a`` they are Newton's, with the transposed Jacobians and ``c = a^T`` those of
    the adjoint.
    """

    def solve(self, r: Tensor) -> Tensor:
        """(m, n) solution ``u`` for an (m, n) ``r``."""

    def solve_transposed(self, g: Tensor) -> Tensor:
        """(m, n) solution for the transposed equations."""


class DenseSystem:
    """The equations as one matrix, factored."""

    def __init__(self, operators: Tensor, coupling: Tensor, h: Tensor) -> None:
        """``operators``: (m, n, n); ``coupling``: (m, m) in the same dtype; ``h``: 0-dim."""
        m, n, _ = operators.shape
        scaled = h.to(coupling.dtype) * coupling
        matrix = -scaled[:, None, :, None] * operators[:, :, None, :]
        matrix = matrix.reshape(m * n, m * n)
        matrix.diagonal().add_(1)
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def solve(self, r: Tensor) -> Tensor:
        # a singular matrix shows in what comes out: it is not finite
        u: Tensor = torch.linalg.lu_solve(self._lu, self._pivots, r.reshape(-1, 1))
        return u.reshape(r.shape)

    def solve_transposed(self, g: Tensor) -> Tensor:
        u: Tensor = torch.linalg.lu_solve(self._lu, self._pivots, g.reshape(-1, 1), adjoint=True)
        return u.reshape(g.shape)


class KrylovSystem:
    """The equations by their products alone: no matrix of the state's size is ever formed."""

    def __init__(
        self,
        operators: Sequence[Product],
        transposed: Sequence[Product],
        coupling: Tensor,
        h: Tensor,
        tolerance: float,
        max_products: int,
    ) -> None:
        self._operators, self._transposed = operators, transposed
        self._coupling = h.to(coupling.dtype) * coupling
        self._tolerance, self._max_products = tolerance, max_products
        # the largest of all solves so far: relative residual, and number of products
        self.residual, self.products = 0.0, 0

    def solve(self, r: Tensor) -> Tensor:
        return self._gmres(self._operators, self._coupling, r)

    def solve_transposed(self, g: Tensor) -> Tensor:
        # g - h sum_i a_ij L_i^T w_i in terms of v_i = L_i^T w_i, for which the equations have the form above
        coupling = self._coupling.T
        r = torch.stack([product(row) for product, row in zip(self._transposed, g, strict=True)])
        return g + combined(coupling, self._gmres(self._transposed, coupling, r))

    def _gmres(self, operators: Sequence[Product], coupling: Tensor, r: Tensor) -> Tensor:
        def product(vector: Tensor) -> Tensor:
            u = vector.view(r.shape)
            sums = combined(coupling, u)
            return (u - torch.stack([f(row) for f, row in zip(operators, sums, strict=True)])).flatten()

        solution, residual, products = gmres(product, r.flatten(), self._tolerance, self._max_products)
        self.residual, self.products = max(self.residual, residual), max(self.products, products)
        return solution.view(r.shape)


def combined(coupling: Tensor, u: Tensor) -> Tensor:
    """(l, n) sums ``sum_j c_ij u_j`` for an (l, m) ``coupling``."""
    # not a matrix product, which users let run in TF32
    return (coupling[:, :, None] * u).sum(1)


def gmres(product: Product, r: Tensor, tolerance: float, max_products: int) -> tuple[Tensor, float, int]:
    """Solves ``product(u) = r`` to ``|r - product(u)| <= tolerance |r|``, or as well as ``max_products`` allow.

    Restarted GMRES (Saad, Schultz, SIAM J. Sci. Stat. Comput. 7, 1986), with modified Gram-Schmidt. ``product`` is
    linear on vectors like ``r``.

    Returns:
        ``u``, its residual relative to ``|r|``, and the number of products. Where ``r`` is zero or not finite, ``u`` is
        ``r``.
    """
    start = float(r.norm())
    if start == 0 or not math.isfinite(start):
        return r, 0.0, 0
    u = torch.zeros_like(r)
    residual, length, products = r, start, 0
    while True:
        basis = [residual / length]
        # the least-squares problem of the small Hessenberg matrix, kept triangular by rotations
        columns: list[list[float]] = []
        rotations: list[tuple[float, float]] = []
        rest = [length]
        while len(columns) < RESTART and products < max_products and abs(rest[-1]) > tolerance * start:
            vector = product(basis[-1])
            products += 1
            inner = []
            for other in basis:
                inner.append(torch.dot(other, vector))
                vector = vector - inner[-1] * other
            # the one look at the device of an iteration
            column = torch.stack([*inner, vector.norm()]).tolist()
            below = column.pop()
            for i, (cosine, sine) in enumerate(rotations):
                upper, lower = column[i], column[i + 1]
                column[i], column[i + 1] = cosine * upper + sine * lower, cosine * lower - sine * upper
            radius = math.hypot(column[-1], below)
            if not math.isfinite(radius) or radius == 0:
                break
            cosine, sine = column[-1] / radius, below / radius
            column[-1] = radius
            rotations.append((cosine, sine))
            columns.append(column)
            rest[-1:] = [cosine * rest[-1], -sine * rest[-1]]
            if below == 0:
                break
            basis.append(vector / below)
        steps = len(columns)
        weights = [0.0] * steps
        for i in reversed(range(steps)):
            known = sum(columns[j][i] * weights[j] for j in range(i + 1, steps))
            weights[i] = (rest[i] - known) / columns[i][i]
        for weight, direction in zip(weights, basis, strict=False):
            u = u + weight * direction
        if steps < RESTART or products >= max_products:
            return u, abs(rest[-1]) / start, products
        residual = r - product(u)
        products += 1
        before, length = length, float(residual.norm())
        # where a round gains nothing, the rounding of the products is reached
        if not tolerance * start < length <= before / 2:
            return u, length / start, products
