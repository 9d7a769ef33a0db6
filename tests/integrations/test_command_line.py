"""`python -m peft_s2a`: plans and reports as tables, JSON and pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import transformers as T

from peft_s2a.integrations.adapter_report import adapter_report
from peft_s2a.integrations.command_line import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a configuration and no weights."""
    config = T.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(adapted_vit, tmp_path) -> Path:
    adapted_vit(activation_bits={"gelu": 2}).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_plan_as_a_table(folder, capsys):
    assert main(["plan", "--model", str(folder), "--batch-size", "4", "--budget", "1GB"]) == 0
    out = capsys.readouterr().out
    assert "ViTForImageClassification, batch of 4, budget 1 GB" in out
    for text in ("full fine-tuning", "LoRA q, v + checkpointing", "S2A keep, 4 bits", "recommended:", "largest batch"):
        assert text in out


def test_a_plan_as_json_with_a_picture(folder, capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = [
        "plan",
        "--model",
        str(folder),
        "--batch-size",
        "4",
        "--budget",
        "1GB",
        "--json",
        "--plot",
        str(picture),
    ]
    assert main([*arguments, "--dtype", "bfloat16", "--image-size", "32", "--optimizer", "sgd"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["budget"] == 10**9
    assert {"name", "peak", "largest_batch", "fits", "relative_flops"} <= set(data["rows"][0])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "lots"], "'lots' is not a size of memory"),
        (["--budget", "1KB"], "is below the weights"),
        (["--model", "timm/no_such_model"], "timm has no model"),
        (["--batch-size", "-3"], "must be a positive whole number"),
    ],
)
def test_errors_are_one_line(folder, arguments, message, capsys):
    assert main(["plan", "--model", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("peft-s2a: ")
    assert "Traceback" not in error


def test_a_report(adapter, capsys, tmp_path):
    picture = tmp_path / "report.png"
    assert main(["report", str(adapter), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for text in ("bias delta", "prompt", "side branch", "saved whole", "total", "activation_bits", "{'gelu': 2}"):
        assert text in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_report_counts_what_is_trained(adapter, adapted_vit, capsys):
    assert main(["report", str(adapter), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part["parameters"] for part in data["parts"]}
    model = adapted_vit()
    assert sum(parts.values()) == model.get_nb_trainable_parameters()[0]
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    assert parts["prompt"] == sum(n for name, n in named if "s2a_prompt" in name)
    assert parts["bias delta"] == sum(n for name, n in named if "s2a_bias" in name)
    assert parts["saved whole"] == sum(n for name, n in named if "classifier" in name)
    assert data["settings"]["activation_bits"] == {"gelu": 2}


def test_a_report_of_something_else(tmp_path, adapter, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="an adapter of the method LORA, not of S2A"):
        adapter_report(adapter)


def test_as_a_module_and_as_a_script(adapter):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "peft_s2a", "report", str(adapter)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "side branch" in result.stdout
    entry = re.search(r'\[project.scripts\]\npeft-s2a = "(\S+):(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert entry is not None
    module, function = entry.groups()
    assert getattr(import_module(module), function) is main
