"""Gradient checkpointing of transformers under an adapter: a block whose input needs no gradient trains all the same.

A reentrant checkpoint cuts a block off the graph unless one of its inputs needs a gradient. With frozen embeddings the
lower blocks would not train, without a word. Here the first block that has something to train gets an input that needs
a gradient; blocks below it have nothing to train and stay cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .tensors import first_tensor, replace_argument


def is_reentrant(layer: nn.Module) -> bool:
    """Whether the layer is checkpointed in the reentrant way."""
    function: Any = vars(layer).get("_gradient_checkpointing_func")
    if function is None or not getattr(layer, "gradient_checkpointing", False):
        return False
    function = getattr(function, "checkpoint", function)  # below the interceptor's wrapper
    return (getattr(function, "keywords", None) or {}).get("use_reentrant") is True


def require_input_gradient(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a layer that may be checkpointed."""
    if not (layer.training and torch.is_grad_enabled() and is_reentrant(layer)):
        return None
    x = first_tensor(args, {})
    if x is None or x.requires_grad or not any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    return replace_argument(args, kwargs, x, x.detach().requires_grad_())


def release_embeddings(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the base model: image embeddings need not be made to require gradients.

    peft and transformers do that for checkpointing (`enable_input_require_grads`). It fails where embeddings are a
    tuple (Swin), and `require_input_gradient` does what is needed.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "pixel_values":
        return
    if vars(model).get("_require_grads_hooks"):
        PreTrainedModel.disable_input_require_grads(model)


HOOKS: tuple[Any, ...] = (require_input_gradient, release_embeddings)


def prepare_checkpointing(model: nn.Module) -> None:
    """Registers the hooks; a second call does nothing."""
    release_checkpointing(model)
    model.register_forward_pre_hook(release_embeddings)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(require_input_gradient, with_kwargs=True)


def release_checkpointing(model: nn.Module) -> None:
    """Undoes `prepare_checkpointing`."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook in HOOKS]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
