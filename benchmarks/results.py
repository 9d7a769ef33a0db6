"""JSON lines: one a result. A rehearsal writes them, and all pictures, to a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REHEARSAL = os.environ.get("PEFT_S2A_REHEARSAL")
"""Folder of a rehearsal (`python -m benchmarks --quick`): models are small, and nothing is written elsewhere."""

ROOT = Path(__file__).parent.parent
RESULTS = Path(REHEARSAL) if REHEARSAL else ROOT / "benchmarks" / "results"
IMAGES = Path(REHEARSAL) if REHEARSAL else ROOT / "docs" / "images"
Record = dict[str, Any]


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in ("peft-s2a", "torch", "transformers", "peft", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def append(name: str, record: Record) -> None:
    """Prints `record` as one JSON line and appends the line to `results/<name>.jsonl`."""
    line = json.dumps(record)
    print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")


def read(name: str) -> Iterator[Record]:
    """The records of `results/<name>.jsonl`, oldest first; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)
