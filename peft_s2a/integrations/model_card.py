"""What a run measured, in the model card of its adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..tuner.model_card import card_in, put_section

RESULTS = "## Measured results"
MEMORY = "## Memory of a training step"
NOT_RESULTS = ("_runtime", "_per_second", "epoch")
"""Endings of what `Trainer.evaluate` returns beside the metrics."""


def update_model_card(
    directory: str | os.PathLike[str],
    metrics: Mapping[str, Any] | None = None,
    log_history: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Puts results, and memory as it was measured, as tables into the card of a saved adapter.

    Tables of an earlier call are replaced; the rest of the card stays. Nothing is written without numbers for it.

    Args:
        directory: where the adapter was saved; its `README.md` is changed, or begun.
        metrics: numbers by name, such as those that `Trainer.evaluate` returns (without its running times).
        log_history: `trainer.state.log_history`, or that of a `trainer_state.json`, with the entries of
            `MemoryReportCallback`.

    Returns:
        the card.

    Raises:
        FileNotFoundError: if there is no such directory.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory} is no directory: save the adapter first, with save_pretrained.")
    card = card_in(directory)
    numbers = {name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))}
    results = {name: value for name, value in numbers.items() if not name.endswith(NOT_RESULTS)}
    if results:
        put_section(card, RESULTS, _table(("metric", "value"), ((n, f"{v:.6g}") for n, v in results.items())))
    memory = {name: value for entry in log_history for name, value in entry.items() if name.startswith("memory_")}
    if memory:
        rows = ((name.removesuffix("_mb").replace("_", " "), f"{value:.1f}") for name, value in memory.items())
        put_section(card, MEMORY, _table(("", "MB"), rows))
    return card


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "| --- | --: |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
