"""The fine-tuning methods that the examples compare, applied to any `AutoModelForImageClassification`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_s2a import S2AConfig

METHODS = ("s2a", "lora", "lora_checkpointing", "full", "linear_probe")
TITLES = {
    "s2a": "S2A",
    "lora": "LoRA",
    "lora_checkpointing": "LoRA + checkpointing",
    "full": "full fine-tuning",
    "linear_probe": "linear probe",
}
LEARNING_RATES = {"s2a": 2e-3, "lora": 1e-3, "lora_checkpointing": 1e-3, "full": 5e-5, "linear_probe": 5e-3}

_ATTENTION = re.compile(r"(^|[._])(query|value|q_proj|v_proj|q|v|qkv|c_attn)$")


@dataclass(frozen=True)
class MethodOptions:
    """What can be chosen about a method; `activation_bits` None keeps S2A's activations exactly.

    `image_size` is the size trained at where it is not the model's own: S2A's prompts are made for it.
    """

    activation_bits: int | dict[str, int | None] | None = 4
    prompt_rank: int = 8
    side_reduction: int = 16
    lora_rank: int = 8
    image_size: int | None = None


def parse_bits(text: str) -> int | dict[str, int | None] | None:
    """`"4"` → 4, `"none"` → None (exact), `'{"gelu": 2}'` → a dictionary. Raises `ValueError` for anything else."""
    if text.lower() in ("none", "exact"):
        return None
    try:
        bits = json.loads(text)
    except json.JSONDecodeError:
        bits = text
    if isinstance(bits, (int, dict)) and not isinstance(bits, bool):
        return bits
    raise ValueError(f"--activation_bits {text!r}: give a number, none, or a JSON dictionary of operator to number")


def head_names(model: PreTrainedModel) -> list[str]:
    """Paths of the layers that give the class scores: what a new task trains beside the adapter.

    These are the layers with `num_labels` outputs that lie outside the backbone, or the last such layer when the model
    does not keep its backbone apart (timm). Raises `ValueError` when there is none.
    """
    found = [name for name, module in model.named_modules() if _outputs(module) == model.config.num_labels]
    outside = [name for name in found if not name.startswith(f"{model.base_model_prefix}.")]
    names = outside or found[-1:]
    if not names:
        raise ValueError(f"{type(model).__name__} has no layer with {model.config.num_labels} outputs")
    return names


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else None


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Query and value projections, as the LoRA paper; every convolution and linear layer when there is no attention."""
    heads = head_names(model)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1 and name not in heads
    ]
    return [name for name in layers if _ATTENTION.search(name)] or layers


def adapter_config(model: PreTrainedModel, method: str, options: MethodOptions) -> PeftConfig:
    """The PEFT configuration of `s2a`, `lora` or `lora_checkpointing` for `model`."""
    heads = head_names(model)
    if method == "s2a":
        return S2AConfig(
            modules_to_save=heads,
            activation_bits=options.activation_bits,
            prompt_rank=options.prompt_rank,
            side_reduction=options.side_reduction,
            image_size=options.image_size,
        )
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=lora_targets(model),
        modules_to_save=heads,
    )


def _enable_checkpointing(model: PreTrainedModel) -> None:
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.x on
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def apply_method(model: PreTrainedModel, method: str, options: MethodOptions | None = None) -> Any:
    """Make `model` ready for training with `method` (one of `METHODS`); a `PeftModel` for the adapters.

    Raises `ValueError` for an unknown method, and where a model class cannot do gradient checkpointing.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: choose from {', '.join(METHODS)}")
    if method == "full":
        return model
    if method == "linear_probe":
        heads = head_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0] in heads)
        return model
    if method == "lora_checkpointing":
        _enable_checkpointing(model)
    return get_peft_model(model, adapter_config(model, method, options or MethodOptions()))
