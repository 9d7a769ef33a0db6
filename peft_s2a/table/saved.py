"""Rules for what torch's own functions save, where no operator here takes their place: function → codecs.

A rule is called with the context and the arguments of the function, and returns `SavedCodecs`, or None to leave the
call alone. What backward reads of a saved tensor (torch's `derivatives.yaml`) decides:

- its sign, shape or zeros: a stand-in, exact, also with `activation_bits=None`;
- a product with it: group-wise codes, whose error passes on as it is;
- a quotient or power of it: codes of bounded relative error;
- a difference that may cancel, or a comparison with another tensor (`log1p`, `acos`, `cumprod`, `mse_loss`): no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.affine import GroupAffineCodec
from ..codecs.relative import RelativeCodec, SignedAffineCodec
from ..codecs.stand_in import BoolCodec, IndexCodec, ScaledMaskCodec, ShapeCodec, SignCodec
from ..ops.leftovers import MIN_ELEMENTS, SavedCodecs
from .context import Context

Rule = Callable[..., SavedCodecs | None]
RULES: dict[Callable[..., Any], Rule] = {}


def _named(*names: str) -> Iterable[Callable[..., Any]]:
    """`torch.name`, `Tensor.name` and their in-place forms, as far as they exist."""
    for name in names:
        for owner in (torch, Tensor, F):
            for form in (name, f"{name}_"):
                if hasattr(owner, form):
                    yield getattr(owner, form)


def _rule_for(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        for function in functions:
            RULES[function] = rule
        return rule

    return enter


def _affine(context: Context) -> GroupAffineCodec | None:
    return None if context.bits("other") is None else context.affine("other")


def _relative(context: Context) -> RelativeCodec | None:
    return None if context.bits("other") is None else RelativeCodec()


# exact


@_rule_for(*_named("abs", "absolute"), Tensor.__abs__, F.l1_loss)
def _sign(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(SignCodec(), SignCodec())


@_rule_for(*_named("where", "masked_fill", "masked_select", "masked_scatter"))
def _mask(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(ShapeCodec(), masks=BoolCodec())


@_rule_for(Tensor.__getitem__)
def _index(context: Context, input: Tensor, index: Any) -> SavedCodecs | None:
    return SavedCodecs(masks=BoolCodec()) if isinstance(index, Tensor) else None


@_rule_for(
    torch.avg_pool1d,
    F.avg_pool3d,
    torch.adaptive_avg_pool1d,
    F.adaptive_avg_pool3d,
    F.pad,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.adaptive_max_pool1d_with_indices,
    F.adaptive_max_pool2d_with_indices,
    F.adaptive_max_pool3d_with_indices,
    F.max_pool1d_with_indices,
    F.max_pool2d_with_indices,
    F.max_pool3d_with_indices,
    F.max_pool3d,
    torch.max_pool3d,
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
    F.fractional_max_pool2d_with_indices,
    F.fractional_max_pool3d_with_indices,
)
def _shape(context: Context, input: Tensor, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(ShapeCodec(), ShapeCodec(), indices=IndexCodec(input.numel()))


@_rule_for(*_named("max", "min", "median", "nanmedian", "mode", "kthvalue", "sort", "msort", "topk"))
def _places(context: Context, input: Tensor, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(indices=IndexCodec(max(input.shape, default=1)))


@_rule_for(*_named("cummax", "cummin", "gather", "scatter", "scatter_add"))
def _places_and_shape(context: Context, input: Tensor, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(ShapeCodec(), ShapeCodec(), indices=IndexCodec(max(input.shape, default=1)))


@_rule_for(*_named("take_along_dim"))
def _places_in_all(context: Context, input: Tensor, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(ShapeCodec(), ShapeCodec(), indices=IndexCodec(input.numel()))


@_rule_for(F.grid_sample, torch.grid_sampler)
def _samples(context: Context, input: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> SavedCodecs | None:
    return None if grid.requires_grad else SavedCodecs(ShapeCodec())


@_rule_for(F.dropout, F.alpha_dropout, *_named("dropout", "alpha_dropout"))
def _noise(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(others=ScaledMaskCodec())


# group-wise codes: backward multiplies


def _large_constant(args: Iterable[Any]) -> bool:
    tensors = (t for arg in args for t in (arg if isinstance(arg, (tuple, list)) else (arg,)) if isinstance(t, Tensor))
    return any(t.is_floating_point() and not t.requires_grad and t.numel() >= MIN_ELEMENTS for t in tensors)


@_rule_for(
    *_named("exp", "exp2", "expm1", "sin", "cos", "erf", "square", "mul", "multiply", "addcmul", "lerp", "logaddexp"),
    F.glu,
)
def _factors(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(_affine(context), _affine(context))


@_rule_for(
    *_named("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "kron", "cross", "addmm", "baddbmm"),
    *_named("addbmm", "addmv", "addr", "einsum", "tensordot", "conv1d", "conv2d", "conv3d"),
    *_named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    Tensor.__matmul__,
    torch.linalg.multi_dot,
    torch.linalg.cross,
    F.bilinear,
)
def _contraction(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs | None:
    if context.bits("product") is None:
        return None
    # what is no argument is a copy of one, maybe of a constant
    copies = None if _large_constant((*args, *kwargs.values())) else _affine(context)
    return SavedCodecs(_affine(context), copies)


@_rule_for(*_named("std", "var", "std_mean", "var_mean"))
def _deviation(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(_affine(context))  # the deviation itself divides, and is kept as it is


@_rule_for(*_named("norm"), torch.linalg.vector_norm, torch.linalg.norm)
def _norm(context: Context, input: Tensor, p: Any = 2, *args: Any, **kwargs: Any) -> SavedCodecs | None:
    p = kwargs.get("ord", p)
    if p in (2, None, "fro"):
        return SavedCodecs(_affine(context))
    return SavedCodecs(SignCodec()) if p == 1 and not isinstance(p, Tensor) else None


@_rule_for(torch.prelu)
def _prelu(context: Context, input: Tensor, weight: Tensor) -> SavedCodecs:
    if not weight.requires_grad:
        return SavedCodecs(SignCodec())
    affine = _affine(context)
    return SavedCodecs(None if affine is None else SignedAffineCodec(affine))


@_rule_for(F.rrelu, *_named("rrelu"))
def _rrelu(
    context: Context,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    *args: Any,
    **kwargs: Any,
) -> SavedCodecs | None:
    if not training or upper - lower <= 1e-6:
        return None
    return SavedCodecs(ShapeCodec())  # the gradient is the noise times dy


# codes of bounded relative error: backward divides, or takes powers


@_rule_for(
    *_named("sqrt", "rsqrt", "reciprocal", "log", "log2", "log10", "div", "divide", "true_divide", "addcdiv"),
    *_named("tan", "sinh", "cosh", "hypot", "atan2", "arctan2", "xlogy", "log_softmax"),
    Tensor.__rdiv__,
    Tensor.__rtruediv__,
    F.log_softmax,
    F.cross_entropy,
    F.binary_cross_entropy_with_logits,
)
def _quotient(context: Context, *args: Any, **kwargs: Any) -> SavedCodecs:
    return SavedCodecs(_relative(context), _relative(context))


@_rule_for(F.normalize)
def _normalize(context: Context, input: Tensor, p: float = 2.0, *args: Any, **kwargs: Any) -> SavedCodecs | None:
    return SavedCodecs(_relative(context)) if p in (1, 2) else None


@_rule_for(*_named("pow", "float_power"), Tensor.__pow__)
def _power(context: Context, input: Any, exponent: Any = None, *args: Any, **kwargs: Any) -> SavedCodecs | None:
    if isinstance(input, Tensor) and isinstance(exponent, Tensor):
        return None
    if not isinstance(input, Tensor):
        return SavedCodecs(SignCodec(), _affine(context))
    if exponent in (2, 3):
        return _factors(context)
    return SavedCodecs(_relative(context), _relative(context))


@_rule_for(Tensor.__rpow__)
def _exponential(context: Context, exponent: Tensor, base: Any) -> SavedCodecs | None:
    return _power(context, base, exponent)
