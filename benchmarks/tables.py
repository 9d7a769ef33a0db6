"""Writes the results into the documentation: Markdown tables between `<!-- table: NAME -->` and `<!-- end -->`.

python -m benchmarks.tables            # rewrites README.md and docs/**/*.md
python -m benchmarks.tables --check    # fails if that would change anything

A rehearsal writes the pages into its own folder.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial

from benchmarks import comparison
from benchmarks.claims import claims_table
from benchmarks.inference_overhead import inference_table
from benchmarks.integrations.table import integrations_table
from benchmarks.markdown import markdown_table
from benchmarks.results import REHEARSAL, RESULTS, ROOT, Record, read
from benchmarks.summaries import (
    ablations_table,
    allocation_costs_table,
    allocation_table,
    curves_table,
    gradient_error_table,
    layouts_table,
    leak_table,
    linear_table,
    pareto_table,
    whole_job_table,
)
from benchmarks.tasks import tasks_table
from benchmarks.titles import TITLES, method_title, model_title
from benchmarks.transfer_plan import BACKBONES
from benchmarks.transfer_tables import accuracy_table as transfer_table
from benchmarks.transfer_tables import earlier_table, rates_table, summary_table

_MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


PEERS = ("lora_fa", "velora", "vpt_deep", "adapter")
"""Measured on a few models, in a table of their own."""


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
        if record["dtype"] != dtype or record[field] is None or extra or record["method"] in PEERS:
            continue
        if batch is not None and record["batch"] != batch:
            continue
        row, column = model_title(record), method_title(record)
        rows[row] = columns[column] = None
        cells[row, column] = f"{record[field]:.1f}"
    known = [TITLES[name] for name in MEMORY_METHODS if TITLES[name] in columns]
    columns = dict.fromkeys([*known, *(column for column in columns if column.startswith("S2A,"))])
    return markdown_table(
        ["MB per image", *columns], [[row, *[cells.get((row, column), "–") for column in columns]] for row in rows]
    )


def ratio_table() -> str:
    """One row a model: what stock bias tuning and S2A at 4 bits keep, and how many times less that is."""
    rows = []
    newest: dict[str, dict[str, Record]] = {}
    for record in read("memory"):
        plain = record["dtype"] == "float32" and set(record["config"]) <= {"activation_bits", "train_batch_norm"}
        if plain and method_title(record) in RATIO_COLUMNS:
            newest.setdefault(model_title(record), {})[method_title(record)] = record
    for model, records in newest.items():
        # stock torch keeps the same for a frozen BatchNorm
        known = newest[model.partition(",")[0]] | records
        if not {"bias only, stock torch", "S2A, 4 bits"} <= known.keys():
            continue
        kept = {title: record["kept_mb_per_image"] for title, record in known.items()}
        ratio = kept["bias only, stock torch"] / kept["S2A, 4 bits"]
        cells = [f"{kept[title]:.1f}" if title in kept else "–" for title in RATIO_COLUMNS]
        rows.append([model, *cells, f"{ratio:.1f}"])
    return markdown_table(["MB per image", *RATIO_COLUMNS, "bias only / S2A"], rows)


MEMORY_METHODS = (
    "full",
    "bias_only",
    "vpt_deep",
    "adapter",
    "lora_all",
    "lora_qv",
    "lora_checkpointing",
    "linear_probe",
)


def peers_table(batch: int = 8) -> str:
    """Methods down; kept and peak of some models, and how many times S2A's at 4 bits that is."""
    newest: dict[str, dict[str, Record]] = {}
    for record in read("memory"):
        plain = record["dtype"] == "float32" and set(record["config"]) <= {"activation_bits", "train_batch_norm"}
        if plain and record["batch"] == batch and record["model"] in PEER_MODELS:
            newest.setdefault(method_title(record), {})[record["model"]] = record
    reference = newest.get("S2A, 4 bits", {})
    rows = []
    for title in [*TITLES.values(), "S2A, 4 bits"]:
        cells = []
        for model in PEER_MODELS:
            record, own = newest.get(title, {}).get(model), reference.get(model)
            for field in ("kept_mb_per_image", "peak_mb_per_image"):
                if record is None or record[field] is None:
                    cells.append("–")
                elif own is None or own is record:
                    cells.append(f"{record[field]:.1f}")
                else:
                    cells.append(f"{record[field]:.1f} ({record[field] / own[field]:.1f}x)")
            share = "–" if record is None else f"{100 * record['trainable_without_head'] / record['parameters']:.2f}"
            cells.append(share)
        if any(cell != "–" for cell in cells):
            rows.append([title, *cells])
    header = [f"{model}: {what}" for model in PEER_MODELS for what in ("kept", "peak", "trained, %")]
    return markdown_table(["MB per image", *header], rows)


PEER_MODELS = ("vit_b16", "swin_b")
RATIO_COLUMNS = ("full fine-tuning", "LoRA q, v", "bias only, stock torch", "S2A, 4 bits")

LAYOUT_MODELS = ("dinov2-small-saliency", "dinov2-small-registers", "swin-trained", "swin-random")
GRADIENT_MODELS = ("dinov2-small-saliency", "efficientnet-lite0")
PARETO_MODELS = ("vit_b16", "swin_b", "resnet50", "dinov2_b")
DTYPES = ("float32", "bfloat16")


def accuracy_table() -> str:
    """Predicted over measured peak of a step, models and methods down; the newest result of each counts."""
    newest = {(r["model"], r["method"], r["batch"]): r for r in read("planning") if r["kind"] == "accuracy"}
    rows = [
        [
            f"{r['model']}, {method_title(r)}",
            str(r["batch"]),
            f"{r['predicted_mb']:.1f}",
            f"{r['measured_mb']:.1f}",
            f"{r['predicted_mb'] / r['measured_mb']:.3f}",
        ]
        for r in newest.values()
    ]
    return markdown_table(["model and method", "batch", "predicted, MB", "measured, MB", "ratio"], rows)


def cards_table(dtype: str = "float32") -> str:
    """The largest batch of each model, card and method."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for record in read("planning"):
        if record["kind"] != "card" or record["dtype"] != dtype:
            continue
        rows = {row["name"].replace(" q, v", ""): row["largest_batch"] for row in record["plan"]["rows"]}
        columns.update(dict.fromkeys(rows))
        cells[record["model"], record["card"]] = {name: str(size or "–") for name, size in rows.items()}
    lines = [
        [f"{model}, {card}", *[found.get(column, "") for column in columns]] for (model, card), found in cells.items()
    ]
    return markdown_table(["largest batch", *columns], lines)


TABLES: dict[str, Callable[[], str]] = {
    **comparison.TABLES,
    "claims": claims_table,
    "ablations": ablations_table,
    "planning-accuracy": accuracy_table,
    "planning-cards": cards_table,
    "integrations": integrations_table,
    "tasks": tasks_table,
    "inference": inference_table,
    "memory": lambda: memory_table("kept_mb_per_image"),
    "memory-bf16": lambda: memory_table("kept_mb_per_image", "bfloat16"),
    "memory-ratio": ratio_table,
    "peak": lambda: memory_table("peak_mb_per_image", batch=8),
    "peak-bf16": lambda: memory_table("peak_mb_per_image", "bfloat16", batch=8),
    "curves": curves_table,
    "whole-job": whole_job_table,
    "linear": linear_table,
    "allocation-costs": allocation_costs_table,
    **{f"allocation-{model}": partial(allocation_table, model) for model in GRADIENT_MODELS},
    "leak": leak_table,
    "memory-peers": peers_table,
    "transfer-summary": lambda: summary_table(tuple(BACKBONES)),
    **{f"transfer-{model}": partial(transfer_table, model) for model in BACKBONES},
    **{f"transfer-earlier-{model}": partial(earlier_table, model) for model in BACKBONES},
    **{f"transfer-rates-{model}": partial(rates_table, model) for model in BACKBONES},
    **{f"layouts-{model}": partial(layouts_table, model) for model in LAYOUT_MODELS},
    **{f"gradient-error-{model}": partial(gradient_error_table, model) for model in GRADIENT_MODELS},
    **{f"pareto-{model}-{dtype}": partial(pareto_table, model, dtype) for model in PARETO_MODELS for dtype in DTYPES},
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
        text = path.read_text()
        renewed = render(text)
        if renewed != text:
            outdated.append(str(path.relative_to(ROOT)))
            if not check:
                (RESULTS / path.name if REHEARSAL else path).write_text(renewed)
    if outdated:
        print(("out of date: " if check else "renewed: ") + ", ".join(outdated))
    sys.exit(bool(check and outdated))


if __name__ == "__main__":
    main()
