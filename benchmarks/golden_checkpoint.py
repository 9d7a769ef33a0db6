"""Writes the checkpoint that this version makes, for the tests of later versions: `tests/data/checkpoints/<version>/`.

    python -m benchmarks.golden_checkpoint

Run once at a release; a folder that is there is left as it is.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.integrations.setting import disturb
from peft_s2a import S2AConfig

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "checkpoints"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def make() -> dict[str, tuple[Any, dict[str, Any], torch.Tensor]]:
    """Base model, fields of the configuration and images, by name."""
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3))
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    )
    return {
        "vit": (vit, {"prompt_rank": 2, "side_reduction": 4}, torch.randn(2, 3, 16, 16)),
        "resnet": (resnet, {"train_batch_norm": True, "prompt_rank": 2}, torch.randn(2, 3, 32, 32)),
    }


def main() -> None:
    """Command line."""
    folder = FOLDER / version("peft-s2a")
    if folder.exists():
        raise SystemExit(f"{folder} is there already: the checkpoint of a released version does not change.")
    for name, (base, fields, images) in make().items():
        base.eval().save_pretrained(folder / name / "base")
        model = disturb(get_peft_model(base, S2AConfig(modules_to_save=["classifier"], **fields))).eval()
        model.peft_config["default"].base_model_name_or_path = None
        model.save_pretrained(folder / name)
        with torch.no_grad():
            scores = model(images).logits
        save_file({"images": images, "scores": scores}, folder / name / "expected.safetensors")


if __name__ == "__main__":
    main()
