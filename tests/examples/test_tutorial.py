"""The tutorial notebook runs from top to bottom, offline, and is stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_notebook_has_no_outputs():
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in CELLS)


@pytest.mark.timeout(1200)  # less than a minute on a machine of its own
def test_notebook_runs(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    scores = namespace["scores"]
    assert scores["S2A, 4 bits"] == pytest.approx(scores["S2A, exact"], abs=0.08)  # of 269 images
    assert scores["S2A, 4 bits"] > scores["linear probe"]
