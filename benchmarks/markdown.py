"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY = "Not measured yet.\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first `left` columns to the left, the others to the right; a sentence without rows."""
    if not rows:
        return EMPTY
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
