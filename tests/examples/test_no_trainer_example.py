"""The example without a Trainer: several processes, mixed precision, and going on from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "image_classification_no_trainer.py"


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--model_name_or_path", str(model), "--output_dir", str(output), "--max_train_samples", "24"]
    fixed += ["--max_eval_samples", "9", "--per_device_train_batch_size", "4", "--learning_rate", "0.01"]
    return [*fixed, "--gradient_accumulation_steps", "2", "--cpu", *more]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def run_here(*words: str) -> None:
    from image_classification_no_trainer import main

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    main(words)


def test_going_on_is_bit_identical(tiny_vit: Path, tmp_path: Path) -> None:
    more = ["--mixed_precision", "bf16", "--checkpoint_every", "2"]
    run_here(*arguments(tiny_vit, tmp_path / "whole", *more))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert checkpoint.is_dir()
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["steps"] == 6
    run_here(*arguments(tiny_vit, tmp_path / "again", "--mixed_precision", "bf16", "--resume", str(checkpoint)))
    torch.testing.assert_close(adapter(tmp_path / "again"), adapter(tmp_path / "whole"), rtol=0, atol=0)
    first = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert any(not torch.equal(first[key], last[key]) for key in first if "s2a_" in key)


def test_two_processes(tiny_vit: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    root = str(SCRIPT.parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    words = arguments(tiny_vit, tmp_path, "--num_train_epochs", "1")
    result = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=200, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["processes"], results["steps"]) == (2, 2)
    assert result.stdout.count("steps in 2 processes") == 1
    assert adapter(tmp_path)
