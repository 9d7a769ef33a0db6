"""What methods and models are called in tables and plots."""

from __future__ import annotations

from typing import Any

from benchmarks.results import Record

TITLES = {
    "full": "full fine-tuning",
    "linear_probe": "linear probe",
    "bias_only": "bias only, stock torch",
    "vpt_deep": "VPT-deep",
    "adapter": "bottleneck adapter",
    "lora_all": "LoRA, all layers",
    "lora_qv": "LoRA q, v",
    "lora_fa": "LoRA-FA",
    "velora": "VeLoRA",
    "lora_checkpointing": "LoRA + checkpointing",
    "qlora": "QLoRA",
    "qlora_checkpointing": "QLoRA + checkpointing",
    "s2a_nf4": "S2A keep, NF4 weights",
}
"""Names of the methods other than S2A, in the order of tables; S2A comes last."""


def method_title(record: Record) -> str:
    """What a method is called where S2A differs by its bits alone."""
    if record["method"] != "s2a":
        return TITLES[record["method"]]
    bits: Any = record["bits"]
    return "S2A, exact" if bits is None else f"S2A, {bits} bits" if isinstance(bits, int) else "S2A, mixed bits"


def method_name(record: Record) -> str:
    """What a method is called where S2A's policies are compared."""
    title: str = record["title"]
    return TITLES.get(title, title)


def model_title(record: Record) -> str:
    """What a model is called in a table's first column, with the BatchNorm mode where there are two."""
    frozen = record["config"].get("train_batch_norm") is False
    return record["model"] + (", frozen BatchNorm" if frozen else "")
