"""What the docs show of the experiments: tables as the runs give them, figures that are there and say their command."""

import json
import re
from pathlib import Path

import pytest
from experiment_runs import write_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("tabulate")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tqdm")

from bench.tables import written
from experiments import docs
from experiments.report_runs import collect

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
# a figure, which may lead to itself in its own size, and the caption below it
FIGURE = re.compile(r"^\[?!\[[^\]]+\]\(([^)]+)\)(?:\]\(\1\))?\n\n\*(.+?)\*$", flags=re.MULTILINE | re.DOTALL)


def test_tables_are_those_of_the_runs() -> None:
    tables = docs.tables(collect(docs.RECORDED))
    texts = {page: page.read_text() for page in docs.PAGES}
    for page, text in texts.items():
        assert "<!-- experiments: claims -->\n| " in text, page
        assert written(text, tables) == text, f"{page.name} is not what python -m experiments.docs writes"
    for name in tables:
        assert f"<!-- {name} -->" in texts[docs.PAGES[1]], name


def test_no_claim_is_open() -> None:
    """What is written in the README was run, with three seeds where seeds count."""
    text = (ROOT / "README.md").read_text()
    table = text.partition("<!-- experiments: claims -->")[2].partition("<!-- end -->")[0]
    assert len(table.splitlines()) > 7
    assert "not run" not in table
    assert not re.search(r"\([12] seeds\)", table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_are_there_and_name_their_command(page: Path) -> None:
    text = page.read_text()
    found = FIGURE.findall(text)
    assert len(found) == len(re.findall(r"!\[", text)), "a figure without a caption below it"
    for path, caption in found:
        assert (page.parent / path).read_bytes().startswith(b"\x89PNG")
        assert re.search(r"`(python -m (bench|experiments)\.\w+|make demo)[^`]*`", caption), path


def test_every_figure_is_shown_somewhere() -> None:
    shown = {Path(path).name for page in PAGES for path, _ in FIGURE.findall(page.read_text())}
    assert shown == {path.name for path in docs.FIGURES.glob("*.png")}


def test_figures_are_taken_from_runs_and_what_is_missing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, recorded, figures, page = (tmp_path / name for name in ("runs", "recorded", "figures", "page.md"))
    page.write_text("before\n<!-- experiments: cnf -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "RECORDED", recorded)
    monkeypatch.setattr(docs, "FIGURES", figures)
    monkeypatch.setattr(docs, "PAGES", (page,))
    folder = write_run(
        runs,
        "cnf",
        "2spirals",
        "torchdiffeq",
        "fp32",
        summary={"NLL": 2.75},
        log=[{"iteration": n, "validation loss": 3.0 / n} for n in (1, 2)],
    )
    source = runs / docs.PICTURES["density-fp32"]
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(b"\x89PNG its picture")
    write_run(recorded, "cnf", "checkerboard", summary={"NLL": 3.75})
    figures.mkdir()
    (figures / "range.png").write_bytes(b"from before")
    assert docs.main(["--runs", str(runs)]) == 0
    assert (figures / "density-fp32.png").read_bytes() == source.read_bytes()
    assert (figures / "range.png").read_bytes() == b"from before"
    said = capsys.readouterr().out
    for name in ("training-flow", "accuracy", "memory"):
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"wrote figures/{name}.png" in said
    assert "range.png" not in said
    text = page.read_text()
    assert text.startswith("before\n<!-- experiments: cnf -->\n### 2spirals")
    assert "| torchdiffeq | fp32 | none | 2.75 |" in text
    # what was recorded before is there still, and logs and pictures are not recorded
    assert "| rampde | bf16 | none | 3.75 |" in text
    assert {path.name for path in recorded.rglob("*.*")} == {"run.json"}
    assert json.loads((folder / "run.json").read_text())["command"] in text
    assert text.endswith("<!-- end -->\nafter\n")
    # from what is recorded the table is made again
    page.write_text(text.replace("2.75", "1.75"))
    assert docs.main([]) == 0
    assert page.read_text() == text
    with pytest.raises(SystemExit):
        docs.main(["--runs", str(tmp_path / "nothing")])
    assert "there is no run in" in capsys.readouterr().err
