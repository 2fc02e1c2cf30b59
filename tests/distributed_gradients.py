"""Gradients under DistributedDataParallel and FSDP2: cases of ``test_distributed``."""

import copy
import warnings

import torch
import torch.distributed as dist
from distributed_common import (
    CASES,
    METHODS,
    POLICIES,
    TIMES,
    Collectives,
    backward,
    batch,
    case,
    error,
    gradients,
    mean,
    new_model,
    own,
    parts_of,
    raised,
    rank,
    reference,
    sharded,
)
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

import rampde
from rampde import odeint, odeint_adjoint


def ddp_case(method, policy, agreed=False, **arguments):
    options = {"method": method, "checkpoint": policy}
    expected = reference(parts_of(method, agreed), **options)
    if agreed:
        options["options"] = {"process_group": dist.group.WORLD}
    model = DistributedDataParallel(new_model(**options), **arguments)
    for _ in range(3):  # a static graph is learnt in the first pass
        model.zero_grad()
        backward(model, own(batch()))
    return {"error": error(gradients(model), expected)}


def fsdp_case(method, policy, how, agreed=False, **arguments):
    options = {"method": method, "checkpoint": policy}
    expected = reference(parts_of(method, agreed), **options)
    if agreed:
        options["options"] = {"process_group": dist.group.WORLD}
    model = sharded(new_model(**options), how, **arguments)
    for _ in range(2):
        model.zero_grad()
        backward(model, own(batch()))
    return {"error": error(gradients(model), expected)}


for METHOD in METHODS:
    for POLICY in POLICIES:
        CASES[f"ddp {METHOD} {POLICY}"] = lambda m=METHOD, p=POLICY: ddp_case(m, p)
        for HOW in ("root", "func", "layers"):
            for RESHARD in (True, False):
                CASES[f"fsdp {METHOD} {POLICY} {HOW} {'reshard' if RESHARD else 'keep'}"] = (
                    lambda m=METHOD, p=POLICY, h=HOW, r=RESHARD: fsdp_case(m, p, h, reshard_after_forward=r)
                )
    CASES[f"fsdp {METHOD} tape"] = lambda m=METHOD: fsdp_case(m, "tape", "layers")
    CASES[f"fsdp {METHOD} parts"] = lambda m=METHOD: fsdp_case(m, "auto", "parts")
    CASES[f"fsdp {METHOD} layers alone"] = lambda m=METHOD: fsdp_case(m, "auto", "layers alone")
for POLICY in POLICIES:
    CASES[f"ddp agreed {POLICY}"] = lambda p=POLICY: ddp_case("dopri5", p, agreed=True)
    CASES[f"fsdp agreed {POLICY}"] = lambda p=POLICY: fsdp_case("dopri5", p, "func", agreed=True)
for METHOD in ("gl4", "implicit_adams"):
    CASES[f"fsdp {METHOD}"] = lambda m=METHOD: fsdp_case(m, "step", "func")
CASES["ddp find_unused_parameters"] = lambda: ddp_case("rk4", "step", find_unused_parameters=True)
CASES["ddp static_graph"] = lambda: ddp_case("rk4", "step", static_graph=True)
CASES["ddp gradient_as_bucket_view"] = lambda: ddp_case("rk4", "none", gradient_as_bucket_view=True)


@case("ddp unused parameters of f")
def _():
    """The encoder is used by f's module but not by f: it is in the graph of the solve without a gradient."""
    expected = reference(parts_of("rk4", False), method="rk4")
    model = new_model(method="rk4")
    model.func.unused = nn.Linear(2, 2).double()
    model = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        backward(model, own(batch()))
    found = gradients(model)
    unused = [found.pop(name) for name in list(found) if "unused" in name]
    zero = all(gradient is None or not gradient.any() for gradient in unused)
    return {"error": error({name: gradient / 2 for name, gradient in found.items()}, expected), "zero": zero}


@case("ddp accumulation")
def _():
    halves = batch().chunk(2)
    expected = reference(halves, method="rk4")
    model = DistributedDataParallel(new_model(method="rk4"))
    with model.no_sync():
        backward(model, own(halves[0]))
    backward(model, own(halves[1]))
    return {"error": error({name: gradient / 2 for name, gradient in gradients(model).items()}, expected)}


@case("fsdp accumulation")
def _():
    halves = batch().chunk(2)
    expected = reference(halves, method="rk4")
    model = sharded(new_model(method="rk4"), "func", reshard_after_forward=True)
    model.set_requires_gradient_sync(False)
    backward(model, own(halves[0]))
    model.set_requires_gradient_sync(True)
    backward(model, own(halves[1]))
    return {"error": error({name: gradient / 2 for name, gradient in gradients(model).items()}, expected)}


@case("ddp two solves")
def _():
    expected = reference([batch()], method="rk4", solves=2)
    model = DistributedDataParallel(new_model(method="rk4", solves=2))
    backward(model, own(batch()))
    return {"error": error(gradients(model), expected)}


for POLICY in ("none", "step", "tape"):

    @case(f"fsdp two solves {POLICY}")
    def _(policy=POLICY):
        expected = reference([batch()], method="rk4", solves=2)
        model = sharded(new_model(method="rk4", solves=2, checkpoint=policy), "func", reshard_after_forward=True)
        backward(model, own(batch()))
        return {"error": error(gradients(model), expected)}


@case("ddp as func")
def _():
    """DDP around f alone; what is around f is averaged by hand."""
    expected = reference([batch()], method="rk4")
    model = new_model(method="rk4")
    model.func = DistributedDataParallel(model.func)
    backward(model, own(batch()))
    return {"error": error(averaged(model), {name.replace("func", "func.module"): g for name, g in expected.items()})}


def averaged(model):
    """The gradients of a model of which f alone is distributed, as if all of it were."""
    found, whole = gradients(model), mean(model)
    return {name: found[name] if name.startswith("func") else whole[name] for name in found}


@case("fsdp func alone")
def _():
    """The module that solves is not sharded: f is the root, outside of any forward of FSDP."""
    expected = reference([batch()], method="rk4")
    model = new_model(method="rk4")
    fully_shard(model.func)
    for _ in range(2):
        model.zero_grad()
        backward(model, own(batch()))
    return {"error": error(averaged(model), expected)}


@case("fsdp closure")
def _():
    """f is a closure over the whole model, of which it uses a part."""
    expected = reference([batch()], method="rk4")
    model = sharded(new_model(method="rk4", closure=True), "parts", reshard_after_forward=True)
    with Collectives() as collectives:
        backward(model, own(batch()))
    return {"error": error(gradients(model), expected), **collectives.counts}


@case("fsdp collectives")
def _():
    """By the number of steps, which they must not depend on."""
    counts = []
    for times in (2, 9):
        model = sharded(new_model(method="rk4", checkpoint="step"), "func", reshard_after_forward=True)
        y0 = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        with Collectives() as collectives:
            y = odeint(model.func, y0, torch.linspace(0, 1, times).double(), method="rk4", checkpoint="step")
            y[-1].sum().backward()
        counts.append(collectives.counts)
    return {"counts": counts}


@case("fsdp states")
def _():
    """A module is sharded before a solve and after it, with and without gradients, and after an error in f."""
    model = new_model(method="rk4")
    func = fully_shard(model.func, reshard_after_forward=True)
    y0 = torch.randn(4, 5, dtype=torch.float64)
    states = []

    def note():
        states.append(any(hasattr(parameter, "full_tensor") for parameter in func.parameters()))

    with torch.no_grad():
        odeint(func, y0, TIMES, method="rk4")
    note()
    y = odeint(func, y0, TIMES, method="rk4")
    note()

    def failing(t, y):
        if t > 0.5:
            raise ArithmeticError("here")
        return func(t, y)

    try:
        odeint(failing, y0, TIMES, method="rk4")
    except ArithmeticError:
        note()
    y.sum().backward()
    note()
    first = gradients(func)
    func.zero_grad()
    # a state that was computed: the gradients of what it was computed from come after those of the solve
    source = y0.clone().requires_grad_()
    source.register_hook(lambda _: note())
    odeint(func, source * 1.0, TIMES, method="rk4").sum().backward()
    return {"sharded": states, "error": error(gradients(func), first)}


@case("fsdp activation checkpointing")
def _():
    """The block that solves is evaluated again in the backward pass."""
    expected = reference([batch()], method="rk4")
    model = new_model(method="rk4")
    plain = model.forward
    model.forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    model = sharded(model, "func", reshard_after_forward=True)
    backward(model, own(batch()))
    return {"error": error(gradients(model), expected)}


@case("fsdp forward method")
def _():
    """f is a method that FSDP was told of: the solve goes to the tape, with a warning."""
    func, single = fully_shard(new_model().func), new_model().func
    register_fsdp_forward_method(func, "velocity")
    y0 = torch.randn(4, 5, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odeint(func.velocity, y0, TIMES, method="rk4")[-1].sum().backward()
    odeint(single, y0, TIMES, method="rk4")[-1].sum().backward()
    return {"error": error(gradients(func), mean(single)), "warning": " ".join(str(w.message) for w in caught)}


@case("fsdp used late")
def _():
    """A sharded module that f begins to use on the way."""
    func, single = fully_shard(new_model().func), new_model().func
    y0 = torch.randn(4, 5, dtype=torch.float64)

    def late(func):
        return lambda t, y: -y if t < 0.5 else func(t, y)

    refused = raised(odeint, late(func), y0, TIMES, method="rk4", checkpoint="step")
    for f in (func, single):
        odeint(late(f), y0, TIMES, method="rk4", checkpoint="tape")[-1].sum().backward()
    return {**refused, "error": error(gradients(func), mean(single))}


for WHERE in ("func", "root"):

    @case(f"fsdp1 {WHERE}")
    def _(where=WHERE):
        """FullyShardedDataParallel around f, which goes to the tape with a warning, or around everything."""
        model, single = new_model(method="rk4"), new_model(method="rk4")
        cpu = torch.device("cpu")
        if where == "func":
            model.func = FullyShardedDataParallel(model.func, device_id=cpu, use_orig_params=True)
        wrapped = model if where == "func" else FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backward(wrapped, own(batch()))
        backward(single, own(batch()))
        # gradients are flat, and in parts: their norms are compared
        inner = model.func if where == "func" else wrapped
        squares = torch.stack([p.grad.square().sum() for p in inner.parameters() if p.grad is not None]).sum()
        dist.all_reduce(squares)
        expected = mean(single.func if where == "func" else single)
        norm = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
        return {
            "error": ((squares.sqrt() - norm) / norm).abs().item(),
            "warning": " ".join(str(w.message) for w in caught if "func" in str(w.message)),
        }


for WRAPPER in ("ddp", "fsdp"):

    @case(f"{WRAPPER} continuous adjoint")
    def _(wrapper=WRAPPER):
        options = {"solver": odeint_adjoint, "method": "rk4", "options": {"step_size": 0.05}}
        expected = reference([batch()], **options)
        model = new_model(**options)
        model = DistributedDataParallel(model) if wrapper == "ddp" else sharded(model, "func")
        for _ in range(2):
            model.zero_grad()
            backward(model, own(batch()))
        return {"error": error(gradients(model), expected)}


@case("adjoint_params in shards")
def _():
    func = fully_shard(new_model().func)
    y0 = torch.randn(4, 5, dtype=torch.float64)
    return raised(odeint_adjoint, func, y0, TIMES, method="rk4", adjoint_params=tuple(func.parameters()))


@case("fsdp event")
def _():
    """A solve with an event, at a time of its own in every process."""
    model = new_model()
    single = copy.deepcopy(model.func)
    func = fully_shard(model.func)
    y0 = torch.full((2, 5), 0.1 * (1 + rank()), dtype=torch.float64)

    def solve(f):
        def falling(t, y):
            return f(t, y) - 2 * y - 1

        time, y = rampde.odeint_event(falling, y0, TIMES[0], event_fn=lambda t, y: y[0, 0] + 0.2)
        (time + y[-1].sum()).backward()
        return time.item()

    times = solve(func), solve(single)
    return {
        "times": abs(times[0] - times[1]),
        "time": times[0],
        "error": error(gradients(func), mean(single)),
    }


# 16 bits


for NAME in ("ddp", "fsdp"):
    for POLICY in POLICIES:

        @case(f"{NAME} autocast {POLICY}")
        def _(name=NAME, policy=POLICY):
            options = {"method": "rk4", "checkpoint": policy}
            exact = reference([batch()], method="rk4")
            alone = error(reference([batch()], torch.bfloat16, torch.float32, **options), exact)
            model = new_model(torch.float32, **options)
            model = DistributedDataParallel(model) if name == "ddp" else sharded(model, "func")
            backward(model, own(batch(torch.float32)), torch.bfloat16)
            return {"error": error(gradients(model), exact), "alone": alone}


for HOW in ("root", "func", "layers"):
    for POLICY in POLICIES:

        @case(f"fsdp mixed precision {HOW} {POLICY}")
        def _(how=HOW, policy=POLICY):
            """The parameters that f sees have 16 bits."""
            options = {"method": "rk4", "checkpoint": policy}
            exact = reference([batch()], method="rk4")
            alone = error(reference([batch()], None, torch.bfloat16, **options), exact)
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            model = sharded(new_model(torch.float32, **options), how, mp_policy=precision)
            backward(model, own(batch(torch.float32)))
            dtypes = {str(parameter.grad.dtype) for parameter in model.parameters()}
            return {"error": error(gradients(model), exact), "alone": alone, "dtypes": sorted(dtypes)}


@case("fsdp state in 32 bits")
def _():
    """f in 16 bits, sharded by itself; the state keeps its 32."""
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
    )
    func = fully_shard(new_model(torch.float32).func, mp_policy=precision)
    y0 = torch.full((4, 5), 1 + 2**-12, requires_grad=True)
    y = odeint(func, y0, TIMES.float(), method="rk4")
    y.sum().backward()
    return {"first": y[0, 0, 0].item(), "dtype": str(y.dtype), "gradient": str(y0.grad.dtype)}
