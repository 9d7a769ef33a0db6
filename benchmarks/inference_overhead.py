"""What an adapter costs in inference: time of a forward pass against the base model's, ViT-B/16, on this machine.

    python -m benchmarks.inference_overhead

The variants share their weights and take turns. Time is that of the processor for this thread alone; the ratio is the
median over the rounds, with the quartiles beside it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.markdown import markdown_table
from benchmarks.models import build
from benchmarks.results import append, read, versions
from peft_s2a import S2AConfig


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the clock is that of one thread
    warnings.simplefilter("ignore")
    built = build(args.model)
    images = built.batch(args.batch)["pixel_values"]  # type: ignore[index]

    shared = {id(parameter): parameter for parameter in built.module.parameters()}

    def adapt(config: Any) -> Any:
        return get_peft_model(copy.deepcopy(built.module, dict(shared)), config).eval()

    def s2a(**fields: Any) -> Any:
        return adapt(S2AConfig(modules_to_save=built.heads, **fields))

    only_bias = {"prompt_rank": 0, "side_reduction": 0}
    variants = {
        "base": built.module.eval(),
        "bias deltas, merged": s2a(**only_bias).merge_and_unload(),
        "bias deltas": s2a(**only_bias),
        "bias deltas and prompts": s2a(side_reduction=0),
        "everything": s2a(),
        "LoRA, all linear layers": adapt(LoraConfig(target_modules="all-linear", modules_to_save=built.heads)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for _ in range(args.rounds + 1):
            for name, model in variants.items():
                start = time.thread_time()
                model(images)
                seconds[name].append(time.thread_time() - start)
    for name, times in seconds.items():
        ratios = [own / base for own, base in zip(times[1:], seconds["base"][1:], strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4) if name != "base" else (1.0, 1.0, 1.0)
        found = {"ratio": round(median, 4), "quartiles": [round(lower, 4), round(upper, 4)], "seconds": min(times[1:])}
        record = {"model": args.model, "batch": args.batch, "threads": 1, "variant": name, "clock": "thread"}
        append("inference_overhead", record | found | versions())


def inference_table() -> str:
    """The newest ratios of each variant."""
    found = {record["variant"]: record for record in read("inference_overhead") if "quartiles" in record}
    rows = [
        [name, f"{record['ratio']:.3f}", f"{record['quartiles'][0]:.3f} to {record['quartiles'][1]:.3f}"]
        for name, record in found.items()
    ]
    return markdown_table(["time of a forward pass / the base model's", "median", "quartiles"], rows)


if __name__ == "__main__":
    main()
