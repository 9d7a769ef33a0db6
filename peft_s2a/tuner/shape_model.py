"""The model that is planned for, without data: from a module, a configuration, a name or a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig

from ..memory.running import Batch
from ..memory.shape_copy import meta_copy
from .dry_run import INTERPOLATE, Size, image_input

TIMM = "timm/"


def make_shape_model(model: nn.Module | PretrainedConfig | str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model on the meta device; what is given stays as it is.

    Args:
        model: a module without adapters, a configuration of transformers, or a name: of a model of transformers, of a
            local folder with a `config.json` (weights are not read), or `timm/` and the name of a model of timm.
        dtype: dtype of the weights; None: the module's own, float32 for a configuration.

    Raises:
        ValueError: for a module that has adapters, or a name that timm does not know.
        OSError: for a name that transformers does not find.
    """
    if isinstance(model, nn.Module):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "A plan is made for a model without adapters, and this one has some: plan before get_peft_model, or "
                "for the base model."
            )
        shaped = meta_copy(model)
    else:
        config = model if isinstance(model, PretrainedConfig) else None
        with torch.device("meta"):
            shaped = _from_config(config) if config is not None else _from_name(str(model))
    return shaped if dtype is None else shaped.to(dtype)


def _from_config(config: PretrainedConfig) -> nn.Module:
    is_classifier = type(config) in AutoModelForImageClassification._model_mapping
    auto = AutoModelForImageClassification if is_classifier else AutoModel
    model: nn.Module = auto.from_config(config)
    return model


def _from_name(name: str) -> nn.Module:
    if name.startswith(TIMM) and not Path(name).exists():
        return _from_timm(name.removeprefix(TIMM))
    return _from_config(AutoConfig.from_pretrained(name))


def _from_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{TIMM}{name} is a model of timm, which is not installed: pip install timm.") from error
    if not timm.is_model(name.partition(".")[0]):
        close = timm.list_models(f"*{name.partition('_')[0]}*")[:3]
        raise ValueError(f"timm has no model {name!r}; there are, for example, {', '.join(close) or 'none like it'}.")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def image_batches(model: nn.Module, image_size: Size = None) -> Callable[[int], Batch]:
    """Makes batches of a size for the model: images without data, and labels where its forward takes them.

    Raises:
        ValueError: if the model does not start with a convolution on images.
    """
    sizes = image_input(model, image_size)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    arguments = inspect.signature(model.forward).parameters

    def batch(size: int) -> Batch:
        images = torch.empty(size, *sizes, dtype=dtype, device="meta")
        if "pixel_values" not in arguments:
            return (images,)
        found: dict[str, Any] = {"pixel_values": images}
        if "labels" in arguments:
            found["labels"] = torch.empty(size, dtype=torch.long, device="meta")
        if image_size is not None and INTERPOLATE in arguments:
            found[INTERPOLATE] = True
        return found

    return batch
