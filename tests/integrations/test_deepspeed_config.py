"""The configuration for DeepSpeed: transformers reads it and fills it in for S2A as for any model."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils.deepspeed import HfDeepSpeedConfig

FILE = Path(__file__).parents[2] / "examples" / "configs" / "deepspeed_zero2.json"


def test_it_is_zero_2_and_leaves_sizes_to_the_trainer():
    config = HfDeepSpeedConfig(str(FILE))
    assert config.is_zero2()
    assert not config.is_zero3()
    assert not config.is_offload()
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled"):
        assert config.get_value(key) == "auto"
    assert config.get_value("optimizer") is None  # the Trainer's own, over the adapter's parameters alone
