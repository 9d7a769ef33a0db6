"""Linear layers whose result is added to something, in its memory or in that of a new tensor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.ops.linear import add_linear
from peft_s2a.structure import add_linear as plain

B, C, D = 2, 6, 3
SIZES = (4, 5)
IDENTITY = IdentityCodec()
NEEDS = [n for n in itertools.product([True, False], repeat=4) if any(n)]
LAYOUTS = ["tokens", "channels_last", "channels_first", "channels_first in channels_last memory", "with gaps"]


def made(layout: str, leaf: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Total, input, weight, bias, and the dimension of the channels."""
    sizes = (7,) if layout == "tokens" else SIZES
    dim = 1 if "first" in layout else -1
    total = leaf(B, *((C, *sizes) if dim == 1 else (*sizes, C)), **options)
    if "memory" in layout:
        total = total.detach().contiguous(memory_format=torch.channels_last).requires_grad_(total.requires_grad)
    if layout == "with gaps":
        total = torch.stack([total, total], -1)[..., 0].detach().requires_grad_(total.requires_grad)
    return total, leaf(B, *sizes, D, **options), leaf(C, D, **options), leaf(C, **options), dim


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_torch_does_it(layout: str, in_place: bool, dtype: torch.dtype, leaf: Any) -> None:
    *tensors, dim = made(layout, leaf, dtype=dtype)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5}[dtype]
    found = add_linear(tensors[0] * 1, *tensors[1:], dim, in_place, IDENTITY)
    expected = plain(tensors[0] * 1, *tensors[1:], dim, in_place)
    grad = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True)
    for our, their in ((found, expected), *pairs):
        assert (our.shape, our.dtype) == (their.shape, their.dtype)
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_gradcheck(needs: tuple[bool, ...], layout: str, leaf: Any) -> None:
    *tensors, dim = made(layout, leaf, dtype=torch.double)
    tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    assert torch.autograd.gradcheck(lambda *given: add_linear(*given, dim, False, IDENTITY), tuple(tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_total(layout: str, leaf: Any) -> None:
    total, *others, dim = made(layout, leaf)
    for in_place in (True, False):
        before = total * 1
        if layout == "with gaps":
            before = torch.stack([before, before], -1)[..., 0]
        copy = before.detach().clone()
        output = add_linear(before, *others, dim, in_place, IDENTITY)
        taken = in_place and layout != "with gaps"
        assert (output.data_ptr() == before.data_ptr()) == taken
        assert torch.equal(before, copy) != taken


def test_a_view_is_not_written_over(leaf: Any) -> None:
    total, *others, dim = made("tokens", leaf)
    whole = torch.cat([total, total])
    output = add_linear(whole[:B], *others, dim, True, IDENTITY)
    assert torch.equal(whole[:B], total)
    assert not torch.equal(output, total)


def test_wide_adapter_of_a_short_model(leaf: Any) -> None:
    total, *others, dim = made("channels_first", leaf, dtype=torch.float32)
    output = add_linear(total.bfloat16(), *others, dim, False, IDENTITY)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (total, *others))


def test_only_codes_are_kept(leaf: Any, kept_bytes: Any) -> None:
    total, input, weight, bias = leaf(4, 64, 32), leaf(4, 64, 16), leaf(32, 16), leaf(32)
    kept = kept_bytes(lambda: add_linear(total, input, weight, bias, -1, False, GroupAffineCodec(4)), [weight])
    assert kept < input.nbytes / 5


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_sums_over_positions_are_wide(layout: str, leaf: Any) -> None:
    total, *others, dim = made(layout, leaf)
    output = add_linear(total.half().detach().requires_grad_(), *others, dim, False, IDENTITY)
    output.backward(torch.full_like(output, 3e4))
    rows = output.numel() // C
    torch.testing.assert_close(others[2].grad, torch.full((C,), 3e4 * rows), rtol=1e-2, atol=0)
    assert others[1].grad.isfinite().all()
