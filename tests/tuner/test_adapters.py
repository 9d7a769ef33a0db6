"""Several adapters, switching, copies, dtypes, transformers' own adapter methods."""

from __future__ import annotations

import copy
import io
import json
import warnings

import peft
import pytest
import torch
from peft import AutoPeftModel, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file

from peft_s2a import S2AConfig
from peft_s2a.tuner import BiasLayer, BlockAdapter

ALL = ["hf-vit", "hf-swin", "hf-resnet", "timm-swin", "torchvision-vit"]


@pytest.fixture
def vit(families):
    torch.manual_seed(0)
    return families["hf-vit"].make().eval()


@pytest.fixture
def images(families):
    return families["hf-vit"].images()


def test_adapters_add_up_and_switch(vit, images, run, adapt, trained):
    blocks_off = {"prompt_rank": 0, "side_reduction": 0, "activation_bits": None}
    model = adapt(vit, None, prompt_rank=0, side_reduction=0, target_modules=["classifier"])
    base = run(model, images).detach()
    model.add_adapter("other", S2AConfig(target_modules=["classifier"], **blocks_off))
    trained(model), trained(model, "other", 0.3)
    one = run(model, images)
    model.set_adapter("other")
    two = run(model, images)
    model.base_model.set_adapter(["default", "other"])
    both = run(model, images)
    torch.testing.assert_close(both - base, (one - base) + (two - base))
    assert not torch.allclose(one, two)
    with model.disable_adapter():
        torch.testing.assert_close(run(model, images), base)


@pytest.mark.filterwarnings("ignore:.*neither trained nor saved")
def test_block_adapters_start_from_the_same_input(vit, images, run, adapt, trained):
    model = trained(adapt(vit, use_bias=False, side_reduction=0, block_modules=["layers.0"]))
    config = S2AConfig(use_bias=False, side_reduction=0, block_modules=["layers.0"], activation_bits=None)
    model.add_adapter("other", config)
    trained(model, "other", 0.3)
    seen = {}
    block = vit.vit.layers[0]
    block.layernorm_before.register_forward_pre_hook(lambda m, a: seen.__setitem__("x", a[0]))
    inputs = {}
    for names in ([], ["default"], ["other"], ["default", "other"]):
        if names:
            model.base_model.set_adapter(names)
            run(model, images)
        else:
            with model.disable_adapter():
                run(model, images)
        inputs[tuple(names)] = seen["x"]
    x = inputs[()]
    torch.testing.assert_close(
        inputs["default", "other"] - x, (inputs["default",] - x) + (inputs["other",] - x), rtol=1e-5, atol=1e-6
    )


def test_a_second_adapter_on_other_modules(vit, images, run, adapt, trained):
    model = adapt(vit, target_modules=["q_proj"], block_modules=["layers.0"])
    model.add_adapter(
        "other",
        S2AConfig(
            target_modules=["fc1"], block_modules=["layers.1"], modules_to_save=["classifier"], activation_bits=None
        ),
    )
    trained(model), trained(model, "other")
    layers = model.base_model.model.vit.layers
    assert isinstance(layers[0].s2a, BlockAdapter)
    assert list(layers[1].s2a.shapes) == ["other"]
    assert isinstance(layers[0].mlp.fc1, BiasLayer)
    one = run(model, images)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n in trainable if n.endswith("other") or ".other." in n]
    model.set_adapter("other")
    two = run(model, images)
    assert not torch.allclose(one, two)
    model.delete_adapter("default")
    torch.testing.assert_close(run(model, images), two)
    assert list(model.peft_config) == ["other"]
    assert not layers[0].s2a.shapes


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_are_independent(families, run, adapt, trained, name):
    family = families[name]
    model = trained(adapt(family.make(), family.head))
    expected = run(model, family.images()).detach()
    buffer = io.BytesIO()
    torch.save(model, buffer) if "torchvision" not in name else None
    clones = [copy.deepcopy(model)]
    if buffer.tell():
        buffer.seek(0)
        clones.append(torch.load(buffer, weights_only=False))
    trained(model, scale=1.0)
    for clone in clones:
        torch.testing.assert_close(run(clone, family.images()), expected)
        trained(clone, scale=1.0)
        assert not torch.allclose(run(clone, family.images()), expected, atol=1e-3)
        clone.unload()


def test_only_the_adapter_is_saved(vit, adapt, tmp_path):
    model = adapt(vit)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".s2a_" in key or "classifier" in key for key in tensors)
    assert not any("default" in key for key in tensors)
    assert sum(t.numel() for t in tensors.values()) == model.get_nb_trainable_parameters()[0]
    assert "import peft_s2a" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "S2A"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import peft_s2a") == 2  # code and the sentence above it


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["hf-vit", "hf-resnet", "hf-swin"])
def test_loading_beside_another(families, run, adapt, trained, tmp_path, name, low_cpu_mem_usage):
    family = families[name]
    torch.manual_seed(0)
    base = family.make().eval()
    model = trained(adapt(copy.deepcopy(base)))
    model.save_pretrained(tmp_path)
    expected = run(model, family.images()).detach()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(run(loaded, family.images()), expected)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    torch.testing.assert_close(run(loaded, family.images()), expected)


def test_auto_class(vit, images, run, adapt, trained, tmp_path):
    vit.save_pretrained(tmp_path / "base")
    base = type(vit).from_pretrained(tmp_path / "base")
    model = trained(adapt(base))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(run(loaded, images), run(model, images))


@pytest.mark.parametrize("name", ["hf-vit", "hf-swin", "hf-resnet", "hf-timm-wrapper", "hf-clip"])
def test_transformers_adapter_methods(families, run, trained, tmp_path, name):
    family = families[name]
    torch.manual_seed(0)
    base = family.make().eval()
    model = copy.deepcopy(base)
    model.add_adapter(S2AConfig(modules_to_save=[family.head], activation_bits=None), "mine")
    trained(model, "mine")
    expected = run(model, family.images()).detach()
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    other.load_adapter(tmp_path, "again")
    torch.testing.assert_close(run(other, family.images()), expected)
    other.disable_adapters()
    torch.testing.assert_close(run(other, family.images()), run(base, family.images()))
    other.enable_adapters()
    other.delete_adapter("again")
    torch.testing.assert_close(run(other, family.images()), run(base, family.images()))


@pytest.mark.filterwarnings("ignore:.*neither trained nor saved")
def test_injection_by_state_dict(vit, images, run, adapt, trained):
    model = trained(adapt(copy.deepcopy(vit), None, target_modules=["q_proj"]))
    state = peft.get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    config = S2AConfig(target_modules=["q_proj"], activation_bits=None, inference_mode=True)
    injected = inject_adapter_in_model(config, vit, state_dict=state)
    result = peft.set_peft_model_state_dict(injected, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(run(injected, images), run(model, images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_low_precision_base(families, run, adapt, trained, name, dtype):
    family = families[name]
    model = adapt(family.make().to(dtype), family.head).train()
    assert {p.dtype for n, p in model.named_parameters() if "s2a_" in n} == {torch.float32}
    trained(model)
    output = run(model, family.images().to(dtype))
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_adapter_dtype_is_kept_on_request(vit):
    config = S2AConfig(modules_to_save=["classifier"])
    model = peft.get_peft_model(vit.to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "s2a_" in n} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["hf-vit", "hf-resnet", "timm-swin"])
def test_compiled_without_graph_breaks(families, run, adapt, trained, name):
    family = families[name]
    model = trained(adapt(family.make(), family.head))
    expected = run(model, family.images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, family.images()), expected, rtol=1e-4, atol=1e-5)


def test_config_object_can_be_used_again(families, adapt):
    config = S2AConfig(modules_to_save=["classifier"])
    before = config.to_dict()
    for name in ("hf-vit", "hf-swin"):
        peft.get_peft_model(families[name].make(), config)
    assert config.to_dict() == before | {"base_model_name_or_path": config.base_model_name_or_path}


def test_status(vit, adapt):
    model = adapt(vit)
    status = model.get_model_status()
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert status.adapter_model_type == "S2AModel"
    assert all(layer.active_adapters == ["default"] for layer in model.get_layer_status())


def test_head_warning(vit, images):
    with pytest.warns(UserWarning, match=r"modules_to_save=\['classifier'\]"):
        peft.get_peft_model(vit, S2AConfig())


def test_no_head_warning_without_a_head(families):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*neither trained nor saved")
        peft.get_peft_model(families["hf-siglip-vision"].make(), S2AConfig())
