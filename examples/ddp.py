"""Trains a continuous normalizing flow on several processes, each with its part of every batch.

    torchrun --nproc-per-node 2 examples/ddp.py --agree

A flow moves each data point x along dx/dt = f(t, x) until, at t = 1, the points look like a Gaussian, and the integral
of the divergence of f on the way gives their density. DistributedDataParallel goes around the module that solves, not
around f: parameters' gradients leave the solve as a whole, and are averaged over the processes once per iteration.

Steps are adaptive. By default each process takes steps of its own, as its points need them; with --agree all take the
same ones, those that a single process would take for the whole batch.
"""

import argparse
import math
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

import rampde


class Field(nn.Module):
    """The velocity of points (n, 2) and its divergence (n, 1), of one hidden layer whose bias moves with time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.bias, self.outer = nn.Linear(2, width), nn.Linear(1, width), nn.Linear(width, 2)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        units = (self.inner(x) + self.bias(t.reshape(1, 1))).float().tanh()
        traces = (self.outer.weight.T * self.inner.weight).sum(1)
        return self.outer(units), ((1 - units.square()) * traces).sum(1, keepdim=True)


class Flow(nn.Module):
    """The negative log-likelihood of points (n, 2), on average, by an adaptive solve in bf16 and 32-bit sums."""

    def __init__(self, field: Field, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.field, self.options = field, {"process_group": group}

    def forward(self, x: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0], device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16):
            points, log_volume = rampde.odeint(
                self.field, (x, x.new_zeros(len(x), 1)), times, rtol=2e-2, atol=2e-2, options=self.options
            )
        log_density: Tensor = log_volume[-1, :, 0] - 0.5 * points[-1].square().sum(1) - math.log(2 * math.pi)
        return -log_density.mean()


def two_spirals(n: int, generator: torch.Generator) -> Tensor:
    """Points (n, 2) on two arms of one and a half turns, opposite each other, blurred by 0.1."""
    turn = torch.rand(n, generator=generator).sqrt()
    angle = 3 * math.pi * turn + math.pi * torch.randint(2, (n,), generator=generator)
    arm = 4 * turn.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return arm + 0.1 * torch.randn(n, 2, generator=generator)


def train(args: argparse.Namespace, device: torch.device) -> float:
    """The loss of the last batch, on average over the processes."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # DistributedDataParallel starts all processes with the parameters of the first one
    flow = Flow(Field(args.width).to(device), dist.group.WORLD if args.agree else None)
    model = DistributedDataParallel(flow, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.Adam(model.parameters(), args.rate)
    generator = torch.Generator().manual_seed(rank)  # each process draws points of its own
    loss = torch.full((), math.nan)
    progress = trange(args.iterations, unit=" steps", disable=rank > 0)
    for iteration in progress:
        optimizer.zero_grad()
        share = model(two_spirals(args.batch // processes, generator).to(device))
        share.backward()
        optimizer.step()
        if iteration % 10 == 0 or iteration + 1 == args.iterations:
            loss = share.detach()
            dist.all_reduce(loss)
            loss /= processes
            progress.set_postfix_str(f"loss {loss:.3f}")
    return loss.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints the loss of the last batch."""
    parser = argparse.ArgumentParser(description="trains a 2-D flow on several processes")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--batch", type=int, default=512, help="points of all processes together")
    parser.add_argument("--width", type=int, default=64, help="tanh units of the velocity field")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--agree", action="store_true", help="all processes take the same steps")
    parser.add_argument("--cpu", action="store_true", help="even if there are GPUs")
    args = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    # the model goes when this returns: a group must not go with the last DistributedDataParallel that holds it
    loss = train(args, device)
    dist.destroy_process_group()
    if rank == 0:
        print(f"loss {loss:.4f} on {processes} processes, {device.type}")


if __name__ == "__main__":
    main()
