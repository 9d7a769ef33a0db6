"""Pieces of a batch, and the whole that is made of them: as `torch.split` and `torch.cat`, but in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from peft_s2a.ops.joining import in_pieces

B, L, D = 5, 3, 4


def split_and_joined(run: Callable[[Tensor], Any], input: Tensor, size: int) -> Any:
    """What torch makes of it, with everything beside everything."""

    def joined(*pieces: Any) -> Any:
        return torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0]

    return tree_map(joined, *map(run, input.split(size)))


RUNS: dict[str, Callable[[Tensor], Any]] = {
    "one output": lambda x: x.sin() * 2,
    "the piece itself": lambda x: x,
    "residual": lambda x: x + x.cos(),
    "another shape": lambda x: x[:, 0].exp(),
    "another dtype": lambda x: x.double() * 3,
    "a tree": lambda x: {"a": (x * 2, None), "b": [x.square(), 7, (x > 0)]},
    "without a gradient": lambda x: (x.detach() * 2, x * 3),
    "a view in another order": lambda x: x.transpose(1, 2),
    "channels last": lambda x: x[..., None].contiguous(memory_format=torch.channels_last) * 2,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("needs", [True, False])
def test_as_split_and_cat(name: str, size: int, needs: bool, leaf: Any) -> None:
    run, x = RUNS[name], leaf(B, L, D, needs=needs)
    results = [way(run, x * 1, size) for way in (in_pieces, split_and_joined)]
    gradients = []
    for found, expected in zip(*map(tree_leaves, results), strict=True):
        assert type(found) is type(expected)
        if isinstance(found, Tensor):
            assert torch.equal(found, expected)
            assert (found.dtype, found.requires_grad) == (expected.dtype, expected.requires_grad)
            assert found.stride() == expected.stride()
            assert found._base is None
    for result in results if needs else ():
        ends = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for t in ends]
        gradients.append(torch.autograd.grad(ends, x, weights)[0])
    if needs:
        assert torch.equal(*gradients)


def test_twice_over_one_graph(leaf: Any) -> None:
    x = leaf(B, L, D)
    total = (in_pieces(RUNS["residual"], x * 1, 2) * 3).sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_pieces_that_do_not_depend_on_the_input(leaf: Any) -> None:
    x = leaf(4, D)
    calls = iter(range(4))
    whole = in_pieces(lambda piece: piece * 2 if next(calls) % 2 else torch.ones_like(piece), x * 1, 1)
    (gradient,) = torch.autograd.grad(whole.sum() + (whole * 0).sum(), x)
    assert torch.equal(gradient, torch.tensor([0.0, 2.0, 0.0, 2.0])[:, None].expand(4, D))


class Address(torch.autograd.Function):
    """The identity, which notes where its gradient lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[int]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(grad.data_ptr())
        return grad, None


def addresses(x: Tensor, kept: list[Tensor] | None = None) -> tuple[list[int], Tensor]:
    """Where gradients of the output and of the input lie, and the latter; `kept` gets that of the output."""
    found: list[int] = []
    output = in_pieces(lambda piece: piece.sin(), Address.apply(x, found), 2)
    if kept is not None:
        output.register_hook(kept.append)
    (gradient,) = torch.autograd.grad((Address.apply(output, found) * 3).sum(), x)
    return found, gradient


def test_the_gradient_is_made_in_the_memory_of_the_outputs(leaf: Any) -> None:
    x, kept = leaf(B, L, D), []
    (of_output, of_input), gradient = addresses(x)
    assert of_output == of_input
    (of_output, of_input), other = addresses(x, kept)
    assert of_output != of_input
    assert torch.equal(kept[0], torch.full((B, L, D), 3.0))
    assert torch.equal(gradient, other)


@pytest.mark.parametrize("holder", ["parameter", "hook"])
def test_a_piece_of_the_gradient_that_others_hold_stays_what_it_is(holder: str, leaf: Any) -> None:
    x, shift, kept = leaf(4, L, D), leaf(1, L, D), []

    def run(piece: Tensor) -> Tensor:
        output = piece.sin() + shift * 1 if holder == "hook" else piece.sin() + shift
        if holder == "hook":
            output.register_hook(kept.append)
        return output

    factor = leaf(4, L, D, needs=False)
    (in_pieces(run, x * 1, 1) * factor).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos() * factor)
    torch.testing.assert_close(shift.grad, factor.sum(0, keepdim=True))
    if holder == "hook":
        assert torch.equal(torch.cat(kept[::-1]), factor)


def test_a_piece_that_is_its_place_in_another_order(leaf: Any) -> None:
    x, weight = leaf(4, L, L), leaf(4, L, L, needs=False)
    for way in (in_pieces, split_and_joined):
        (gradient,) = torch.autograd.grad((way(lambda piece: piece.transpose(1, 2), x * 1, 1) * weight).sum(), x)
        assert torch.equal(gradient, weight.transpose(1, 2))


def test_pieces_without_a_gradient_do_not_hide_who_holds_one(leaf: Any) -> None:
    x, kept, calls = leaf(4, D), [], iter(range(4))

    def run(piece: Tensor) -> Tensor:
        output = piece.sin()
        if next(calls) == 0:
            return output.detach()
        output.register_hook(lambda gradient: kept.append((gradient, gradient.clone())))
        return output

    (in_pieces(run, x * 1, 1) * leaf(4, D, needs=False)).sum().backward()
    assert all(torch.equal(*pair) for pair in kept)


def test_checks_for_nan_find_none(leaf: Any) -> None:
    x = leaf(4, D)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=True):
            in_pieces(lambda piece: piece.sin(), x * 1, 1).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
