"""Which layers and blocks a configuration means, and bad input."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers as T
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft_s2a import S2AConfig, S2AModel
from peft_s2a.tuner import BiasLayer, BlockAdapter


def biased(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, BiasLayer)}


def blocks(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, BlockAdapter)}


def test_names_expressions_and_shorthand(families, adapt):
    make = families["hf-vit"].make
    assert biased(adapt(make(), target_modules=["fc1"])) == {f"vit.layers.{i}.mlp.fc1" for i in (0, 1)}
    assert biased(adapt(make(), target_modules=r".*layers\.1.*q_proj")) == {"vit.layers.1.attention.q_proj"}
    linear = biased(adapt(make(), target_modules="all-linear"))
    assert len(linear) == 12
    assert "classifier" not in linear
    everything = biased(adapt(make()))
    assert len(everything) == 18
    assert "vit.embeddings.patch_embeddings.projection" in everything
    assert len(biased(adapt(make(), exclude_modules=["fc1", "layers.0"]))) == 16
    assert biased(adapt(make(), use_bias=False)) == set()


def test_layers_to_transform_holds_for_blocks_too(families, adapt):
    model = adapt(families["hf-vit"].make(), layers_to_transform=[1])
    assert blocks(model) == {"vit.layers.1.s2a"}
    assert {name.split(".")[2] for name in biased(model)} == {"1"}
    model = adapt(families["timm-vit"].make(), "head", layers_to_transform=0, layers_pattern="blocks")
    assert blocks(model) == {"blocks.0.s2a"}
    model = adapt(families["timm-vit"].make(), "head", layers_to_transform=0)
    assert blocks(model) == {"blocks.0.s2a"}
    model = adapt(families["timm-vit"].make(), "head", layers_to_transform=1, block_modules=["blocks.0", "blocks.1"])
    assert blocks(model) == {"blocks.1.s2a"}


def test_layers_to_transform_survives_saving(families, run, adapt, trained, tmp_path):
    family = families["hf-vit"]
    torch.manual_seed(0)
    base = family.make()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = trained(adapt(base, layers_to_transform=[1], layers_pattern=["layers"]))
    expected = run(model, family.images())
    model.save_pretrained(tmp_path)
    fresh = family.make()
    fresh.load_state_dict(state)
    torch.testing.assert_close(run(PeftModel.from_pretrained(fresh, tmp_path), family.images()), expected)


def test_chosen_blocks(families, adapt):
    make = families["hf-swin"].make
    assert blocks(adapt(make(), block_modules=["layers.0.blocks.0"])) == {"swin.encoder.layers.0.blocks.0.s2a"}
    assert len(blocks(adapt(make(), block_modules=r".*layers\.1\.blocks\.\d"))) == 2
    assert blocks(adapt(make(), prompt_rank=0, side_reduction=0)) == set()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nope"]}, "target_modules"),
        ({"target_modules": "nope.*"}, "target_modules"),
        ({"block_modules": ["nope"]}, "block_modules"),
        ({"block_modules": ["mlp.fc1"]}, "single layers"),
        ({"layers_to_transform": [7]}, "layers_to_transform"),
        ({"target_modules": r".*layers\.0\.mlp"}, "not supported"),
    ],
)
def test_lists_that_match_nothing(families, adapt, fields, message):
    model = families["hf-vit"].make()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapt(model, **fields)
    if message != "not supported":
        assert list(model.state_dict()) == keys
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_sequence_model_needs_no_prompt(run, adapt):
    config = T.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    with pytest.raises(ValueError, match="prompt_rank=0"):
        adapt(T.BertForSequenceClassification(config))
    model = adapt(T.BertForSequenceClassification(config), prompt_rank=0, side_reduction=0)
    assert run(model, torch.tensor([[1, 2, 3]])).shape == (1, 2)


def test_a_model_without_blocks(adapt):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no repeated blocks"):
        adapt(model, "2")
    assert biased(adapt(model, "2", prompt_rank=0, side_reduction=0)) == {"0"}


def test_attention_output_is_left_alone(families):
    config = S2AConfig(target_modules=["out_proj", "mlp.0"], prompt_rank=0, side_reduction=0, modules_to_save=["heads"])
    with pytest.warns(UserWarning, match="does not call it"):
        model = S2AModel(families["torchvision-vit"].make(), config, "default")
    assert biased(model.model) == {f"encoder.layers.encoder_layer_{i}.mlp.0" for i in (0, 1)}


def test_a_block_with_a_child_of_that_name(families, adapt):
    model = families["hf-vit"].make()
    model.vit.layers[0].s2a = nn.Identity()
    with pytest.raises(ValueError, match="has an attribute 's2a'"):
        adapt(model)


@pytest.fixture
def saved(families, adapt, tmp_path):
    adapt(families["hf-vit"].make()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["hf-swin", "hf-resnet", "timm-vit"])
def test_adapter_of_another_architecture(families, saved, name):
    with pytest.raises(ValueError, match=r"matches no module|does not fit"):
        PeftModel.from_pretrained(families[name].make(), saved)


def test_adapter_of_another_width(saved):
    config = T.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(T.ViTForImageClassification(config), saved)


def test_adapter_of_another_depth(families, saved):
    model = families["hf-vit"].make()
    model.vit.layers = model.vit.layers[:1]
    with pytest.raises(ValueError, match="does not fit the model"):
        PeftModel.from_pretrained(model, saved)


def test_truncated_file(families, saved):
    path = saved / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(families["hf-vit"].make(), saved)
    assert path.read_bytes() == data[: len(data) // 2]


def test_tampered_file(families, saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    shutil.copy(path, saved / "copy")
    key = next(key for key in tensors if "s2a_prompt_a" in key)
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(ValueError, match=f"missing, such as .*{key.rpartition('.')[2]}"):
        PeftModel.from_pretrained(families["hf-vit"].make(), saved)
    save_file(tensors | {key.replace("prompt_a", "prompt_c"): tensors[key].clone()}, path)
    with pytest.raises(ValueError, match=r"no place for.*s2a_prompt_c"):
        PeftModel.from_pretrained(families["hf-vit"].make(), saved)


def test_another_image_size_at_run_time_without_a_grid(families, run, adapt):
    model = adapt(families["hf-vit"].make())
    block = model.base_model.model.vit.layers[0]
    with pytest.raises(ValueError, match="patch grid"):
        block(torch.zeros(1, 20, 32))
