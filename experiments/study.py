"""Studies: rows that are kept as they are measured, so that a study that was cut off goes on where it was."""

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from experiments.files import whole
from experiments.options import Options

Row = dict[str, Any]
S = TypeVar("S", bound="StudyOptions")
# options of a single solve
CHOSEN = ("solver", "precision", "scaler", "checkpoint")


class Study:
    """The rows of ``study.csv``: each is measured once, and on the disk before the next one begins.

    Args:
        path: the file; its folder exists. Rows that are in it already are not measured again.
        fresh: forget what the file holds.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self._known: list[Row] = read_rows(path) if path.exists() and not fresh else []
        self.rows: list[Row] = []

    def row(self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
        """The row of ``key``, its columns that say what is measured: the file's, else ``measure()`` beside the key."""
        # as the file gives them back, so that a value is the same whether it was measured now or before
        wanted = {name: _value(str(value)) for name, value in key.items()}
        found = next((row for row in self._known if wanted.items() <= row.items()), None)
        if found is None:
            found = {**wanted, **measure()}
            self._known.append(found)
            self._write(self._known)
        self.rows.append(found)
        return found

    def _write(self, rows: list[Row]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with whole(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file; numbers as int or float, True and False as bool, empty fields as None."""
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items() if name} for row in csv.DictReader(file)]


def _value(text: str | None) -> Any:
    if text in (None, "", "None"):
        return None
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class StudyOptions(Options):
    """Options of a study, which goes through precisions, solvers, scalers and checkpoints by itself.

    Attributes:
        only: of these four those that were given: the study keeps to them.

    Raises:
        ValueError: also where several runs are asked for.
    """

    is_study: ClassVar[bool] = True

    only: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare or self.seeds != 1:
            raise ValueError(
                "a study compares precisions and solvers by itself, with one seed: no --compare, no --seeds"
            )

    @property
    def config(self) -> dict[str, Any]:
        """All that the study's numbers depend on, as JSON can hold it."""
        found = {name: value for name, value in super().config.items() if name not in CHOSEN}
        return found | {"only": [" ".join(pair) for pair in self.only]}

    def takes(self, options: Options) -> bool:
        """Whether these options are among those that the study keeps to."""
        return all(getattr(options, name) == value for name, value in self.only)

    @classmethod
    def parser(cls, experiment: str, description: str) -> argparse.ArgumentParser:
        """A parser of the common options, in which those that the study chooses have no default."""
        parser = super().parser(experiment, description)
        parser.epilog = "The study takes every precision, solver, scaler and checkpoint, or only those given."
        parser.set_defaults(**dict.fromkeys(CHOSEN, ""))
        return parser

    @classmethod
    def read(
        cls: type[S],
        parser: argparse.ArgumentParser,
        arguments: Sequence[str] | None = None,
        variants: Callable[[S], Sequence[Any]] | None = None,
    ) -> S:
        """The options of a command line; where they are none, or leave no variant, the parser says so and exits."""
        found = vars(parser.parse_args(arguments))
        only = tuple((name, value) for name in CHOSEN if (value := found.pop(name)))
        try:
            options = cls(only=only, **found)
        except ValueError as error:
            parser.error(str(error))
        if variants is not None and not variants(options):
            kept = ", ".join(" ".join(pair) for pair in only)
            parser.error(f"the study has nothing with {kept}: leave one of these out")
        return options

    @property
    def run_name(self) -> str:
        """Whether it is the short one, what the study keeps to, and a seed that is not 0, as the name of a run."""
        seed = [f"seed{self.seed}"] if self.seed else []
        return "-".join(["quick" if self.quick else "full", *(value for _, value in self.only), *seed])
