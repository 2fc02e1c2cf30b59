"""Checkpoint policies that users write, and what is said of those that make no sense."""

import pytest
import torch
from policies import Net, gradients

from rampde import Checkpoint, Fp8, Offload, odeint


class TestOwnPolicies:
    def test_steps_left_out_are_counted(self):
        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)

        class EveryFourth(Checkpoint):
            def schedule(self, step, end, kept):
                return kept if step % 4 else (*kept, step)

        _, solve = gradients(net, y0, torch.linspace(0, 1, 10), EveryFourth(), method="euler")
        # 9 steps: from 8 none, from 4 and from 0: 3 + 2 + 1
        assert solve.steps_again == 12
        assert solve.checkpoint == "EveryFourth(step)"

    def test_form_of_its_own(self):
        class InEightBits(Checkpoint):
            def store(self, state):
                return state.to(torch.float8_e5m2), state.dtype

            def load(self, stored):
                state, dtype = stored
                return state.to(dtype)

        net = Net()
        y0 = torch.randn(3, 5, requires_grad=True)
        t = torch.linspace(0, 1, 9)
        exact, _ = gradients(net, y0, t, "step", method="rk4", parameters=[*net.parameters()])
        rough, _ = gradients(net, y0, t, InEightBits(), method="rk4", parameters=[*net.parameters()])
        for one, other in zip(rough, exact, strict=True):
            assert 0 < (one - other).norm() / other.norm() < 0.2

    def test_prefetch_comes_before_load(self):
        calls = []

        class Noted(Checkpoint):
            def store(self, state):
                return [state, None]

            def prefetch(self, stored):
                calls.append(("prefetch", id(stored)))

            def load(self, stored):
                calls.append(("load", id(stored)))
                return stored[0]

        gradients(Net(), torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, 4), Noted(), method="rk4")
        kinds = [kind for kind, _ in calls]
        assert kinds == ["load", "prefetch", "load", "prefetch", "load"]
        assert calls[1][1] == calls[2][1]
        assert calls[3][1] == calls[4][1]

    @pytest.mark.parametrize("returned", [(), (1,), (0, 7), (0, 5)])
    def test_schedule_that_makes_no_sense(self, returned):
        class Wrong(Checkpoint):
            def schedule(self, step, end, kept):
                return (*kept, step) if step < 3 else returned

        with pytest.raises(ValueError, match=r"the schedule of Wrong\('step'\) gave .* before step 3, expected"):
            gradients(Net(), torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, 9), Wrong(), method="rk4")

    def test_schedule_and_stages_that_do_not_go_together(self):
        class Some(Checkpoint):
            def schedule(self, step, end, kept):
                return kept or (0,)

        for stages in ("none", "stage", "tape"):
            with pytest.raises(ValueError, match="whose schedule leaves steps out while stages is"):
                odeint(Net(), torch.randn(3, 5), torch.linspace(0, 1, 9), method="rk4", checkpoint=Some(stages))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("everything", ValueError, 'checkpoint is "everything", expected one of "auto", "none", "stage"'),
        (0, ValueError, "checkpoint is 0, expected .*, which is positive"),
        (-3, ValueError, "checkpoint is -3, expected"),
        (True, TypeError, "checkpoint is True, expected one of"),
        (2.0, TypeError, "checkpoint is 2.0, expected one of"),
        (None, TypeError, "checkpoint is None, expected one of"),
        (Fp8, TypeError, "checkpoint is <class .*Fp8'>, expected one of .* an instance of rampde.Checkpoint"),
    ],
)
def test_bad_checkpoint(given, error, message):
    with pytest.raises(error, match=message):
        odeint(Net(), torch.randn(3, 5), torch.linspace(0, 1, 3), method="rk4", checkpoint=given)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Checkpoint("all"), ValueError, "stages is 'all', expected one of"),
        (lambda: Fp8("none"), ValueError, 'stages is \'none\', expected "step" or "lean"'),
        (lambda: Fp8(stochastic=1), TypeError, "stochastic is 1, expected True or False"),
        (lambda: Fp8(seed=0.5), TypeError, "seed is 0.5, expected an integer"),
        (lambda: Offload("tape"), ValueError, "policy is tape, which cannot be offloaded"),
        (lambda: Offload("auto"), ValueError, "policy is auto, which cannot be offloaded"),
        (lambda: Offload(Offload()), ValueError, "policy is offload step, which cannot be offloaded"),
        (lambda: Offload("step", folder=3), TypeError, "folder is 3, expected a path or None"),
    ],
)
def test_bad_policies(make, error, message):
    with pytest.raises(error, match=message):
        make()
