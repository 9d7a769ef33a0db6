"""Error of the adapter's gradient with calibrated bits against the same bits everywhere, on images not calibrated with.

    python -m benchmarks.allocation                                     # DINOv2-small and EfficientNet-Lite0
    python -m benchmarks.allocation --models efficientnet-lite0 --groups instance --calibration_images 8
    python -m benchmarks.allocation --bits --targets         # what calibrating costs alone
    python -m benchmarks.allocation --models dinov2-small-saliency --groups instance --shares 0 0.5 1

Calibrated is on some clip-art images, measured on others, in batches: the relative error is the norm of the difference
from the exact gradient (`activation_bits=None`) over the norm of that, all adapter parameters together, as a
root mean square over the batches. One JSON line a setting goes to `benchmarks/results/allocation.jsonl`: of kind
`"uniform"`, `"auto"` (with the error that the calibration expects; `share` is the share of what could be rebuilt that
may be, `kept_mb` what an image keeps, scales and all), `"time"` (of a gradient, relative to uniform bits, all settings
taking turns) and `"cost"`: seconds of a calibration and of training steps, peak bytes of a calibration and of exact
training on one image. EfficientNet-Lite0 trains the statistics of its BatchNorms: with frozen ones it keeps nothing
that is not exact.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed

from benchmarks.real_inputs import real_input
from benchmarks.results import append, versions
from peft_s2a import S2AConfig, calibrate
from peft_s2a.memory import peak_step_bytes, saved_activation_bytes
from peft_s2a.memory.allocator import record_memory_events
from peft_s2a.precision.gradient import single_items
from peft_s2a.tuner.calibration import calibrations

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from methods import head_names

Batch = dict[str, Tensor]
CONFIGS: dict[str, dict[str, Any]] = {"dinov2-small-saliency": {}, "efficientnet-lite0": {"train_batch_norm": True}}


def gradient(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The adapter's gradient as one vector."""
    set_seed(0)
    parameters = [p for name, p in model.named_parameters() if "s2a_" in name and p.requires_grad]
    found = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


def error(make: Callable[..., Any], batches: list[Batch], exact: list[Tensor], **config: Any) -> float:
    """Root mean square over the batches of the relative error with this configuration."""
    model = make(**config)
    squares = [
        float((gradient(model, batch) - reference).norm() / reference.norm()) ** 2
        for batch, reference in zip(batches, exact, strict=True)
    ]
    return math.sqrt(sum(squares) / len(squares))


def seconds(run: Callable[[], Any]) -> float:
    """Wall time."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cost(make: Callable[..., Any], items: list[Batch], batch: Batch, groups: str) -> dict[str, Any]:
    """Time and peak of a calibration beside those of training steps; a step is timed per image, on one batch."""
    model = make(activation_bits=4)
    gradient(model, batch)
    step = seconds(lambda: gradient(model, batch)) / len(batch["labels"])
    exact_peak = peak_step_bytes(make(activation_bits=None), items[0])
    run = partial(calibrate, make(activation_bits="auto", activation_groups=groups))
    took = seconds(lambda: run(items, images=len(items)))
    # a few groups after one another: the peak is that of the worst of them
    events = record_memory_events(lambda: run(items[:1], images=1), torch.device("cpu")) if groups == "kind" else []
    return {
        "calibration_seconds": round(took, 2),
        "step_seconds_per_image": round(step, 4),
        "steps_of_8": round(took / step / 8, 1),
        "steps_of_32": round(took / step / 32, 1),
        "calibration_peak_mb": round(max(accumulate(e.bytes for e in events), default=0) / 1e6, 2) or None,
        "exact_peak_mb": round(exact_peak / 1e6, 2),
    }


def main() -> None:
    """Measure all settings of the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CONFIGS))
    parser.add_argument("--dataset", default="clip-art")
    parser.add_argument("--calibration_images", type=int, default=2)
    parser.add_argument("--images", type=int, default=16, help="images that errors are measured on")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--groups", nargs="+", default=["kind", "instance"])
    parser.add_argument("--targets", type=float, nargs="*", default=[2.5, 3, 4])
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--shares", type=float, nargs="*", default=[0], help="of what may be rebuilt")
    parser.add_argument("--rounds", type=int, default=0, help="of timing settings against each other")
    parser.add_argument(
        "--timed", nargs="*", default=["4 everywhere", "instance, 4, 0", "instance, 4, 0.5", "instance, 4, 1"]
    )
    parser.add_argument("--costs", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    for name in options.models:
        held, count, fields = options.images, options.calibration_images, CONFIGS.get(name, {})
        source = real_input(name, held + count, options.image_size, options.dataset)
        batches = [
            {key: value[start : start + options.batch_size] for key, value in source.batch.items()}
            for start in range(0, held, options.batch_size)
        ]
        items = list(single_items({key: value[held:] for key, value in source.batch.items()}, count))

        def make(source: Any = source, fields: dict[str, Any] = fields, **config: Any) -> Any:
            base = source.load()
            set_seed(0)
            config = {"modules_to_save": head_names(base), "image_size": options.image_size, **fields, **config}
            return get_peft_model(base, S2AConfig(**config)).train()

        record = {
            "model": name,
            "dataset": options.dataset,
            "images": held,
            "batch_size": options.batch_size,
            "image_size": options.image_size,
            "calibration_images": count,
            "config": fields,
            "versions": versions(),
        }
        reference = make(activation_bits=None)
        exact = [gradient(reference, batch) for batch in batches]
        first = {key: value[:1] for key, value in batches[0].items()}

        def found(
            config: dict[str, Any],
            make: Any = make,
            batches: Any = batches,
            exact: Any = exact,
            first: Any = first,
        ) -> dict[str, Any]:
            kept = saved_activation_bytes(make(**config), first)
            return {"error": round(error(make, batches, exact, **config), 5), "kept_mb": round(kept / 1e6, 3)}

        timed: dict[str, dict[str, Any]] = {}
        for bits in options.bits:
            append("allocation", record | {"kind": "uniform", "bits": bits} | found({"activation_bits": bits}))
            timed[f"{bits} everywhere"] = {"activation_bits": bits}
        for groups in options.groups:
            policy = "auto" if any(options.shares) else "keep"
            auto = {"activation_bits": "auto", "activation_groups": groups, "activation_policy": policy}
            model = make(**auto)
            calibration = next(iter(calibrations(model.get_base_model()).values()))
            measured = calibration.sensitivities(model, items) if options.targets else ([], [])
            for target, share in product(options.targets, options.shares):
                result = calibration.allocate(*measured, target_bits=target, rebuild_share=share)
                stored = {"activation_target_bits": target, "activation_allocation": result.as_dict()}
                line = {"kind": "auto", "groups": groups, "bits": target, "share": share} | found(auto | stored)
                line |= {"average_bits": round(result.average_bits, 3), "expected_error": round(result.error, 5)}
                line |= {"rebuilt_share": round(result.rebuilt_share, 3)}
                append("allocation", record | line | {"allocation": result.as_dict()["groups"]})
                timed[f"{groups}, {target:g}, {share:g}"] = auto | stored
            if options.costs:
                append(
                    "allocation", record | {"kind": "cost", "groups": groups} | cost(make, items, batches[0], groups)
                )
            if options.rounds:
                chosen = {name: make(**config) for name, config in timed.items() if name in options.timed}
                append("allocation", record | {"kind": "time", "ratios": times(chosen, batches[0], options.rounds)})


def times(models: dict[str, torch.nn.Module], batch: Batch, rounds: int) -> dict[str, float]:
    """Median time of a gradient by setting, over that of the first in the same round."""
    for model in models.values():
        gradient(model, batch)
    found = []
    for _ in range(rounds):
        taken = {name: seconds(partial(gradient, model, batch)) for name, model in models.items()}
        found.append({name: took / next(iter(taken.values())) for name, took in taken.items()})
    return {name: round(median(ratios[name] for ratios in found), 3) for name in models}


if __name__ == "__main__":
    main()
