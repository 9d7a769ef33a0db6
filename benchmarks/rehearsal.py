"""A rehearsal: every benchmark, table and picture on models that are small, in a folder of its own.

Small are the models of `benchmarks.models` and the pretrained DINOv2, in whose place stands a random one. The data are
the digits of scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def begin(folder: Path) -> None:
    """Sets the environment; call it before a benchmark is imported."""
    results = folder / "results"
    results.mkdir()
    os.environ["PEFT_S2A_REHEARSAL"] = str(results)
    os.environ["PEFT_S2A_CACHE"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_backbones()


def make_backbones() -> None:
    """A random DINOv2 where the examples' cache has the pretrained one."""
    sys.path.insert(0, str(EXAMPLES))
    from cache import build_once
    from convert_dinov2 import save_dinov2
    from pretrained import backbone_folder
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    build_once(backbone_folder("dinov2-small-saliency"), lambda folder: save_dinov2(Dinov2Model(config), folder))
