"""diffrax on the workloads that are easily said in JAX: the same method, grid, state and parameters, jitted."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# a GPU is shared with PyTorch, and on the CPU as many threads are used as PyTorch has
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if torch.get_num_threads() == 1:
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import diffrax
import jax
import jax.numpy as jnp

from bench.compare_problems import Result, Workload

# fp32 is to be what it says, on a GPU too
jax.config.update("jax_default_matmul_precision", "highest")


class ThreeEighths(diffrax.AbstractERK):
    """torchdiffeq's "rk4": the 3/8 rule."""

    tableau = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1.0]), np.array([1.0, -1.0, 1.0])),
        b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
        b_error=np.zeros(4),
        c=np.array([1 / 3, 2 / 3, 1.0]),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        return 4


def on_device(device: torch.device) -> bool:
    """Whether JAX computes there."""
    return (jax.default_backend() == "gpu") == (device.type == "cuda")


def mlp(t: Any, y: Any, parameters: Any) -> Any:
    """Layers of a matrix and a bias, tanh between them."""
    for index in range(0, len(parameters), 2):
        y = jnp.tanh(y) if index > 0 else y
        y = y @ parameters[index].T + parameters[index + 1]
    return y


def linear(t: Any, y: Any, parameters: Any) -> Any:
    """A y."""
    return y @ parameters[0].T


def training_step(workload: Workload) -> Callable[[], Result]:
    """The workload's training step; waits for its result."""
    term = diffrax.ODETerm({"mlp": mlp, "linear": linear}[workload.family])
    parameters = [_array(parameter) for parameter in workload.funcs[0].parameters()]
    y0, cotangent = _array(workload.y0[0]), _array(workload.cotangents[0])
    times = _array(workload.times)

    def loss(y0: Any, parameters: Any) -> Any:
        solution = diffrax.diffeqsolve(
            term,
            ThreeEighths(),
            times[0],
            times[-1],
            None,
            y0,
            args=parameters,
            stepsize_controller=diffrax.StepTo(times),
            max_steps=len(times) - 1,
        )
        return (solution.ys[-1] * cotangent).sum(), solution.ys[-1]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def call() -> Result:
        (_, last), (of_y0, of_parameters) = jax.block_until_ready(step(y0, parameters))
        return Result((_tensor(last),), (_tensor(of_y0), *map(_tensor, of_parameters)))

    return call


def _array(tensor: torch.Tensor) -> Any:
    return jnp.asarray(tensor.detach().cpu().numpy())


def _tensor(array: Any) -> torch.Tensor:
    # shares the memory, on whichever device
    return torch.from_dlpack(array)
