"""What an adapter costs in inference: time of a forward pass against the base model's, ViT-B/16, on this machine.

    python -m benchmarks.inference_overhead

The variants take turns, so that a busy machine disturbs all alike; the ratio is that of the fastest passes.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.models import build
from benchmarks.results import append, versions
from peft_s2a import S2AConfig


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    built = build(args.model)
    images = built.batch(args.batch)["pixel_values"]  # type: ignore[index]

    def adapt(**fields: Any) -> Any:
        return get_peft_model(copy.deepcopy(built.module), S2AConfig(modules_to_save=built.heads, **fields)).eval()

    only_bias = {"prompt_rank": 0, "side_reduction": 0}
    variants = {
        "base": built.module.eval(),
        "bias deltas, merged": adapt(**only_bias).merge_and_unload(),
        "bias deltas": adapt(**only_bias),
        "bias deltas and prompts": adapt(side_reduction=0),
        "everything": adapt(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for _ in range(args.rounds + 1):
            for name, model in variants.items():
                start = time.perf_counter()
                model(images)
                seconds[name].append(time.perf_counter() - start)
    base = min(seconds["base"][1:])
    for name, times in seconds.items():
        ratio = min(times[1:]) / base
        record = {"model": args.model, "batch": args.batch, "threads": args.threads, "variant": name}
        append("inference_overhead", record | {"ratio": round(ratio, 4), "seconds": min(times[1:]), **versions()})


if __name__ == "__main__":
    main()
