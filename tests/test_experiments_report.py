"""The report: from made-up run folders to tables, marks and figures that stand in the page."""

import base64
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from experiment_runs import MACHINE, write_run

ROOT = Path(__file__).resolve().parent.parent
# elements that have no end
VOID = {"meta", "img", "br", "link"}


@pytest.fixture(autouse=True)
def _repository_root_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tabulate", "psutil", "matplotlib", "tqdm", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT))


class Page(HTMLParser):
    """A page's elements: fails where one is not closed, or closed in the wrong place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.ids: set[str | None] = set()
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "img":
            self.images.append(found)
        if tag == "a":
            self.links.append(found["href"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def write_picture(path: Path) -> None:
    from experiments.style import picture

    with picture(path) as (panel,):
        panel.plot([0, 1], [random.random(), random.random()])


def report(runs: Path, bench: Path | None = None) -> tuple[str, str, Page]:
    """The page and the Markdown of a folder of runs, and the page taken apart."""
    from experiments.report import main

    out = runs.parent / "report"
    nothing = str(runs.parent / "no benchmarks")
    assert main(["--runs", str(runs), "--bench", str(bench or nothing), "--out", str(out)]) == 0
    html = (out / "report.html").read_text()
    return html, (out / "report.md").read_text(), Page(html)


def cells(page: Page, *start: str) -> list[str]:
    """The row of a table that starts so."""
    found = [row for table in page.tables for row in table if row[: len(start)] == list(start)]
    assert len(found) == 1
    return found[0]


def test_seeds_are_averaged_and_failures_are_told(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    losses = [random.uniform(2, 3) for _ in range(3)]
    for seed, loss in enumerate(losses):
        summary = {"NLL": loss, "seconds forward": 0.5, "seconds backward": 1.0, "peak MiB": 2048.0 + seed}
        log = [{"iteration": n, "loss": 4 - n, "validation loss": "" if n % 2 else 4 - n} for n in range(1, 7)]
        folder = write_run(runs, "cnf", "2spirals", seed=seed, summary=summary, log=log)
        write_picture(folder / "density.png")
    reason = "FloatingPointError: the loss is nan in iteration 7 <b>&"
    failed = {"status": "failed", "failure": reason}
    write_run(runs, "cnf", "2spirals", "torchdiffeq", "fp16", seed=0, **failed, log=[{"iteration": 1, "loss": 2.0}])
    write_run(runs, "cnf", "2spirals", "torchdiffeq", "fp16", seed=1, summary={"NLL": 2.5})
    write_run(runs, "cnf", "2spirals", "rampde", "fp16", "dynamic", status="running")
    write_run(runs, "cnf", "8gaussians", "rampde", "fp16", "none", **failed)
    html, markdown, page = report(runs)
    assert "7 runs: 4 done, 2 failed, 1 not finished" in html
    head = cells(page, "solver", "precision", "scaler", "NLL")
    assert head[4:] == ["seconds forward", "seconds backward", "peak MiB", "seeds"]
    mean = sum(losses) / 3
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2)
    row = cells(page, "rampde", "bf16", "none")
    assert row[3:] == [f"{mean:.4g} ± {deviation:.2g}", "0.5", "1", "2,049 ± 1", "3"]
    assert f"| rampde | bf16 | none | {mean:.4g} ± {deviation:.2g} |" in markdown
    # what there is of it counts, and what is not there is not invented
    assert cells(page, "torchdiffeq", "fp16", "none")[3:] == ["2.5", "–", "–", "–", "1"]
    assert cells(page, "rampde", "fp16", "dynamic")[3:] == ["–", "–", "–", "–", "0"]
    # the reason stands under the row, as text
    remarks = [row[0].strip() for table in page.tables for row in table if len(row) == 1]
    assert sum("the loss is nan in iteration 7 <b>&" in remark for remark in remarks) == 2
    assert any(remark.startswith("1 of 2 seeds failed") for remark in remarks)
    assert "not finished" in remarks
    assert f"1 of 2 seeds failed: {reason}" in markdown
    for text in (html, markdown):
        assert "python -m experiments.cnf --seeds 3" in text
        assert "Some CPU, 1 threads on 2 cores, torch 2.13.0" in text
    # a training curve, and of each variant the pictures of one seed
    titles = [str(image["alt"]) for image in page.images]
    assert [title for title in titles if "a line for each seed" in title] == [
        "Training on 2spirals: validation loss, a line for each seed"
    ]
    assert [title for title in titles if "density" in title] == [
        "Data, learned density and samples (2spirals-rampde-bf16-none-0)"
    ]
    for image in page.images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    # the page needs no other file, and its links lead somewhere
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert {str(link)[1:] for link in page.links} <= page.ids


def test_times_of_a_busy_machine_are_left_out(tmp_path: Path) -> None:
    summary = {"NLL": 2.5, "seconds forward": 0.5, "peak MiB": 3.0}
    for used in (0.0, 61.0):
        machine = {**MACHINE, "cpu_used_by_others_percent": used}
        write_run(tmp_path / str(used), "cnf", f"used{used:.0f}", summary=summary, machine=machine)
    _, markdown, page = report(tmp_path)
    heads = [table[0] for table in page.tables if table[0][:1] == ["solver"]]
    assert [("seconds forward" in head, "peak MiB" in head) for head in heads] == [(True, True), (False, True)]
    assert "Times are left out, as others used up to 61 % of the cores" in markdown


def test_generated_data_are_marked_and_kept_apart(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for synthetic, error in ((True, 0.5), (False, 0.25)):
        folder = runs / str(synthetic)
        write_run(folder, "otflow", "power", summary={"gradient error": error}, synthetic=synthetic)
    html, markdown, page = report(runs)
    assert html.count("synthetic data</span>") == 1
    assert markdown.count("### power (synthetic data)") == 1
    assert len([table for table in page.tables if table[0][:2] == ["solver", "precision"]]) == 2
    assert "2.5e-01 (power); 5.0e-01 (power, synthetic)" in cells(page, "gradient error in bf16")[2]


def test_published_figures_are_theirs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    peaks = {("torchdiffeq", "fp32", "none"): 800.0, ("rampde", "fp16", "none"): 100.0}
    for (solver, precision, scaler), peak in peaks.items():
        summary = {"test accuracy": 75.5, "peak MiB": peak}
        write_run(runs, "stl10", "stl10", solver, precision, scaler, summary=summary)
    # another network's figures are no counterpart
    write_run(runs, "stl10", "digits", "rampde", "fp16", summary={"test accuracy": 98.0, "peak MiB": 1.0})
    for scaler in ("none", "grad"):
        status = {"status": "failed", "failure": "RuntimeError: no"}
        write_run(runs, "otflow", "bsds300", "torchdiffeq", "fp16", scaler, **status)
    html, markdown, page = report(runs)
    for text in (html, markdown):
        assert "RTX A6000" in text
        assert "Published, measured on other hardware" in text
    theirs = cells(page, "memory of rampde fp16 over torchdiffeq fp32")
    assert theirs[1:3] == ["0.1 to 0.2", "0.125 (stl10)"]
    assert cells(page, "peak memory, rampde fp16 without scaling")[2] == "100 MiB (stl10)"
    assert cells(page, "test accuracy of the fp16 variants, in percent")[2] == "75.50 (stl10)"
    assert cells(page, "peak memory, rampde fp32")[2] == "–"
    assert "failed (bsds300)" in cells(page, "gradient error of torchdiffeq in bf16, and in fp16 with GradScaler")[2]


def test_studies_show_their_finest_steps(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folder = write_run(runs, "roundoff", "full")
    (folder / "study.csv").write_text(
        "problem,variant,exponent,steps,state error\n"
        "rotation,rampde fp32,3,8,1e-7\n"
        "rotation,rampde fp32,9,512,2e-6\n"
        "network,rampde fp32,4,16,inf\n"
    )
    write_picture(folder / "rotation.png")
    other = write_run(runs, "adjoint_scaling", "full", summary={"gradient error, dynamic": 3e-4})
    (other / "study.csv").write_text("case,constant,y(T)\nrampde fp16,65536.0,1e-4\ntorchdiffeq fp16,1.0,inf\n")
    html, markdown, page = report(runs)
    assert cells(page, "rotation")[1:] == ["rampde fp32", "2^-9", "2.0e-06"]
    assert cells(page, "network")[1:] == ["rampde fp32", "2^-4", "not finite"]
    assert cells(page, "rampde fp16") == ["rampde fp16", "65,536", "1.0e-04"]
    assert cells(page, "worst gradient error in fp16 with dynamic scaling")[2] == "3.0e-04"
    assert "| network | rampde fp32 | 2^-4 | not finite |" in markdown
    assert html.count('<tr class="failed ') == 2
    assert "Errors against h: a rotation with decay" in str(page.images[0]["alt"])


def test_benchmarks_are_drawn(tmp_path: Path) -> None:
    bench = tmp_path / "bench" / "some-cpu"
    bench.mkdir(parents=True)
    errors = [
        {"precision": "bf16", "solver": solver, "quantity": quantity, "steps": steps, "relative_error": 1e-3}
        for solver in ("rampde", "torchdiffeq")
        for quantity in ("y(1)", "dL/dy0", "dL/dtheta")
        for steps in (8, 64)
    ]
    peaks = [
        {"problem": "mlp", "precision": "bf16", "solver": solver, "steps": steps, "peak_mib": 1.5 * steps}
        for solver in ("rampde step", "torchdiffeq", "another")
        for steps in (8, 64)
    ]
    for name, rows in (("accuracy", errors), ("memory", peaks)):
        record = {"machine": MACHINE, "command": f"python -m bench.{name}", "rows": rows}
        (bench / f"{name}.json").write_text(json.dumps(record))
    _, _, page = report(tmp_path / "runs", tmp_path / "bench")
    assert len(page.images) == 2
    assert all("Some CPU" in str(image["alt"]) for image in page.images)


def test_a_folder_without_runs_makes_a_page(tmp_path: Path) -> None:
    html, markdown, page = report(tmp_path / "nothing")
    assert "0 runs" in html
    assert html.count("No runs yet.") == markdown.count("No runs yet.") == 6
    assert not page.images


def test_a_broken_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.report import main

    folder = write_run(tmp_path, "cnf", "2spirals")
    (folder / "run.json").write_text('{"experiment": ')
    assert main(["--runs", str(tmp_path)]) == 1
    assert f"{folder / 'run.json'} is not JSON" in capsys.readouterr().err


def test_a_run_that_is_there_twice_is_no_second_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.report import main

    for place in ("here", "there"):
        write_run(tmp_path / place, "cnf", "2spirals", summary={"NLL": 2.5})
    assert main(["--runs", str(tmp_path)]) == 1
    assert "hold the same run: remove one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "column", "said"),
    [
        (0.5, "seconds forward", "0.5"),
        (1234.5, "peak MiB", "1,234"),
        (97.25, "test accuracy", "97.25"),
        (3.14159e-4, "gradient error", "3.1e-04"),
        (float("nan"), "loss", "not finite"),
        (-2.71828, "NLL", "-2.718"),
    ],
)
def test_numbers_are_readable(value: float, column: str, said: str) -> None:
    from experiments.report_runs import number

    assert number(value, column) == said
