"""The methods of the benchmarks on tiny models: what they train and compute, and that they begin as the base model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.memory import check_gradients, logits
from benchmarks.methods import ADAPTERS, METHODS, apply
from benchmarks.models import BenchmarkModel
from benchmarks.peers import NUM_PROMPTS, NotApplicableError

CLASSES = 3


def vit() -> BenchmarkModel:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    return BenchmarkModel(ViTForImageClassification(config), ["classifier"], True)


def swin() -> BenchmarkModel:
    config = SwinConfig(
        image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, patch_size=4, num_labels=CLASSES
    )
    return BenchmarkModel(SwinForImageClassification(config), ["classifier"], True)


def resnet() -> BenchmarkModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    return BenchmarkModel(ResNetForImageClassification(config), ["classifier.1"], True)


MODELS: dict[str, Callable[[], BenchmarkModel]] = {"vit": vit, "swin": swin, "resnet": resnet}
ABSENT = {
    ("vpt_deep", "swin"): "plain sequence of blocks",
    ("vpt_deep", "resnet"): "plain sequence of blocks",
    ("lora_qv", "resnet"): "no query and value",
    ("velora", "resnet"): "linear layers only",
    ("lora_fa", "resnet"): "linear layers only",
    ("lora_checkpointing", "resnet"): "no gradient checkpointing",
}
PARTS = {
    "bias_only": ("bias",),
    "linear_probe": (),
    "lora_qv": ("lora_A", "lora_B"),
    "lora_all": ("lora_A", "lora_B"),
    "lora_fa": ("lora_B",),
    "velora": ("lora_A", "lora_B"),
    "lora_checkpointing": ("lora_A", "lora_B"),
    "vpt_deep": ("prompts",),
    "adapter": ("down", "up"),
    "s2a": ("s2a_",),
}
"""What has to be in the names of what is trained beside the head."""


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 2])}


QUANTISED = ("qlora", "qlora_checkpointing", "s2a_nf4")
"""Methods on quantised weights: another base model, which needs bitsandbytes."""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("full", *QUANTISED)])
def test_a_method_begins_as_the_base_model_and_trains_its_own_parts(method: str, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    heads = model.heads
    expected = logits(model.module, batch())
    if (method, name) in ABSENT:
        with pytest.raises(NotApplicableError, match=ABSENT[method, name]):
            apply(method, model)
        return
    adapted = apply(method, model)
    if method in ADAPTERS:
        torch.testing.assert_close(logits(adapted, batch()), expected)
    else:
        assert method in ("linear_probe", "bias_only", "vpt_deep")
    check_gradients(adapted, batch())
    trained = [path for path, parameter in adapted.named_parameters() if parameter.requires_grad]
    in_head = [path for path in trained if "modules_to_save" in path or path.rpartition(".")[0] in heads]
    assert len(in_head) == 2
    others = set(trained) - set(in_head)
    assert bool(others) == bool(PARTS[method])
    assert all(any(part in path for part in PARTS[method]) for path in others), others


def test_prompts_are_read_by_their_block_and_dropped_behind_it() -> None:
    torch.manual_seed(0)
    model = vit()
    plain = vit().module
    plain.load_state_dict(model.module.state_dict())
    adapted = apply("vpt_deep", model).eval()
    plain.eval()
    prompts = [value for path, value in adapted.named_parameters() if path.endswith("prompts")]
    assert [tuple(value.shape) for value in prompts] == [(NUM_PROMPTS, 32)] * 2
    pixels = batch()["pixel_values"]
    tokens = plain.vit.embeddings(pixels)
    for layer, rows in zip(plain.vit.layers, prompts, strict=True):
        # in front of the tokens, as in the paper: order does not matter to the block
        joined = torch.cat([rows.expand(2, -1, -1), tokens], dim=1)
        tokens = layer(joined)[:, NUM_PROMPTS:]
    expected = plain.classifier(plain.vit.layernorm(tokens)[:, 0])
    torch.testing.assert_close(adapted(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize(("name", "kind"), [("vit", nn.Linear), ("swin", nn.Linear), ("resnet", nn.Conv2d)])
def test_an_adapter_adds_a_bottleneck_of_the_blocks_output(name: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    adapted = apply("adapter", MODELS[name]()).eval()
    block = next(module for module in adapted.modules() if hasattr(module, "bottleneck"))
    adapter = block.bottleneck
    assert isinstance(adapter.down, kind)
    seen: dict[str, Tensor] = {}
    adapter.register_forward_hook(lambda module, args, output: seen.update(before=args[0], after=output))
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.up.bias)
    adapted(pixel_values=batch()["pixel_values"])
    expected = seen["before"] + adapter.up(adapter.down(seen["before"]).clamp(min=0))
    torch.testing.assert_close(seen["after"], expected)
    assert not torch.allclose(seen["after"], seen["before"])


def test_lora_fa_keeps_less_than_lora() -> None:
    from peft_s2a.memory import saved_activation_bytes

    torch.manual_seed(0)
    kept = {method: saved_activation_bytes(apply(method, vit()), batch()) for method in ("lora_all", "lora_fa")}
    assert kept["lora_fa"] < kept["lora_all"]
