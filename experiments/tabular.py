"""The five tabular data sets on which density estimators are compared, as published with the MAF experiments.

The files are those of the archive of Papamakarios, "Preprocessed datasets for MAF experiments" (doi
10.5281/zenodo.1161203), and their preparation is that of Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow
for Density Estimation" (arXiv 1705.07057, appendix D): which columns are used, the noise, the splits, the scales.

    POWER 6, GAS 8, HEPMASS 21, MINIBOONE 43, BSDS300 63 columns

Of the archive a checksum is published; it is verified before anything is taken out. A folder into which the archive was
unpacked is read as it is. Where there is neither, generated data of the same shape can take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.files import Absent, Refused, extract, verify

ARCHIVE = "data.tar.gz"
URL = f"https://zenodo.org/record/1161203/files/{ARCHIVE}"
MD5 = "9b9c9b0375315ad270eba4ce80c093ab"

Array = npt.NDArray[np.float64]
Parts = tuple[Array, Array, Array]


@dataclass(frozen=True)
class Splits:
    """Rows of a data set, float32.

    Attributes:
        train, validation, test: (n, d) each.
        synthetic: they are generated, in place of the published ones.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    synthetic: bool = False


def _cut(data: Array) -> Parts:
    """The last tenth of the rows is for tests, and of the others the last tenth for validation."""
    rest, test = np.split(data, [len(data) - len(data) // 10])
    train, validation = np.split(rest, [len(rest) - len(rest) // 10])
    return train, validation, test


def _standardized(parts: Parts) -> Parts:
    """All parts in the scale of train and validation together."""
    seen = np.concatenate(parts[:2])
    mean, deviation = seen.mean(axis=0), seen.std(axis=0)
    train, validation, test = ((part - mean) / deviation for part in parts)
    return train, validation, test


def _power(folder: Path) -> Parts:
    """Household power: without reactive power and intensity, which others determine, and with noise on what is
    rounded."""
    data = np.load(folder / "power" / "data.npy")
    # order and noise are those of this generator from this seed
    random = np.random.RandomState(42)
    random.shuffle(data)
    data = np.delete(data, [1, 3], axis=1)
    rows = len(data)
    voltage, power = 0.01 * random.rand(rows, 1), 0.001 * random.rand(rows, 1)
    noise = np.hstack([power, voltage, random.rand(rows, 3), np.zeros((rows, 1))])
    return _standardized(_cut(data + noise))


def _gas(folder: Path) -> Parts:
    """Gas sensors: without the time and the concentrations, and of columns correlated above 0.98 only the last."""
    import pandas

    table = pandas.read_pickle(folder / "gas" / "ethylene_CO.pickle").drop(columns=["Meth", "Eth", "Time"])
    while True:
        related = np.flatnonzero((table.corr().to_numpy() > 0.98).sum(axis=1) > 1)
        if not len(related):
            break
        table = table.drop(columns=table.columns[related[0]])
    return _cut(((table - table.mean()) / table.std()).to_numpy())


def _hepmass(folder: Path) -> Parts:
    """Particle collisions: the signal alone, without columns whose smallest value occurs more than five times."""
    import pandas

    tables = []
    for name in ("1000_train.csv", "1000_test.csv"):
        table = pandas.read_csv(folder / "hepmass" / name, index_col=False)
        tables.append(table[table.iloc[:, 0] == 1].iloc[:, 1:])
    # the test table has a column more than the other
    train, test = tables[0], tables[1].iloc[:, :-1]
    mean, deviation = train.mean(), train.std()
    seen, unseen = ((table - mean).div(deviation).to_numpy() for table in (train, test))
    used = (seen == seen.min(axis=0)).sum(axis=0) <= 5
    seen, unseen = seen[:, used], unseen[:, used]
    train, validation = np.split(seen, [len(seen) - len(seen) // 10])
    return train, validation, unseen


def _miniboone(folder: Path) -> Parts:
    """Neutrino events, prepared before they were published."""
    return _standardized(_cut(np.load(folder / "miniboone" / "data.npy")))


def _bsds300(folder: Path) -> Parts:
    """Patches of natural images, split before they were published."""
    import h5py

    with h5py.File(folder / "BSDS300" / "BSDS300.hdf5", "r") as file:
        train, validation, test = (file[name][:] for name in ("train", "validation", "test"))
    return train, validation, test


@dataclass(frozen=True)
class Source:
    """A data set of the archive.

    Attributes:
        columns: that are left when it is prepared.
        files: in the archive, below ``data``.
        read: prepares it, from the folder with the files.
    """

    columns: int
    files: tuple[str, ...]
    read: Callable[[Path], Parts]


SOURCES: Mapping[str, Source] = {
    "power": Source(6, ("power/data.npy",), _power),
    "gas": Source(8, ("gas/ethylene_CO.pickle",), _gas),
    "hepmass": Source(21, ("hepmass/1000_train.csv", "hepmass/1000_test.csv"), _hepmass),
    "miniboone": Source(43, ("miniboone/data.npy",), _miniboone),
    "bsds300": Source(63, ("BSDS300/BSDS300.hdf5",), _bsds300),
}


def load(name: str, folder: Path, md5: str = MD5) -> Splits:
    """A data set as published, from ``folder/data.tar.gz`` or from what was unpacked of it below ``folder/data``.

    Args:
        name: "power", "gas", "hepmass", "miniboone" or "bsds300".
        folder: where the archive is, or was unpacked. GAS is a pickle: unpack it only from an archive that you trust;
            the one that this function opens is verified first.
        md5: checksum of the archive, in hexadecimal; that which is published with it.

    Returns:
        Its rows, prepared and split as in the paper.

    Raises:
        ValueError: no such data set, an archive with another checksum, or other columns than expected.
        FileNotFoundError: neither archive nor files; the message says where they come from.
    """
    source = _source(name)
    unpacked = folder / "data"
    if not all((unpacked / file).is_file() for file in source.files):
        archive = folder / ARCHIVE
        if not archive.is_file():
            missing = ", ".join(str(unpacked / file) for file in source.files)
            raise Absent(
                f"the data set {name} is not there: expected {archive} or {missing}. Download {URL} into "
                f"{folder}, or choose another folder with --folder; --quick runs on generated data"
            )
        verify(archive, md5, URL)
        extract(archive, {f"data/{member}": unpacked / member for member in source.files})
    parts = source.read(unpacked)
    for part in parts:
        if part.ndim != 2 or part.shape[1] != source.columns:
            raise Refused(
                f"{name} in {unpacked} has rows of shape {part.shape[1:]} when prepared, expected ({source.columns},): "
                f"these are not the files of {URL}"
            )
    return _splits(parts, synthetic=False)


def generated(name: str, rows: int, seed: int) -> Splits:
    """Data of the shape of a data set: a mixture of five Gaussians with correlated columns, standardized.

    Args:
        name: whose shape it is.
        rows: of all splits together; at least 100.
        seed: of the numbers.

    Raises:
        ValueError: no such data set, or too few rows.
    """
    columns = _source(name).columns
    if rows < 100:
        raise ValueError(f"rows is {rows}, expected at least 100")
    random = np.random.default_rng(seed)
    centres = random.normal(size=(5, columns))
    mixing = random.normal(size=(5, columns, columns)) / np.sqrt(columns)
    which = random.integers(5, size=rows)
    data = centres[which] + 0.5 * np.einsum("nij,nj->ni", mixing[which], random.normal(size=(rows, columns)))
    return _splits(_standardized(_cut(data)), synthetic=True)


def _splits(parts: Parts, synthetic: bool) -> Splits:
    train, validation, test = (torch.from_numpy(np.ascontiguousarray(part, np.float32)) for part in parts)
    return Splits(train, validation, test, synthetic)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"the data set is {name!r}, expected one of {', '.join(SOURCES)}")
    return SOURCES[name]
