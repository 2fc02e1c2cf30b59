"""The fused operators: each declared once, with the ATen oracle behind it and the kernels that override it.

This module is the only caller of the backends. PyTorch's dispatcher is the backend table: the oracle of
:mod:`rampde.eager` is registered for every device (and for fake tensors), ``rampde._C`` overrides the CPU key
and the CUDA key of the adjoint sweep, :mod:`rampde.kernels` (Triton) the CUDA key of the forward operators.
The meaning, shapes and dtypes of each operator are in the docstring of its oracle.
"""

from importlib.util import find_spec

import torch

from rampde import _ext, eager

MISSING = _ext.MISSING
"""Why the compiled operators are absent; empty when they are loaded."""

SCHEMAS = {
    "rk_stage": "(Tensor y, Tensor[] k, Tensor h, float[] a, ScalarType dtype) -> Tensor",
    "rk_update": (
        "(Tensor y, Tensor[] k, Tensor h, float[] b, Tensor(a!) y_next, Tensor(b!)? checkpoint=None,"
        " Tensor(c!)? compensation=None, Tensor(d!)? overflow_step=None, int step=0,"
        " Tensor(e!)? quantised=None, Tensor(f!)? block_scales=None, int? seed=None) -> ()"
    ),
    "rk_error": (
        "(Tensor y, Tensor[] k, Tensor h, float[] b, float[] e, float rtol, float atol, float roundoff, int rows=1,"
        " Tensor(a!)? y_next=None, Tensor(b!)? checkpoint=None, Tensor(c!)? compensation=None,"
        " Tensor(d!)? quantised=None, Tensor(e!)? block_scales=None, int? seed=None) -> Tensor"
    ),
    "adjoint_stage": (
        "(Tensor adjoint, Tensor[] vjps, Tensor h, float b, float[] a, ScalarType dtype,"
        " Tensor? scale_state=None) -> Tensor"
    ),
    "adjoint_update": (
        "(Tensor adjoint, Tensor[] vjps, Tensor h, Tensor? cotangent, Tensor(a!) adjoint_next,"
        " Tensor(b!)? scale_state=None) -> ()"
    ),
    "update_scale": (
        "(Tensor(a!) scale_state, Tensor?[] gradients, float target, float decrease_factor,"
        " float increase_factor, int increase_interval, float delta, int steps) -> ()"
    ),
    "accumulate_gradients": ("(Tensor(a!)[] totals, Tensor?[] gradients, Tensor h, Tensor? scale_state=None) -> ()"),
}

_library = torch.library.Library("rampde", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(eager, _name), "CompositeExplicitAutograd")

TRITON_OPERATORS: tuple[str, ...] = ()
_triton = find_spec("triton")
# a mere folder of that name on the path has no origin
if _triton is not None and _triton.origin is not None:
    if find_spec("rampde.kernels") is None:
        raise ImportError("rampde is not installed: run `pip install --no-build-isolation -e .` in its source folder")
    from rampde import kernels  # type: ignore[attr-defined]

    TRITON_OPERATORS = tuple(kernels.OPERATORS)
    for _name, _launch in kernels.OPERATORS.items():
        _library.impl(_name, _launch, "CUDA")

# bound once: resolving torch.ops.rampde.<name> at every call costs a quarter of the call
rk_stage = torch.ops.rampde.rk_stage.default
rk_update = torch.ops.rampde.rk_update.default
rk_error = torch.ops.rampde.rk_error.default
adjoint_stage = torch.ops.rampde.adjoint_stage.default
adjoint_update = torch.ops.rampde.adjoint_update.default
update_scale = torch.ops.rampde.update_scale.default
accumulate_gradients = torch.ops.rampde.accumulate_gradients.default
