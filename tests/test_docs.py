"""The pages of the docs: what they link to and name exists, what they show runs, and nothing public is missing."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rampde

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FOLDERS = ("bench", "csrc", "docs", "examples", "experiments", "kernels", "rampde", "requirements", "tests")
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]*)(#[^)\s]+)?\)")
# of a code span: a file, with or without its folders
FILE = re.compile(r"`([\w./-]+\.(?:py|md|cpp|cuh?|h|toml|txt|yml))`")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What can be linked to on a page: its headings as the site and forges name them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE):
        given = re.search(r"\{ #([\w-]+) \}", heading)
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()
        found.add("#" + (given[1] if given else re.sub(r"[\s-]+", "-", words)))
    return found


def files() -> set[str]:
    """Files of the repository, from its root on."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(prose_of(page)):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    known = files()
    missing = [
        name
        for name in FILE.findall(prose_of(page))
        if name not in known and not any(path.endswith("/" + name) for path in known)
    ]
    assert not missing


@pytest.fixture
def registry() -> Iterator[None]:
    """What is registered in a test is forgotten after it."""
    before = dict(rampde.METHODS)
    yield
    rampde.METHODS.clear()
    rampde.METHODS.update(before)


@pytest.mark.parametrize("name", ["index", "getting-started", "events", "extending"])
def test_code_of_a_page_runs(name: str, registry: None) -> None:
    """The blocks of a page, one after the other, as a reader would enter them."""
    page, scope = DOCS / f"{name}.md", dict[str, Any]()
    found = blocks(page)
    assert found
    for number, block in enumerate(found):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), scope)
    if name == "getting-started":
        assert all(bool(parameter.grad.isfinite().all()) for parameter in scope["field"].parameters())


def test_code_of_the_readme_runs() -> None:
    pytest.importorskip("torchdiffeq")
    net = nn.Linear(2, 2)
    for block in blocks(ROOT / "README.md"):
        scope = {"net": lambda t, y: net(y), "y0": torch.randn(3, 2), "t": torch.linspace(0, 1, 3), "torch": torch}
        exec(block.replace('"cuda"', '"cpu"'), scope)
        assert torch.isfinite(net.weight.grad).all()


def test_every_public_name_has_an_entry() -> None:
    page = text_of(DOCS / "api.md")
    entries = set(re.findall(r"^::: rampde\.(?:\w+\.)*(\w+)$", page, flags=re.MULTILINE))
    entries |= set(re.findall(r"^### (\w+) \{", page.replace("\\_", "_"), flags=re.MULTILINE))
    assert set(rampde.__all__) <= entries


def test_entries_are_where_they_say() -> None:
    """The reference names the modules in which its generator looks."""
    for path in re.findall(r"^::: ([\w.]+)$", text_of(DOCS / "api.md"), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        found = getattr(__import__(module, fromlist=[name]), name)
        assert found.__module__ == module


def test_table_of_methods_is_that_of_the_registry() -> None:
    rows: dict[str, tuple[str, str]] = {}
    for line in text_of(DOCS / "api.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r'"(\w+)"', cells[0]) if line.startswith('| "') else []
        for place, name in enumerate(names):
            # of several methods in a row, a number for each or one for all
            stages, order = (numbers.split(", ") for numbers in cells[1:3])
            rows[name] = stages[place % len(stages)], order[place % len(order)]
    expected = {
        name: tuple(str(getattr(method, attribute, "")) for attribute in ("stages", "order"))
        for name, method in rampde.METHODS.items()
    }
    assert rows == expected


def test_navigation_names_every_page() -> None:
    settings = text_of(ROOT / "mkdocs.yml")
    navigation = re.search(r"^nav:\n(.*?)\n\n", settings, flags=re.DOTALL | re.MULTILINE)[1]
    named = re.findall(r": ([\w-]+\.md)$", navigation, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.tables import PAGES, TABLES, written

    texts = [page.read_text() for page in PAGES]
    for text in texts:
        assert any(f"<!-- {name} -->\n| " in text for name in TABLES)
        assert written(text) == text
    for name in TABLES:
        assert any(f"<!-- {name} -->" in text for text in texts)


def test_requirements_are_pinned() -> None:
    lines = (ROOT / "requirements" / "docs.txt").read_text().splitlines()
    assert all("==" in line for line in lines if not line.startswith("#"))
