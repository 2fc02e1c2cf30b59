"""Files: written whole or not at all, checked against published sums, taken out of archives."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20


class Refused(ValueError):
    """What a program's user can put right; the message says how, and is all that is shown."""


class Absent(Refused, FileNotFoundError):
    """A file that is not there; the message says where it is to be had."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields where to write; what was written takes the place of ``path`` at the end, but not after an error."""
    part = path.with_name(f"{path.name}.part")
    yield part
    part.replace(path)


def verify(path: Path, md5: str, source: str) -> None:
    """Checks a file against its published checksum.

    Args:
        path: the file.
        md5: of it, in hexadecimal.
        source: where it is to be had.

    Raises:
        Refused: it has another one.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise Refused(
            f"{path} is not the published file: its MD5 sum is {digest.hexdigest()}, expected {md5}. "
            f"Delete it and download it again from {source}"
        )


def extract(archive: Path, members: Mapping[str, Path]) -> None:
    """Takes members out of a tar archive; each is complete under its own name, or not there.

    Args:
        archive: verified before.
        members: where each is written, by its name in the archive.

    Raises:
        Refused: the archive has no such member.
    """
    with tarfile.open(archive) as file:
        for name, path in members.items():
            try:
                content = file.extractfile(name)
            except KeyError:
                content = None
            if content is None:
                raise Refused(f"{archive} holds no file {name}: it is not the published archive")
            path.parent.mkdir(parents=True, exist_ok=True)
            with content, whole(path) as part, part.open("wb") as target:
                while chunk := content.read(CHUNK):
                    target.write(chunk)
