"""The README states what was measured: its tables are those that the result files give."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def test_tables_are_those_of_the_results(monkeypatch):
    pytest.importorskip("tabulate")
    monkeypatch.syspath_prepend(str(README.parent))
    from bench.tables import written

    text = README.read_text()
    assert written(text) == text
    assert "<!-- accuracy -->\n| " in text


def test_the_example_runs():
    """The code after the change of the import, on the CPU."""
    block = re.search(r"# after\n(.*?)```", README.read_text(), re.DOTALL)[1]
    net = torch.nn.Linear(2, 2)
    scope = {
        "net": lambda t, y: net(y),
        "y0": torch.randn(3, 2),
        "t": torch.linspace(0, 1, 5),
        "torch": torch,
    }
    exec(block.replace('"cuda"', '"cpu"'), scope)
    assert torch.isfinite(net.weight.grad).all()
    assert scope["y"].dtype == torch.float32
