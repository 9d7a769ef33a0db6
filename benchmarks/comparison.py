"""Every method beside S2A: the tables of the README and of "Is S2A for me?", from the JSON lines."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.markdown import markdown_table
from benchmarks.results import Record, read
from benchmarks.times import HEADER, ratios, time_cell
from benchmarks.titles import TITLES

MODELS = {"vit_b16": "ViT-B/16", "swin_b": "Swin-B", "resnet50": "ResNet-50"}
KEPT, PEAK = "kept_mb_per_image", "peak_mb_per_image"
BATCH = 8

S2A = {
    "S2A keep": {},
    "S2A rebuild": {"activation_policy": "rebuild"},
    "S2A recompute": {"activation_policy": "recompute"},
}
"""Title and fields of `S2AConfig`, those that are the default left out."""

_DEFAULTS = {"activation_bits": 4, "train_batch_norm": False}


def _title(record: Record) -> str | None:
    """The row that a result belongs to; None for settings of S2A that are no row."""
    if record["method"] != "s2a":
        return TITLES[record["method"]]
    fields = {
        name: value
        for name, value in record["config"].items()
        if _DEFAULTS.get(name, value) != value or name not in _DEFAULTS
    }
    return next((title for title, own in S2A.items() if own == fields), None)


def measured(model: str) -> dict[str, Record]:
    """`{title: fields}` of all methods, float32: memory and time joined, the newest of each field.

    The peak is that of a batch of 8, as it depends on the batch; what is kept does not.
    """
    found: dict[str, Record] = defaultdict(dict)
    for name in ("memory", "pareto_memory", "pareto_time"):
        for record in read(name):
            title = _title(record)
            if title is None or (record["model"], record["dtype"]) != (model, "float32"):
                continue
            usable = {key: value for key, value in record.items() if value is not None}
            if record["batch"] != BATCH:
                usable.pop(PEAK, None)
            found[title].update(usable)
    return found


def _cell(record: Record, name: str, digits: int = 1) -> str:
    return f"{record[name]:.{digits}f}" if name in record else "–"


def headline_table() -> str:
    """The README's: kept and peak of each method on three models, and the time of a step on the first."""
    by_model = {title: measured(name) for name, title in MODELS.items()}
    first, times = by_model["ViT-B/16"], ratios("vit_b16")
    rows = []
    for title in [*(TITLES[name] for name in HEADLINE), *S2A]:
        if not any(title in found for found in by_model.values()):
            continue
        cells = [
            " / ".join(_cell(found.get(title, {}), name) for name in (KEPT, PEAK)).replace("– / –", "–")
            for found in by_model.values()
        ]
        rows.append([title, *cells, time_cell(times.get(first.get(title, {}).get("title", "")))])
    return markdown_table(["kept / peak, MB per image", *by_model, f"ViT-B/16, {HEADER}"], rows)


HEADLINE = ("full", "vpt_deep", "adapter", "lora_all", "lora_qv", "lora_checkpointing")
"""The peers in the README's table."""


def decision_table(model: str = "vit_b16") -> str:
    """What each method trains, how much memory and time it takes, on one model."""
    found, times = measured(model), ratios(model)
    whole = found[TITLES["full"]].get("parameters", 0)
    rows = []
    for title in [title for title in dict.fromkeys([*TITLES.values(), *S2A]) if title in found]:
        # all policies of S2A train the same
        record = found["S2A keep" if title in S2A else title] | found[title]
        trainable = record.get("trainable_without_head")
        weights = record.get("weights_mb", whole * 4 / 1e6)
        share = (
            "–"
            if trainable is None or not whole
            else f"{100 * trainable / max(whole, record.get('parameters', whole)):.2f} %"
        )
        cells = (
            f"{weights:.0f}",
            _cell(record, KEPT),
            _cell(record, PEAK),
            time_cell(times.get(record.get("title", ""))),
        )
        rows.append([title, share, *cells])
    header = [MODELS[model], "trained", "weights, MB", "kept, MB/image", "peak, MB/image", HEADER]
    return markdown_table(header, rows)


TABLES = {"headline": headline_table, "decision": decision_table}
"""Renderer of each table's name."""
