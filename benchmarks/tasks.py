"""Memory of a training step beyond classification and beyond vision: full-size models, by simulation.

    python -m benchmarks.tasks                # all; minutes
    python -m benchmarks.tasks bert_base ast  # some

Appends one JSON line a result to `results/tasks.jsonl`; MB are 1e6 bytes. Item: an image, a pair of image and text, or
a sequence. Text and audio models have bias deltas alone, the others prompts and side branches, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as T

from benchmarks.markdown import markdown_table
from benchmarks.methods import NotApplicableError, apply
from benchmarks.models import BenchmarkModel
from benchmarks.results import append, read, versions
from peft_s2a.memory import peak_step_bytes, saved_activation_bytes, simulate_step

BATCH = 4
MB = 1e6
BIAS_ONLY = {"prompt_rank": 0, "side_reduction": 0}
METHODS = {"bias_only": "bias only, stock torch", "lora_qv": "LoRA q, v", "s2a": "S2A, 4 bits"}


@dataclass(frozen=True)
class Task:
    """A model for a task.

    Attributes:
        title: what it is called in the table.
        make: makes it.
        batch: makes the batch of `BATCH` items.
        heads: what is trained whole.
        fields: fields of `S2AConfig`.
        simulated: whether its step needs no data; otherwise it runs, and the allocator is asked.
    """

    title: str
    make: Callable[[], Any]
    batch: Callable[[], dict[str, Any]]
    heads: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    simulated: bool = True


def _images(size: int) -> torch.Tensor:
    return torch.empty(BATCH, 3, size, size)


def _integers(*size: int) -> torch.Tensor:
    return torch.zeros(BATCH, *size, dtype=torch.long)


def _upernet() -> Any:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return T.UperNetForSemanticSegmentation(
        T.UperNetConfig(backbone_config=T.SwinConfig(image_size=512, out_features=stages), num_labels=150)
    )


def _detr() -> Any:
    backbone = T.ResNetConfig(out_features=["stage4"])
    names = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return T.DetrForObjectDetection(T.DetrConfig(backbone_config=backbone, **names))


def _objects() -> dict[str, torch.Tensor]:
    return {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4]])}


def _clip() -> Any:
    return T.CLIPModel(T.CLIPConfig(vision_config={"patch_size": 16}))


TASKS = {
    "segformer_b2": Task(
        "SegFormer-B2, 512 px",
        lambda: T.SegformerForSemanticSegmentation(
            T.SegformerConfig(
                depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=150
            )
        ),
        lambda: {"pixel_values": _images(512), "labels": _integers(512, 512)},
        ["decode_head"],
        {"image_size": 512},
    ),
    "upernet_swin_t": Task(
        "UperNet with Swin-T, 512 px",
        _upernet,
        lambda: {"pixel_values": _images(512), "labels": _integers(512, 512)},
        ["decode_head", "auxiliary_head"],
    ),
    "detr_r50": Task(
        "DETR with ResNet-50, 640 px, measured",
        _detr,
        lambda: {"pixel_values": torch.randn(BATCH, 3, 640, 640), "labels": [_objects() for _ in range(BATCH)]},
        ["class_labels_classifier", "bbox_predictor"],
        BIAS_ONLY,
        simulated=False,
    ),
    "clip_b16": Task(
        "CLIP ViT-B/16, both towers, 77 tokens",
        _clip,
        lambda: {"pixel_values": _images(224), "input_ids": _integers(77), "return_loss": True},
    ),
    "bert_base": Task(
        "BERT-base, 128 tokens",
        lambda: T.BertForSequenceClassification(T.BertConfig()),
        lambda: {"input_ids": _integers(128), "attention_mask": _integers(128) + 1, "labels": _integers()},
        ["classifier"],
        BIAS_ONLY,
    ),
    "llama_1b": Task(
        "Llama, 1.1 billion parameters, 512 tokens",
        lambda: T.LlamaForCausalLM(
            T.LlamaConfig(
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=22,
                num_attention_heads=32,
                num_key_value_heads=4,
            )
        ),
        lambda: {"input_ids": _integers(512), "labels": _integers(512)},
        [],
        BIAS_ONLY,
    ),
    "ast": Task(
        "AST, 1024 frames",
        lambda: T.ASTForAudioClassification(T.ASTConfig()),
        lambda: {"input_values": torch.empty(BATCH, 1024, 128), "labels": _integers()},
        ["classifier"],
        BIAS_ONLY,
    ),
    "wav2vec2_base": Task(
        "Wav2Vec2-base, 5 seconds",
        lambda: T.Wav2Vec2ForSequenceClassification(T.Wav2Vec2Config(apply_spec_augment=False, layerdrop=0.0)),
        lambda: {"input_values": torch.empty(BATCH, 80_000), "labels": _integers()},
        ["projector", "classifier"],
        BIAS_ONLY,
    ),
}
"""Every model of the table."""


def measure(name: str, method: str) -> dict[str, Any]:
    """The record of one model and method: bytes kept and peak of a step, per item.

    Raises:
        NotApplicableError: if the model has nothing for the method to train.
    """
    task = TASKS[name]
    with torch.device("meta" if task.simulated else "cpu"):
        model, batch = BenchmarkModel(task.make(), task.heads, from_transformers=True), task.batch()
    adapted = apply(method, model, task.fields if method == "s2a" else {}).train()
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise NotApplicableError("the model has nothing of that kind to train")
    if task.simulated:
        step = simulate_step(adapted, batch)
        kept, peak = step.kept, step.step_peak
    else:
        kept, peak = saved_activation_bytes(adapted, batch), peak_step_bytes(adapted, batch)
    return {
        "model": name,
        "method": method,
        "batch": BATCH,
        "dtype": "float32",
        "kept_mb_per_item": round(kept / BATCH / MB, 2),
        "peak_mb_per_item": round(peak / BATCH / MB, 2),
        "versions": versions(),
    }


def tasks_table() -> str:
    """Models down, methods across: kept / peak, MB per item; the newest result of each counts."""
    found = {(record["model"], record["method"]): record for record in read("tasks")}
    rows = [
        [task.title, *[_cell(found.get((name, method))) for method in METHODS]]
        for name, task in TASKS.items()
        if any((name, method) in found for method in METHODS)
    ]
    return markdown_table(["kept / peak, MB per item", *METHODS.values()], rows)


def _cell(record: dict[str, Any] | None) -> str:
    return "–" if record is None else f"{record['kept_mb_per_item']:.1f} / {record['peak_mb_per_item']:.1f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(TASKS), metavar="MODEL", help="default: all")
    for name in parser.parse_args().models:
        for method in METHODS:
            try:
                append("tasks", measure(name, method))
            except NotApplicableError as error:
                print(f"{name}, {method}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
