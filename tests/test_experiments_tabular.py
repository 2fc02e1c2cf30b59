"""Tabular data: files in the published formats, their preparation, and what is said when they are not there."""

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py")
pytest.importorskip("pandas")

import h5py
import pandas

from experiments.tabular import MD5, SOURCES, URL, generated, load

Write = Callable[[Path, np.random.Generator], dict[str, np.ndarray]]


def write_power(folder: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
    data = random.normal(size=(57, 8))
    np.save(folder / "data.npy", data)
    return {"data": data}


def write_gas(folder: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
    # 16 sensors of which each second repeats the one before: 8 are left
    sensors = np.repeat(random.normal(size=(64, 8)), 2, axis=1) + 1e-3 * random.normal(size=(64, 16))
    names = ["Time", "Meth", "Eth", *(f"S{n}" for n in range(16))]
    data = np.hstack([np.arange(64)[:, None], random.normal(size=(64, 2)), sensors])
    pandas.DataFrame(data, columns=names).to_pickle(folder / "ethylene_CO.pickle")
    return {"data": data}


def write_hepmass(folder: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
    found = {}
    for name, rows, more in (("train", 83, 0), ("test", 41, 1)):
        label = random.integers(2, size=(rows, 1))
        # of 27 features, 6 have few values, the smallest of them often
        discrete = random.integers(2, size=(rows, 6))
        data = np.hstack([label, random.normal(size=(rows, 10)), discrete, random.normal(size=(rows, 11 + more))])
        columns = ["# label", *(f"f{n}" for n in range(27 + more))]
        pandas.DataFrame(data, columns=columns).to_csv(folder / f"1000_{name}.csv", index=False)
        found[name] = data
    return found


def write_miniboone(folder: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
    data = random.normal(size=(39, 43))
    np.save(folder / "data.npy", data)
    return {"data": data}


def write_bsds300(folder: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
    found = {name: random.normal(size=(rows, 63)) for name, rows in (("train", 9), ("validation", 3), ("test", 5))}
    with h5py.File(folder / "BSDS300.hdf5", "w") as file:
        for name, data in found.items():
            file[name] = data
    return found


WRITERS: dict[str, Write] = {
    "power": write_power,
    "gas": write_gas,
    "hepmass": write_hepmass,
    "miniboone": write_miniboone,
    "bsds300": write_bsds300,
}


def write(name: str, root: Path) -> dict[str, np.ndarray]:
    folder = root / "data" / Path(SOURCES[name].files[0]).parent
    folder.mkdir(parents=True)
    return WRITERS[name](folder, np.random.default_rng(int(torch.randint(2**31, ()))))


def scaled(data: np.ndarray, seen: np.ndarray, ddof: int = 0) -> torch.Tensor:
    return torch.from_numpy((data - seen.mean(0)) / seen.std(0, ddof=ddof)).float()


@pytest.mark.parametrize("name", SOURCES)
def test_columns_and_splits(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    splits = load(name, tmp_path)
    assert not splits.synthetic
    for rows in (splits.train, splits.validation, splits.test):
        assert rows.shape[1] == SOURCES[name].columns
        assert rows.dtype == torch.float32
        assert rows.isfinite().all()
    assert len(splits.train) > len(splits.validation) > 0


def test_dimensions_are_the_published_ones() -> None:
    assert [source.columns for source in SOURCES.values()] == [6, 8, 21, 43, 63]


def test_miniboone_is_split_and_scaled(tmp_path: Path) -> None:
    data = write("miniboone", tmp_path)["data"]
    splits = load("miniboone", tmp_path)
    # of 39 rows the last 3, and of the other 36 the last 3
    for found, rows in ((splits.train, data[:33]), (splits.validation, data[33:36]), (splits.test, data[36:])):
        torch.testing.assert_close(found, scaled(rows, data[:36]))


def test_power_loses_two_columns_and_gains_noise(tmp_path: Path) -> None:
    data = write("power", tmp_path)["data"]
    splits = load("power", tmp_path)
    order = np.arange(len(data))
    np.random.RandomState(42).shuffle(order)
    used = data[order][:, [0, 2, 4, 5, 6, 7]]
    found = torch.cat([splits.train, splits.validation, splits.test]).double().numpy()
    # the scale of noise up to 1 is not known from outside: each column is an affine function of what it should be
    for column, noise in enumerate((1e-3, 1e-2, 1, 1, 1, 0)):
        matrix = np.stack([found[:, column], np.ones(len(found))], axis=1)
        solution = np.linalg.lstsq(matrix, used[:, column], rcond=None)[0]
        rest = np.abs(matrix @ solution - used[:, column]).max()
        # uniform noise of that width, less its mean; the fit can only make it less, and float32 rounds
        assert rest <= noise + 1e-5
        assert rest > 0.2 * noise
    # seen by train and validation: 52 of 57 rows
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [47, 5, 5]
    np.testing.assert_allclose(found[:52].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(found[:52].std(0), 1, atol=1e-6)
    torch.testing.assert_close(load("power", tmp_path).train, splits.train, rtol=0, atol=0)


def test_gas_keeps_one_of_related_columns(tmp_path: Path) -> None:
    data = write("gas", tmp_path)["data"]
    splits = load("gas", tmp_path)
    kept = data[:, 4::2]
    expected = scaled(kept, kept, ddof=1)
    torch.testing.assert_close(torch.cat([splits.train, splits.validation, splits.test]), expected)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [53, 5, 6]


def test_hepmass_keeps_the_signal_without_discrete_features(tmp_path: Path) -> None:
    written = write("hepmass", tmp_path)
    splits = load("hepmass", tmp_path)
    train, test = (written[part][written[part][:, 0] == 1][:, 1:28] for part in ("train", "test"))
    used = [*range(10), *range(16, 27)]
    last = len(train) // 10
    torch.testing.assert_close(splits.train, scaled(train[:, used], train[:, used], ddof=1)[:-last])
    torch.testing.assert_close(splits.validation, scaled(train[:, used], train[:, used], ddof=1)[-last:])
    torch.testing.assert_close(splits.test, scaled(test[:, used], train[:, used], ddof=1))


def test_bsds300_is_as_it_is(tmp_path: Path) -> None:
    written = write("bsds300", tmp_path)
    splits = load("bsds300", tmp_path)
    for name, found in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        assert torch.equal(found, torch.from_numpy(written[name]).float())


@pytest.mark.parametrize("name", ["miniboone", "hepmass"])
def test_archive_is_verified_and_unpacked(name: str, tmp_path: Path) -> None:
    write(name, tmp_path / "made")
    expected = load(name, tmp_path / "made")
    (tmp_path / "there").mkdir()
    archive = tmp_path / "there" / "data.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "made" / "data", "data")
    with pytest.raises(ValueError, match=f"expected {MD5}"):
        load(name, tmp_path / "there")
    assert not (tmp_path / "there" / "data").exists()
    found = load(name, tmp_path / "there", md5=hashlib.md5(archive.read_bytes()).hexdigest())
    assert torch.equal(found.train, expected.train)
    assert torch.equal(found.test, expected.test)


@pytest.mark.parametrize("name", SOURCES)
def test_missing_file_is_explained(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    for words in (name, URL, str(tmp_path), "--quick", "--folder"):
        assert words in str(caught.value)


def test_other_columns_and_names_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "miniboone"
    folder.mkdir(parents=True)
    np.save(folder / "data.npy", np.random.default_rng(0).normal(size=(30, 50)))
    with pytest.raises(ValueError, match=r"\(50,\) when prepared, expected \(43,\)"):
        load("miniboone", tmp_path)
    with pytest.raises(ValueError, match="expected one of power, gas"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_generated_data_have_the_shape_and_come_from_the_seed(name: str) -> None:
    splits = generated(name, 237, seed=3)
    assert splits.synthetic
    assert [tuple(part.shape) for part in (splits.train, splits.validation, splits.test)] == [
        (rows, SOURCES[name].columns) for rows in (193, 21, 23)
    ]
    seen = torch.cat([splits.train, splits.validation]).double()
    assert seen.mean(0).abs().max() < 1e-6
    assert (seen.std(0, correction=0) - 1).abs().max() < 1e-6
    # correlated, as what a flow is to learn
    assert torch.corrcoef(seen.T).tril(-1).abs().max() > 0.2
    assert torch.equal(generated(name, 237, seed=3).train, splits.train)
    assert not torch.equal(generated(name, 237, seed=4).train, splits.train)
    with pytest.raises(ValueError, match="at least 100"):
        generated(name, 99, seed=0)
