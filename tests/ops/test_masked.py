"""Functions with two slopes: gradients are torch's own, from one bit per element.

The masks are those of `table.py`, reached through its handlers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.ops.masked import masked
from peft_s2a.settings import ActivationSettings
from peft_s2a.table import TABLE, Context

CONTEXT = Context(ActivationSettings())

CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "hardtanh": (F.hardtanh, {"min_val": -0.75, "max_val": 1.25}),
    "leaky_relu": (F.leaky_relu, {"negative_slope": 0.2}),
    "hardsigmoid": (F.hardsigmoid, {}),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, :, ::2],
    "channels_last": lambda x: x.unsqueeze(0).contiguous(memory_format=torch.channels_last),
}


def handler(name: str) -> Callable[[Tensor], Tensor]:
    function, options = CALLS[name]
    return lambda x: TABLE[function](CONTEXT, x, **options)


def relu(x: Tensor) -> Tensor:
    return masked(x, torch.relu, lambda x: ~(x <= 0))


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str, leaf: Any) -> None:
    x = leaf(2, 1024, dtype=torch.double, scale=3)
    grad = leaf(2, 1024, dtype=torch.double, needs=False)
    (dx,) = torch.autograd.grad(handler(name)(x), x, grad)
    step = 1e-6
    function, options = CALLS[name]
    with torch.no_grad():
        numeric = (function(x + step, **options) - function(x - step, **options)) / (2 * step) * grad
    torch.testing.assert_close(dx, numeric, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(relu, leaf(3, 5, dtype=torch.double))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_bit_identical_to_torch(name: str, dtype: torch.dtype, layout: str, leaf: Any, same_as_torch: Any) -> None:
    change = LAYOUTS[layout]
    function, options = CALLS[name]
    x = leaf(8, 16, 40, dtype=dtype, scale=3)
    same_as_torch(lambda x: handler(name)(change(x)), lambda x: function(change(x), **options), x)


@pytest.mark.parametrize("name", CALLS)
def test_corners_and_numbers_that_are_not_finite(name: str, same_as_torch: Any) -> None:
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6.0, -3.0, 3.0, -0.75, 1.25, 1e38, 1e-45]
    if name in ("relu6", "hardtanh"):
        special = special[1:]  # torch itself passes 0 or 1 at NaN, depending on the place in the vector
    x = torch.tensor(special * 100).requires_grad_()
    function, options = CALLS[name]
    same_as_torch(handler(name), lambda x: function(x, **options), x)


@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (3, 1025), (0, 4)])
def test_ragged_sizes(shape: tuple[int, ...], leaf: Any, same_as_torch: Any, small_chunks: None) -> None:
    same_as_torch(relu, torch.relu, leaf(*shape))


@pytest.mark.parametrize("name", CALLS)
def test_one_bit_per_element(name: str, leaf: Any, kept_bytes: Any) -> None:
    x = leaf(3, 1024)
    assert kept_bytes(lambda: handler(name)(x)) == 3 * 1024 // 8
    assert kept_bytes(lambda: relu(x.detach())) == 0


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardtanh"])
def test_in_place(name: str, leaf: Any) -> None:
    function, options = CALLS[name]
    x = leaf(4, 512, scale=3)
    hidden = x * 2
    output = TABLE[function](CONTEXT, hidden, inplace=True, **options)
    assert output.data_ptr() == hidden.data_ptr()
    expected = function(x * 2, **options)
    assert torch.equal(output, expected)
    grad = leaf(4, 512, needs=False)
    assert torch.equal(torch.autograd.grad(output, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_in_place_on_a_tensor_that_another_operator_keeps_is_an_error(leaf: Any) -> None:
    x = leaf(4, 512)
    hidden = x.exp()  # keeps its output
    output = TABLE[F.relu](CONTEXT, hidden, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_leaf_is_left_to_torch(leaf: Any) -> None:
    assert TABLE[F.relu](CONTEXT, leaf(4, 512), inplace=True) is NotImplemented


def test_in_place_on_a_view(leaf: Any) -> None:
    x, grad = leaf(4, 512), leaf(4, 512, needs=False)
    results = []
    for relu_ in (lambda part: TABLE[F.relu](CONTEXT, part, inplace=True), torch.relu_):
        hidden = x * 2
        relu_(hidden[1:])
        results.append((hidden.detach(), torch.autograd.grad(hidden, x, grad)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(relu, leaf(4, 256))


def test_overwriting(leaf: Any, small_chunks: None) -> None:
    x, grad = leaf(4, 500), leaf(4, 500, needs=False)
    hidden = x * 2
    output = masked(hidden, torch.relu, lambda x: x > 0, overwrite=True)
    assert output.data_ptr() == hidden.data_ptr()
    assert torch.equal(output, torch.relu(x * 2))
    expected = torch.autograd.grad(torch.relu(x * 2), x, grad)[0]
    assert torch.equal(torch.autograd.grad(output, x, grad)[0], expected)
    kept = x.exp()
    masked(kept, torch.relu, lambda x: x > 0, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_gradient_with_a_negative_bit(leaf: Any) -> None:
    x = leaf(40, 40)
    gradient = torch.complex(leaf(40, 40, needs=False), leaf(40, 40, needs=False)).conj().imag
    (found,) = torch.autograd.grad(masked(x, torch.relu, lambda x: x > 0), x, gradient)
    (expected,) = torch.autograd.grad(torch.relu(x), x, gradient)
    assert torch.equal(found, expected)
