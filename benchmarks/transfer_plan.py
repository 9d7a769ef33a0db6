"""Which runs the transfer benchmark makes, in which order, and which learning rate each of them takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.results import Record


@dataclass(frozen=True)
class Variant:
    """A method as it is compared.

    Attributes:
        title: what it is called in print.
        method: a key of `benchmarks.methods.METHODS`.
        rates: learning rates to choose from; empty where the choice of `rate_of` counts.
        config: fields of the method's PEFT configuration.
        rate_of: variants whose learning rate is taken over, that of the first which the model has: the same method
            with its activations stored in another way needs no search of its own.
    """

    title: str
    method: str
    rates: tuple[float, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    rate_of: tuple[str, ...] = ()


_AUTO = {"activation_bits": "auto", "activation_groups": "instance"}
_NO_BIAS, _NO_PROMPT, _NO_SIDE = {"use_bias": False}, {"prompt_rank": 0}, {"side_reduction": 0}
_EXACT = {"activation_bits": None}
_LOW, _MIDDLE, _HIGH = (3e-4, 1e-3, 3e-3), (5e-4, 1.5e-3, 5e-3), (1e-3, 3e-3, 1e-2)

VARIANTS: dict[str, Variant] = {
    "full": Variant("full fine-tuning", "full", (6e-6, 2e-5, 6e-5)),
    "s2a_exact": Variant("S2A, exact", "s2a", _LOW, _EXACT),
    "s2a_4": Variant("S2A, 4 bits", "s2a", (), {"activation_bits": 4}, ("s2a_exact",)),
    "linear_probe": Variant("linear probe", "linear_probe", _MIDDLE),
    "bias_only": Variant("bias only, stock torch", "bias_only", _LOW),
    "lora_qv": Variant("LoRA q, v", "lora_qv", _LOW),
    "lora_all": Variant("LoRA, all layers", "lora_all", _LOW),
    "vpt_deep": Variant("VPT-deep", "vpt_deep", _HIGH),
    "adapter": Variant("bottleneck adapter", "adapter", _LOW),
    "s2a_4_rebuild": Variant(
        "S2A, 4 bits, rebuild", "s2a", (), {"activation_bits": 4, "activation_policy": "rebuild"}, ("s2a_exact",)
    ),
    "lora_checkpointing": Variant("LoRA + checkpointing", "lora_checkpointing", (), {}, ("lora_qv", "lora_all")),
    "lora_fa": Variant("LoRA-FA", "lora_fa", _LOW),
    "velora": Variant("VeLoRA", "velora", _LOW),
    "s2a_bias": Variant("S2A, biases alone, exact", "s2a", _LOW, _EXACT | _NO_PROMPT | _NO_SIDE),
    "s2a_prompt": Variant("S2A, prompts alone, exact", "s2a", _LOW, _EXACT | _NO_BIAS | _NO_SIDE),
    "s2a_side": Variant("S2A, side branches alone, exact", "s2a", _LOW, _EXACT | _NO_BIAS | _NO_PROMPT),
    "s2a_auto_4": Variant("S2A, auto, 4 bits", "s2a", (), _AUTO | {"activation_target_bits": 4}, ("s2a_exact",)),
    "s2a_auto_3": Variant("S2A, auto, 3 bits", "s2a", (), _AUTO | {"activation_target_bits": 3}, ("s2a_exact",)),
}
"""The variants by name, the ones that matter most first."""

TIERS: tuple[tuple[str, ...], ...] = (
    ("full", "s2a_exact", "s2a_4"),
    ("linear_probe", "bias_only", "lora_qv", "lora_all", "vpt_deep", "adapter"),
    tuple(VARIANTS)[9:],
)
"""A tier is done for all backbones and data sets before the next one begins."""


@dataclass(frozen=True)
class Backbone:
    """What a run on a backbone uses unless the command line says otherwise; `rates` replaces those of variants."""

    image_size: int | None = None
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)


BACKBONES = {
    "dinov2-small-saliency": Backbone(56),
    "efficientnet-lite0": Backbone(96, {"full": (1e-4, 3e-4, 1e-3)}),
}
DATASETS = ("digits", "fashion-mnist", "clip-art", "openclipart-to-tuxpaint")

SETTING = ("model", "dataset", "image_size", "epochs", "batch", "max_train_samples", "max_test_samples")
"""Fields that have to agree between the runs that are compared."""


def jobs(
    settings: Sequence[Record], names: Sequence[str], seeds: Sequence[int], rates: dict[str, tuple[float, ...]]
) -> Iterator[Record]:
    """All runs in the order in which an interruption leaves the most: by tier, model, seed, data set.

    Before the first seed of a variant comes its search: one `"validation"` run for each learning rate.

    Args:
        settings: the fields `SETTING` of every combination of model and data set.
        names: of the variants; of one that takes the learning rate of another, that other's search is there as well.
        seeds: the first one is also the searches'.
        rates: learning rates that replace those of `VARIANTS` and `BACKBONES`, by variant.
    """
    models = list(dict.fromkeys(setting["model"] for setting in settings))
    for tier in TIERS:
        wanted = [name for name in tier if name in names]
        sources = dict.fromkeys(source for name in wanted for source in searched(name))
        for model in models:
            for seed in seeds:
                for setting in (setting for setting in settings if setting["model"] == model):
                    for source in sources if seed == seeds[0] else ():
                        for rate in rates_of(source, model, rates):
                            search = {"stage": "validation", "variant": source, "learning_rate": rate}
                            yield {**setting, **search, "seed": seed}
                    for name in wanted:
                        yield {**setting, "stage": "test", "variant": name, "seed": seed}


def searched(name: str) -> tuple[str, ...]:
    """The variants whose search gives the learning rate of `name`."""
    return VARIANTS[name].rate_of or (name,)


def rates_of(name: str, model: str, rates: dict[str, tuple[float, ...]]) -> tuple[float, ...]:
    """The learning rates that a variant chooses from on a model."""
    known = BACKBONES[model].rates if model in BACKBONES else {}
    return tuple(rates.get(name) or known.get(name) or VARIANTS[name].rates)


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same run; a test run is the same whatever learning rate was chosen for it."""
    rate = record["learning_rate"] if record["stage"] == "validation" else None
    return (*(record[name] for name in SETTING), record["stage"], record["variant"], record.get("seed"), rate)


def best_rate(records: Iterable[Record], job: Record) -> float:
    """The learning rate with the best validation accuracy for a test job; the lower loss, then the lower rate of a tie.

    Raises:
        ValueError: if nothing was searched for this setting.
    """
    setting = {name: job[name] for name in SETTING} | {"stage": "validation"}
    matching = [record for record in records if all(record.get(name) == value for name, value in setting.items())]
    for source in searched(job["variant"]):
        found = [record for record in matching if record["variant"] == source]
        if found:
            best = min(
                found, key=lambda record: (-record["accuracy"], record.get("loss", 0.0), record["learning_rate"])
            )
            return float(best["learning_rate"])
    raise ValueError(f"no learning rate was searched for {job['variant']} on {job['model']}, {job['dataset']}")
