"""Files of the experiments: whole or not there, verified, taken out of archives."""

import hashlib
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("torchdiffeq")

from experiments.files import Absent, Refused, extract, verify, whole


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("old")

    def cut_off() -> None:
        with whole(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert path.read_text() == "old"
    with whole(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("length", [0, 1, (1 << 20) + 3])
def test_checksums(length: int, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(n % 251 for n in range(length)))
    right = hashlib.md5(path.read_bytes()).hexdigest()
    verify(path, right, "https://example.org/data.bin")
    with pytest.raises(Refused, match=rf"{right}, expected {'0' * 32}. Delete it .* from https://example.org"):
        verify(path, "0" * 32, "https://example.org/data.bin")


def test_an_extraction_that_is_cut_off_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1" * 3_000_000)
    (tmp_path / "two").write_bytes(bytes(n * n % 253 for n in range(3_000_000)))
    archive, cut = tmp_path / "all.tar", tmp_path / "cut.tar"
    with tarfile.open(archive, "w") as file:
        for name in ("one", "two"):
            file.add(tmp_path / name, f"data/{name}")
    cut.write_bytes(archive.read_bytes()[:5_000_000])
    targets = {f"data/{name}": tmp_path / "out" / name for name in ("one", "two")}
    with pytest.raises(tarfile.ReadError):
        extract(cut, targets)
    assert not (tmp_path / "out" / "two").exists()
    extract(archive, targets)
    for name in ("one", "two"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(Refused, match="holds no file data/three"):
        extract(archive, {"data/three": tmp_path / "three"})


def test_absent_files_are_refused_and_not_found() -> None:
    assert issubclass(Absent, Refused)
    assert issubclass(Absent, FileNotFoundError)
