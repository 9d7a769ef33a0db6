"""What PEFT expects of every method: any module, status, gradients on and off, embeddings and tied weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_s2a import S2AConfig
from peft_s2a.tuner import BiasLayer

BIAS_ONLY = {"prompt_rank": 0, "side_reduction": 0}
NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Dropout(0.0), nn.Linear(20, 2)), (5, 10), "3"),
    "mlp without bias": (lambda: nn.Sequential(nn.Linear(10, 20, False), nn.ReLU(), nn.Linear(20, 2)), (5, 10), "2"),
    "gpt-2 conv1d": (lambda: nn.Sequential(Conv1D(20, 10), nn.ReLU(), nn.Linear(20, 2)), (5, 10), "2"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 2, 1)), (5, 3, 9), "2"),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1)), (5, 3, 9, 9), "2"),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.Conv3d(6, 2, 1)), (2, 1, 5, 5, 5), "2"),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(10), nn.RMSNorm(10), nn.Linear(10, 2)), (5, 10), "2"),
}


@pytest.mark.filterwarnings("ignore:Merging gives:UserWarning")
@pytest.mark.parametrize("name", NETS)
def test_any_module(adapt, trained, tmp_path, name):
    make, shape, head = NETS[name]
    torch.manual_seed(0)
    base, x = make().eval(), torch.randn(shape)
    untouched, expected = copy.deepcopy(base), base(x).detach()
    model = adapt(base, head, activation_bits=4, **BIAS_ONLY)
    torch.testing.assert_close(model(x), expected)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    changed = trained(model).eval()(x).detach()
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(untouched, tmp_path)(x), changed)
    if name != "norms":  # an RMSNorm has no bias to merge into
        merged = model.merge_and_unload()
        assert not any(isinstance(module, BiasLayer) for module in merged.modules())
        torch.testing.assert_close(merged(x), changed)


def test_status_of_layers_and_model(families, adapt):
    model = adapt(families["hf-vit"].make())
    layers = {status.name: status for status in model.get_layer_status()}
    assert len(layers) == 18 + 2 + 1  # biases, blocks, and the head that is saved whole
    fc1, block = layers["model.vit.layers.0.mlp.fc1"], layers["model.vit.layers.0.s2a"]
    assert fc1.module_type == "BiasLayer"
    assert block.module_type == "BlockAdapter"
    for status in layers.values():
        assert status.enabled
        assert status.requires_grad == {"default": True}
        assert status.available_adapters == ["default"]
        assert status.merged_adapters == []
    status = model.get_model_status()
    assert status.num_adapter_layers == 21
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    with model.disable_adapter():
        assert not model.get_model_status().enabled
    model.add_adapter("other", S2AConfig(target_modules=["fc1"], modules_to_save=["classifier"], **BIAS_ONLY))
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}


def test_gradients_on_and_off(families, adapt):
    model = adapt(families["hf-vit"].make())
    model.add_adapter("other", S2AConfig(modules_to_save=["classifier"]))

    def trainable() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad}

    start = trainable()
    model.set_requires_grad("default", False)
    assert not trainable()
    model.set_requires_grad(["default", "other"])
    assert len(trainable()) == 2 * len(start)
    model.set_requires_grad("other", False)
    assert trainable() == start


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_embeddings_and_tied_weights_are_left_alone(target_modules):
    torch.manual_seed(0)
    config = T.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    base = T.BertForMaskedLM(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    expected = base(tokens).logits.detach()
    weight = base.bert.embeddings.word_embeddings.weight
    assert base.cls.predictions.decoder.weight is weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*neither trained nor saved")
        model = get_peft_model(base, S2AConfig(target_modules=target_modules, **BIAS_ONLY))
    inner = model.base_model.model
    assert inner.cls.predictions.decoder.weight is inner.bert.embeddings.word_embeddings.weight is weight
    assert not any(isinstance(module, BiasLayer) for _, module in inner.cls.named_modules())
    assert type(inner.bert.embeddings.word_embeddings) is nn.Embedding
    torch.testing.assert_close(model(tokens).logits, expected)
    assert not weight.requires_grad


def test_an_embedding_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lin = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.lin(self.embed(x))

    with pytest.raises(ValueError, match="embed .Embedding. is not supported"):
        get_peft_model(Net(), S2AConfig(target_modules=["embed"], **BIAS_ONLY))


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_layers_that_no_output_depends_on_are_left_out(families, adapt, target_modules):
    model = adapt(families["hf-clip"].make(), target_modules=target_modules)
    names = [name for name, module in model.named_modules() if isinstance(module, BiasLayer)]
    assert any("layers.1.mlp.fc2" in name for name in names)
    assert not any("post_layernorm" in name for name in names)


def test_a_named_layer_is_taken_whatever_uses_it(families, adapt):
    model = adapt(families["hf-clip"].make(), target_modules=["post_layernorm"])
    assert isinstance(model.base_model.model.vision_model.post_layernorm, BiasLayer)
