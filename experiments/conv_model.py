"""A classifier of images by neural ODEs of convolutions, as published for STL-10, in any size.

A stem makes channels of an image; in each block the channels follow y' = f(t, y) from t = 0 to 1 with

    f(t, y) = -A(t)^T norm(ReLU(A(t) y + b(t))),

A(t) a convolution of 3 x 3 pixels whose weights, as the bias b(t), are constant on equal pieces of time, and norm
subtracts the mean and divides by the standard deviation of each channel of each image; between two blocks a connector
makes more channels of fewer pixels; the head is linear in means of the channels.

The network, its sizes and its initial weights are those of Celledoni, Owren, Ruthotto, Yang, Mixed Precision Training
of Neural ODEs, arXiv 2510.23498.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Solver(Protocol):
    """How dy/dt = func(t, y) is solved: the states (T, *y0.shape) at the times t, the first of which is y0's.

    ``block`` is the name of the part of the network, unique in it.
    """

    def __call__(self, func: nn.Module, y0: Tensor, t: Tensor, *, block: str) -> Tensor: ...


# standard deviation of A's weights before training, whatever the number of channels
INITIAL_WEIGHT = 0.1


@dataclass(frozen=True)
class Sizes:
    """What the network is made of.

    Attributes:
        colours: channels of an image.
        channels: channels in each block; from one block to the next, pixels halve along both axes.
        steps: steps of the method in each block, as many as there are pieces of A(t).
        pool: the head is linear in the means of each channel over pool x pool parts of the image.
        classes: what is told apart.
        epsilon: added to the variance in f's norm. Where a ReLU leaves next to nothing of a channel, gradients grow by
            up to epsilon^-1/2; with few pixels there are many such channels, and 16 bits do not bear a small epsilon.

    Raises:
        ValueError: a number that is not positive, or no block.
    """

    colours: int
    channels: tuple[int, ...]
    steps: int = 4
    pool: int = 1
    classes: int = 10
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        numbers = (self.colours, *self.channels, self.steps, self.pool, self.classes, self.epsilon)
        if not self.channels or min(numbers) <= 0:
            raise ValueError(f"expected positive numbers and at least one block, got {self}")


# 12,565,002 parameters: 128 channels of 128 x 128 pixels, 256 of 64 x 64, 512 of 32 x 32
STL10 = Sizes(colours=3, channels=(128, 256, 512))
# 8,650 parameters: 8 channels of 8 x 8 pixels, 16 of 4 x 4
DIGITS = Sizes(colours=1, channels=(8, 16), steps=2, pool=4, epsilon=0.1)


class Velocity(nn.Module):
    """f(t, y) = -A(t)^T norm(ReLU(A(t) y + b(t))) for y (n, channels, height, width) and t, 0-dim, from 0 to 1.

    Args:
        channels: of y.
        pieces: equal intervals of time in each of which A and b are constant; all start with the same values.
        epsilon: see :class:`Sizes`.
    """

    def __init__(self, channels: int, pieces: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        weight = INITIAL_WEIGHT * torch.randn(channels, channels, 3, 3)
        self.pieces, self.epsilon = pieces, epsilon
        self.weights = nn.Parameter(weight.repeat(pieces, 1, 1, 1, 1))
        self.biases = nn.Parameter(torch.zeros(pieces, channels))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A's weight (channels, channels, 3, 3) and b (channels,) at t, the later ones where two pieces meet.

        They are looked up on the device of t: the host does not wait, as it would for t.item().
        """
        piece = (self.pieces * t).long().clamp(0, self.pieces - 1).reshape(1)
        return self.weights.index_select(0, piece)[0], self.biases.index_select(0, piece)[0]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt, shaped as y."""
        weight, bias = self.at(t)
        features = F.instance_norm(F.relu(F.conv2d(y, weight, bias, padding=1)), eps=self.epsilon)
        return -F.conv_transpose2d(features, weight, padding=1)


class ConvolutionalOde(nn.Module):
    """The classifier: images (n, colours, height, width) to logits (n, classes).

    Logits are float32, also under autocast; float64 in a float64 network.

    Args:
        sizes: of the network.
        solver: of the ODEs, from t = 0 to 1, with the end of each step as a time of its own.
    """

    t: Tensor

    def __init__(self, sizes: Sizes, solver: Solver) -> None:
        super().__init__()
        first, last = sizes.channels[0], sizes.channels[-1]
        self.solver = solver
        self.register_buffer("t", torch.linspace(0, 1, sizes.steps + 1), persistent=False)
        self.stem = nn.Sequential(
            nn.Conv2d(sizes.colours, first, 3, padding=1), nn.InstanceNorm2d(first, affine=True), nn.ReLU()
        )
        self.velocities = nn.ModuleList(Velocity(channels, sizes.steps, sizes.epsilon) for channels in sizes.channels)
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ins, outs, 1), nn.InstanceNorm2d(outs, affine=True), nn.ReLU(), nn.AvgPool2d(2))
            for ins, outs in pairwise(sizes.channels)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(sizes.pool), nn.Flatten(), nn.Linear(last * sizes.pool**2, sizes.classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        y = self.stem(images)
        for index, velocity in enumerate(self.velocities):
            if index > 0:
                y = self.connectors[index - 1](y)
            y = self.solver(velocity, y, self.t, block=f"block {index}")[-1]
        logits: Tensor = self.head(y)
        # a loss is summed in 32 bits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
