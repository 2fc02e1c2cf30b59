"""What the tests of implicit methods share: a stiff problem, a network, solves that must not warn."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

L_STABLE = ("implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2")
SOLVERS = ("dense", "krylov")


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])


def net_and_state(dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    """The same in every dtype."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(dtype)
    return net, torch.randn(16, 4).to(dtype).requires_grad_()
