"""Memory against time: every method on the same model, batch and machine.

    python -m benchmarks.pareto --models vit_b16 swin_b --dtypes float32    # memory, then time
    python -m benchmarks.pareto --parts memory                              # not disturbed by what else runs
    python -m benchmarks.pareto --parts time --rounds 7 --threads 2         # wants the machine to itself
    python -m benchmarks.pareto --linear                                    # slope of the peak over the batch
    python -m benchmarks.pareto --leak                                      # nothing is left after 200 steps

Memory: bytes kept for backward, and the allocator's peak of a step (forward, backward, AdamW) above the loaded model,
per image. Time: all methods take turns, one step each a round, so that a machine whose speed drifts does so for all of
them; the ratio to bias tuning in stock torch is taken round by round, and its median reported. JSON lines go to
`results/pareto_memory.jsonl` and `results/pareto_time.jsonl`; what is there is not measured again without `--fresh`.
A result counts after the fresh adapter gave the base model's output and one step finite gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.growth import check_growth, check_leaks
from benchmarks.memory import check_gradients, logits
from benchmarks.methods import ADAPTERS, NotApplicableError, apply
from benchmarks.models import BUILDERS, BenchmarkModel, build
from benchmarks.policies import POLICIES, available
from benchmarks.results import Record, append, read, versions
from benchmarks.times import bfloat16_gain
from peft_s2a.memory import peak_step_bytes, saved_activation_bytes
from peft_s2a.memory.running import Batch, call_model, training_loss
from peft_s2a.ops.short_product import multiplies_bfloat16

MB = 1e6
REFERENCE = "bias_only"
OTHERS = ("full", "lora_qv", REFERENCE, "lora_checkpointing")
ON_REQUEST = {
    **{name: (name, {}) for name in ("linear_probe", "lora_all", "qlora", "qlora_checkpointing")},
    "S2A exact": ("s2a", {"activation_bits": None}),
    "S2A keep, NF4 weights": ("s2a_nf4", {"activation_bits": 4}),
    **{
        f"S2A {name}, products in full": ("s2a", {**POLICIES[name], "backward_precision": "highest"})
        for name in ("keep", "keep, compiled", "rebuild attention, 6 bits, compiled", "rebuild", "recompute")
    },
}
"""Title, method and settings of what is measured when `--methods` names it."""

BATCH_NORM_TRAINED = {"activation_bits": 4, "train_batch_norm": True}


@dataclass(frozen=True)
class Method:
    """A row of the table: what it is called, the method of `benchmarks/methods.py` and its settings."""

    title: str
    method: str
    config: dict[str, Any]


def methods(model: BenchmarkModel, wanted: Sequence[str] | None = None) -> list[Method]:
    """The methods whose titles are `wanted`; by default the usual ones, S2A with every policy that the library has."""
    found = [Method(name, name, {}) for name in OTHERS]
    found += [Method(f"S2A {name}", "s2a", config) for name, config in available().items()]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.module.modules()):
        found.append(Method("S2A keep, BatchNorm trained", "s2a", BATCH_NORM_TRAINED))
    if wanted is None:
        return found
    found += [Method(title, method, config) for title, (method, config) in ON_REQUEST.items()]
    return [method for method in found if method.title in wanted]


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison share."""

    model: str
    dtype: str
    batch: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass
class Trainee:
    """A method applied to a fresh model, with its optimizer."""

    model: nn.Module
    optimizer: Optimizer
    batch: Batch

    def step(self) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        training_loss(call_model(self.model, self.batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def prepare(setting: Setting, method: Method) -> Trainee:
    """Builds and checks.

    Raises:
        NotApplicableError: if the method does not exist for the model.
        AssertionError: if a fresh adapter changes the output, or a gradient is not finite.
    """
    base = build(setting.model)
    base.module.to(setting.torch_dtype)
    batch = base.batch(setting.batch, setting.torch_dtype)
    few = base.batch(1, setting.torch_dtype)
    expected = logits(base.module, few) if method.method in ADAPTERS else None
    model = apply(method.method, base, dict(method.config))
    if expected is not None:
        tolerance = 1e-4 if setting.dtype == "float32" else 2e-2
        torch.testing.assert_close(logits(model, few), expected, rtol=tolerance, atol=tolerance)
    check_gradients(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trainee(model.train(), AdamW(trained, lr=1e-4), batch)


def record(setting: Setting, method: Method, values: Record) -> Record:
    """A line of the results."""
    about = {"model": setting.model, "dtype": setting.dtype, "batch": setting.batch, "title": method.title}
    return {**about, "method": method.method, "config": method.config, **values, "versions": versions()}


def key(setting: Setting, method: Method) -> tuple[Any, ...]:
    """What makes two results the same."""
    config = json.dumps(method.config, sort_keys=True)
    return setting.model, setting.dtype, setting.batch, method.title, config


def done(name: str) -> set[tuple[Any, ...]]:
    """Keys of the results that are there."""
    return {
        key(Setting(r["model"], r["dtype"], r["batch"]), Method(r["title"], r["method"], r["config"]))
        for r in read(name)
    }


def measure_memory(setting: Setting, method: Method) -> Record:
    """Kept bytes and peak of one method."""
    trainee = prepare(setting, method)
    kept = saved_activation_bytes(trainee.model, trainee.batch)
    peak = peak_step_bytes(trainee.model, trainee.batch, trainee.optimizer)
    return {
        "kept_mb_per_image": round(kept / setting.batch / MB, 3),
        "peak_mb_per_image": round(peak / setting.batch / MB, 3),
    }


def measure_time(setting: Setting, wanted: list[Method], rounds: int) -> Iterator[tuple[Method, Record]]:
    """Seconds of a step and the ratio to the reference, all methods interleaved."""
    trainees: dict[str, Trainee] = {}
    for method in wanted:
        try:
            trainees[method.title] = prepare(setting, method)
        except NotApplicableError as error:
            print(f"{setting.model}, {method.title}: {error}", file=sys.stderr)
            continue
        trainees[method.title].step()  # lazily made state, compilation
    gain = round(bfloat16_gain(), 2)
    seconds: dict[str, list[float]] = {title: [] for title in trainees}
    for _ in range(rounds):
        for title, trainee in trainees.items():
            seconds[title].append(trainee.step())
    for method in wanted:
        if method.title not in trainees:
            continue
        times = seconds[method.title]
        ratios = [own / stock for own, stock in zip(times, seconds[REFERENCE], strict=True)]
        yield (
            method,
            {
                "seconds": round(statistics.median(times), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "rounds": rounds,
                "threads": torch.get_num_threads(),
                "device": "cpu",
                "bfloat16_products": multiplies_bfloat16(torch.device("cpu")),
                "bfloat16_gain": gain,
            },
        )


def run(options: argparse.Namespace) -> bool:
    """Measures what is missing, as long as there is time; True if something failed."""
    start, failed = time.monotonic(), False

    def late() -> bool:
        over = options.time_budget is not None and time.monotonic() - start > options.time_budget
        if over:
            print("time budget used up; call again to go on", file=sys.stderr)
        return over

    for part in options.parts:
        for dtype in options.dtypes:
            for name in options.models:
                setting = Setting(name, dtype, options.batch)
                file = f"pareto_{part}"
                known = set() if options.fresh else done(file)
                wanted = methods(build(name), options.methods)
                missing = [method for method in wanted if key(setting, method) not in known]
                if part == "time" and missing:
                    if late():
                        return failed
                    if all(method.title != REFERENCE for method in missing):
                        missing.insert(0, Method(REFERENCE, REFERENCE, {}))
                    for method, values in measure_time(setting, missing, options.rounds):
                        append(file, record(setting, method, values))
                for method in missing if part == "memory" else ():
                    if late():
                        return failed
                    try:
                        append(file, record(setting, method, measure_memory(setting, method)))
                    except NotApplicableError as error:
                        print(f"{name}, {method.title}: {error}", file=sys.stderr)
                    except Exception as error:  # the other results are wanted all the same; the exit status tells
                        failed = True
                        print(f"{name}, {dtype}, {method.title}: FAILED, {error!r}", file=sys.stderr)
                    gc.collect()
    return failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(BUILDERS), default=["vit_b16", "swin_b", "resnet50", "dinov2_b"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--methods", nargs="+", help="titles, such as 'S2A keep', also of ON_REQUEST; default: the usual ones"
    )
    parser.add_argument("--parts", nargs="+", choices=["memory", "time"], default=["memory", "time"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time_budget", type=float, help="seconds after which nothing new is started")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the results")
    parser.add_argument("--linear", action="store_true", help="only the peak at batches of 8, 16 and 32")
    parser.add_argument("--leak", action="store_true", help="only what is live after 10 and after 200 steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.linear or options.leak:
        titles = options.methods or [f"S2A {name}" for name in available()]
        configs = {name: config for name, config in available().items() if f"S2A {name}" in titles}
        if options.linear:
            for name in options.models:
                check_growth(name, configs)
        if options.leak:
            check_leaks(configs)
        return
    sys.exit(run(options))


if __name__ == "__main__":
    main()
