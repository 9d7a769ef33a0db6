"""What PEFT's common tests ask of a tuner beyond custom modules: patterns, loading, sharded state, bypassed layers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_s2a import S2AConfig
from peft_s2a.tuner import BiasLayer, BlockAdapter

BIAS_ONLY = {"prompt_rank": 0, "side_reduction": 0}


def test_ranks_and_reductions_of_single_blocks(families, run, adapt, trained, tmp_path):
    family = families["hf-swin"]
    torch.manual_seed(0)
    base = family.make().eval()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    patterns = {
        "prompt_rank_pattern": {r"layers\.0\.blocks\.\d": 3, "blocks.1": 0},
        "side_reduction_pattern": {"layers.1.blocks.0": 8, "layers.1.blocks.1": 0},
    }
    model = trained(adapt(base, prompt_rank=5, side_reduction=4, **patterns))
    shapes = {
        name.removeprefix("base_model.model.swin.encoder."): {
            key.split(".")[-2]: tuple(value.shape) for key, value in module.named_parameters()
        }
        for name, module in model.named_modules()
        if isinstance(module, BlockAdapter)
    }
    assert set(shapes) == {"layers.0.blocks.0.s2a", "layers.1.blocks.0.s2a"}  # both parts are off in the last block
    first, second = shapes["layers.0.blocks.0.s2a"], shapes["layers.1.blocks.0.s2a"]
    assert (first["s2a_prompt_b"], first["s2a_side_down_weight"]) == ((3, 16), (4, 4))
    assert (second["s2a_prompt_b"], second["s2a_side_down_weight"]) == ((5, 32), (4, 4))
    expected = run(model, family.images())
    model.save_pretrained(tmp_path)
    fresh = family.make()
    fresh.load_state_dict(state)
    torch.testing.assert_close(run(PeftModel.from_pretrained(fresh, tmp_path), family.images()), expected)


def test_patterns_alone_switch_parts_on(families, adapt):
    model = adapt(families["hf-vit"].make(), prompt_rank_pattern={"layers.1": 4}, **BIAS_ONLY)
    adapters = {n for n, m in model.named_modules() if isinstance(m, BlockAdapter)}
    assert adapters == {"base_model.model.vit.layers.1.s2a"}
    with pytest.raises(ValueError, match=r"prompt_rank_pattern\['layers.1'\]=-1 must be a whole number"):
        S2AConfig(prompt_rank_pattern={"layers.1": -1})


@pytest.mark.parametrize("named", [False, True])
def test_layers_whose_weights_are_used_without_a_call(adapt, named):
    timm = pytest.importorskip("timm")
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    fields = {"target_modules": ["qkv", "proj"]} if named else {}
    with pytest.warns(UserWarning, match=r"2 layers such as blocks.0.attn.qkv are left alone: Eva uses") as caught:
        model = adapt(eva, "head", activation_bits=4, **fields).train()
    assert len(caught) == 1
    names = {name for name, module in model.named_modules() if isinstance(module, BiasLayer)}
    assert any(name.endswith("blocks.1.attn.proj") for name in names)
    assert not any("qkv" in name for name in names)
    model(torch.randn(2, 3, 28, 28)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_loading_takes_the_configuration_that_it_is_given(families, adapt, tmp_path):
    family, config = families["hf-vit"], S2AConfig(modules_to_save=["classifier"])
    get_peft_model(family.make(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.make(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode


def test_layers_say_their_widths(families, adapt):
    for name in ("hf-vit", "hf-resnet", "torchvision-vit"):
        model = adapt(families[name].make(), families[name].head)
        layers = [module for module in model.modules() if isinstance(module, BiasLayer)]
        assert layers
        assert all(isinstance(layer.in_features, int) and layer.out_features > 0 for layer in layers)


def test_swapping_the_weights_of_a_model_in_use(families, run, adapt, trained, tmp_path):
    family = families["hf-vit"]
    torch.manual_seed(0)
    model = trained(adapt(family.make()))
    first = run(model, family.images())
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    trained(model, scale=1.0)
    assert not torch.allclose(run(model, family.images()), first, atol=1e-3)
    set_peft_model_state_dict(model, state)
    torch.testing.assert_close(run(model, family.images()), first, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA"):  # peft's own: it swaps LoRA alone
        hotswap_adapter(model, tmp_path, "default")


@pytest.fixture
def one_process():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::FutureWarning")
@pytest.mark.parametrize("target_modules", [["lin"], ["lin", "conv"]])
def test_biases_in_a_sharded_model(one_process, target_modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lin = nn.Conv1d(3, 4, 1), nn.Linear(6, 2)

        def forward(self, x):
            return self.lin(self.conv(x).relu())

    config = S2AConfig(target_modules=target_modules, init_weights=False, **BIAS_ONLY)
    torch.manual_seed(0)
    model = get_peft_model(Net(), config).eval()
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = model(x)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.testing.assert_close(sharded(x), expected)
    assert len(get_peft_model_state_dict(sharded)) == len(target_modules)


@pytest.mark.filterwarnings("ignore:The head of ViT:UserWarning")
def test_what_is_of_lora_alone_says_what_to_do(families, run, adapt, trained):
    family = families["hf-vit"]
    torch.manual_seed(0)
    model = trained(adapt(family.make(), None))
    model.add_adapter("other", S2AConfig(activation_bits=None))
    with pytest.raises(NotImplementedError, match=r"not there for S2A.*set_adapter\(\['one', 'other'\]\)"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    alone = run(model, family.images())
    model.base_model.set_adapter(["default", "other"])  # what the message says; the other one is fresh
    torch.testing.assert_close(run(model, family.images()), alone)
