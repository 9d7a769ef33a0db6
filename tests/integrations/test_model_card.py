"""The card of an adapter: how it is loaded, its method, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTForImageClassification

import peft_s2a
from peft_s2a import S2AConfig, update_model_card

HEADINGS = ["## How to load this S2A adapter", "## Method", "## Measured results", "## Memory of a training step"]
LOG = [{"loss": 1.0, "step": 1, "memory_kept_mb": 2.0, "memory_peak_measured_mb": 12.34}, {"loss": 0.5, "step": 2}]


def test_what_is_saved_says_how_it_is_loaded(adapted_vit, tmp_path):
    model = adapted_vit(prompt_rank=4, activation_bits={"gelu": 2})
    base = model.unload()
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    config = S2AConfig(modules_to_save=["classifier"], prompt_rank=4, activation_bits={"gelu": 2})
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    for part in ("rank 4", "1/16 of each block's channels", "`classifier` as a whole", "{'gelu': 2}", "2503.08154"):
        assert part in card
    assert f"- Base model: `{tmp_path / 'base'}`" in card
    (code,) = re.findall(r"```python\n(import peft_s2a.*?)```", card, re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("path/to/this/adapter", str(tmp_path / "adapter")), names)
    assert isinstance(names["model"], PeftModel)


def test_models_of_no_library(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = S2AConfig(target_modules=["0"], prompt_rank=0, side_reduction=0, modules_to_save=["2"])
    get_peft_model(net, config).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model = ...  # made as it was for training" in card
    assert "from transformers import" not in card.partition(HEADINGS[0])[2]


def test_tables_are_replaced_and_the_rest_stays(adapted_vit, tmp_path):
    model = adapted_vit()
    model.save_pretrained(tmp_path)
    update_model_card(tmp_path, {"eval_accuracy": 0.5, "eval_runtime": 3.0, "epoch": 1.0, "name": "x"}, LOG)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## Mine\n\nMy own words.\n")
    model.save_pretrained(tmp_path)
    assert update_model_card(tmp_path, {"eval_accuracy": 0.75}) == card
    text = card.read_text()
    assert [text.count(heading + "\n") for heading in HEADINGS] == [1, 1, 1, 1]
    assert "| eval_accuracy | 0.75 |" in text
    for part in ("0.5 |", "eval_runtime", "| epoch |", "| name |"):
        assert part not in text
    for part in ("| memory kept | 2.0 |", "| memory peak measured | 12.3 |", "\n\n## Mine\n\nMy own words."):
        assert part in text


def test_nothing_is_said_without_numbers(adapted_vit, tmp_path):
    adapted_vit().save_pretrained(tmp_path)
    text = update_model_card(tmp_path).read_text()
    assert not [heading for heading in HEADINGS[2:] if heading in text]
    with pytest.raises(FileNotFoundError, match="save the adapter first"):
        update_model_card(tmp_path / "nowhere")


def test_cards_of_version_0_1_0(tmp_path):
    old = Path(__file__).parents[1] / "data" / "checkpoints" / "0.1.0" / "vit" / "README.md"
    (tmp_path / "README.md").write_text(old.read_text())
    S2AConfig(base_model_name_or_path="user/base").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count(HEADINGS[0]) == text.count("import peft_s2a  #") == 1
    assert 'from_pretrained("user/base")' in text
    assert peft_s2a.update_model_card is update_model_card
