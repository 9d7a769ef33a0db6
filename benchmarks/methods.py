"""The fine-tuning methods that the benchmarks compare, applied to a `BenchmarkModel`."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import nn

from benchmarks.models import BenchmarkModel
from benchmarks.peers import NotApplicableError, add_bottlenecks, add_visual_prompts
from benchmarks.quantized import quantize_linear

_QUERY_VALUE = re.compile(r"(^|\.)(query|value|q_proj|v_proj|q|v|qkv)$")


def _full(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    return model.module.requires_grad_(True)


def _linear_probe(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in model.heads)
    return model.module


def _bias_only(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    """Every bias and the head, in stock torch."""
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.rpartition(".")[0] in model.heads)
    return model.module


def _vpt_deep(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    add_visual_prompts(model.module)
    return _train_only(model, "visual_prompts")


def _adapter(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    add_bottlenecks(model.module)
    return _train_only(model, "bottleneck")


def _train_only(model: BenchmarkModel, part: str) -> nn.Module:
    """The modules called `part` and the head."""
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(part in name.split(".") or name.rpartition(".")[0] in model.heads)
    return model.module


def _lora(model: BenchmarkModel, config: dict[str, Any], targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "modules_to_save": model.heads}
    return get_peft_model(model.module, LoraConfig(**settings | config))


def _lora_qv(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    modules = model.module.named_modules()
    targets = [name for name, module in modules if isinstance(module, nn.Linear) and _QUERY_VALUE.search(name)]
    if not targets:
        raise NotApplicableError("the model has no query and value projections")
    return _lora(model, config, targets)


def _lora_all(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    """LoRA on every linear layer and every ungrouped convolution, the head excepted (it is trained in full)."""
    modules = [(name, module) for name, module in model.module.named_modules() if name not in model.heads]
    targets = [name for name, module in modules if isinstance(module, nn.Linear)]
    convolutions = [name for name, module in modules if isinstance(module, nn.Conv2d) and module.groups == 1]
    if "velora_config" in config:
        if len(convolutions) > 1:
            raise NotApplicableError("PEFT has VeLoRA for linear layers only")
    elif len(convolutions) > 1:  # a single one is the patch embedding, which LoRA on all linear layers leaves alone
        targets += convolutions
    return _lora(model, config, targets)


def _lora_fa(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    """LoRA on all layers with A frozen, as PEFT's `create_lorafa_optimizer` freezes it."""
    if sum(isinstance(module, nn.Conv2d) for module in model.module.modules()) > 1:
        raise NotApplicableError("PEFT has LoRA-FA for linear layers only")
    adapted = _lora_all(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return adapted


def _velora(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    """LoRA on all layers with PEFT's `VeloraConfig`: inputs are kept as their projections."""
    from peft import VeloraConfig

    return _lora_all(model, {"velora_config": VeloraConfig()} | config)


def _lora_checkpointing(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    try:
        adapted = _lora_qv(model, config)
    except NotApplicableError:
        adapted = _lora_all(model, config)
    return _checkpointed(model, adapted)


def _checkpointed(model: BenchmarkModel, adapted: nn.Module) -> nn.Module:
    """`adapted` with the non-reentrant checkpoints of its base model's class.

    Switched on last: PEFT would ask for gradients of the embeddings, which non-reentrant checkpoints do not need.
    """
    base = model.module
    if not getattr(base, "supports_gradient_checkpointing", hasattr(base, "set_grad_checkpointing")):
        raise NotApplicableError("the model class has no gradient checkpointing")
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable({"use_reentrant": False})
    elif hasattr(base, "gradient_checkpointing_enable"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.set_grad_checkpointing(True)
    return adapted


def _nf4(model: BenchmarkModel) -> None:
    """Quantises the weights of all linear layers but the head's to 4 bits."""
    if find_spec("bitsandbytes") is None:
        raise NotApplicableError("bitsandbytes is not installed")
    quantize_linear(model.module, lambda layer, name: name not in model.heads)
    model.module.is_loaded_in_4bit = True  # type: ignore[assignment]  # how PEFT tells


def _qlora(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    """LoRA on every linear layer, whose own weights are in NF4."""
    _nf4(model)
    return _lora_all(model, config)


def _qlora_checkpointing(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    return _checkpointed(model, _qlora(model, config))


def _s2a_nf4(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    """S2A on weights in NF4."""
    _nf4(model)
    return _s2a(model, config)


def _s2a(model: BenchmarkModel, config: dict[str, Any]) -> nn.Module:
    from peft import get_peft_model

    from peft_s2a import S2AConfig

    return get_peft_model(model.module, S2AConfig(**{"modules_to_save": model.heads} | config))


METHODS: dict[str, Callable[[BenchmarkModel, dict[str, Any]], nn.Module]] = {
    "full": _full,
    "linear_probe": _linear_probe,
    "bias_only": _bias_only,
    "lora_qv": _lora_qv,
    "lora_all": _lora_all,
    "lora_fa": _lora_fa,
    "velora": _velora,
    "lora_checkpointing": _lora_checkpointing,
    "qlora": _qlora,
    "qlora_checkpointing": _qlora_checkpointing,
    "s2a_nf4": _s2a_nf4,
    "vpt_deep": _vpt_deep,
    "adapter": _adapter,
    "s2a": _s2a,
}

ADAPTERS = ("lora_qv", "lora_all", "lora_fa", "velora", "lora_checkpointing", "adapter", "s2a")
"""Methods that add to the model and must begin as the identity; prompts do not."""


def apply(method: str, model: BenchmarkModel, config: dict[str, Any] | None = None) -> nn.Module:
    """`model` made ready for training with `method`; `config` are fields of the method's PEFT configuration.

    Raises:
        NotApplicableError: if the model can't be trained in this way.
    """
    return METHODS[method](model, config or {})
