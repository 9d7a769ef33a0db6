"""Scaled-dot-product attention, recomputed in backward from the codes of q, k and v."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.codecs.channel import ChannelAffineCodec, IdentityHeadCodec
from peft_s2a.ops import attention_gradient
from peft_s2a.ops.attention import attention
from peft_s2a.ops.recipes import RecipeBook
from peft_s2a.settings import BIT_LEVELS

IDENTITY = IdentityHeadCodec()
NEEDS = [n for n in itertools.product([True, False], repeat=3) if any(n)]
N, H, L, S, D = 3, 2, 5, 6, 4


def options(**changed: Any) -> dict[str, Any]:
    return {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False} | changed


def heads(leaf: Any, dtype: torch.dtype = torch.float32, key_heads: int = H) -> list[Tensor]:
    shapes = (N, H, L, D), (N, key_heads, S, D), (N, key_heads, S, D + 1)
    return [leaf(*shape, dtype=dtype) for shape in shapes]


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(5)

    def bias(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    allowed = torch.rand(N, 1, L, S, generator=generator) < 0.7
    allowed[..., 0] = True
    return {
        "none": None,
        "float": bias(N, H, L, S),
        "bool": allowed,
        "two_dimensions": bias(L, S),
        "heads_only": bias(H, L, S),
        "one_item": bias(1, H, L, S),
        "expanded": bias(1, 1, 1, S).expand(N, H, L, S),
        "keys_only": bias(N, 1, 1, S),
    }


@pytest.mark.parametrize("needs", NEEDS)
def test_gradcheck(needs: tuple[bool, bool, bool], leaf: Any) -> None:
    q, k, v = (t.requires_grad_(need) for t, need in zip(heads(leaf, torch.double), needs, strict=True))
    check = torch.autograd.gradcheck
    assert check(lambda *a: attention(*a, None, options(), IDENTITY), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("changed", [{"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_gradcheck_of_options(changed: dict[str, Any], leaf: Any) -> None:
    inputs = heads(leaf, torch.double, key_heads=1 if "enable_gqa" in changed else H)
    call = lambda *a: attention(*a, None, options(**changed), IDENTITY)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(L, S), (H, L, S), (N, H, L, S), (N, 1, 1, S), (1, 1, L, S)])
def test_gradcheck_of_a_trained_mask(shape: tuple[int, ...], leaf: Any) -> None:
    inputs = (*heads(leaf, torch.double), leaf(*shape, dtype=torch.double))
    assert torch.autograd.gradcheck(lambda *a: attention(*a, options(), IDENTITY), inputs, fast_mode=True)


@pytest.mark.parametrize("mask", list(masks(torch.float32)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunks", ["whole", "pieces"])
def test_same_as_torch(
    mask: str, dtype: torch.dtype, chunks: str, leaf: Any, same_as_torch: Any, request: pytest.FixtureRequest
) -> None:
    if chunks == "pieces":
        request.getfixturevalue("small_chunks")
    mask_tensor = masks(dtype)[mask]
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    same_as_torch(
        lambda q, k, v: attention(q, k, v, mask_tensor, options(), IDENTITY),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask_tensor),
        *heads(leaf, dtype),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("changed", [{"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_options_in_pieces(changed: dict[str, Any], leaf: Any, same_as_torch: Any, small_chunks: None) -> None:
    same_as_torch(
        lambda q, k, v: attention(q, k, v, None, options(**changed), IDENTITY),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **changed),
        *heads(leaf, key_heads=1 if "enable_gqa" in changed else H),
        rtol=1e-5,
        atol=1e-5,
    )


def test_dropout_is_replayed(leaf: Any, same_as_torch: Any, small_chunks: None) -> None:
    def seeded(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            torch.manual_seed(3)
            output = call(*inputs)
            torch.rand(10)  # what happens between forward and backward
            return output

        return run

    same_as_torch(
        seeded(lambda q, k, v: attention(q, k, v, None, options(dropout_p=0.4), IDENTITY)),
        seeded(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)),
        *heads(leaf),
        rtol=1e-5,
        atol=1e-6,
    )


def test_backward_leaves_the_generator_alone(leaf: Any) -> None:
    torch.manual_seed(0)
    output = attention(*heads(leaf), None, options(dropout_p=0.4), IDENTITY)
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["tokens_first", "sliced", "single_token", "zero_batch"])
def test_layouts(layout: str, leaf: Any, same_as_torch: Any) -> None:
    q, k, v = leaf(N, L, H, 2 * D), leaf(N, L, H, 2 * D), leaf(N, L, H, 2 * D)
    change = {
        "tokens_first": lambda t: t.transpose(1, 2),
        "sliced": lambda t: t.transpose(1, 2)[..., ::2],
        "single_token": lambda t: t.transpose(1, 2)[:1, :, :1],
        "zero_batch": lambda t: t.transpose(1, 2)[:0],
    }[layout]
    for codec, tolerance in ((IDENTITY, 1e-5), (ChannelAffineCodec(8), 0.1)):
        same_as_torch(
            lambda q, k, v, codec=codec: attention(change(q), change(k), change(v), None, options(), codec),
            lambda q, k, v: F.scaled_dot_product_attention(change(q), change(k), change(v)),
            q,
            k,
            v,
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("chunks", ["whole", "pieces"])
def test_gradient_is_that_of_the_decoded_heads(
    num_bits: int, chunks: str, leaf: Any, request: pytest.FixtureRequest
) -> None:
    if chunks == "pieces":
        request.getfixturevalue("small_chunks")
    q, k, v = inputs = heads(leaf)
    codec = ChannelAffineCodec(num_bits)
    decoded = [codec.decode(codec.encode(t.detach()), tuple(t.shape), t.dtype).requires_grad_() for t in inputs]
    for t, d in zip(inputs, decoded, strict=True):
        scale = codec.encode(t.detach())[1].float().unsqueeze(2)
        assert ((t - d).abs() <= scale / 2 + 1e-5).all()
    grad = leaf(N, H, L, D + 1, needs=False)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*decoded), decoded, grad)
    actual = torch.autograd.grad(attention(q, k, v, None, options(), codec), inputs, grad)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    q = k = v = leaf(2, 2, 16, 8)
    codec = ChannelAffineCodec(num_bits)
    of_one = 2 * (2 * 16 * 8 * num_bits // 8) + 2 * 2 * (2 * 2 * 8)
    assert kept_bytes(lambda: attention(q, k, v, None, options(), codec)) == 3 * of_one
    mask = torch.zeros(2, 2, 16, 16)
    assert kept_bytes(lambda: attention(q, k, v, mask, options(), codec)) == 3 * of_one + mask.nbytes


def test_a_recipe_is_kept_in_place_of_the_mask(leaf: Any, kept_bytes: Any) -> None:
    q, k, v = inputs = [leaf(8, 2, 16, 8) for _ in range(3)]
    bias, window = torch.randn(1, 2, 16, 16), torch.randn(8, 1, 16, 16)
    mask = bias + window
    book = RecipeBook()
    book.record(mask, torch.add, (bias, window), {})
    recipe = book.get(mask)
    assert recipe is not None
    codec = ChannelAffineCodec(4)
    whole = kept_bytes(lambda: attention(q, k, v, mask, options(), codec))
    parts = kept_bytes(lambda: attention(q, k, v, mask, options(), codec, recipe))
    assert whole - parts == mask.nbytes - bias.nbytes - window.nbytes > 0
    grad = leaf(8, 2, 16, 8, needs=False)
    expected = torch.autograd.grad(attention(q, k, v, mask, options(), codec), inputs, grad)
    actual = torch.autograd.grad(attention(q, k, v, mask, options(), codec, recipe), inputs, grad)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_finite_where_torch_is_not(poison: float, which: int, leaf: Any) -> None:
    inputs = [t.detach() for t in heads(leaf)]
    inputs[which][1, 0, 2, 3] = poison
    inputs = [t.requires_grad_() for t in inputs]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sum(), inputs)
    output = attention(*inputs, None, options(), ChannelAffineCodec(4))
    actual = torch.autograd.grad(output.sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert not ours[~theirs.isfinite()].isfinite().any()
        assert ours[[0, 2]].isfinite().all()


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    _, k, v = heads(leaf)
    refuses_double_backward(lambda q: attention(q, k, v, None, options(), IDENTITY), leaf(N, H, L, D))


def by_formula_and_by_torch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Gradients by formula, in pieces of a head, and from torch's own backward."""
    monkeypatch.setattr(attention_gradient, "PIECE_SCORES", L * S)  # a head, or less
    formula = run()
    monkeypatch.setattr(attention_gradient, "MAX_SCORES", 0)
    return [formula, run()]


@pytest.mark.parametrize("mask", list(masks(torch.float32)))
@pytest.mark.parametrize("key_heads", [2, 4])
def test_formula_by_heads_gives_torchs_gradients(
    mask: str, key_heads: int, leaf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = masks(torch.float32)[mask]
    if given is not None and given.dim() > 2 and given.shape[-3] == H:
        given = given.repeat_interleave(2, -3)
    changed = options(enable_gqa=key_heads == 2)
    q, k, v = leaf(N, 4, L, D), leaf(N, key_heads, S, D), leaf(N, key_heads, S, D + 1)

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(attention(q, k, v, given, changed, IDENTITY).square().sum(), (q, k, v)))

    formula, torchs = by_formula_and_by_torch(monkeypatch, run)
    for found, expected in zip(formula, torchs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


FAST_AND_DTYPE = [(True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float16)]


def errors_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    inputs: list[Tensor],
    mask: Tensor | None = None,
    **changed: Any,
) -> Iterator[tuple[float, float]]:
    """Distance from the gradients in float64, of the formula's and of torch's, for q, k and v."""
    monkeypatch.setattr(attention_gradient, "multiplies_bfloat16", lambda device: fast)

    def run(dtype: torch.dtype = inputs[0].dtype) -> list[Tensor]:
        own = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        q, k, v = (t.to(dtype).requires_grad_() for t in inputs)
        output = attention(q, k, v, own, options(**changed), IDENTITY)
        return list(torch.autograd.grad((output + 1).square().sum(), (q, k, v)))

    formula, torchs = by_formula_and_by_torch(monkeypatch, run)
    for found, stock, exact in zip(formula, torchs, run(torch.float64), strict=True):
        assert found.dtype == stock.dtype == inputs[0].dtype
        yield (found - exact).norm().item(), (stock - exact).norm().item()


@pytest.mark.parametrize(("fast", "dtype"), FAST_AND_DTYPE)
@pytest.mark.parametrize("mask", [*masks(torch.float32), "nowhere"])
def test_formula_in_16_bits_is_as_close_as_torch(
    mask: str, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = masks(dtype) | {"nowhere": torch.zeros(L, S).index_fill(1, torch.tensor([1, 2]), -torch.inf).to(dtype)}
    inputs = [torch.randn(N, H, length, D).to(dtype) for length in (L, S, S)]
    for formula, torchs in errors_in_16_bits(monkeypatch, fast, inputs, known[mask]):
        assert formula <= 2 * torchs


@pytest.mark.parametrize(("fast", "dtype"), FAST_AND_DTYPE)
@pytest.mark.parametrize("case", ["large", "offset", "values", "causal", "scale"])
def test_formula_in_16_bits_takes_large_scores(
    case: str, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = 3.0 if case == "large" else 1.0
    q, k, v = (factor * torch.randn(N, H, 48, 40) for _ in range(3))
    if case == "offset":
        q, k = q + 1.5, k + 1.5
    if case == "values":
        v = v + 4
    changed = {"is_causal": case == "causal", "scale": 0.3 if case == "scale" else None}
    for formula, torchs in errors_in_16_bits(monkeypatch, fast, [t.to(dtype) for t in (q, k, v)], **changed):
        assert formula <= 1.5 * torchs


@pytest.mark.parametrize(("fast", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_in_bfloat16_only_where_that_is_fast(
    fast: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gradient, "multiplies_bfloat16", lambda device: fast)
    cpu = torch.device("cpu")
    assert attention_gradient.formula_dtype(torch.bfloat16, cpu) == chosen
    assert attention_gradient.formula_dtype(torch.float16, cpu) == torch.float32
    assert attention_gradient.formula_dtype(torch.float64, cpu) == torch.float64


@pytest.mark.parametrize("boolean", [True, False])
def test_rows_that_may_look_nowhere_have_no_gradient(boolean: bool, leaf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = torch.ones(L, S, dtype=torch.bool)
    allowed[1] = False
    mask = allowed if boolean else torch.zeros(L, S).masked_fill(~allowed, -torch.inf)
    q, k, v = heads(leaf)

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(attention(q, k, v, mask, options(), IDENTITY).square().sum(), (q, k, v)))

    formula, torchs = by_formula_and_by_torch(monkeypatch, run)
    assert not formula[0][:, :, 1].any()
    for found, expected in zip(formula, torchs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_lie_in_memory_as_the_heads_do(leaf: Any) -> None:
    flat = leaf(N, L, H * D)
    q = flat.view(N, L, H, D).transpose(1, 2)
    (grad,) = torch.autograd.grad(attention(q, q, q, None, options(), IDENTITY).sum(), q)
    assert grad.transpose(1, 2).is_contiguous()
