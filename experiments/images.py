"""Images to classify: STL-10 from its binary files, scikit-learn's digits, and generated ones in place of either.

STL-10 (Coates, Lee, Ng, An Analysis of Single Layer Networks in Unsupervised Feature Learning, AISTATS 2011) has 5000
images for training and 8000 for the test, in colour, of 96 x 96 pixels, each of one of ten classes. It is looked for in
a folder, as the published archive or as the files in it, and checked by the published MD5 sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from experiments.augmentation import Augmentation, recoloured, windows
from experiments.files import Absent, Refused, extract, verify

ARCHIVE = "stl10_binary.tar.gz"
FOLDER = "stl10_binary"
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
MD5 = {
    ARCHIVE: "91f7769df0f17e558f3565bffb0c7dfb",
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}
SOURCE = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
SHAPE = (3, 96, 96)
CLASSES = 10
# of 5000 images a fifth is held out to watch the training, as published
HELD_OUT = 0.2
# how the published experiment shows STL-10 to its network; it changes the hue as well
STL10_AUGMENTATION = Augmentation(area=(0.5, 1.0), ratio=4 / 3, flip=True, jitter=0.4, gray=0.1)
STL10_MEAN, STL10_STD = (0.4467, 0.4398, 0.4066), (0.2241, 0.2210, 0.2239)
STL10_SIDE = 128
DIGITS_AUGMENTATION = Augmentation(area=(0.9, 1.2), ratio=1.1, shift=0.5)
# digits held out to watch the training, and for the test; what is left makes whole batches of 32
DIGITS_HELD_OUT, DIGITS_TEST = 205, 600
# generated images, for training and for each of the other two
FEW = (64, 32)


@dataclass(frozen=True)
class Labelled:
    """Images (n, colours, height, width), uint8, and their classes (n,), int64, counted from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Labelled":
        """Those at ``index``, (m,), int64."""
        return Labelled(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Labelled":
        """The same on a device."""
        return Labelled(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Images for training, for watching it and for the test, and how they are shown to a network.

    Attributes:
        side: height and width in pixels that the network sees.
        mean, std: of each colour, for values from 0 to 1.
        augmentation: random changes of training images.
        synthetic: whether the images are generated, so that accuracies mean nothing.
    """

    name: str
    train: Labelled
    validation: Labelled
    test: Labelled
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    synthetic: bool = False

    def to(self, device: torch.device) -> "Dataset":
        """The same on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)

    def shown(self, images: Tensor) -> Tensor:
        """uint8 images (n, colours, height, width) as the network sees them: float32, (n, colours, side, side)."""
        pixels = self._normalized(images.float() / 255)
        if pixels.shape[-1] == self.side:
            return pixels
        return F.interpolate(pixels, (self.side, self.side), mode="bilinear")

    def augmented(self, images: Tensor) -> Tensor:
        """As :meth:`shown`, each image changed at random; the numbers are from PyTorch's generator of the CPU."""
        pixels = images.float() / 255
        if self.augmentation.jitter or self.augmentation.gray:
            pixels = recoloured(pixels, self.augmentation)
        # normalized before, so that beyond an image's edge lies the mean
        return windows(self._normalized(pixels), self.side, self.augmentation)

    def _normalized(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def load_stl10(folder: Path, quick: bool = False, checksums: Mapping[str, str] = MD5) -> Dataset:
    """STL-10: 4000 images for training, 1000 to watch it, 8000 for the test; generated ones where it is to be quick.

    Args:
        folder: where the archive ``stl10_binary.tar.gz`` lies, from which a folder ``stl10_binary`` is made there
            once, or that folder, or the files in it.
        quick: take 64, 32 and 32 generated images of the same shape, and look for no file.
        checksums: MD5 sum of the archive and of each file.

    Raises:
        FileNotFoundError: neither is there; the message says where to get it.
        ValueError: a file is not as published.
    """
    if quick:
        parts = stand_in(SHAPE)
    else:
        found = _find(folder, checksums)
        train, test = (_read(found, part) for part in ("train", "test"))
        # the same split whatever the seed of a run
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held_out = round(HELD_OUT * len(train))
        parts = (train.take(order[held_out:]), train.take(order[:held_out]), test)
    return Dataset("STL-10", *parts, STL10_SIDE, STL10_MEAN, STL10_STD, STL10_AUGMENTATION, quick)


def load_small_digits(quick: bool = False) -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels: 992 for training, 205 to watch it, 600 for the test.

    They are the test set of Alpaydin, Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998) and come without
    a split of their own. This one is random, with as much of each class in each part, and always the same.

    Args:
        quick: take 64, 32 and 32 of them.
    """
    pixels, labels = load_digits(return_X_y=True)
    # sixteen shades above white
    images = (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 1, 8, 8)
    rest, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST, random_state=0, stratify=labels)
    train, held_out = train_test_split(rest, test_size=DIGITS_HELD_OUT, random_state=0, stratify=labels[rest])
    everything = Labelled(torch.from_numpy(images), torch.from_numpy(labels).long())
    sizes = (FEW[0], FEW[1], FEW[1]) if quick else (len(train), len(held_out), len(test))
    taken, watched, tested = (
        everything.take(torch.from_numpy(index[:size]))
        for index, size in zip((train, held_out, test), sizes, strict=True)
    )
    values = taken.images.float() / 255
    return Dataset(
        "digits", taken, watched, tested, 8, (values.mean().item(),), (values.std().item(),), DIGITS_AUGMENTATION
    )


def stand_in(shape: tuple[int, int, int]) -> tuple[Labelled, Labelled, Labelled]:
    """Generated images that can be told apart: stripes, whose number and direction say the class, under noise."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape[1:]
    down, across = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")

    def some(n: int) -> Labelled:
        labels = torch.arange(n) % CLASSES
        number, direction = 2.0 + labels // 2, (labels % 2).bool().view(-1, 1, 1)
        waves = torch.sin(2 * torch.pi * number.view(-1, 1, 1) * torch.where(direction, down, across))
        noise = torch.randn(n, *shape, generator=generator)
        return Labelled((128 + 60 * waves[:, None] + 20 * noise).clamp(0, 255).to(torch.uint8), labels)

    return some(FEW[0]), some(FEW[1]), some(FEW[1])


def _find(folder: Path, checksums: Mapping[str, str]) -> Path:
    """The folder with the files, as published; extracted from the archive where only that is there."""
    for place in (folder / FOLDER, folder):
        if all((place / name).is_file() for name in FILES):
            for name in FILES:
                verify(place / name, checksums[name], SOURCE)
            return place
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise Absent(
            f"STL-10 is not in {folder.resolve()}: expected {ARCHIVE}, or {', '.join(FILES)} from it. Download it"
            f" (2.6 GB) from {SOURCE} into that folder, or use --quick for generated images, or --data digits for"
            " real ones that need no download."
        )
    verify(archive, checksums[ARCHIVE], SOURCE)
    place = folder / FOLDER
    extract(archive, {f"{FOLDER}/{name}": place / name for name in FILES})
    for name in FILES:
        verify(place / name, checksums[name], SOURCE)
    return place


def _read(folder: Path, part: str) -> Labelled:
    """ "train" or "test" from its two files: bytes of images, colour by colour, column by column; classes from 1."""
    pixels, labels = _bytes(folder / f"{part}_X.bin"), _bytes(folder / f"{part}_y.bin")
    colours, height, width = SHAPE
    if pixels.size != labels.size * colours * height * width:
        raise Refused(
            f"{folder / part}_X.bin has {pixels.size} bytes, expected {labels.size} images, as many as"
            f" {part}_y.bin has labels, of {colours * height * width} bytes"
        )
    if labels.size and not 1 <= labels.min() <= labels.max() <= CLASSES:
        raise Refused(f"{folder / part}_y.bin has labels from {labels.min()} to {labels.max()}, expected 1 to 10")
    images = torch.from_numpy(pixels).view(-1, colours, width, height).transpose(2, 3).contiguous()
    return Labelled(images, torch.from_numpy(labels).long() - 1)


def _bytes(path: Path) -> NDArray[np.uint8]:
    return np.fromfile(path, dtype=np.uint8)
