"""After an exception inside func everything is as before, and the next solve is as on a fresh module."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampde import DynamicScaler, odeint

STEPS, STAGES = 3, 4
EVALUATIONS = STEPS * STAGES
T = torch.linspace(0.0, 1.0, STEPS + 1)


class Fault(Exception):
    """What the network raises; no library catches it by accident."""


class Net(nn.Module):
    """A network with parameters, a frozen one, a buffer that it reads, dropout, and a fuse."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator))
        self.frozen = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
        self.register_buffer("bias", torch.randn(3, generator=generator))
        self.dropout = nn.Dropout(0.3)
        self.calls = 0
        self.fuse: int | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        y = self.dropout(y)
        if self.calls == self.fuse:
            # what a network may have switched when it fails is its own to restore: this one switches nothing
            raise Fault(f"evaluation {self.calls}")
        return torch.tanh(y @ self.weight + self.bias.to(y.dtype) + self.frozen.to(y.dtype))


def values(tensor: Tensor) -> Any:
    """Everything about a tensor that a solve could change."""
    grad = tensor.grad.clone() if tensor.is_leaf and tensor.grad is not None else None
    fields = (
        id(tensor),
        tensor.data_ptr(),
        tensor.dtype,
        tensor.requires_grad,
        tensor.is_leaf,
        tensor._version,
    )
    return fields, tensor.detach().clone(), grad


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def snapshot(net: Net, tensors: list[Tensor], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": {name: values(parameter) for name, parameter in net.named_parameters()},
        "buffers": {name: values(buffer) for name, buffer in net.named_buffers()},
        "training": net.training,
        "hooks": [len(net._forward_hooks), len(net._forward_pre_hooks), len(net._backward_hooks)],
        "attributes": sorted(vars(net)),
        "arguments": [values(tensor) for tensor in tensors],
        "options": dict(options),
        "random": torch.get_rng_state(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "flags": (
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        ),
        "modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "warnings": list(warnings.filters),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


ROADS = [("step", None), ("none", None), ("tape", None), ("step", DynamicScaler), ("none", DynamicScaler)]
IDS = ["step", "none", "tape", "step-scaled", "none-scaled"]


@pytest.fixture(params=[None, torch.bfloat16, torch.float16], ids=["plain", "bf16", "fp16"])
def autocast(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.autocast("cpu", request.param or torch.bfloat16, enabled=request.param is not None):
        yield


def new_problem() -> tuple[Net, Tensor, Tensor, dict[str, Any]]:
    y0 = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
    return Net(), y0, T.clone().requires_grad_(), {"step_size": 1.0 / STEPS}


def solve(net: Net, y0: Tensor, t: Tensor, options: dict[str, Any], road: tuple[str, Any]) -> Tensor:
    scaler = None if road[1] is None else road[1]()
    return odeint(net, y0, t, method="rk4", options=options, checkpoint=road[0], loss_scaler=scaler, compensated=True)


def results(net: Net, y0: Tensor, t: Tensor, options: dict[str, Any], road: tuple[str, Any]) -> list[Tensor | None]:
    torch.manual_seed(3)
    y = solve(net, y0, t, options, road)
    (y * torch.arange(3)).sum().backward()
    return [y.detach(), y0.grad, t.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("road", ROADS, ids=IDS)
@pytest.mark.parametrize("evaluation", [1, 3, EVALUATIONS], ids=["first", "third", "last"])
def test_exception_in_the_forward(autocast: None, road: tuple[str, Any], evaluation: int) -> None:
    net, y0, t, options = new_problem()
    expected = results(*new_problem(), road)
    net.weight.grad = torch.ones(3, 3)
    torch.manual_seed(1)
    before = snapshot(net, [y0, t], options)
    net.fuse = evaluation
    with pytest.raises(Fault, match=f"evaluation {evaluation}"):
        solve(net, y0, t, options, road)
    random = torch.get_rng_state()
    torch.set_rng_state(before["random"])
    assert differences(before, snapshot(net, [y0, t], options)) == []

    # random numbers were drawn as by f alone: once an evaluation, no others
    torch.manual_seed(1)
    twin = Net()
    for _ in range(evaluation):
        twin(t, y0)
    assert torch.equal(random, torch.get_rng_state())

    net.fuse, net.weight.grad = None, None
    assert same(expected, results(net, y0, t, options, road))


@pytest.mark.parametrize("scaler", [None, DynamicScaler], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("evaluation", [1, 3, EVALUATIONS], ids=["first", "third", "last"])
def test_exception_in_the_recomputation(autocast: None, scaler: Any, evaluation: int) -> None:
    road = ("step", scaler)
    net, y0, t, options = new_problem()
    expected = results(*new_problem(), road)
    y = solve(net, y0, t, options, road)
    net.weight.grad = torch.ones(3, 3)
    net.fuse = net.calls + evaluation
    torch.manual_seed(5)
    before = snapshot(net, [y0, t, y], options)
    with pytest.raises(Fault, match=f"evaluation {EVALUATIONS + evaluation}"):
        y.sum().backward()
    # the random state too: the recomputation draws the forward's numbers and puts the caller's state back
    assert differences(before, snapshot(net, [y0, t, y], options)) == []
    net.fuse, net.weight.grad = None, None
    assert same(expected, results(net, y0, t, options, road))


@pytest.mark.parametrize("road", ROADS, ids=IDS)
def test_exception_in_the_backward_of_func(autocast: None, road: tuple[str, Any]) -> None:
    class Faulty(torch.autograd.Function):
        armed = True

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            if Faulty.armed:
                raise Fault("backward")
            return grads[0]

    class FaultyNet(Net):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return Faulty.apply(super().forward(t, y))

    net, (_, y0, t, options) = FaultyNet(), new_problem()
    y = solve(net, y0, t, options, road)
    torch.manual_seed(5)
    before = snapshot(net, [y0, t, y], options)
    with pytest.raises(Fault, match="backward"):
        y.sum().backward()
    assert differences(before, snapshot(net, [y0, t, y], options)) == []
    Faulty.armed = False
    assert same(results(*new_problem(), road), results(net, y0, t, options, road))


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
def test_clean_solve_leaves_everything_as_it_was(autocast: None, checkpoint: str) -> None:
    net, y0, t, options = new_problem()
    net.eval()
    before = snapshot(net, [y0, t], options)
    y = solve(net, y0, t, options, (checkpoint, None))
    assert differences(before, snapshot(net, [y0, t], options)) == []
    gradients = torch.autograd.grad(y.sum(), [y0, t, net.weight])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert differences(before, snapshot(net, [y0, t], options)) == []


def test_a_later_backward_of_the_same_solve_after_an_exception() -> None:
    # the recomputation failed, not the solve: once f works again the backward does too
    net, y0, t, options = new_problem()
    expected = results(*new_problem(), ("step", None))
    torch.manual_seed(3)
    y = solve(net, y0, t, options, ("step", None))
    net.fuse = net.calls + 3
    loss = (y * torch.arange(3)).sum()
    with pytest.raises(Fault):
        loss.backward(retain_graph=True)
    net.fuse = None
    loss.backward()
    assert same(expected, [y.detach(), y0.grad, t.grad, *(parameter.grad for parameter in net.parameters())])


def test_module_is_picklable_and_copyable_after_a_solve() -> None:
    # nothing of a solve stays on the module: neither hooks nor graphs nor tensors that cannot be copied
    net, y0, t, options = new_problem()
    solve(net, y0, t, options, ("none", None)).sum().backward()
    twin = copy.deepcopy(net)
    assert sorted(vars(twin)) == sorted(vars(Net()))
