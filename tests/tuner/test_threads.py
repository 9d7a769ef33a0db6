"""Threads that run one model do not see each other's biases, nor disturb interception."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_s2a.memory import saved_activation_bytes


@pytest.fixture
def often_switching():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", ["hf-vit", "hf-resnet", "torchvision-vit"])
def test_inference_from_several_threads(families, run, adapt, trained, often_switching, name):
    family = families[name]
    model = trained(adapt(family.make(), family.head)).eval()
    images = family.images()
    with torch.no_grad():
        expected = run(model, images)

    def answer(_: int) -> torch.Tensor:
        with torch.no_grad():
            return run(model, images)

    before = {key: value.clone() for key, value in model.state_dict().items()}
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(answer, range(24)):
            torch.testing.assert_close(output, expected)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_training_from_several_threads_leaves_interception_as_it_was(families, run, adapt, often_switching):
    family = families["hf-vit"]
    model = adapt(family.make(), family.head, activation_bits=4).train()
    images = family.images(batch=8) if "batch" in family.images.__code__.co_varnames else family.images()
    before = saved_activation_bytes(model, images)

    def step(_: int) -> None:
        run(model, images).sum().backward()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(step, range(12)))
    assert saved_activation_bytes(model, images) == before
