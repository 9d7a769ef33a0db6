"""Bytes kept for backward and the peak of a training step, per image, for models × methods.

    python -m benchmarks.memory --models vit_b16 swin_b --methods bias_only lora_qv s2a --peak

Prints one JSON line a result and appends it to `results/memory.jsonl`. MB are 1e6 bytes. A result is written only after
the fresh adapter gave the base model's output and one backward gave finite gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods import ADAPTERS, METHODS, NotApplicableError, apply
from benchmarks.models import BUILDERS, BenchmarkModel, build
from benchmarks.results import Record, append, versions
from peft_s2a.memory import peak_step_bytes, saved_activation_bytes
from peft_s2a.memory.running import call_model, tensors_in, training_loss

MB = 1e6


def variants(method: str, bits: list[str], model: BenchmarkModel) -> list[dict[str, Any]]:
    """The configurations of a method: S2A with each number of bits and, on models that have it, each BatchNorm mode."""
    if method != "s2a":
        return [{}]
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.module.modules())
    modes: list[dict[str, Any]] = [{"train_batch_norm": mode} for mode in (True, False)] if has_batch_norm else [{}]
    return [{"activation_bits": json.loads(value)} | mode for value in bits for mode in modes]


@torch.no_grad()
def logits(model: nn.Module, batch: Any) -> Tensor:
    """The class scores in eval mode, float32."""
    model.eval()
    output = call_model(model, batch)
    return (output if isinstance(output, Tensor) else output.logits).float()


def check_gradients(model: nn.Module, batch: Any) -> None:
    """Runs one training step's backward.

    Raises:
        AssertionError: unless gradients came and all are finite.
    """
    model.train()
    training_loss(call_model(model, batch)).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients, "no gradients"
    assert all(bool(gradient.isfinite().all()) for gradient in gradients), "gradients are not finite"
    model.zero_grad()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, and of the scales that bitsandbytes keeps beside quantised weights."""
    weights = [*model.parameters(), *model.buffers()]
    scales = [weight.quant_state.absmax for weight in weights if getattr(weight, "quant_state", None) is not None]
    return sum(tensor.nbytes for tensor in (*weights, *scales))


def measure(name: str, method: str, config: dict[str, Any], batch_size: int, dtype: torch.dtype, peak: bool) -> Record:
    """One result: builds, checks, measures.

    Raises:
        NotApplicableError: if the method does not exist for the model.
        AssertionError: if the fresh adapter's output is not the base model's, or a gradient is not finite.
    """
    base = build(name)
    base.module.to(dtype)
    batch = base.batch(batch_size, dtype)
    expected = logits(base.module, batch) if method in ADAPTERS else None
    model = apply(method, base, config)
    if expected is not None:
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(logits(model, batch), expected, **tolerance)
    check_gradients(model, batch)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    head = sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and ("modules_to_save" in path or path.rpartition(".")[0] in base.heads)
    )
    return {
        "model": name,
        "method": method,
        "bits": config.get("activation_bits"),
        "config": config,
        "batch": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "image_size": next(t.shape[-1] for t in tensors_in(batch) if t.dim() == 4),
        "kept_mb_per_image": round(saved_activation_bytes(model, batch) / batch_size / MB, 3),
        "peak_mb_per_image": round(peak_step_bytes(model, batch) / batch_size / MB, 3) if peak else None,
        "weights_mb": round(weight_bytes(model) / MB, 1),
        "trainable": trainable,
        "trainable_without_head": trainable - head,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": "cpu",
        "versions": versions(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BUILDERS), default=["vit_b16", "swin_b", "resnet50"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--bits", nargs="+", default=["4", "null"], help="S2A's activation_bits, as JSON; null: exact")
    parser.add_argument("--config", type=json.loads, default={}, help="more fields of S2AConfig, as a JSON object")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peak", action="store_true", help="also the allocator's peak of a training step")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.models:
        for method in arguments.methods:
            for variant in variants(method, arguments.bits, build(name)):
                config = variant | (arguments.config if method == "s2a" else {})
                try:
                    dtype = getattr(torch, arguments.dtype)
                    append("memory", measure(name, method, config, arguments.batch, dtype, arguments.peak))
                except NotApplicableError as error:
                    print(f"{name}, {method}: {error}", file=sys.stderr)
                except Exception:  # the other results are wanted all the same; the exit status tells
                    failed = True
                    print(f"{name}, {method} {config}: FAILED", file=sys.stderr)
                    traceback.print_exc()
                gc.collect()
    sys.exit(failed)


if __name__ == "__main__":
    main()
