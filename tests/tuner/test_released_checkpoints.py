"""Checkpoints that released versions wrote give the outputs that they had."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints"
CHECKPOINTS = sorted(path.parent for path in FOLDER.rglob("adapter_config.json"))


@pytest.mark.parametrize("folder", [pytest.param(path, id=str(path.relative_to(FOLDER))) for path in CHECKPOINTS])
def test_outputs_are_what_they_were(folder):
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder).eval()
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["images"]).logits, expected["scores"], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(expected["images"]).logits, expected["scores"], atol=1e-3)


def test_every_version_has_one():
    assert {path.parent.name for path in CHECKPOINTS} >= {version("peft-s2a")}
    assert {path.name for path in CHECKPOINTS} == {"vit", "resnet"}
