"""Blocks run a few items at a time, and once more in backward; the numbers stay what they were."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_s2a import S2AConfig, blockwise
from peft_s2a.blockwise import BlockForward
from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.memory import saved_activation_bytes
from peft_s2a.ops import recompute
from peft_s2a.ops.recompute import runs_again

VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(autouse=True)
def one_item_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of items in each call of a block's own forward in training."""
    found: list[int] = []
    forward = BlockForward._forward

    def counted(self: BlockForward) -> Callable[..., Any]:
        own = forward.__get__(self)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.block.training:
                found.append(len(args[0]))
            return own(*args, **kwargs)

        return call

    monkeypatch.setattr(BlockForward, "_forward", property(counted))
    return found


def vit(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = T.ViTForImageClassification(T.ViTConfig(**VIT, num_labels=3, **fields.pop("base", {})))
    config = S2AConfig(**{"init_weights": False, "modules_to_save": ["classifier"]} | fields)
    return get_peft_model(model, config).train()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(
    model: nn.Module, x: Tensor, run: Callable[..., Any] | None = None, seed: int = 5
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    output = (run or model)(x)
    logits = output if isinstance(output, Tensor) else output.logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[n] - expected[n]).flatten() for n in expected])
    assert difference.norm() <= error * torch.cat([g.flatten() for g in expected.values()]).norm()


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1 << 30)


@pytest.mark.parametrize("bits", [None, 4])
def test_pieces_give_what_the_whole_gives(monkeypatch, calls, bits):
    model = vit(activation_bits=bits)
    output, found = step(model, images())
    assert calls == [1] * 8
    whole(monkeypatch)
    expected_output, expected = step(model, images())
    assert calls[8:] == [4, 4]
    torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)
    close(found, expected, 1e-4 if bits is None else 1e-2)


@pytest.mark.parametrize("bits", [None, 8])
def test_recomputed_blocks_give_the_gradients_of_kept_ones(calls, bits):
    expected_output, expected = step(vit(activation_bits=None), images())
    calls.clear()
    output, found = step(vit(activation_bits=bits, activation_policy="recompute"), images())
    assert calls == [1] * 16  # forward and backward
    torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)
    close(found, expected, 1e-4 if bits is None else 0.03)


def test_recompute_keeps_the_codes_of_the_blocks_inputs():
    x = images(2)
    sizes = {p: saved_activation_bytes(vit(activation_policy=p, side_reduction=0), x) for p in ("keep", "recompute")}
    assert sizes["recompute"] < 0.4 * sizes["keep"]


def test_operators_outside_recomputed_blocks_have_the_bits_of_the_blocks_inputs():
    x = images(2)
    kept = {b: saved_activation_bytes(vit(activation_policy="recompute", activation_bits=b), x) for b in (4, 8)}
    blocks = {
        b: saved_activation_bytes(vit(activation_policy="recompute", activation_bits={"block": b}), x) for b in (4, 8)
    }
    assert kept[4] == blocks[4]  # what lies around the blocks has 4 bits with either
    assert kept[8] - kept[4] > blocks[8] - blocks[4]


def test_operators_inside_recomputed_blocks_have_8_bits(monkeypatch):
    bits = []
    encode = GroupAffineCodec.encode
    monkeypatch.setattr(
        GroupAffineCodec,
        "encode",
        lambda self, values: bits.append((runs_again(), self.num_bits)) or encode(self, values),
    )
    step(vit(activation_policy="recompute", side_reduction=0), images())
    assert {b for again, b in bits if again} == {8}
    assert {b for again, b in bits if not again} == {4}


@pytest.mark.parametrize("policy", ["keep", "rebuild", "recompute"])
def test_stochastic_rounding_is_reproducible_from_the_seed(policy):
    model = vit(activation_bits=4, activation_policy=policy, activation_rounding="stochastic")
    (output, first), (_, second) = step(model, images()), step(model, images())
    exact_output, exact = step(vit(activation_bits=None), images())
    torch.testing.assert_close(output, exact_output, rtol=1e-4, atol=1e-5)
    close(first, exact, 0.3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, other = step(model, images(), seed=6)
    _, nearest = step(vit(activation_bits=4, activation_policy=policy), images())
    for different in (other, nearest):
        assert any(not torch.equal(first[name], different[name]) for name in first)


def test_the_inputs_of_recomputed_blocks_are_rounded_as_set(monkeypatch):
    codecs = []
    monkeypatch.setattr(recompute, "GroupAffineCodec", lambda *args: codecs.append(args) or GroupAffineCodec(*args))
    step(vit(activation_policy="recompute", activation_rounding="stochastic"), images())
    assert set(codecs) == {(4, 64, "stochastic")}


def test_dropout_is_the_same_in_both_runs():
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = vit(activation_bits=None, base=rates)
    _, expected = step(model, images())
    again = vit(activation_bits=None, activation_policy="recompute", base=rates)
    _, found = step(again, images())
    close(found, expected, 1e-4)


def test_recompute_under_autocast_and_in_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = step(vit(activation_bits=None), images())
        _, found = step(vit(activation_bits=8, activation_policy="recompute"), images())
    close(found, expected, 0.05)
    model = vit(activation_bits=8, activation_policy="recompute").to(torch.bfloat16)
    output, found = step(model, images().bfloat16())
    assert output.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in found.values())


def resnet(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    base = T.ResNetForImageClassification(config)
    return get_peft_model(base, S2AConfig(modules_to_save=["classifier"], **fields)).train()


def test_a_block_that_looks_at_the_whole_batch_runs_on_the_whole_batch(calls):
    step(resnet(train_batch_norm=True), images())
    assert set(calls) == {4}
    calls.clear()
    step(resnet(), images())
    assert set(calls) == {1}


def test_running_statistics_move_once():
    fields = {"train_batch_norm": True, "activation_bits": None}
    kept, again = (resnet(activation_policy=policy, **fields) for policy in ("keep", "recompute"))
    (_, expected), (_, found) = step(kept, images()), step(again, images())
    close(found, expected, 1e-4)
    for (name, one), (_, two) in zip(kept.named_buffers(), again.named_buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)


class Mixing(nn.Module):
    """A block that subtracts the mean over the batch."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.relu(self.one(self.norm(x))))
        return x + (y - y.mean(0) if self.mixes else y)


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], **kwargs: Any) -> None:
        super().__init__()
        self.stem, self.kwargs = nn.Linear(64, 64), kwargs
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, **self.kwargs)
        return x.mean(1)


def stack(block: Callable[[], nn.Module], kwargs: dict[str, Any] | None = None, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    fields = {"prompt_rank": 0, "side_reduction": 0, "activation_bits": None} | fields
    return get_peft_model(Stack(block, **kwargs or {}), S2AConfig(**fields)).train()


def tokens(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixes", [False, True])
def test_a_block_is_tried_out_before_it_is_split(monkeypatch, calls, mixes):
    model = stack(lambda: Mixing(mixes))
    output, found = step(model, tokens())
    assert set(calls) == ({4} if mixes else {1})
    whole(monkeypatch)
    expected_output, expected = step(model, tokens())
    torch.testing.assert_close(output, expected_output)
    close(found, expected, 1e-5)


class Quantized(nn.Linear):
    """A layer whose weight is in codes, and which notes in which mode it runs, as bitsandbytes repacks it in eval."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter((8 * self.weight).round().to(torch.int8), requires_grad=False)  # type: ignore[assignment]
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add(self.training)
        return nn.functional.linear(x, self.weight.float() / 8, self.bias)


def test_layers_with_weights_in_codes_are_not_tried_out_in_eval(calls):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(64), Quantized(64, 64), Quantized(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.one(self.norm(x))))

    model = stack(Block)
    step(model, tokens())
    assert set(calls) == {1}
    assert all(m.modes == {True} for m in model.modules() if type(m) is Quantized)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, shift: Any = None, cache: Any = None) -> Any:
        if cache is not None:
            cache.calls += 1
        y = x + self.two(torch.relu(self.one(self.norm(x))))
        return y if shift is None else y + shift


class Cache:
    calls = 0


@pytest.mark.parametrize(
    ("kwargs", "items"),
    [
        ({"shift": torch.ones(1, 1, 64)}, 1),
        ({"shift": torch.ones(4, 1, 64)}, 4),  # the items' own, or four of something else?
        ({"cache": Cache()}, 4),
    ],
)
def test_arguments_that_may_belong_to_the_batch_keep_it_whole(calls, kwargs, items):
    step(stack(Biased, kwargs), tokens())
    assert set(calls) == {items}


def test_a_cache_sees_every_call_once():
    cache = Cache()
    step(stack(Biased, {"cache": cache}, activation_policy="recompute"), tokens())
    assert cache.calls == 2


def test_other_tensors_are_there_again(calls):
    shift = torch.linspace(0, 1, 4 * 64).view(4, 1, 64)
    _, expected = step(stack(Biased, {"shift": shift}), tokens())
    _, found = step(stack(Biased, {"shift": shift}, activation_policy="recompute"), tokens())
    close(found, expected, 1e-5)


def test_a_block_that_is_watched_from_inside_is_not_split(calls):
    model = stack(Biased)
    seen: list[int] = []
    model.base_model.model.layers[0].one.register_forward_hook(lambda m, a, o: seen.append(len(o)))
    step(model, tokens())
    assert seen == [4]
    assert sorted(set(calls)) == [1, 4]


def test_in_evaluation_and_without_gradients_nothing_is_split(calls):
    model = stack(Biased)
    with torch.no_grad():
        model(tokens())
    assert calls == [4, 4]
    calls.clear()
    reference = Stack(Biased)
    own = {k: v for k, v in model.base_model.model.state_dict().items() if "s2a" not in k}
    reference.load_state_dict({k.replace("base_layer.", ""): v for k, v in own.items()})
    torch.testing.assert_close(model.eval()(tokens()), reference.eval()(tokens()), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_of_the_model(reentrant):
    model = stack(Biased, activation_policy="recompute")
    _, expected = step(model, tokens())
    x = tokens().requires_grad_()
    _, found = step(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    close(found, expected, 1e-5)


def test_two_backwards_over_one_graph():
    model = vit(activation_policy="recompute")
    loss = model(images()).logits.square().sum()
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, first, 1e-6)


def test_hooks_that_wait_for_gradients_fire_once():
    model = vit(activation_policy="recompute")
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    step(model, images())
    assert len(fired) == len(set(fired))
    assert set(fired) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_copies_run_their_own_blocks():
    model = vit(activation_policy="recompute")
    _, expected = step(model, images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        forwards = [vars(m)["forward"] for m in other.modules() if isinstance(vars(m).get("forward"), BlockForward)]
        assert len(forwards) == 2
        assert all(f.block in set(other.modules()) for f in forwards)
        close(step(other, images())[1], expected, 1e-6)


def test_the_signature_is_the_block_s_own():
    block = stack(Biased).base_model.model.layers[0]
    assert list(inspect.signature(block.forward).parameters) == ["x", "shift", "cache"]


def test_unloading_puts_the_forward_back():
    model = vit()
    base = model.unload()
    assert not any(isinstance(vars(m).get("forward"), BlockForward) for m in base.modules())


@pytest.mark.parametrize("prompt_rank", [0, 2])
def test_a_block_that_writes_over_its_input_is_tried_on_a_copy(prompt_rank):
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.mul_(2)
            return x + self.other(self.linear(self.norm(x)).tanh())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Doubling(), Doubling()])

        def forward(self, x):
            x = x * 1
            for block in self.blocks:
                x = block(x)
            return x

    shape = {"layout": "tokens", "channels": 8, "out_channels": 8, "grid": [3], "num_extra": 0}
    torch.manual_seed(0)
    base, x = Model(), torch.randn(4, 3, 8)
    expected = base(x).detach()
    config = S2AConfig(
        block_modules=r"blocks\.\d+",
        block_shapes={"blocks.0": shape, "blocks.1": shape},
        target_modules=["linear"],
        prompt_rank=prompt_rank,
    )
    model = get_peft_model(base, config).train()
    assert all(isinstance(vars(block).get("forward"), BlockForward) for block in base.blocks)
    for _ in range(2):
        torch.testing.assert_close(model(x).detach(), expected)
