"""Which operator takes the place of which torch function.

A handler has the signature of the torch function behind a `Context`, and returns `NotImplemented` where its operator
does not apply: torch's own then runs. New operators add a handler and a row of `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..codecs.affine import ROW, GroupAffineCodec
from ..codecs.base import Codec, IdentityCodec
from ..codecs.channel import ChannelAffineCodec
from ..codecs.levels import Derivative, DerivativeCodec
from ..codecs.probability import KeptRows, SqrtProbabilityCodec
from ..settings import ActivationSettings
from . import derivatives
from .attention import attention
from .batch_norm import batch_norm
from .convolution import convolution
from .derivatives import Silu
from .dropout import dropout
from .linear import linear
from .masked import Mask, masked
from .norm import layer_norm, normalize, rms_norm
from .pointwise import pointwise
from .pooling import adaptive_average_pool, average_pool, max_pool
from .product import matmul, multiply
from .recipes import RecipeBook
from .scaled import ScaledTensors
from .softmax import softmax

MIN_ELEMENTS = ROW
"""Smaller tensors are left to torch: their codes would take a whole row."""


@dataclass
class Context:
    """What handlers know: the settings of the active adapter, and how the tensors of this pass came about."""

    settings: ActivationSettings
    recipes: RecipeBook = field(default_factory=RecipeBook)
    scaled: ScaledTensors = field(default_factory=ScaledTensors)
    sigmoids: ScaledTensors = field(default_factory=ScaledTensors)
    rows: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Probabilities that are kept already, for the products that take them."""

    def __reduce__(self) -> tuple[type[Context], tuple[ActivationSettings]]:
        return Context, (self.settings,)  # what is remembered belongs to the tensors of one process

    def bits(self, kind: str) -> int | None:
        return self.settings.bits.get(kind)


Handler = Callable[..., Any]
TABLE: dict[Callable[..., Any], Handler] = {}


def replaces(*functions: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Enters the decorated handler into `TABLE` for each torch function."""

    def enter(handler: Handler) -> Handler:
        for function in functions:
            TABLE[function] = handler
        return handler

    return enter


def _applies(context: Context, kind: str, *tensors: Tensor) -> bool:
    return context.bits(kind) is not None and all(
        t.is_floating_point() and t.numel() >= MIN_ELEMENTS and t.dtype != torch.float64 for t in tensors
    )


# elementwise functions -----------------------------------------------------------------------------------------------


def _smooth(
    context: Context, kind: str, input: Tensor, function: Callable[[Tensor], Tensor], derivative: Derivative
) -> Any:
    if not _applies(context, kind, input):
        return NotImplemented
    return pointwise(input, function, DerivativeCodec(derivative, context.bits(kind) or 0))


@replaces(F.gelu)
def _gelu(context: Context, input: Tensor, *, approximate: str = "none") -> Any:
    return _smooth(
        context, "gelu", input, lambda x: F.gelu(x, approximate=approximate), derivatives.Gelu(approximate)
    )


@replaces(F.silu)
def _silu(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _smooth(context, "silu", input, F.silu, Silu())


@replaces(torch.sigmoid, F.sigmoid, Tensor.sigmoid)
def _sigmoid(context: Context, input: Tensor) -> Any:
    output = _smooth(context, "pointwise", input, torch.sigmoid, derivatives.Sigmoid())
    if isinstance(output, Tensor):
        context.sigmoids.record(output, *context.scaled.get(input))
    return output


@replaces(torch.tanh, F.tanh, Tensor.tanh)
def _tanh(context: Context, input: Tensor) -> Any:
    return _smooth(context, "pointwise", input, torch.tanh, derivatives.Tanh())


@replaces(F.softplus)
def _softplus(context: Context, input: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    derivative = derivatives.Softplus(float(beta), float(threshold))
    return _smooth(context, "pointwise", input, lambda x: F.softplus(x, beta, threshold), derivative)


@replaces(F.elu)
def _elu(context: Context, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _smooth(context, "pointwise", input, lambda x: F.elu(x, alpha), derivatives.Elu(float(alpha)))


@replaces(F.celu, torch.celu)
def _celu(context: Context, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    derivative = derivatives.Elu(float(alpha), 1.0, float(alpha))
    return _smooth(context, "pointwise", input, lambda x: F.celu(x, alpha), derivative)


@replaces(F.selu, torch.selu)
def _selu(context: Context, input: Tensor, inplace: bool = False) -> Any:
    derivative = derivatives.Elu(1.6732632423543772, 1.0507009873554805)
    return _smooth(context, "pointwise", input, F.selu, derivative)


@replaces(F.mish)
def _mish(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _smooth(context, "pointwise", input, F.mish, derivatives.Mish())


@replaces(F.hardswish)
def _hardswish(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _smooth(context, "pointwise", input, F.hardswish, derivatives.Hardswish())


def _two_slopes(
    input: Tensor,
    function: Callable[[Tensor], Tensor],
    mask: Mask,
    slope: float = 1.0,
    other_slope: float = 0.0,
    in_place: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    if input.numel() < MIN_ELEMENTS:
        return NotImplemented
    if in_place is not None:
        if input.is_leaf:
            return NotImplemented
        function = in_place
    return masked(input, function, mask, slope, other_slope)


@replaces(F.relu, torch.relu, Tensor.relu)
def _relu(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _two_slopes(input, torch.relu, lambda x: ~(x <= 0), in_place=torch.relu_ if inplace else None)


@replaces(torch.relu_, Tensor.relu_)
def _relu_in_place(context: Context, input: Tensor) -> Any:
    return _relu(context, input, inplace=True)


@replaces(F.hardtanh)
def _hardtanh(
    context: Context, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    in_place = (lambda x: F.hardtanh_(x, min_val, max_val)) if inplace else None
    return _two_slopes(
        input, lambda x: F.hardtanh(x, min_val, max_val), lambda x: ~((x <= min_val) | (x >= max_val)), in_place=in_place
    )


@replaces(F.relu6)
def _relu6(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(context, input, 0.0, 6.0, inplace)


@replaces(F.leaky_relu)
def _leaky_relu(context: Context, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    in_place = (lambda x: F.leaky_relu_(x, negative_slope)) if inplace else None
    return _two_slopes(
        input,
        lambda x: F.leaky_relu(x, negative_slope),
        lambda x: x > 0,
        other_slope=negative_slope,
        in_place=in_place,
    )


@replaces(F.hardsigmoid)
def _hardsigmoid(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _two_slopes(input, F.hardsigmoid, lambda x: ~((x <= -3) | (x >= 3)), slope=1 / 6)


# dropout -------------------------------------------------------------------------------------------------------------


@replaces(F.dropout, torch.dropout)
def _dropout(context: Context, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p < 1 or inplace or input.numel() < MIN_ELEMENTS:
        return NotImplemented
    return dropout(input, p)


# norms ---------------------------------------------------------------------------------------------------------------


@replaces(F.layer_norm, torch.layer_norm)
def _layer_norm(
    context: Context,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if not _applies(context, "norm", input):
        return NotImplemented
    return layer_norm(input, normalized_shape, weight, bias, eps, GroupAffineCodec(context.bits("norm") or 0))


@replaces(F.rms_norm, torch.rms_norm)
def _rms_norm(
    context: Context, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not _applies(context, "norm", input):
        return NotImplemented
    return rms_norm(input, normalized_shape, weight, eps, GroupAffineCodec(context.bits("norm") or 0))


@replaces(F.normalize)
def _normalize(
    context: Context, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Any:
    if p != 2 or dim % input.dim() != input.dim() - 1 or out is not None or not _applies(context, "norm", input):
        return NotImplemented
    return normalize(input, eps, GroupAffineCodec(context.bits("norm") or 0))


@replaces(F.group_norm, torch.group_norm)
def _group_norm(
    context: Context,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if not _applies(context, "norm", input) or (weight is not None and weight.requires_grad):
        return NotImplemented
    # every group of an item is a row of a layer norm; gamma and beta follow for each channel
    rows = input.reshape(input.shape[0] * num_groups, -1)
    codec = GroupAffineCodec(context.bits("norm") or 0)
    output = layer_norm(rows, rows.shape[1:], None, None, eps, codec).view(input.shape)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    if weight is not None:
        output = output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


@replaces(F.batch_norm)
def _batch_norm(
    context: Context,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        if not _applies(context, "norm", input):
            return NotImplemented
    elif weight is not None and weight.requires_grad:
        return NotImplemented
    codec = GroupAffineCodec(context.bits("norm") or 8, group_size=128)
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, codec)


# attention -----------------------------------------------------------------------------------------------------------


@replaces(F.scaled_dot_product_attention)
def _attention(
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not _applies(context, "attention", query, key, value) or query.dim() < 3:
        return NotImplemented
    lead = query.shape[:-3]
    if key.shape[:-3] != lead or value.shape[:-3] != lead:
        return NotImplemented
    if not enable_gqa and not query.shape[-3] == key.shape[-3] == value.shape[-3]:
        return NotImplemented
    if torch.compiler.is_compiling() and (dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad)):
        return NotImplemented  # neither the random state nor a gradient of the mask can be traced
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    codec = ChannelAffineCodec(context.bits("attention") or 0)
    recipe = None
    if attn_mask is not None and not attn_mask.requires_grad and not torch.compiler.is_compiling():
        recipe = context.recipes.get(attn_mask)
    if query.dim() == 4:
        return attention(query, key, value, attn_mask, options, codec, recipe)
    if attn_mask is not None:
        return NotImplemented
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    return attention(q, k, v, None, options, codec).view(*lead, *query.shape[-3:-1], value.shape[-1])


@replaces(F.softmax, torch.softmax, Tensor.softmax)
def _softmax(
    context: Context,
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Any:
    if dim is None or dim % max(input.dim(), 1) != input.dim() - 1 or not _applies(context, "softmax", input):
        return NotImplemented
    if dtype is None and isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel  # torch.softmax(input, dim, dtype)
    codec = SqrtProbabilityCodec(context.bits("softmax") or 0)
    if torch.compiler.is_compiling():
        return softmax(input, dtype, codec)
    kept: list[Tensor] = []
    output = softmax(input, dtype, codec, kept)
    if output.is_contiguous():
        context.rows[output] = KeptRows(codec, tuple(kept), output.shape[-1])
    return output


def _factor_codec(context: Context, factor: Tensor) -> Codec:
    """Codes for a large factor; a small one (the gates of a squeeze-and-excite) stays as it is."""
    if factor.numel() < MIN_ELEMENTS or factor.dtype == torch.float64:
        return IdentityCodec()
    if not torch.compiler.is_compiling() and factor in context.rows:
        kept: KeptRows = context.rows[factor]
        return kept
    return GroupAffineCodec(context.bits("product") or 0)


def _are_activations(context: Context, left: Any, right: Any) -> bool:
    """Whether both are tensors with a gradient, and one of them large."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.requires_grad and right.requires_grad):
        return False
    return any(_applies(context, "product", t) for t in (left, right))


@replaces(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def _matmul(context: Context, input: Tensor, other: Tensor) -> Any:
    if input.dim() < 3 or other.dim() < 3 or not _are_activations(context, input, other):
        return NotImplemented
    return matmul(input, other, _factor_codec(context, input), _factor_codec(context, other))


@replaces(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def _mul(context: Context, input: Any, other: Any) -> Any:
    if isinstance(other, (int, float)) and isinstance(input, Tensor):
        output = torch.mul(input, other)
        context.scaled.record(output, input, float(other))
        return output
    if not _are_activations(context, input, other):
        return NotImplemented
    for x, gate in ((input, other), (other, input)):
        source, factor = context.sigmoids.get(gate)
        if source is x and context.bits("silu") is not None:
            # x * sigmoid(factor x), written out: QuickGELU and its kin
            return pointwise(x, lambda _: input * other, DerivativeCodec(Silu(factor), context.bits("silu") or 0))
    return multiply(input, other, _factor_codec(context, input), _factor_codec(context, other))


# linear layers and convolutions --------------------------------------------------------------------------------------


@replaces(F.linear)
def _linear(context: Context, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not weight.requires_grad:
        # torch keeps nothing of the input either, but a copy of the weight where autocast casts it
        if not torch.is_autocast_enabled(input.device.type):
            return NotImplemented
        return linear(input, weight, bias, IdentityCodec())
    # a head on pooled features (two dimensions) is small: it stays exact
    if input.dim() < 3 or not _applies(context, "linear", input):
        return NotImplemented
    return linear(input, weight, bias, GroupAffineCodec(context.bits("linear") or 0))


def _convolution(dimensions: int) -> Handler:
    def pair(value: Any) -> tuple[int, ...]:
        return (value,) * dimensions if isinstance(value, int) else tuple(value) * (dimensions // len(tuple(value)))

    def handler(
        context: Context,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if weight.requires_grad or input.dim() != dimensions + 2:
            return NotImplemented
        stride, dilation = pair(stride), pair(dilation)
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return NotImplemented
            padding = tuple(r // 2 if padding == "same" else 0 for r in reach)
        geometry = (stride, pair(padding), dilation, False, (0,) * dimensions, groups)
        return convolution(input, weight, bias, geometry)

    return handler


for _dimensions, _function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), start=1):
    TABLE[_function] = _convolution(_dimensions)


# pooling -------------------------------------------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


@replaces(F.max_pool2d, torch.max_pool2d)
def _max_pool(
    context: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    kernel = _pair(kernel_size)
    if return_indices or kernel[0] * kernel[1] > 256 or input.numel() < MIN_ELEMENTS:
        return NotImplemented
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return max_pool(input, kernel, stride, _pair(padding), _pair(dilation), ceil_mode)


@replaces(F.avg_pool2d)
def _average_pool(
    context: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return average_pool(input, (kernel, stride, _pair(padding), ceil_mode, count_include_pad, divisor_override))


@replaces(F.adaptive_avg_pool2d)
def _adaptive_average_pool(context: Context, input: Tensor, output_size: Any) -> Any:
    return adaptive_average_pool(input, output_size)


# calls whose results may be rebuilt from smaller parts -----------------------------------------------------------------

GROWING = frozenset(
    {
        torch.add,
        Tensor.add,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.expand,
        Tensor.reshape,
        torch.reshape,
        Tensor.repeat,
        Tensor.contiguous,
        Tensor.view,
        Tensor.unsqueeze,
        torch.unsqueeze,
        Tensor.permute,
        Tensor.__getitem__,
    }
)
"""Functions whose results, when they need no gradient and outgrow their parts, are remembered with their parts."""
