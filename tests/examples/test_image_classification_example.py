"""The example script, end to end, with every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def run_example(model: Path, output: Path, *arguments: str) -> dict[str, Any]:
    from image_classification import main

    fixed = {
        "--model_name_or_path": model,
        "--dataset": "digits",
        "--max_train_samples": 8,
        "--max_eval_samples": 6,
        "--max_steps": 2,
        "--per_device_train_batch_size": 4,
        "--learning_rate": 0.01,
        "--cost_batch_size": 2,
        "--use_cpu": True,
        "--disable_tqdm": True,
        "--output_dir": output,
    }
    return main([*(str(word) for pair in fixed.items() for word in pair), *arguments])


@pytest.mark.parametrize("method", ["s2a", "lora", "lora_checkpointing", "full", "linear_probe"])
def test_every_method_trains_saves_and_loads(method: str, tiny_vit: Path, tmp_path: Path) -> None:
    results = run_example(tiny_vit, tmp_path, "--method", method, "--cost_table", "False")
    assert results["reload_difference"] == 0
    assert 0 < results["trained_parameters"] <= results["total_parameters"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert ("adapter_model.safetensors" if "lora" in method or method == "s2a" else "model.safetensors") in saved


def test_adapter_is_smaller_than_the_model(tiny_vit: Path, tmp_path: Path) -> None:
    adapter = run_example(tiny_vit, tmp_path / "s2a", "--cost_table", "False")
    whole = run_example(tiny_vit, tmp_path / "full", "--cost_table", "False", "--method", "full")
    assert adapter["saved_bytes"] < whole["saved_bytes"]


def test_cost_table_orders_the_methods(tiny_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["method"]: row for row in run_example(tiny_vit, tmp_path)["cost"]}
    assert list(rows) == ["s2a", "lora", "lora_checkpointing", "full"]
    assert rows["s2a"]["kept_bytes"] < rows["lora"]["kept_bytes"] < rows["full"]["kept_bytes"]
    assert all(row["kept_bytes"] <= row["peak_bytes"] for row in rows.values())
    assert rows["full"]["optimizer_bytes"] == 8 * rows["full"]["trainable_parameters"]
    assert json.loads((tmp_path / "cost.json").read_text())["rows"] == list(rows.values())
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "full fine-tuning" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--exact"], ["--activation_bits", "none"]])
def test_exact_activations_are_chosen_in_two_ways(arguments: list[str]) -> None:
    from image_classification import parse_arguments

    assert parse_arguments(arguments)[2].options().activation_bits is None
    assert parse_arguments([])[2].options().activation_bits == 4


def test_arguments_come_from_a_json_file_too(tiny_vit: Path, tmp_path: Path) -> None:
    from image_classification import parse_arguments

    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model_name_or_path": str(tiny_vit), "method": "lora", "output_dir": str(tmp_path)}))
    model, data, method, training = parse_arguments([str(file)])
    assert (model.model_name_or_path, data.dataset, method.method) == (str(tiny_vit), "digits", "lora")
    assert training.learning_rate == 1e-3


def test_image_size_of_another_grid(tmp_path: Path) -> None:
    """DINOv2 interpolates its positions, so the example can train it on small images."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    model = tmp_path / "model"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(model)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(model)
    results = run_example(model, tmp_path / "out", "--image_size", "14", "--cost_table", "False")
    assert results["reload_difference"] == 0
