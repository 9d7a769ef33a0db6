"""Pushing to a hub and loading from it, by a small server on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load

from .hub_server import Hub, running_hub

CLIENT = Path(__file__).with_name("hub_client.py")


def check_cards(hub: Hub) -> None:
    """What `peft_s2a.push_to_hub` says: on a branch of a new repository, and on top of the card of a Trainer."""
    card = hub.commits["user/carded"]["branch"]["README.md"].decode()
    for part in ("base_model: user/base", "import peft_s2a", "S2A (arXiv 2503.08154)", "a prompt of rank 8"):
        assert part in card
    assert hub.commits["user/carded"]["main"] == {}
    trained = hub.commits["user/trained"]
    pushes = [files for name, files in trained.items() if name != "main"]
    assert len(pushes) >= 3  # in training, at its end, and with the card
    assert all("adapter_model.safetensors" in files for files in pushes)
    card = trained["main"]["README.md"].decode()
    for part in ("learning_rate: 5e-05", "import peft_s2a", "| eval_accuracy | 0.75 |", "| memory kept |"):
        assert part in card


def test_push_load_and_the_cache(tmp_path):
    with running_hub() as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(CLIENT.parents[2]), os.environ.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_" + "x" * 34,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        log = tmp_path / "log"
        with log.open("w") as errors:
            client = subprocess.Popen(
                [sys.executable, str(CLIENT), str(tmp_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == "loaded\n", log.read_text()
        files = hub.commits["user/flowers"]["main"]
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(files)
        assert {f"small/one/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")} < set(files)
        assert all("s2a_" in key or "classifier" in key for key in load(files["adapter_model.safetensors"]))
        card = files["small/one/README.md"].decode()  # PeftModel.push_to_hub writes transformers' card over it
        for part in ("base_model: user/base", "library_name: peft", "import peft_s2a", "S2A"):
            assert part in card
        check_cards(hub)
    output, _ = client.communicate("gone\n", timeout=100)
    assert output == "loaded from the cache\n", log.read_text()
