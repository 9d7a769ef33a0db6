"""The configuration and the registration."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from peft_s2a import S2AConfig, S2AModel
from peft_s2a.tuner import register
from peft_s2a.tuner.matching import exact_pattern, matches_names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_bits": 5}, "activation_bits"),
        ({"activation_bits": {"gelu": 7}}, "gelu"),
        ({"activation_bits": {"geluu": 2}}, "geluu"),
        ({"activation_backend": "cuda"}, "activation_backend"),
        ({"prompt_rank": -1}, "prompt_rank"),
        ({"prompt_rank": 2.5}, "prompt_rank"),
        ({"side_reduction": -1}, "side_reduction"),
        ({"side_reduction": True}, "side_reduction"),
        ({"use_bias": False, "prompt_rank": 0, "side_reduction": 0}, "Every part is switched off"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": True}, "image_size"),
        ({"image_size": "112"}, "image_size"),
        ({"image_size": [112]}, "image_size"),
        ({"image_size": [112, 8.0]}, "image_size"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"block_shapes": {"blocks.0": {"layout": "tokens"}}}, "block_shapes"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        S2AConfig(**fields)


def test_copies(tmp_path):
    config = S2AConfig(
        target_modules=["fc1"], activation_bits={"gelu": 2}, layers_to_transform=[0, 2], image_size=[96, 64]
    )
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, S2AConfig)
    assert loaded.to_dict() == config.to_dict()


def test_registration_is_idempotent_and_refuses_a_clash():
    members = list(PeftType)
    register(S2AConfig, S2AModel)
    assert list(PeftType) == members
    assert PeftType("S2A") is PeftType.S2A is PeftType["S2A"]
    assert pickle.loads(pickle.dumps(PeftType.S2A)) is PeftType.S2A
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.S2A] is S2AConfig

    class Other(S2AConfig):
        pass

    with pytest.raises(RuntimeError, match="already has a method 'S2A'"):
        register(Other, S2AModel)


def test_import_alone_registers():
    code = "import peft_s2a; from peft import PeftType; print(PeftType.S2A.value, 'S2A' in list(PeftType))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["S2A", "True"]


def test_pattern_matches_the_names_and_nothing_else():
    keys = ["norm", "blocks.0.norm", "blocks.1.norm", "blocks.0.fc", "blocks.1.fc", "head.0.fc"]
    pattern = exact_pattern(["norm", "blocks.0.fc", "blocks.1.fc", "blocks.1.norm"], keys)
    assert pattern == r"norm|blocks\.\d+\.fc|blocks\.1\.norm"
    assert [key for key in keys if matches_names(pattern, key)] == [
        "norm",
        "blocks.1.norm",
        "blocks.0.fc",
        "blocks.1.fc",
    ]
