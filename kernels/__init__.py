"""Triton kernels of the forward operators, for the CUDA key of :mod:`rampde.ops`.

They are imported as ``rampde.kernels``; the top-level folder is only where the sources live. Each module
holds one kernel and one launcher with exactly the operator's signature. Importing them needs Triton but no
GPU: the driver is looked for at the first launch.
"""

# the folder's own name belongs to another package on PyPI, and a kernel known under two names compiles twice
if not __name__.startswith("rampde."):
    raise ImportError(
        f"imported as {__name__!r}: install rampde (`pip install -e .`) and import rampde.kernels instead"
    )

from rampde.kernels.leaves import rk_error_leaves, rk_stage_leaves, rk_update_leaves
from rampde.kernels.rk_error import rk_error
from rampde.kernels.rk_stage import rk_stage
from rampde.kernels.rk_update import rk_update
from rampde.kernels.step_commit import step_commit
from rampde.kernels.step_control import step_control

OPERATORS = {
    "rk_stage": rk_stage,
    "rk_update": rk_update,
    "rk_error": rk_error,
    "rk_stage_leaves": rk_stage_leaves,
    "rk_update_leaves": rk_update_leaves,
    "rk_error_leaves": rk_error_leaves,
    "step_control": step_control,
    "step_commit": step_commit,
}
"""Name of an operator to its launcher."""

__all__ = [
    "OPERATORS",
    "rk_error",
    "rk_error_leaves",
    "rk_stage",
    "rk_stage_leaves",
    "rk_update",
    "rk_update_leaves",
    "step_commit",
    "step_control",
]
