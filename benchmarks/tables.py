"""Writes the results into the documentation: Markdown tables between `<!-- table: NAME -->` and `<!-- end -->`.

python -m benchmarks.tables            # rewrites README.md and docs/**/*.md
python -m benchmarks.tables --check    # fails if that would change anything
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Record, read

ROOT = Path(__file__).parent.parent
_MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TITLES = {
    "full": "full fine-tuning",
    "bias_only": "bias only, stock torch",
    "lora_all": "LoRA, all layers",
    "lora_qv": "LoRA q, v",
    "lora_checkpointing": "LoRA + checkpointing",
    "linear_probe": "linear probe",
}
"""Names of the methods other than S2A, in the order of a table's columns; S2A comes last."""


def method_title(record: Record) -> str:
    """What a method is called in a table's header."""
    if record["method"] != "s2a":
        return TITLES[record["method"]]
    bits: Any = record["bits"]
    return "S2A, exact" if bits is None else f"S2A, {bits} bits" if isinstance(bits, int) else "S2A, mixed bits"


def model_title(record: Record) -> str:
    """What a model is called in a table's first column, with the BatchNorm mode where there are two."""
    frozen = record["config"].get("train_batch_norm") is False
    return record["model"] + (", frozen BatchNorm" if frozen else "")


def memory_table(field: str, dtype: str = "float32", batch: int | None = None) -> str:
    """Models down, methods across; the newest result of each counts.

    Args:
        field: `"kept_mb_per_image"` or `"peak_mb_per_image"`.
        dtype: dtype of weights and activations.
        batch: only results of this batch size; the peak depends on it, as gradients are shared by all images.
    """
    cells: dict[tuple[str, str], str] = {}
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    for record in read("memory"):
        extra = set(record["config"]) - {"activation_bits", "train_batch_norm"}
        if record["dtype"] != dtype or record[field] is None or extra:
            continue
        if batch is not None and record["batch"] != batch:
            continue
        row, column = model_title(record), method_title(record)
        rows[row] = columns[column] = None
        cells[row, column] = f"{record[field]:.1f}"
    known = [title for title in TITLES.values() if title in columns]
    columns = dict.fromkeys([*known, *columns])
    return markdown_table(
        ["MB per image", *columns], [[row, *[cells.get((row, column), "–") for column in columns]] for row in rows]
    )


TABLES: dict[str, Callable[[], str]] = {
    "memory": lambda: memory_table("kept_mb_per_image"),
    "memory-bf16": lambda: memory_table("kept_mb_per_image", "bfloat16"),
    "peak": lambda: memory_table("peak_mb_per_image", batch=8),
    "peak-bf16": lambda: memory_table("peak_mb_per_image", "bfloat16", batch=8),
}
"""Renderer of each table's name."""


def render(text: str) -> str:
    """`text` with the content between every pair of markers renewed.

    Raises:
        KeyError: for a table that is not in `TABLES`.
    """
    return _MARKED.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    check = parser.parse_args().check
    outdated = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if not path.exists():
            continue
        text = path.read_text()
        renewed = render(text)
        if renewed != text:
            outdated.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(renewed)
    if outdated:
        print(("out of date: " if check else "renewed: ") + ", ".join(outdated))
    sys.exit(bool(check and outdated))


if __name__ == "__main__":
    main()
