"""Whole models with trained head and adapters, in one graph."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("name", ["hf-vit", "hf-swin", "hf-resnet"])
def test_a_whole_model_in_one_graph(name, families, adapt, trained, run) -> None:
    family = families[name]
    torch._dynamo.reset()
    gradients = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = trained(adapt(family.make(), activation_bits=4).train())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        called = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        output = run(called, family.images(batch=8))
        output.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in grads.values())
        gradients.append(torch.cat([grad.flatten() for grad in grads.values()]))
    eager, compiled = gradients
    assert float((compiled - eager).norm() / eager.norm()) < 0.02
