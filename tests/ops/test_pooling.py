"""Pooling: gradients are torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.ops.pooling import adaptive_average_pool, average_pool, max_pool
from peft_s2a.settings import ActivationSettings
from peft_s2a.table import TABLE, Context

CONTEXT = Context(ActivationSettings())
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MAX = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 5, "stride": 1, "padding": 2},
    {"kernel_size": 1},
    {"kernel_size": 8, "stride": 3, "padding": 4},
]
AVERAGE = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False, "ceil_mode": True},
    {"kernel_size": (2, 3), "divisor_override": 5},
]
ADAPTIVE = [1, (1, 1), (3, 2), (None, 4), 7, (13, 13)]
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((F.max_pool2d, o) for o in MAX),
    *((F.avg_pool2d, o) for o in AVERAGE),
    *((F.adaptive_avg_pool2d, {"output_size": o}) for o in ADAPTIVE),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: x[:, 1:],
    "unbatched": lambda x: x[0],
    "one_channel": lambda x: x[:, :1],
}


def ids(case: Any) -> str:
    return str(case if isinstance(case, dict) else getattr(case, "__name__", case))


@pytest.mark.parametrize(("function", "options"), CASES, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_to_torch(
    function: Any, options: dict[str, Any], layout: str, dtype: torch.dtype, leaf: Any, same_as_torch: Any
) -> None:
    change = LAYOUTS[layout]
    x = leaf(2, 12, 11, 13, dtype=dtype)
    handler = TABLE[function]
    if layout in ("unbatched", "one_channel") and function is F.max_pool2d:
        x = leaf(2, 12, 33, 35, dtype=dtype)  # large enough to be handled
    same_as_torch(lambda x: handler(CONTEXT, change(x), **options), lambda x: function(change(x), **options), x)


@pytest.mark.parametrize(("function", "options"), CASES, ids=ids)
def test_numbers_that_are_not_finite(function: Any, options: dict[str, Any], leaf: Any, same_as_torch: Any) -> None:
    x = leaf(2, 12, 11, 13).detach()
    x[0, 0, 3, 3], x[0, 1, 4, 4], x[1, 2] = float("nan"), float("inf"), -float("inf")
    same_as_torch(
        lambda x: TABLE[function](CONTEXT, x, **options), lambda x: function(x, **options), x.requires_grad_()
    )


def test_ties_and_zero_batches(same_as_torch: Any) -> None:
    options = (3, 3), (2, 2), (1, 1), (1, 1), False
    for x in (torch.zeros(2, 8, 9, 9), torch.zeros(0, 8, 9, 9)):
        same_as_torch(lambda x: max_pool(x, *options), lambda x: F.max_pool2d(x, 3, 2, 1), x.requires_grad_())
    empty = torch.zeros(0, 8, 9, 9, requires_grad=True)
    same_as_torch(lambda x: adaptive_average_pool(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1), empty)
    average = (3, 3), (2, 2), (0, 0), False, True, None
    same_as_torch(lambda x: average_pool(x, average), lambda x: F.avg_pool2d(x, 3, 2), empty)


def test_gradcheck(leaf: Any) -> None:
    x = leaf(1, 2, 5, 6, dtype=torch.double)
    check = torch.autograd.gradcheck
    assert check(lambda x: max_pool(x, (3, 3), (2, 2), (1, 1), (1, 1), False), x)
    assert check(lambda x: average_pool(x, ((2, 2), (2, 2), (0, 0), False, True, None)), x)
    assert check(lambda x: adaptive_average_pool(x, (2, 3)), x)
    assert check(lambda x: adaptive_average_pool(x, 1), x)


@pytest.mark.parametrize(("kernel", "num_bits"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 8)])
def test_bytes_kept(kernel: int, num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x = leaf(1, 4, 16 + kernel - 1, 16 + kernel - 1)
    kept = kept_bytes(lambda: max_pool(x, (kernel, kernel), (1, 1), (0, 0), (1, 1), False))
    assert kept == 4 * 16 * 16 * num_bits // 8


def test_averages_keep_nothing(leaf: Any, kept_bytes: Any) -> None:
    x = leaf(2, 4, 16, 16)
    assert kept_bytes(lambda: adaptive_average_pool(x, 1)) == 0
    assert kept_bytes(lambda: average_pool(x, ((2, 2), (2, 2), (0, 0), False, True, None))) == 0


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    x = leaf(2, 4, 8, 8)
    refuses_double_backward(lambda x: max_pool(x, (3, 3), (2, 2), (1, 1), (1, 1), False), x)
    refuses_double_backward(lambda x: adaptive_average_pool(x, 1), x)
