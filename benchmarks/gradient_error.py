"""Error of the adapter's gradient on real weights and images: activations in codes against exact ones.

    python -m benchmarks.gradient_error                                    # DINOv2-small, 8 clip-art images of 224 px
    python -m benchmarks.gradient_error --models efficientnet-lite0 --config '{"train_batch_norm": true}'
    python -m benchmarks.gradient_error --policies keep rebuild recompute  # what is kept at all
    python -m benchmarks.gradient_error --policies rebuild --source_bits 8 6 4
    python -m benchmarks.gradient_error --bits 4 --config '{"activation_rounding": "stochastic"}'

For each setting one backward pass of a fresh adapter is compared with the exact one (`activation_bits=None`): the
relative error is the norm of the difference over the norm of the exact gradient, over all adapter parameters together
(the head is left out); `bias_error` is the same over the bias deltas alone. One JSON line a setting goes to
`benchmarks/results/gradient_error.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed

from benchmarks.policies import POLICIES, available
from benchmarks.real_inputs import RealInput, real_input
from benchmarks.results import append, versions
from peft_s2a import S2AConfig
from peft_s2a.settings import OPERATOR_KINDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from methods import head_names

Fields = dict[str, Any]
KINDS = ("gelu", "silu", "norm", "attention", "linear", "product")


def adapter_gradient(source: RealInput, config: Fields) -> dict[str, Tensor]:
    """The gradient of every adapter parameter by name; the same adapter and head at every call."""
    base: Any = source.load()
    set_seed(0)
    size = source.batch["pixel_values"].shape[-1]
    model = get_peft_model(base, S2AConfig(modules_to_save=head_names(base), image_size=size, **config))
    model.train()
    set_seed(0)
    model(**source.batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "s2a_" in name and p.grad is not None}


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor], part: str = "") -> float:
    """Norm of the difference over norm of the exact gradient, over the parameters with `part` in their names."""
    names = [name for name in exact if part in name]
    difference = torch.cat([(found[name] - exact[name]).flatten() for name in names])
    return float(difference.norm() / torch.cat([exact[name].flatten() for name in names]).norm())


def settings(options: argparse.Namespace) -> Iterator[tuple[str, Fields]]:
    """Name and fields of each setting: the policies, or everything at each number of bits and then each kind alone."""
    if options.policies:
        for name, config in available({name: POLICIES[name] for name in options.policies}).items():
            kind = {"rebuild": "source", "recompute": "block"}.get(name.partition(",")[0].split()[0])
            if not options.source_bits or kind is None:
                yield name, config
                continue
            for bits in options.source_bits:
                yield f"{name}, {kind} {bits} bits", config | {"activation_bits": {kind: bits}}
        return
    for bits in options.bits:
        yield "everything", {"activation_bits": bits}
    if options.kinds:
        alone = dict.fromkeys(OPERATOR_KINDS)
        for kind in KINDS:
            yield kind, {"activation_bits": {**alone, kind: 4}}


def main() -> None:
    """Measure all settings of the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dinov2-small-saliency"])
    parser.add_argument("--dataset", default="clip-art")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 4, 3, 2])
    parser.add_argument("--kinds", action=argparse.BooleanOptionalAction, default=True, help="each kind alone, too")
    parser.add_argument(
        "--policies", nargs="+", choices=list(POLICIES), help="compare these in place of bits and kinds"
    )
    parser.add_argument("--source_bits", type=int, nargs="+", help="bits of what is rebuilt or recomputed from")
    parser.add_argument("--config", type=json.loads, default={}, help="more fields of S2AConfig, as a JSON object")
    options = parser.parse_args()
    for model in options.models:
        source = real_input(model, options.images, options.image_size, options.dataset)
        exact = adapter_gradient(source, options.config | {"activation_bits": None})
        for name, setting in settings(options):
            config = options.config | setting
            found = adapter_gradient(source, config)
            bits = config.get("activation_bits", 4)
            record = {
                "model": model,
                "dataset": options.dataset,
                "images": options.images,
                "image_size": options.image_size,
                "coded": name,
                "bits": bits if isinstance(bits, int) else 4,
                "config": config,
                "error": round(relative_error(found, exact), 5),
                "bias_error": round(relative_error(found, exact, "s2a_bias"), 5),
                "versions": versions(),
            }
            append("gradient_error", record)


if __name__ == "__main__":
    main()
