"""How a tensor came from a normalised input: recorded while the model runs, made again from what is kept."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.mode import ActivationMode
from peft_s2a.ops.lineage import LineageBook, compile_program
from peft_s2a.settings import ActivationSettings

B, L, D = 4, 16, 128
Leaf = Callable[..., Tensor]


@pytest.fixture
def mode() -> ActivationMode:
    return ActivationMode(ActivationSettings.from_config(8, activation_policy="rebuild"))


def weights(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def timm_queries(y: Tensor) -> Tensor:
    return F.linear(y, weights(3 * D, D), weights(3 * D)).reshape(B, L, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)[1]


def windows(y: Tensor) -> Tensor:
    shifted = torch.roll(F.pad(y.view(B, 4, 4, D), (0, 0, 0, 2, 0, 2)), (-1, -1), (1, 2))
    parts = shifted.view(B, 3, 2, 3, 2, D).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, D)
    return F.linear(parts, weights(D, D)).view(-1, 4, 2, D // 2).transpose(1, 2)


def rotary(y: Tensor) -> Tensor:
    angles = torch.arange(L * 16.0).view(1, 1, L, 16)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    q = F.linear(y, weights(D, D)).view(B, L, 4, 32).transpose(1, 2)
    left, right = q.chunk(2, dim=-1)
    return q * cos + torch.cat((-right, left), -1) * sin


def per_item_scale(y: Tensor) -> Tensor:
    return F.linear(y, weights(D, D)) * torch.arange(1.0, B + 1).view(B, 1, 1)


WAYS = {
    "linear": lambda y: F.linear(y, weights(2 * D, D), weights(2 * D)),
    "two products": lambda y: F.linear(F.linear(y, weights(8, D)), weights(D, 8)),
    "timm's queries": timm_queries,
    "swin's windows": windows,
    "rotary": rotary,
    "a constant with the items": per_item_scale,
    "flattened": lambda y: F.linear(y.flatten(0, 1), weights(D, D)).view(B, L, 2, -1)[:, :, 1],
    "channels moved": lambda y: F.linear(y, weights(D, D)).movedim(-1, 1).unsqueeze(1),
}


@pytest.mark.parametrize("name", list(WAYS))
def test_a_program_makes_the_tensor_again(mode, leaf, name):
    x, gamma, beta = leaf(B, L, D), leaf(D, needs=False), leaf(D)
    with mode:
        found = WAYS[name](F.layer_norm(x, (D,), gamma, beta))
    program, leaves = compile_program([mode.context.lineage.get(found)])
    (again,) = program.run(leaves)
    assert again.shape == found.shape
    assert again.dtype == found.dtype
    assert (again - found).norm() < 0.01 * found.norm()  # 8 bits of the normalised input

    assert program.count == B  # and a few items at a time
    items = program.items[0]
    pieces = [program.run(leaves, span)[0] for span in ((0, 1), (1, 4))]
    torch.testing.assert_close(torch.cat(pieces, dim=items.dim), again, rtol=1e-5, atol=1e-5)


def test_common_steps_run_once(mode, leaf):
    x = leaf(B, L, D)
    with mode:
        y = F.layer_norm(x, (D,))
        q, k, v = F.linear(y, weights(3 * D, D)).chunk(3, -1)
    program, leaves = compile_program([mode.context.lineage.get(t) for t in (q, k, v)])
    assert len(program.instructions) == 5  # decode, one product, three views
    for again, found in zip(program.run(leaves), (q, k, v), strict=True):
        assert (again - found).norm() < 0.01 * found.norm()


def test_the_items_are_lost_where_a_function_mixes_them(mode, leaf):
    x = leaf(B, L, D)
    with mode:
        y = F.linear(F.layer_norm(x, (D,)), weights(D, D))
        rolled, half, merged = torch.roll(y, 1, 0), y[:2], y.view(B * L * 2, D // 2).view(2, -1)
    for found in (rolled, half, merged):
        program, leaves = compile_program([mode.context.lineage.get(found)])
        assert program.count is None or program.items[0] is None
        (again,) = program.run(leaves)
        assert (again - found).norm() < 0.01 * found.norm()


@pytest.mark.parametrize(
    "function",
    [
        lambda y: F.linear(y, weights(D, D).requires_grad_()),  # a trained weight may be another one in backward
        lambda y: y + torch.randn(B, L, D, requires_grad=True),
        lambda y: y.exp(),
        lambda y: y[torch.tensor([0, 2])],
    ],
)
def test_what_cannot_be_made_again_has_no_lineage(mode, leaf, function):
    with mode:
        found = function(F.layer_norm(leaf(B, L, D), (D,)))
    assert mode.context.lineage.get(found) is None


def test_a_change_in_place_ends_the_lineage(mode, leaf):
    constant = torch.ones(D)
    with mode:
        y = F.layer_norm(leaf(B, L, D), (D,))
        z, scaled = F.linear(y, weights(D, D)), y * constant
        assert mode.context.lineage.get(z) is not None
        z.mul_(2)
        constant.add_(1)
    assert mode.context.lineage.get(z) is None
    assert mode.context.lineage.get(scaled) is None


def test_nothing_outlives_the_tensors(mode, leaf):
    with mode:
        y = F.layer_norm(leaf(B, L, D), (D,))
        found = rotary(y)
    program, leaves = compile_program([mode.context.lineage.get(found)])
    codes = [weakref.ref(t) for t in leaves]
    gc.disable()
    try:
        made = weakref.ref(program.run(leaves, (0, 2))[0])
        assert made() is None
        del leaves, y, found
        assert all(ref() is None for ref in codes)  # no cycle keeps them
    finally:
        gc.enable()


def test_a_book_is_copied_empty(mode, leaf):
    with mode:
        y = F.layer_norm(leaf(B, L, D), (D,))
    for book in (copy.deepcopy(mode.context.lineage), pickle.loads(pickle.dumps(mode.context.lineage))):
        assert isinstance(book, LineageBook)
        assert book.get(y) is None
