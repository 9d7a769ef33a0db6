"""Runs every case on every architecture and writes `benchmarks/results/integrations.jsonl`.

    python -m benchmarks.integrations                  # everything; minutes
    python -m benchmarks.integrations Trainer ONNX     # the integrations whose names contain one of these

Records of integrations that are not run, or whose package is not installed, stay. A case that fails and is not refused
stops the run: there is no entry for "broken".
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.integrations import cases, distributed, packages
from benchmarks.integrations.architectures import ARCHITECTURES
from benchmarks.integrations.outcomes import key_of, outcome_of
from benchmarks.results import RESULTS, read

NAME = "integrations"
INTEGRATIONS = [*cases.CASES, *packages.CASES, *distributed.CASES]
"""Every integration, in the order of the table."""


def records(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The outcomes of the integrations whose names contain one of these, or of all."""

    def chosen(name: str) -> bool:
        return not wanted or any(part in name for part in wanted)

    def in_turn(name: str, case: cases.Case, *needs: str) -> Iterator[dict[str, Any]]:
        versions = {package: version(package) for package in ("torch", "transformers", "peft", *needs)}
        for architecture in ARCHITECTURES:
            found = outcome_of(case, architecture)
            print(f"{name}, {architecture}: {found['outcome']} {found['reason']}", file=sys.stderr)
            yield {"integration": name, "architecture": architecture, **found, "versions": versions}

    for name, case in cases.CASES.items():
        if chosen(name):
            yield from in_turn(name, case)
    for name, (package, case) in packages.CASES.items():
        if chosen(name) and importlib.util.find_spec(package):
            yield from in_turn(name, case, package)
    if any(chosen(name) for name in distributed.CASES):
        versions = {package: version(package) for package in ("torch", "transformers", "peft")}
        yield from ({**record, "versions": versions} for record in distributed.run(list(ARCHITECTURES)))


def main() -> None:
    """Command line."""
    warnings.simplefilter("ignore")
    kept = {key_of(record): record for record in read(NAME)}
    kept |= {key_of(record): record for record in records(sys.argv[1:])}
    ordered = [
        kept[integration, name] for integration in INTEGRATIONS for name in ARCHITECTURES if (integration, name) in kept
    ]
    (RESULTS / f"{NAME}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in ordered))


if __name__ == "__main__":
    main()
