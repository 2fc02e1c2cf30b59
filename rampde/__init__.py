"""rampde: mixed-precision neural-ODE solvers for PyTorch."""

from rampde.checkpoint import Binomial, Checkpoint, Fp8, Offload
from rampde.continuous_adjoint import odeint_adjoint
from rampde.dense import DenseSolution, odeint_dense
from rampde.graph_cache import clear_cuda_graphs
from rampde.implicit_tableau import ImplicitTableau
from rampde.methods import METHODS, register_method
from rampde.odeint import odeint
from rampde.odeint_event import odeint_event
from rampde.plan import MemoryPlan, PlannedPolicy, plan_memory
from rampde.scaling import DynamicScaler
from rampde.statistics import SolveStats, Stats, stats
from rampde.tableau import ButcherTableau, EmbeddedTableau

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "Binomial",
    "ButcherTableau",
    "Checkpoint",
    "DenseSolution",
    "DynamicScaler",
    "EmbeddedTableau",
    "Fp8",
    "ImplicitTableau",
    "MemoryPlan",
    "Offload",
    "PlannedPolicy",
    "SolveStats",
    "Stats",
    "__version__",
    "clear_cuda_graphs",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "plan_memory",
    "register_method",
    "stats",
]
