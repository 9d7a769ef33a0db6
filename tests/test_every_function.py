"""Differentiable functions of torch, one by one: what each keeps, and its gradient beside torch's.

The lists are a complete statement: `EXACT` functions keep little and have torch's gradient bit for bit, `CODED` ones
keep little and are within a bound, `IN_FULL` ones are left alone and reported, `FREE` ones keep nothing in torch
either.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import drop_path
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from peft_s2a.interception import ActivationInterceptor
from peft_s2a.memory import coverage_report, saved_tensors
from peft_s2a.settings import ActivationSettings

N, C, H, W = SHAPE = (2, 32, 16, 34)  # 34816 elements: neither rows nor groups divide a plane
GENERATOR = torch.Generator().manual_seed(0)
OTHER = torch.randn(SHAPE, generator=GENERATOR)
MASK = torch.rand(SHAPE, generator=GENERATOR) > 0.5
KERNEL = torch.randn(C, C, 3, 3, generator=GENERATOR) * 0.1
BOUNDS = torch.linspace(-1, 0, W), torch.linspace(0, 1, W)
INDEX = torch.randint(0, 16, SHAPE, generator=GENERATOR)
GRID = torch.rand(N, H, W, 2, generator=GENERATOR) * 2 - 1


@dataclass(frozen=True)
class Case:
    """A function, the most bits that it may keep for an element, and the largest relative error of its gradient."""

    function: Callable[..., Tensor]
    bits: float
    error: float = 0.0
    positive: bool = False


class Net(nn.Module):
    """The function of an activation; its gradient is that of `shift`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.zeros(()))
        self.slopes = nn.Parameter(torch.full((C,), 0.2))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, C))
        self.kernel = nn.Parameter(KERNEL.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x) if self.function.__code__.co_argcount == 2 else self.function(x)


def flipped(x: Tensor) -> Tensor:
    return x.flip(0)


def in_place(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x + 0)


def heads(x: Tensor) -> Tensor:
    return x.view(2, 2, 4, 68, 32)


def case(function: Callable[..., Tensor], bits: float, **options: Any) -> Case:
    return Case(function, bits, **options)


EXACT = {
    "abs": Case(lambda x: x.abs(), 2.1),
    "abs()": Case(lambda x: abs(x), 2.1),
    "abs_": Case(in_place(lambda x: x.abs_()), 2.1),
    "l1_loss": Case(lambda x: F.l1_loss(x, OTHER.to(x.dtype), reduction="none"), 2.1),
    "1-norm": Case(lambda x: torch.linalg.vector_norm(x, 1, dim=1), 5),
    "clamp": Case(lambda x: x.clamp(-1, 1), 1.1),
    "clamp, one bound": Case(lambda x: torch.clamp(x, max=0.3), 1.1),
    "clamp_": Case(in_place(lambda x: x.clamp_(-0.5)), 1.1),
    "clamp between tensors": Case(lambda x: x.clamp(*(b.to(x.dtype) for b in BOUNDS)), 2.1),
    "clip": Case(lambda x: torch.clip(x, -1, 1), 1.1),
    "clamp_min": Case(lambda x: x.clamp_min(0.5), 1.1),
    "clamp_max_": Case(in_place(lambda x: x.clamp_max_(0.1)), 1.1),
    "threshold": Case(lambda x: F.threshold(x, 0.1, 20), 1.1),
    "threshold_": Case(in_place(lambda x: F.threshold_(x, 0.25, 0)), 1.1),
    "hardshrink": Case(lambda x: F.hardshrink(x, 0.25), 1.1),
    "softshrink": Case(lambda x: F.softshrink(x, 0.3), 1.1),
    "nan_to_num": Case(lambda x: x.nan_to_num(0.0), 1.1),
    "relu": Case(lambda x: F.relu(x), 1.1),
    "relu_": Case(in_place(lambda x: x.relu_()), 1.1),
    "relu6": Case(in_place(lambda x: F.relu6(x, inplace=True)), 1.1),
    "hardtanh_": Case(in_place(lambda x: F.hardtanh_(x, -0.5, 0.75)), 1.1),
    "leaky_relu_": Case(in_place(lambda x: F.leaky_relu_(x, 0.1)), 1.1),
    "hardsigmoid_": Case(in_place(lambda x: F.hardsigmoid(x, inplace=True)), 1.1),
    "rrelu in evaluation": Case(lambda x: F.rrelu(x), 1.1),
    "rrelu in training": Case(lambda x: F.rrelu(x, training=True), 32.1),
    "prelu, frozen": Case(lambda net, x: F.prelu(x, net.slopes.detach().to(x.dtype)), 2.1),
    "maximum": Case(lambda x: torch.maximum(x, flipped(x)), 2.1),
    "minimum": Case(lambda x: torch.minimum(x, flipped(x)), 2.1),
    "max of two": Case(lambda x: torch.max(x, OTHER.to(x.dtype)), 2.1),
    "min of two, broadcast": Case(lambda x: x.min(x[:, :1]), 2.1),
    "fmax": Case(lambda x: torch.fmax(x, flipped(x)), 2.1),
    "fmin": Case(lambda x: x.fmin(flipped(x)), 2.1),
    "amax": Case(lambda x: x.amax(1), 1.1),
    "amax, two dimensions": Case(lambda x: torch.amax(x, (-1, 1), keepdim=True), 1.1),
    "amin": Case(lambda x: x.amin(), 1.1),
    "max": Case(lambda x: x.max(), 1.1),
    "min": Case(lambda x: torch.min(x), 1.1),
    "max along a dimension": Case(lambda x: x.view(-1, 2).max(1)[0], 8.1),
    "sort": Case(lambda x: x.sort(1)[0], 8.1),
    "topk": Case(lambda x: x.topk(24, 1)[0], 6.1),
    "cummax": Case(lambda x: x.cummax(1)[0], 8.1),
    "gather": Case(lambda x: x.gather(1, INDEX), 8.1),
    "scatter": Case(lambda x: torch.zeros_like(x).scatter(1, INDEX, x), 8.1),
    "take_along_dim": Case(lambda x: torch.take_along_dim(x, x.argsort(1), 1), 32.1),
    "where": Case(lambda x: torch.where(MASK, x, -x), 1.1),
    "where, in words": Case(lambda x: torch.where(x > 0, x, 0.0), 1.1),
    "masked_fill": Case(lambda x: x.masked_fill(MASK, 0.0), 1.1),
    "masked_fill_": Case(in_place(lambda x: x.masked_fill_(x > 0, 0.0)), 1.1),
    "masked_select": Case(lambda x: x.masked_select(MASK), 1.1),
    "indexed by a mask": Case(lambda x: x[MASK], 1.1),
    "dropout_": Case(in_place(lambda x: F.dropout(x, 0.3, True, True)), 1.1),
    "dropout": Case(lambda x: F.dropout(x, 0.3), 1.1),
    "alpha_dropout": Case(lambda x: F.alpha_dropout(x, 0.3, True), 1.1),
    "dropout of channels": Case(lambda x: F.dropout2d(x, 0.3), 0.1),
    "stochastic depth of torchvision": Case(lambda x: stochastic_depth(x, 0.5, "row"), 0.1),
    "stochastic depth of timm": Case(lambda x: drop_path(x, 0.5, True), 0.1),
    "max_pool1d": Case(lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1), 2.1),
    "max_pool2d": Case(lambda x: F.max_pool2d(x, 3, 2, 1), 1.1),
    "max_pool2d with indices": Case(lambda x: F.max_pool2d(x, 2, 1, return_indices=True)[0], 32.1),
    "max_pool3d": Case(lambda x: F.max_pool3d(x, 2, 1), 32.1),
    "fractional_max_pool2d": Case(
        lambda x: F.fractional_max_pool2d(
            x, 2, (15, 33), _random_samples=torch.rand(N, C, 2, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        ),
        32.1,
    ),
    "adaptive_max_pool2d": Case(lambda x: F.adaptive_max_pool2d(x, (16, 33)), 32.1),
    "adaptive_max_pool1d": Case(lambda x: F.adaptive_max_pool1d(x.flatten(2), 500), 32.1),
    "avg_pool1d": Case(lambda x: F.avg_pool1d(x.flatten(2), 3), 0.1),
    "avg_pool2d": Case(lambda x: F.avg_pool2d(x, 3), 0.1),
    "avg_pool3d": Case(lambda x: F.avg_pool3d(x, 2), 0.1),
    "adaptive_avg_pool1d": Case(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7), 0.1),
    "adaptive_avg_pool2d": Case(lambda x: F.adaptive_avg_pool2d(x, 7), 0.1),
    "adaptive_avg_pool3d": Case(lambda x: F.adaptive_avg_pool3d(x, 7), 0.1),
    "padding, reflected": Case(lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), 0.1),
    "padding, replicated": Case(lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"), 0.1),
    "grid_sample": Case(lambda x: F.grid_sample(x, GRID.to(x.dtype), align_corners=False), 2.1),
    "conv2d, frozen": Case(lambda x: F.conv2d(x, KERNEL.to(x.dtype)), 8.6),
    "conv_transpose2d, frozen": Case(
        lambda x: F.conv_transpose2d(x, KERNEL.to(x.dtype), stride=2, padding=1, output_padding=1, dilation=2), 8.6
    ),
    "conv_transpose1d, frozen": Case(lambda x: F.conv_transpose1d(x.flatten(2), KERNEL[..., 0].to(x.dtype)), 8.6),
}
"""Mostly also of half precision, with ties, zeros of both signs, infinities and NaN."""

ALREADY_SMALL = ("dropout of channels", "stochastic depth of torchvision", "stochastic depth of timm")

AFFINE = {"bits": 8.6, "error": 0.02}
TWO_AFFINE = {"bits": 17.1, "error": 0.02}
RELATIVE = {"bits": 16.1, "error": 2.0**-7, "positive": True}

CODED = {
    "exp": case(lambda x: x.exp(), **AFFINE),
    "exp_": case(in_place(lambda x: x.exp_()), **AFFINE),
    "exp2": case(lambda x: torch.exp2(x), **AFFINE),
    "expm1": case(lambda x: x.expm1(), **AFFINE),
    "sin": case(lambda x: x.sin(), **AFFINE),
    "cos": case(lambda x: x.cos(), **AFFINE),
    "erf": case(lambda x: x.erf(), **AFFINE),
    "square": case(lambda x: x.square(), **AFFINE),
    "pow(2)": case(lambda x: x**2, **AFFINE),
    "pow(3)": case(lambda x: x.pow(3), bits=8.6, error=0.03),
    "power of a number": case(lambda x: 2**x, bits=10.7, error=0.02),
    "addcmul": case(lambda x: torch.addcmul(x, x, flipped(x)), **TWO_AFFINE),
    "mul": case(lambda x: x * flipped(x), bits=9.1, error=0.1),
    "mul_": case(in_place(lambda x: x.mul_(flipped(x))), **TWO_AFFINE),
    "lerp": case(lambda x: torch.lerp(x, flipped(x), 0.1 * x), bits=25.6, error=0.02),
    "logaddexp": case(lambda x: torch.logaddexp(x, flipped(x)), **TWO_AFFINE),
    "glu": case(lambda x: F.glu(x, 1), **AFFINE),
    "std": case(lambda x: x.std(1), bits=9.6, error=0.02),
    "var": case(lambda x: x.var((1, 2)), **AFFINE),
    "norm": case(lambda x: x.norm(dim=1), bits=9.6, error=0.02),
    "vector_norm": case(lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), **AFFINE),
    "einsum": case(lambda x: torch.einsum("nchw,ndhw->ncd", x, flipped(x)), **TWO_AFFINE),
    "matmul of matrices": case(lambda x: x.view(C, -1) @ flipped(x).view(C, -1).t(), **TWO_AFFINE),
    "conv2d, trained": case(lambda net, x: F.conv2d(x, net.kernel), bits=8.6, error=0.02),
    "conv_transpose2d, trained": case(lambda net, x: F.conv_transpose2d(x, net.kernel), bits=8.6, error=0.02),
    "prelu, trained": case(lambda net, x: F.prelu(x, net.slopes), bits=9.7, error=0.02),
    "sqrt": case(lambda x: x.sqrt(), **RELATIVE),
    "sqrt_": case(in_place(lambda x: x.sqrt_()), **RELATIVE),
    "rsqrt": case(lambda x: x.rsqrt(), bits=16.1, error=3 * 2.0**-8, positive=True),
    "reciprocal": case(lambda x: 1 / x, **RELATIVE),
    "log": case(lambda x: x.log(), **RELATIVE),
    "log2": case(lambda x: torch.log2(x), **RELATIVE),
    "power": case(lambda x: x**-0.5, **RELATIVE),
    "quotient": case(lambda x: x / flipped(x), bits=32.1, error=2.0**-6, positive=True),
    "quotient of a constant": case(lambda x: OTHER / x, bits=48.1, error=2.0**-7, positive=True),
    "quotient by rows": case(lambda x: x / x.mean(1, keepdim=True), bits=17.1, error=2.0**-6, positive=True),
    "addcdiv": case(lambda x: torch.addcdiv(x, x, flipped(x)), bits=32.1, error=2.0**-6, positive=True),
    "tan": case(lambda x: (x * 0.3).tan(), bits=16.1, error=2.0**-7),
    "sinh": case(lambda x: x.sinh(), bits=16.1, error=2.0**-6),
    "cosh": case(lambda x: x.cosh(), bits=16.1, error=2.0**-6),
    "hypot": case(lambda x: torch.hypot(x, flipped(x)), bits=48.1, error=2.0**-7),
    "atan2": case(lambda x: torch.atan2(x, flipped(x)), bits=32.1, error=2.0**-6),
    "normalize": case(lambda x: F.normalize(x, dim=1), bits=18.1, error=2.0**-6),
    "log_softmax": case(lambda x: F.log_softmax(x, 1), bits=16.1, error=2.0**-6),
    "cross_entropy": case(
        lambda x: F.cross_entropy(x, INDEX[:, 0].clone(), reduction="none"), bits=18.1, error=2.0**-6
    ),
    "bce_with_logits": case(
        lambda x: F.binary_cross_entropy_with_logits(x, MASK.float(), reduction="none"), bits=48.1, error=2.0**-6
    ),
    "softmax": case(lambda x: x.softmax(-1), bits=6.1, error=0.2),
    "softmax of channels": case(lambda x: F.softmax(x, 1), bits=5.1, error=0.2),
    "softmin": case(lambda x: F.softmin(x, -1), bits=6.1, error=0.2),
    "logsumexp": case(lambda x: torch.logsumexp(x, 1), bits=5.1, error=0.2),
    "gumbel_softmax": case(lambda x: F.gumbel_softmax(x), bits=6.1, error=0.2),
    "gelu": case(lambda x: F.gelu(x), bits=4.1, error=0.1),
    "silu": case(lambda x: F.silu(x), bits=4.1, error=0.1),
    "sigmoid_": case(in_place(lambda x: x.sigmoid_()), bits=4.1, error=0.1),
    "tanh_": case(in_place(lambda x: torch.tanh_(x)), bits=4.1, error=0.1),
    "elu_": case(in_place(lambda x: F.elu_(x)), bits=4.1, error=0.1),
    "celu_": case(in_place(lambda x: F.celu_(x, 0.7)), bits=4.1, error=0.1),
    "selu_": case(in_place(lambda x: F.selu_(x)), bits=4.1, error=0.1),
    "softsign": case(lambda x: F.softsign(x), bits=4.1, error=0.1),
    "tanhshrink": case(lambda x: F.tanhshrink(x), bits=4.1, error=0.1),
    "logsigmoid": case(lambda x: F.logsigmoid(x), bits=4.1, error=0.1),
    "atan": case(lambda x: x.atan(), bits=4.1, error=0.1),
    "asinh": case(lambda x: x.asinh(), bits=4.1, error=0.1),
    "group_norm": case(lambda x: F.group_norm(x, 4), bits=4.6, error=0.1),
    "group_norm, trained": case(lambda net, x: F.group_norm(x, 4, net.gain, net.slopes), bits=4.6, error=0.1),
    "instance_norm": case(lambda x: F.instance_norm(x), bits=4.7, error=0.1),
    "layer_norm": case(lambda x: F.layer_norm(x, (W,)), bits=5.6, error=0.1),
    "attention of five dimensions": case(
        lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), torch.zeros(2, 1, 68, 68)),
        bits=70,
        error=0.3,
    ),
    "attention, broadcast": case(
        lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], torch.zeros(H, H)), bits=20, error=0.3
    ),
    "lp_pool2d": case(lambda x: F.lp_pool2d(x, 2, 3), bits=20, error=0.1, positive=True),
    "local_response_norm": case(lambda x: F.local_response_norm(x, 5), bits=60, error=0.1),
}

IN_FULL = {
    "log1p": lambda x: x.log1p(),
    "acos": lambda x: torch.acos(x * 0.5),
    "sinc": lambda x: x.sinc(),
    "logit": lambda x: torch.logit(x * 0.1),
    "power of two tensors": lambda x: x**OTHER,
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "aminmax": lambda x: torch.stack(torch.aminmax(x, dim=1)),
    "infinite norm": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
    "median of all": lambda x: x.median(),
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "pairwise_distance": lambda x: F.pairwise_distance(x, OTHER),
    "cosine_similarity": lambda x: F.cosine_similarity(x, OTHER),
    "cdist": lambda x: torch.cdist(x.flatten(2), OTHER.flatten(2)),
    "mse_loss": lambda x: F.mse_loss(x, OTHER, reduction="none"),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, OTHER, reduction="none"),
    "huber_loss": lambda x: F.huber_loss(x, OTHER, reduction="none"),
    "product with a constant": lambda x: x * OTHER,
    "quotient by a constant": lambda x: x / OTHER,
}

FREE = {
    "interpolate, bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "interpolate, nearest": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate, bicubic": lambda x: F.interpolate(x, size=(9, 13), mode="bicubic", antialias=True),
    "cumsum": lambda x: x.cumsum(1),
    "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum((1, 2)),
    "unfold": lambda x: F.unfold(x, 3),
    "fold": lambda x: F.fold(x.reshape(N, -1, 16)[:, :64], (8, 8), 2, stride=2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "padding": lambda x: F.pad(x, (1, 1)),
    "padding, circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "roll": lambda x: x.roll(3, 1),
    "concatenation": lambda x: torch.cat([x, x]),
    "subtraction": lambda x: 1 - x - flipped(x),
    "sign": lambda x: x.sign(),
    "remainder": lambda x: x.remainder(2.0),
    "lerp by a number": lambda x: torch.lerp(x, flipped(x), 0.3),
    "index_select": lambda x: x.index_select(1, torch.arange(16)),
    "embedding": lambda x: F.embedding(torch.arange(100) % 64, x.reshape(-1, W)),
}


def attach(net: nn.Module, bits: int | None) -> nn.Module:
    interceptor = ActivationInterceptor()
    layer = types.SimpleNamespace(disable_adapters=False, active_adapters=["default"])
    interceptor.layer = cast(BaseTunerLayer, layer)
    interceptor.set_adapter_settings("default", ActivationSettings.from_config(bits))
    interceptor.attach(net)
    return net


def batch(case_: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return (x.abs() * 2 + 0.05 if case_.positive else x).to(dtype)


def run(function: Callable[..., Tensor], x: Tensor, bits: int | str | None) -> list[Tensor]:
    """Output, gradient of the input and gradients of the parameters that have one."""
    net = Net(function)
    if bits != "stock":
        attach(net, cast(int, bits))
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    output = net(leaf * 1)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    wanted = [leaf, net.slopes, net.gain, net.kernel]
    return [
        output.detach(),
        *(g for g in torch.autograd.grad(output, wanted, grad, allow_unused=True) if g is not None),
    ]


def kept_bits(function: Callable[..., Tensor], x: Tensor, bits: int | str | None) -> float:
    class Shifted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.shift)

    net = Shifted(function)
    if bits != "stock":
        attach(net, cast(int, bits))
    return sum(t.bytes for t in saved_tensors(net, x)) * 8 / x.numel()


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, bits: int | None) -> None:
    exact = EXACT[name]
    x = batch(exact)
    assert_same(run(exact.function, x, bits), run(exact.function, x, "stock"))
    assert kept_bits(exact.function, x, bits) <= exact.bits
    assert exact.bits < kept_bits(exact.function, x, "stock") or name in ALREADY_SMALL


@pytest.mark.parametrize("layout", ["ties", "special", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXACT)
def test_exact_of_other_inputs(name: str, dtype: torch.dtype, layout: str) -> None:
    exact = EXACT[name]
    x = (batch(exact) * 4).round() / 4
    if layout == "special":
        if name not in ("hardtanh_", "relu6", "hardshrink", "softshrink"):
            x.view(-1)[::97] = float("nan")  # torch itself passes 0 or 1 there, depending on the place in the vector
        x.view(-1)[1::89] = float("inf")
        x.view(-1)[2::83] = -float("inf")
        x.view(-1)[3::79] = -0.0
    x = x.to(dtype)
    change = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": lambda t: torch.cat([t, t], -1)[..., ::2],
        "expanded": lambda t: t[:, :1].expand(SHAPE),
    }.get(layout, lambda t: t)

    def function(net: Net, t: Tensor) -> Tensor:
        return exact.function(net, change(t)) if exact.function.__code__.co_argcount == 2 else exact.function(change(t))

    try:
        expected = run(function, x, "stock")
    except RuntimeError as error:  # what torch has no kernel for, or refuses, is not ours to have
        with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0])):
            run(function, x, 4)
        return
    # the gradient of what was expanded is a sum, whose order follows the layout of its parts
    summed = layout == "expanded" or "broadcast" in name
    assert_same(run(function, x, 4), expected, {torch.float32: 1e-5}.get(dtype, 0.1) if summed else 0.0)


@pytest.mark.parametrize("name", CODED)
def test_coded(name: str) -> None:
    coded = CODED[name]
    x = batch(coded)
    expected, actual = run(coded.function, x, "stock"), run(coded.function, x, 4)
    exact = run(coded.function, x, None)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs, ours_exact in zip(actual[1:], expected[1:], exact[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= coded.error
        torch.testing.assert_close(ours_exact, theirs, rtol=1e-4, atol=1e-4)
    assert kept_bits(coded.function, x, 4) <= coded.bits
    assert coded.bits < kept_bits(coded.function, x, "stock")


@pytest.mark.parametrize("name", [*EXACT, *CODED])
@pytest.mark.parametrize("shape", [(0, C, H, W), (N, C, 1, 1)])
def test_no_images_and_single_places(name: str, shape: tuple[int, ...]) -> None:
    function = (EXACT.get(name) or CODED[name]).function
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    try:
        expected = run(function, x, "stock")
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:
        with pytest.raises(type(error)):
            run(function, x, 4)
        return
    assert_same(run(function, x, 4), expected)


@pytest.mark.parametrize("name", CODED)
def test_coded_is_nan_where_torch_is(name: str) -> None:
    function = CODED[name].function
    x = batch(CODED[name])
    x[0, 3, 5, 7] = float("nan")
    x[1, 4, 2, 9] = float("inf")
    for ours, theirs in zip(run(function, x, 4), run(function, x, "stock"), strict=True):
        assert not ours[theirs.isnan()].isfinite().any()


@pytest.mark.parametrize("name", [n for n, c in CODED.items() if c.bits in (16.1, 32.1) and c.positive])
def test_relative_error_of_every_element(name: str) -> None:
    coded = CODED[name]
    x = batch(coded)
    x.view(-1)[::7] *= 1e-6
    x.view(-1)[1::7] *= 1e6
    if name in ("addcdiv", "quotient"):  # sums of two gradients, which may cancel
        return
    expected, actual = run(coded.function, x, "stock")[1], run(coded.function, x, 4)[1]
    assert ((actual - expected).abs() <= expected.abs() * 2 * coded.error).all()


@pytest.mark.parametrize("name", IN_FULL)
def test_what_is_left_alone_is_reported(name: str) -> None:
    function = IN_FULL[name]
    x = batch(Case(function, 0, positive=True)) / 10 + 0.01

    class Shifted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.function(x + self.shift)

    assert_same(run(function, x, 4), run(function, x, "stock"))
    report = coverage_report(attach(Shifted(function), 4), x)
    assert sum(row.bytes for row in report.left_alone()) >= x.nbytes


@pytest.mark.parametrize("name", FREE)
def test_what_torch_keeps_nothing_of(name: str) -> None:
    x = batch(Case(FREE[name], 0))
    assert_same(run(FREE[name], x, 4), run(FREE[name], x, "stock"))
    assert kept_bits(FREE[name], x, 4) < 0.2
