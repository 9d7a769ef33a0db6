"""EfficientNet-Lite0 (ImageNet-1k): from its published `.pth` to a folder of transformers' timm wrapper."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

ARCHITECTURE = "tf_efficientnet_lite0"
_PRETRAINED_CFG = {
    "architecture": ARCHITECTURE,
    "tag": "in1k",
    "input_size": [3, 224, 224],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "num_classes": 1000,
    "pool_size": [7, 7],
    "first_conv": "conv_stem",
    "classifier": "classifier",
}


def rename_to_timm(checkpoint: dict[str, torch.Tensor], template: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the weights of `checkpoint` the names in `template`.

    Both list the same layers in the same order, so names are matched by position; kind (`weight`, `running_mean`, ...)
    and shape of each pair must agree. Raises `ValueError` otherwise.
    """
    if len(checkpoint) != len(template):
        raise ValueError(f"the checkpoint has {len(checkpoint)} tensors, {ARCHITECTURE} has {len(template)}")
    renamed = {}
    for (old, tensor), (new, expected) in zip(checkpoint.items(), template.items(), strict=True):
        if old.rsplit(".", 1)[-1] != new.rsplit(".", 1)[-1] or tensor.shape != expected.shape:
            raise ValueError(f"{old} {tuple(tensor.shape)} does not fit {new} {tuple(expected.shape)}")
        renamed[new] = tensor
    return renamed


def convert_efficientnet(checkpoint_bytes: bytes, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`; the pickle is read with `weights_only=True`."""
    checkpoint = torch.load(io.BytesIO(checkpoint_bytes), map_location="cpu", weights_only=True)
    fields: dict[str, Any] = {"num_labels": 1000, "pretrained_cfg": _PRETRAINED_CFG}
    config = TimmWrapperConfig(architecture=ARCHITECTURE, **fields)
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(rename_to_timm(checkpoint, model.timm_model.state_dict()), strict=True)
    model.save_pretrained(folder)
