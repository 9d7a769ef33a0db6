"""The parts of `python -m benchmarks`: the commands that fill the results, and a small form of each for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

Commands = tuple[str, ...]
"""Modules of this folder with their arguments, as on a command line."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        commands: what fills the results.
        quick: the same on models and data that are small.
        tables: those that `quick` alone gives rows to.
    """

    commands: Commands
    quick: Commands
    tables: Commands = ()


_ON_REQUEST = '"S2A exact" "S2A keep, NF4 weights" linear_probe lora_all qlora qlora_checkpointing'
_POLICIES = 'keep rebuild recompute "rebuild attention" "rebuild, 6 bits" "recompute, 8 bits"'
_FEW = 'full bias_only "S2A keep" "S2A rebuild" "S2A recompute"'
_MORE = "convnext_b efficientnet_b0 dinov2_b_reg clip_vit_l14 swinv2_b timm_vit_l16"
_BATCH_NORM = """'{"train_batch_norm": true}'"""
_TINY = "--dataset digits --image_size 56 --images 4"

PARTS: dict[str, Part] = {
    "memory": Part(
        (
            "memory --models vit_b16 swin_b resnet50 dinov2_b --batch 8 --peak",
            f"memory --models {_MORE} --methods full bias_only lora_qv s2a --bits 4 --batch 1",
        ),
        ("memory --models vit_b16 --batch 8 --peak", "memory --models resnet50 --methods full s2a --batch 8 --peak"),
        ("memory", "memory-ratio", "peak", "headline", "decision", "claims"),
    ),
    "pareto": Part(
        ("pareto", f"pareto --models vit_b16 --dtypes float32 --methods {_ON_REQUEST}"),
        (f"pareto --models vit_b16 --dtypes float32 --rounds 1 --methods {_FEW}",),
        ("pareto-vit_b16-float32",),
    ),
    "growth": Part(("pareto --leak",), ('pareto --leak --methods "S2A keep" "S2A recompute"',), ("leak",)),
    "whole_job": Part(
        ("whole_job --check",),
        ('whole_job --dtypes float32 --methods full "S2A keep"',),
        ("whole-job",),
    ),
    "gradient_error": Part(
        (
            "gradient_error",
            f"gradient_error --policies {_POLICIES}",
            "gradient_error --models efficientnet-lite0",
            f"gradient_error --models efficientnet-lite0 --bits 8 4 2 --no-kinds --config {_BATCH_NORM}",
        ),
        (f"gradient_error --bits 4 --no-kinds {_TINY}", f"gradient_error --policies keep rebuild {_TINY}"),
        ("gradient-error-dinov2-small-saliency",),
    ),
    "layouts": Part(
        ("attention_layouts",),
        (f"attention_layouts --models dinov2-small-saliency --bits 4 --layouts channel {_TINY}",),
        ("layouts-dinov2-small-saliency",),
    ),
    "allocation": Part(
        ("allocation",),
        (f"allocation --models dinov2-small-saliency --bits 4 --targets 4 --groups instance --no-costs {_TINY}",),
        ("allocation-dinov2-small-saliency",),
    ),
    "ablations": Part(
        ("ablations",),
        (f"ablations --rounds 1 {_TINY}",),
        ("ablations",),
    ),
    "planning": Part(
        ("planning accuracy", "planning cards"),
        ("planning accuracy --models vit_b16 --methods full s2a --batch 2",),
        ("planning-accuracy",),
    ),
    "integrations": Part(
        ("integrations",),
        ('integrations "save and load"',),
        ("integrations",),
    ),
    "inference_overhead": Part(("inference_overhead",), ("inference_overhead --rounds 2",)),
    "tasks": Part(("tasks",), ("tasks bert_base",), ("tasks",)),
    "curves": Part(
        ("curves",),
        ("curves --dataset digits --backbones dinov2-small-saliency --seeds 0 --epochs 1 --max_train_samples 32",),
        ("curves",),
    ),
    "transfer": Part(("transfer",), ("transfer --quick --models dinov2-small-saliency --image_size 56",)),
    "pictures": Part(("diagrams", "plots"), ("diagrams", "plots")),
    "tables": Part(("tables",), ("tables",)),
}
"""In the order in which they run: pictures and tables come last."""
