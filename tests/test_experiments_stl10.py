"""The network of convolutions and its training: velocity against a dense oracle, solvers, short runs, resumption."""

import csv
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from experiment_runs import interrupted
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tqdm")
pytest.importorskip("tabulate")
pytest.importorskip("psutil")

from experiments import stl10
from experiments.conv_model import STL10, ConvolutionalOde, Sizes, Velocity
from experiments.images import Labelled, load_small_digits
from experiments.options import CHECKPOINTS
from experiments.run import Options, Precision

SMALL = Sizes(colours=1, channels=(3, 5), steps=2, pool=2, epsilon=0.1)


def randomized(module):
    """Weights and biases that differ in every piece of time."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def copy_of(model, precision):
    """The same network with the solver, dtype and arithmetic of ``precision``."""
    found = stl10.make_model(precision, SMALL)
    found.load_state_dict(model.state_dict())
    return found


def gradients(precision, model, images, weight=1.0):
    """Of ``weight`` times a linear function of the logits, over ``weight``, after all parameters; and the logits."""
    with precision.context():
        logits = model(images.to(precision.state_dtype))
    cotangent = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    loss = weight * (logits * cotangent).sum()
    found = torch.autograd.grad(precision.grad_scaler.scale(loss), list(model.parameters()))
    flat = torch.cat([gradient.double().flatten() for gradient in found])
    return logits.detach().double(), flat / (weight * precision.grad_scaler.get_scale())


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class TestVelocity:
    def test_against_dense_matrices(self):
        """f = -A^T norm(ReLU(A y + b)), where A is a matrix whose transpose is formed as such."""
        channels, height, width = 3, 4, 5
        func = randomized(Velocity(channels, pieces=3).double())
        y = torch.randn(2, channels, height, width, dtype=torch.float64)
        for piece in range(3):
            t = torch.tensor((piece + 0.5) / 3, dtype=torch.float64)
            units = torch.eye(channels * height * width, dtype=torch.float64).view(-1, channels, height, width)
            dense = F.conv2d(units, func.weights[piece], padding=1).flatten(1).T
            shift = func.biases[piece].repeat_interleave(height * width)
            features = (y.flatten(1) @ dense.T + shift).clamp(min=0).view(2, channels, -1)
            features = features - features.mean(2, keepdim=True)
            # PyTorch's instance norm adds 1e-5 to the variance
            features = features / (features.square().mean(2, keepdim=True) + 1e-5).sqrt()
            expected = -(features.flatten(1) @ dense).view_as(y)
            torch.testing.assert_close(func(t, y), expected, rtol=1e-12, atol=1e-12)

    def test_transpose_is_the_adjoint(self):
        """<A y, z> = <y, A^T z>, for the two convolutions with the same weight that f is made of."""
        func = randomized(Velocity(4, pieces=2).double())
        y, z = torch.randn(2, 3, 4, 6, 5, dtype=torch.float64)
        weight, _ = func.at(torch.tensor(0.7))
        there = (F.conv2d(y, weight, padding=1) * z).sum()
        back = (y * F.conv_transpose2d(z, weight, padding=1)).sum()
        torch.testing.assert_close(there, back, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize(
        ("t", "piece"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.49, 1), (0.5, 2), (0.99, 3), (1.0, 3), (-0.1, 0)]
    )
    def test_weights_change_with_time(self, t, piece):
        func = randomized(Velocity(2, pieces=4))
        weight, bias = func.at(torch.tensor(t))
        assert torch.equal(weight, func.weights[piece])
        assert torch.equal(bias, func.biases[piece])

    def test_only_the_piece_in_use_has_a_gradient(self):
        func = randomized(Velocity(2, pieces=4))
        func(torch.tensor(0.6), torch.randn(1, 2, 4, 4)).square().sum().backward()
        for parameter in func.parameters():
            used = [bool(piece.any()) for piece in parameter.grad]
            assert used == [False, False, True, False]

    def test_starts_with_the_same_weights_everywhere(self):
        func = Velocity(30, pieces=3)
        assert torch.equal(func.weights[0], func.weights[2])
        assert not func.biases.any()
        # 8100 numbers: the deviation of their deviation is 0.1 / sqrt(2 * 8100)
        assert abs(func.weights[0].std().item() - 0.1) < 5 * 0.1 / math.sqrt(2 * 8100)

    def test_does_not_ask_the_host(self):
        """Tensors without values cannot tell the host anything."""
        with torch.device("meta"):
            func, t, y = Velocity(3, pieces=4), torch.tensor(0.5), torch.randn(2, 3, 6, 6)
        assert func(t, y).shape == y.shape


class TestNetwork:
    def test_published_sizes(self):
        shapes = []

        def solver(func, y0, t, *, block):
            shapes.append((block, *y0.shape, sum(parameter.numel() for parameter in func.parameters())))
            return torch.stack([y0, y0 + func(t[0], y0)])

        with torch.device("meta"):
            model = ConvolutionalOde(STL10, solver)
            logits = model(torch.randn(2, 3, 128, 128))
        assert logits.shape == (2, 10)
        assert sum(parameter.numel() for parameter in model.parameters()) == 12_565_002
        assert shapes == [
            ("block 0", 2, 128, 128, 128, 590_336),
            ("block 1", 2, 256, 64, 64, 2_360_320),
            ("block 2", 2, 512, 32, 32, 9_439_232),
        ]

    @pytest.mark.parametrize("checkpoint", [name for name in CHECKPOINTS if name != "fp8"] + ["2"])
    def test_solvers_agree_in_float64(self, checkpoint):
        precision = Precision(Options(precision="fp64", checkpoint=checkpoint))
        reference = Precision(Options(precision="fp64", solver="torchdiffeq"))
        model = randomized(stl10.make_model(precision, SMALL))
        images = torch.randn(3, 1, 6, 6)
        found = gradients(precision, model, images)
        expected = gradients(reference, copy_of(model, reference), images)
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_16_bits_are_as_good_as_torchdiffeq(self, precision):
        """At most twice the error of torchdiffeq under the same autocast, in the median: ReLUs have kinks."""
        reference = Precision(Options(precision="fp64", solver="torchdiffeq"))
        errors = {"rampde": [], "torchdiffeq": []}
        for _ in range(7):
            exact = stl10.make_model(reference, SMALL)
            images = torch.randn(16, 1, 6, 6)
            expected = gradients(reference, exact, images)
            for solver, found in errors.items():
                low = Precision(Options(precision=precision, solver=solver, scaler="none"))
                those = gradients(low, copy_of(exact, low), images)
                found.append([distance(mine, its) for mine, its in zip(those, expected, strict=True)])
        mine, its = (torch.tensor(found).median(dim=0).values for found in errors.values())
        assert (mine <= 2 * its).all()

    def test_both_scalers_keep_small_gradients_between_blocks(self):
        """A loss of 1e-8 has the gradient of one of 1 with both scalers; the blocks' scalers alone lose it."""
        reference = Precision(Options(precision="fp64", solver="torchdiffeq"))
        exact = randomized(stl10.make_model(reference, SMALL))
        images = torch.randn(16, 1, 6, 6)
        _, expected = gradients(reference, exact, images)
        errors = []
        for scaler, weight in (("dynamic", 1.0), ("both", 1e-8), ("dynamic", 1e-8)):
            low = Precision(Options(precision="fp16", scaler=scaler))
            _, found = gradients(low, copy_of(exact, low), images, weight)
            errors.append(distance(found, expected))
        large, both, alone = errors
        assert both <= 2 * large
        assert alone > 4 * both

    def test_a_step_whose_gradient_overflows_is_left_out(self):
        precision = Precision(Options(precision="fp16", scaler="both"))
        precision.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        model = randomized(stl10.make_model(precision, SMALL))
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        with precision.context():
            loss = model(torch.randn(2, 1, 6, 6)).square().sum()
        precision.grad_scaler.scale(loss).backward()
        precision.grad_scaler.step(optimizer)
        precision.grad_scaler.update()
        assert precision.grad_scaler.get_scale() == 2.0**59
        for parameter, its in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, its)

    def test_epsilon_bounds_gradients(self):
        """A channel that the ReLU leaves but one tiny pixel: the gradient grows by epsilon^-1/2 and not more."""
        growth = []
        for epsilon in (1e-4, 1e-2):
            func = Velocity(1, pieces=1, epsilon=epsilon).double()
            with torch.no_grad():
                func.weights.zero_()[0, 0, 0, 1, 1] = 1
            y = torch.full((1, 1, 4, 4), -1.0, dtype=torch.float64)
            y[0, 0, 1, 1] = 1e-6
            y.requires_grad_()
            (gradient,) = torch.autograd.grad(func(torch.tensor(0.0), y)[0, 0, 1, 1], y)
            growth.append(abs(gradient[0, 0, 1, 1].item()))
        # of a channel of 16 pixels the mean takes a sixteenth
        assert growth == pytest.approx([15 / 16 * 1e2, 15 / 16 * 1e1], rel=1e-6)

    def test_each_block_has_a_scaler_of_its_own(self):
        precision = Precision(Options(precision="fp16"))
        gradients(precision, stl10.make_model(precision, SMALL), torch.randn(2, 1, 6, 6))
        assert sorted(precision.state_dict()["dynamic"]) == ["block 0", "block 1"]

    @pytest.mark.parametrize(
        "wrong", [{"channels": ()}, {"channels": (4, 0)}, {"steps": 0}, {"pool": 0}, {"epsilon": 0.0}]
    )
    def test_sizes_must_be_positive(self, wrong):
        with pytest.raises(ValueError, match="positive numbers and at least one block"):
            replace(SMALL, **wrong)


class TestJudge:
    def test_against_one_image_at_a_time(self):
        precision = Precision(Options(precision="fp32"))
        images = load_small_digits(quick=True)
        model = randomized(stl10.make_model(precision, SMALL))
        part = images.test.take(torch.arange(11))
        right, loss = 0, 0.0
        for image, label in zip(part.images, part.labels, strict=True):
            logits = model(images.shown(image[None]))[0].double()
            right += logits.argmax().item() == label.item()
            loss += (logits.logsumexp(0) - logits[label]).item() / 11
        accuracy, found = stl10.judge(precision, model, images, part, at_once=4)
        assert accuracy == pytest.approx(100 * right / 11)
        assert found == pytest.approx(loss, rel=1e-5)

    def test_perfect_network(self):
        class Oracle(nn.Module):
            def forward(self, images):
                return 10 * F.one_hot((images.flatten(1)[:, 0] * 255).round().long(), 10).float()

        images = replace(load_small_digits(quick=True), mean=(0.0,), std=(1.0,))
        labels = torch.randint(10, (7,))
        part = Labelled(labels.to(torch.uint8).view(7, 1, 1, 1).expand(7, 1, 8, 8), labels)
        precision = Precision(Options(precision="fp32"))
        assert stl10.judge(precision, Oracle(), images, part, 3)[0] == 100
        wrong = Labelled(part.images, (labels + 1) % 10)
        assert stl10.judge(precision, Oracle(), images, wrong, 3)[0] == 0


def rows_of(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses_of(folder):
    return [(row["iteration"], row["loss"], row["validation loss"]) for row in rows_of(folder)]


class TestRuns:
    @pytest.mark.parametrize(
        ("arguments", "name", "synthetic"),
        [
            (["--data", "digits", "--precision", "fp16"], "digits-rampde-fp16-dynamic-3-quick", False),
            (["--data", "stl10", "--checkpoint", "lean"], "stl10-rampde-bf16-none-lean-3-quick", True),
            (
                ["--data", "stl10", "--precision", "fp32", "--solver", "torchdiffeq"],
                "stl10-torchdiffeq-fp32-3-quick",
                True,
            ),
        ],
        ids=["digits", "stl10", "torchdiffeq"],
    )
    def test_short_run(self, arguments, name, synthetic, tmp_path, capsys):
        assert stl10.main([*arguments, "--quick", "--seed", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
        folder = tmp_path / "stl10" / name
        record = json.loads((folder / "run.json").read_text())
        assert record["status"] == "done"
        assert record["synthetic"] is synthetic
        assert "folder" not in record["config"]
        assert set(stl10.COLUMNS) <= set(record["summary"])
        assert all(math.isfinite(value) for value in record["summary"].values())
        assert 0 <= record["summary"]["test accuracy"] <= 100
        assert min(record["summary"][column] for column in stl10.COLUMNS[3:]) > 0
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
        epoch = 2 if arguments[1] == "digits" else 4
        rows = rows_of(folder)
        assert [row["iteration"] for row in rows] == ["1", "2", "3", "4"]
        assert [bool(row["validation accuracy"]) for row in rows] == [n % epoch == 0 for n in range(1, 5)]
        assert name in capsys.readouterr().out

    def test_it_learns(self, tmp_path):
        """64 digits in 25 passes over them."""
        options = stl10.ImageOptions(precision="fp32", data="digits", quick=True, epochs=25, out=str(tmp_path))
        run = stl10.run_one(options, stl10.load(options))
        _, losses = run.column("loss")
        assert len(losses) == 50
        # what knows nothing has log 10
        assert sum(losses[-4:]) / 4 < 0.8 * math.log(10)
        # and is right in 10 % of 32 images; here are five standard deviations more
        assert run.summary["test accuracy"] > 10 + 5 * (10 * 90 / 32) ** 0.5

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_killed_run_goes_on_with_the_same_curve(self, precision, tmp_path, monkeypatch):
        start = partial(stl10.ImageOptions, precision=precision, data="digits", quick=True, epochs=3)
        images = stl10.load(start())
        whole = stl10.run_one(start(out=str(tmp_path / "whole")), images)
        judge = stl10.judge
        monkeypatch.setattr(stl10, "judge", interrupted(judge, call=2))
        with pytest.raises(KeyboardInterrupt):
            stl10.run_one(start(out=str(tmp_path / "parts")), images)
        folder = tmp_path / "parts" / "stl10" / whole.name
        assert len(rows_of(folder)) == 2
        monkeypatch.setattr(stl10, "judge", judge)
        again = stl10.run_one(start(out=str(tmp_path / "parts")), images)
        assert losses_of(folder) == losses_of(whole.folder)
        for name in ("test accuracy", "test loss", "validation loss"):
            assert again.summary[name] == whole.summary[name]

    def test_without_stl10(self, tmp_path, capsys):
        assert stl10.main(["--folder", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
        assert "STL-10 is not in" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [({"data": "cifar"}, "data is 'cifar', expected one of stl10, digits"), ({"epochs": -1}, "epochs is -1")],
    )
    def test_options(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            stl10.ImageOptions(**wrong)
