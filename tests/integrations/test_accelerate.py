"""Training with accelerate: two processes on CPUs (DDP over gloo), and mixed precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_equal_one(tmp_path):
    # `accelerate launch --cpu` starts one process unless MPI is there; torchrun is what it uses for several
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("equal")
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


@pytest.mark.parametrize("bits", [None, 4])
def test_a_step_in_mixed_precision(adapted_vit, samples, bits):
    images = torch.stack([sample["pixel_values"] for sample in samples[:8]])
    gradients = []
    for enabled in (False, True):
        model = adapted_vit(activation_bits=bits).train()
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(images).logits
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        logits.float().square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad.dtype == torch.float32 for grad in grads)
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 0.1
