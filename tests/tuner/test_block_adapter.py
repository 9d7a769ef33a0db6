"""What the side branch is added to: the block's output is written over where nobody else sees it, and only there."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import nn

from peft_s2a import S2AConfig, blockwise
from peft_s2a.ops.joining import Whole
from peft_s2a.tuner import block as module

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}


def make_model(base: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    base = base or T.ViTForImageClassification(T.ViTConfig(**SIZES))
    torch.manual_seed(1)
    config = S2AConfig(init_weights=False, activation_bits=8, modules_to_save=["classifier"])
    return get_peft_model(base, config).train()  # type: ignore[arg-type]


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    output = model(pixel_values=images, labels=torch.arange(4) % 3)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each sum that is made, whether the block's output was joined from pieces."""
    found: list[bool] = []
    add = module.add_side

    def recorded(*args: Any, in_place: bool) -> torch.Tensor:
        found.append(in_place)
        return add(*args, in_place=in_place)

    monkeypatch.setattr(module, "add_side", recorded)
    return found


@pytest.mark.parametrize("pieces", [False, True])
def test_the_sum_is_the_same_in_either_memory(pieces: bool, ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make_model())
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1 if pieces else 1 << 30)
    ways.clear()
    logits, gradients = run(make_model())
    assert ways == [pieces] * 2
    torch.testing.assert_close(logits, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0.05, atol=1e-3)


def test_an_output_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1)
    made: list[int] = []
    empty = Whole._empty

    def counted(self: Whole, piece: torch.Tensor) -> torch.Tensor:
        made.append(len(piece))
        return empty(self, piece)

    monkeypatch.setattr(Whole, "_empty", counted)
    make_model()(pixel_values=torch.randn(4, 3, 32, 32))
    assert made == [1, 1]  # one for each block


class Look:
    """A hook, or a wrapper of a forward, that keeps what comes out, and a copy of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.seen.append((output, output.detach().clone()))

    def around(self, forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self(nn.Module(), args, output)
            return output

        return wrapped

    def unchanged(self) -> bool:
        return bool(self.seen) and all(torch.equal(output, copy) for output, copy in self.seen)


@pytest.mark.parametrize("way", ["hook", "global hook", "wrapper"])
def test_others_keep_what_they_saw(way: str, ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1)
    base, look = T.ViTForImageClassification(T.ViTConfig(**SIZES)), Look()
    layer = base.vit.layers[0]
    if way == "hook":
        layer.register_forward_hook(look)
    model = make_model(base)
    if way == "wrapper":
        layer.forward = look.around(layer.forward)
    handle = nn.modules.module.register_module_forward_hook(look) if way == "global hook" else None
    run(model)
    if handle is not None:
        handle.remove()
    assert ways == [False, way != "global hook"]
    assert look.unchanged()


def test_what_an_inner_block_joined_is_not_the_outer_blocks(ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1)

    class Chain(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    def make_stage() -> Chain:
        return Chain(*(nn.TransformerEncoderLayer(32, 2, 64, dropout=0, batch_first=True) for _ in range(2)))

    stages = make_stage(), make_stage()
    base, look = Chain(*stages), Look()
    stages[0].parts[1].register_forward_hook(look)
    shape = {"layout": "tokens", "channels": 32, "out_channels": 32, "grid": [5], "num_extra": 0}
    config = S2AConfig(
        block_modules=r"parts\.\d+",
        block_shapes={"parts.0": shape, "parts.1": shape},
        prompt_rank=0,
        init_weights=False,
        target_modules=["linear1"],
    )
    x = torch.randn(4, 5, 32)
    get_peft_model(base, config).train()(x).sum().backward()  # type: ignore[arg-type]
    assert len(ways) == 2
    assert look.unchanged()


def images_of(items: int, seed: int) -> torch.Tensor:
    return torch.randn(items, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        expected = model(pixel_values=images_of(2, 0)).logits

    def fails(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    layers = [m for m in model.modules() if isinstance(m, T.models.vit.modeling_vit.ViTLayer)]
    for owner, name in ((module, "pool_for_side"), (layers[1].mlp, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(torch.OutOfMemoryError):
                model(pixel_values=images_of(2, 0))
        assert not any(m._pooled.found for m in model.modules() if isinstance(m, module.BlockAdapter))
    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(model(pixel_values=images_of(2, 0)).logits, expected, rtol=0, atol=0)
    copy.deepcopy(model)  # which graphs of a step would not allow


def test_threads_have_their_own_prompts_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    batches = [images_of(2, 0), images_of(3, 1)]

    def logits(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values=images).logits

    expected = [logits(images) for images in batches]
    together, leave = threading.Barrier(2, timeout=60), module.leave_prompt

    def left(block: nn.Module, prompt: torch.Tensor | None) -> None:
        leave(block, prompt)
        if prompt is not None:
            together.wait()  # both threads are now between the hook and the forward

    monkeypatch.setattr(module, "leave_prompt", left)
    with ThreadPoolExecutor(2) as pool:
        for one, other in zip(pool.map(logits, batches), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_inference_mode() -> None:
    model = make_model()
    with torch.inference_mode():
        for training in (True, False):
            assert model.train(training)(pixel_values=torch.randn(2, 3, 32, 32)).logits.isfinite().all()
