"""Running statistics: frozen by default, or trained and saved with the adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_s2a import S2AConfig

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ConvNet(nn.Module):
    """Two batch-norm blocks without ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(2)))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.sigmoid(self.blocks(self.bn(self.stem(x)))).mean((2, 3)))


BIAS_ONLY = {"prompt_rank": 0, "side_reduction": 0}


@pytest.fixture
def base():
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 3 + 1


@pytest.mark.parametrize("targets", [None, ["stem"]])
def test_statistics_are_frozen_in_training(base, images, adapt, targets):
    before = {k: v.clone() for k, v in base.state_dict().items() if k.endswith(STATISTICS)}
    model = adapt(base, "fc", target_modules=targets, **BIAS_ONLY)
    expected = model.eval()(images).detach()
    torch.testing.assert_close(model.train()(images), expected)
    after = [v for k, v in model.state_dict().items() if k.endswith(STATISTICS)]
    torch.testing.assert_close(after, list(before.values()), rtol=0, atol=0)


def test_frozen_statistics_are_let_go_by_unload(base, images, adapt):
    model = adapt(base, "fc", target_modules=["stem"], **BIAS_ONLY).train()
    model(images)
    back = model.unload().train()
    back(images)
    assert back.bn.num_batches_tracked == 1


def test_statistics_in_a_saved_module_are_trained(base, images, adapt):
    model = adapt(base, "fc", modules_to_save=["blocks", "fc"], **BIAS_ONLY).train()
    model(images)
    inner = model.base_model.model
    assert inner.blocks.modules_to_save["default"][0][1].num_batches_tracked == 1
    assert inner.bn.num_batches_tracked == 0


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["stem"]}])
def test_trained_statistics_belong_to_the_adapter(base, images, adapt, tmp_path, fields):
    frozen = copy.deepcopy(base)
    model = adapt(base, "fc", train_batch_norm=True, **fields, **BIAS_ONLY)
    start = model(images).detach()
    model.train()
    reference = copy.deepcopy(frozen).train()
    for _ in range(3):
        torch.testing.assert_close(model(images), reference(images))
    model.eval()
    trained = model(images).detach()
    torch.testing.assert_close(trained, reference.eval()(images))
    assert not torch.allclose(trained, start)
    with model.disable_adapter():
        torch.testing.assert_close(model(images), start)
    for key, value in frozen.state_dict().items():
        if key.endswith(STATISTICS) and "blocks" not in key:
            torch.testing.assert_close(model.base_model.model.bn.base_layer.state_dict()[key[3:]], value)

    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(frozen), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded.eval()(images), trained)

    model.merge_adapter()
    torch.testing.assert_close(model(images), trained)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(images), start)
    torch.testing.assert_close(model.merge_and_unload().eval()(images), trained)


def test_each_adapter_has_its_own_statistics(base, images, adapt):
    model = adapt(base, "fc", train_batch_norm=True, **BIAS_ONLY)
    config = S2AConfig(train_batch_norm=True, modules_to_save=["fc"], activation_bits=None, **BIAS_ONLY)
    model.add_adapter("other", config)
    start = model(images).detach()
    model.train()(images)
    model.eval().set_adapter("other")
    torch.testing.assert_close(model(images), start)
    model.delete_adapter("default")
    assert list(model.base_model.model.bn.s2a_running_mean) == ["other"]
