"""Errors of 16-bit training gradients against float64, beside torchdiffeq, as the number of steps grows.

    python -m bench.accuracy [--steps 8 64 512] [--out DIR]

The MLP 16-64-64-16 (tanh) on a batch of 128 is integrated from 0 to 1 by rk4 under autocast; the loss is
``<c, y(1)>`` for a random c of a mean's size. Exact is the same discretisation in float64, by autograd through
torchdiffeq.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import rampde
from bench.common import machine, machine_line, print_table, results_folder, write_results

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SOLVERS = {"rampde": partial(rampde.odeint, checkpoint="step"), "torchdiffeq": torchdiffeq.odeint}
QUANTITIES = ("y(1)", "dL/dy0", "dL/dtheta")


def train(odeint: Callable[..., Tensor], net: nn.Module, y0: Tensor, c: Tensor, steps: int, low: Any) -> list[Tensor]:
    """The solution, and the gradients with respect to y0 and all parameters, in float64."""
    net, y0 = copy.deepcopy(net), y0.clone().requires_grad_()
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with torch.autocast("cpu", low, enabled=low is not None):
        y = odeint(lambda t, y: net(y), y0, t, method="rk4")[-1]
    (c * y).mean().backward()
    parameters = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    return [tensor.detach().double() for tensor in (y, y0.grad, parameters)]


def measure(steps: int) -> list[dict[str, Any]]:
    """A row for each solver, precision and quantity."""
    torch.manual_seed(1)
    hidden = [nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    net = nn.Sequential(*hidden, nn.Linear(64, 16))
    y0, c = torch.randn(128, 16), torch.randn(128, 16)
    exact = train(torchdiffeq.odeint, copy.deepcopy(net).double(), y0.double(), c.double(), steps, None)
    rows = []
    for precision, low in PRECISIONS.items():
        for solver, odeint in (
            ("rampde", partial(rampde.odeint, checkpoint="step")),
            ("torchdiffeq", torchdiffeq.odeint),
        ):
            found = train(odeint, net, y0, c, steps, low)
            for quantity, mine, theirs in zip(QUANTITIES, found, exact, strict=True):
                error = ((mine - theirs).norm() / theirs.norm()).item()
                rows.append(
                    {
                        "precision": precision,
                        "solver": solver,
                        "quantity": quantity,
                        "steps": steps,
                        "relative_error": error,
                    }
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--out", help="folder of the results (default: bench/results/<GPU or CPU>)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine_line(machine()))
    rows = [row for steps in options.steps for row in measure(steps)]
    table: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = row["precision"], row["solver"], row["quantity"]
        line = table.setdefault(key, dict(zip(("precision", "solver", "quantity"), key, strict=True)))
        line[f"N = {row['steps']}"] = f"{row['relative_error']:.1e}"
    print_table(list(table.values()), "relative error against the float64 discrete gradient")
    write_results(results_folder(options.out), "accuracy", rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
