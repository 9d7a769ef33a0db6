"""How memory grows: with the batch (it should be a line), and over many steps (it should not)."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.methods import apply
from benchmarks.models import IMAGE_SIZE, BenchmarkModel, build
from benchmarks.results import REHEARSAL, append, versions
from peft_s2a.memory import peak_step_bytes
from peft_s2a.memory.allocator import record_memory_events
from peft_s2a.memory.running import call_model, training_loss

MB = 1e6
BATCHES = (8, 16, 32)
FEW, MANY = (2, 8) if REHEARSAL else (10, 200)
RECORDED = 5
"""Last steps, during which the allocator's events are recorded."""


def check_growth(name: str, configs: dict[str, dict[str, Any]]) -> None:
    """Appends peak at each batch, and slope between them, to `results/linear.jsonl`, for each S2A configuration."""
    for title, config in configs.items():
        base = build(name)
        model = apply("s2a", base, dict(config))
        optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        peaks = [peak_step_bytes(model, base.batch(size), optimizer) / MB for size in BATCHES]
        slopes = [
            (peaks[i + 1] - peaks[i]) / (BATCHES[i + 1] - BATCHES[i]) for i in range(len(BATCHES) - 1)
        ]  # MB per image
        result = {
            "model": name,
            "title": title,
            "config": config,
            "batches": list(BATCHES),
            "peak_mb": [round(peak, 2) for peak in peaks],
            "slopes_mb_per_image": [round(slope, 3) for slope in slopes],
            "slope_ratio": round(slopes[-1] / slopes[0], 4),
            "versions": versions(),
        }
        append("linear", result)


def small_vit() -> BenchmarkModel:
    """A ViT of two blocks, with a GELU, norms and attention large enough to be coded."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=IMAGE_SIZE,
        patch_size=32,
        num_labels=10,
    )
    return BenchmarkModel(ViTForImageClassification(config), ["classifier"], from_transformers=True)


def live_tensors() -> tuple[int, int]:
    """Number of tensors that Python knows, and the bytes of their storages."""
    gc.collect()
    storages: dict[int, int] = {}
    count = 0
    for thing in gc.get_objects():
        if type(thing) is Tensor or type(thing) is nn.Parameter:
            count += 1
            storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return count, sum(storages.values())


def check_leaks(configs: dict[str, dict[str, Any]]) -> None:
    """Appends what is live after few and after many steps to `results/leak.jsonl`, for each S2A configuration.

    Raises:
        AssertionError: if tensors, their bytes or the allocator's bytes have grown.
    """
    for title, config in configs.items():
        base = small_vit()
        model = apply("s2a", base, dict(config)).train()
        optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        batch = base.batch(4)

        def steps(count: int) -> None:
            for _ in range(count):
                training_loss(call_model(model, batch)).backward()  # noqa: B023
                optimizer.step()  # noqa: B023
                optimizer.zero_grad()  # noqa: B023

        steps(FEW)
        tensors, size = live_tensors()
        steps(MANY - FEW - RECORDED)
        # also what Python does not see
        events = record_memory_events(lambda: steps(RECORDED), torch.device("cpu"))
        grown = sum(event.bytes for event in events)
        tensors_after, size_after = live_tensors()
        result = {
            "title": title,
            "config": config,
            "steps": [FEW, MANY],
            "tensors": [tensors, tensors_after],
            "bytes": [size, size_after],
            "allocator_growth_in_last_steps": grown,
            "versions": versions(),
        }
        append("leak", result)
        assert tensors_after <= tensors, f"{title}: {tensors_after - tensors} more tensors after {MANY} steps"
        assert size_after <= size, f"{title}: {size_after - size} more bytes after {MANY} steps"
        assert grown <= 0, f"{title}: the allocator holds {grown} bytes more after {RECORDED} steps"
