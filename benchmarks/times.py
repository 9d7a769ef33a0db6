"""Step times as the tables show them: on processors that multiply bfloat16 faster than float32, and on others."""

from __future__ import annotations

import time

import torch

from benchmarks.results import read

HEADER = "step time: bfloat16 faster / not"
PROCESSORS = (True, False)


def bfloat16_gain(rounds: int = 5) -> float:
    """How many times as fast as in float32 a linear layer of ViT-B multiplies in bfloat16, the fastest of each."""
    seconds = {torch.float32: [0.0] * rounds, torch.bfloat16: [0.0] * rounds}
    for i in range(rounds):
        for dtype, times in seconds.items():
            x, weight = torch.ones(1576, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times[i] = time.perf_counter() - start
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def ratios(model: str, dtype: str = "float32", batch: int = 8) -> dict[str, dict[bool, float]]:
    """`{title: {whether bfloat16 is faster: ratio to bias tuning}}`, the newest of each."""
    found: dict[str, dict[bool, float]] = {}
    for record in read("pareto_time"):
        if (record["model"], record["dtype"], record["batch"]) == (
            model,
            dtype,
            batch,
        ) and "bfloat16_products" in record:
            found.setdefault(record["title"], {})[record["bfloat16_products"]] = record["ratio"]
    return found


def time_cell(found: dict[bool, float] | None) -> str:
    """Both ratios of one method."""
    if not found:
        return "–"
    return " / ".join(f"{found[fast]:.2f}" if fast in found else "–" for fast in PROCESSORS)
