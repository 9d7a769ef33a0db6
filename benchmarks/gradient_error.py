"""Error of the adapter's gradient on real weights and images: activations in codes against exact ones.

    python -m benchmarks.gradient_error                                  # DINOv2-small, 8 clip-art images of 224 px
    python -m benchmarks.gradient_error --model efficientnet-lite0

For each setting one backward pass of a fresh adapter is compared with the exact one (`activation_bits=None`): the
relative error is the norm of the difference over the norm of the exact gradient, over all adapter parameters together
(the head is left out). One JSON line a setting goes to `benchmarks/results/gradient_error.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, set_seed

from benchmarks.results import append, versions
from peft_s2a import S2AConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from arguments import DataTrainingArguments, ModelArguments
from image_classification import model_loader, prepare_data, to_batch
from methods import head_names
from pretrained import resolve_model

Bits = int | dict[str, int | None] | None
KINDS = ("gelu", "silu", "norm", "attention", "linear", "product")


def adapter_gradient(load_model: Any, batch: dict[str, torch.Tensor], image_size: int, bits: Bits) -> torch.Tensor:
    """The gradient of every adapter parameter, in one vector; the same adapter and head at every call."""
    set_seed(0)
    base = load_model()
    heads = head_names(base)
    config = S2AConfig(modules_to_save=heads, activation_bits=bits, image_size=image_size)
    model = get_peft_model(base, config)
    model.train()
    set_seed(0)
    model(**batch).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "s2a_" in name and p.grad is not None]
    return torch.cat([grad.flatten() for grad in grads])


def settings(levels: list[int]) -> list[tuple[str, Bits]]:
    """Everything at each number of bits, then each kind of operator alone at 4 bits."""
    alone = dict.fromkeys((*KINDS, "pointwise", "softmax", "other"))
    kinds: list[tuple[str, Bits]] = [(kind, {**alone, kind: 4}) for kind in KINDS]
    return [("everything", bits) for bits in levels] + kinds


def main() -> None:
    """Measure all settings of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2-small-saliency")
    parser.add_argument("--dataset", default="clip-art")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    parser.add_argument("--cache_dir")
    options = parser.parse_args()
    path = resolve_model(options.model, options.cache_dir)
    data = prepare_data(
        DataTrainingArguments(dataset=options.dataset, max_train_samples=options.images), options.cache_dir, seed=0
    )
    classes = data["train"].features["label"].names
    load_model = model_loader(path, ModelArguments(), classes)
    batch = to_batch(data["train"], AutoImageProcessor.from_pretrained(path), options.image_size)
    exact = adapter_gradient(load_model, batch, options.image_size, None)
    for name, bits in settings(options.bits):
        gradient = adapter_gradient(load_model, batch, options.image_size, bits)
        record = {
            "model": options.model,
            "dataset": options.dataset,
            "images": options.images,
            "image_size": options.image_size,
            "coded": name,
            "bits": bits if isinstance(bits, int) else 4,
            "error": round(((gradient - exact).norm() / exact.norm()).item(), 5),
            "versions": versions(),
        }
        append("gradient_error", record)


if __name__ == "__main__":
    main()
