"""Finds blocks, target layers and the head of a model from its structure."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..structure import is_supported

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
HEAD_NAMES = ("classifier", "head", "heads", "fc", "score")
"""Attributes of a model that hold its head, where the model itself does not say which module it is."""


def unwrap(module: nn.Module) -> nn.Module:
    """The module below adapters."""
    if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
        base: nn.Module = module.get_base_layer()
        return base
    return module


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything in the base model; a wrapped layer counts as the layer that it wraps.

    The parts of adapters, of modules saved whole, and of `nn.MultiheadAttention` are left out.
    """
    hidden: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        base = unwrap(module)
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "base_layer"):
            hidden.append(f"{name}.")
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or isinstance(base, nn.MultiheadAttention):
            hidden.append(f"{name}.")
        yield name, base


def find_targets(model: nn.Module, linear_only: bool = False) -> list[str]:
    """Names of every layer of the backbone that can carry a bias delta; the head's are left out."""
    heads = find_heads(model)
    return [
        name
        for name, module in own_modules(model)
        if name
        and is_supported(module)
        and (not linear_only or isinstance(module, (nn.Linear, Conv1D)))
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]


def _count_layers(module: nn.Module) -> tuple[int, int]:
    """Numbers of weight layers (linear, convolution) and of norms in a module."""
    weights = norms = 0
    for _, layer in own_modules(module):
        if isinstance(layer, nn.MultiheadAttention):
            weights += 2
        elif isinstance(layer, (nn.Linear, _ConvNd, Conv1D)):
            weights += 1
        elif is_supported(layer):
            norms += 1
    return weights, norms


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the model's repeated residual blocks.

    A block is an element of a list or sequence, holds at least two weight layers and a norm, and has no block inside:
    a stage, which holds blocks, is not one, nor is a convolution with its norm.
    """
    heads = find_heads(model)
    modules = dict(own_modules(model))
    found: list[str] = []
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0]) if name else None
        if not isinstance(parent, CONTAINERS) or isinstance(module, CONTAINERS) or is_supported(module):
            continue
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            continue
        weights, norms = _count_layers(module)
        if weights >= 2 and norms >= 1:
            found.append(name)
    outer = {name for name in found for other in found if other.startswith(f"{name}.")}
    return [name for name in found if name not in outer]


def find_heads(model: nn.Module) -> list[str]:
    """Names of the modules that make up the head, those with parameters; an empty list for a bare backbone.

    transformers: what lies outside the backbone; timm: the classifier that the model names; torchvision and others: a
    child with a usual name; otherwise a last linear layer behind the blocks.
    """
    heads: list[str] = []
    if isinstance(model, PreTrainedModel):
        backbone = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
        if isinstance(backbone, nn.Module):
            heads = [name for name, child in model.named_children() if child is not backbone]
        elif "For" in type(model).__name__:
            heads = [name for name in HEAD_NAMES if hasattr(model, name)]
    timm_heads = _timm_heads(model)
    if timm_heads is not None:
        heads = [*heads, *timm_heads]
    elif not isinstance(model, PreTrainedModel):
        heads = [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)][:1]
        heads = heads or _last_linear(model)
    modules = dict(model.named_modules())
    return [name for name in heads if any(True for _ in modules[name].parameters())]


def _timm_heads(model: nn.Module) -> list[str] | None:
    """Names of the classifiers of a timm model, which may lie in a wrapper; `None` if there is no timm model."""
    for name, module in model.named_modules():
        get_classifier = getattr(type(module), "get_classifier", None)
        if get_classifier is None:
            continue
        heads: list[str] = []
        classifiers = get_classifier(module)
        classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
        for key, child in module.named_modules():
            if any(child is classifier for classifier in classifiers):
                heads.append(f"{name}.{key}" if name else key)
        return heads
    return None


def _last_linear(model: nn.Module) -> list[str]:
    layers = [(name, module) for name, module in own_modules(model) if name and is_supported(module)]
    if len(layers) < 2 or not isinstance(layers[-1][1], nn.Linear):
        return []
    name = layers[-1][0]
    parent = name.rpartition(".")[0]
    in_list = isinstance(model.get_submodule(parent), CONTAINERS) if parent else isinstance(model, CONTAINERS)
    return [] if parent and not in_list else [name]
