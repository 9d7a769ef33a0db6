"""What each choice of S2A is worth: bits, size of the groups, parts of the structure, prompt rank, side reduction.

    python -m benchmarks.ablations                                   # all of it
    python -m benchmarks.ablations --of groups --measures error      # one choice, one measure
    python -m benchmarks.ablations --measures time                   # wants the machine to itself

One thing is changed at a time, everything else is the default. Measures:

- `memory`: bytes kept and peak of forward and backward, ViT-B/16, simulated; trained parameters without the head
- `error`: relative error of the adapter's gradient, pretrained DINOv2-small, 8 real images; of what is in codes alone
- `time`: seconds of a step of ViT-B/16 against stock bias tuning, all settings taking turns; of the structure alone

One JSON line a setting and measure goes to `results/ablations.jsonl`; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gradient_error import adapter_gradient, relative_error
from benchmarks.methods import apply
from benchmarks.models import BUILDERS
from benchmarks.pareto import REFERENCE, Method, Setting, measure_time
from benchmarks.real_inputs import real_input
from benchmarks.results import Record, append, read, versions
from peft_s2a.codecs.affine import ROW, GroupAffineCodec
from peft_s2a.memory import simulate_step
from peft_s2a.table import Context

MODEL, BACKBONE, BATCH = "vit_b16", "dinov2-small-saliency", 8
NO_BIAS, NO_PROMPT, NO_SIDE = {"use_bias": False}, {"prompt_rank": 0}, {"side_reduction": 0}

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "bits": {str(bits): {"activation_bits": bits} for bits in (8, 6, 4, 3, 2, 1)},
    "groups": {str(size): {} for size in (32, 64, 128)},
    "structure": {
        "biases, prompts, side branches": {},
        "biases": NO_PROMPT | NO_SIDE,
        "prompts": NO_BIAS | NO_SIDE,
        "side branches": NO_BIAS | NO_PROMPT,
        "biases, prompts": NO_SIDE,
        "biases, side branches": NO_PROMPT,
    },
    "prompt rank": {str(rank): {"prompt_rank": rank} for rank in (2, 8, 32)},
    "side reduction": {str(reduction): {"side_reduction": reduction} for reduction in (4, 8, 16, 32)},
}
"""Choice, value, fields of `S2AConfig`; the size of groups is none of them and is changed for the measurement."""

MEASURES = {
    "memory": tuple(ABLATIONS),
    "error": ("bits", "groups"),
    "time": ("structure", "prompt rank", "side reduction"),
}
"""The choices that a measure has something to say about."""


@contextmanager
def groups_of(size: int) -> Iterator[None]:
    """Group-wise codes with groups of another size."""
    original = Context.affine

    def affine(self: Context, kind: str, group_size: int = 64, row: int = ROW) -> GroupAffineCodec:
        return original(self, kind, size, row)

    with patch.object(Context, "affine", affine):
        yield


def memory(fields: dict[str, Any]) -> Record:
    """Kept and peak in a simulation, and what is trained."""
    with torch.device("meta"):
        base = BUILDERS[MODEL]()
    model = apply("s2a", base, dict(fields))
    step = simulate_step(model, base.batch(BATCH))
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return {
        "kept_mb_per_image": round(step.kept / BATCH / 1e6, 3),
        "peak_mb_per_image": round(step.step_peak / BATCH / 1e6, 3),
        "trainable_without_head": sum(count for name, count in trained if "modules_to_save" not in name),
    }


@functools.cache
def _source(options: tuple[int, int, str]) -> Any:
    """The backbone with real images, and its exact gradient."""
    source = real_input(BACKBONE, *options)
    return source, adapter_gradient(source, {"activation_bits": None})


def error(fields: dict[str, Any], options: argparse.Namespace) -> Record:
    """Relative error of the adapter's gradient."""
    source, exact = _source((options.images, options.image_size, options.dataset))
    return {"error": round(relative_error(adapter_gradient(source, fields), exact), 5)}


def key(record: Record) -> tuple[str, ...]:
    """What makes two records the same measurement."""
    return record["choice"], record["value"], record["measure"]


def run(options: argparse.Namespace) -> None:
    """Measures what is missing."""
    done = {key(record) for record in read("ablations")}

    def missing(measure: str) -> Iterator[tuple[Record, dict[str, Any]]]:
        for choice in options.of:
            for value, fields in ABLATIONS[choice].items():
                record = {"choice": choice, "value": value, "measure": measure}
                if choice in MEASURES[measure] and key(record) not in done:
                    yield record, fields

    for measure in options.measures:
        if measure == "time":
            wanted = {f"{record['choice']} {record['value']}": (record, fields) for record, fields in missing(measure)}
            methods = [Method(title, "s2a", fields) for title, (_, fields) in wanted.items()]
            taking_turns = [Method(REFERENCE, REFERENCE, {}), *methods] if methods else []
            for method, values in measure_time(Setting(MODEL, "float32", BATCH), taking_turns, options.rounds):
                if method.title in wanted:
                    append("ablations", wanted[method.title][0] | values | {"versions": versions()})
            continue
        for record, fields in missing(measure):
            with groups_of(int(record["value"])) if record["choice"] == "groups" else nullcontext():
                values = memory(fields) if measure == "memory" else error(fields, options)
            append("ablations", record | values | {"versions": versions()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--dataset", default="clip-art")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
