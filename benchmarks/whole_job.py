"""Peak of a whole fine-tuning job: weights, gradients, optimizer state, activations, temporaries and the batch.

    python -m benchmarks.whole_job                     # ViT-B/16, batch 24, AdamW: simulated
    python -m benchmarks.whole_job --check             # and each beside a real run on the CPU
    python -m benchmarks.whole_job --models swin_b --dtypes bfloat16 --batch 16

Simulated by `peft_s2a.memory.simulate_step`. The check adds up, for a real run, weights, batch and optimizer state, and
the allocator's peak of a step on top of them. One JSON line a result goes to `results/whole_job.jsonl`; MB are 1e6
bytes.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
from torch.optim import AdamW

from benchmarks.methods import NotApplicableError, apply
from benchmarks.models import BUILDERS, build
from benchmarks.policies import POLICIES, available
from benchmarks.results import append, versions
from peft_s2a.memory import peak_step_bytes, simulate_step
from peft_s2a.memory.peak import optimizer_state_bytes
from peft_s2a.memory.running import call_model, tensors_in, training_loss

MB = 1e6
OTHERS = ("full", "bias_only", "lora_qv", "lora_checkpointing")


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Title to method and configuration."""
    policies = available({name: config for name, config in POLICIES.items() if "compiled" not in name})
    return {name: (name, {}) for name in OTHERS} | {f"S2A {name}": ("s2a", config) for name, config in policies.items()}


def simulate(name: str, method: str, config: dict[str, Any], batch_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights, and the peak of the job, in a simulation."""
    with torch.device("meta"):
        base = BUILDERS[name]()
    base.module.to(dtype)
    step = simulate_step(apply(method, base, dict(config)), base.batch(batch_size, dtype), AdamW)
    return step.weights, step.peak


def run(name: str, method: str, config: dict[str, Any], batch_size: int, dtype: torch.dtype) -> int:
    """The same peak from a real run's allocator."""
    base = build(name)
    base.module.to(dtype)
    model = apply(method, base, dict(config)).train()
    batch = base.batch(batch_size, dtype)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    training_loss(call_model(model, batch)).backward()
    optimizer.step()
    optimizer.zero_grad()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    fixed = weights + optimizer_state_bytes(optimizer) + sum(t.nbytes for t in tensors_in(batch))
    return fixed + peak_step_bytes(model, batch, optimizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BUILDERS), default=["vit_b16"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", help="titles, such as 'S2A keep'; default: all")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--check", action="store_true", help="also run each on the CPU")
    options = parser.parse_args()
    for name in options.models:
        for dtype in options.dtypes:
            for title, (method, config) in rows().items():
                if options.methods and title not in options.methods:
                    continue
                arguments = (name, method, config, options.batch, getattr(torch, dtype))
                try:
                    weights, peak = simulate(*arguments)
                    real = run(*arguments) if options.check else None
                except NotApplicableError as error:
                    print(f"{name}, {title}: {error}", file=sys.stderr)
                    continue
                result = {
                    "model": name,
                    "dtype": dtype,
                    "batch": options.batch,
                    "title": title,
                    "method": method,
                    "config": config,
                    "weights_mb": round(weights / MB, 1),
                    "peak_mb": round(peak / MB, 1),
                    "real_peak_mb": None if real is None else round(real / MB, 1),
                    "optimizer": "AdamW",
                    "versions": versions(),
                }
                append("whole_job", result)
                gc.collect()


if __name__ == "__main__":
    main()
