"""Who is told of the steps of a solve: callbacks, statistics, the progress bar."""

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rampde
from rampde import METHODS, odeint
from rampde.methods import ADAPTIVE, FIXED

F64 = torch.float64
Y0 = torch.tensor([[1.0, 0.3], [-0.4, 2.0]], dtype=F64)
T = torch.linspace(0, 2, 5, dtype=F64)
NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")


class Func(nn.Module):
    """Counts its evaluations, and notes what it is told under the names that it answers to."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[-0.3, 2.1], [-1.9, 0.2]], dtype=F64))
        self.calls = 0
        self.told: dict[str, list[tuple[float, Any, float]]] = {name: [] for name in names}
        for name in names:
            object.__setattr__(self, name, lambda t, y, dt, name=name: self.tell(name, t, y, dt))

    def tell(self, name: str, t: Tensor, y: Any, dt: Tensor) -> None:
        for value in (t, dt):
            assert isinstance(value, Tensor)
            assert value.shape == ()
            assert not value.requires_grad
        self.told[name].append((float(t), y, float(dt)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(y @ self.weight) * (1 + 20 * torch.exp(-50 * (t - 1) ** 2))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_callbacks_of_adaptive_methods(method: str, reverse: bool) -> None:
    """Every attempt is announced, then accepted or rejected; t is the true time, dt positive, y the state there."""
    func, t = Func(*NAMES), T.flip(0) if reverse else T
    odeint(func, Y0, t, method=method, rtol=1e-4, atol=1e-4)
    attempted, accepted, rejected = (func.told[name] for name in NAMES)
    assert len(accepted) > 3
    assert len(attempted) == len(accepted) + len(rejected)
    assert sorted(s[0::2] for s in attempted) == sorted(s[0::2] for s in [*accepted, *rejected])
    assert len(rejected) > 0
    sign, time = (-1.0, 2.0) if reverse else (1.0, 0.0)
    for start, y, dt in accepted:
        assert start == pytest.approx(time, abs=1e-12)
        assert dt > 0
        assert y.shape == Y0.shape
        assert y.dtype == F64
        assert not y.requires_grad
        time = start + sign * dt
    assert sign * (time - float(t[-1])) >= -1e-12
    assert torch.equal(accepted[0][1], Y0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", [*FIXED, "implicit_euler", "gl4"])
def test_callback_of_methods_with_fixed_steps(method: str, reverse: bool) -> None:
    func, t = Func("callback_step"), T.flip(0) if reverse else T
    y = odeint(func, Y0, t, method=method)
    told = func.told["callback_step"]
    assert [start for start, _, _ in told] == pytest.approx(t[:-1].tolist())
    assert [dt for _, _, dt in told] == pytest.approx([0.5] * 4)
    for (_, state, _), row in zip(told, y, strict=False):
        assert (state - row).abs().max() <= 1e-14


def test_callbacks_see_the_structure_of_the_state() -> None:
    class Pair(nn.Module):
        def forward(self, t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"a": -y["a"], "b": y["b"] * 1j}

        def callback_step(self, t: Tensor, y: dict[str, Tensor], dt: Tensor) -> None:
            assert y["a"].shape == (2,)
            assert y["a"].dtype == torch.float32
            assert y["b"].dtype == torch.complex64
            seen.append(float(t))

    seen: list[float] = []
    y0 = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.complex64)}
    for method in ("dopri5", "rk4"):
        seen.clear()
        odeint(Pair(), y0, torch.tensor([0.0, 0.5, 1.0]), method=method, rtol=1e-3, atol=1e-3)
        assert len(seen) >= 2


@pytest.mark.parametrize("method", ["rk4", "gl4"])
def test_callbacks_that_a_method_does_not_know_warn(method: str) -> None:
    func = Func(*NAMES)
    with pytest.warns(UserWarning, match=rf"Solver '{method}' does not support callbacks") as caught:
        odeint(func, Y0, T, method=method)
    (message,) = [str(warning.message) for warning in caught]
    assert "callback_accept_step" in message
    assert "callback_reject_step" in message
    assert "'callback_step'" not in message
    assert len(func.told["callback_step"]) == 4
    assert func.told["callback_accept_step"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(Func(*NAMES), Y0, T, method="dopri5")
        odeint(Func("callback_step"), Y0, T, method=method)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("dopri5", {"options": {"batch_axis": 0}}),
        ("implicit_adams", {"checkpoint": "tape"}),
        ("gl4", {"checkpoint": "tape"}),
    ],
    ids=["own steps", "Adams", "implicit"],
)
def test_callbacks_that_are_not_called_warn(method: str, given: dict[str, Any]) -> None:
    """Where a method that knows a callback does not call it."""
    func = Func("callback_step")
    with pytest.warns(UserWarning, match=rf"Solver '{method}' does not support callbacks \['callback_step'\]"):
        odeint(func, Y0, T, method=method, **given)
    assert func.told["callback_step"] == []


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_backward_pass_tells_nobody(method: str, checkpoint: str) -> None:
    func, y0 = Func("callback_step"), Y0.clone().requires_grad_()
    y = odeint(func, y0, T, method=method, checkpoint=checkpoint, rtol=1e-4, atol=1e-4)
    before = len(func.told["callback_step"])
    gradient = torch.autograd.grad(y.sum(), y0, create_graph=True)[0]
    torch.autograd.grad(gradient.sum(), y0)
    assert len(func.told["callback_step"]) == before >= 4


@pytest.mark.parametrize("checkpoint", ["step", "none", "tape"])
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED, "implicit_midpoint"])
def test_statistics(method: str, checkpoint: str) -> None:
    """Evaluations are those that f counts, and the sizes of the steps sum to the interval."""
    func, y0 = Func(), Y0.clone().requires_grad_()
    with rampde.stats() as stats:
        y = odeint(func, y0, T, method=method, checkpoint=checkpoint, rtol=1e-4, atol=1e-4)
    (solve,) = stats.solves
    assert solve.method == method
    assert solve.evaluations_forward == func.calls == stats.evaluations_forward
    assert solve.evaluations_backward == 0
    before = func.calls
    y.sum().backward()
    # the backward pass counts, though it runs outside
    assert solve.evaluations_backward == func.calls - before == stats.evaluations_backward
    if method != "implicit_midpoint":
        assert (solve.evaluations_backward > 0) == (checkpoint == "step")
    assert solve.evaluations_forward == before
    if checkpoint == "tape" and method == "implicit_midpoint":
        return  # taped implicit steps are not told
    assert solve.accepted == stats.accepted == len(solve.starts) == len(solve.step_sizes) == len(solve.error_ratios)
    assert solve.rejected == stats.rejected == len(solve.rejected_starts) == len(solve.rejected_sizes)
    ends = [start + size for start, size in zip(solve.starts, solve.step_sizes, strict=True)]
    assert solve.starts[0] == 0.0
    assert solve.starts[1:] == pytest.approx(ends[:-1])
    assert ends[-1] >= 2.0 - 1e-12
    assert sum(solve.step_sizes) == pytest.approx(ends[-1])
    if method in ADAPTIVE:
        assert all(0 <= ratio <= 1 for ratio in solve.error_ratios)
        assert all(ratio > 1 for ratio in solve.rejected_ratios)
    else:
        assert solve.error_ratios == [0.0] * 4
        assert solve.rejected == 0


def test_statistics_of_reverse_time() -> None:
    with rampde.stats() as stats:
        odeint(Func(), Y0, T.flip(0), rtol=1e-4, atol=1e-4)
    solve = stats.solves[0]
    assert solve.starts[0] == 2.0
    assert max(solve.step_sizes) < 0
    assert solve.starts[-1] + solve.step_sizes[-1] <= 0


def test_statistics_of_several_solves_and_nested_contexts() -> None:
    """Of nested contexts the innermost collects; outside of them nobody does."""
    odeint(Func(), Y0, T, method="rk4")
    with rampde.stats() as outer:
        odeint(Func(), Y0, T, method="rk4")
        with rampde.stats() as inner:
            odeint(Func(), Y0, T, method="euler")
            odeint(Func(), Y0, T, method="midpoint")
        odeint(Func(), Y0, T, method="heun3")
    odeint(Func(), Y0, T, method="rk4")
    assert [solve.method for solve in inner.solves] == ["euler", "midpoint"]
    assert [solve.method for solve in outer.solves] == ["rk4", "heun3"]
    assert inner.evaluations_forward == 4 * (1 + 2)
    assert outer.evaluations_forward == 4 * (4 + 3)
    assert inner.accepted == 8


def test_statistics_after_an_error() -> None:
    def fails(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise KeyError("mine")
        return -y

    with rampde.stats() as stats, pytest.raises(KeyError, match="mine"):
        odeint(fails, Y0, T, method="rk4")
    assert stats.evaluations_forward >= 1
    with rampde.stats() as after:
        odeint(Func(), Y0, T, method="rk4")
    assert len(after.solves) == 1
    assert len(stats.solves) == 1


def test_statistics_of_two_threads_are_their_own() -> None:
    results: dict[str, Any] = {}
    barrier = threading.Barrier(2)

    def work(method: str) -> None:
        with rampde.stats() as stats:
            barrier.wait()
            for _ in range(10):
                odeint(Func(), Y0, T, method=method)
        results[method] = stats

    threads = [threading.Thread(target=work, args=(method,)) for method in ("rk4", "euler")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for method, evaluations in (("rk4", 4), ("euler", 1)):
        assert [solve.method for solve in results[method].solves] == [method] * 10
        assert results[method].evaluations_forward == 10 * 4 * evaluations


def test_statistics_cost_nothing_and_change_nothing() -> None:
    plain = odeint(Func(), Y0, T, rtol=1e-5, atol=1e-5)
    with rampde.stats():
        counted = odeint(Func(), Y0, T, rtol=1e-5, atol=1e-5)
    assert torch.equal(plain, counted)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_progress(method: str, reverse: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar on the standard error, full at the end; nothing without it."""
    pytest.importorskip("tqdm")
    t = T.flip(0) if reverse else T
    expected = odeint(Func(), Y0, t, method=method)
    assert capsys.readouterr().err == ""
    y = odeint(Func(), Y0, t, method=method, progress=True)
    captured = capsys.readouterr()
    assert torch.equal(y, expected)
    assert "t 2/2" in captured.err
    assert "100%" in captured.err
    assert captured.out == ""


def test_progress_is_closed_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")

    def fails(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.9:
            raise KeyError("mine")
        return -y

    with pytest.raises(KeyError):
        odeint(fails, Y0, T, method="rk4", progress=True)
    captured = capsys.readouterr().err
    assert captured.endswith("\n")
    assert "100%" not in captured


@pytest.mark.parametrize("progress", [1, "yes", None])
def test_bad_progress(progress: Any) -> None:
    with pytest.raises(TypeError, match="progress is"):
        odeint(Func(), Y0, T, progress=progress)


def test_every_method_has_statistics() -> None:
    for method in METHODS:
        func = Func()
        with rampde.stats() as stats, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odeint(func, Y0, T, method=method, rtol=1e-3, atol=1e-3)
        assert stats.evaluations_forward == func.calls > 0, method
