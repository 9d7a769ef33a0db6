"""GroupNorm and InstanceNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.ops.group_norm import group_norm, instance_norm
from peft_s2a.settings import BIT_LEVELS, ActivationSettings
from peft_s2a.table import TABLE, Context

IDENTITY = IdentityCodec()


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradcheck(groups: int, needs: tuple[int, ...], leaf: Any) -> None:
    inputs = [
        leaf(*shape, dtype=torch.double, needs=bool(n)) for shape, n in zip([(3, 6, 5), (6,), (6,)], needs, strict=True)
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, groups, w, b, 1e-5, IDENTITY), inputs)
    assert torch.autograd.gradcheck(lambda x, w, b: instance_norm(x, w, b, 1e-5, IDENTITY), inputs)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    "tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
    "one": lambda x: x[:1],
    "empty": lambda x: x[:0],
    "constant": lambda x: x * 0 + 3,
    "no positions": lambda x: x[:, :, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_is_torchs_and_gradients_too(dtype: torch.dtype, layout: str, leaf: Any, same_as_torch: Any) -> None:
    """The output, rounded once, is compared bit by bit in `same_as_torch`."""
    x, weight, bias = leaf(3, 8, 5, 6, dtype=dtype), leaf(8, dtype=dtype), leaf(8, dtype=dtype)
    change = LAYOUTS[layout]
    tolerance = {torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float32: 2e-4}[dtype]
    same_as_torch(
        lambda x, w, b: group_norm(change(x), 4, w, b, 1e-5, IDENTITY),
        lambda x, w, b: F.group_norm(change(x), 4, w, b),
        *(x, weight, bias),
        rtol=tolerance,
        atol=tolerance if layout != "constant" else 30 * tolerance,  # torch's rounding, divided by sqrt(eps)
    )


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_error_and_bytes(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x, weight, bias = leaf(4, 16, 8, 8), leaf(16), leaf(16)
    codec = GroupAffineCodec(num_bits)
    grad = leaf(4, 16, 8, 8, needs=False)
    actual, exact = (
        torch.autograd.grad(group_norm(x, 4, weight, bias, 1e-5, c), (x, weight, bias), grad) for c in (codec, IDENTITY)
    )
    assert float((actual[0] - exact[0]).norm() / exact[0].norm()) < 2.0 ** (1 - num_bits)
    assert float((actual[1] - exact[1]).norm() / exact[1].norm()) < 2.0 ** (2 - num_bits)
    torch.testing.assert_close(actual[2], exact[2])
    expected = 16 * 4 + 4 * (1024 * num_bits // 8 + 16 * 4)
    assert kept_bytes(lambda: group_norm(x, 4, weight, bias, 1e-5, codec), (weight,)) == expected
    assert kept_bytes(lambda: group_norm(x.detach(), 4, None, None, 1e-5, codec)) == 0


def test_pieces(leaf: Any, request: pytest.FixtureRequest) -> None:
    x, weight, bias, grad = leaf(5, 6, 7, 9), leaf(6), leaf(6), leaf(5, 6, 7, 9, needs=False)

    def run(codec: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(group_norm(x, 3, weight, bias, 1e-5, codec), (x, weight, bias), grad)

    whole = run(IDENTITY)
    request.getfixturevalue("small_chunks")
    for piece, expected in zip(run(IDENTITY), whole, strict=True):
        torch.testing.assert_close(piece, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_where_torch_is_not(poison: float, leaf: Any) -> None:
    x = leaf(4, 8, 64).detach()
    x[2, 3, 5] = poison
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.group_norm(x, 2).sum(), x)
    (actual,) = torch.autograd.grad(group_norm(x, 2, None, None, 1e-5, GroupAffineCodec(4)).sum(), x)
    assert expected[2, :4].isnan().all()
    assert actual[expected.isnan()].isnan().all()
    assert actual[:2].isfinite().all()


def test_rows_of_the_table(leaf: Any) -> None:
    context, exact = Context(ActivationSettings.from_config(4)), Context(ActivationSettings.from_config(None))
    x, mean = leaf(4, 8, 64), torch.zeros(8)
    assert torch.equal(TABLE[F.group_norm](context, x, 2), F.group_norm(x, 2))
    assert TABLE[F.group_norm](context, x, 3) is NotImplemented  # torch's own error
    assert TABLE[F.group_norm](exact, x, 2) is NotImplemented
    assert torch.equal(TABLE[F.instance_norm](context, x), F.instance_norm(x))
    assert TABLE[F.instance_norm](context, x, mean, mean + 1) is NotImplemented


def test_autocast(leaf: Any) -> None:
    x, weight = leaf(4, 8, 64, dtype=torch.bfloat16), leaf(8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = F.group_norm(x, 2, weight), group_norm(x, 2, weight, None, 1e-5, IDENTITY)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.float().sum(), (x, weight)) for y in (actual, expected)), strict=True
    ):
        assert ours.dtype == theirs.dtype


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: group_norm(x, 2, None, None, 1e-5, IDENTITY), leaf(4, 8, 8))
