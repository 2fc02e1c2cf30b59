"""The user's state as a flat list of real, dense leaves, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten
from torch.utils._pytree import keystr as path_to_string

from rampde.precision import accumulation_dtype, real_dtype

State = object  # a tensor, or any nesting of tuples, lists and dicts of tensors


@dataclass(frozen=True)
class Leaf:
    """One tensor of the state: how the user sees it and how the solver holds it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    @property
    def real_dtype(self) -> torch.dtype:
        return real_dtype(self.dtype)


class StateSpec:
    """Structure of a state: flattens and unflattens it, complex leaves seen as pairs of reals."""

    def __init__(self, y0: State) -> None:
        """Reads the structure of ``y0``.

        Raises:
            TypeError: ``y0`` holds something that is not a floating point or complex tensor.
            ValueError: ``y0`` is empty, or its tensors lie on different devices.
        """
        paths, self._tree = tree_flatten_with_path(y0)
        if not paths:
            raise ValueError(f"y0 is {y0!r}, expected a tensor or a nesting of tuples, lists and dicts of tensors")
        self.leaves: list[Leaf] = []
        device: torch.device | None = None
        for path, value in paths:
            name = "y0" + path_to_string(path)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")
            if not (value.is_floating_point() or value.is_complex()) or value.dtype.itemsize == 1:
                raise TypeError(f"{name} has dtype {value.dtype}, expected a floating point or complex dtype")
            if value.dtype == torch.complex32:
                raise TypeError(f"{name} has dtype torch.complex32, expected torch.complex64 or torch.complex128")
            if value.layout != torch.strided:
                raise TypeError(f"{name} has layout {value.layout}, expected a dense tensor")
            device = value.device if device is None else device
            if value.device != device:
                raise ValueError(f"{name} is on {value.device}, expected all of y0 on {device}")
            self.leaves.append(Leaf(name, value.shape, value.dtype))
        assert device is not None
        if device.type == "meta":
            raise TypeError(f"{self.leaves[0].name} is on meta, expected a tensor with data")
        self.device = device
        self.is_tensor = isinstance(y0, Tensor)
        self._is_tuple = type(y0) is tuple and all(isinstance(value, Tensor) for value in y0)
        self._any_complex = any(leaf.dtype.is_complex for leaf in self.leaves)
        self.assemble = self._assembler()

    @property
    def time_dtype(self) -> torch.dtype:
        """Dtype of the time that f receives: the real dtype of the state, the widest of its leaves."""
        dtype = self.leaves[0].real_dtype
        for leaf in self.leaves[1:]:
            dtype = torch.promote_types(dtype, leaf.real_dtype)
        return dtype

    @property
    def structure(self) -> tuple[object, ...]:
        """What two specs have in common whose states look alike; hashable."""
        return (*self.leaves, self.device, repr(self._tree))

    @property
    def structure_of_any_shapes(self) -> tuple[object, ...]:
        """What two specs have in common whose states look alike but for shapes; hashable."""
        return (*(leaf.dtype for leaf in self.leaves), self.device, repr(self._tree))

    @property
    def elements_per_sample(self) -> int:
        """State elements in one row of the batch (the first dimension), at least 1."""
        count = 0
        for leaf in self.leaves:
            numel = leaf.shape.numel() * (2 if leaf.dtype.is_complex else 1)
            count += numel // max(leaf.shape[0], 1) if leaf.shape else numel
        return max(count, 1)

    def flatten(self, y: State) -> list[Tensor]:
        """Real, dense leaves of ``y``, differentiable; ``y`` has the structure of ``y0``."""
        leaves = []
        for value in tree_flatten(y)[0]:
            value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            # strides survive where memory is dense; expanded and sliced tensors become contiguous
            dense = value.stride() == torch.empty_like(value, device="meta").stride()
            leaves.append(value if dense else value.contiguous())
        return leaves

    def unflatten(self, leaves: Sequence[Tensor]) -> State:
        """The user's structure around real leaves, which may have additional leading dimensions."""
        return self.assemble(list(leaves))

    def _assembler(self) -> Callable[[list[Tensor]], State]:
        if self.is_tensor:
            if self._any_complex:
                return lambda leaves: torch.view_as_complex(leaves[0])
            return lambda leaves: leaves[0]
        if self._is_tuple and not self._any_complex:
            return tuple
        flags = [leaf.dtype.is_complex for leaf in self.leaves]

        def assemble(leaves: list[Tensor]) -> State:
            values = [torch.view_as_complex(leaf) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            return tree_unflatten(values, self._tree)

        return assemble

    def velocity_leaves(self, k: object) -> list[Tensor]:
        """Real leaves of what f returned; a list is taken where the state is a tuple."""
        if self.is_tensor:
            leaves: list[Tensor] = [k]  # type: ignore[list-item]  # checked once, by check_velocity
        elif self._is_tuple:
            leaves = list(k)  # type: ignore[call-overload]  # likewise
        else:
            leaves = tree_flatten(k)[0]
        if self._any_complex:
            return [_as_real(value, leaf) for value, leaf in zip(leaves, self.leaves, strict=True)]
        return leaves

    def check_velocity(self, k: object) -> None:
        """Raises TypeError or ValueError unless ``k``, returned by f, fits the state.

        Structure, shapes and device must be those of y0; the dtype may be any floating point dtype.
        """
        if self.is_tensor:
            values = [k]
        else:
            values, tree = tree_flatten(k)
            if self._is_tuple:
                same = isinstance(k, tuple | list) and len(values) == len(k) == len(self.leaves)
            else:
                same = tree == self._tree
            if not same or isinstance(k, Tensor):
                found = f"a {type(k).__name__}" + ("" if isinstance(k, Tensor) else f" with {len(values)} tensors")
                raise ValueError(
                    f"func returned {found}, expected the structure of y0: {tree_structure_name(self._tree)}"
                )
        for value, leaf in zip(values, self.leaves, strict=True):
            where = "func returned" if self.is_tensor else f"func returned, for {leaf.name},"
            if not isinstance(value, Tensor):
                raise TypeError(f"{where} a {type(value).__name__}, expected a tensor")
            if value.shape != leaf.shape:
                raise ValueError(f"{where} shape {list(value.shape)}, expected that of y0, {list(leaf.shape)}")
            if value.device != self.device:
                raise ValueError(f"{where} a tensor on {value.device}, expected y0's device, {self.device}")
            if not (value.is_floating_point() or value.is_complex()) or value.dtype.itemsize == 1:
                raise TypeError(f"{where} dtype {value.dtype}, expected a floating point dtype of 16 bits or more")
            if value.layout != torch.strided:
                raise TypeError(f"{where} a tensor of layout {value.layout}, expected a dense tensor")
            if value.is_complex() and not leaf.dtype.is_complex:
                raise TypeError(f"{where} dtype {value.dtype}, expected a real dtype, as y0 has {leaf.dtype}")


def _as_real(k: Tensor, leaf: Leaf) -> Tensor:
    """A velocity as the solver holds it: where the state is complex, f may return a real one."""
    if not leaf.dtype.is_complex:
        return k
    return torch.view_as_real((k if k.is_complex() else k.to(leaf.dtype)).resolve_conj())


def tree_structure_name(tree: TreeSpec) -> str:
    """A readable form of a pytree structure: ``(*, *)`` for a pair."""
    return str(tree_unflatten(["*"] * tree.num_leaves, tree)).replace("'", "")
