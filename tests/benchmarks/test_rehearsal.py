"""`python -m benchmarks --quick` runs every benchmark, table and picture, and leaves the results alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import run_all
from benchmarks.parts import PARTS

ROOT = Path(__file__).parents[2]


def contents() -> dict[Path, bytes]:
    """What a run without `--quick` would change."""
    folders = (ROOT / "benchmarks" / "results", ROOT / "docs", ROOT / "outputs")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in (ROOT / "README.md", *files)}


@pytest.mark.timeout(2400)  # three minutes of one core
def test_rehearsal():
    before = contents()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert contents() == before


def test_every_part_is_rehearsed():
    assert all(part.quick for part in PARTS.values())
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef main(" in path.read_text()}
    run = {command.split()[0] for part in PARTS.values() for command in part.commands}
    assert modules - run == {"__main__", "golden_checkpoint"}


def test_what_failed_is_told_and_what_was_finished_is_not_repeated(tmp_path):
    finished = tmp_path / "folder" / "finished.txt"
    seen = []

    def run(command):
        seen.append(command)
        return command != "bad"

    assert run_all(["good", "bad", "better"], run, finished) == ["bad"]
    assert finished.read_text().splitlines() == ["good", "better"]
    assert run_all(["good", "bad", "better"], run, finished) == ["bad"]
    assert seen == ["good", "bad", "better", "bad"]
