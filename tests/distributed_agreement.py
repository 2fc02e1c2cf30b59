"""Steps that all processes agree on: cases of ``test_distributed``."""

import torch
import torch.distributed as dist
from distributed_common import (
    CASES,
    TIMES,
    Collectives,
    backward,
    batch,
    case,
    error,
    gradients,
    new_model,
    own,
    raised,
    rank,
    reference,
)
from torch.nn.parallel import DistributedDataParallel

from rampde import odeint, odeint_adjoint


class Decay:
    """The faster, the larger y is: steps depend on where it is. It decays in the direction of ``sign``."""

    def __init__(self, sign=1):
        self.sign, self.evaluations = sign, 0

    def __call__(self, t, y):
        self.evaluations += 1
        if isinstance(y, dict):
            return {name: self.of(t, leaf) for name, leaf in y.items()}
        return self.of(t, y)

    def of(self, t, y):
        return -3 * self.sign * y * y.abs() + torch.cos(5 * t)


def split(leaf, sizes, dim=0):
    return leaf.split(sizes, dim)[rank()]


def agreed_case(y, t=TIMES, sizes=(5, 2), alone=None, **arguments):
    """This process's part of the solution and its evaluations, against those of the whole batch in one process.

    ``y``: the whole batch; ``alone``: options of the one process, where they are not the same."""
    leaves = y if isinstance(y, dict) else {"": y}
    parts = {name: split(leaf, sizes) for name, leaf in leaves.items()}
    options = arguments.pop("options", {})
    arguments = {"rtol": 1e-5, "atol": 1e-6} | arguments

    def solve(state, options):
        f = Decay(1 if t[0] < t[-1] else -1)
        with Collectives() as collectives:
            y = odeint(f, state if isinstance(y0, dict) else state[""], t, options=options, **arguments)
        return (y if isinstance(y0, dict) else {"": y}), f.evaluations, collectives.counts

    y0 = y
    whole, evaluations, _ = solve(leaves, options if alone is None else alone)
    found, own_evaluations, collectives = solve(parts, options | {"process_group": dist.group.WORLD})
    distances = [(found[name] - split(whole[name], sizes, 1)).abs() for name in leaves]
    return {
        "difference": max(float(distance.max()) if distance.numel() else 0.0 for distance in distances),
        "evaluations": own_evaluations,
        "alone": evaluations,
        "unagreed": solve(parts, options)[1] if all(sizes) else None,
        "collectives": collectives,
    }


def states(dtype=torch.float64):
    y = torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    y[5:] *= 8
    return y


def root_mean_square(y):
    return y.square().mean().sqrt()


def of_parts(y):
    """What processes agree on by a norm of the user: the largest of their parts'."""
    return max(root_mean_square(part) for part in y.split([5, 2]))


CASES["agreed"] = lambda: agreed_case(states())
CASES["agreed empty"] = lambda: agreed_case(states(), sizes=(7, 0))
CASES["agreed empty first"] = lambda: agreed_case(states(), sizes=(0, 7))
CASES["agreed leaves"] = lambda: agreed_case({"a": states(), "b": states()[:, 0] / 3})
CASES["agreed empty leaves"] = lambda: agreed_case({"a": states(), "b": states()[:, 0] / 3}, sizes=(0, 7))
CASES["agreed reverse"] = lambda: agreed_case(states(), TIMES.flip(0))
CASES["agreed complex"] = lambda: agreed_case(torch.complex(states(), states() / 2))
CASES["agreed tensor tolerance"] = lambda: agreed_case(states(), rtol=torch.tensor([1e-4, 1e-5, 1e-6]).double())
CASES["agreed first_step"] = lambda: agreed_case(states(), options={"first_step": 0.05})
CASES["agreed jump"] = lambda: agreed_case(states(), options={"jump_t": [0.3], "controller": "PID"})
CASES["agreed dopri8"] = lambda: agreed_case(states(), method="dopri8")
CASES["agreed adaptive_heun"] = lambda: agreed_case(states(), method="adaptive_heun", rtol=1e-3, atol=1e-4)
CASES["agreed tape"] = lambda: agreed_case(states(), checkpoint="tape")
CASES["agreed norm"] = lambda: agreed_case(states(), options={"norm": root_mean_square}, alone={"norm": of_parts})
CASES["agreed empty norm"] = lambda: agreed_case(states(), sizes=(7, 0), options={"norm": root_mean_square})


@case("agreed bf16")
def _():
    """Rounding is measured over the whole batch too: of other elements, so that steps are not the same to the bit."""
    arguments = {"t": TIMES.float(), "rtol": 1e-3, "atol": 1e-3}
    low = {"velocity_dtype": torch.bfloat16}
    y = states(torch.float32)
    exact = odeint(Decay(), y.double(), TIMES)
    alone, agreed = Decay(), Decay()
    whole = odeint(alone, y, **arguments, **low)
    found = agreed_solve(agreed, split(y, (5, 2)), **arguments, **low)
    return {
        "error": float((found - split(exact, (5, 2), 1)).abs().max()),
        "alone": float((whole - exact).abs().max()),
        "evaluations": agreed.evaluations,
    }


@case("agreed collective in func")
def _():
    """f is evaluated equally often, as it must where processes meet in it."""

    def alone(t, y):
        return torch.cos(5 * t) - y * y.abs() - y.mean(0)

    def together(t, y):
        total = torch.cat([y.detach().sum(0), y.new_tensor([len(y)])])
        dist.all_reduce(total)
        return torch.cos(5 * t) - y * y.abs() - total[:-1] / total[-1]

    arguments = {"t": TIMES, "rtol": 1e-5, "atol": 1e-6}
    whole = odeint(alone, states(), **arguments)
    found = agreed_solve(together, split(states(), (5, 2)), **arguments)
    return {"difference": float((found - split(whole, (5, 2), 1)).abs().max())}


@case("agreed random")
def _():
    """f draws random numbers, but none where its part of the batch is empty."""
    weight = torch.zeros((), requires_grad=True, dtype=torch.float64)

    def f(t, y):
        if y.numel():
            y = y + 1e-9 * torch.rand_like(y)
        return -y * torch.exp(weight)

    part = split(states(torch.float32), (7, 0))
    y = odeint(
        f, part, TIMES.float(), rtol=1e-3, atol=1e-3, velocity_dtype=torch.bfloat16, checkpoint="none",
        options={"process_group": dist.group.WORLD},
    )  # fmt: skip
    return {"shape": list(y.shape)}


@case("agreed continuous adjoint")
def _():
    """Back in time each process has steps of its own."""
    options = {"solver": odeint_adjoint, "rtol": 1e-8, "atol": 1e-8}
    exact = reference([batch()], rtol=1e-11, atol=1e-11)
    alone = error(reference([batch()], **options), exact)
    model = DistributedDataParallel(new_model(options={"process_group": dist.group.WORLD}, **options))
    backward(model, own(batch()))
    return {"error": error(gradients(model), exact), "alone": alone}


def agreed_solve(f, y, t=TIMES, **arguments):
    options = arguments.pop("options", {}) | {"process_group": dist.group.WORLD}
    return odeint(f, y, t, options=options, **arguments)


@case("not finite at the start")
def _():
    y = states()[:3]
    y[0, 0] = torch.nan if rank() == 1 else 0.0
    return raised(agreed_solve, Decay(), y)


@case("velocity not finite at the start")
def _():
    return raised(agreed_solve, lambda t, y: -y * (torch.nan if rank() == 1 else 1.0), states())


@case("not finite on the way")
def _():
    return raised(agreed_solve, lambda t, y: -y * (torch.inf if rank() == 1 and t > 0.5 else 1.0), states())


@case("not finite on the way, user's norm")
def _():
    return raised(
        agreed_solve,
        lambda t, y: -y * (torch.nan if rank() == 1 and t > 0.5 else 1.0),
        states(),
        options={"norm": root_mean_square},
    )


@case("not finite in a forced step")
def _():
    return raised(
        agreed_solve,
        lambda t, y: -y * (torch.inf if rank() == 1 and t > 0.5 else 1.0),
        states(),
        options={"min_step": 0.1},
    )


@case("other times")
def _():
    return raised(agreed_solve, Decay(), states(), TIMES * (1 + rank()))


@case("with event_fn")
def _():
    return raised(agreed_solve, Decay(), states(), TIMES[:2], event_fn=lambda t, y: y.sum() - 1)


@case("with batch_axis")
def _():
    return raised(agreed_solve, Decay(), states(), options={"batch_axis": 0})


@case("in adjoint_options")
def _():
    group = dist.group.WORLD
    return raised(odeint_adjoint, new_model().func, states(), TIMES, adjoint_options={"process_group": group})


@case("no member")
def _():
    group = dist.new_group([0])
    solve = raised(odeint, Decay(), states(), TIMES, options={"process_group": group})
    return {**solve, "member": rank() == 0}
