"""rampde: mixed-precision neural-ODE solvers for PyTorch."""

from rampde.continuous_adjoint import odeint_adjoint
from rampde.methods import METHODS, register_method
from rampde.odeint import odeint
from rampde.scaling import DynamicScaler
from rampde.tableau import ButcherTableau

__version__ = "0.1.0"

__all__ = ["METHODS", "ButcherTableau", "DynamicScaler", "__version__", "odeint", "odeint_adjoint", "register_method"]
