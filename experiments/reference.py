"""The same work in float64, against which losses and gradients of a run are held."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from experiments.options import Precision

# from a precision, a model and data to a 0-dim loss
Loss = Callable[[Precision, nn.Module, Tensor], Tensor]


def reference(precision: Precision) -> Precision:
    """float64 with torchdiffeq, on the device of ``precision``."""
    options = precision.options
    return Precision(replace(options, precision="fp64", solver="torchdiffeq", scaler="none", checkpoint="auto"))


def gradient_error(precision: Precision, model: nn.Module, data: Tensor, loss: Loss) -> float:
    """Relative error, in the Euclidean norm over all parameters, of the gradient that a run's arithmetic gives.

    Args:
        precision: the run's; its scalers are used as in training.
        model: in the run's dtype; its gradients are left as they are.
        data: (n, ...) in the run's dtype.
        loss: what is differentiated.

    Returns:
        The error against :func:`reference`; infinite where the gradient is not finite.
    """
    wide = copy.deepcopy(model).double()
    expected = gradient(reference(precision), wide, data.double(), loss)
    return distance(gradient(precision, model, data, loss), expected)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error of ``found`` in the Euclidean norm; infinite where it is not finite."""
    error = ((found - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf


def gradient(precision: Precision, model: nn.Module, data: Tensor, loss: Loss) -> Tensor:
    """The gradient of a loss that a run's arithmetic gives, of all parameters in one row, float64.

    Args: as of :func:`gradient_error`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaler = precision.grad_scaler
    # a parameter that the loss does not depend on has the gradient zero
    found = torch.autograd.grad(scaler.scale(loss(precision, model, data)), parameters, materialize_grads=True)
    scale = scaler.get_scale()
    return torch.cat([gradient.double().flatten() for gradient in found]) / scale
