"""The paper's claims beside what is measured here: a table of the README, from the JSON lines."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.comparison import KEPT, MODELS, PEAK, S2A, measured
from benchmarks.markdown import markdown_table
from benchmarks.results import read
from benchmarks.times import ratios, time_cell
from benchmarks.titles import TITLES

PEERS = ("vpt_deep", "adapter", "lora_qv", "lora_all")
"""The paper's VPT, Adapter and LoRA; LoRA on all layers only where there are no queries and values."""


def _reductions(field: str, policy: str, against: str) -> dict[str, list[float]]:
    """`{model: how many times less}` than full fine-tuning, or than each of the peers that were measured."""
    ratios = {}
    for model, title in MODELS.items():
        found = measured(model)
        own = found.get(policy, {}).get(field)
        names = ["full"] if against == "full" else [name for name in PEERS if TITLES[name] in found]
        if "lora_qv" in names and "lora_all" in names:
            names.remove("lora_all")
        others = [found[TITLES[name]].get(field) for name in names if TITLES[name] in found]
        if own and any(others):
            ratios[title] = [other / own for other in others if other]
    return ratios


def _reduction_cell(policy: str, against: str) -> str:
    parts = []
    for field, name in ((KEPT, "kept"), (PEAK, "peak")):
        ratios = _reductions(field, policy, against)
        if ratios:
            mean = statistics.geometric_mean(value for values in ratios.values() for value in values)
            each = ", ".join(f"{model} {statistics.geometric_mean(values):.1f}" for model, values in ratios.items())
            parts.append(f"{name} **{mean:.1f}x** ({each})")
    return "; ".join(parts) or "–"


def _job_cell() -> str:
    peaks = {r["title"]: r["peak_mb"] for r in read("whole_job") if r["model"] == "vit_b16" and r["dtype"] == "float32"}
    if "full" not in peaks:
        return "–"
    own = {title: peaks[title] for title in S2A if title in peaks}
    shown = [f"{title.removeprefix('S2A ')} {peak:.0f} MB ({peaks['full'] / peak:.1f}x)" for title, peak in own.items()]
    return f"{peaks['full'] / 1000:.1f} GB → {', '.join(shown)}"


def _accuracy_cell() -> str:
    """Mean accuracy of S2A at 4 bits over that of full fine-tuning, each data set and backbone counting alike."""
    scores: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read("transfer"):
        if record["stage"] == "test":
            scores[record["model"], record["dataset"]][record["variant"]].append(record["accuracy"])
    both = {key: found for key, found in scores.items() if {"full", "s2a_4"} <= found.keys()}
    if not both:
        return "–"
    full, ours = (
        statistics.mean(statistics.mean(found[name]) for found in both.values()) for name in ("full", "s2a_4")
    )
    return f"**{100 * ours / full:.1f} %** over {len(both)} pairs of backbone and data set"


def _trained_cell() -> str:
    shown = []
    for model, title in MODELS.items():
        record = measured(model).get("S2A keep", {})
        if "trainable_without_head" in record:
            shown.append(f"{title} {100 * record['trainable_without_head'] / record['parameters']:.2f} %")
    return ", ".join(shown) or "–"


def _time_cell() -> str:
    times = ratios("vit_b16")
    shown = [f"{title.removeprefix('S2A ')} {time_cell(times[title])}" for title in S2A if title in times]
    return ", ".join(shown) or "–"


FEWER_THAN_PEERS = "4.2 times less memory than VPT, Adapter and LoRA, on average"
FEWER_THAN_FULL = "9.7 times less than full fine-tuning"
KEEP, REBUILD, _ = S2A
CLAIMS: tuple[tuple[str, str, Callable[[], str], str], ...] = (
    (FEWER_THAN_PEERS, KEEP, partial(_reduction_cell, KEEP, "peers"), "memory --peak --batch 8"),
    ("", REBUILD, partial(_reduction_cell, REBUILD, "peers"), "pareto --parts memory"),
    (FEWER_THAN_FULL, KEEP, partial(_reduction_cell, KEEP, "full"), "memory --peak --batch 8"),
    ("", REBUILD, partial(_reduction_cell, REBUILD, "full"), "pareto --parts memory"),
    ("4 GB → 640 MB, a whole job", "ViT-B/16, batch of 24, float32", _job_cell, "whole_job"),
    ("98.7 % of the accuracy of full fine-tuning", "4 bits, small backbones and data", _accuracy_cell, "transfer"),
    ("0.9 % of the parameters trained", "head not counted", _trained_cell, "memory"),
    (
        "no figure for time",
        "a step, stock bias tuning is 1, ViT-B/16; bfloat16 faster / not",
        _time_cell,
        "pareto --parts time",
    ),
)
"""What the paper says, the setting here, what renders the measurement, and the command that repeats it."""


def claims_table() -> str:
    """The paper's claims beside what is measured here."""
    rows = [[claim, setting, cell(), f"`{command}`"] for claim, setting, cell, command in CLAIMS]
    return markdown_table(["the paper", "here", "measured", "`python -m benchmarks.`…"], rows, left=4)
